"""Recipes of speech: the paper's and VibeVoice's sizes, and small ones that train on a CPU.

The paper gives no strides for 3,200 and 6,400 samples a latent, no weights of its losses, no
C_sigma and no discriminator's size: strides are VibeVoice's where it has them, C_sigma is
VibeVoice's 0.5, losses are those of the Descript Audio Codec. Its 120 M parameters are met by
widths of 1,024 at the latents.
"""

from collections.abc import Mapping

from latentlm_core.data.utterances import SpeechDataConfig
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.recipes.schema import LMRecipe, SegmentDataConfig, VAERecipe
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.base import LatentPosteriorConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.spectral import SpectralConfig
from latentlm_core.tokenizers.speech import CausalConvConfig
from latentlm_core.tokenizers.speech_critics import SpeechCriticConfig
from latentlm_core.tokenizers.text import TextConfig
from latentlm_core.training.lm_task import LMLossConfig
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.speech_task import SpeechLossConfig
from latentlm_core.training.trainer_config import TrainerConfig

_POSTERIOR = LatentPosteriorConfig(std=0.5)
_CRITIC_OPTIMIZER = OptimizerConfig(lr=1e-4, betas=(0.8, 0.99))


def _large(network: CausalConvConfig, latent_channels: int) -> VAERecipe:
    """24 kHz, as published: batches of 2.4 seconds, the discriminators from the start."""
    return VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=latent_channels, posterior=_POSTERIOR, network=network
        ),
        loss=SpeechLossConfig(waveform_weight=1.0),
        data=SegmentDataConfig(batch_size=16, segment_seconds=2.4),
        trainer=TrainerConfig(total_steps=400_000, save_every=5_000, log_every=100),
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.8, 0.99), warmup_steps=1000),
        critic_optimizer=_CRITIC_OPTIMIZER,
    )


SMALL_CRITIC = SpeechCriticConfig(
    periods=(2, 3, 5),
    period_channels=8,
    max_channels=64,
    stft_windows=(512, 128),
    stft_channels=8,
    band_edges=(0.0, 1.0),
)
"""Discriminators that a CPU can bear."""


def _small(
    network: SpectralConfig | CausalConvConfig,
    latent_channels: int,
    *,
    total_steps: int = 3000,
    gan_start_step: int = 800,
    beta: float = 0.1,
) -> VAERecipe:
    """A quarter of an hour on two CPU cores."""
    return VAERecipe(
        tokenizer=SigmaVAEConfig(
            latent_channels=latent_channels, posterior=_POSTERIOR, network=network
        ),
        loss=SpeechLossConfig(beta=beta, gan_start_step=gan_start_step, critic=SMALL_CRITIC),
        data=SegmentDataConfig(batch_size=8, segment_seconds=1.28),
        trainer=TrainerConfig(
            total_steps=total_steps,
            save_every=500,
            validate_every=500,
            log_every=50,
            ema_decay=0.99,
        ),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.8, 0.95), warmup_steps=50),
        critic_optimizer=OptimizerConfig(lr=3e-4, betas=(0.8, 0.99)),
    )


def _tiny() -> VAERecipe:
    """Seconds on a CPU: for examples and tests."""
    small = _small(SpectralConfig(width=64, frame_blocks=1, latent_blocks=1), 16, total_steps=80)
    trainer = small.trainer.model_copy(update={"save_every": 40, "log_every": 10})
    loss = SpeechLossConfig(gan_weight=0.0)
    return small.model_copy(update={"trainer": trainer, "loss": loss})


