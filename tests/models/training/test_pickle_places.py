"""The place of a class in a pickle is found, and nothing that the pickle names is imported, made or called."""

import argparse
import io
import os
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.training.pickle_places import place_of


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: object = "mark") -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def found(pickled: bytes, name: str = "posix.mkdir") -> str | None:
    return place_of(io.BytesIO(pickled), name)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (Bomb(), ""),
        ({"a": {"b": [1, Bomb()]}}, "a.b[1]"),
        ({"state": {0: {"exp_avg": Bomb()}}}, "state.0.exp_avg"),
        ((1, {Bomb()}), "[1][0]"),
        (argparse.Namespace(hook=[Bomb()]), "hook[0]"),
        ({"args": argparse.Namespace(hook=os.mkdir)}, "args.hook"),
        (OrderedDict(a=defaultdict(list, b=Bomb())), "a.b"),
        ({("odd", "key"): Bomb()}, ""),
        ({"a": 1}, None),
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_finds_the_place_of_a_value(value: Any, place: str | None, protocol: int) -> None:
    assert found(pickle.dumps(value, protocol)) == place


@pytest.mark.parametrize("protocol", range(6))
def test_runs_nothing(tmp_path: Path, protocol: int) -> None:
    assert found(pickle.dumps({"a": Bomb(tmp_path / "mark")}, protocol)) == "a"
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b'c__builtin__\neval\n(S\'open("mark", "w")\'\ntR.',
        b'(S\'open("mark", "w")\'\ni__builtin__\neval\n.',
        b'(c__builtin__\neval\nS\'open("mark", "w")\'\no.',
        b"cbuiltins\neval\n\x81.",
    ],
    ids=["REDUCE", "INST", "OBJ", "NEWOBJ of nothing"],
)
def test_runs_nothing_that_is_written_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    assert found(pickled, "builtins.eval") in ("", None)
    assert list(tmp_path.iterdir()) == []


def test_reads_several_pickles_in_a_row() -> None:
    assert found(pickle.dumps(1) + pickle.dumps([2]) + pickle.dumps({"a": Bomb()})) == "a"


@pytest.mark.parametrize(
    "nest",
    [
        lambda depth: b"\x80\x02" + b"]" * depth + b"cposix\nmkdir\nK\x01\x85Ra" + b"a" * (depth - 1) + b".",
        lambda depth: b"\x80\x02" + b"}X\1\0\0\0a" * depth + b"cposix\nmkdir\nK\x01\x85R" + b"s" * depth + b".",
    ],
    ids=["lists", "dictionaries"],
)
def test_a_deep_nest_costs_no_more_than_its_depth(nest: Callable[[int], bytes]) -> None:
    place = found(nest(100_000))
    assert place in ("[0]" * 100_000, ".".join("a" * 100_000))


def test_a_cycle_ends() -> None:
    cycle: list[Any] = []
    cycle += [cycle, Bomb()]
    assert found(pickle.dumps(cycle)) == "[1]"


@pytest.mark.parametrize("pickled", [b"", b"x", b"\x80\x02", pickle.dumps({"a": Bomb()})[:-5]])
def test_finds_nothing_in_a_damaged_pickle(pickled: bytes) -> None:
    assert found(pickled) is None
