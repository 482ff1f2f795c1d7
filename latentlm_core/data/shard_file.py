"""Shards of raw posterior means: written once, read memory-mapped.

A shard of n examples holds, as safetensors:

    mean            (V, P, C)   raw latents, variant by variant, example after example
    log_variance    (V, P, C)   where the posterior is learned
    offsets         (n + 1,)    where the positions of each example begin, in each variant
    label           (n,)        -1 where there is none
    key, caption                UTF-8 bytes of all texts, one after the other, with
    key_offsets, caption_offsets    (n + 1,); an absent caption is an empty one
    questions, questions_offsets    likewise, where any example has questions: a JSON list of
                                    [question, answer] for each example, nothing for none

P is the sum of the examples' lengths: n * T where all have T positions, and then (V, P, C) folds to
(V, n, T, C) without a copy. Noise and normalisation are no part of a shard: they are applied when
a batch is made.

Axes: V variants, n examples, T latent positions of one, P of all, C latent channels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from latentlm_core import files
from latentlm_core.data.base import Question
from latentlm_core.data.manifest import LatentPlan, LatentSums, Manifest, ShardEntry, shard_name
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.tokenizers.base import PosteriorKind


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples on their way into a shard.

    Attributes:
        mean: (V, P, C) posterior means of every variant, example after example.
        log_variance: (V, P, C) where the posterior is learned, else None.
        lengths: (n,) int64, latent positions of each example.
        labels: (n,) int64.
        captions: n texts, None where there is none.
        keys: n keys.
        questions: n tuples; may be left out where no example has any.
    """

    mean: Tensor
    log_variance: Tensor | None
    lengths: Tensor
    labels: Tensor
    captions: tuple[str | None, ...]
    keys: tuple[str, ...]
    questions: tuple[tuple[Question, ...], ...] = ()

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.keys)

    @classmethod
    def join(cls, plan: LatentPlan, parts: Sequence["Encoded"]) -> "Encoded":
        """All examples of some parts (of none, too), in the order given."""
        nothing = torch.empty(len(plan.variants), 0, plan.latent_channels)
        no_numbers = torch.empty(0, dtype=torch.int64)
        learned = plan.posterior.kind is PosteriorKind.LEARNED
        variances = [part.log_variance for part in parts if part.log_variance is not None]
        return cls(
            mean=torch.cat([nothing, *(part.mean for part in parts)], dim=1),
            log_variance=torch.cat([nothing, *variances], dim=1) if learned else None,
            lengths=torch.cat([no_numbers, *(part.lengths for part in parts)]),
            labels=torch.cat([no_numbers, *(part.labels for part in parts)]),
            captions=tuple(caption for part in parts for caption in part.captions),
            keys=tuple(key for part in parts for key in part.keys),
            questions=tuple(
                asked for part in parts for asked in part.questions or ((),) * len(part)
            ),
        )


def write_shard(folder: Path, plan: LatentPlan, number: int, encoded: Encoded) -> ShardEntry:
    """Write shard ``number`` of a latent set.

    Raises:
        DataError: a latent is not finite in the plan's dtype.
        ArtifactError: the file system refused.
    """
    dtype = _DTYPES[plan.dtype]
    mean = encoded.mean.to(dtype)
    log_variance = None if encoded.log_variance is None else encoded.log_variance.to(dtype)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), encoded.lengths.cumsum(0)])
    for values in (mean, log_variance):
        _check_finite(values, offsets, encoded.keys, plan.dtype)
    key, key_offsets = _pack(encoded.keys)
    caption, caption_offsets = _pack([text or "" for text in encoded.captions])
    tensors = {
        "mean": mean,
        "offsets": offsets,
        "label": encoded.labels,
        "key": key,
        "key_offsets": key_offsets,
        "caption": caption,
        "caption_offsets": caption_offsets,
    }
    if log_variance is not None:
        tensors["log_variance"] = log_variance
    if any(encoded.questions):
        cells = [_as_json(asked) for asked in encoded.questions]
        tensors["questions"], tensors["questions_offsets"] = _pack(cells)
    path = folder / shard_name(number)
    files.write_safetensors(path, tensors)
    return ShardEntry(
        file=path.name,
        first=plan.covers(number).start,
        count=len(encoded),
        sha256=files.sha256_file(path),
        num_bytes=path.stat().st_size,
        sums=LatentSums.of(mean, log_variance),
    )


