"""Sequence layouts and their masks."""

import torch

from latentlm_core.layout import Kind, MaskRule, SequenceLayout


def packed_layout() -> SequenceLayout:
    """One row: document 0 = text, latent, latent; document 1 = text, text; one of padding."""
    T, X, N = int(Kind.TEXT), int(Kind.LATENT), int(Kind.NOTHING)
    return SequenceLayout.make(
        kind=torch.tensor([[T, X, X, T, T, N]]),
        document=torch.tensor([[0, 0, 0, 1, 1, -1]]),
        position=torch.tensor([[0, 1, 2, 0, 1, 0]]),
        span=torch.tensor([[-1, 0, 0, -1, -1, -1]]),
        predict=torch.tensor([[X, X, N, T, N, N]]),
    )


def test_targets_are_where_predictions_are():
    layout = packed_layout()
    assert layout.latent_targets.tolist() == [0, 1]
    assert layout.text_targets.tolist() == [3]
    assert layout.is_packed


def test_causal_mask_never_crosses_documents():
    allowed = packed_layout().mask().allowed[0, 0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_free_spans_see_their_whole_span_and_nothing_else_ahead():
    layout = packed_layout()
    extra = layout.mask(MaskRule.FREE_SPANS).allowed & ~layout.mask().allowed
    assert extra[0, 0].nonzero().tolist() == [[1, 2]]


def test_images_are_a_class_then_all_latents_but_the_last():
    layout = SequenceLayout.of_images(2, 4)
    assert layout.kind[0].tolist() == [1, 2, 2, 2]
    assert layout.latent_targets.tolist() == list(range(8))
    assert layout.text_targets.numel() == 0
    assert layout.mask().is_causal
    assert layout.mask().allowed is None


def test_trailing_padding_alone_needs_no_mask():
    layout = packed_layout()
    alone = SequenceLayout.make(
        *(
            getattr(layout, name)[:, [0, 1, 2, 5]]
            for name in ("kind", "document", "position", "span", "predict")
        )
    )
    assert not alone.is_packed
