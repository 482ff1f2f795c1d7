"""Targets that are folders: exports, checkpoints and logs of runs, models of others."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from latentlm_core.artifacts import load_generator, load_tokenizer, save_generator, save_tokenizer
from latentlm_core.export_config import GeneratorExport, TokenizerExport
from latentlm_core.files import SEAL, WEIGHTS_FILE, sha256_file, write_safetensors
from latentlm_core.hub import check_export
from latentlm_core.importing import import_vibevoice, is_vibevoice
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.pretrained import read_backbone
from latentlm_core.progress import SILENT
from latentlm_core.runtime import seeded_init
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.checkpoint_state import CheckpointState
from latentlm_core.training.runlog import RunLog, last_figures
from latentlm_core.workflows.claimed_folder import ClaimedFolder
from latentlm_core.workflows.doctor import doctor
from latentlm_core.workflows.tasks import interleaved_task
from latentlm_core.workflows.workspace import find_export
from tests import tiny_pretrained
from tests.hostile import Target, in_turn
from tests.hostile_changes import (
    changed_bytes,
    changed_json,
    changed_json_bytes,
    lines_of,
    names,
    sealed,
)
from tests.hostile_tensors import changed_tensors
from tests.tiny_latents import NETWORK, SPEECH_NETWORK
from tests.tiny_vibevoice import TINY

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}


def make_exports(folder: Path) -> dict[str, dict[str, bytes]]:
    """Exports of each kind, by name: the content of their files by their paths."""
    for name, network in (("images", NETWORK), ("speech", SPEECH_NETWORK)):
        config = SigmaVAEConfig(latent_channels=3, network=network)
        with seeded_init(name):
            vae = build_tokenizer(config)
        save_tokenizer(folder / name, vae, TokenizerExport(tokenizer=config))
    shared: dict[str, Any] = {
        "stats": LatentStats(shift=(0.0,), scale=(1.0,)),
        "classes": ("a", "b"),
        "tokenizer_sha256": sha256_file(folder / "images" / WEIGHTS_FILE),
    }
    dit = DiTConfig(**SIZES, grid=(2, 2), latent_channels=3, vocab_size=3)
    exported = GeneratorExport(model=dit, grid=(2, 2), **shared)
    save_generator(folder / "dit", DiT(dit), exported, folder / "images")
    text = TextTokenizer(TextConfig())
    model = tiny_pretrained.latent_lm(_backbone(), vocab_size=text.vocab_size)
    shared |= {"text_sha256": text.sha256, "max_length": 64}
    exported = GeneratorExport(model=model.config, grid=(2, 2), **shared)
    save_generator(folder / "pages", model, exported, folder / "images", text)
    return {name: files_of(folder / name) for name in ("images", "speech", "dit", "pages")}


def _backbone() -> Any:
    from latentlm_core.models.transformer import TransformerConfig

    return TransformerConfig(**SIZES)


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file by its path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def lay_out(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write such files."""
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@st.composite
def spoiled_exports(
    draw: st.DrawFn, made: dict[str, dict[str, bytes]]
) -> tuple[str, dict[str, Any]]:
    """The name of an export, and what becomes of some of its files."""
    name = draw(st.sampled_from(sorted(made)))
    content: dict[str, Any] = {}
    for _ in range(draw(st.integers(1, 2))):
        file = draw(st.sampled_from([*made[name], *["config.json"] * 4]))
        what = draw(st.sampled_from(["change", "change", "change", "bytes", "place"]))
        if what == "bytes":
            content[file] = draw(changed_bytes(made[name][file], 400))
        elif what == "place":
            places = ["folder", "gone", "link out", "link in a circle", "dangling", "fifo"]
            content[draw(names.filter(_is_name)) if draw(st.booleans()) else file] = draw(
                st.sampled_from(places)
            )
        elif file.endswith(".json"):
            value = json.loads(made[name][file])
            value.pop(SEAL, None)
            content[file] = draw(changed_json(value))
        else:
            content[file] = draw(changed_tensors(made[name][file]))
    return name, content


def _is_name(text: str) -> bool:
    try:
        return 0 < len(os.fsencode(text)) < 200 and "/" not in text and "\x00" not in text
    except UnicodeEncodeError:
        return False


def spoil(folder: Path, file: str, what: Any) -> None:
    """Give a file other content, or put something else in its place."""
    path = folder / file
    if file in (".", ".."):
        return
    path.unlink(missing_ok=True)
    match what:
        case bytes():
            path.write_bytes(what)
        case "folder":
            path.mkdir()
        case "link out":
            path.symlink_to("../../victim.txt")
        case "link in a circle":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "gone":
            pass
        case _:
            path.write_bytes(sealed(what))


