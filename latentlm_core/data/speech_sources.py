"""Names of sets of recordings, and what they open.

    hibari                  sentences read by the hibari-tts package (extra `demo`)
    spoken-digits[:PATH]    a folder of train-*.parquet and test-*.parquet
    digit-strings[:PATH]    strings of 3 to 7 digits, composed of the takes of spoken-digits
    librispeech[:PATH], libritts[:PATH], ljspeech[:PATH]
                            as their archives unpack: a folder of parts, or one part (test-clean)
    folder:PATH or PATH     audio files with their transcripts beside them or in metadata.csv,
                            .tsv or .jsonl, one folder a speaker or flat; or parquet files
    PATH.csv, .tsv, .jsonl  a table of paths, texts and speakers
    hf:ORG/NAME[:SPLIT]     any audio set that the `datasets` library loads
    stream:hf:ORG/NAME[:SPLIT], stream:FOLDER, stream:URL
                            read while it is used, as ``streamed_tables`` lists

Without PATH a set lies in $LATENTLM_NAME (LATENTLM_SPOKEN_DIGITS, say), else in ./data/NAME.
Every set has `train`; `test` is the part that is held out, under whatever name it has there.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from latentlm_core.data.base import SpeechSource
from latentlm_core.data.columns import find_parquet
from latentlm_core.data.digit_strings import DigitStringSource
from latentlm_core.data.sources import (
    IMAGE_SETS,
    SPEECH_FOLDERS,
    SPEECH_SETS,
    SPLITS,
    hold_out,
)
from latentlm_core.data.speech_columns import (
    SpeechColumnSource,
    open_speech_hub,
    open_speech_parquet,
)
from latentlm_core.data.speech_folders import open_speech_folder, open_speech_table
from latentlm_core.data.streamed_tables import open_streamed_table
from latentlm_core.data.synthetic_speech import HibariSource
from latentlm_core.errors import DataError, did_you_mean

NAMES = (*SPEECH_SETS, "folder:PATH", "hf:ORG/NAME", "stream:hf:ORG/NAME", "stream:FOLDER")


def open_speech(spec: str, split: str = "train") -> SpeechSource:
    """Open a set of recordings.

    Args:
        spec: a name, a prefixed path or an existing path, as this module's text lists them.
        split: `train` or `test`.

    Raises:
        DataError: unknown name, nothing there, no such split, or not readable.
        MissingExtraError: the name needs a package that is not installed.
    """
    source = _open(spec, split)
    if source is None:
        (other,) = (known for known in SPLITS if known != split)
        raise DataError(f"{spec} has no split {split!r}.", hint=f"Take the other: --split {other}")
    if not len(source):
        raise DataError(f"{spec} has no recordings in its split {split!r}.")
    return source


def open_speech_with_held_out(spec: str) -> tuple[SpeechSource, SpeechSource]:
    """Open `train` and `test`; where there is no `test`, hold some of `train` out.

    Raises:
        DataError: as ``open_speech``.
    """
    train, test = open_speech(spec), _open(spec, "test")
    return (train, test) if test is not None and len(test) else hold_out(train)


def pair_reference(source_speakers: Sequence[int | None]) -> list[int]:
    """For each recording the one that lends its voice: its speaker's previous one, cyclic.

    The rule of VALL-E 2 for a reference utterance: the first of a speaker has the last. A speaker's
    only recording is its own reference; those of unknown speakers count as one speaker's.

    Args:
        source_speakers: the speaker of each recording, in order.

    Returns:
        An index for each recording.
    """
    places = defaultdict(list)
    for place, speaker in enumerate(source_speakers):
        places[speaker].append(place)
    paired = [0] * len(source_speakers)
    for of_one in places.values():
        for place, reference in zip(of_one, [of_one[-1], *of_one[:-1]], strict=True):
            paired[place] = reference
    return paired


def _open(spec: str, split: str) -> SpeechSource | None:
    """None where the set is there but has no such split."""
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}. {did_you_mean(split, SPLITS)}")
    name, _, rest = spec.partition(":")
    match name, rest:
        case "hibari", "":
            return HibariSource(split)
        case "digit-strings", _:
            takes = _open_named("spoken-digits", rest, split)
            return None if takes is None else DigitStringSource(takes, split)
        case "folder", path if path:
            return _open_folder(Path(path), spec, split)
        case "hf", _:
            return open_speech_hub(rest, split, spec)
        case "stream", _:
            table = open_streamed_table(spec, split)
            return None if table is None else SpeechColumnSource(table, spec)
    if name in SPEECH_FOLDERS:
        return _open_named(name, rest, split)
    if name in IMAGE_SETS:
        raise DataError(
            f"{spec} is a set of images, and recordings are wanted here.",
            hint="Images go with recipes and tokenizers of images.",
        )
    if os.path.isdir(spec):
        return _open_folder(Path(spec), spec, split)
    if spec.endswith((".csv", ".tsv", ".jsonl")) and os.path.isfile(spec):
        return open_speech_table(Path(spec), spec) if split == "train" else None
    if os.sep in spec or spec.startswith((".", "~")):
        raise DataError(f"There is no folder of recordings, and no table of them, {spec}.")
    raise DataError(f"There is no set of recordings {spec!r}. {did_you_mean(spec, NAMES)}")


def _open_named(name: str, given: str, split: str) -> SpeechSource | None:
    variable = f"LATENTLM_{name.upper().replace('-', '_')}"
    root = Path(given or os.environ.get(variable) or Path("data", name))
    if not os.path.isdir(root):
        raise DataError(
            f"{name}: there is no folder {root}.",
            hint=f"Name its folder: --data {name}:PATH, or the environment's {variable}.",
        )
    return _open_folder(root, name, split)


def _open_folder(root: Path, name: str, split: str) -> SpeechSource | None:
    if not os.path.isdir(root):
        raise DataError(f"There is no folder {root}.")
    if any(root.glob("*.parquet")):
        paths = find_parquet(root, split)
        return open_speech_parquet(paths, name) if paths else None
    return open_speech_folder(root, name, split)
