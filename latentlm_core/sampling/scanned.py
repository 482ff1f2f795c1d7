"""The head's draw as one loop that a compiler sees once: a scan over the solver's steps.

It draws what ``DiffusionHead.sample`` draws. What timesteps and states do to the layers is computed
for all steps at once where that is little, and step by step within the loop where it is much.

Axes: N latents, C latent channels, D hidden, S solver steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentlm_core.models.heads import MAX_MODULATIONS, DiffusionHead
from latentlm_core.nn.matmul import compiled_linear


def sample_scanned(
    head: DiffusionHead,
    condition: Tensor,
    noise: Tensor,
    table: Tensor,
    t_embeddings: Tensor,
    guidance_scale: Tensor,
    fresh_noise: Tensor | None,
    guided_steps: range,
) -> Tensor:
    """Draw latents (N, C) float32.

    Args:
        head: draws them.
        condition: (N, D), or (2 N, D) for guidance.
        noise: (N, C) float32 standard normal.
        table: (S, 6) coefficients, ``SolverGrid.table``.
        t_embeddings: (S, D) of the grid's timesteps.
        guidance_scale: () s in u + s (c - u).
        fresh_noise: (S, N, C) for a stochastic solver.
        guided_steps: where guidance acts.
    """
    before = torch.zeros_like(noise)
    x = noise.clone()
    for steps, num_rows in (
        (slice(0, guided_steps.start), noise.shape[0]),
        (slice(guided_steps.start, guided_steps.stop), condition.shape[0]),
        (slice(guided_steps.stop, len(table)), noise.shape[0]),
    ):
        if steps.start < steps.stop:
            fresh = None if fresh_noise is None else fresh_noise[steps]
            x, before = _scan(
                head,
                condition[:num_rows],
                (x, before),
                table[steps],
                t_embeddings[steps],
                guidance_scale,
                fresh,
            )
    return x


def _scan(
    head: DiffusionHead,
    condition: Tensor,
    start: tuple[Tensor, Tensor],
    table: Tensor,
    t_embeddings: Tensor,
    guidance_scale: Tensor,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Some steps: the state and the estimate of x0 after them, (N, C) each."""
    from torch._higher_order_ops.scan import scan

    num_rows, width = condition.shape
    size = len(table) * num_rows * width * (3 * len(head.blocks) + 2)
    is_small = size <= MAX_MODULATIONS

    def step(
        carry: tuple[Tensor, Tensor], given: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, before = carry
        row, *more = given
        with compiled_linear(head.latent_embedding.weight):  # outer modes end at a scan
            if is_small:
                modulations = more[: len(head.blocks) + 1]
            else:
                made = head.modulations(condition, more[0].unsqueeze(0))
                modulations = [each[0] for each in made]
            output = head.guided_output(x, modulations, guidance_scale)
        x0 = row[0] * x + row[1] * output
        x = row[2] * x + row[3] * x0 + row[4] * before
        if fresh is not None:
            x = x + row[5] * more[-1]
        return (x, x0), row.new_zeros(1)

    parts = head.modulations(condition, t_embeddings) if is_small else (t_embeddings,)
    given = (table, *parts) if fresh is None else (table, *parts, fresh)
    carry, _ = scan(step, start, given)
    return carry  # type: ignore[no-any-return]
