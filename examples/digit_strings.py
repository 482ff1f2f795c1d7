"""Text-to-speech on strings of spoken digits: WER and SIM by frame rate, by steps, and streaming.

    python examples/digit_strings.py FOLDER [--scale small|full] [--models 12hz,25hz]

For each of three frame rates, all of 400 floats a second and at one budget: train a sigma-VAE,
tokenize, train a LatentLM, say 200 strings of the test takes with another string of the speaker as
the prompt; measure the recordings, the reconstructions and the samples. Then, at 12.5 Hz: WER by
solver steps and by guidance, streaming, and how 1,000 strings of the training texts end. Every
stage resumes; run it again to go on. `small` is for two CPU cores, `full` is sized by estimate for
half an hour of a GPU. Figures go to results/digit-strings-SCALE.json below this folder.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from latentlm_cli.progress import listener
from latentlm_core import workflows
from latentlm_core.files import read_json, write_json
from latentlm_core.runtime import machine, resolve_device, versions

RECIPES = {
    "12hz": "speech-8k",
    "25hz": "speech-8k-25hz",
    "6hz": "speech-8k-6hz",
}
"""Recipes of the sigma-VAE by model."""
FULL = {
    "vae": ["trainer.total_steps=20000", "data.batch_size=32", "trainer.ema_decay=0.999"],
    "lm": ["trainer.total_steps=12000", "data.batch_size=64", "trainer.ema_decay=0.999"],
}
SMALL: dict[str, list[str]] = {"vae": [], "lm": []}
DATA = "digit-strings"
NUM_STRINGS, NUM_ENDINGS = 200, 1000
PAPER: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 3}
"""CFG 4 and 3 to 5 steps are the paper's; the two walks are around CFG 2 and 5 steps."""
STEPS, SCALES = (1, 2, 3, 5, 10), (1.0, 1.5, 3.0, 4.0)
MAIN = "12hz"
JUDGE: dict[str, Any] = {"normalise": "spoken-digits"}


def main() -> None:
    """Run what is missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of spoken-digits parquet files")
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--models", default=",".join(RECIPES))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    os.environ["LATENTLM_SPOKEN_DIGITS"] = str(options.data.resolve())
    changes = FULL if options.scale == "full" else SMALL
    same = {"device": options.device, "progress": listener()}
    path = Path(__file__).parent / "results" / f"digit-strings-{options.scale}.json"
    figures: dict[str, Any] = read_json(path) if path.is_file() else {}
    figures |= {"machine": machine(resolve_device(options.device)), "versions": versions()}
    for model in options.models.split(","):
        figures[model] = by_model(model, options.scale, changes, same)
        write_json(path, figures)
        if model == MAIN:
            figures["more at 12hz"] = more_of_main(options.scale, same)
            write_json(path, figures)


def by_model(
    model: str, scale: str, changes: dict[str, list[str]], same: dict[str, Any]
) -> dict[str, Any]:
    """Train, say and measure."""
    vae_run, lm_run, latents = names(model, scale)
    vae = workflows.train_vae(
        data=DATA, recipe=RECIPES[model], overrides=changes["vae"], out=vae_run, **same
    )
    recon = workflows.evaluate_reconstruction(
        data=DATA, vae=str(vae_run), num_samples=NUM_STRINGS, **JUDGE, **same
    )
    workflows.tokenize(data=DATA, vae=str(vae_run), out=latents, **same)
    lm = workflows.train_lm(
        data=str(latents), recipe=DATA, overrides=changes["lm"], out=lm_run, **same
    )
    folder, said = say(model, scale, "main", NUM_STRINGS, PAPER, same)
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


def more_of_main(scale: str, same: dict[str, Any]) -> dict[str, Any]:
    """Steps, guidance, endings and streaming."""
    found: dict[str, Any] = {"steps": {}, "guidance": {}}
    for steps in STEPS:
        walk = {"guidance_scale": 2.0, "num_inference_steps": steps}
        found["steps"][steps] = wer_of(scale, f"steps{steps}", walk, same)
    for cfg in SCALES:
        walk = {"guidance_scale": cfg, "num_inference_steps": 5}
        found["guidance"][cfg] = wer_of(scale, f"cfg{cfg:g}", walk, same)
    _, said = say(MAIN, scale, "endings", NUM_ENDINGS, PAPER | {"split": "train"}, same)
    found["endings"] = said.figures
    found["streaming"] = streaming(scale, same)
    return found


def wer_of(scale: str, name: str, settings: dict[str, Any], same: dict[str, Any]) -> dict[str, Any]:
    """WER and SIM under other settings, on a quarter of the strings."""
    folder, _ = say(MAIN, scale, name, NUM_STRINGS // 4, settings, same)
    wer = workflows.evaluate_wer(samples=folder, **JUDGE, **same)
    sim = workflows.evaluate_sim(samples=folder, **same)
    return {**wer.figures, **sim.figures}


def streaming(scale: str, same: dict[str, Any]) -> list[dict[str, Any]]:
    """Time to the first audio and real-time factor of a few strings, the first one a warm-up."""
    _, lm_run, _ = names(MAIN, scale)
    rows = []
    for number, text in enumerate(("three one four", "one five nine two six", "five three five")):
        out = Path("samples") / f"digits-{scale}-stream-{number}"
        said = workflows.speak(
            texts=[text], stream=True, model=str(lm_run), out=out, **PAPER, **same
        )
        rows.append(dict(said.figures))
    return rows[1:]


def say(
    model: str,
    scale: str,
    name: str,
    count: int,
    settings: dict[str, Any],
    same: dict[str, Any],
) -> tuple[str, Any]:
    """Strings of the test takes, with the voice of another string of the speaker."""
    _, lm_run, _ = names(model, scale)
    folder = Path("samples") / f"digits-{scale}-{model}-{name}"
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


def names(model: str, scale: str) -> tuple[Path, Path, Path]:
    """Folders of the sigma-VAE, the LatentLM and the latents."""
    tag = f"digits-{scale}-{model}"
    return Path("runs", f"vae-{tag}"), Path("runs", f"lm-{tag}"), Path("latents", tag)


if __name__ == "__main__":
    main()
