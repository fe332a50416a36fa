"""A stranger's file is read as plain values or refused with a reason; nothing runs, and memory is bounded."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import resource
import socket
import struct
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.registry.checkpoint import BadCheckpoint
from models.training.safe_torch_load import safe_load

NEW_YEAR = datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC)
HARMLESS: dict[str, tuple[Any, Any]] = {
    "float64": (np.float64(1.5), 1.5),
    "float32": (np.float32(0.5), 0.5),
    "float16": (np.float16(0.25), 0.25),
    "int64": (np.int64(-3), -3),
    "uint8": (np.uint8(200), 200),
    "bool": (np.bool_(True), True),
    "big-endian": (np.dtype(">f8").type(2.5), 2.5),
    "path": (pathlib.PosixPath("/a/b"), pathlib.PurePosixPath("/a/b")),
    "path of Windows": (pathlib.PureWindowsPath("C:/a"), pathlib.PureWindowsPath("C:/a")),
    "namespace": (argparse.Namespace(lr=1, out=Path("/x")), argparse.Namespace(lr=1, out=pathlib.PurePosixPath("/x"))),
    "simple namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=1)),
    "datetime": (
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    ),
    "date": (datetime.date(2026, 1, 2), datetime.date(2026, 1, 2)),
    "timedelta": (datetime.timedelta(1), datetime.timedelta(1)),
    "defaultdict": (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    "defaultdict of numbers": (collections.defaultdict(float, {"a": np.float64(1)}), {"a": 1.0}),
    "ordered": (collections.OrderedDict(a=1), {"a": 1}),
    "counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "deque": (collections.deque([1, 2], maxlen=9), [1, 2]),
    "set": ({1, 2}, {1, 2}),
    "frozenset": (frozenset([1]), frozenset([1])),
    "range": (range(3), range(3)),
    "slice": (slice(1, 2), slice(1, 2)),
    "complex": (1j, 1j),
    "bytes": (b"\xff", b"\xff"),
    "version of torch": (torch.__version__, str(torch.__version__)),
}


@pytest.mark.parametrize(("value", "expected"), HARMLESS.values(), ids=HARMLESS)
def test_reads_harmless_values_as_plain_ones(tmp_path: Path, value: Any, expected: Any) -> None:
    torch.save({"a": [value], "w": torch.ones(3)}, tmp_path / "x.pt")
    read = safe_load(tmp_path / "x.pt")
    assert read["a"] == [expected]
    assert torch.equal(read["w"], torch.ones(3))


@pytest.mark.parametrize("value", [np.zeros(3), np.array(["a", None], object), np.dtype("f8"), np.dtype([("a", "f4")])])
def test_reads_past_arrays_and_types_of_numpy(tmp_path: Path, value: Any) -> None:
    torch.save({"a": value, "w": torch.ones(3)}, tmp_path / "x.pt")
    assert torch.equal(safe_load(tmp_path / "x.pt")["w"], torch.ones(3))


class Strange:
    """A class that nobody knows to be harmless."""


@pytest.mark.parametrize(
    ("saved", "where"),
    [
        ({"args": {"callback": [1, Strange()]}}, "`args.callback[1]` holds a"),
        ({"args": argparse.Namespace(hook=Strange)}, "`args.hook` holds a"),
        ({"args": (Strange(),), "w": torch.ones(3)}, "`args[0]` holds a"),
        (Strange(), "it holds a"),
    ],
)
def test_rejects_names_a_class_that_and_where_it_stands(tmp_path: Path, saved: Any, where: str) -> None:
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint) as refused:
        safe_load(tmp_path / "x.pt")
    assert f"x.pt: {where} `{Strange.__module__}.Strange`" in str(refused.value)
    assert "damaged" not in str(refused.value)


def test_names_a_class_of_an_old_file_and_its_place_too(tmp_path: Path) -> None:
    torch.save({"a": [Strange()]}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadCheckpoint, match=r"`a\[0\]` holds a `.*Strange`"):
        safe_load(tmp_path / "x.pt")


def test_names_the_place_of_a_module_in_an_old_file(tmp_path: Path) -> None:
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadCheckpoint, match=r"`net` holds a `torch\.nn\.modules\.linear\.Linear`"):
        safe_load(tmp_path / "x.pt")


@pytest.mark.parametrize("module", ["lightning.fabric.utilities.data", "pytorch_lightning.utilities.parsing"])
def test_reads_hyper_parameters_of_lightning_as_a_dictionary(rewritten: Callable[..., Path], module: str) -> None:
    made = f"c{module}\nAttributeDict\n".encode() + b")\x81X\2\0\0\0lrK\1s"
    assert safe_load(rewritten(pickle=pickled(made))) == {"lr": 1}


def test_rejects_a_program_with_what_to_save_instead(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/net.py"):
            archive.writestr(name, b"")
    with pytest.raises(BadCheckpoint, match="a TorchScript archive, which holds a program; save the state dictionary"):
        safe_load(tmp_path / "x.pt")


def test_rejects_the_tar_format_by_its_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(BadCheckpoint, match=r"the tar format of torch before 0\.2; load it with torch and save"):
        safe_load(tmp_path / "x.pt")


def test_rejects_a_newer_protocol_by_its_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(BadCheckpoint, match=r"a pickle of protocol 4 or 5; expected 2, the default of torch\.save"):
        safe_load(tmp_path / "x.pt")


def test_rejects_a_whole_module_with_what_to_save_instead(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"it holds a `torch\.nn\..*Linear`.*save the state dictionary"):
        safe_load(tmp_path / "x.pt")


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"a safetensors file, expected what torch\.save wrote"):
        safe_load(tmp_path / "x.pt")


# What is no file


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (Path.mkdir, "a directory"),
        (listen, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_does_not_wait_for_an_irregular_file(tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    make(tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=f"is {kind}, expected a regular file"):
        safe_load(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x02.", b"x" * 100, b"\x80\x02]" + b"]" * 10_000 + b"a."])
def test_rejects_a_file_that_is_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(BadCheckpoint):
        safe_load(tmp_path / "x.pt")


def test_reports_a_damaged_pickle_on_one_line_without_advice_to_trust_it(rewritten: Callable[..., Path]) -> None:
    with pytest.raises(BadCheckpoint, match=r"damaged \(UnpicklingError: .+\)$") as refused:
        safe_load(rewritten(pickle=b"\x80\x02\x93."))
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)


# Archives that mean harm


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a whole checkpoint's members anew, some changed."""
    torch.save({"a": torch.ones(3)}, tmp_path / "whole.pt")
    members = members_of(tmp_path / "whole.pt")

    def write(method: int = zipfile.ZIP_STORED, **changes: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "x.pt", "w", method) as archive:
            for name, data in members.items():
                archive.writestr(name, changes.get(name.partition("/")[2].replace("data.pkl", "pickle"), data))
        return tmp_path / "x.pt"

    return write