def use_export(
    made: dict[str, dict[str, bytes]], case: tuple[str, dict[str, Any]], folder: Path
) -> None:
    """An export as sampling, tokenizing, the doctor and a push read it."""
    name, content = case
    lay_out(folder / "export", made[name])
    for file, what in content.items():
        spoil(folder / "export", file, what)
    load = load_tokenizer if name in ("images", "speech") else load_generator
    in_turn(
        [
            lambda: load(folder / "export", CPU),
            lambda: find_export(str(folder / "export"), "generator", SILENT),
            lambda: check_export(folder / "export"),
            lambda: doctor(target=str(folder / "export")),
        ]
    )


EXPORTS = Target("exports", make_exports, lambda made: ("pages", {}), spoiled_exports, use_export)


def make_run(folder: Path) -> dict[str, bytes]:
    """A checkpoint and a log."""
    parts = {"model": {"a": torch.arange(6.0)}, "figures": {}}
    state = CheckpointState(step=4, samples_seen=8, seconds=0.5, config={"trainer": {"seed": 1}})
    with CheckpointStore(folder / "checkpoints", keep=2) as store:
        store.save(state, parts)
    log = RunLog(folder / "metrics.jsonl", 0)
    for step in (2, 4, 6):
        log.write(step, {"loss/main": 0.5, "none": None})
    ClaimedFolder(folder, {"seed": 1, "classes": ["a"]}).claim()
    return files_of(folder)


@st.composite
def spoiled_runs(draw: st.DrawFn, made: dict[str, bytes]) -> dict[str, bytes]:
    """Files of a run with other content."""
    file = draw(st.sampled_from(sorted(made)))
    if file.endswith(".jsonl"):
        return {file: draw(lines_of([json.loads(line) for line in made[file].splitlines()]))}
    if file.endswith(".json"):
        return {file: draw(changed_json_bytes(json.loads(made[file])))}
    return {file: draw(changed_tensors(made[file]))}


def use_run(made: dict[str, bytes], case: dict[str, bytes], folder: Path) -> None:
    """What resuming, sampling and the doctor read of a run."""
    run = folder / "run"
    lay_out(run, made | case)
    (folder / "document.json").write_bytes(next(iter(case.values()), b"[]"))
    in_turn(
        [
            lambda: _resume(run),
            lambda: last_figures(run / "metrics.jsonl"),
            lambda: doctor(target=str(run)),
            lambda: RunLog(run / "metrics.jsonl", 4),
            lambda: ClaimedFolder(run, {"seed": 1, "classes": ["a"]}).claim(),
            lambda: interleaved_task(folder / "document.json", 5),
        ]
    )


def _resume(run: Path) -> None:
    with CheckpointStore(run / "checkpoints", keep=2) as store:
        checkpoint = store.latest()
    if checkpoint is not None:
        checkpoint.read("model")
        checkpoint.read("figures")


RUNS = Target("runs", make_run, lambda made: {}, spoiled_runs, use_run)


def make_models(folder: Path) -> dict[str, dict[str, bytes]]:
    """A language model and a speech tokenizer as others publish them."""
    tiny_pretrained.write(folder / "llama")
    config = SigmaVAEConfig(latent_channels=3, network=SPEECH_NETWORK)
    write_safetensors(folder / "voice" / WEIGHTS_FILE, build_tokenizer(config).state_dict())
    (folder / "voice" / "config.json").write_text(json.dumps(TINY))
    return {name: files_of(folder / name) for name in ("llama", "voice")}


@st.composite
def spoiled_models(
    draw: st.DrawFn, made: dict[str, dict[str, bytes]]
) -> tuple[str, dict[str, bytes]]:
    """A model and files of it with other content."""
    name = draw(st.sampled_from(sorted(made)))
    sound = made[name]
    if draw(st.integers(0, 3)):
        return name, {"config.json": draw(changed_json_bytes(json.loads(sound["config.json"])))}
    return name, {WEIGHTS_FILE: draw(changed_tensors(sound[WEIGHTS_FILE]))}


def use_model(
    made: dict[str, dict[str, bytes]], case: tuple[str, dict[str, bytes]], folder: Path
) -> None:
    """A language model that starts a run; a tokenizer that is imported."""
    name, content = case
    lay_out(folder / name, made[name] | content)
    is_vibevoice(folder / name)
    if name == "voice":
        import_vibevoice(folder / name, folder / "export")
        return
    backbone = read_backbone(str(folder / name))
    model: LatentLM = tiny_pretrained.latent_lm(backbone.config, vocab_size=backbone.vocab_size + 6)
    backbone.load_into(model, backbone.vocab_size)


MODELS = Target(
    "models of others", make_models, lambda made: ("llama", {}), spoiled_models, use_model
)
