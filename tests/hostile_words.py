"""Targets that a user types, or a stranger for him: recipes, names, paths, command lines."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import hub
from latentlm_core.artifacts import save_tokenizer
from latentlm_core.data.folders import FolderSource, readable
from latentlm_core.data.media import write_png
from latentlm_core.data.mixture import is_mix, parse_mix
from latentlm_core.data.sources import open_source, resolve_class
from latentlm_core.data.speech_sources import open_speech
from latentlm_core.data.texts import open_endless_texts, open_texts
from latentlm_core.errors import ArtifactError, LatentLMError
from latentlm_core.export_config import TokenizerExport
from latentlm_core.files import read_text, write_text
from latentlm_core.progress import SILENT
from latentlm_core.recipes import lm_recipe, lm_recipe_names, vae_recipe, vae_recipe_names
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.workflows.runs import run_name
from latentlm_core.workflows.workspace import find_export, find_latents, find_samples, slug
from tests.hostile import Fault, Target, in_turn, refusals
from tests.hostile_changes import changed_bytes, changed_json, changed_json_bytes, names, odd_json
from tests.tiny_latents import NETWORK

KEYS = (
    *("model", "optimizer.lr", "trainer.total_steps", "data.batch_size", "loss", "sampler.solver"),
    *(
        "tokenizer.network.channels",
        "model.backbone.hidden_size",
        "data",
        "",
        ".",
        "a.b.c",
        "data.",
    ),
)


def make_recipes(_folder: Path) -> dict[str, Any]:
    """Recipes as plain values, by the name of their command and their own."""
    found = {f"vae {name}": vae_recipe(name).to_dict() for name in vae_recipe_names()}
    return found | {f"lm {name}": lm_recipe(name).to_dict() for name in lm_recipe_names()}


def toml(value: Any) -> str:
    """A JSON value as TOML, tables inline; null, which it has not, is left out."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {toml(v)}" for key, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value if item is not None) + "]"
    return json.dumps(value)


@st.composite
def spoiled_recipes(draw: st.DrawFn, made: dict[str, Any]) -> tuple[str, str, bytes, list[str]]:
    """Command, file name, content and overrides of a recipe."""
    title = draw(st.sampled_from(sorted(made)))
    command, name = title.split()
    if draw(st.booleans()):
        file, content = "recipe.json", draw(changed_json_bytes(made[title]))
    else:
        file = "recipe.toml"
        changed = draw(changed_json(made[title] | {"recipe": name}))
        lines = (
            [f"{json.dumps(key)} = {toml(value)}" for key, value in changed.items()]
            if isinstance(changed, dict)
            else ["x"]
        )
        content = "\n".join(lines).encode("utf-8", "replace")
        content = draw(st.just(content) | changed_bytes(content) | odd_json)
    value = (
        names
        | st.integers().map(str)
        | st.sampled_from(["{a=1}", "[1", '"', "1e999", "nan", "{" * 5000])
    )
    pair = st.builds(
        lambda key, equals, v: f"{key}{equals}{v}",
        st.sampled_from(KEYS) | names,
        st.sampled_from(["=", "=", ""]),
        value,
    )
    return command, file, content, draw(st.lists(pair, max_size=3))


def use_recipe(_made: Any, case: tuple[str, str, bytes, list[str]], folder: Path) -> None:
    """A recipe out of a file, alone and with overrides; overrides of a named one."""
    command, file, content, overrides = case
    (folder / file).write_bytes(content)
    read = vae_recipe if command == "vae" else lm_recipe
    in_turn(
        [
            lambda: read(str(folder / file)),
            lambda: read(str(folder / file), overrides),
            lambda: read("tiny" if command == "vae" else "mnist", overrides),
            lambda: read(overrides[0] if overrides else "mnist"),
        ]
    )


RECIPES = Target(
    "recipes",
    make_recipes,
    lambda made: ("lm", "recipe.json", json.dumps(made["lm mnist"]).encode(), []),
    spoiled_recipes,
    use_recipe,
)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No socket connects, and the hub's libraries do not wait for one."""
    refused = OSError("there is no network here")
    with (
        mock.patch.object(socket.socket, "connect", side_effect=refused),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        mock.patch("datasets.config.HF_HUB_OFFLINE", True),
        mock.patch("huggingface_hub.snapshot_download", side_effect=refused),
        mock.patch("huggingface_hub.hf_hub_download", side_effect=refused),
        mock.patch("datasets.get_dataset_split_names", side_effect=refused),
        mock.patch("datasets.load_dataset", side_effect=refused),
    ):
        yield


@contextlib.contextmanager
def at_home(folder: Path) -> Iterator[None]:
    """``folder`` as the working folder and the workspace."""
    with contextlib.chdir(folder), mock.patch.dict(os.environ, LATENTLM_HOME=str(folder)):
        yield


