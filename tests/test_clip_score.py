"""The CLIP score: its arithmetic on made-up features, and a tiny CLIP of the real library."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from latentlm_core.data.base import Image
from latentlm_core.errors import ArtifactError, DataError, MissingExtraError
from latentlm_core.evaluation.clip_score import BATCH_SIZE, clip_score, load_clip
from latentlm_core.evaluation.image_sets import image_array

PROMPTS = ["a red seven", "a blue nine on a red background", "a red"]


class Angles:
    """Places images by their first pixel and texts by their length, in degrees on a circle."""

    name = "angles"

    def embed_images(self, images: Image) -> Tensor:
        return self._on_circle(images[:, 0, 0, 0].tolist())

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._on_circle([len(text) for text in texts])

    def _on_circle(self, degrees: Sequence[int]) -> Tensor:
        angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], 1)


def images_at(*degrees: int) -> Image:
    return np.stack([np.full((4, 4, 3), value, np.uint8) for value in degrees])


def test_the_score_is_a_hundred_times_the_cosine_and_never_negative() -> None:
    images = image_array(images_at(10, 70, 190), "samples")
    score = clip_score(Angles(), images, ["x" * 10] * 3)
    assert score.each == pytest.approx((100.0, 50.0, 0.0))
    assert score.mean == pytest.approx(50.0)
    assert score.encoder == "angles"


def test_every_image_keeps_its_prompt_over_batches() -> None:
    degrees = [place % 90 for place in range(2 * BATCH_SIZE + 5)]
    images = image_array(images_at(*degrees), "samples")
    assert clip_score(Angles(), images, ["x" * each for each in degrees]).mean == pytest.approx(100)


def test_a_prompt_is_needed_for_each_image() -> None:
    images = image_array(images_at(1, 2), "samples")
    for prompts in (["x"], []):
        with pytest.raises(DataError, match=f"not {len(prompts)} for 2"):
            clip_score(Angles(), images, prompts)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError) as caught:
        load_clip()
    assert 'pip install "latentlm[clip]"' in str(caught.value.hint)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, a word a token and texts of up to 10 tokens."""
    transformers = pytest.importorskip("transformers", reason="the extra clip is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    words = sorted({word for text in PROMPTS for word in text.split()})
    known = ["<end>", "<start>", "<unknown>", *words]
    text = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unknown>")
    )
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    text.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 0)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=text, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 12}
    marks = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**sizes, **marks, "vocab_size": len(known), "max_position_embeddings": 10},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder


def test_features_are_those_of_the_whole_model(tiny_clip: Path) -> None:
    import transformers

    encoder = load_clip(str(tiny_clip), offline=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    pixels = transformers.CLIPImageProcessor.from_pretrained(tiny_clip)(
        images=list(images), return_tensors="pt"
    )
    tokens = transformers.AutoTokenizer.from_pretrained(tiny_clip)(
        PROMPTS, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        whole = model(**pixels, **tokens)
        cosines = (whole.logits_per_image / model.logit_scale.exp()).diagonal()
    torch.testing.assert_close(encoder.embed_images(images), whole.image_embeds)
    torch.testing.assert_close(encoder.embed_texts(PROMPTS), whole.text_embeds)
    score = clip_score(encoder, image_array(images, "samples"), PROMPTS)
    assert score.each == pytest.approx((100 * cosines.clamp(min=0)).tolist(), abs=1e-3)
    assert max(score.each) > 0


def test_texts_do_not_depend_on_their_batch_and_long_ones_are_cut(tiny_clip: Path) -> None:
    encoder = load_clip(str(tiny_clip), offline=True)
    together = encoder.embed_texts(PROMPTS)
    alone = torch.cat([encoder.embed_texts([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone)
    assert len(set(map(tuple, together.tolist()))) == len(PROMPTS)
    long = encoder.embed_texts(["a red " * 50, "a red " * 60])
    torch.testing.assert_close(long[0], long[1])


def test_only_safetensors_are_loaded(tiny_clip: Path, tmp_path: Path) -> None:
    for path in tiny_clip.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file

    torch.save(load_file(tiny_clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"The CLIP .* cannot be loaded"):
        load_clip(str(tmp_path), offline=True)


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra clip is not installed")
    with pytest.raises(ArtifactError, match=r"^The CLIP no/such-clip cannot be loaded \(.*\)\.$"):
        load_clip("no/such-clip", offline=True)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_clip(str(tmp_path), offline=True)
