"""Recipes of ``train-lm --distill``: how long and how a head learns from its teacher.

One is named like the teacher's own recipe, or it is ``few-step``.
"""

from collections.abc import Mapping

from latentlm_core.recipes.schema import DistillRecipe
from latentlm_core.training.distill_task import DistillConfig
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.trainer_config import TrainerConfig

DISTILL_RECIPES: Mapping[str, DistillRecipe] = {
    "few-step": DistillRecipe(
        trainer=TrainerConfig(total_steps=20_000, save_every=1000, log_every=100, ema_decay=0.999),
        optimizer=OptimizerConfig(lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0),
    ),
    "mnist": DistillRecipe(
        distill=DistillConfig(trajectories=1),
        trainer=TrainerConfig(
            total_steps=200, save_every=100, validate_every=100, log_every=10, ema_decay=0.99
        ),
        optimizer=OptimizerConfig(lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=20),
    ),
    "tiny": DistillRecipe(
        distill=DistillConfig(trajectories=1, teacher_steps=12),
        trainer=TrainerConfig(total_steps=100, save_every=50, log_every=20, ema_decay=0.97),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0, warmup_steps=10),
    ),
}
