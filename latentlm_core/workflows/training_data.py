"""The data of ``latentlm train-lm``: one latent set, or a mix of sets and texts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Self

from latentlm_core.data.document_format import DocumentFormat
from latentlm_core.data.manifest import LatentSums
from latentlm_core.data.mix_documents import FilePart, read_documents
from latentlm_core.data.mix_parts import (
    CaptionedImages,
    ComposedPart,
    PairPart,
    Part,
    TextPart,
)
from latentlm_core.data.mixture import Mixture, MultimodalDataConfig, PartSpec, is_mix, parse_mix
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.streamed_tables import STREAM
from latentlm_core.data.texts import EndlessTexts, open_endless_texts
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.progress import Progress
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.text import TextTokenizer, make_tokenizer
from latentlm_core.workflows.workspace import find_latents

MAX_CORPUS = 1 << 22
"""Characters of a set that a text tokenizer is trained on, about."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        parts: of the mix, a latent set named by its folder; one of weight 1 where it is a single
            latent set.
        sets: the latent sets, by those folders; ``stream:`` stands before one that is read shard by
            shard.
        is_mix: whether the user wrote a mix.
    """

    parts: tuple[PartSpec, ...]
    sets: dict[str, LatentSet]
    is_mix: bool

    @classmethod
    def open(cls, spec: str | None, verify: bool, progress: Progress) -> Self:
        """Open what ``--data`` names.

        Raises:
            ArtifactError: a latent set is not there.
            ConfigError: the mix is not well formed.
            DataError: the sets were made by different tokenizers.
        """
        if spec is None or not is_mix(spec):
            source = _find(spec, progress)
            only = PartSpec("pairs", source, None, 1.0)
            return cls((only,), {source: _open(source, verify)}, False)
        parts = tuple(_located(part, progress) for part in parse_mix(spec))
        folders = dict.fromkeys(part.source for part in parts if part.kind != "text")
        sets = {folder: _open(folder, verify) for folder in folders}
        _check_alike(sets)
        return cls(parts, sets, True)

    @property
    def latents(self) -> LatentSet | None:
        """The first latent set; None of texts alone."""
        return next(iter(self.sets.values()), None)

    @property
    def single(self) -> LatentSet:
        """The latent set of data that is no mix.

        Raises:
            ConfigError: it is a mix.
        """
        if self.is_mix or self.latents is None:
            raise ConfigError(
                "This recipe learns from one latent set, and --data names a mix.",
                hint="Recipes of text and images learn from a mix, such as coloured-digits.",
            )
        return self.latents

    @property
    def name(self) -> str:
        """What runs are called after."""
        if self.latents is not None:
            return self.latents.manifest.name
        return Path(self.parts[0].source).stem

    @property
    def source(self) -> str:
        """The data set behind it, as ``open_source`` takes it, or the text's."""
        if self.latents is not None:
            return self.latents.manifest.data
        return f"text:{self.parts[0].source}"


class OpenedMix:
    """The sets and texts of a mix, opened, and the batches that they make.

    Args:
        data: the mix.
        config: how batches are made.
        seed: of the run.

    Raises:
        DataError: latents differ in length, or texts cannot be read.
    """

    def __init__(self, data: TrainingData, config: MultimodalDataConfig, seed: int) -> None:
        self._data, self._config, self._seed = data, config, seed
        self.stats = _stats(data, config.per_channel_stats)
        self._captioned_sets = {
            name: CaptionedImages(latents, self.stats) for name, latents in data.sets.items()
        }
        self._texts: dict[str, EndlessTexts] = {
            part.source: open_endless_texts(part.source, seed, config.held_out)
            for part in data.parts
            if part.kind == "text"
        }
        self.text: TextTokenizer = make_tokenizer(config.text, self._corpus())

    def mixture(self, latent_channels: int) -> Mixture:
        """The batches."""
        document_format = DocumentFormat(self.text, latent_channels)
        return Mixture(
            [self._part(spec, document_format) for spec in self._data.parts],
            [spec.weight for spec in self._data.parts],
            self.stats,
            self._config,
            self._seed,
        )

    def _part(self, spec: PartSpec, document_format: DocumentFormat) -> Part:
        config, seed = self._config, self._seed
        if spec.kind == "text":
            return TextPart(self._texts[spec.source], document_format, config.row_length)
        captioned = self._captioned_sets[spec.source]
        if spec.documents is not None:
            rows = read_documents(Path(spec.documents), captioned.latents)
            return FilePart(spec.documents, rows, captioned, document_format, config.held_out, seed)
        if spec.kind == "interleaved":
            return ComposedPart(
                captioned, document_format, config.max_images, config.held_out, seed
            )
        return PairPart(
            captioned,
            document_format,
            config.directions,
            max_questions=config.max_questions,
            condition_drop=config.condition_drop,
            learn_leading=config.learn_leading_images,
            held_out=config.held_out,
            seed=seed,
        )

    def _corpus(self) -> Iterator[str]:
        """What a text tokenizer is trained on."""
        for captioned in self._captioned_sets.values():
            yield from _bounded(captioned.corpus())
        for texts in self._texts.values():
            yield from _bounded(_each_once(texts))


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    """The first of some texts."""
    num_characters = 0
    for text in texts:
        yield text
        num_characters += len(text)
        if num_characters >= MAX_CORPUS:
            return


def _each_once(texts: EndlessTexts) -> Iterator[str]:
    """The texts of a set until one comes again."""
    seen: set[str] = set()
    for place in count():
        text, key = texts[place]
        if key in seen:
            return
        seen.add(key)
        yield text


def _located(part: PartSpec, progress: Progress) -> PartSpec:
    """A part whose latent set has one name, however the user spelt it."""
    if part.kind == "text":
        return part
    return replace(part, source=_find(part.source, progress, resolve=True))


def _find(spec: str | None, progress: Progress, resolve: bool = False) -> str:
    """The folder of a latent set, after ``stream:`` where it is to be read shard by shard."""
    in_order = spec is not None and spec.startswith(STREAM)
    folder = find_latents(spec.removeprefix(STREAM) if spec else spec, progress)
    return (STREAM if in_order else "") + str(folder.resolve() if resolve else folder)


def _open(source: str, verify: bool) -> LatentSet:
    folder = Path(source.removeprefix(STREAM))
    return LatentSet.open(folder, verify, in_order=source.startswith(STREAM))


def _check_alike(sets: dict[str, LatentSet]) -> None:
    digests = {latents.manifest.tokenizer_sha256 for latents in sets.values()}
    if len(digests) > 1:
        raise DataError(
            f"{' and '.join(sets)} were made by different tokenizers, whose latents do not mix.",
            hint="Tokenize them all with one --vae.",
        )


def _stats(data: TrainingData, per_channel: bool) -> LatentStats:
    """Normalisation over all the sets of a mix; none where there are no latents."""
    first = data.latents
    if first is None:
        return LatentStats(shift=(0.0,), scale=(1.0,))
    manifests = [latents.manifest for latents in data.sets.values()]
    merged = LatentSums.merge((m.statistics for m in manifests), first.manifest.latent_channels)
    whole = first.manifest.model_copy(update={"statistics": merged})
    return whole.stats(first.posterior, per_channel)
