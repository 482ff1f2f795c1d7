import os

import datasets
import numpy as np
import PIL.Image
import pytest

from latentlm_core.data.base import SkipLog, SkippedItem
from latentlm_core.data.sources import (
    hold_out,
    open_source,
    open_with_held_out,
    resolve_class,
)
from latentlm_core.errors import DataError, MissingExtraError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def write(tmp_path):
    """Write a small image of one grey value under tmp_path/data."""

    def one(name, value=0):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (4, 4), value).save(path)
        return path

    return one


def keys(source):
    return [source[index].key for index in range(len(source))]


def test_mnist_is_parted_by_class_and_padded():
    train, test = open_with_held_out("mnist")
    assert (len(train), len(test)) == (4000, 1000)
    assert train.classes == tuple("0123456789")
    assert not set(keys(train)) & set(keys(test))
    labels = [test[index].label for index in range(len(test))]
    assert np.bincount(labels).tolist() == [100] * 10
    example = train[400]
    assert (example.key, example.label) == ("0500", 1)
    assert example.image.shape == (32, 32, 3)
    assert (example.image[:2] == 0).all()
    assert (example.image[..., 0] == example.image[..., 2]).all()
    assert example.image.max() > 200


def test_mnist_names_the_extra_when_its_package_is_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="mnist") as caught:
        open_source("mnist")
    assert "latentlm[demo]" in caught.value.hint


def test_shapes_are_the_same_each_time_and_their_captions_are_true():
    source, held = open_source("embedded:shapes"), open_source("embedded:shapes", "test")
    assert (len(source), len(held)) == (256, 64)
    again = open_source("embedded:shapes")
    assert np.array_equal(source[9].image, again[9].image)
    assert not np.array_equal(source[0].image, held[0].image)
    for index in range(8):
        example = source[index]
        assert source.classes[example.label] in example.caption
        assert len(np.unique(example.image.reshape(-1, 3), axis=0)) >= 2
    white = next(source[i] for i in range(256) if source[i].caption.endswith("white background"))
    assert white.image[0, 0].tolist() == [245, 245, 245]


def test_class_tree_is_sorted_labelled_and_keyed_by_path(tmp_path, write):
    for name in ("b/2.png", "b/1.png", "a/x/deep.JPG", "ü/1.webp", ".hidden/1.png", "b/no.txt"):
        if name.endswith(".txt"):
            (tmp_path / "data" / name).write_text("not beside an image")
        else:
            write(name)
    (tmp_path / "data" / "empty").mkdir()
    source = open_source(str(tmp_path / "data"))
    assert keys(source) == ["a/x/deep.JPG", "b/1.png", "b/2.png", "ü/1.webp"]
    assert source.classes == ("a", "b", "empty", "ü")
    assert [source[index].label for index in range(4)] == [0, 1, 1, 3]
    assert keys(open_source(f"folder:{tmp_path / 'data'}")) == keys(source)


def test_flat_folder_has_no_classes_and_reads_captions(tmp_path, write):
    write("b.png"), write("a.png")
    (tmp_path / "data" / "a.txt").write_text("  ein Bär\n", "utf-8")
    source = open_source(f"folder:{tmp_path / 'data'}")
    assert source.classes == ()
    assert [(source[i].key, source[i].caption, source[i].label) for i in range(2)] == [
        ("a.png", "ein Bär", None),
        ("b.png", None, None),
    ]


def test_split_folders_are_found_and_agree_on_labels(tmp_path, write):
    write("train/a/1.png"), write("train/b/1.png"), write("val/b/2.png"), write("test/3.png")
    (tmp_path / "data" / "val" / "a").mkdir()
    train, held = open_with_held_out(str(tmp_path / "data"))
    assert keys(train) == ["a/1.png", "b/1.png"]
    assert [(held[0].key, held[0].label)] == [("b/2.png", 1)]
    assert train.classes == held.classes


