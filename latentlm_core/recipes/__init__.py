"""Recipes: names for whole runs. Recipe, then file, then ``--set``: changes go one way only."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentlm_core.config import C, build, override, read_config_file
from latentlm_core.errors import ConfigError, did_you_mean
from latentlm_core.recipes.presets import LM_RECIPES, VAE_RECIPES
from latentlm_core.recipes.schema import LMRecipe, VAERecipe

__all__ = [
    "LMRecipe",
    "VAERecipe",
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


def vae_recipe_names() -> tuple[str, ...]:
    """Names that ``vae_recipe`` knows."""
    return tuple(VAE_RECIPES)


def lm_recipe_names() -> tuple[str, ...]:
    """Names that ``lm_recipe`` knows."""
    return tuple(LM_RECIPES)


def _resolve(kind: type[C], named: Mapping[str, C], name: str, overrides: Sequence[str]) -> C:
    if Path(name).suffix in (".toml", ".json"):
        changes = read_config_file(Path(name))
        base = changes.pop("recipe", None)
        data = _merge(_named(named, base).to_dict(), changes) if base else changes
    else:
        data = _named(named, name).to_dict()
    return build(kind, override(data, overrides), f"recipe {name}")


def _named(named: Mapping[str, C], name: str) -> C:
    if name not in named:
        raise ConfigError(
            f"There is no recipe {name!r}. {did_you_mean(name, named)}",
            hint="A file is given by its path, ending in .toml or .json.",
        )
    return named[name]


def _merge(base: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        nested = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged
