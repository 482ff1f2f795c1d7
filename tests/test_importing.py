"""VibeVoice's acoustic tokenizer, as its folders lie on disk and on the hub, becomes an export."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from latentlm_core import importing
from latentlm_core.artifacts import load_tokenizer
from latentlm_core.errors import ArtifactError, CorruptFileError, LatentLMError
from latentlm_core.files import sha256_file, write_json
from latentlm_core.importing import import_vibevoice, is_import_of, is_vibevoice
from latentlm_core.progress import SilentProgress
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.speech import CausalConvConfig
from latentlm_core.workflows.workspace import find_export
from tests.tiny_latents import rewrite
from tests.tiny_vibevoice import SHARDS, TINY, WHOLE, change_index, write_alone, write_whole

CPU = torch.device("cpu")
REVISION = "0123456789abcdef0123456789abcdef01234567"

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture
def published(golden) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of the published code, and weights under its names."""
    tensors, weights = golden("sigma_vae_speech")
    return tensors, weights


@pytest.fixture
def weights(published) -> dict[str, Tensor]:
    return published[1]


# What is imported


def test_a_tokenizer_alone_gives_the_published_numbers(tmp_path: Path, published) -> None:
    tensors, weights = published
    folder = write_alone(tmp_path / "tokenizer", weights)
    assert is_vibevoice(folder)
    import_vibevoice(folder, tmp_path / "export")
    loaded = load_tokenizer(tmp_path / "export", CPU)
    mean = loaded.model.encode(tensors["in.audio"]).mean
    assert_close(mean, tensors["out.mean"])
    assert_close(loaded.model.decode(mean, (12,)), tensors["out.audio"])
    assert loaded.model.speech.sample_rate == 24_000
    provenance = loaded.config.provenance
    assert provenance["source"] == str(folder)
    assert provenance["sha256"] == {
        name: sha256_file(folder / name) for name in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize("prefix", ["model.acoustic_tokenizer.", "acoustic_tokenizer."])
def test_a_whole_model_in_bfloat16_shards_gives_its_tokenizer(
    tmp_path: Path, published, prefix: str
) -> None:
    tensors, weights = published
    folder = write_whole(tmp_path / "whole", weights, prefix)
    (folder / SHARDS[0]).write_bytes(b"a shard without our tensors is never opened")
    assert is_vibevoice(folder)
    import_vibevoice(folder, tmp_path / "export")
    loaded = load_tokenizer(tmp_path / "export", CPU)
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    write_alone(tmp_path / "rounded", rounded)
    import_vibevoice(tmp_path / "rounded", tmp_path / "expected")
    expected = load_tokenizer(tmp_path / "expected", CPU)
    assert loaded.sha256 == expected.sha256
    mean = loaded.model.encode(tensors["in.audio"]).mean
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, tensors["out.mean"], rtol=0.05, atol=0.02)
    read = {"config.json", "model.safetensors.index.json", *SHARDS[1:]}
    assert loaded.config.provenance["sha256"].keys() == read


@pytest.mark.parametrize(
    ("published_type", "kind"),
    [
        ("gaussian", PosteriorKind.GAUSSIAN),
        ("fix", PosteriorKind.FIXED),
        ("none", PosteriorKind.NONE),
    ],
)
def test_each_rule_of_noise_has_its_counterpart(
    tmp_path: Path, weights, published_type: str, kind: PosteriorKind
) -> None:
    folder = write_alone(tmp_path / "a", weights, std_dist_type=published_type, fix_std=0.25)
    import_vibevoice(folder, tmp_path / "export")
    config = load_tokenizer(tmp_path / "export", CPU).config.tokenizer
    assert config.posterior == LatentPosteriorConfig(kind=kind, std=0.25)


def test_numbers_of_the_networks_are_carried_over(tmp_path: Path, weights) -> None:
    changes = {"layernorm_eps": 1e-3, "layer_scale_init_value": 0.5}
    import_vibevoice(write_alone(tmp_path / "a", weights, **changes), tmp_path / "export")
    network = load_tokenizer(tmp_path / "export", CPU).model.speech
    assert isinstance(network, CausalConvConfig)
    assert (network.norm_eps, network.layer_scale) == (1e-3, 0.5)


def test_what_the_configuration_leaves_out_is_as_published() -> None:
    config = importing.PublishedConfig().ours()
    with torch.device("meta"):
        vae = build_tokenizer(config)
    assert sum(p.numel() for p in vae.encoder.parameters()) == 343_696_032
    assert (config.posterior.std, config.latent_channels, vae.speech.hop_length) == (0.5, 64, 3200)
    assert vae.speech.strides == (2, 2, 4, 5, 5, 8)


def test_spelled_out_mirrors_are_as_good_as_none(tmp_path: Path, weights) -> None:
    folder = write_alone(
        tmp_path / "a", weights, decoder_ratios=[5, 4, 2], decoder_depths="2-1-1-1"
    )
    import_vibevoice(folder, tmp_path / "export")
    network = load_tokenizer(tmp_path / "export", CPU).model.speech
    assert isinstance(network, CausalConvConfig)
    assert network.num_blocks == (1, 1, 1, 2)


