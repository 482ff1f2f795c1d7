"""Words and images with a Transfusion: requests and results are those of ``InterleavedEngine``.

All latents of an image are denoised together. At each solver step the whole noisy image is fed
after what stands before it, free among itself, and then forgotten again; the image that comes out
is fed once, clean, and stays. Documents go on in turns: those at an image draw it, then those among
words write until they end or begin an image. Each turn reads its documents anew, padded on the
left: a baseline needs no cache that lasts, and so every row of a batch does the same.

Guidance: the unconditional branch of an image is ``bos null bod`` and the image alone.

Axes: B rows, P prompt positions, T latents of an image, C latent channels, D hidden, S solver
steps, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentlm_core.diffusion import guided, solve, solver_grid
from latentlm_core.layout import Kind, MaskRule, SequenceLayout
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.nn.attention import KVCache
from latentlm_core.runtime import evaluating
from latentlm_core.sampling.base import (
    BOUND,
    END,
    Noise,
    SamplerConfig,
    SeededLatents,
    draw_noise,
    require_fitting,
)
from latentlm_core.sampling.continuation import (
    Continuation,
    ContinuationDraft,
    ContinuationListener,
    ContinuationRequest,
)
from latentlm_core.sampling.prompts import Prompt, token_prompt
from latentlm_core.sampling.words import TextSamplerConfig, choose_tokens
from latentlm_core.tokenizers.text import Marks


@dataclass(slots=True, kw_only=True)
class _Draft(ContinuationDraft):
    """A document that is being made: ``prompt`` is all that stands there by now."""

    prompt: Prompt


class TransfusionEngine:
    """Writes and draws with a Transfusion.

    Args:
        model: the Transfusion.
        config: how images are drawn.
        text_config: how tokens are chosen.
        marks: ids that are no text.

    Raises:
        ConfigError: the guidance schedule is not constant.
    """

    def __init__(
        self,
        model: Transfusion,
        config: SamplerConfig,
        text_config: TextSamplerConfig,
        marks: Marks,
    ) -> None:
        config.require_constant_guidance("A Transfusion draws all positions together")
        config.require_guidance_throughout("A Transfusion")
        self.model = model
        self.config = config
        self.text_config = text_config
        self.marks = marks
        require_fitting(config, None)
        self.grid = solver_grid(model.schedule, config.num_inference_steps, config.solver)
        self._device = model.token_embedding.weight.device
        with evaluating(model):
            times = torch.tensor([*self.grid.timesteps, 0], device=self._device)
            *self._times, self._clean = model.timestep_embedding(times)

    def write(
        self, requests: Sequence[ContinuationRequest], listener: ContinuationListener | None = None
    ) -> list[Continuation]:
        """Go on with every document until it ends.

        Args:
            requests: of any lengths, each with something to write or to draw.
            listener: hears each token and each image as it is made.

        Returns:
            a document for each request, on the host.
        """
        config, tell = self.model.config, listener or (lambda index, made: None)
        sizes = [SeededLatents(config.num_latents * one.num_images, one.seed) for one in requests]
        noise = draw_noise(sizes, config.latent_channels, self.grid.num_fresh)
        drafts = [
            _Draft(
                index=index,
                request=request,
                num_latents=config.num_latents,
                prompt=request.prompt,
            )
            for index, request in enumerate(requests)
        ]
        with evaluating(self.model):
            while live := [draft for draft in drafts if not draft.ended_by]:
                drawing = [draft for draft in live if draft.prompt.ids[-1] == self.marks.bod]
                if drawing:
                    self._draw(drawing, noise, tell)
                else:
                    self._write(live, tell)
        return [Continuation(tuple(draft.pieces), draft.ended_by) for draft in drafts]

    def draw_images(
        self, prompts: Sequence[Prompt], unconditional: Sequence[Prompt], noise: Noise
    ) -> Tensor:
        """An image (T, C) after each of B prompts, (B, T, C) float32.

        Args:
            prompts: B that end where an image begins.
            unconditional: what stands in their places in the guidance branch.
            noise: of B images.
        """
        with evaluating(self.model):
            rows = [*prompts, *unconditional] if self.config.is_guided else prompts
            _, cache = self.read(rows, noise.start.shape[1])
            return self.paint(cache, noise)

    def paint(self, cache: KVCache, noise: Noise) -> Tensor:
        """Draw an image after what B rows of a cache hold, (B, T, C) float32; it stays there.

        Args:
            cache: B rows, or 2 B for guidance: conditional rows, then unconditional.
            noise: of B images.
        """
        model, fresh = self.model, noise.fresh
        scale, num_latents = self.config.guidance_scale, noise.start.shape[1]

        def predict(x_t: Tensor, i: int) -> Tensor:
            states = model.read_image(x_t, self._times[i], cache)
            cache.rewind(num_latents)
            return model.denoise(states, self._times[i].unsqueeze(0)).float()

        with evaluating(model):
            drawn = solve(
                guided(predict, scale) if self.config.is_guided else predict,
                noise.start.to(self._device),
                self.grid,
                None if fresh is None else lambda i: fresh[i].to(self._device),
            )
            rows = torch.cat([drawn, drawn]) if self.config.is_guided else drawn
            model.read_image(rows, self._clean, cache)
        return drawn

    def read(self, prompts: Sequence[Prompt], num_more: int) -> tuple[Tensor, KVCache]:
        """The last state of every prompt, (B, D), and the cache behind it, with room for more.

        Runs of latents in a prompt are whole images; they are fed clean.
        """
        ids, latents, kind, position = (
            pad_sequence(list(parts), batch_first=True, padding_side="left")
            for parts in zip(*prompts, strict=True)
        )
        padding = torch.tensor([ids.shape[1] - len(prompt.ids) for prompt in prompts])
        is_latent = kind == Kind.LATENT
        begins = is_latent & ~is_latent.roll(1, dims=1)  # no prompt begins with a latent
        layout = SequenceLayout.make(
            kind,
            document=-(torch.arange(ids.shape[1]) < padding.unsqueeze(1)).long(),
            position=position,
            span=torch.where(is_latent, begins.cumsum(1), -1),
            predict=torch.zeros_like(kind),
        ).to(self._device)
        cache = self.model.backbone.new_cache(len(prompts), ids.shape[1] + num_more)
        if padding.any():
            cache.padding = padding.to(self._device)
        with evaluating(self.model):
            x = self.model.embed(
                ids.to(self._device), latents.to(self._device), layout.kind, self._clean
            )
            mask = layout.mask(MaskRule.FREE_SPANS)
            states = self.model.backbone(x, layout.position, mask, cache)
        cache.shift = layout.position[:, -1] + 1 - cache.length
        return states[:, -1], cache

    def _draw(self, drafts: Sequence[_Draft], noise: Noise, tell: ContinuationListener) -> None:
        """The next image of every draft."""
        length, channels = self.model.config.num_latents, self.model.config.latent_channels
        free = token_prompt([self.marks.bos, self.marks.null, self.marks.bod], channels)
        indices = torch.tensor([draft.index for draft in drafts]).unsqueeze(1)
        columns = torch.arange(length) + torch.tensor([[length * d.num_images] for d in drafts])
        fresh = None if noise.fresh is None else noise.fresh[:, indices, columns]
        images = self.draw_images(
            [draft.prompt for draft in drafts],
            [free] * len(drafts),
            Noise(noise.start[indices, columns], fresh),
        ).cpu()
        for draft, image in zip(drafts, images, strict=True):
            draft.pieces.append(image)
            draft.num_images += 1
            tell(draft.index, image)
            if draft.may_write or draft.may_draw:
                draft.prompt = _with_tokens(_with_image(draft.prompt, image), [self.marks.eod])
            else:
                draft.ended_by = END

    def _write(self, drafts: Sequence[_Draft], tell: ContinuationListener) -> None:
        """Words of every draft, until it ends or an image begins."""
        words: dict[int, list[int]] = {draft.index: [] for draft in drafts}
        more = max(draft.request.num_tokens - draft.num_tokens for draft in drafts)
        state, cache = self.read([draft.prompt for draft in drafts], more)
        live = list(drafts)
        while True:
            tokens = self._choose(live, state)
            going = [row for row, draft in enumerate(live) if self._goes_on(draft, tokens[row])]
            for row, draft in enumerate(live):
                if row in going:
                    draft.num_tokens += 1
                    words[draft.index].append(tokens[row])
                    tell(draft.index, tokens[row])
                elif not draft.ended_by:
                    draft.prompt = _with_tokens(draft.prompt, [*words[draft.index], self.marks.bod])
            live, tokens = [live[row] for row in going], [tokens[row] for row in going]
            if not live:
                break
            if len(going) < len(state):
                cache.keep(torch.tensor(going, device=self._device))
            state = self.model.read_token(torch.tensor(tokens, device=self._device), cache)
        for draft in drafts:
            if words[draft.index]:
                draft.pieces.append(tuple(words[draft.index]))

    def _goes_on(self, draft: _Draft, token: int) -> bool:
        """Whether a token is one more word; if not, why the draft ends, if it ends."""
        if token == self.marks.eos:
            draft.ended_by = END
        elif token != self.marks.bod and not draft.may_write:
            draft.ended_by = BOUND
        return not draft.ended_by and token != self.marks.bod

    def _choose(self, drafts: Sequence[_Draft], state: Tensor) -> list[int]:
        """The next token of every draft."""
        return choose_tokens(
            self.model.logits(state),
            [draft.may_draw for draft in drafts],
            self.marks,
            self.text_config,
            [draft.source for draft in drafts],
        )


def _with_tokens(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    latents = prompt.latents.new_zeros(len(ids), prompt.latents.shape[1])
    return _longer(prompt, torch.tensor(ids), latents, Kind.TEXT)


def _with_image(prompt: Prompt, image: Tensor) -> Prompt:
    return _longer(prompt, torch.zeros(len(image), dtype=torch.int64), image, Kind.LATENT)


def _longer(prompt: Prompt, ids: Tensor, latents: Tensor, kind: Kind) -> Prompt:
    start = prompt.position[-1] + 1
    return Prompt(
        torch.cat([prompt.ids, ids]),
        torch.cat([prompt.latents, latents]),
        torch.cat([prompt.kind, torch.full_like(ids, int(kind))]),
        torch.cat([prompt.position, start + torch.arange(len(ids))]),
    )
