"""What a recipe holds: everything that decides a run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentlm_core.config import Config
from latentlm_core.data.audio import ClipLimits
from latentlm_core.data.mixture import MultimodalDataConfig
from latentlm_core.data.packing import LatentDataConfig
from latentlm_core.data.utterances import SpeechDataConfig
from latentlm_core.models.dit import DiTSize
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.models.transfusion import TransfusionSize
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.training.distill_task import DistillConfig
from latentlm_core.training.lm_task import LMLossConfig
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.speech_task import SpeechLossConfig
from latentlm_core.training.trainer_config import TrainerConfig
from latentlm_core.training.vae_task import VAELossConfig


class ImageDataConfig(Config):
    """How batches are made of images."""

    kind: Literal["image"] = "image"
    """Crops of images."""
    batch_size: int = Field(default=64, ge=1)
    """Images a batch (a micro-batch, where gradients are accumulated)."""
    flip: bool = True
    """Mirror half of the images."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0 decodes in the trainer's own."""


class SegmentDataConfig(Config):
    """How batches are made of recordings."""

    kind: Literal["speech"] = "speech"
    """Segments of recordings."""
    batch_size: int = Field(default=16, ge=1)
    """Segments a batch (a micro-batch, where gradients are accumulated)."""
    segment_seconds: float = Field(default=1.0, gt=0, le=60)
    """Of a segment; made a whole number of latents."""
    limits: ClipLimits = ClipLimits()
    """What a recording must be like."""


class VAERecipe(Config):
    """A whole run of ``train-vae``."""

    tokenizer: SigmaVAEConfig
    """What is trained."""
    loss: VAELossConfig | SpeechLossConfig = Field(default=VAELossConfig(), discriminator="kind")
    """Its objective: `image` or `speech`."""
    data: ImageDataConfig | SegmentDataConfig = Field(
        default=ImageDataConfig(), discriminator="kind"
    )
    """Its batches: `image` or `speech`."""
    trainer: TrainerConfig
    """How long and how."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    """Of encoder and decoder."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, betas=(0.5, 0.9))
    """Of the discriminator."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        modality = self.tokenizer.network.modality
        for name, kind in (("loss", self.loss.kind), ("data", self.data.kind)):
            if kind != modality:
                raise ValueError(
                    f"{name}.kind is {kind!r}, but the tokenizer's network is one of {modality}"
                )
        return self


class LMRecipe(Config):
    """A whole run of ``train-lm``."""

    model: LatentLMSize | TransfusionSize | DiTSize = Field(discriminator="kind")
    """What is trained."""
    loss: LMLossConfig = LMLossConfig()
    """Its objective."""
    data: LatentDataConfig | SpeechDataConfig | MultimodalDataConfig = Field(
        default=LatentDataConfig(), discriminator="kind"
    )
    """Its batches: `classes`, `speech` or `multimodal`."""
    trainer: TrainerConfig
    """How long and how."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the model."""
    sampler: SamplerConfig = SamplerConfig(guidance_scale=1.65)
    """What sampling uses where the user says nothing."""


class DistillRecipe(Config):
    """A whole run of ``train-lm --distill``; the network is its teacher's."""

    distill: DistillConfig = DistillConfig()
    """What is distilled."""
    data: (
        Annotated[
            LatentDataConfig | SpeechDataConfig | MultimodalDataConfig, Field(discriminator="kind")
        ]
        | None
    ) = None
    """Its batches; what is not said of them is as in the teacher's recipe, but that no condition is
    dropped."""
    trainer: TrainerConfig
    """How long and how."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the head."""
