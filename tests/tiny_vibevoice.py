"""Folders of VibeVoice's with tiny tokenizers, as they lie on disk and on the hub."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentlm_core.files import read_json, write_json

TINY: dict[str, Any] = {
    "model_type": "vibevoice_acoustic_tokenizer",
    "channels": 1,
    "vae_dim": 6,
    "fix_std": 0.5,
    "std_dist_type": "gaussian",
    "layernorm_elementwise_affine": True,
    "weight_init_value": 0.01,
    "torch_dtype": "bfloat16",
    "encoder_n_filters": 4,
    "encoder_ratios": [5, 4, 2],
    "encoder_depths": "1-1-1-2",
    "decoder_n_filters": 4,
    "decoder_ratios": None,
    "decoder_depths": None,
}
"""The golden file's tokenizer, with fields that do not change what it computes."""
WHOLE = {"model_type": "vibevoice", "acoustic_tokenizer_config": TINY, "decoder_config": {}}
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def write_alone(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    """The tokenizer as it is saved alone."""
    write_json(folder / "config.json", TINY | changes)
    save_file(weights, folder / "model.safetensors")
    return folder


def write_whole(folder: Path, weights: dict[str, Tensor], prefix: str) -> Path:
    """A whole model in bfloat16: shards, an index, other tensors, other files beside."""
    write_json(folder / "config.json", WHOLE)
    ours = {f"{prefix}{name}": tensor.bfloat16() for name, tensor in weights.items()}
    names = sorted(ours)
    shards: list[dict[str, Tensor]] = [
        {"model.language_model.norm.weight": torch.ones(3)},
        {name: ours[name] for name in names[:20]} | {"lm_head.weight": torch.ones(3, 2)},
        {name: ours[name] for name in names[20:]}
        | {"model.semantic_tokenizer.encoder.head.conv.conv.bias": torch.ones(2)},
    ]
    for name, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, folder / name)
    places = {name: shard for shard, held in zip(SHARDS, shards, strict=True) for name in held}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    (folder / "modeling.py").write_text("raise SystemExit('code of a model was run')")
    return folder


def change_index(folder: Path, **places: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = read_json(path)
    index["weight_map"].update(places)
    write_json(path, index)