# What is refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"channels": 2}, "channels = 2"),
        ({"causal": False}, "causal = false"),
        ({"mixer_layer": "conv"}, 'mixer_layer = "conv"'),
        ({"conv_norm": "weight_norm"}, 'conv_norm = "weight_norm"'),
        ({"conv_bias": False}, "conv_bias = false"),
        ({"pad_mode": "reflect"}, 'pad_mode = "reflect"'),
        ({"layernorm": "LN"}, 'layernorm = "LN"'),
        ({"disable_last_norm": False}, "disable_last_norm = false"),
        ({"corpus_normalize": -25.0}, "corpus_normalize = -25"),
        ({"kernel_size": 5}, "kernel_size = 5"),
        ({"layer_scale_init_value": 0}, "layer_scale_init_value = 0"),
        ({"std_dist_type": "learned"}, 'std_dist_type = "learned"'),
        ({"fix_std": "0.5"}, 'fix_std = "0.5"'),
        ({"vae_dim": 10**12}, "vae_dim = 1000000000000"),
        ({"encoder_n_filters": 0}, "encoder_n_filters = 0"),
        ({"encoder_ratios": [5, 4, 0]}, "encoder_ratios.2 = 0"),
        ({"encoder_ratios": [2] * 13}, "encoder_ratios = "),
        (
            {"encoder_depths": "1-1"},
            r"encoder_depths = .* one more than encoder_ratios \[5, 4, 2\]",
        ),
        ({"encoder_depths": "1-1-1-x"}, "encoder_depths = "),
        ({"encoder_depths": "1-1-1-" + "9" * 5000}, "encoder_depths = "),
        ({"encoder_depths": 7}, "encoder_depths = 7"),
        ({"decoder_n_filters": 8}, "decoder_n_filters = 8: the decoder must mirror .* asks for 4"),
        ({"decoder_ratios": [2, 4, 5]}, r"decoder_ratios = .* mirror .* asks for \(5, 4, 2\)"),
        ({"decoder_depths": "1-1-1-2"}, r"decoder_depths = .* asks for \(2, 1, 1, 1\)"),
        ({"downsampling_ratios": [2, 4, 5]}, "downsampling_ratios is a field of the Transformers"),
    ],
)
def test_what_our_networks_are_not_is_refused_by_the_name_of_its_field(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    folder = write_alone(tmp_path / "a", {"encoder.x": torch.ones(1)}, **changes)
    refused(folder, rf"config\.json: .*{problem}")


def refused(folder: Path, problem: str, kind: type[LatentLMError] = ArtifactError) -> None:
    """Importing fails with one sentence and leaves nothing."""
    export = folder.parent / "export"
    with pytest.raises(kind, match=problem) as caught:
        import_vibevoice(folder, export)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not list(folder.parent.glob("*export*"))
    assert not list(folder.parent.glob(".*export*"))


def test_a_decoder_of_published_width_beside_a_narrow_encoder_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_json(folder / "config.json", {k: v for k, v in TINY.items() if k != "decoder_n_filters"})
    refused(folder, "decoder_n_filters = 32: the decoder must mirror the encoder")


@pytest.mark.parametrize(
    "config",
    [{}, [], 7, {"model_type": "vibevoice"}, {"acoustic_tokenizer_config": "tiny"}, None],
)
def test_other_folders_are_not_taken_for_vibevoice(tmp_path: Path, config: Any) -> None:
    folder = tmp_path / "a"
    assert not is_vibevoice(folder)
    write_json(folder / "config.json", config)
    assert not is_vibevoice(folder)
    refused(folder, "does not describe an acoustic tokenizer of VibeVoice")
    (folder / "config.json").write_bytes(b"\xff{")
    assert not is_vibevoice(folder)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_tokenizer_is_refused(tmp_path: Path, weights, half: str) -> None:
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(half)}
    refused(write_alone(tmp_path / "a", others), f"holds no {half} of the acoustic tokenizer")


def test_weights_that_do_not_fit_are_named(tmp_path: Path, weights) -> None:
    short = dict(weights)
    del short["encoder.head.conv.conv.bias"]
    refused(write_alone(tmp_path / "a", short), r"1 tensors .* encoder\.head\.bias among")
    wide = weights | {"encoder.head.conv.conv.bias": torch.zeros(7)}
    refused(write_alone(tmp_path / "b", wide), r"1 tensors .* encoder\.head\.bias among")
    refused(write_alone(tmp_path / "c", weights, vae_dim=7), "3 tensors")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.norm.weight",
        "encoder.gate.weight",
        "decoder.up.weight",
        "encoder.downsample_layers." + "9" * 5000 + ".0.conv.conv.weight",
        "decoder.upsample_layers.4.0.convtr.convtr.weight",
    ],
)
def test_a_tensor_that_no_network_has_is_refused(tmp_path: Path, weights, name: str) -> None:
    folder = write_alone(tmp_path / "a", weights | {name: torch.ones(2)})
    refused(folder, "1 tensors of the acoustic tokenizer differ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_quantised_weights_are_refused(tmp_path: Path, weights, dtype: torch.dtype) -> None:
    name = "encoder.head.conv.conv.bias"
    folder = write_alone(tmp_path / "a", weights | {name: weights[name].to(dtype)})
    refused(folder, rf"{name} is stored as \w+, where one of F32, F16, BF16 is wanted")


def test_damaged_and_missing_files_are_sentences(tmp_path: Path, weights) -> None:
    folder = write_alone(tmp_path / "a", weights)
    whole = (folder / "model.safetensors").read_bytes()
    for content in (b"", b"\xff" * 100, whole[:-1], whole[:50]):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, r"model\.safetensors is damaged or no safetensors file", CorruptFileError)
    (folder / "model.safetensors").unlink()
    refused(folder, r"holds no weights: neither model\.safetensors nor model\.safetensors\.index")


