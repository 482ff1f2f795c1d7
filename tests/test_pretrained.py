"""Language models that exist start a LatentLM: tiny ones, made by the transformers library."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from latentlm_core.errors import ArtifactError
from latentlm_core.files import read_safetensors, sha256_file, write_json, write_safetensors
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.models.transformer import Transformer, TransformerConfig
from latentlm_core.pretrained import PretrainedBackbone, read_backbone
from latentlm_core.published_lm import PublishedLMConfig
from tests.tiny_pretrained import SIZES, VOCAB, latent_lm, published, write

LENGTH = 24
INDEX = "model.safetensors.index.json"
REVISION = "0123456789abcdef0123456789abcdef01234567"
GROUPED = {"num_key_value_heads": 2}
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama, tied, wide heads": (
        "Llama",
        GROUPED | {"tie_word_embeddings": True, "head_dim": 12, "rope_theta": 5e5},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "mistral, window": ("Mistral", GROUPED | {"sliding_window": 64}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2, tied": ("Qwen2", GROUPED | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "qwen3, tied, wide heads": (
        "Qwen3",
        GROUPED | {"tie_word_embeddings": True, "head_dim": 12, "rope_theta": 1e6},
    ),
}


def reference(name: str) -> Any:
    """A tiny language model of the transformers library in which every weight matters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    family, changes = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family}Config")(**SIZES, **changes)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        is_bias_or_norm = parameter.ndim == 1
        torch.nn.init.normal_(parameter, std=0.5 if is_bias_or_norm else 0.15)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def loaded(pretrained: PretrainedBackbone) -> LatentLM:
    model = latent_lm(pretrained.config)
    pretrained.load_into(model, VOCAB)
    return model


@torch.no_grad()
def scores(model: LatentLM, ids: Tensor) -> Tensor:
    """Logits (B, L, V) of the text ids."""
    layout = SequenceLayout.make(
        torch.ones_like(ids),
        torch.zeros_like(ids),
        torch.arange(ids.shape[1]).expand_as(ids),
        torch.full_like(ids, -1),
        torch.ones_like(ids),
    )
    states = model.states(ids, torch.zeros(*ids.shape, 3), layout)
    return model.logits(states)[..., :VOCAB]


@torch.no_grad()
def assert_agree(ours: LatentLM, theirs: Any) -> None:
    ids = torch.randint(VOCAB, (3, LENGTH))
    expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(scores(ours, ids), expected, rtol=1e-5, atol=1e-5)


# Agreement


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    theirs = reference(name)
    pretrained = read_backbone(save(theirs, tmp_path / "a"))
    assert (pretrained.vocab_size, pretrained.context_length) == (VOCAB, 64)
    assert pretrained.tied is ("tied" in name)
    assert_agree(loaded(pretrained), theirs)


