"""LPIPS: the distance of its package, and backbones from files that are not trusted."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentlm_core.errors import ArtifactError, CorruptFileError
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.lpips import LPIPS, find_backbone, load_lpips
from tests.tiny_vae_task import batch


def test_lpips_agrees_with_its_package(random_lpips: LPIPS) -> None:
    x, y = batch(2, 64).media, batch(2, 64).media.flip(3)
    distance = random_lpips(x, y)
    assert distance.shape == (2,)
    torch.testing.assert_close(distance, random_lpips.distance(x, y).flatten())
    assert torch.equal(random_lpips(x, x), torch.zeros(2))


def test_lpips_enlarges_small_images(random_lpips: LPIPS) -> None:
    x, y = batch(2, 16).media, batch(2, 16).media.flip(3)
    large = [nn.functional.interpolate(m, (64, 64), mode="bilinear") for m in (x, y)]
    torch.testing.assert_close(random_lpips(x, y), random_lpips(*large))


def test_lpips_is_frozen_and_differentiable_where_features_die(random_lpips: LPIPS) -> None:
    assert not any(weight.requires_grad for weight in random_lpips.parameters())
    x = batch(1, 64).media
    random_lpips(x.requires_grad_(), x.detach().flip(3)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    dead = random_lpips.distance.net.slice3[-1].register_forward_hook(lambda *a: a[2] * 0)
    black = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    random_lpips(black, x.detach()).sum().backward()
    dead.remove()
    assert black.grad is not None
    assert black.grad.isfinite().all()


def test_lpips_stays_in_float32_under_autocast(random_lpips: LPIPS) -> None:
    x, y = batch(1, 64).media, batch(1, 64).media.flip(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_lpips(x, y), random_lpips(x.float(), y.float()))
        assert random_lpips(x.bfloat16(), y).dtype == torch.float32


def test_lpips_with_real_weights_ranks_distortions() -> None:
    pytest.importorskip("lpips", reason="the extra lpips is not installed")
    try:
        find_backbone("alex", offline=True)
    except ArtifactError as error:
        pytest.skip(str(error))
    lpips = load_lpips("alex", offline=True)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    picture = torch.stack([torch.sin(3 * x), torch.cos(4 * y), x * y])[None]
    noise = torch.randn(picture.shape, generator=generator("noise"))
    near, far = (lpips(picture, picture + s * noise).item() for s in (0.05, 0.5))
    assert 0.02 < near < 0.2
    assert 0.4 < far < 0.8


def test_lpips_says_when_no_weights_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="finds no vgg backbone") as caught:
        find_backbone("vgg", offline=True)
    assert "vgg16-397923af.pth" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match=r"no file .*mine\.pth"):
        find_backbone("vgg", tmp_path / "mine.pth")
    cached = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    assert find_backbone("vgg", offline=True) == cached


def _torchvision_file(lpips: LPIPS, path: Path) -> None:
    weights = lpips.distance.net.state_dict()
    torch.save({f"features.{name.split('.', 1)[1]}": t for name, t in weights.items()}, path)


def _jax_file(lpips: LPIPS, path: Path) -> None:
    convolutions = [m for m in lpips.distance.net.modules() if isinstance(m, nn.Conv2d)]
    layers = {
        f"Conv_{i}": {
            "kernel": layer.weight.permute(2, 3, 1, 0).numpy(),
            "bias": cast(Tensor, layer.bias).numpy(),
        }
        for i, layer in enumerate(convolutions)
    }
    content = pickle.dumps({"AlexNet_0": layers}, protocol=3)
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))


@pytest.mark.parametrize(
    ("name", "write"), [("alex.pth", _torchvision_file), ("alex.ckpt", _jax_file)]
)
def test_lpips_reads_both_kinds_of_backbone(
    name: str, write: Callable[[LPIPS, Path], None], random_lpips: LPIPS, tmp_path: Path
) -> None:
    write(random_lpips, tmp_path / name)
    lpips = load_lpips("alex", tmp_path / name)
    x, y = batch(1, 64).media, batch(1, 64).media.flip(3)
    assert torch.equal(lpips(x, y), random_lpips(x, y))
    assert lpips.weights_file == tmp_path / name


def test_a_pickle_that_names_code_is_refused(random_lpips: LPIPS, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Evil()}))
    (tmp_path / "cut.ckpt").write_bytes(pickle.dumps(np.zeros(9))[:20])
    for name in ("evil", "cut"):
        with pytest.raises(CorruptFileError, match=f"{name}.ckpt is damaged"):
            random_lpips.load_backbone(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "touched").exists()
