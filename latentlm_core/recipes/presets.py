"""Named recipes: whole runs that are known to work, or that the paper describes."""

from collections.abc import Mapping

from latentlm_core.data.packing import LatentDataConfig
from latentlm_core.models.dit import DiTSize
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.recipes.multimodal import MULTIMODAL_LM_RECIPES, MULTIMODAL_VAE_RECIPES
from latentlm_core.recipes.schema import ImageDataConfig, LMRecipe, VAERecipe
from latentlm_core.recipes.sizes import PUBLISHED_SIZES, dit_size, latent_lm_size
from latentlm_core.recipes.speech import SPEECH_LM_RECIPES, SPEECH_VAE_RECIPES
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.critics import CriticConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.vit import ViTConfig
from latentlm_core.training.lm_task import LMLossConfig
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.trainer_config import TrainerConfig
from latentlm_core.training.vae_task import VAELossConfig


def _published_run(model: LatentLMSize | DiTSize) -> LMRecipe:
    """ImageNet at 256 as in the paper: 2,048 sequences a step, 250,000 steps, lr 5e-4."""
    return LMRecipe(
        model=model,
        loss=LMLossConfig(latent_weight=1.0),
        data=LatentDataConfig(batch_size=256),
        trainer=TrainerConfig(total_steps=250_000, accumulate=8, save_every=5_000, log_every=100),
        optimizer=OptimizerConfig(lr=5e-4),
    )


def _digits_run(model: LatentLMSize | DiTSize) -> LMRecipe:
    """Two minutes on two CPU cores; one budget for LatentLM and DiT, so that they compare."""
    return LMRecipe(
        model=model,
        loss=LMLossConfig(latent_weight=1.0),
        data=LatentDataConfig(batch_size=64),
        trainer=TrainerConfig(
            total_steps=600, save_every=300, validate_every=150, log_every=15, ema_decay=0.99
        ),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        sampler=SamplerConfig(guidance_scale=2.0),
    )


def _tiny_run(model: LatentLMSize | DiTSize) -> LMRecipe:
    """Seconds on a CPU: for examples and tests."""
    return LMRecipe(
        model=model,
        loss=LMLossConfig(latent_weight=1.0),
        data=LatentDataConfig(batch_size=32),
        trainer=TrainerConfig(total_steps=200, save_every=100, log_every=20, ema_decay=0.99),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=20),
        sampler=SamplerConfig(guidance_scale=1.5, num_inference_steps=10),
    )


VAE_RECIPES: Mapping[str, VAERecipe] = {
    "mnist": VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=16,
            network=ConvConfig(image_size=32, channels=(64, 128), num_blocks=2, stem_patch_size=4),
        ),
        loss=VAELossConfig(reconstruction="l2", beta=1e-3),
        data=ImageDataConfig(batch_size=64, flip=False),
        trainer=TrainerConfig(
            total_steps=600, save_every=300, validate_every=150, log_every=20, ema_decay=0.99
        ),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.95)),
    ),
    "cifar10": VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=16,
            network=ConvConfig(
                image_size=32, channels=(128, 256, 256), num_blocks=2, stem_patch_size=1
            ),
        ),
        loss=VAELossConfig(
            reconstruction="l1",
            gan_weight=0.5,
            gan_start_step=5_000,
            beta=1e-3,
            critic=CriticConfig(num_layers=2),
        ),
        data=ImageDataConfig(batch_size=256),
        trainer=TrainerConfig(total_steps=10_000, save_every=1000, ema_decay=0.999),
        optimizer=OptimizerConfig(lr=5e-4, betas=(0.9, 0.95)),
    ),
    "cifar10-small": VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=32,
            network=ConvConfig(image_size=32, channels=(96, 192), num_blocks=2, stem_patch_size=4),
        ),
        loss=VAELossConfig(
            reconstruction="l1",
            gan_weight=0.1,
            gan_start_step=2000,
            beta=1e-3,
            critic=CriticConfig(num_layers=2),
        ),
        data=ImageDataConfig(batch_size=64),
        trainer=TrainerConfig(total_steps=3000, save_every=1000, log_every=100, ema_decay=0.995),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95)),
    ),
    "imagenet": VAERecipe(
        tokenizer=SigmaVAEConfig(latent_channels=16, network=ViTConfig()),
        loss=VAELossConfig(
            reconstruction="l2", perceptual_weight=1.0, gan_weight=0.5, gan_start_step=20_000
        ),
        data=ImageDataConfig(batch_size=32, num_workers=8),
        trainer=TrainerConfig(total_steps=1_000_000, accumulate=8, save_every=5_000, log_every=100),
    ),
    "tiny": VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=8,
            network=ConvConfig(image_size=32, channels=(32, 64), num_blocks=1, stem_patch_size=4),
        ),
        loss=VAELossConfig(beta=1e-3),
        data=ImageDataConfig(batch_size=32, flip=False),
        trainer=TrainerConfig(total_steps=200, save_every=100, log_every=20, ema_decay=0.99),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=20),
    ),
    **SPEECH_VAE_RECIPES,
    **MULTIMODAL_VAE_RECIPES,
}

LM_RECIPES: Mapping[str, LMRecipe] = {
    **{name: _published_run(size) for name, size in PUBLISHED_SIZES.items()},
    "mnist": _digits_run(
        LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=192, num_layers=6, num_heads=3, intermediate_size=512
            ),
            head=DiffusionHeadConfig(num_layers=2, intermediate_size=256),
        )
    ),
    "dit-mnist": _digits_run(
        DiTSize(hidden_size=192, num_layers=5, num_heads=3, intermediate_size=512)
    ),
    "cifar10": LMRecipe(
        model=latent_lm_size(512, 12, 8, 4, 6),
        loss=LMLossConfig(latent_weight=1.0),
        data=LatentDataConfig(batch_size=256),
        trainer=TrainerConfig(total_steps=15_000, save_every=1000, ema_decay=0.9995),
        optimizer=OptimizerConfig(lr=5e-4, betas=(0.9, 0.95), warmup_steps=1000),
    ),
    "cifar10-small": LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=256, num_layers=6, num_heads=4, intermediate_size=640
            ),
            head=DiffusionHeadConfig(num_layers=3, intermediate_size=384),
        ),
        loss=LMLossConfig(latent_weight=1.0),
        data=LatentDataConfig(batch_size=64),
        trainer=TrainerConfig(
            total_steps=2000, save_every=500, validate_every=500, log_every=50, ema_decay=0.998
        ),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05),
        sampler=SamplerConfig(guidance_scale=1.5),
    ),
    "tiny": _tiny_run(latent_lm_size(128, 2, 2, 4, 2)),
    "dit-tiny": _tiny_run(dit_size(128, 3, 2)),
    **SPEECH_LM_RECIPES,
    **MULTIMODAL_LM_RECIPES,
}
