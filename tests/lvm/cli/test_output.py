"""Files that the commands write are whole, and keep what stood there if they cannot be."""

import os
import threading
from pathlib import Path

import pytest

from lvm.cli.output import check_place, write_file


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report ü.json"
    write_file(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "half" * 100_000 + "\udc80")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    write_file(path, "sécond")
    assert path.read_text(encoding="utf-8") == "sécond"


def test_a_link_and_a_pipe_are_written_to_and_stay(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_file(pipe, "text")
    reader.join()
    assert got == ["text"]


def test_a_place_is_refused_if_no_file_can_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "file")
    check_place(tmp_path / "new")
    for place, kind in ((tmp_path, IsADirectoryError), (tmp_path / "nowhere" / "new", FileNotFoundError)):
        with pytest.raises(kind):
            check_place(place)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]
