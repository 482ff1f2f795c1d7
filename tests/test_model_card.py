"""What a model card says, and what nothing that is published may say."""

from typing import Any

import huggingface_hub
import pytest
import yaml

from latentlm_core import hub

CONFIG = {"format": "latentlm", "kind": "generator", "classes": ["zero", "one"]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/x", "x"),
        ("cifar10:/home/me/x", "cifar10:x"),
        ("imagenet:/home/my data/x", "imagenet:x"),
        ("folder:C:\\Users\\me\\x", "folder:x"),
        ("//home/me/x", "x"),
        ("~/me/x", "x"),
        ("the file '/home/me/w.pth', which", "the file 'w.pth', which"),
        ("hf:someone/digits", "hf:someone/digits"),
        ("see https://huggingface.co/someone/digits", "see https://huggingface.co/someone/digits"),
        ("cat/dog and 1 / 2", "cat/dog and 1 / 2"),
    ],
)
def test_what_is_published_names_no_place_on_this_machine(text: str, shown: str) -> None:
    assert hub.public({"a": [text, 3]}) == {"a": [shown, 3]}


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"values": 3},
        {"best": {}, "metric": "fid"},
        {"values": {}, "protocol": []},
        {"values": {}, "warnings": 1},
    ],
)
def test_what_a_card_cannot_show_is_no_report(value: Any) -> None:
    assert not hub.is_report(value)
    assert hub.is_report({"values": {"fid": 1.0}})


# --- the card --------------------------------------------------------------------------------


def test_the_card_states_kind_use_figures_and_protocol() -> None:
    reports = [
        {
            "values": {"fid": 12.345678, "is_std": 0.1},
            "protocol": {"num_samples": 500, "reference": "mnist", "weights_file": "/home/me/w.pt"},
            "warnings": ["500 images are few."],
        },
        {
            "best": {"guidance_scale": 1.5, "num_inference_steps": 20, "fid": 7.0},
            "metric": "kid[digits]",
            "rows": [],
        },
    ]
    card = hub.model_card(CONFIG, reports, "someone/digits")
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head) == {
        "library_name": "latentlm",
        "tags": ["latentlm", "class-conditional-image-generation"],
        "metrics": ["fid"],
    }
    for part in (
        "latentlm sample --model someone/digits --class 0",
        "### fid\n\nnum_samples 500; reference mnist",
        "| fid | 12.35 |",
        "- 500 images are few.",
        "### kid[digits]",
        "| guidance_scale | 1.5 |",
        '"weights_file": "w.pt"',
        '"format": "latentlm"',
    ):
        assert part in body, part
    assert "/home/me" not in card


def test_the_card_of_an_unmeasured_tokenizer() -> None:
    card = hub.model_card({"kind": "sigma-vae"}, [], "someone/vae")
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert data["tags"] == ["latentlm", "sigma-vae"]
    assert "metrics" not in data
    assert "latentlm tokenize --vae someone/vae" in card
    assert "Nothing was measured" in card


def test_the_card_of_a_model_that_speaks() -> None:
    report = {"values": {"wer": 0.05}, "protocol": {"recogniser": "tiny.en"}}
    card = hub.model_card(CONFIG | {"speech": {"longest": 9}}, [report], "someone/speech")
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert (data["tags"], data["metrics"]) == (["latentlm", "text-to-speech"], ["wer"])
    for part in ("A text-to-speech model", "--text", "### wer\n\nrecogniser tiny.en"):
        assert part in card, part
    assert "image" not in card


@pytest.mark.parametrize(
    ("network", "media"), [("conv", "images"), ("spectral", "speech"), ("causal-conv", "speech")]
)
def test_the_card_of_a_tokenizer_says_of_what(network: str, media: str) -> None:
    config = {"kind": "sigma-vae", "tokenizer": {"network": {"kind": network}}}
    assert f"it turns {media} into" in hub.model_card(config, [], "someone/vae")
