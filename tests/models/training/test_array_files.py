"""Arrays are read as numpy reads them, from any place of a file; nothing is unpickled, and damage is named."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.training import array_files
from models.training.array_files import ArrayFile, BadArrays

RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "vectors": RANDOM.standard_normal((array_files.BLOCK + 3, 4)).astype(np.float32),
    "columns": np.asfortranarray(RANDOM.standard_normal((9, 4))),
    "texts": np.array(["one", "zwei ä🙂", ""]),
    "bytes": np.array([b"a", "ä".encode()]),
    "numbers": np.array([1.5, np.nan, 2.0], np.float16),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
}


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


@pytest.fixture(params=[np.savez, np.savez_compressed])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    request.param(tmp_path / "x.npz", **ARRAYS)
    return tmp_path / "x.npz"


def test_every_array_is_the_one_that_was_saved(path: Path, tmp_path: Path) -> None:
    file = ArrayFile(path, tmp_path)
    assert set(file.names) == ARRAYS.keys()
    # All are opened before the first is read.
    for (name, found), right in zip([(name, file[name]) for name in ARRAYS], ARRAYS.values(), strict=True):
        blocks = list(found.blocks())
        assert (found.name, found.shape, found.dtype) == (name, right.shape, right.dtype)
        assert all(len(block) <= array_files.BLOCK for block in blocks)
        assert np.array_equal(np.concatenate([right[:0], *blocks]), right, equal_nan=right.dtype.kind == "f")


def test_rows_are_taken_in_any_order(path: Path, tmp_path: Path) -> None:
    rows = ArrayFile(path, tmp_path)["vectors"].rows()
    which = np.array([array_files.BLOCK + 2, 0, 17, 17])
    assert np.array_equal(rows.take(which), ARRAYS["vectors"][which])


def test_values_are_python_values_and_nan_is_none(path: Path, tmp_path: Path) -> None:
    file = ArrayFile(path, tmp_path)
    assert [file[name].values() for name in ("texts", "bytes", "numbers", "flags")] == [
        ["one", "zwei ä🙂", ""],
        ["a", "ä"],
        [1.5, None, 2.0],
        [True, False],
    ]
    with pytest.raises(BadArrays, match=r"x.npz: `vectors` is float32 \(4099, 4\); expected one text"):
        file["vectors"].values()


def test_texts_are_on_disk(path: Path, tmp_path: Path) -> None:
    texts = ArrayFile(path, tmp_path)["texts"].texts(tmp_path / "spool")
    assert list(texts) == ["one", "zwei ä🙂", ""]
    assert (tmp_path / "spool").read_bytes() == "onezwei ä🙂".encode()


def test_a_npy_file_has_one_array_without_a_name(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ARRAYS["vectors"])
    file = ArrayFile(tmp_path / "x.npy", tmp_path)
    assert file.names == ("",)
    assert np.array_equal(np.concatenate(list(file[""].blocks())), ARRAYS["vectors"])


def test_a_structured_array_is_one_array_for_each_field(tmp_path: Path) -> None:
    bank = np.zeros(3, [("vectors", np.float32, (4,)), ("doc_id", np.int64)])
    bank["vectors"], bank["doc_id"] = np.ones(4), [7, 8, 9]
    np.save(tmp_path / "x.npy", bank)
    file = ArrayFile(tmp_path / "x.npy", tmp_path)
    assert (file.names, file.shape("vectors")) == (("vectors", "doc_id"), (3, 4))
    assert np.array_equal(file["vectors"].rows().take(slice(1, 3)), np.ones((2, 4)))
    assert file["doc_id"].values() == [7, 8, 9]


def test_python_objects_are_refused_by_name_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", texts=np.array([Bomb()], object), ids=np.arange(3))
    file = ArrayFile(Path("x.npz"), tmp_path)
    assert file["ids"].values() == [0, 1, 2]
    with pytest.raises(BadArrays, match=r"x.npz: `texts` holds pickled Python objects.*texts=numpy.array"):
        file["texts"]
    np.save("bank.npy", np.array({"vectors": Bomb()}, object), allow_pickle=True)
    with pytest.raises(BadArrays, match=r"bank.npy holds pickled Python objects, which are never loaded"):
        ArrayFile(Path("bank.npy"), tmp_path)[""]
    Path("raw.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadArrays, match=r"raw.npy: is a pickle, which is never loaded"):
        ArrayFile(Path("raw.npy"), tmp_path)
    assert not Path("bomb-went-off").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "neither a .npz nor a .npy"),
        (b"PK\x03\x04 no archive", "damaged: File is not a zip file"),
        (b"\x93NUMPY\x01\x00\xff", "damaged header"),
        (b"\x93NUMPY\x09\x00" + b" " * 99, "damaged header"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(BadArrays, match=f"x.npz: .*{message}"):
        ArrayFile(tmp_path / "x.npz", tmp_path)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((99, 4)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(BadArrays, match=r"shorter than float64 \(99, 4\) needs"):
        ArrayFile(tmp_path / "x.npy", tmp_path)[""].rows()


def test_an_archive_without_arrays_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(BadArrays, match="holds no array"):
        ArrayFile(tmp_path / "x.npz", tmp_path)
    np.savez(tmp_path / "y.npz", a=1, b=2)
    with pytest.raises(BadArrays, match="no array 'c'; it has a, b"):
        ArrayFile(tmp_path / "y.npz", tmp_path)["c"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans(), small=st.booleans())
def test_damage_raises_only_bad_arrays(tmp_path: Path, share: float, bit: int, cut: bool, small: bool) -> None:
    save: Callable[..., None] = np.savez_compressed if small else np.savez
    right = {name: array for name, array in ARRAYS.items() if name != "vectors"}
    save(tmp_path / "x.npz", **right)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    place = int(share * len(data))
    data[place] ^= 1 << bit
    (tmp_path / "x.npz").write_bytes(bytes(data[:place] if cut else data))
    try:
        file = ArrayFile(tmp_path / "x.npz", tmp_path)
        for name in file.names:
            list(file[name].blocks())
    except BadArrays:
        return
