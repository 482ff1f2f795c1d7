"""``latentlm sample --text``: a text-to-speech model => speech.

A sample is decided by (seed, its index), its text and its voice: it is the same whatever the batch
size, streamed or not, up to the rounding of kernels. A folder remembers its settings, so the same
command goes on where it was interrupted and another one is refused.

Lines go to the engine in groups of several batches: a line that has ended leaves its place in the
batch to the next one, and is written at once. Several processes take the groups in turn; a stream
is the main one's.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latentlm_core.data.audio import WavStream
from latentlm_core.data.base import Clip
from latentlm_core.diffusion import Solver
from latentlm_core.errors import ConfigError
from latentlm_core.processes import PATIENCE, Processes, current, joined
from latentlm_core.progress import SILENT, Bar, Progress
from latentlm_core.result import Result
from latentlm_core.sampling import SpanEngine
from latentlm_core.workflows.lines import Protocol, ProtocolLines, TextLines, read_voice
from latentlm_core.workflows.memory import Fitting, cache_bytes
from latentlm_core.workflows.sampling_plan import Asked, SampleDtype, SampleMode, SamplingPlan
from latentlm_core.workflows.speaking import Line, Speaking, Spoken, require_speech
from latentlm_core.workflows.spoken_folder import SpokenFolder
from latentlm_core.workflows.workspace import slug, workspace

MAX_NAME = 40
"""Characters of texts in a folder's name."""
GROUP = 4
"""Batches of lines that an engine is given at once: fewer shares for several processes, but only
while the last batch of a group runs out are places in it empty."""