@pytest.mark.parametrize("name", ["qwen2, tied", "qwen3, tied, wide heads"])
def test_shards_are_read_one_tensor_after_another(tmp_path: Path, name: str) -> None:
    theirs = reference(name)
    folder = save(theirs, tmp_path / "a", max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    pretrained = read_backbone(str(folder))
    assert_agree(loaded(pretrained), theirs)
    hashes = pretrained.provenance()["sha256"]
    assert hashes.keys() == {path.name for path in folder.iterdir()} - {"generation_config.json"}
    assert hashes[INDEX] == sha256_file(folder / INDEX)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    theirs = reference("qwen2")
    folder = save(theirs, tmp_path / "a")
    tensors = {name: tensor.bfloat16() for name, tensor in theirs.state_dict().items()}
    write_safetensors(folder / "model.safetensors", tensors)
    theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    ours = loaded(read_backbone(folder))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_agree(ours, theirs)


@pytest.mark.parametrize("name", ["qwen2", "qwen3, tied, wide heads"])
def test_cached_steps_give_the_same_states(tmp_path: Path, name: str) -> None:
    theirs = reference(name)
    ours = loaded(read_backbone(save(theirs, tmp_path / "a")))
    ids = torch.randint(VOCAB, (2, 9))
    cache = ours.backbone.new_cache(2, 9)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 9)):
            state = ours.step(ours.token_embedding(ids[:, start:end]), cache)
        expected = theirs(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(ours.logits(state)[:, :VOCAB], expected, rtol=1e-5, atol=1e-5)


def test_rotary_settings_are_found_where_older_files_have_them(tmp_path: Path) -> None:
    theirs = reference("qwen2, tied")
    folder = save(theirs, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    for changes in (
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1_000_000, "rope_scaling": {"type": "default"}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ):
        write_json(folder / "config.json", config | changes)
        assert_agree(loaded(read_backbone(folder)), theirs)


# What is filled, and what is not; no library is needed from here on


def test_what_is_new_stays_as_it_was(tmp_path: Path) -> None:
    tensors = published()
    pretrained = read_backbone(write(tmp_path / "a", tensors))
    model = latent_lm(pretrained.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrained.load_into(model, 33)
    after = model.state_dict()
    for ours, theirs in (("token_embedding", "model.embed_tokens"), ("text_head", "lm_head")):
        own = after[f"{ours}.weight"]
        assert torch.equal(own[:33], tensors[f"{theirs}.weight"][:33])
        assert torch.equal(own[33:], before[f"{ours}.weight"][33:])
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("latent_embedding.", "head."))}


def test_a_tied_head_starts_as_the_embedding(tmp_path: Path) -> None:
    tensors = published()
    folder = write(tmp_path / "a", tensors, tie_word_embeddings=True)
    model = loaded(read_backbone(folder))
    assert torch.equal(model.text_head.weight[:VOCAB], tensors["model.embed_tokens.weight"])
    del tensors["lm_head.weight"]
    assert read_backbone(write(tmp_path / "b", tensors, tie_word_embeddings=True)).tied


def test_wavelengths_in_old_files_are_no_weights(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    read_backbone(write(tmp_path / "a", published() | {name: torch.ones(4)}))


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "cache" / "models--someone--tiny"
    folder = write(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pretrained = read_backbone("hf:someone/tiny")
    assert pretrained.folder.resolve() == folder.resolve()
    with pytest.raises(ArtifactError, match="not in the hub's local cache"):
        read_backbone("hf:someone/huge")


@pytest.mark.parametrize(
    ("num_parameters", "architecture", "sizes"),
    [
        # vocabulary, D, feed-forward, layers, N, K, H, tied
        (494_032_768, "Qwen2ForCausalLM", (151_936, 896, 4864, 24, 14, 2, None, True)),
        (596_049_920, "Qwen3ForCausalLM", (151_936, 1024, 3072, 28, 16, 8, 128, True)),
        (134_515_008, "LlamaForCausalLM", (49_152, 576, 1536, 30, 9, 3, None, True)),
        (7_248_023_552, "MistralForCausalLM", (32_768, 4096, 14_336, 32, 32, 8, 128, False)),
    ],
    ids=["Qwen2.5-0.5B", "Qwen3-0.6B", "SmolLM2-135M", "Mistral-7B-v0.3"],
)
def test_known_models_have_their_number_of_parameters(
    num_parameters: int, architecture: str, sizes: tuple[Any, ...]
) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    config = PublishedLMConfig(
        architecture=architecture,
        max_position_embeddings=2048,
        **dict(zip(names, sizes, strict=True)),
    )
    with torch.device("meta"):
        backbone = Transformer(config.ours())
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    found = sum(p.numel() for p in backbone.parameters()) + tables + config.hidden_size
    assert found == num_parameters


def test_an_export_holds_what_its_config_says(tmp_path: Path) -> None:
    """The flavours survive JSON, and the weights' names follow from them."""
    config = TransformerConfig(
        hidden_size=30,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=16,
        head_size=12,
        qkv_bias=True,
        qk_norm=True,
    )
    again = TransformerConfig.model_validate_json(json.dumps(config.to_dict()))
    assert again == config
    write_safetensors(tmp_path / "a.safetensors", Transformer(config).state_dict())
    shapes = {k: tuple(v.shape) for k, v in read_safetensors(tmp_path / "a.safetensors").items()}
    attention = {k: v for k, v in shapes.items() if "attention." in k}
    assert attention == {
        "blocks.0.attention.qkv.weight": (96, 30),
        "blocks.0.attention.qkv.bias": (96,),
        "blocks.0.attention.out.weight": (30, 48),
        "blocks.0.attention.query_norm.weight": (12,),
        "blocks.0.attention.key_norm.weight": (12,),
    }
