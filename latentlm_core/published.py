"""Weights under the names of the published code, renamed to ours.

Each function takes a state dict as the reference writes it and returns one that our module loads
strictly. No checkpoint of LatentLM is published yet: the maps serve checkpoints that were trained
with the official code (microsoft/unilm, LatentLM), and the acoustic tokenizer and the diffusion
head of VibeVoice. The golden files use the same names, so agreement with them tests the maps too.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from latentlm_core.errors import ArtifactError

_SWIGLU_RULES = (  # the published feed-forward is fc2(silu(fc1(x)) * gate(x))
    (r"\.feed_forward\.gate\.", ".feed_forward.up."),
    (r"\.feed_forward\.fc1\.", ".feed_forward.gate."),
    (r"\.feed_forward\.fc2\.", ".feed_forward.down."),
)

_LATENT_LM_RULES = (
    (r"^y_embedder\.embedding_table\.", "token_embedding."),
    (r"^x_embedder\.proj\.", "latent_embedding."),
    (r"^noisy_x_embedder\.proj\.", "head.latent_embedding."),
    (r"^t_embedder\.mlp\.", "head.timestep_embedding.mlp."),
    (r"^condition_layer\.linear\.", "head.condition_projection."),
    (r"^diffusion_blocks\.(\d+)\.adaLN_modulation\.1\.", r"head.blocks.\1.modulation."),
    (r"^diffusion_blocks\.(\d+)\.mlp\.", r"head.blocks.\1.feed_forward."),
    (r"^final_layer\.adaLN_modulation\.1\.", "head.final.modulation."),
    (r"^final_layer\.linear\.", "head.final.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"backbone.blocks.\1.attention.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"backbone.blocks.\1.attention.out."),
    (r"^blocks\.(\d+)\.mlp\.", r"backbone.blocks.\1.feed_forward."),
    *_SWIGLU_RULES,
)

_DIT_RULES = (
    (r"^y_embedder\.embedding_table\.", "token_embedding."),
    (r"^x_embedder\.proj\.", "latent_embedding."),
    (r"^t_embedder\.mlp\.", "timestep_embedding.mlp."),
    (r"^final_layer\.adaLN_modulation\.1\.", "final.modulation."),
    (r"^final_layer\.linear\.", "final.projection."),
    (r"^blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.attention.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.out."),
    (r"^blocks\.(\d+)\.mlp\.", r"blocks.\1.feed_forward."),
    *_SWIGLU_RULES,
)

_VIBEVOICE_HEAD_RULES = (
    (r"^noisy_images_proj\.", "latent_embedding."),
    (r"^cond_proj\.", "condition_projection."),
    (r"^t_embedder\.mlp\.", "timestep_embedding.mlp."),
    (r"^layers\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"^layers\.(\d+)\.norm\.", r"blocks.\1.norm."),
    (r"^layers\.(\d+)\.ffn\.gate_proj\.", r"blocks.\1.feed_forward.gate."),
    (r"^layers\.(\d+)\.ffn\.up_proj\.", r"blocks.\1.feed_forward.up."),
    (r"^layers\.(\d+)\.ffn\.down_proj\.", r"blocks.\1.feed_forward.down."),
    (r"^final_layer\.adaLN_modulation\.1\.", "final.modulation."),
    (r"^final_layer\.linear\.", "final.projection."),
)

_VIBEVOICE_TOKENIZER_RULES = (
    (r"^(encoder|decoder)\.(?:down|up)sample_layers\.0\.0\.conv\.conv\.", r"\1.stem."),
    (r"^encoder\.downsample_layers\.(\d+)\.0\.conv\.conv\.", r"encoder.downsamples.\1."),
    (r"^decoder\.upsample_layers\.(\d+)\.0\.convtr\.convtr\.", r"decoder.upsamples.\1."),
    (r"^(encoder|decoder)\.head\.conv\.conv\.", r"\1.head."),
    (r"\.stages\.", ".levels."),
    (r"\.mixer\.conv\.conv\.conv\.", ".conv."),
    (r"\.gamma$", ".conv_gamma"),
    (r"\.norm\.weight$", ".conv_norm.weight"),
    (r"\.ffn_gamma$", ".mlp_gamma"),
    (r"\.ffn_norm\.", ".mlp_norm."),
    (r"\.ffn\.linear1\.", ".mlp_in."),
    (r"\.ffn\.linear2\.", ".mlp_out."),
)
_RESAMPLER = re.compile(r"(downsamples|upsamples)\.(\d{1,3})\.")

_VAE_TOWER = {
    "patch_embed.proj": "patch_embed",
    "cls_token": "class_token",
    "pos_embed": "positions",
    "fc_norm": "norm",
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.q_bias": "attention.q_bias",
    "attn.v_bias": "attention.v_bias",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
}
_VAE_HEADS = {
    "encoder_post_processor.dense": "encoder.head",
    "decoder_post_processor.fc1": "decoder.hidden",
    "decoder_post_processor.fc2": "decoder.head",
}
_VAE_NAME = re.compile(
    r"(?P<tower>encoder|decoder)\.(?P<block>blocks\.\d+\.)?(?P<part>.+?)(?P<leaf>\.weight|\.bias)?"
)


def latent_lm_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """microsoft/unilm LatentLM ``models/Transformer.py`` => ``LatentLM``."""
    return _convert(published, _LATENT_LM_RULES)


def dit_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """microsoft/unilm LatentLM ``models/DiT.py`` => ``DiT`` (positions are recomputed)."""
    return _convert({k: v for k, v in published.items() if k != "pos_embed"}, _DIT_RULES)


def vibevoice_head_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """microsoft/VibeVoice ``modular_vibevoice_diffusion_head.py`` => ``DiffusionHead``."""
    return _convert(published, _VIBEVOICE_HEAD_RULES)


def vibevoice_tokenizer_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """microsoft/VibeVoice ``modular_vibevoice_tokenizer.py``, acoustic => ``SigmaVAE``.

    For ``build_tokenizer`` of a ``CausalConvConfig``. The published lists of resampling layers
    begin with the stem.
    """
    return {
        _RESAMPLER.sub(lambda match: f"{match[1]}.{int(match[2]) - 1}.", name): tensor
        for name, tensor in _rename(published, _VIBEVOICE_TOKENIZER_RULES).items()
    }


def sigma_vae_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """microsoft/unilm LatentLM ``tokenizer_models/modeling_sigma_vae.py`` => ``SigmaVAE``.

    Covers the ViT pair with plain pre-norm towers on both sides. The decoder is the published
    one; the published encoder may also be a BEiT-3 tower with sub-layer norms, which has no
    counterpart here.

    Args:
        published: weights under their published names.

    Returns:
        A state dict for ``build_tokenizer`` of a ``ViTConfig``; the tensors are shared.

    Raises:
        ArtifactError: a weight has no counterpart.
    """
    return {_rename_vae(name): tensor for name, tensor in published.items()}


def _convert(
    published: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    return _fuse_gates(_rename(published, rules))


def _rename(
    published: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in published.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        is_convolution_of_one = tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        renamed[name] = tensor.flatten(1) if is_convolution_of_one else tensor
    return renamed


def _fuse_gates(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the gate and up Linears of each SwiGLU, which ours computes in one product."""
    fused = {name: tensor for name, tensor in weights.items() if ".up." not in name}
    for name in [name for name in fused if ".gate." in name]:
        gate, up = fused.pop(name), weights[name.replace(".gate.", ".up.")]
        fused[name.replace(".gate.", ".gate_up.")] = torch.cat([gate, up])
    return fused


def _rename_vae(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _VAE_HEADS:
        return f"{_VAE_HEADS[module]}.{leaf}"
    match = _VAE_NAME.fullmatch(name)
    if match is None or match["part"] not in _VAE_TOWER:
        raise ArtifactError(
            f"The weight {name} is not one of the published image sigma-VAE with plain ViT towers."
        )
    block, leaf = match["block"] or "", match["leaf"] or ""
    return f"{match['tower']}.tower.{block}{_VAE_TOWER[match['part']]}{leaf}"
