"""Text-to-speech on strings of spoken digits: WER and SIM by frame rate, by steps, and streaming.

    python examples/digit_strings.py spoken-digits-folder [--scale small|full] [--rates 25,12.5,6.25]

For each frame rate: train a sigma-VAE, tokenize, train a LatentLM, say 200 strings of the test takes
with another string of the speaker as the prompt; measure the recordings, the reconstructions and the
samples. Then, at 12.5 Hz: WER by solver steps and guidance, streaming, and 1,000 samples for the
length bound. Every stage resumes; run it again to go on. `full` is sized for half an hour of a GPU,
`small` for two CPU cores. Figures go to results/digit-strings-SCALE.json below this folder.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from latentlm_cli.progress import listener
from latentlm_core import workflows
from latentlm_core.data.audio import read_audio
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.files import read_json, write_json
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.workflows.watch import longest_silence

RECIPES = {25.0: "speech-8k-25hz", 12.5: "speech-8k", 6.25: "speech-8k-6hz"}
FULL = {
    "vae": ["trainer.total_steps=20000", "data.batch_size=32", "trainer.ema_decay=0.999"],
    "lm": ["trainer.total_steps=12000", "data.batch_size=64", "trainer.ema_decay=0.999"],
}
SMALL: dict[str, list[str]] = {"vae": [], "lm": []}
DATA = "digit-strings"
NUM_STRINGS, NUM_ENDINGS = 200, 1000
STEPS, SCALES = (1, 2, 3, 5, 10), (1.0, 2.0, 3.0, 4.0)
MAIN_RATE = 12.5
JUDGE: dict[str, Any] = {"normalise": "spoken-digits"}


def main() -> None:
    """Run what is missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of spoken-digits parquet files")
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--rates", default="12.5,25,6.25")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    os.environ["LATENTLM_SPOKEN_DIGITS"] = str(options.data.resolve())
    changes = FULL if options.scale == "full" else SMALL
    same = {"device": options.device, "progress": listener()}
    path = Path(__file__).parent / "results" / f"digit-strings-{options.scale}.json"
    figures: dict[str, Any] = read_json(path) if path.is_file() else {}
    figures |= {"machine": machine(resolve_device(options.device)), "versions": versions()}
    for rate in map(float, options.rates.split(",")):
        figures[f"{rate:g} Hz"] = by_rate(rate, options.scale, changes, same)
        write_json(path, figures)
        if rate == MAIN_RATE:
            figures["at 12.5 Hz"] = at_main_rate(options.scale, same)
            write_json(path, figures)


def by_rate(
    rate: float, scale: str, changes: dict[str, list[str]], same: dict[str, Any]
) -> dict[str, Any]:
    """Everything at one frame rate."""
    vae_run, lm_run, latents = names(rate, scale)
    vae = workflows.train_vae(
        data=DATA, recipe=RECIPES[rate], overrides=changes["vae"], out=vae_run, **same
    )
    recon = workflows.evaluate_reconstruction(
        data=DATA, vae=str(vae_run), num_samples=NUM_STRINGS, **JUDGE, **same
    )
    workflows.tokenize(data=DATA, vae=str(vae_run), out=latents, **same)
    lm = workflows.train_lm(
        data=str(latents), recipe=DATA, overrides=changes["lm"], out=lm_run, **same
    )
    folder, said = say(rate, scale, "main", NUM_STRINGS, {}, same)
    wer = workflows.evaluate_wer(samples=folder, **JUDGE, **same)
    recordings = workflows.evaluate_wer(samples=folder, side="originals", **JUDGE, **same)
    sim = workflows.evaluate_sim(samples=folder, **same)
    return {
        "vae": vae.figures,
        "lm": lm.figures,
        "reconstruction": recon.figures,
        "samples": said.figures,
        "wer_samples": wer.figures,
        "wer_recordings": recordings.figures,
        "sim": sim.figures,
    }


def at_main_rate(scale: str, same: dict[str, Any]) -> dict[str, Any]:
    """Steps, guidance, endings and streaming."""
    found: dict[str, Any] = {"steps": {}, "guidance": {}}
    for steps in STEPS:
        found["steps"][steps] = wer_of(scale, f"steps{steps}", {"num_inference_steps": steps}, same)
    for cfg in SCALES:
        found["guidance"][cfg] = wer_of(scale, f"cfg{cfg:g}", {"guidance_scale": cfg}, same)
    folder, said = say(MAIN_RATE, scale, "endings", NUM_ENDINGS, {}, same)
    found["endings"] = said.figures | {"longest_silence_seconds": silence_in(Path(folder))}
    found["streaming"] = streaming(scale, same)
    return found


def wer_of(scale: str, name: str, settings: dict[str, Any], same: dict[str, Any]) -> dict[str, Any]:
    """WER and SIM under other settings, on half as many strings."""
    folder, _ = say(MAIN_RATE, scale, name, NUM_STRINGS // 2, settings, same)
    wer = workflows.evaluate_wer(samples=folder, **JUDGE, **same)
    sim = workflows.evaluate_sim(samples=folder, **same)
    return {**wer.figures, **sim.figures}


def streaming(scale: str, same: dict[str, Any]) -> list[dict[str, Any]]:
    """Time to the first audio and real-time factor of a few strings, the first one a warm-up."""
    _, lm_run, _ = names(MAIN_RATE, scale)
    rows = []
    for number, text in enumerate(("three one four", "one five nine two six", "five three five")):
        out = Path("samples") / f"digits-{scale}-stream-{number}"
        said = workflows.speak(texts=[text], stream=True, model=str(lm_run), out=out, **same)
        rows.append(dict(said.figures))
    return rows[1:]


def say(
    rate: float,
    scale: str,
    name: str,
    count: int,
    settings: dict[str, Any],
    same: dict[str, Any],
) -> tuple[str, Any]:
    """Strings of the test takes, with the voice of another string of the speaker."""
    _, lm_run, _ = names(rate, scale)
    folder = Path("samples") / f"digits-{scale}-{rate:g}hz-{name}"
    result = workflows.speak(
        protocol="reference-utterance",
        data=DATA,
        num_samples=count,
        model=str(lm_run),
        out=folder,
        **settings,
        **same,
    )
    return str(folder), result


def silence_in(folder: Path) -> float:
    """The longest silence in any sample, in seconds."""
    items = read_spoken_items(folder)
    return max(longest_silence(*read_audio(item.file, str(item.file))) for item in items)


def names(rate: float, scale: str) -> tuple[Path, Path, Path]:
    """Folders of the sigma-VAE, the LatentLM and the latents."""
    tag = f"digits-{scale}-{rate:g}hz"
    return Path("runs", f"vae-{tag}"), Path("runs", f"lm-{tag}"), Path("latents", tag)


if __name__ == "__main__":
    main()
