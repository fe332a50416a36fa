"""A trial chooses the fastest runtime that keeps the answers; a machine remembers the choice of a version."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from models.predictor import build_predictor, load_net
from models.registry.checkpoint import BadCheckpoint, Checkpoint
from models.registry.registry import Registry, Version
from models.runtimes import NoSuchPrecision, Runtime
from models.trial import MAX_SCORE_CHANGE, TRIED, Choice, choose, choose_for
from models.vectors import Floats
from tests.conftest import SHIPPED

CONTEXTS = np.zeros((32, 5, 4), np.float32)
NAMES = ("reference", "one", "two", "last")


class Clock:
    """A clock that only runs while a runtime does."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A runtime that takes `call` seconds, and `row` for each row."""

    name, on_cpu, sizes = "fake", True, ()

    def __init__(self, clock: Clock, call: float, row: float, score: float = 0.5) -> None:
        self.score = score
        self._clock, self._call, self._row = clock, call, row

    def run(self, contexts: Floats) -> Floats:
        self._clock.now += self._call + self._row * len(contexts)
        return contexts[:, 0]


def chosen(clock: Clock, known: Mapping[str, Fake | Exception]) -> Choice:
    def open_one(name: str) -> Runtime:
        found = known[name]
        if isinstance(found, Exception):
            raise found
        return found

    def score(runtime: Runtime) -> float:
        assert isinstance(runtime, Fake)
        return runtime.score

    return choose(NAMES, open_one, CONTEXTS, score, clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_fastest_is_chosen(clock: Clock) -> None:
    known = {"reference": Fake(clock, 8, 2), "one": Fake(clock, 8, 1), "two": Fake(clock, 4, 1)}
    choice = chosen(clock, known)
    assert choice.precision == "two"
    seconds = {tried.precision: tried.seconds for tried in choice.tried}
    assert seconds == {
        "reference": {"1": 10, "32": 72},
        "one": {"1": 9, "32": 40},
        "two": {"1": 5, "32": 36},
        "last": {},
    }


def test_a_gain_in_one_size_does_not_make_up_for_a_larger_loss_in_another(clock: Clock) -> None:
    known = {"reference": Fake(clock, 8, 2), "one": Fake(clock, 40, 1), "two": Fake(clock, 1, 6)}
    assert chosen(clock, known).precision == "reference"


def test_a_gain_within_noise_changes_nothing(clock: Clock) -> None:
    known = {"reference": Fake(clock, 8, 2), "one": Fake(clock, 7.8, 1.95), "two": Fake(clock, 8, 2)}
    assert chosen(clock, known).precision == "reference"


@pytest.mark.parametrize("error", [NoSuchPrecision("not installed"), BadCheckpoint("cosine"), RuntimeError("a bug")])
def test_a_runtime_that_fails_is_rejected_with_the_reason(clock: Clock, error: Exception) -> None:
    choice = chosen(clock, {"reference": Fake(clock, 8, 2), "one": error, "two": Fake(clock, 8, 1)})
    assert choice.precision == "two"
    assert choice.tried[1].rejected == str(error)


@pytest.mark.parametrize("change", [-2 * MAX_SCORE_CHANGE, 2 * MAX_SCORE_CHANGE, float("nan")])
def test_a_runtime_that_changes_the_score_is_rejected(clock: Clock, change: float) -> None:
    known = {"reference": Fake(clock, 8, 2), "one": Fake(clock, 1, 1, 0.5 + change), "two": Fake(clock, 8, 2)}
    choice = chosen(clock, known)
    assert choice.precision == "reference"
    assert "changes the score" in (choice.tried[1].rejected or "")


def test_the_last_is_tried_only_if_all_between_are_rejected(clock: Clock) -> None:
    missing, fast = NoSuchPrecision("not here"), Fake(clock, 1, 1)
    known = {"reference": Fake(clock, 8, 2), "one": missing, "two": missing, "last": fast}
    assert chosen(clock, known).precision == "last"
    assert chosen(clock, {**known, "one": Fake(clock, 7, 1)}).precision == "one"


def test_a_reference_that_fails_is_an_error(clock: Clock) -> None:
    with pytest.raises(BadCheckpoint):
        chosen(clock, {"reference": BadCheckpoint("altered")})


# Versions


@pytest.fixture(scope="module")
def shipped() -> Version:
    return Registry(SHIPPED).resolve("primary")


@pytest.fixture(scope="module")
def checkpoint(shipped: Version) -> Checkpoint:
    return load_net(shipped.path)


def test_a_choice_serves_and_is_made_once(shipped: Version, checkpoint: Checkpoint, tmp_path: Path) -> None:
    choice, is_new = choose_for(shipped, checkpoint, tmp_path / "new")
    assert is_new
    assert [tried.precision for tried in choice.tried] == list(TRIED)
    assert choice.tried[0].score_change == 0.0  # the card has a score on the shipped corpus
    assert build_predictor(checkpoint, "cpu", 1, choice.precision).predict_batch(checkpoint.golden_context).any()
    assert choose_for(shipped, checkpoint, tmp_path / "new") == (choice, False)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"precision": "fp4", "tried": []}', '{"precision": "float32", "tried": [1]}']
)
def test_a_file_that_cannot_be_read_is_replaced(gru_version: Version, tmp_path: Path, text: str) -> None:
    net = load_net(gru_version.path)
    choose_for(gru_version, net, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert choose_for(gru_version, net, tmp_path)[1]
    assert file.read_text() != text


def test_a_directory_that_cannot_be_written_is_no_outage(gru_version: Version, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert choose_for(gru_version, load_net(gru_version.path), tmp_path / "file")[1]