SPEECH_VAE_RECIPES: dict[str, VAERecipe] = {
    "speech-15hz": _large(
        CausalConvConfig(base_channels=32, strides=(2, 4, 5, 5, 8), num_blocks=(3, 3, 3, 3, 3, 5)),
        latent_channels=32,
    ),
    "speech-7.5hz": _large(
        CausalConvConfig(
            base_channels=16, strides=(2, 2, 4, 5, 5, 8), num_blocks=(3, 3, 3, 3, 3, 3, 5)
        ),
        latent_channels=64,
    ),
    "speech-3.75hz": _large(
        CausalConvConfig(
            base_channels=16, strides=(2, 4, 4, 5, 5, 8), num_blocks=(3, 3, 3, 3, 3, 3, 5)
        ),
        latent_channels=128,
    ),
    "speech-vibevoice": _large(CausalConvConfig(), latent_channels=64),
    "speech-8k": _small(SpectralConfig(frames_per_latent=8), 32),
    "speech-8k-25hz": _small(SpectralConfig(frames_per_latent=4), 16),
    "speech-8k-6hz": _small(SpectralConfig(frames_per_latent=16), 64),
    "speech-8k-conv": _small(
        CausalConvConfig(
            sample_rate=8_000,
            base_channels=16,
            strides=(4, 4, 5, 8),
            num_blocks=(1, 1, 2, 2, 4),
            layer_scale=0.1,
        ),
        latent_channels=32,
    ),
    "speech-16k": _small(SpectralConfig(sample_rate=16_000, frame_length=640, frame_hop=160), 32),
    "speech-tiny": _tiny(),
}
SPEECH_VAE_RECIPES["digit-strings"] = SPEECH_VAE_RECIPES["speech-8k"]
SPEECH_VAE_RECIPES["hibari"] = _small(
    SpectralConfig(sample_rate=16_000, frame_length=640, frame_hop=160),
    32,
    total_steps=700,
    gan_start_step=350,
    beta=0.03,
)


WORDS = TextConfig(kind="bpe", vocab_size=512, normalise="words")


def _small_tts(total_steps: int, sampler: SamplerConfig) -> LMRecipe:
    """Some minutes on two CPU cores."""
    return LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=192, num_layers=6, num_heads=3, intermediate_size=512
            ),
            head=DiffusionHeadConfig(num_layers=3, intermediate_size=384),
        ),
        loss=LMLossConfig(latent_weight=1.0),
        data=SpeechDataConfig(
            batch_size=16,
            row_length=512,
            curriculum_batches=total_steps * 2 // 3,
            prompt_share=0.5,
            text=WORDS,
        ),
        trainer=TrainerConfig(
            total_steps=total_steps,
            save_every=500,
            validate_every=500,
            log_every=50,
            ema_decay=0.995,
        ),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        sampler=sampler,
    )


def _tiny_tts() -> LMRecipe:
    """Seconds on a CPU: for examples and tests."""
    return LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128
            ),
            head=DiffusionHeadConfig(num_layers=2, intermediate_size=128),
        ),
        loss=LMLossConfig(latent_weight=1.0),
        data=SpeechDataConfig(batch_size=8, row_length=512, text=WORDS),
        trainer=TrainerConfig(total_steps=60, save_every=30, log_every=10, ema_decay=0.9),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10),
        sampler=SamplerConfig(guidance_scale=1.5, num_inference_steps=3),
    )


SPEECH_LM_RECIPES: Mapping[str, LMRecipe] = {
    "tts-24l": LMRecipe(
        model=LatentLMSize(
            backbone=TransformerConfig(
                hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096
            ),
            head=DiffusionHeadConfig(num_layers=3, intermediate_size=4096),
        ),
        data=SpeechDataConfig(
            batch_size=128,
            row_length=4096,
            text=TextConfig(kind="bpe", vocab_size=16_384, normalise="speech"),
        ),
        trainer=TrainerConfig(total_steps=100_000, accumulate=8, save_every=1_000, log_every=100),
        optimizer=OptimizerConfig(lr=7.5e-4, warmup_steps=10_000),
        sampler=SamplerConfig(guidance_scale=4.0, num_inference_steps=5),
    ),
    "digit-strings": _small_tts(2400, SamplerConfig(guidance_scale=4.0, num_inference_steps=3)),
    "hibari": _small_tts(1400, SamplerConfig(guidance_scale=1.5, num_inference_steps=5)),
    "speech-tiny": _tiny_tts(),
}
