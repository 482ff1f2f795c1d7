"""``latentlm doctor`` of a data set: whether it opens, decodes, and has words and labels.

A set is opened as each command does it. What only a folder's name tells is tried as images, then
as recordings, then as texts. A set of the hub is downloaded, as it is by the commands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentlm_core.data.audio import MAX_SKIPPED_SHARE
from latentlm_core.data.base import MAX_BROKEN_SHARE, Clip, Example, num_allowed_broken
from latentlm_core.data.blocks import streamed
from latentlm_core.data.mixture import TEXT
from latentlm_core.data.sources import IMAGE_SETS, SPEECH_SETS, open_source
from latentlm_core.data.speech_sources import open_speech
from latentlm_core.data.text_sources import TextItem
from latentlm_core.data.texts import STREAM, open_texts
from latentlm_core.errors import DataError, LatentLMError
from latentlm_core.workflows.findings import Finding, fault, listed, ok, unread, warning

NUM_DECODED = 16
"""Items that are decoded: the first one, and others from all over the set."""

Open = Callable[[str, str], Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A modality.

    Attributes:
        items: what they are called.
        names: sets that are of this kind by their name.
        open: from a name and a split to a source.
        describe: from a source and some of its items to what is found there.
        broken_share: what part of a source ``tokenize`` leaves out before it refuses it.
    """

    items: str
    names: tuple[str, ...]
    open: Open
    describe: Callable[[Any, Any], list[Finding]]
    broken_share: float = MAX_BROKEN_SHARE


def check_data(spec: str) -> list[Finding]:
    """Examine a data set.

    Args:
        spec: a name or a folder, as ``--data`` takes it.
    """
    name = spec.partition(":")[0]
    named = [kind for kind in KINDS if name in kind.names]
    if spec.startswith(TEXT):
        spec = spec.removeprefix(TEXT)
        if spec.startswith(STREAM):
            return [warning("open", "A stream is not examined: it is read while it is downloaded.")]
    refusals = []
    for kind in named or KINDS:
        try:
            source = kind.open(spec, "train")
        except LatentLMError as error:
            refusals.append((kind, error))
        else:
            return [
                ok("open", f"{len(source):,} {kind.items}"),
                *_check_items(source, kind),
                _check_test(spec, kind, source),
            ]
    if len(refusals) == 1:
        return [unread("open", refusals[0][1])]
    reasons = " ".join(f"As {kind.items}: {error}" for kind, error in refusals)
    return [fault("open", f"{spec} is no data set. {reasons}")]


def _check_items(source: Any, kind: Kind) -> list[Finding]:
    """Decode some items; what is found in those that are sound."""
    count = min(NUM_DECODED, len(source))
    items, broken = [], []
    for place in range(count):
        try:
            items.append(source[place * len(source) // count])
        except DataError as error:
            broken.append(str(error).rstrip("."))
    if not broken:
        return [ok("decode", f"all {count} that were tried"), *kind.describe(source, items)]
    told = f"{len(broken)} of {count} are broken: {'; '.join(broken[:3])}"
    if not items or len(broken) > num_allowed_broken(len(source), kind.broken_share):
        return [fault("decode", f"{told}. Mend or remove them: tokenize refuses the set.")]
    found = warning("decode", f"{told}. They are left out, as long as they are few.")
    return [found, *kind.describe(source, items)]


def _check_test(spec: str, kind: Kind, train: Any) -> Finding:
    what = "test split"
    held_out = "every twentieth" if streamed(train) is None else "the first ones"
    try:
        source = kind.open(spec, "test")
    except DataError as error:
        return warning(
            what,
            f"{error} Training holds out {held_out} of train, which eval recon reads; other "
            "evaluations want --split train.",
        )
    try:
        first = source[0]
    except DataError as error:
        return warning(what, f"{len(source):,} {kind.items}; the first is broken: {error}")
    return ok(what, f"{len(source):,} {kind.items}, the first is {first.key}")


def _describe_images(source: Any, items: Sequence[Example]) -> list[Finding]:
    sides = [side for example in items for side in example.image.shape[:2]]
    labels = [example.label for example in items]
    captions = [example.caption for example in items]
    asked = sum(bool(example.questions) for example in items)
    is_labelled = any(label is not None for label in labels)
    is_worded = asked > 0 or any(captions)
    findings = [ok("images", f"sides of {min(sides)} to {max(sides)} pixels")]
    if is_labelled or not is_worded:
        findings.append(_labelled("labels", labels, source.classes, "class-conditional models"))
    if is_worded or not is_labelled:
        findings.append(_worded("captions", captions, "models of text and images"))
    if asked:
        findings.append(ok("questions", f"{asked} of {len(items)} have some"))
    return findings


def _describe_clips(source: Any, items: Sequence[Clip]) -> list[Finding]:
    seconds = [len(clip.samples) / clip.sample_rate for clip in items]
    rates = ", ".join(f"{rate:,} Hz" for rate in sorted({clip.sample_rate for clip in items}))
    length = f"{min(seconds):.1f} to {max(seconds):.1f} s at {rates}"
    silent = [clip.key for clip in items if not np.any(clip.samples)]
    speakers = [clip.speaker for clip in items]
    return [
        warning("audio", f"{length}; silent: {listed(silent)}. Remove them.")
        if silent
        else ok("audio", length),
        _worded("transcripts", [clip.text for clip in items], "text-to-speech models"),
        _labelled("speakers", speakers, source.classes, "prompts of the same voice"),
    ]


def _describe_texts(source: Any, items: Sequence[TextItem]) -> list[Finding]:
    lengths = [len(item.text) for item in items]
    return [ok("texts", f"{min(lengths):,} to {max(lengths):,} characters")]


def _worded(what: str, texts: Sequence[str | None], purpose: str) -> Finding:
    return _present(what, sum(bool(text) for text in texts), len(texts), purpose)


def _labelled(
    what: str, labels: Sequence[int | None], names: Sequence[str], purpose: str
) -> Finding:
    there = [label for label in labels if label is not None]
    if any(not 0 <= label < len(names) for label in there):
        return fault(what, f"there are numbers beyond the {len(names)} names. Mend the set.")
    return _present(what, len(there), len(labels), purpose, f", of {len(names)}")


def _present(what: str, there: int, total: int, purpose: str, more: str = "") -> Finding:
    if there == total:
        return ok(what, f"all {total} have one{more}")
    count = f"{there} of {total} have one{more}" if there else "none"
    return warning(what, f"{count}; {purpose} need them.")


KINDS = (
    Kind("images", IMAGE_SETS, open_source, _describe_images),
    Kind("recordings", SPEECH_SETS, open_speech, _describe_clips, MAX_SKIPPED_SHARE),
    Kind("documents", (TEXT.rstrip(":"),), open_texts, _describe_texts),
)
