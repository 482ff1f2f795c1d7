"""What is asked of a generator, held against its ``config.json`` before its weights are read.

Notable choices: weights are bfloat16 on a GPU that has it built in, for small batches wait for them
to be read, and float32 elsewhere; the state of the solver is float32 in any case. How the decode
step runs changes no latent by more than rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from latentlm_core.artifacts import LoadedGenerator, load_generator
from latentlm_core.config import build
from latentlm_core.diffusion import Solver
from latentlm_core.errors import ConfigError
from latentlm_core.export_config import GeneratorExport, read_config
from latentlm_core.models.dit import DiTConfig
from latentlm_core.models.latent_lm import LatentLMConfig
from latentlm_core.models.transfusion import TransfusionConfig
from latentlm_core.processes import current
from latentlm_core.progress import Progress
from latentlm_core.runtime import has_bfloat16, resolve_device
from latentlm_core.sampling import SamplerConfig
from latentlm_core.sampling.base import require_fitting
from latentlm_core.workflows.workspace import find_export, run_name_of

SampleMode = Literal["auto", "eager", "compile", "graph"]
"""How the decode step runs."""
SampleDtype = Literal["auto", "float32", "bfloat16"]
"""Of the weights."""
PREPARED = ("compile", "graph")
"""Modes in which the decode step is made ready before it runs."""
ModelConfig = LatentLMConfig | TransfusionConfig | DiTConfig
NETWORKS = {"latent-lm": "A LatentLM", "transfusion": "A Transfusion", "dit": "A DiT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a user wants samples to be drawn; None leaves a setting to the model.

    Attributes:
        guidance_scale: see ``SamplerConfig``, as for the next four.
        guidance_schedule: linear or constant.
        guidance_interval: where guidance acts.
        num_inference_steps: solver steps per latent.
        solver: dpmsolver++, ddpm or few-step.
        mode: how the decode step runs.
        dtype: of the weights.
    """

    guidance_scale: float | None = None
    guidance_schedule: Literal["constant", "linear"] | None = None
    guidance_interval: tuple[float, float] | None = None
    num_inference_steps: int | None = None
    solver: Solver | None = None
    mode: SampleMode = "auto"
    dtype: SampleDtype = "auto"

    def sampler(self, default: SamplerConfig) -> SamplerConfig:
        """A model's own settings with these in their place.

        Raises:
            ConfigError: a setting is out of range.
        """
        names = SamplerConfig.model_fields
        asked = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in asked.items() if value is not None}
        return build(SamplerConfig, default.to_dict() | given, "sampling")


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """A generator, and how it is to draw.

    Attributes:
        model: as the user named it, None for the newest.
        export: its folder.
        config: its ``config.json``.
        sampler: how latents are drawn.
        mode: how the decode step runs.
        device: where.
        dtype: of the weights.
    """

    model: str | None
    export: Path
    config: GeneratorExport
    sampler: SamplerConfig
    mode: SampleMode
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model: str | None,
        require: Callable[[GeneratorExport, Path], None],
        asked: Asked,
        device: str,
        progress: Progress,
    ) -> Self:
        """A plan that can be carried out, as far as can be told without the weights.

        Args:
            model: run, export or hub id of a generator; by default the newest.
            require: refuses models of another kind.
            asked: by the user.
            device: auto, cpu, cuda, ...
            progress: listener.

        Raises:
            ConfigError: what is asked cannot be, or an option would do nothing.
            ArtifactError: there is no such generator, or it is of another kind.
        """
        where = resolve_device(device)
        dtype = weight_dtype(asked.dtype, where)
        require_mode(asked.mode, where)
        with current().main_first():
            export = find_export(model, "generator", progress)
        config = read_config(export, GeneratorExport)
        require(config, export)
        require_decode_step(config.model, asked.mode)
        plan = cls(model, export, config, config.sampler, asked.mode, where, dtype)
        return plan.at(asked)

    def at(self, asked: Asked) -> Self:
        """The same with other settings of the sampler.

        Raises:
            ConfigError: one is out of range, not for this network, or would do nothing.
        """
        sampler = asked.sampler(self.config.sampler)
        _require_settings(self.config.model, asked, sampler)
        return replace(self, sampler=sampler)

    @property
    def dtype_name(self) -> str:
        """``float32`` or ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_branches(self) -> int:
        """Rows of a sample: with guidance an unconditional one beside its own."""
        return 2 if self.sampler.is_guided else 1

    @property
    def settings(self) -> dict[str, Any]:
        """What a folder of samples keeps of it, as JSON values."""
        return {"dtype": self.dtype_name, "mode": self.mode, "sampler": self.sampler.to_dict()}

    @property
    def figures(self) -> dict[str, Any]:
        """What of it a person wants to know."""
        return {
            "model": str(self.export),
            "guidance_scale": self.sampler.guidance_scale,
            "steps": self.sampler.num_inference_steps,
            "dtype": self.dtype_name,
        }

    @property
    def words(self) -> list[str]:
        """What a folder's name says of it, where it is not as usual."""
        usual, sampler = SamplerConfig(), self.sampler
        interval = sampler.guidance_interval
        schedule = sampler.guidance_schedule
        return [
            f"cfg{sampler.guidance_scale:g}",
            schedule if schedule != usual.guidance_schedule else "",
            f"within{interval[0]:g}-{interval[1]:g}" if interval else "",
            f"steps{sampler.num_inference_steps}",
            sampler.solver if sampler.solver != usual.solver else "",
            self.dtype_name if self.dtype != torch.float32 else "",
        ]

    @property
    def run_name(self) -> str:
        """The run's name, or how the user named a model from elsewhere."""
        return run_name_of(self.model, self.export)

    def load(self) -> LoadedGenerator:
        """The generator with its weights, which become what they are to be on the host.

        Raises:
            ArtifactError: they do not fit.
            CorruptFileError: a file is damaged.
        """
        loaded = load_generator(self.export, torch.device("cpu"))
        return replace(loaded, model=loaded.model.to(self.dtype).to(self.device))