@joined(PATIENCE)
def speak(
    *,
    texts: Sequence[str] = (),
    voice: Path | None = None,
    voice_text: str | None = None,
    protocol: Protocol | None = None,
    data: str | None = None,
    split: str | None = None,
    seconds: tuple[float, float] | None = None,
    num_samples: int | None = None,
    stream: bool = False,
    model: str | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    num_inference_steps: int | None = None,
    solver: Solver | None = None,
    mode: SampleMode = "auto",
    dtype: SampleDtype = "auto",
    out: Path | None = None,
    batch_size: int = 64,
    vae: str | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Say texts, or the texts of a data set.

    Args:
        texts: what to say, each ``num_samples`` times (once by default).
        voice: recording of the speaker; without one the voice is whatever comes.
        voice_text: its transcript; by default that of a .txt beside it, else none.
        protocol: instead of texts: say what ``data`` says, with the voices of this protocol.
        data: of the protocol: a data set of speech with speakers and transcripts.
        split: of the data; by default ``test``.
        seconds: shortest and longest utterance of the data that is taken.
        num_samples: of each text, or of the data's utterances (all by default).
        stream: write the audio while it is made, and tell how soon and how fast; one sample only.
        model: run, export or hub id of a text-to-speech model; by default the newest.
        seed: of the whole; each sample's own seed follows from it and the sample's index.
        guidance_scale: 1 is off; by default the model's own, as with the next three.
        guidance_interval: shares of the last timestep between which guidance acts.
        num_inference_steps: solver steps per latent.
        solver: dpmsolver++ or ddpm.
        mode: how the decode step runs.
        dtype: of the weights; by default bfloat16 on a GPU that has it built in, else float32.
        out: folder; by default ``samples/`` and a name made of these settings.
        batch_size: samples drawn at once, or fewer if so many do not fit into memory.
        vae: another tokenizer with the same weights than the one in the model's export.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        what was said, how it ended, and where it is.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    _check_usage(texts, voice, voice_text, protocol, data, split, seconds)
    _check_stream(stream, len(texts) * (num_samples or 1) if protocol is None else num_samples)
    split = split or "test"
    processes = current()
    asked = Asked(
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        num_inference_steps=num_inference_steps,
        solver=solver,
        mode=mode,
        dtype=dtype,
    )
    plan = SamplingPlan.of(model, require_speech, asked, device, progress)
    loaded = plan.load()
    with processes.main_first():
        speaking = Speaking.of(loaded, vae, plan.device, progress)
    heard = None if voice is None else speaking.fit(read_voice(voice, voice_text), progress)
    if heard is not None and not loaded.config.classes:
        progress.warn("The model learned from data without speakers, so it follows no voice.")
    lines: Sequence[Line]
    if protocol is None or data is None:
        lines = TextLines(texts, len(texts) * (num_samples or 1), heard)
        for index in range(len(texts)):
            speaking.check(lines[index])
    else:
        limits = speaking.voice_limits
        lines = ProtocolLines(data, split, protocol, seconds, num_samples, limits, progress)
    settings = {
        "model_sha256": loaded.sha256,
        "texts": list(texts),
        "voice": heard and _fingerprint(heard),
        "protocol": protocol,
        "data": data and {"data": data, "split": split, "seconds": seconds and list(seconds)},
        "num_samples": protocol and num_samples,
        "seed": seed,
        **plan.settings,
    }
    parts = [
        plan.run_name,
        protocol or _short_name(texts),
        slug(data) if data else "",
        split if data and split != "test" else "",
        f"{seconds[0]:g}-{seconds[1]:g}s" if seconds else "",
        f"n{num_samples}" if protocol and num_samples else "",
        f"voice-{slug(voice.stem)}" if voice else "",
        *plan.words,
        f"seed{seed}",
    ]
    name = "-".join(part for part in parts if part)
    folder = SpokenFolder(out or workspace() / "samples" / name, settings, speaking.sample_rate)
    figures: dict[str, Any] = {"samples": len(lines), **plan.figures, "seed": seed}
    files = {"samples": str(folder.path)}
    if dry_run:
        return Result("Plan of speech", figures, files, settings)
    with folder.held(processes):
        fitting = Fitting(
            lambda size: speaking.engine(plan.sampler, size, plan.mode, len(lines), progress),
            min(batch_size, len(lines)),
            plan.num_branches * cache_bytes(speaking.model, speaking.bounds.longest),
            plan.device,
            progress,
        )
        if stream:
            figures |= processes.once(
                lambda: _stream(folder, speaking, fitting.engine, lines[0], seed, progress)
            )
        else:
            figures |= _say_missing(
                folder, speaking, fitting, lines, seed, batch_size, processes, progress
            )
        processes.once(folder.settle)
        figures |= processes.once(lambda: _endings(folder, len(lines)))
        files["spectrograms"] = str(processes.once(lambda: folder.draw(len(lines))))
    figures["mode"] = fitting.engine.mode
    return Result("Speech made", figures, files, settings)


def _say_missing(
    folder: SpokenFolder,
    speaking: Speaking,
    fitting: Fitting[SpanEngine],
    lines: Sequence[Line],
    seed: int,
    batch_size: int,
    processes: Processes,
    progress: Progress,
) -> dict[str, Any]:
    """Say what is not there yet, group by group; of several processes each its own groups."""
    spent = made = 0.0
    size = GROUP * batch_size
    with folder.unmade(len(lines), size, processes, progress, "speaking") as (groups, bar):
        for group in groups:
            wanted = {
                index: _ready(speaking, lines[index], progress) for index in sorted(group.missing)
            }
            begun = time.perf_counter()
            made += _say_group(folder, speaking, fitting, wanted, seed, bar)
            spent += time.perf_counter() - begun
    times, seconds = zip(*processes.gather((spent, made)), strict=True)
    return {"real_time_factor": round(max(times) / sum(seconds), 3)} if any(seconds) else {}


def _say_group(
    folder: SpokenFolder,
    speaking: Speaking,
    fitting: Fitting[SpanEngine],
    wanted: dict[int, Line],
    seed: int,
    bar: Bar,
) -> float:
    """Say lines, by the index of each, and write each as it ends; seconds of speech."""
    seconds: list[float] = []

    def say(engine: SpanEngine, size: int) -> None:
        indices = list(wanted)

        def keep(place: int, spoken: Spoken) -> None:
            index = indices[place]
            folder.add(index, wanted.pop(index), spoken)
            seconds.append(len(spoken.audio) / speaking.sample_rate)
            bar.advance()

        speaking.say(engine, list(wanted.values()), indices, seed, keep)

    fitting.run(say)
    return sum(seconds)


def _stream(
    folder: SpokenFolder,
    speaking: Speaking,
    engine: SpanEngine,
    line: Line,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Say one line into a file that can be played while it grows."""
    line = _ready(speaking, line, progress)
    folder.forget(0)
    first: list[float] = []
    begun = time.perf_counter()
    with WavStream(folder.file(0), speaking.sample_rate) as file:

        def write(audio: Tensor) -> None:
            first.append(time.perf_counter() - begun)
            file.write(audio.numpy())

        said: list[Spoken] = []
        speaking.say(engine, [line], [0], seed, lambda _, spoken: said.append(spoken), write)
    spent = time.perf_counter() - begun
    (spoken,) = said
    folder.add(0, line, spoken)
    seconds = len(spoken.audio) / speaking.sample_rate
    return {
        "first_audio_seconds": round(first[0], 4),
        "real_time_factor": round(spent / seconds, 3),
        "seconds": round(seconds, 3),
    }


def _ready(speaking: Speaking, line: Line, progress: Progress) -> Line:
    """A line that can be said, its voice of a length that the model knows."""
    speaking.check(line)
    return line if line.voice is None else replace(line, voice=speaking.fit(line.voice, progress))


def _endings(folder: SpokenFolder, count: int) -> dict[str, Any]:
    """How the samples ended, how many did so, and the longest silence in any."""
    found = folder.rows()
    rows = [found[index] for index in range(count)]
    endings = Counter(f"ended_by_{row['ended_by']}" for row in rows)
    return {**endings, "longest_silence": max(row["longest_silence"] for row in rows)}


def _check_usage(
    texts: Sequence[str],
    voice: Path | None,
    voice_text: str | None,
    protocol: Protocol | None,
    data: str | None,
    split: str | None,
    seconds: tuple[float, float] | None,
) -> None:
    """Refuse settings of which one would be ignored."""
    if protocol is not None:
        if data is None:
            raise ConfigError(f"The protocol {protocol} needs --data, a data set of speech.")
        if texts or voice or voice_text is not None:
            raise ConfigError(
                f"The protocol {protocol} takes its texts and voices from --data alone."
            )
    elif not texts:
        raise ConfigError("There is nothing to say: name a --text, or a --protocol and its --data.")
    elif data is not None or split is not None or seconds is not None:
        raise ConfigError(
            "--data, --split and --seconds belong to a --protocol, and there is none."
        )
    elif voice_text is not None and voice is None:
        raise ConfigError("--voice-text is what the recording --voice says, and there is none.")


def _check_stream(stream: bool, count: int | None) -> None:
    """Refuse to stream several samples, or as many as ``data`` has."""
    if stream and count != 1:
        asked = "all of a data set" if count is None else str(count)
        raise ConfigError(f"--stream writes one sample, and these settings ask for {asked}.")


def _short_name(texts: Sequence[str]) -> str:
    """Texts as a part of a folder's name."""
    name = slug("-".join(texts).replace("/", "-"))
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _fingerprint(voice: Clip) -> dict[str, Any]:
    digest = hashlib.sha256(voice.samples.tobytes()).hexdigest()
    return {"sha256": digest, "sample_rate": voice.sample_rate, "text": voice.text}