def test_a_class_called_train_is_a_class(tmp_path, write):
    write("boat/1.png"), write("train/1.png")
    source = open_source(str(tmp_path / "data"))
    assert source.classes == ("boat", "train")
    with pytest.raises(DataError, match="has no split 'test'"):
        open_source(str(tmp_path / "data"), "test")


def test_a_loop_of_links_ends(tmp_path, write):
    write("a/1.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    PIL.Image.new("L", (4, 4)).save(elsewhere / "2.png")
    (tmp_path / "data" / "b").symlink_to(elsewhere)
    assert keys(open_source(str(tmp_path / "data"))) == ["a/1.png", "b/2.png"]


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX alone")
def test_names_that_are_no_text_become_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/data/\xff"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system refuses names that are no UTF-8")
    with open(folder + b"/1.png", "wb") as file:
        PIL.Image.new("L", (4, 4)).save(file, "PNG")
    source = open_source(str(tmp_path / "data"))
    assert (source[0].key, source.classes) == ("�/1.png", ("�",))


def test_a_broken_file_is_named_by_its_key(tmp_path, write):
    write("a/1.png").write_bytes(b"")
    source = open_source(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"^a/1\.png is empty\.$"):
        source[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnsit", "Did you mean mnist"),
        ("embedded:shape", "Did you mean embedded:shapes"),
        ("./nowhere", r"no folder \./nowhere"),
        ("folder:nowhere", "no folder nowhere"),
        ("folder:", "no data set 'folder:'"),
        ("hf:", "hf:ORG/NAME"),
        ("hf:a/b/c", "hf:ORG/NAME"),
        ("librispeech:nowhere", "is a set of recordings, and images are wanted"),
        ("cifar10:nowhere", r"no train-\*\.parquet in nowhere"),
        ("imagenet:nowhere", "no folder nowhere"),
        ("x" * 5000, "no data set"),
        ("a\0b", "no data set"),
    ],
)
def test_unknown_names_get_one_sentence(spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec)


def test_unknown_split_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no split 'trian'.*train"):
        open_source("mnist", "trian")
    with pytest.raises(DataError, match="holds no images"):
        open_source(str(tmp_path))


def parquet(path, images, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {"picture": datasets.Image()}
        | {
            name: datasets.ClassLabel(names=["no", "yes"]) if name == "truth" else kind
            for name, (kind, _) in columns.items()
        }
    )
    rows = {"picture": images} | {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def test_parquet_folder_finds_image_label_and_caption(tmp_path):
    images = [PIL.Image.new("RGB", (4, 4), (value, 0, 0)) for value in (5, 6)]
    parquet(
        tmp_path / "data" / "train-0.parquet",
        images,
        truth=(None, [1, -1]),
        text=(datasets.Value("string"), ["one", None]),
    )
    parquet(tmp_path / "data" / "test-0.parquet", images[:1], truth=(None, [0]))
    train, test = open_with_held_out(str(tmp_path / "data"))
    assert train.classes == ("no", "yes")
    assert [(train[i].label, train[i].caption, train[i].key) for i in range(2)] == [
        (1, "one", "00000000"),
        (None, None, "00000001"),
    ]
    assert train[1].image[0, 0].tolist() == [6, 0, 0]
    assert (len(test), test[0].label) == (1, 0)


def test_integer_labels_without_names_become_numbered_classes(tmp_path):
    images = [PIL.Image.new("L", (4, 4))] * 3
    parquet(tmp_path / "data" / "x.parquet", images, label=(datasets.Value("int64"), [2, 0, 2]))
    source = open_source(str(tmp_path / "data"))
    assert source.classes == ("0", "1", "2")
    assert [source[i].label for i in range(3)] == [2, 0, 2]


def test_damaged_or_foreign_parquet_is_one_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_source(str(tmp_path / "data"))
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "data" / "x.parquet"))
    with pytest.raises(DataError, match="no image column; it has: text"):
        open_source(str(tmp_path / "data"))