class Shard:
    """An open shard whose every tensor was checked against the manifest.

    Args:
        folder: of the latent set.
        manifest: of the latent set.
        entry: which shard of it.

    Attributes:
        count: n.
        mean: (V, P, C), a view of the file.
        log_variance: (V, P, C), a view of the file, where the posterior is learned.
        offsets: (n + 1,) int64, where each example begins among the P positions, and the end.
        labels: (n,) int64.
        keys, captions: n texts by index.
        has_captions, has_questions: whether any example has a caption, a question.

    Raises:
        CorruptFileError: the file cannot be read or is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, entry: ShardEntry) -> None:
        self.count = entry.count
        self._path = folder / entry.file
        self._tensors = self._map()
        dtype, variants = _DTYPES[manifest.dtype], len(manifest.variants)
        shape = (variants, entry.sums.count // variants, manifest.latent_channels)
        self.mean = self._take("mean", dtype, shape)
        learned = manifest.posterior.kind is PosteriorKind.LEARNED
        self.log_variance = self._take("log_variance", dtype, shape) if learned else None
        self.offsets = self._checked_offsets("offsets", shape[1])
        if (self.offsets[1:] == self.offsets[:-1]).any():
            raise CorruptFileError(f"{self._path}: an example has no latents.")
        if manifest.grid is not None and (self.offsets.diff() != manifest.num_positions).any():
            raise CorruptFileError(f"{self._path}: its offsets are not those of its grid.")
        self.labels = self._take("label", torch.int64, (self.count,))
        if ((self.labels < -1) | (self.labels >= len(manifest.classes))).any():
            raise CorruptFileError(f"{self._path}: a label is none of the classes.")
        self.keys = self._texts("key")
        self.captions = self._texts("caption")
        self.has_captions = self.captions.num_bytes > 0
        is_asked = not self._tensors.keys().isdisjoint(_QUESTION_NAMES)
        self._questions = self._texts("questions") if is_asked else None
        self.has_questions = self._questions is not None and self._questions.num_bytes > 0

    def questions(self, place: int) -> tuple[Question, ...]:
        """What may be asked of an example.

        Raises:
            CorruptFileError: it is no list of questions and answers.
        """
        if self._questions is None or not (cell := self._questions[place]):
            return ()
        try:
            return _QUESTIONS.validate_json(cell)
        except ValidationError:
            raise CorruptFileError(
                f"{self._path}: questions {place} is no list of questions and answers."
            ) from None

    def _map(self) -> dict[str, Tensor]:
        try:
            with safetensors.safe_open(self._path, "pt") as file:
                return {name: file.get_tensor(name) for name in _NAMES & set(file.keys())}
        except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CorruptFileError(f"{self._path} cannot be read ({error}).") from None

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CorruptFileError(
                f"{self._path}: {name} is {found}, not {dtype} {shape} as its manifest says."
            )
        return tensor

    def _texts(self, name: str) -> "Texts":
        content = self._tensors.get(name)
        size = 0 if content is None else content.numel()
        offsets = self._checked_offsets(f"{name}_offsets", size)
        return Texts(self._take(name, torch.uint8, (size,)), offsets, f"{self._path}: {name}")

    def _checked_offsets(self, name: str, end: int) -> Tensor:
        """(n + 1,) from 0 to ``end``, none below the one before (differences could overflow)."""
        offsets = self._take(name, torch.int64, (self.count + 1,))
        if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
            raise CorruptFileError(f"{self._path}: its {name} do not run from 0 to {end}.")
        return offsets


class Texts:
    """Texts out of one run of bytes, decoded one at a time.

    Args:
        content: all bytes.
        offsets: where each text begins, and the end.
        where: the file, for messages.

    Attributes:
        num_bytes: of all of them.
    """

    def __init__(self, content: Tensor, offsets: Tensor, where: str) -> None:
        self.num_bytes = content.numel()
        self._content = content.numpy()
        self._offsets = offsets.numpy()
        self._where = where

    def __getitem__(self, index: int) -> str:
        start, end = self._offsets[index], self._offsets[index + 1]
        try:
            return self._content[start:end].tobytes().decode()
        except UnicodeDecodeError:
            raise CorruptFileError(f"{self._where} {index} is no UTF-8.") from None


_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_QUESTION_NAMES = {"questions", "questions_offsets"}
_NAMES = {
    *("mean", "log_variance", "offsets", "label"),
    *("key", "key_offsets", "caption", "caption_offsets"),
    *_QUESTION_NAMES,
}
_QUESTIONS = TypeAdapter(tuple[Question, ...], config=ConfigDict(strict=True))


def _pack(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    parts = [text.encode("utf-8", "replace") for text in texts]
    offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    content = np.frombuffer(b"".join(parts), np.uint8).copy()
    return torch.from_numpy(content), offsets


def _as_json(questions: Sequence[Question]) -> str:
    return json.dumps(questions, ensure_ascii=False) if questions else ""


def _check_finite(values: Tensor | None, offsets: Tensor, keys: Sequence[str], dtype: str) -> None:
    if values is None or bool(values.isfinite().all()):
        return
    broken = (~values.isfinite()).any(-1).any(0).nonzero()[0]
    example = int(torch.searchsorted(offsets, broken, right=True)) - 1
    raise DataError(f"The latents of {keys[example]} are not finite as {dtype}.")