def use_name(_made: None, name: str, folder: Path) -> None:
    """A name in every place where one may stand."""
    classes = ("tench, Tinca tinca", "7", name)
    part = slug(name)
    if part != slug(part) or "/" in part or part in ("", ".", ".."):
        raise Fault(f"slug({name!r}) is {part!r}")
    if "/" in run_name("vae", name, name):
        raise Fault(f"run_name of {name!r} leads elsewhere")
    with at_home(folder), offline():
        refusals(
            [
                lambda: resolve_class(classes, name),
                lambda: resolve_class(("a",), name),
                lambda: hub.repository_name(name),
                lambda: hub.is_hub_id(name),
                lambda: hub.public({"a": [name]}),
                lambda: is_mix(name) and parse_mix(name),
                lambda: open_source(name),
                lambda: open_speech(name),
                lambda: open_texts(name),
                lambda: open_endless_texts(name, 0, 0.1),
                lambda: find_export(name, "sigma-vae", SILENT),
                lambda: find_latents(name, SILENT),
                lambda: find_samples(name, SILENT),
                lambda: write_text(folder / "out" / (part + ".txt"), name),
                lambda: _write_and_read(folder, name),
            ]
        )


def _write_and_read(folder: Path, name: str) -> None:
    """A file of that very name, where a file system takes it: as an image of a source as well."""
    if "/" in name or name in ("", ".", "..") or name.startswith("."):
        return
    write_text(folder / f"{name}.txt", "a caption")
    assert read_text(folder / f"{name}.txt") == "a caption"
    write_png(folder / f"{name}.png", np.zeros((1, 1, 3), np.uint8))
    example = FolderSource(folder, "images")[0]
    assert example.key == readable(f"{name}.png")
    assert example.caption == "a caption"


specs = st.builds(
    lambda head, tail: f"{head}{tail}",
    st.sampled_from(
        ["", "folder:", "hf:", "cifar10:", "text:", "stream:", "librispeech:", "a,", "x=1,"]
    ),
    names,
)
NAMED = Target("names", lambda folder: None, lambda made: "a", lambda made: names | specs, use_name)


def make_tokenizer_export(folder: Path) -> Path:
    """A run whose export can be used."""
    config = SigmaVAEConfig(latent_channels=3, network=NETWORK)
    vae = build_tokenizer(config)
    save_tokenizer(folder / "vae" / "export", vae, TokenizerExport(tokenizer=config))
    return folder / "vae"


COMMANDS = (
    ("sample",),
    ("tokenize", "--dry-run"),
    ("train-vae", "--dry-run"),
    ("train-lm", "--dry-run"),
    ("doctor",),
    ("push", "--dry-run"),
    ("eval", "fid"),
    ("eval", "recon"),
    ("eval", "wer"),
    ("eval", "ppl"),
    ("demo", "--help"),
)
OPTIONS = (
    *(
        "--data",
        "--model",
        "--vae",
        "--out",
        "--set",
        "--recipe",
        "--class",
        "-n",
        "--seed",
        "--cfg",
    ),
    *("--steps", "--device", "--split", "--text", "--voice", "--seconds", "--prompt", "--caption"),
    *("--ask", "--image", "--interleaved", "--samples", "--reference", "--batch-size", "--json"),
    *("--protocol", "--solver", "--npz", "--top-p", "--temperature", "--text-only", "--nonsense"),
)


@st.composite
def command_lines(draw: st.DrawFn, made: Path) -> list[str]:
    """A command with options, most of which it has, and values, most of which it does not take."""
    words = [*draw(st.sampled_from(COMMANDS))]
    known = st.sampled_from(
        [str(made), "embedded:shapes", "tiny", "cpu", "train", "4:10", "0", "3"]
    )
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=4)):
        words += [option, draw(known | names | specs)]
    return words + draw(st.lists(names, max_size=1))


def use_command(_made: Path, words: list[str], folder: Path) -> None:
    """Run a command line in an empty workspace; no traceback, exit code 0, 1 or 2."""
    with at_home(folder), offline(), mock.patch.dict(os.environ, {"COLUMNS": "200"}):
        result = CliRunner().invoke(app, words)
    if isinstance(result.exception, LatentLMError | SystemExit | None):
        if result.exit_code not in (0, 1, 2):
            raise Fault(f"exit code {result.exit_code}")
        if "\x1b" in result.stderr + result.stdout:
            raise Fault(f"an escape reached the terminal: {result.stderr!r}")
        if result.exit_code:
            raise ArtifactError("The command was refused.")
    else:
        raise result.exception


COMMAND_LINES = Target(
    "command lines",
    make_tokenizer_export,
    lambda made: ["tokenize", "--dry-run", "--vae", str(made), "--data", "embedded:shapes"],
    command_lines,
    use_command,
    mebibytes=4096,
)
