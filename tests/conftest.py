from functools import partial
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """Read one golden file of the published code: (tensors, weights under published names)."""
    from safetensors.torch import load_file

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        path = SHARED / "golden" / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"the golden file {path.name} is not beside this checkout")
        tensors = load_file(path)
        weights = {k.removeprefix("weight."): v for k, v in tensors.items() if "weight." in k[:7]}
        return {k: v for k, v in tensors.items() if not k.startswith("weight.")}, weights

    return read


@pytest.fixture
def shared_data():
    """A folder of ../shared/data, or a skip that says so."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.is_dir():
            pytest.skip(f"the data set {name} is not beside this checkout")
        return path

    return find


@pytest.fixture(scope="module")
def extractor():
    """A small network with random weights: distances on its features are distances all the same."""
    from tests.tiny_evaluation import random_extractor

    return random_extractor(seed=0)


@pytest.fixture(scope="module")
def random_lpips():
    """LPIPS on a backbone with random weights, or a skip that says what is missing."""
    pytest.importorskip("lpips", reason="the extra lpips is not installed")
    from latentlm_core.tokenizers.lpips import LPIPS

    return LPIPS("alex")


@pytest.fixture(scope="session")
def multimodal_home(tmp_path_factory):
    """A workspace of tiny models of text and images; what tests write goes elsewhere."""
    from tests.tiny_multimodal import make_home

    return make_home(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tiny tokenizers with their exports, by posterior kind."""
    from latentlm_core.tokenizers.base import PosteriorKind
    from tests.tiny_latents import export_tokenizer

    kinds = PosteriorKind.GAUSSIAN, PosteriorKind.LEARNED
    return {kind: export_tokenizer(kind, tmp_path_factory.mktemp("export")) for kind in kinds}


@pytest.fixture
def encode(tokenizers, tmp_path):
    """``encode(place, source, kind, **options)`` makes a set of latents in tmp_path/PLACE/set."""
    from tests.tiny_latents import encode_below

    return partial(encode_below, tmp_path, tokenizers)
