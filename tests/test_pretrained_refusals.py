"""Language models that cannot start a LatentLM, each refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, LatentLMError
from latentlm_core.files import write_json, write_safetensors
from latentlm_core.pretrained import read_backbone
from tests.tiny_pretrained import CONFIG, VOCAB, latent_lm, published, write

INDEX = "model.safetensors.index.json"


def refused(folder: Path, problem: str, kind: type[LatentLMError] = ArtifactError) -> None:
    with pytest.raises(kind, match=problem) as caught:
        read_backbone(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\], where one of Llama"),
        ({"architectures": ["LlamaForCausalLM"] * 2}, "where one of LlamaForCausalLM, Mistral"),
        ({"architectures": [{"a": 1}]}, "where one of"),
        ({"architectures": None}, "describes no architecture"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"attention_bias": True}, "attention_bias = true: outputs of our"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = null"),
        ({"rope_theta": float("1e300")}, "rope_theta = 1e"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling = .*only rope_type",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*only rope_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = "),
        ({"rope_parameters": {"full_attention": {}}}, "unknown key rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": 7}, "rope_scaling = 7"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"use_sliding_window": True}, "use_sliding_window = true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.1 = "),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 63},
            "sliding_window = 63: .* must not be below max_position_embeddings 64",
        ),
        (
            {"num_key_value_heads": 3},
            "heads = 3: it must divide num_attention_heads 4",
        ),
        ({"num_key_value_heads": -1}, "num_key_value_heads = -1"),
        (
            {"num_attention_heads": 5},
            "head_dim = null: hidden_size 32 over num_att.* 5 must be",
        ),
        ({"head_dim": 9}, "head_dim = 9"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": "32"}, 'hidden_size = "32"'),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
    ],
)
def test_what_our_networks_are_not_is_refused_by_the_name_of_its_field(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    refused(write(tmp_path / "a", **changes), rf"config\.json.*{problem}")


def test_sizes_that_are_not_given_are_missed(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "intermediate_size"}
    folder = write(tmp_path / "a")
    write_json(folder / "config.json", config)
    refused(folder, "intermediate_size is missing")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    refused(
        write(tmp_path / "a", num_hidden_layers=3),
        r"9 missing \('model\.layers\.2\.input_layernorm\.weight', '\S+', '\S+'\)\.$",
    )
    headless = {name: x for name, x in published().items() if name != "lm_head.weight"}
    refused(write(tmp_path / "j", headless), r"1 missing \('lm_head\.weight'\)\.$")
    refused(write(tmp_path / "b", num_hidden_layers=1), r"9 unknown \('model\.layers\.1\.")
    refused(write(tmp_path / "c", intermediate_size=47), r"6 of another shape \('model\.layers\.0")
    refused(write(tmp_path / "d", num_key_value_heads=2), "4 of another shape .*k_proj.*v_proj")
    refused(write(tmp_path / "e", head_dim=12), "8 of another shape .*k_proj")
    refused(write(tmp_path / "f", vocab_size=41), "2 of another shape .*'lm_head.weight', 'model.e")
    refused(write(tmp_path / "g", architectures=["Qwen2ForCausalLM"]), "6 missing .*k_proj.bias")
    refused(write(tmp_path / "h", architectures=["Qwen3ForCausalLM"]), "4 missing .*k_norm.weight")
    odd = {f"x\n{'y' * 500}": torch.ones(1), "lm_head.bias": torch.ones(1)}
    refused(
        write(tmp_path / "i", published() | odd), r"2 unknown \('lm_head\.bias', 'x\\ny{50,80}\)"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_rounded_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.norm.weight"
    folder = write(tmp_path / "a", published() | {name: torch.ones(32).to(dtype)})
    refused(folder, rf"{name} is stored as \w+, where one of F32, F16, BF16 is wanted")


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[" * 200_000, b"[]", b"7", b"null"])
def test_a_config_that_is_no_object_is_damaged(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "a")
    (folder / "config.json").write_bytes(content)
    refused(folder, r"config\.json", CorruptFileError)


def test_damaged_and_missing_files_are_sentences(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"There is no file .*config\.json")
    folder = write(tmp_path / "a")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"\xff" * 100, whole[:-1], whole[:50]):
        path.write_bytes(content)
        refused(folder, r"model\.safetensors is damaged or no safetensors file", CorruptFileError)
    path.unlink()
    refused(folder, r"holds no weights: neither model\.safetensors nor model\.safetensors\.index")
    for index in ([], {}, {"weight_map": [1]}):
        write_json(folder / INDEX, index)
        refused(folder, "has no weight_map", CorruptFileError)
    write_json(folder / INDEX, {"weight_map": {"model.norm.weight": "../a.safetensors"}})
    refused(folder, "is not a safetensors file of the folder itself", CorruptFileError)
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(published(), "a.safetensors")})
    refused(folder, r"There is no file .*a\.safetensors")
    write_safetensors(folder / "a.safetensors", {"model.norm.weight": torch.ones(32)})
    refused(folder, r"a\.safetensors is damaged or no safetensors file", CorruptFileError)


def test_a_model_that_is_another_is_refused(tmp_path: Path) -> None:
    pretrained = read_backbone(write(tmp_path / "a"))
    own = pretrained.config
    with pytest.raises(ConfigError, match=r"backbone is not that of .*: rope_theta differ"):
        pretrained.load_into(latent_lm(own.model_copy(update={"rope_theta": 5.0})), VOCAB)
    with pytest.raises(ConfigError, match="can only start a model that predicts text"):
        pretrained.load_into(latent_lm(own, predicts_text=False), VOCAB)
    with pytest.raises(ConfigError, match=r"tokenizer has 41 ids, but .* has an embedding for 40"):
        pretrained.load_into(latent_lm(own), VOCAB + 1)
