"""Exports: written whole, read back, and held to what they say."""

import json

import pytest
import torch

from latentlm_core.artifacts import load_generator, load_tokenizer, save_generator, save_tokenizer
from latentlm_core.errors import ArtifactError, CorruptFileError, LatentLMError
from latentlm_core.export_config import GeneratorExport, TokenizerExport, export_kind
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from tests.test_models import tiny_latent_lm
from tests.tiny_latents import rewrite

CPU = torch.device("cpu")
TOKENIZER = SigmaVAEConfig(
    latent_channels=8, network=ConvConfig(image_size=32, channels=(8, 8), stem_patch_size=4)
)


@pytest.fixture
def exports(tmp_path):
    vae, model = build_tokenizer(TOKENIZER), tiny_latent_lm()
    save_tokenizer(tmp_path / "vae", vae, TokenizerExport(tokenizer=TOKENIZER))
    config = GeneratorExport(
        model=model.config,
        stats=LatentStats(shift=(0.1,), scale=(2.0,)),
        grid=(4, 4),
        classes=tuple("0123456789"),
        tokenizer_sha256=load_tokenizer(tmp_path / "vae", CPU).sha256,
    )
    save_generator(tmp_path / "lm", model, config, tmp_path / "vae")
    return tmp_path, vae, model


def test_exports_come_back_as_they_were(exports):
    folder, vae, model = exports
    loaded = load_generator(folder / "lm", CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert loaded.config.num_latents == 16
    inside = load_tokenizer(folder / "lm" / "tokenizer", CPU)
    assert inside.sha256 == loaded.config.tokenizer_sha256
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(inside.model.encode(images).mean, vae.encode(images).mean)


def test_an_export_is_json_and_safetensors_alone(exports):
    folder, _, _ = exports
    files = {path.suffix for path in (folder / "lm").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    assert export_kind(folder / "lm") == "generator"
    assert export_kind(folder / "vae") == "sigma-vae"
    assert export_kind(folder) is None


def test_kinds_are_not_mistaken_for_each_other(exports):
    folder, _, _ = exports
    with pytest.raises(ArtifactError, match="holds a sigma-vae, where a generator is wanted"):
        load_generator(folder / "vae", CPU)


def test_weights_that_do_not_fit_are_refused(exports):
    folder, _, _ = exports
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    rewrite(path, tokenizer=config["tokenizer"] | {"latent_channels": 4})
    with pytest.raises(ArtifactError, match="tensors differ"):
        load_tokenizer(folder / "vae", CPU)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1])
def test_a_truncated_weights_file_is_refused_by_name(exports, cut):
    folder, _, _ = exports
    path = folder / "vae" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptFileError, match=r"vae/model\.safetensors"):
        load_tokenizer(folder / "vae", CPU)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"format": "latentlm", "kind": "sigma-vae"}',
        '{"format": "latentlm", "kind": "sigma-vae", "tokenizer": {"latent_channels": -1}}',
        '{"format": "latentlm", "kind": "sigma-vae", "tokenizer": {}, "format_version": 9}',
    ],
)
def test_a_hostile_config_is_refused_in_a_sentence(exports, content):
    folder, _, _ = exports
    (folder / "vae" / "config.json").write_text(content)
    with pytest.raises(LatentLMError, match=r"config\.json"):
        load_tokenizer(folder / "vae", CPU)
