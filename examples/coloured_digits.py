"""Text and images in one model, measured three ways, on coloured handwriting.

    python examples/coloured_digits.py [--scale small|full] [--models unified,longer,...] [FOLDER]

1. unified: one model of text, pairs and interleaved documents; beside it `text`, a model of the
   same size that has read the same text and nothing else; and `longer`, with three times the steps.
2. transfusion: the same mix and budget in the layout of Transfusion (noisy latents in the backbone,
   free attention inside an image), its head as deep as makes the parameters match.
3. draw and describe: one model for each direction, with half of the steps each, beside the unified
   one, which gives a sixth of its own to text and interleaved documents.

Each draws 500 captions of held-out images, which a checker reads, describes 500 held-out images and
answers the questions about them, as far as it can. `small` is for two CPU cores, `full` is sized by
estimate for half an hour of a GPU. Runs go to FOLDER (default: the workspace), figures to
results/coloured-digits-SCALE.json below this file. Interrupted, the same command goes on.
"""

import argparse
import os
from pathlib import Path
from typing import Any

DATA, TEXT = "coloured-digits", "pydoc"
MIX = "text:{text}=1,{latents}=10,interleaved:{latents}=1"
MODELS: dict[str, dict[str, Any]] = {
    "unified": {"mix": MIX},
    "longer": {"mix": MIX, "steps": 3},
    "text": {"mix": "text:{text}", "elements": 1 / 8, "steps": 2 / 3},
    "transfusion": {"mix": MIX, "recipe": "transfusion-coloured-digits"},
    "draw": {"mix": "{latents}=1", "steps": 0.5, "directions": (1, 0, 0)},
    "describe": {"mix": "{latents}=1", "steps": 0.5, "directions": (0, 1, 1)},
}
"""Mix of each; of its batch and of the steps the share; weights of draw, describe and ask."""
SCALES: dict[str, dict[str, Any]] = {
    "small": {"vae": [], "steps": 4500, "lm": []},
    "full": {
        "vae": ["trainer.total_steps=5000"],
        "steps": 8000,
        "lm": ["trainer.ema_decay=0.999", "trainer.save_every=1000", "trainer.validate_every=1000"],
    },
}
NUM_JUDGED = 500


def main() -> None:
    """Run what is missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.folder is not None:
        os.environ["LATENTLM_HOME"] = str(options.folder)
    from latentlm_cli.progress import listener
    from latentlm_core.files import read_json, write_json
    from latentlm_core.runtime import machine, resolve_device, versions

    same = {"device": options.device, "progress": listener()}
    path = Path(__file__).parent / "results" / f"coloured-digits-{options.scale}.json"
    figures: dict[str, Any] = read_json(path) if path.is_file() else {}
    figures |= {"machine": machine(resolve_device(options.device)), "versions": versions()}
    latents, figures["vae"] = tokenizer(options.scale, same)
    for model in options.models.split(","):
        figures[model] = by_model(model, options.scale, latents, same)
        write_json(path, figures)


def tokenizer(scale: str, same: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Train the sigma-VAE and encode the images; where they are, and its figures."""
    from latentlm_core import workflows
    from latentlm_core.workflows.workspace import workspace

    home, changes = workspace(), SCALES[scale]["vae"]
    run = home / "runs" / f"coloured-{scale}-vae"
    vae = workflows.train_vae(data=DATA, recipe=DATA, overrides=changes, out=run, **same)
    latents = home / "latents" / f"coloured-{scale}"
    workflows.tokenize(data=DATA, vae=str(run), out=latents, **same)
    return str(latents), dict(vae.figures)


def by_model(model: str, scale: str, latents: str, same: dict[str, Any]) -> dict[str, Any]:
    """Train a model and measure what it can do."""
    from latentlm_core import workflows
    from latentlm_core.recipes import lm_recipe
    from latentlm_core.workflows.workspace import workspace

    plan, home = MODELS[model], workspace()
    recipe = lm_recipe(plan.get("recipe", DATA))
    steps = round((SCALES[scale]["steps"] or recipe.trainer.total_steps) * plan.get("steps", 1))
    elements = max(round(recipe.data.batch_elements * plan.get("elements", 1)), 64)
    changes = [
        f"trainer.total_steps={steps}",
        f"data.batch_elements={elements}",
        *SCALES[scale]["lm"],
    ]
    if "directions" in plan:
        names = ("draw", "describe", "ask")
        changes += [
            f"data.directions.{name}={weight}"
            for name, weight in zip(names, plan["directions"], strict=True)
        ]
    run = home / "runs" / f"coloured-{scale}-{model}"
    trained = workflows.train_lm(
        data=plan["mix"].format(text=TEXT, latents=latents),
        recipe=plan.get("recipe", DATA),
        overrides=changes,
        out=run,
        **same,
    )
    found: dict[str, Any] = {"training": dict(trained.figures)}
    if model not in ("text", "describe"):
        folder = home / "samples" / f"coloured-{scale}-{model}"
        workflows.write(
            model=str(run), data=DATA, num_samples=NUM_JUDGED, out=folder, batch_size=100, **same
        )
        found["drawn"] = workflows.evaluate_text_to_image(
            samples=str(folder), extractor="none", clip="none", **same
        ).figures
    if model not in ("text", "draw"):
        about: dict[str, Any] = {"data": DATA, "model": str(run), "num_samples": NUM_JUDGED}
        found["described"] = workflows.evaluate_captions(**about, **same).figures
        answered = workflows.evaluate_vqa(**about, **same)
        found["answered"] = answered.figures | {"by_question": answered.details["by_question"]}
    if "text:" in plan["mix"]:
        found["text"] = workflows.evaluate_perplexity(data=TEXT, model=str(run), **same).figures
    return found


if __name__ == "__main__":
    main()