def test_an_archive_that_was_written_anew_is_read(rewritten: Callable[..., Path]) -> None:
    assert torch.equal(safe_load(rewritten())["a"], torch.ones(3))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rejects_a_compressed_member_without_reading_it(rewritten: Callable[..., Path], method: int) -> None:
    with pytest.raises(BadCheckpoint, match=r"member '.*' is compressed; torch\.save stores"):
        safe_load(rewritten(method))


def test_rejects_overlapping_members(rewritten: Callable[..., Path]) -> None:
    """Each entry of the directory names the same bytes again."""
    path = rewritten()
    data = path.read_bytes()
    end = len(data) - 22
    count, size, place = struct.unpack_from("<HLL", data, end + 10)
    many = 2000
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, many * count, many * count, many * size, place, 0)
    path.write_bytes(data[:place] + data[place:end] * many + last)
    with pytest.raises(BadCheckpoint, match=r"its members say they have \d+ bytes, the file has room for"):
        safe_load(path)


def test_rejects_a_huge_pickle(rewritten: Callable[..., Path]) -> None:
    with pytest.raises(BadCheckpoint, match="bytes beside the tensors, expected at most"):
        safe_load(rewritten(pickle=b"\x80\x02" + b"(" * (9 << 20)))


@pytest.mark.parametrize("shift", [1, -1, 30])
def test_rejects_an_archive_on_which_readers_may_differ(rewritten: Callable[..., Path], shift: int) -> None:
    path = rewritten()
    data = bytearray(path.read_bytes())
    (place,) = struct.unpack_from("<L", data, len(data) - 6)
    struct.pack_into("<L", data, len(data) - 6, place + shift)
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="damaged archive"):
        safe_load(path)


@pytest.mark.parametrize(
    "spoil", [lambda data: b"x" * 50 + data, lambda data: data + b"x", lambda data: data + data[:30]]
)
def test_rejects_an_archive_with_something_around_it(
    rewritten: Callable[..., Path], spoil: Callable[[bytes], bytes]
) -> None:
    path = rewritten()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(BadCheckpoint):
        safe_load(path)


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def test_rejects_a_tensor_larger_than_its_bytes(rewritten: Callable[..., Path]) -> None:
    (data,) = (data for name, data in members_of(rewritten()).items() if name.endswith("data.pkl"))
    assert data.count(b"K\x03") == 2, "the size of the storage, and of the tensor"
    with pytest.raises(BadCheckpoint):
        safe_load(rewritten(pickle=data.replace(b"K\x03", b"J\x00\x00\x00\x70")))


def test_rejects_a_pickle_that_takes_memory_without_end(rewritten: Callable[..., Path]) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    gigabyte = b"cbuiltins\nbytearray\n" + b"J\x00\x00\x00\x40\x85R"
    with pytest.raises(BadCheckpoint, match="MemoryError"):
        safe_load(rewritten(pickle=pickled(b"](", gigabyte * 8, b"e")))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.made = call, arguments

    def __reduce__(self) -> Any:
        return self.made


def test_names_the_place_of_a_bomb(tmp_path: Path) -> None:
    """torch allows no replacement for functions of `os`, so they are found by a second reading."""
    for archive in (True, False):
        saved = {"optimizer_state_dict": {"state": {0: {"step": Bomb(os.mkdir, str(tmp_path / "mark"))}}}}
        torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=archive)
        with pytest.raises(BadCheckpoint, match=r"`optimizer_state_dict\.state\.0\.step` holds a `posix\.mkdir`"):
            safe_load(tmp_path / "x.pt")
    assert not (tmp_path / "mark").exists()


def test_reads_a_deep_nest(rewritten: Callable[..., Path]) -> None:
    nest = b"}X\1\0\0\0a" * 10_000 + b"K\1" + b"s" * 10_000
    assert list(safe_load(rewritten(pickle=pickled(nest)))) == ["a"]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_nothing_runs(tmp_path: Path, rewritten: Callable[..., Path], protocol: int) -> None:
    mark = tmp_path / "mark"
    for bomb in (Bomb(os.mkdir, str(mark)), Bomb(eval, f"open({str(mark)!r}, 'w')"), Bomb(io.open, str(mark), "w")):
        for saved in (bomb, {"a": bomb}, [bomb]):
            with pytest.raises(BadCheckpoint):
                safe_load(rewritten(pickle=pickle.dumps(saved, protocol)))
    assert not mark.exists()
