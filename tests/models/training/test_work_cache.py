"""A part is made once for the same inputs, is there whole or not at all, and goes when it is no longer wanted."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from models.training.work_cache import Input, WorkCache, cache_next_to, digest


def test_a_part_is_made_once_for_the_same_inputs(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> bytes:
        made.append("part")
        return b"%d" % len(made)

    parts = WorkCache(tmp_path / "parts")
    assert [
        parts.get_bytes(make, "a", np.arange(3)),
        WorkCache(tmp_path / "parts").get_bytes(make, "a", np.arange(3)),
    ] == [b"1", b"1"]
    assert parts.get_bytes(make, "a", np.arange(4)) == b"2"


def test_arrays_and_figures_come_back_as_they_were(tmp_path: Path) -> None:
    parts = WorkCache(tmp_path)
    for _ in range(2):
        found = parts.get_arrays(lambda: {"a": np.arange(6, dtype=np.int32).reshape(2, 3)}, "arrays")["a"]
        assert (found.dtype, found.tolist()) == (np.int32, [[0, 1, 2], [3, 4, 5]])
        assert parts.get_json(lambda: {"R@1": 0.1}, "figures") == {"R@1": 0.1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a",), ("a", "")),
        ((np.zeros((2, 3)),), (np.zeros((3, 2)),)),
        ((np.zeros(2, np.int32),), (np.zeros(2, np.float32),)),
        ((np.eye(2)[:, 0],), (np.eye(2)[:, 1],)),
    ],
)
def test_other_inputs_have_another_digest(one: tuple[Input, ...], other: tuple[Input, ...]) -> None:
    assert digest(*one) == digest(*one) != digest(*other)


def test_a_failed_step_leaves_no_part(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WorkCache(tmp_path).get_bytes(fail, "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "stay"), [(None, False), (ValueError, False), (OSError, True), (KeyboardInterrupt, True)]
)
def test_parts_stay_if_the_same_command_can_continue(
    tmp_path: Path, error: type[BaseException] | None, stay: bool
) -> None:
    parts = cache_next_to(tmp_path / "made")
    with contextlib.suppress(ValueError, OSError, KeyboardInterrupt), parts:
        parts.get_bytes(lambda: b"part", "a")
        if error:
            raise error
    assert (tmp_path / ".made.parts").exists() is stay
