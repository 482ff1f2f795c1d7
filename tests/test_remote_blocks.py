"""Row groups of other places: kept on this disk within a bound, shared, made anew when damaged."""

import datasets
import fsspec
import pytest

from latentlm_core.data.parquet_files import ParquetFiles
from latentlm_core.data.sources import open_source
from tests.tiny_streams import upload, write_images

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path):
    place = f"memory://{tmp_path.name}"
    upload(write_images(tmp_path / "set", 40), place)
    return place


@pytest.fixture
def fetched(monkeypatch):
    """Row groups that are fetched, as they are."""
    found, read = [], ParquetFiles._read_group

    def watched(self, group, columns):
        found.append((group.file, group.place))
        return read(self, group, columns)

    monkeypatch.setattr(ParquetFiles, "_read_group", watched)
    return found


def captions(url):
    source = open_source(f"stream:{url}")
    return [source[index].caption for index in range(40)]


def test_a_row_group_is_fetched_once_for_all(url, cache, fetched):
    expected = [f"number {index}" for index in range(40)]
    assert captions(url) == expected
    assert captions(url) == expected
    assert len(fetched) == len(set(fetched)) == len(list(cache.glob("blocks/*.arrow")))


def test_a_damaged_copy_is_made_anew(url, cache, fetched):
    captions(url)
    number = len(fetched)
    first, second = sorted(cache.glob("blocks/*.arrow"))[:2]
    first.write_bytes(first.read_bytes()[:50])
    second.write_bytes(b"")
    assert captions(url) == [f"number {index}" for index in range(40)]
    assert len(fetched) == number + 2


def test_a_file_that_changed_is_not_taken_for_its_former_self(url, tmp_path, fetched):
    captions(url)
    number = len(fetched)
    upload(write_images(tmp_path / "other", 40, start=100), url)
    assert captions(url) == [f"number {index}" for index in range(100, 140)]
    assert len(fetched) == 2 * number


def test_a_file_that_changed_is_told_by_its_footer_where_the_server_says_nothing(
    url, tmp_path, monkeypatch
):
    """As of web servers, of which fsspec knows no more than the address."""
    file_system = type(fsspec.url_to_fs(url)[0])
    monkeypatch.setattr(file_system, "ukey", lambda self, path: path)
    captions(url)
    upload(write_images(tmp_path / "other", 40, start=100), url)
    assert captions(url) == [f"number {index}" for index in range(100, 140)]


def test_copies_take_no_more_than_they_may(url, cache, monkeypatch):
    monkeypatch.setenv("LATENTLM_CACHE_GB", "0.00001")  # 10 kB
    assert captions(url) == [f"number {index}" for index in range(40)]
    assert 0 < sum(path.stat().st_size for path in cache.glob("blocks/*.arrow")) <= 10_000


def test_a_file_alone_is_a_set_too(url):
    assert len(open_source(f"stream:{url}/000.parquet")) == 13
    assert fsspec.url_to_fs(url)[0].exists(f"{url}/000.parquet")