@pytest.mark.parametrize(
    "place",
    ["../secret.safetensors", "/etc/x.safetensors", "model.bin", "a/b.safetensors", 7, None],
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, weights, place: object) -> None:
    folder = write_whole(tmp_path / "a", weights, "model.acoustic_tokenizer.")
    change_index(folder, **{"lm_head.weight": place})
    refused(folder, "which is not a safetensors file of the folder itself", CorruptFileError)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path, weights) -> None:
    folder = write_whole(tmp_path / "a", weights, "model.acoustic_tokenizer.")
    name = "model.acoustic_tokenizer.encoder.head.conv.conv.bias"
    change_index(folder, **{name: SHARDS[0]})
    refused(folder, f"{SHARDS[0]} is damaged or no safetensors file", CorruptFileError)
    change_index(folder, **{name: "model-00009-of-00003.safetensors"})
    refused(folder, "There is no file .*model-00009")
    for index in ([], {}, {"weight_map": [1]}):
        write_json(folder / "model.safetensors.index.json", index)
        refused(folder, "has no weight_map", CorruptFileError)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {}})
    refused(folder, "holds no encoder")


# Where the commands find it


class Noting(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_local_folder_is_imported_once(home: Path, tmp_path: Path, published) -> None:
    tensors, weights = published
    folder = write_alone(tmp_path / "Tiny Voice", weights)
    progress = Noting()
    export = find_export(f"{folder}/", "sigma-vae", progress)
    assert export == home / "runs" / "Tiny-Voice-imported" / "export"
    mean = load_tokenizer(export, CPU).model.encode(tensors["in.audio"]).mean
    assert_close(mean, tensors["out.mean"])
    written = (export / "model.safetensors").stat().st_mtime_ns
    assert find_export(str(folder), "sigma-vae", progress) == export
    assert find_export("Tiny-Voice-imported", "sigma-vae", progress) == export
    assert (export / "model.safetensors").stat().st_mtime_ns == written
    assert [note.split()[0] for note in progress.notes] == ["Importing", "Using"]
    assert find_export(None, "sigma-vae", progress) == export


def test_other_weights_of_the_same_name_are_neither_mixed_up_nor_lost(
    home: Path, tmp_path: Path, weights
) -> None:
    folder = write_alone(tmp_path / "tiny", weights)
    export = find_export(str(folder), "sigma-vae", SilentProgress())
    before = sha256_file(export / "model.safetensors")
    assert is_import_of(export, folder)
    write_alone(folder, {name: 2 * tensor for name, tensor in weights.items()})
    assert not is_import_of(export, folder)
    with pytest.raises(ArtifactError, match="was not made of the files that") as caught:
        find_export(str(folder), "sigma-vae", SilentProgress())
    assert str(home / "runs" / "tiny-imported") in str(caught.value.hint)
    assert sha256_file(export / "model.safetensors") == before
    rewrite(export / "config.json", provenance={"data": "a run of this name"})
    assert not is_import_of(export, folder)


def test_a_hub_repository_is_imported(
    home: Path, tmp_path: Path, published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, whose files are links to others outside the folder."""
    tensors, weights = published
    repository = tmp_path / "cache" / "models--someone--VibeVoice-tiny"
    snapshot = write_whole(
        repository / "snapshots" / REVISION, weights, "model.acoustic_tokenizer."
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs").mkdir()
    for path in snapshot.iterdir():
        blob = path.rename(repository / "blobs" / path.name)
        path.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    export = find_export("hf:someone/VibeVoice-tiny", "sigma-vae", SilentProgress())
    assert export == home / "runs" / "VibeVoice-tiny-imported" / "export"
    mean = load_tokenizer(export, CPU).model.encode(tensors["in.audio"]).mean
    torch.testing.assert_close(mean, tensors["out.mean"], rtol=0.05, atol=0.02)


def test_a_model_of_vibevoice_is_no_generator(home: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "whole" / "config.json", WHOLE)
    with pytest.raises(ArtifactError, match="only the tokenizer can be used") as caught:
        find_export(str(tmp_path / "whole"), "generator", SilentProgress())
    assert "--vae" in str(caught.value.hint)
    assert not home.exists()
