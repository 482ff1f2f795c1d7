"""Files and folders that are whole or not there."""

import os
from pathlib import Path

import pytest

from latentlm_core.errors import ArtifactError
from latentlm_core.files import write_folder


def write(folder: Path, text: str) -> None:
    with write_folder(folder) as part:
        (part / "text").write_text(text)


def test_a_folder_takes_the_place_of_the_one_that_was_there(tmp_path):
    write(tmp_path / "set", "old")
    write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_that_cannot_be_replaced_is_as_before(tmp_path, monkeypatch):
    write(tmp_path / "set", "old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name.endswith(".part"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ArtifactError, match="set cannot be written: Permission denied"):
        write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_a_block_that_fails_leaves_the_folder_as_before(tmp_path):
    write(tmp_path / "set", "old")
    with pytest.raises(ZeroDivisionError), write_folder(tmp_path / "set") as part:
        (part / "text").write_text(str(1 // 0))
    assert (tmp_path / "set" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]
