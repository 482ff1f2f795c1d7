"""What the tokenizer does to LatentLM and to DiT, small: the question of the paper's Table 5.

Four runs of equal budget on handwritten digits: {sigma-VAE, learned low-variance VAE} x
{LatentLM, DiT of like size}. The distance is taken on the features of a classifier trained apart,
so it compares the four with each other and with nothing else.

    python examples/tokenizer_effect.py [FOLDER] [STEPS]

Writes FOLDER/tokenizer_effect.json and prints a table. Interrupted, the same command goes on.
"""

import os
import sys
from pathlib import Path

TOKENIZERS = {
    "learned": ["tokenizer.posterior.kind=learned", "loss.beta=1e-6"],
    "sigma-vae": [],
}
GENERATORS = {"dit": "dit-mnist", "latentlm": "mnist"}
NUM_SAMPLES = 1000
SCALES = (1.0, 2.0, 3.0)


def main(folder: Path, steps: int) -> None:
    """Run what is missing of the four, measure each, write the table."""
    os.environ["LATENTLM_HOME"] = str(folder)
    from latentlm_core import workflows
    from latentlm_core.data.sources import open_source
    from latentlm_core.evaluation.classifier import train_classifier
    from latentlm_core.files import write_json
    from latentlm_core.runtime import machine, versions

    judge = folder / "judge"
    if not (judge / "config.json").is_file():
        train_classifier(open_source("mnist"), open_source("mnist", "test"), image_size=32).save(
            judge
        )
    rows = []
    for tokenizer, changes in TOKENIZERS.items():
        vae, latents = folder / "runs" / tokenizer, folder / "latents" / tokenizer
        trained = workflows.train_vae(data="mnist", recipe="mnist", overrides=changes, out=vae)
        workflows.tokenize(data="mnist", vae=str(vae), out=latents)
        for generator, recipe in GENERATORS.items():
            run = folder / "runs" / f"{generator}-on-{tokenizer}"
            model = workflows.train_lm(
                data=str(latents),
                recipe=recipe,
                overrides=[f"trainer.total_steps={steps}"],
                out=run,
            )
            found = workflows.sweep(
                model=str(run),
                scales=SCALES,
                num_samples=NUM_SAMPLES,
                extractor=str(judge),
                reference="mnist",
                batch_size=200,
            ).details
            rows.append(
                {
                    "tokenizer": tokenizer,
                    "generator": generator,
                    "parameters": model.figures["parameters"],
                    "psnr": trained.figures["psnr"],
                    "noise_to_signal": trained.figures["noise_to_signal"],
                    "unguided": found["rows"][0]["fid"],
                    "best": found["best"]["fid"],
                    "best_scale": found["best"]["guidance_scale"],
                    "seconds": model.figures["training_seconds"],
                }
            )
            print(rows[-1], flush=True)
    report = {"steps": steps, "metric": found["metric"], "num_samples": NUM_SAMPLES, "rows": rows}
    write_json(
        folder / "tokenizer_effect.json",
        report | {"machine": machine(), "versions": versions()},
    )


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path("tokenizer-effect"),
        int(sys.argv[2]) if len(sys.argv) > 2 else 600,
    )
