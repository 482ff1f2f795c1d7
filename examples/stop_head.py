"""Where speech ends: the token against a stop head, on the states of a trained model.

    python examples/stop_head.py MODEL LATENTS [--steps 300]

MODEL is a text-to-speech LatentLM (run or export), LATENTS the set that it learned from. Its states
are frozen; a stop head (two Linears with a ReLU between them, a sigmoid, binary
cross-entropy over all latents) is trained on them, and both say of the utterances that are held out
after which latent they would end. The token had the whole backbone to itself, and the head has a
network of its own: neither is favoured twice. Figures go to results/stop-head.json.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentlm_core.artifacts import LoadedGenerator, load_generator
from latentlm_core.config import build
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.utterances import SpeechDataConfig, SpeechSequences
from latentlm_core.files import write_json
from latentlm_core.layout import Kind
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.progress import SILENT
from latentlm_core.runtime import machine, seeded_init, versions
from latentlm_core.tokenizers.text import TextTokenizer
from latentlm_core.workflows.workspace import find_export, find_latents

CPU = torch.device("cpu")
LR = 1e-3


def main() -> None:
    """Train the head, let both end what is held out, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("latents")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    loaded = load_generator(find_export(options.model, "generator", SILENT), CPU)
    model, text = loaded.model, loaded.text
    assert isinstance(model, LatentLM)
    assert text is not None
    latents = LatentSet.open(find_latents(options.latents, SILENT))
    stream = sequences(loaded, latents, text)
    head = train(model, stream, text, options.steps)
    found: dict[str, list[tuple[int, int]]] = {"token": [], "stop head": []}
    for batch in stream.held_out():
        states, ends, groups = spans(model, batch, text)
        with torch.no_grad():
            scores = {
                "token": model.logits(states)[:, [text.marks.eod, text.marks.go_on]].float(),
                "stop head": F.pad(head(states), (0, 1)),
            }
        for name, each in scores.items():
            found[name] += verdicts(each[:, 0] > each[:, 1], ends, groups)
    figures = {name: summary(pairs) for name, pairs in found.items()}
    path = Path(__file__).parent / "results" / "stop-head.json"
    details = {"machine": machine(CPU), "versions": versions(), "steps": options.steps}
    write_json(path, {**details, "model_sha256": loaded.sha256, **figures})
    for name, each in figures.items():
        print(name, each)


def sequences(loaded: LoadedGenerator, latents: LatentSet, text: TextTokenizer) -> SpeechSequences:
    """The batches that the model was trained on, without its curriculum."""
    recipe = loaded.config.provenance["config"]
    config = build(SpeechDataConfig, recipe["data"] | {"curriculum_batches": 0}, "the model's data")
    return SpeechSequences(latents, text, config, recipe["trainer"]["seed"])


def train(model: LatentLM, stream: SpeechSequences, text: TextTokenizer, steps: int) -> nn.Module:
    """A stop head on frozen states."""
    hidden = model.config.backbone.hidden_size
    with seeded_init("stop head"):
        head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR)
    for number in range(steps):
        states, ends, _ = spans(model, stream.batch(number), text)
        loss = F.binary_cross_entropy_with_logits(head(states)[:, 0], ends.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def spans(
    model: LatentLM, batch: SequenceBatch, text: TextTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """States (N, D) after latents, whether each is the last of its span, and whose span it is."""
    layout = batch.layout
    with torch.no_grad():
        states = model.states(batch.ids[:, :-1], batch.latents[:, :-1], layout).flatten(0, 1)
    after = (layout.kind.flatten() == Kind.LATENT).nonzero()[:, 0]
    ends = batch.ids[:, 1:].flatten()[after] == text.marks.eod
    row = after // layout.kind.shape[1]
    group = row * (int(layout.span.max()) + 1) + layout.span.flatten()[after]
    return states[after].float(), ends, group


def verdicts(says_end: Tensor, ends: Tensor, groups: Tensor) -> list[tuple[int, int]]:
    """Of each span its length, and the latent after which it would be ended (0: never)."""
    pairs = []
    for group in groups.unique().tolist():
        inside = groups == group
        said = says_end[inside].nonzero()[:, 0]
        if bool(ends[inside][-1]):
            pairs.append((int(inside.sum()), int(said[0]) + 1 if len(said) else 0))
    return pairs


def summary(pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Shares of the spans that end where the recording does, before it, or not by then."""
    count = len(pairs)
    early = [length - at for length, at in pairs if 0 < at < length]
    return {
        "spans": count,
        "exact": sum(at == length for length, at in pairs) / count,
        "early": len(early) / count,
        "early_by_more_than_two": sum(by > 2 for by in early) / count,
        "not_by_the_end": sum(at == 0 for _, at in pairs) / count,
    }


if __name__ == "__main__":
    main()
