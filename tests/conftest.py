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
