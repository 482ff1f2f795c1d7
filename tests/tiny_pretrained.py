"""A tiny Llama under its published names, and the LatentLM that it starts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core.files import write_json, write_safetensors
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig

VOCAB, MARKS = 40, 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
}
CONFIG: dict[str, Any] = SIZES | {"architectures": ["LlamaForCausalLM"], "head_dim": None}


def latent_lm(backbone: TransformerConfig, **changes: Any) -> LatentLM:
    sizes = {"latent_channels": 3, "vocab_size": VOCAB + MARKS, "predicts_text": True}
    head = DiffusionHeadConfig(num_layers=1, intermediate_size=16)
    return LatentLM(LatentLMConfig(backbone=backbone, head=head, **{**sizes, **changes}))


def published() -> dict[str, Tensor]:
    """Random tensors of the checkpoint that CONFIG describes, under their published names."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (VOCAB, 32),
    }
    for layer in range(2):
        block = {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            **{f"self_attn.{letter}_proj": (32, 32) for letter in "qkvo"},
            "mlp.gate_proj": (48, 32),
            "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    write_json(folder / "config.json", CONFIG | changes)
    write_safetensors(folder / "model.safetensors", published() if tensors is None else tensors)
    return folder
