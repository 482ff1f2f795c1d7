"""Published weights of the image sigma-VAE under our names.

Published names are those of microsoft/unilm, LatentLM, tokenizer_models/modeling_sigma_vae.py.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from latentlm_core.errors import ArtifactError

_TOWER = {
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
_HEADS = {
    "encoder_post_processor.dense": "encoder.head",
    "decoder_post_processor.fc1": "decoder.hidden",
    "decoder_post_processor.fc2": "decoder.head",
}
_NAME = re.compile(
    r"(?P<tower>encoder|decoder)\.(?P<block>blocks\.\d+\.)?(?P<part>.+?)(?P<leaf>\.weight|\.bias)?"
)


def sigma_vae_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights of the image sigma-VAE.

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
    return {_rename(name): tensor for name, tensor in published.items()}


def _rename(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _HEADS:
        return f"{_HEADS[module]}.{leaf}"
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in _TOWER:
        raise ArtifactError(
            f"The weight {name} is not one of the published image sigma-VAE with plain ViT towers."
        )
    block, leaf = match["block"] or "", match["leaf"] or ""
    return f"{match['tower']}.tower.{block}{_TOWER[match['part']]}{leaf}"
