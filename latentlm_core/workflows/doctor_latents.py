"""``latentlm doctor`` of a latent set: its files, its statistics, its tokenizer.

Notable choices:
- statistics are computed anew from the shards: a manifest may agree with itself and lie;
- whether a set is stale is asked of the runs in the workspace, for a manifest names the weights of
  its tokenizer and not where they lay. A set stays usable with the copy of it that it holds.
"""

from pathlib import Path

import numpy as np

from latentlm_core.config import build
from latentlm_core.data.manifest import MANIFEST, LatentSums, Manifest, ShardEntry, read_manifest
from latentlm_core.data.partial import PROGRESS
from latentlm_core.data.shard_file import Shard
from latentlm_core.data.shards import LatentSet, check_hash
from latentlm_core.errors import ConfigError, CorruptFileError, LatentLMError
from latentlm_core.export_config import TokenizerExport, export_kind
from latentlm_core.files import CONFIG_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, read_json, sha256_file
from latentlm_core.progress import Progress
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.workflows.doctor_export import check_export, read_export
from latentlm_core.workflows.doctor_locks import check_lock, is_locked
from latentlm_core.workflows.doctor_noise import check_noise
from latentlm_core.workflows.findings import Finding, fault, listed, ok, unread, warning, within
from latentlm_core.workflows.workspace import EXPORT, workspace

TOLERANCE = 1e-9
"""Relative difference of sums that another machine's rounding explains."""
NUM_READ = 16
"""Examples whose texts are read, from all over a set."""
AGAIN = "Run tokenize again: it makes damaged files anew."


def check_latents(folder: Path, progress: Progress) -> list[Finding]:
    """Examine a latent set; every byte of it is read."""
    lock = check_lock(folder, "tokenize")
    if not (folder / MANIFEST).is_file():
        return [lock, _check_unfinished(folder)]
    try:
        manifest = read_manifest(folder)
    except LatentLMError as error:
        return [lock, unread("manifest", error)]
    shards = _check_shards(folder, manifest, progress)
    findings = [lock, _describe(manifest), *shards]
    if any(finding.state == "fault" for finding in shards):
        findings.append(warning("examples", "Not examined, for shards are damaged."))
    else:
        findings.append(_check_examples(folder, manifest))
    return [
        *findings,
        *_check_scale(manifest),
        _check_copy(folder, manifest),
        _check_staleness(folder, manifest),
    ]


