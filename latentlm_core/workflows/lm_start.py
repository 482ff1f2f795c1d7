"""A recipe that begins with a language model that exists."""

from collections.abc import Sequence

from latentlm_core.data.mixture import MultimodalDataConfig
from latentlm_core.errors import ConfigError
from latentlm_core.models.latent_lm import LatentLMSize
from latentlm_core.pretrained import PretrainedBackbone
from latentlm_core.progress import Progress
from latentlm_core.recipes import LMRecipe
from latentlm_core.tokenizers.text import TextConfig

REPLACED = ("model.backbone", "data.text")
"""Parts of the recipe whose place the language model's take."""


def begin_with(
    start: PretrainedBackbone, recipe: LMRecipe, overrides: Sequence[str], progress: Progress
) -> LMRecipe:
    """The recipe with the sizes and the text tokenizer of a language model.

    Raises:
        ConfigError: the recipe is of no text, or the user changed what is replaced.
    """
    if not isinstance(recipe.data, MultimodalDataConfig) or not isinstance(
        recipe.model, LatentLMSize
    ):
        raise ConfigError(
            "--init begins with a language model, and this recipe is not of text and images.",
            hint="Name one that is, such as --recipe multimodal-1.3b.",
        )
    changed = [each for each in overrides if each.startswith(REPLACED)]
    if changed:
        raise ConfigError(f"--init decides {' and '.join(REPLACED)}, so --set {changed[0]} cannot.")
    if recipe.data.row_length > start.context_length:
        progress.warn(
            f"Rows of {recipe.data.row_length} are longer than what the language model has seen, "
            f"{start.context_length} positions."
        )
    text = TextConfig(kind="library", source=str(start.folder))
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"backbone": start.config}),
            "data": recipe.data.model_copy(update={"text": text}),
        }
    )
