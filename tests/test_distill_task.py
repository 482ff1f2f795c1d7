"""Distilling a head: what its lessons are, and what is learned of a law that is known exactly."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentlm_core.data.documents import DocumentBuilder, pack
from latentlm_core.data.guided import Guidance, GuidedStream, latent_runs
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.diffusion import SolverGrid, solve, solver_grid
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.few_step import FewStepHead, step_ends
from latentlm_core.models.heads import DiffusionHead, DiffusionHeadConfig
from latentlm_core.runtime import generator
from latentlm_core.training.culprit import Culprit, find_culprit
from latentlm_core.training.distill_task import DistillConfig, DistillTask, Guide, walk
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.step import Stepper
from tests.test_models import image_inputs, tiny_latent_lm, wake
from tests.test_shared_losses import utterances
from tests.tiny_parallel import Sequences

NULL = 10
GUIDED = Guidance(2.5, "constant", (NULL,))
STD = 0.5
"""Of the latents of the law that is known."""
NUM_STEPS = 150
"""For which a student learns it."""


def images(*name: object) -> SequenceBatch:
    """Four images of six latents, a class each."""
    source = generator("distill", *name)
    ids, latents = image_inputs(torch.arange(4), torch.randn(4, 6, 8, generator=source))
    return SequenceBatch(ids, latents, SequenceLayout.of_images(4, 6), ("a", "b", "c", "d"))


class Gaussian(DiffusionHead):
    """Knows that latents are normal, STD around a mean that it reads off the state."""

    def condition(self, states: Tensor) -> Tensor:
        return states[..., : self.latent_channels].tanh()

    def embed_times(self, grid: SolverGrid) -> Tensor:
        return torch.tensor(grid.timesteps)

    def denoise(self, x_t: Tensor, t_embedding: Tensor, condition: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t_embedding)
        surprise = (x_t - alpha * condition) / (alpha**2 * STD**2 + sigma**2)
        return (alpha * x_t - condition - alpha * STD**2 * surprise) / sigma

    def flow(self, x: Tensor, start: int, end: int | None, mean: Tensor) -> Tensor:
        """Where the exact flow from one timestep leads at another, None being clean data."""
        (a, s), (b, r) = (
            (1.0, 0.0) if t is None else self.schedule.alpha_sigma(torch.tensor(t))
            for t in (start, end)
        )
        scale = ((b**2 * STD**2 + r**2) / (a**2 * STD**2 + s**2)) ** 0.5
        return b * mean + scale * (x - a * mean)


def make_task(teacher: DiffusionHead | None = None, **config) -> DistillTask:
    channels = 8 if teacher is None else teacher.latent_channels
    model = tiny_latent_lm(latent_channels=channels)
    head = teacher or model.head
    model.head = FewStepHead.of_teacher(head)
    return DistillTask(model, head, DistillConfig(**{"trajectories": 3, **config}))


def gaussian(channels: int) -> Gaussian:
    return Gaussian(DiffusionHeadConfig(num_layers=2, intermediate_size=128), 64, channels)


def guided_mean(teacher: Gaussian, states: Tensor, guide: Guide) -> Tensor:
    """The mean that guidance makes of those with and without the condition."""
    conditional, unconditional = teacher.condition(states), teacher.condition(guide.free)
    return unconditional + guide.scales.unsqueeze(1) * (conditional - unconditional)


def test_a_student_starts_as_its_teacher():
    task = make_task()
    states, noise = torch.randn(5, 64), torch.randn(2, 5, 8)
    grid = solver_grid(task.teacher.schedule, 4, "few-step")
    taught = walk(task.teacher, states, None, noise, grid)[4]
    drawn = solve(task.student.sampler(states, grid), noise, grid)
    assert drawn.std() > 0.1
    torch.testing.assert_close(drawn, taught, rtol=0, atol=0)


def test_it_is_told_where_steps_end_and_in_time_heeds_it():
    assert step_ends((999, 500, 0)) == [501, 1, 0]
    head = make_task().student.head
    short, long = (solver_grid(head.schedule, n, "few-step") for n in (2, 1))
    torch.testing.assert_close(head.embed_times(short)[0], head.embed_times(long)[0])
    wake(head)
    assert not torch.allclose(head.embed_times(short)[0], head.embed_times(long)[0])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_what_a_lesson_asks_for_leads_where_the_teacher_went(prediction_type):
    task = make_task(teacher_steps=8)
    diffusion = task.teacher.config.diffusion.model_copy(
        update={"prediction_type": prediction_type}
    )
    config = task.teacher.config.model_copy(update={"diffusion": diffusion})
    task = make_task(wake(DiffusionHead(config, 64, 8)), teacher_steps=8)
    states, path = task._teach(GUIDED.apply(images(0)), generator(0))
    task.student.forward = lambda x, *_: torch.zeros_like(x)
    asked = -task._errors(states, path)
    spans = list(zip(*task._lessons[:2], strict=True))
    assert spans == [(0, 8), (0, 4), (4, 8), (0, 2), (2, 4), (4, 6), (6, 8)]
    for steps in (1, 2, 4):
        grid = solver_grid(task.teacher.schedule, steps, "few-step")
        for i, span in enumerate(pairwise(range(0, 9, 8 // steps))):
            x, _ = grid.step(i, path[span[0]], path[span[0]], asked[spans.index(span)])
            torch.testing.assert_close(x, path[span[1]], rtol=1e-3, atol=1e-4)


def test_guided_trajectories_are_those_of_the_exact_flow():
    task = make_task(gaussian(8), teacher_steps=200)
    batch = GUIDED.apply(images(0))
    _, path = task._teach(batch, generator(0))
    with torch.no_grad():
        states, free = task._states(batch), task._states(batch.free.batch)
    mean = guided_mean(task.teacher, states, Guide(free, batch.free.scales, range(200)))
    for step in (50, 100, 150, 200):
        end = (*task._grid.timesteps, None)[step]
        exact = task.teacher.flow(path[0], 999, end, mean)
        torch.testing.assert_close(path[step], exact, rtol=0, atol=0.02)


def test_a_student_of_a_known_law_beats_its_teacher_at_equal_evaluations():
    teacher = gaussian(2)
    task = make_task(teacher, teacher_steps=20)
    optimizer = torch.optim.AdamW(task.student.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    states, free = torch.randn(2, 4, 64, generator=generator("states"))
    guide = Guide(free, torch.full((4,), 1.5), range(20))
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / NUM_STEPS)
        noise = torch.randn(16, 4, 2, generator=generator("noise", step))
        path = walk(teacher, states, guide, noise, task._grid, range(20))
        task._errors(states, path).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    noise = torch.randn(256, 4, 2, generator=generator("held out"))
    exact = teacher.flow(noise, 999, None, guided_mean(teacher, states, guide))
    for steps in (1, 2, 4):
        few, usual = (
            solver_grid(teacher.schedule, steps, solver) for solver in ("few-step", "dpmsolver++")
        )
        with torch.no_grad():
            ours = solve(task.student.sampler(states, few), noise, few)
            theirs = walk(teacher, states, guide, noise, usual)[steps]
        ours, theirs = ((drawn - exact).square().mean().sqrt() for drawn in (ours, theirs))
        assert ours < 0.2 * theirs, (steps, float(ours), float(theirs))


def test_without_their_condition_latents_have_the_states_that_sampling_gives_them():
    batch, model = images(0), tiny_latent_lm()
    guided = GUIDED.apply(batch)
    nulls = batch.ids.clone()
    nulls[:, 0] = NULL
    with torch.no_grad():
        expected = model.states(nulls[:, :-1], batch.latents[:, :-1], batch.layout)
        states = DistillTask._states(make_task(), guided.free.batch)
    assert guided.free.batch.layout.latent_targets.tolist() == batch.layout.latent_targets.tolist()
    assert states.shape == expected.flatten(0, 1).shape
    with torch.no_grad():
        free = guided.free.batch
        states = model.states(free.ids[:, :-1], free.latents[:, :-1], free.layout)
    torch.testing.assert_close(states, expected)


def test_runs_of_latents_are_found_among_text():
    documents = utterances()
    for batch in (pack(documents, 40), GuidedStreamOf(documents).batch()):
        runs = latent_runs(batch)
        assert sorted(map(len, runs)) == [2, 2, 3, 4, 5, 5, 6, 7]
        values = batch.latents[:, 1:].flatten(0, 1)[batch.layout.latent_targets]
        assert torch.equal(torch.cat(runs), values)
        free = Guidance(3.0, "constant", (1, 2, 3)).apply(batch).free.batch
        assert free.ids[:, :3].tolist() == [[1, 2, 3]] * 8
        own = free.latents[:, 1:].flatten(0, 1)[free.layout.latent_targets]
        assert torch.equal(own, values)


class GuidedStreamOf:
    """Documents whose latents are read as well as learned."""

    def __init__(self, documents) -> None:
        self.documents = documents

    def batch(self) -> SequenceBatch:
        reader = DocumentBuilder(self.documents[0].latents.shape[1])
        reader.tokens([1]).latents(torch.ones(5, 3), learn=False).tokens([2])
        return pack([*self.documents, reader.finish("reader")], 40)


def test_a_guidance_may_rise_over_the_latents_of_a_run():
    guided = Guidance(3.0, "linear", (NULL,)).apply(images(0))
    torch.testing.assert_close(guided.free.scales, torch.linspace(1.0, 3.0, 6).repeat(4))


def test_guidance_acts_within_its_interval_alone():
    task = make_task(teacher_steps=4)
    states, noise, grid = torch.randn(5, 64), torch.randn(2, 5, 8), task._grid
    nowhere, late, everywhere = (
        walk(task.teacher, states, Guide(-states, torch.full((5,), 3.0), steps), noise, grid, [2])
        for steps in (range(0), range(2, 4), range(4))
    )
    plain = walk(task.teacher, states, None, noise, grid)[4]
    torch.testing.assert_close(nowhere[4], plain)
    torch.testing.assert_close(nowhere[2], late[2])
    assert not torch.allclose(late[4], plain)
    assert not torch.allclose(late[4], everywhere[4])


def test_a_guidance_of_1_needs_no_second_rows():
    batch = Guidance(1.0, "constant", (NULL,)).apply(images(0))
    assert batch.free is None
    task = make_task(teacher_steps=4)
    term = task.turns(0)[0].loss(batch, generator(0))["latent"]
    assert term.total > 0


def test_shares_of_a_batch_add_up_and_counts_are_known_before():
    model = tiny_latent_lm(latent_channels=3, predicts_text=True)
    teacher, model.head = model.head, FewStepHead.of_teacher(model.head)
    task = DistillTask(model, teacher, DistillConfig(teacher_steps=4, trajectories=2))
    (turn,) = task.turns(0)
    whole = next(GuidedStream(Sequences(), GUIDED).batches([0]))
    expected = turn.loss(whole, generator(0))["latent"]
    parts = [whole.share(index, 4) for index in range(4)]
    terms = [turn.loss(part, generator(0))["latent"] for part in parts]
    assert sum(term.count for term in terms) == expected.count == turn.counts(whole)["latent"]
    assert terms[0].count == 0, "a row without latents"
    torch.testing.assert_close(sum(term.total for term in terms), expected.total)


def test_only_the_student_learns():
    task = make_task(teacher_steps=4)
    term = task.turns(0)[0].loss(GUIDED.apply(images(0)), generator(0))["latent"]
    term.total.backward()
    learned = {name for name, one in task.model.named_parameters() if one.grad is not None}
    assert learned == {name for name, _ in task.model.named_parameters() if "head." in name}
    assert all(one.grad is None for one in task.teacher.parameters())


def test_validation_tells_how_far_each_number_of_steps_ends_from_the_teacher():
    task = make_task(teacher_steps=4)
    batch = Guidance(1.0, "constant", (NULL,)).apply(images(0))
    with torch.no_grad():
        terms = task.validate(batch, generator(0))
    states = task._states(batch)
    noise = Draws(generator(0)).normal((3, 24, 8), dim=1)
    far = {n: terms[f"distance/{n} steps"] for n in (1, 2, 4)}
    usual = solver_grid(task.teacher.schedule, 4, "dpmsolver++")
    single = solver_grid(task.teacher.schedule, 1, "dpmsolver++")
    end, once = (
        walk(task.teacher, states, None, noise, grid)[len(grid)] for grid in (usual, single)
    )
    assert float(far[1].total) == pytest.approx(float((once - end).square().sum()), rel=1e-4)
    assert far[1].count == end.numel()
    assert far[4].total < far[2].total < far[1].total


def test_what_is_not_finite_is_named_by_its_example():
    def culprit(task: DistillTask, batch: SequenceBatch) -> Culprit:
        (turn,) = task.turns(0)
        device, optimizers = torch.device("cpu"), {turn.name: OptimizerConfig()}
        stepper = Stepper(
            {turn.name: turn.module},
            optimizers,
            total_steps=9,
            seed=0,
            device=device,
            dtype=torch.float32,
        )
        again = lambda watched: stepper.again(watched, [guided], 0)  # noqa: E731
        guided = GUIDED.apply(batch)
        return find_culprit(task, turn, [guided], stepper.tensors(), again)

    batch = images(0)
    batch.latents[2, 3, 0] = torch.nan
    assert culprit(make_task(), batch) == Culprit("data", "latents", ("c",))

    task = make_task(teacher_steps=4)
    embed = task.student.head.condition_projection
    mark = torch.arange(24).unsqueeze(1) == 7  # of images of six latents
    embed.register_forward_hook(lambda module, args, out: out.masked_fill(mark, torch.inf))
    found = culprit(task, images(0))
    assert (found.cause, found.name) == ("forward", "student.head.condition_projection")
    assert found.keys == ("b",)
    assert found.timesteps == ("t250-499", "t500-749", "t750-999"), "where lessons begin"


def test_a_teacher_that_does_not_stop_where_the_student_does_is_refused():
    with pytest.raises(ConfigError, match="teacher_steps = 10 does not pass where 4 steps stop"):
        make_task(teacher_steps=10)