def test_a_set_of_the_datasets_library_opens_by_name(tmp_path, monkeypatch, write):
    """A local folder of the form ORG/NAME stands in for a repository on the hub."""
    for value, name in enumerate(("train/cat/1.png", "train/dog/1.png", "test/dog/2.png")):
        write(f"org/pets/{name}", value)
    monkeypatch.chdir(tmp_path / "data")
    train, test = open_with_held_out("hf:org/pets")
    assert (len(train), len(test)) == (2, 1)
    assert (train.classes, test[0].label) == (("cat", "dog"), 1)
    assert len(open_source("hf:org/pets:test")) == 1
    with pytest.raises(DataError, match=r"no split 'tset'\. Did you mean test"):
        open_source("hf:org/pets:tset")


def test_a_split_that_is_named_is_that_very_one(tmp_path, monkeypatch, write):
    for value, split in enumerate(("train", "validation", "test"), start=1):
        write(f"org/pets/{split}/cat/1.png", value)
    monkeypatch.chdir(tmp_path / "data")
    for spec, value in (("hf:org/pets:test", 3), ("hf:org/pets:validation", 2)):
        assert (open_source(spec)[0].image == value).all()
        with pytest.raises(DataError, match="has no split 'test'"):
            open_source(spec, "test")
    assert (open_source("hf:org/pets", "test")[0].image == 2).all()


def test_an_absent_hub_set_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hf:no-such-org/no-such-set cannot be loaded") as caught:
        open_source("hf:no-such-org/no-such-set")
    assert "hf auth login" in caught.value.hint


def test_cifar10_reads_the_shared_parquet_files(shared_data, monkeypatch):
    monkeypatch.setenv("LATENTLM_CIFAR10", str(shared_data("cifar10")))
    source = open_source("cifar10", "test")
    assert len(source) == 10_000
    assert source.classes[:2] == ("airplane", "automobile")
    assert source[0].image.shape == (32, 32, 3)
    assert sorted(source[i].label for i in range(0, 10_000, 1111)) != [0] * 10


def test_held_out_examples_are_spread_and_disjoint():
    source = open_source("embedded:shapes")
    rest, held = hold_out(source, every=20)
    assert (len(rest), len(held)) == (243, 13)
    assert set(keys(rest)) | set(keys(held)) == set(keys(source))
    assert rest.classes == source.classes


def test_classes_by_name_number_and_synonym():
    classes = ("tench, Tinca tinca", "Goldfish", "5")
    assert [resolve_class(classes, word) for word in (0, "1", "goldfish", "TINCA tinca")] == [
        *(0, 1, 1, 0)
    ]
    assert resolve_class(classes, "5") == 2
    assert resolve_class(classes, "tench, tinca tinca") == 0


@pytest.mark.parametrize("word", ["3", -1, 10**30, "²", "goldfsh", ""])
def test_unknown_classes_name_the_range_and_the_near_ones(word):
    with pytest.raises(DataError, match="classes are 0 to 1") as caught:
        resolve_class(("tench", "goldfish"), word)
    assert ("Did you mean goldfish" in str(caught.value)) == (word == "goldfsh")


def test_a_set_without_classes_says_so():
    with pytest.raises(DataError, match="no classes"):
        resolve_class((), "cat")


def broken(*indices):
    return [SkippedItem(index=index, reason=f"{index}.png is empty.") for index in indices]


def test_skip_log_counts_an_item_once_and_stops_above_its_bound():
    source = open_source("mnist")
    log = SkipLog(source)
    log.extend(broken(*range(40, 0, -1)))
    log.extend(broken(1, 2, 3))
    assert [item.index for item in log.items] == list(range(1, 41))
    with pytest.raises(DataError, match=r"41 of the 4000.*40 may be.*0\.png is empty; 1\.png"):
        log.extend(broken(0))


def test_skip_log_lets_ten_pass_in_a_small_set_but_not_all():
    source = open_source("embedded:shapes")
    SkipLog(source).extend(broken(*range(10)))
    with pytest.raises(DataError, match="11 of the 256"):
        SkipLog(source).extend(broken(*range(11)))
    _, held = hold_out(source, every=100)
    with pytest.raises(DataError, match="3 of the 3"):
        SkipLog(held).extend(broken(0, 1, 2))