def _check_unfinished(folder: Path) -> Finding:
    what = "manifest"
    try:
        plan = read_json(folder / PROGRESS / "plan.json")
        number = -(-plan["num_source"] // plan["shard_size"])
    except LatentLMError as error:
        return unread(what, error)
    except (KeyError, TypeError, ZeroDivisionError):
        return fault(what, f"{folder / PROGRESS / 'plan.json'} is no plan. Remove {folder}.")
    done = len(list((folder / PROGRESS).glob("shard-*.json")))
    told = f"not finished: {done} of {number} shards are made"
    return warning(what, told if is_locked(folder) else f"{told}. Run tokenize again to go on.")


def _describe(manifest: Manifest) -> Finding:
    told = f"{manifest.num_examples:,} examples of {manifest.data} ({manifest.split})"
    if not manifest.num_examples:
        return fault("manifest", f"{told}. Tokenize a set that has some.")
    if manifest.skipped:
        reasons = listed([item.reason.rstrip(".") for item in manifest.skipped[:2]])
        return warning(
            "manifest",
            f"{told}, {len(manifest.skipped)} left out ({reasons}). "
            "Mend these and tokenize into another --out.",
        )
    return ok("manifest", told)


def _check_shards(folder: Path, manifest: Manifest, progress: Progress) -> list[Finding]:
    """A line for each shard with a fault, and one for all the others."""
    findings = []
    with progress.bar("examining shards", len(manifest.shards), "shards") as bar:
        for entry in manifest.shards:
            try:
                _check_shard(folder, manifest, entry)
            except CorruptFileError as error:
                findings.append(unread(entry.file, error))
            bar.advance()
    sound = len(manifest.shards) - len(findings)
    told = f"hash and statistics of {sound} of {len(manifest.shards)} are those of the manifest"
    return [ok("shards", told), *findings] if sound else findings


def _check_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> None:
    """Compare a shard with the manifest.

    Raises:
        CorruptFileError: it is missing, or not what the manifest says.
    """
    path = folder / entry.file
    check_hash(path, entry.sha256)
    shard = Shard(folder, manifest, entry)
    if not _agree(LatentSums.of(shard.mean, shard.log_variance), entry.sums):
        raise CorruptFileError(
            f"{path} has latents of other statistics than the manifest says.",
            hint=f"Remove {folder} and tokenize again",
        )


def _agree(found: LatentSums, told: LatentSums) -> bool:
    """Whether sums are equal but for rounding, each against the size of what was summed."""
    squares, variance = np.array(told.sum_squares), np.array(told.sum_variance)
    sizes = np.stack([np.sqrt(told.count * squares), squares, variance])
    ours = np.array([found.sum, found.sum_squares, found.sum_variance])
    theirs = np.array([told.sum, told.sum_squares, told.sum_variance])
    return found.count == told.count and bool((abs(ours - theirs) <= TOLERANCE * sizes).all())


def _check_examples(folder: Path, manifest: Manifest) -> Finding:
    try:
        latents = LatentSet(folder, manifest)
        count = min(NUM_READ, len(latents))
        records = [latents.read_one(place * len(latents) // count) for place in range(count)]
    except CorruptFileError as error:
        return unread("examples", error)
    captions = sum(record.caption is not None for record in records)
    labels = sum(record.label >= 0 for record in records)
    asked = sum(bool(record.questions) for record in records)
    told = f"of {count} read, {captions} have captions, {labels} labels, {asked} questions"
    if records and not (captions or labels):
        return warning("examples", f"{told}. Nothing tells a model what to make of them.")
    return ok("examples", told)


def _check_scale(manifest: Manifest) -> list[Finding]:
    rule = manifest.posterior
    try:
        stats = manifest.stats(rule)
    except LatentLMError as error:
        return [unread("normalisation", error)]
    shift, scale = stats.shift[0], stats.scale[0]
    findings = [ok("normalisation", f"shift {shift:.4g}, scale {scale:.4g}")]
    if rule.kind is not PosteriorKind.LEARNED:
        findings += check_noise(rule.kind, rule.noise_variance() ** 0.5 * scale)
    return findings


def _check_copy(folder: Path, manifest: Manifest) -> Finding:
    """The tokenizer inside the set."""
    what, inside = "tokenizer", folder / TOKENIZER_FOLDER
    path = inside / WEIGHTS_FILE
    if not path.is_file():
        return fault(what, f"{path} is missing. {AGAIN}")
    if sha256_file(path) != manifest.tokenizer_sha256:
        return fault(what, f"{path} is not the tokenizer that made the latents. {AGAIN}")
    faults = [f for f in within(what, check_export(inside)) if f.state != "ok"]
    if faults:
        return faults[0]
    try:
        told = build(SigmaVAEConfig, manifest.tokenizer, str(folder / MANIFEST))
    except ConfigError as error:
        return unread(what, error)
    export = read_export(inside)
    if not isinstance(export, TokenizerExport) or export.tokenizer != told:
        return fault(
            what,
            f"{inside / CONFIG_FILE} is not what the manifest says. Copy the one of the run that "
            "made the latents.",
        )
    return ok(what, "its copy is the one that made the latents")


def _check_staleness(folder: Path, manifest: Manifest) -> Finding:
    """Whether a run of the workspace still has the tokenizer."""
    what = "staleness"
    exports = [
        path.parent
        for path in sorted((workspace() / "runs").glob(f"*/{EXPORT}/{WEIGHTS_FILE}"))
        if export_kind(path.parent) == "sigma-vae"
    ]
    for export in exports:
        if sha256_file(export / WEIGHTS_FILE) == manifest.tokenizer_sha256:
            return ok(what, f"{export.parent} still has the tokenizer")
    try:
        copy = read_export(folder / TOKENIZER_FOLDER)
    except LatentLMError:
        return warning(what, "Not examined, for the set holds no export that says what made it.")
    kin = [export for export in exports if _is_kin(export, copy)]
    if kin:
        return warning(
            what,
            f"{kin[-1].parent}, of the same data and recipe, has other weights now. The set "
            "goes on with its own copy; for the new ones tokenize into another --out.",
        )
    return warning(
        what, "Not examined, for no run of the workspace was trained like the set's tokenizer."
    )


def _is_kin(folder: Path, copy: object) -> bool:
    """Whether an export came of the run that the tokenizer in a set came of, then or later."""
    try:
        export = read_export(folder)
    except LatentLMError:
        return False
    if not isinstance(export, TokenizerExport) or not isinstance(copy, TokenizerExport):
        return False
    names = ("data", "recipe")
    alike = all(export.provenance.get(name) == copy.provenance.get(name) for name in names)
    return alike and export.tokenizer == copy.tokenizer