def require_classes(config: GeneratorExport, _: Path) -> None:
    """Refuse a model that is not class-conditional.

    Raises:
        ArtifactError: saying what it is, and what it takes.
    """
    config.require_classes()


def weight_dtype(asked: SampleDtype, device: torch.device) -> torch.dtype:
    """What the dtype of weights is.

    Raises:
        ConfigError: the device cannot multiply it.
    """
    is_able = has_bfloat16(device)
    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" and is_able else torch.float32
    if asked == "bfloat16" and not is_able and device.type != "cpu":  # which imitates it
        raise ConfigError(f"--dtype bfloat16 is not built into {device}: say --dtype float32.")
    return getattr(torch, asked)  # type: ignore[no-any-return]


def require_mode(mode: SampleMode, device: torch.device) -> None:
    """Refuse a mode that this machine cannot have.

    Raises:
        ConfigError: saying why.
    """
    if mode == "graph" and device.type != "cuda":
        raise ConfigError(f"--mode graph captures a CUDA graph, and the device is {device}.")


def require_decode_step(network: ModelConfig, mode: SampleMode) -> None:
    """Refuse to prepare the decode step of a network that has none.

    Raises:
        ConfigError: saying so.
    """
    if mode in PREPARED and not isinstance(network, LatentLMConfig):
        raise ConfigError(
            f"{NETWORKS[network.kind]} has no decode step, so there is no --mode {mode} of it."
        )


def _require_settings(network: ModelConfig, asked: Asked, sampler: SamplerConfig) -> None:
    """Refuse settings that the network does not have, or that would do nothing."""
    if isinstance(network, LatentLMConfig):
        require_fitting(sampler, network.few_step)
    else:
        require_fitting(sampler, None)
        sampler.require_constant_guidance(f"{NETWORKS[network.kind]} draws all positions together")
        sampler.require_guidance_throughout(NETWORKS[network.kind])
    given = {
        "--cfg-schedule linear": asked.guidance_schedule == "linear",
        "--guidance-interval": asked.guidance_interval is not None,
    }
    for option, is_given in given.items():
        if is_given and sampler.guidance_scale == 1.0:
            raise ConfigError(
                f"{option} shapes guidance, and with a scale of 1 there is none: say --cfg SCALE."
            )
