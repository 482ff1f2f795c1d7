"""Recipes of text and images: the paper's size, and small ones that train on a CPU.

The paper gives no resolution, no share of dropped captions and no guidance scale for its multimodal
model; the noise law, alpha and the optimiser are its own.
"""

from collections.abc import Mapping

from latentlm_core.data.mix_parts import Directions
from latentlm_core.data.mixture import MultimodalDataConfig
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.models.transfusion import TransfusionSize
from latentlm_core.recipes.schema import ImageDataConfig, LMRecipe, VAERecipe
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.base import LatentPosteriorConfig
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.text import TextConfig
from latentlm_core.training.lm_task import LMLossConfig
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.trainer_config import TrainerConfig
from latentlm_core.training.vae_task import VAELossConfig

_SMALL_BACKBONE = TransformerConfig(
    hidden_size=256, num_layers=3, num_heads=8, intermediate_size=704, norm_affine=True
)


def _small_run(model: LatentLMSize | TransfusionSize) -> LMRecipe:
    """Minutes on two CPU cores; one budget for LatentLM and Transfusion, so that they compare."""
    return LMRecipe(
        model=model,
        loss=LMLossConfig(latent_weight=5.0),
        data=MultimodalDataConfig(
            batch_elements=1024,
            row_length=128,
            directions=Directions(draw=3.0, describe=1.0, ask=0.25),
            text=TextConfig(kind="bpe", vocab_size=512),
        ),
        trainer=TrainerConfig(
            total_steps=3000, save_every=1000, validate_every=1000, log_every=50, ema_decay=0.99
        ),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=50),
        sampler=SamplerConfig(guidance_scale=3.0),
    )


MULTIMODAL_VAE_RECIPES: Mapping[str, VAERecipe] = {
    "coloured-digits": VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=128,
            posterior=LatentPosteriorConfig(std=0.7),
            network=ConvConfig(
                image_size=32,
                channels=(96, 192),
                num_blocks=1,
                stem_patch_size=4,
                latent_patch_size=2,
            ),
        ),
        loss=VAELossConfig(reconstruction="l2", beta=1e-4),
        data=ImageDataConfig(batch_size=16, flip=False),
        trainer=TrainerConfig(
            total_steps=6500, save_every=1500, validate_every=2000, log_every=100, ema_decay=0.99
        ),
        optimizer=OptimizerConfig(lr=1.5e-3, betas=(0.9, 0.95), warmup_steps=50, clip_norm=0.2),
    ),
    "emoji": VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=32,
            posterior=LatentPosteriorConfig(std=0.35),
            network=ConvConfig(
                image_size=64, channels=(128, 256, 256), num_blocks=2, stem_patch_size=2
            ),
        ),
        loss=VAELossConfig(reconstruction="l1", beta=1e-4),
        data=ImageDataConfig(batch_size=64, flip=False),
        trainer=TrainerConfig(total_steps=10_000, save_every=1000, ema_decay=0.999),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95)),
    ),
}

MULTIMODAL_LM_RECIPES: Mapping[str, LMRecipe] = {
    "multimodal-1.3b": LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=2048, num_layers=24, num_heads=16, intermediate_size=6144
            ),
            head=DiffusionHeadConfig(num_layers=6, intermediate_size=6144),
        ),
        loss=LMLossConfig(latent_weight=5.0),
        data=MultimodalDataConfig(
            batch_elements=32_768,
            row_length=4096,
            text=TextConfig(kind="tiktoken", source="cl100k_base"),
        ),
        trainer=TrainerConfig(total_steps=50_000, accumulate=128, save_every=1000, log_every=10),
        optimizer=OptimizerConfig(lr=3e-4, betas=(0.9, 0.98), warmup_steps=500),
        sampler=SamplerConfig(guidance_scale=3.0),
    ),
    "coloured-digits": _small_run(
        LatentLMSize(
            backbone=_SMALL_BACKBONE,
            head=DiffusionHeadConfig(num_layers=3, intermediate_size=512, noise_repeats=12),
        )
    ),
    "transfusion-coloured-digits": _small_run(
        TransfusionSize(backbone=_SMALL_BACKBONE, head_layers=2)
    ),
    "multimodal-tiny": LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=128, num_layers=2, num_heads=2, intermediate_size=256
            ),
            head=DiffusionHeadConfig(num_layers=2, intermediate_size=256),
        ),
        data=MultimodalDataConfig(batch_elements=1024, row_length=256),
        trainer=TrainerConfig(total_steps=60, save_every=60, log_every=10, ema_decay=0.95),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10),
        sampler=SamplerConfig(guidance_scale=1.5, num_inference_steps=5),
    ),
    "emoji": LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=512, num_layers=12, num_heads=8, intermediate_size=1408
            ),
            head=DiffusionHeadConfig(num_layers=6, intermediate_size=1024),
        ),
        loss=LMLossConfig(latent_weight=5.0),
        data=MultimodalDataConfig(
            batch_elements=16_384, row_length=512, text=TextConfig(kind="bpe", vocab_size=1024)
        ),
        trainer=TrainerConfig(total_steps=10_000, save_every=1000, ema_decay=0.999),
        optimizer=OptimizerConfig(lr=5e-4, betas=(0.9, 0.95), warmup_steps=500),
        sampler=SamplerConfig(guidance_scale=3.0),
    ),
}
