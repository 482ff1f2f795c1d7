"""Small real models, their batches, and a run of them, for the tests of several processes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core.data.guided import Guidance, GuidedStream
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.data.stream import MediaBatch
from latentlm_core.draws import WHOLE, Share
from latentlm_core.layout import Kind, SequenceLayout
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.few_step import FewStepHead
from latentlm_core.models.heads import DiffusionHeadConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.models.transformer import TransformerConfig
from latentlm_core.runtime import generator, seeded_init
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.critics import CriticConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.vit import ViTConfig
from latentlm_core.training.distill_task import DistillConfig, DistillTask
from latentlm_core.training.lm_task import DiTTask, LMLossConfig, LMTask
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.speech_task import SpeechVAETask
from latentlm_core.training.trainer import Trainer
from latentlm_core.training.trainer_config import TrainerConfig
from latentlm_core.training.vae_task import VAELossConfig, VAETask
from tests import tiny_speech_task
from tests.tiny_training import Listener

ROWS = 4
"""Of a batch."""
T, L = int(Kind.TEXT), int(Kind.LATENT)
KINDS = torch.tensor(
    [
        [T, T, T, T, T, T, T],
        [T, T, L, L, L, T, T],
        [T, L, L, L, L, L, L],
        [T, L, L, T, T, L, L],
    ]
)
"""A row without latents, rows of both, and one with nothing to read out: shares are unequal."""


@dataclass
class Sequences:
    """Batch k is a function of k."""

    spoiled: int | None = None
    """A batch that is not finite."""

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[Any]:
        for number in numbers:
            yield self.batch(number).share(*share)

    def held_out(self) -> Iterator[Any]:
        for number in range(3):
            yield self.batch(-1 - number)

    def batch(self, number: int) -> SequenceBatch:
        rng = generator("sequences", number)
        ids = torch.randint(9, KINDS.shape, generator=rng)
        latents = torch.randn(*KINDS.shape, 3, generator=rng)
        if number == self.spoiled:
            latents[2] = torch.nan
        keys = tuple(f"{number}-{row}" for row in range(ROWS))
        fed, wanted = KINDS[:, :-1], KINDS[:, 1:]
        layout = SequenceLayout.make(
            kind=fed,
            document=torch.zeros_like(fed),
            position=torch.arange(fed.shape[1]).expand_as(fed),
            span=torch.where(fed == L, 0, -1),
            predict=wanted,
        )
        return SequenceBatch(ids, latents, layout, keys)


class Labelled(Sequences):
    """Images of classes."""

    def batch(self, number: int) -> SequenceBatch:
        rng = generator("images", number)
        ids = torch.randint(9, (ROWS, 5), generator=rng)
        latents = torch.randn(ROWS, 5, 3, generator=rng)
        return SequenceBatch(ids, latents, SequenceLayout.of_images(ROWS, 4), ("image",) * ROWS)


class Pictures(Sequences):
    """Noise to encode."""

    def batch(self, number: int) -> MediaBatch:
        media = torch.rand(ROWS, 3, 16, 16, generator=generator("pictures", number)) * 2 - 1
        return MediaBatch(media, torch.zeros(ROWS, dtype=torch.int64), ("picture",) * ROWS)


class Recordings(Sequences):
    """Noise to listen to."""

    def batch(self, number: int) -> MediaBatch:
        media = 0.2 * torch.randn(ROWS, 1, 1_280, generator=generator("recordings", number))
        return MediaBatch(media, torch.zeros(ROWS, dtype=torch.int64), ("recording",) * ROWS)


def make_lm() -> tuple[LMTask, Sequences]:
    config = LatentLMConfig(
        backbone=TransformerConfig(
            hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, qkv_bias=True
        ),
        head=DiffusionHeadConfig(num_layers=1, intermediate_size=24, noise_repeats=2),
        latent_channels=3,
        vocab_size=9,
        predicts_text=True,
    )
    with seeded_init("tiny lm"):
        return LMTask(LatentLM(config), LMLossConfig()), Sequences()


def make_dit() -> tuple[DiTTask, Sequences]:
    config = DiTConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        grid=(2, 2),
        latent_channels=3,
        vocab_size=9,
    )
    with seeded_init("tiny dit"):
        return DiTTask(DiT(config), LMLossConfig()), Labelled()


def make_vae(network: ViTConfig | ConvConfig | None = None) -> tuple[VAETask, Sequences]:
    network = network or ConvConfig(image_size=16, channels=(8, 16), stem_patch_size=2)
    with seeded_init("tiny vae"):
        vae = build_tokenizer(SigmaVAEConfig(latent_channels=4, network=network))
    critic = CriticConfig(base_channels=8, num_layers=1)
    return VAETask(vae, VAELossConfig(gan_weight=0.5, gan_start_step=2, critic=critic)), Pictures()


def make_vit() -> tuple[VAETask, Sequences]:
    return make_vae(
        ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_layers=2, num_heads=2)
    )


def make_speech() -> tuple[SpeechVAETask, Sequences]:
    return tiny_speech_task.task(gan_start_step=1), Recordings()


def make_distill() -> tuple[DistillTask, GuidedStream]:
    task, stream = make_lm()
    model = task.model
    with seeded_init("tiny few-step head"):
        teacher, model.head = model.head, FewStepHead.of_teacher(model.head)
        torch.nn.init.normal_(teacher.final.projection.weight)  # else it teaches nothing
    config = DistillConfig(steps=(1, 2), teacher_steps=4, trajectories=2)
    return DistillTask(model, teacher, config), GuidedStream(stream, Guidance(2.0, "linear", (8,)))


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "lm": make_lm,
    "distill": make_distill,
    "dit": make_dit,
    "vae": make_vae,
    "vit": make_vit,
    "speech": make_speech,
}


@dataclass
class Trained:
    """What a run leaves, whole: weights, average and optimizer state by name, and its figures."""

    tensors: dict[str, Tensor]
    figures: dict[str, Any]
    samples_seen: int


def make_trainer(folder: Path, kind: str, stream: Any = None, **config: Any) -> Trainer:
    """Five steps at a rate and a clip that are felt."""
    task, own_stream = MAKERS[kind]()
    settings = {"total_steps": 5, "log_every": 5, "save_every": 9, "precision": "float32"} | config
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=1, clip_norm=0.01, eps=1e-4)
    return Trainer(
        TrainerConfig(**settings, ema_decay=0.5),
        task,
        stream or own_stream,
        dict.fromkeys(("model", "generator", "critic"), optimizer),
        folder,
        torch.device("cpu"),
        {"kind": kind},
        Listener(),
    )


def train(folder: Path, kind: str, config: dict[str, Any] | None = None) -> Trained:
    """Run to the end."""
    trainer = make_trainer(folder, kind, **(config or {}))
    result = trainer.run()
    return Trained(whole(trainer), result.figures, result.samples_seen)


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that is trained, gathered."""
    state = trainer._state
    tensors = {
        f"{name}.{key}": tensor
        for name, module in state.modules.items()
        for key, tensor in module.state_dict().items()
    }
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.tensors().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in state.stepper.tensors().items()}
    return dict(zip(sorted(tensors), whole_tensors_by_name(tensors), strict=True))


def whole_tensors_by_name(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        yield (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
