"""Recipes: names for whole runs. Recipe, then file, then ``--set``: changes go one way only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentlm_core.config import C, build, override, read_config_file
from latentlm_core.errors import ConfigError, did_you_mean
from latentlm_core.recipes.distill import DISTILL_RECIPES
from latentlm_core.recipes.presets import LM_RECIPES, VAE_RECIPES
from latentlm_core.recipes.schema import DistillRecipe, LMRecipe, VAERecipe

__all__ = [
    "DistillRecipe",
    "LMRecipe",
    "VAERecipe",
    "distill_recipe",
    "distill_recipe_names",
    "lm_recipe",
    "lm_recipe_names",
    "vae_recipe",
    "vae_recipe_names",
]


def vae_recipe(name: str, overrides: Sequence[str] = ()) -> VAERecipe:
    """The recipe of a name, or of a TOML or JSON file, with ``KEY=VALUE`` changes applied.

    A file may say ``recipe = "NAME"`` and hold the differences from that recipe alone.

    Raises:
        ConfigError: naming every problem.
    """
    return _resolve(VAERecipe, VAE_RECIPES, name, overrides)


def lm_recipe(name: str, overrides: Sequence[str] = ()) -> LMRecipe:
    """As ``vae_recipe``, for ``train-lm``."""
    return _resolve(LMRecipe, LM_RECIPES, name, overrides)


def distill_recipe(
    name: str, data: Mapping[str, Any], overrides: Sequence[str] = ()
) -> DistillRecipe:
    """As ``vae_recipe``, for ``train-lm --distill``.

    Args:
        name: of a recipe or a file.
        data: how batches are made, where the recipe does not say it.
        overrides: ``KEY=VALUE`` changes.

    Raises:
        ConfigError: naming every problem.
    """
    plain = _plain(DISTILL_RECIPES, name)
    changes = plain.get("data")
    plain["data"] = _merge(data, changes) if isinstance(changes, dict) else dict(data)
    return build(DistillRecipe, override(plain, overrides), f"recipe {name}")


def vae_recipe_names() -> tuple[str, ...]:
    """Names that ``vae_recipe`` knows."""
    return tuple(VAE_RECIPES)


def lm_recipe_names() -> tuple[str, ...]:
    """Names that ``lm_recipe`` knows."""
    return tuple(LM_RECIPES)


def distill_recipe_names() -> tuple[str, ...]:
    """Names that ``distill_recipe`` knows."""
    return tuple(DISTILL_RECIPES)


def _resolve(kind: type[C], named: Mapping[str, C], name: str, overrides: Sequence[str]) -> C:
    return build(kind, override(_plain(named, name), overrides), f"recipe {name}")


def _plain(named: Mapping[str, C], name: str) -> dict[str, Any]:
    """The values of a named recipe or of a file."""
    if Path(name).suffix not in (".toml", ".json"):
        return _named(named, name).to_dict()
    changes = read_config_file(Path(name))
    base = changes.pop("recipe", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{name}: recipe is the name of a recipe, not {base!r}.")
    return _merge(_named(named, base).to_dict(), changes) if base else changes


def _named(named: Mapping[str, C], name: str) -> C:
    if name not in named:
        raise ConfigError(
            f"There is no recipe {name!r}. {did_you_mean(name, named)}",
            hint="A file is given by its path, ending in .toml or .json.",
        )
    return named[name]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        nested = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged
