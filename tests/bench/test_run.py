"""A stopped report resumes after its finished sections."""

from pathlib import Path
from typing import Any

from bench.load import WrongAnswers
from bench.run import measure
from models.training.work_cache import WorkCache


def test_does_not_repeat_a_finished_section(tmp_path: Path) -> None:
    runs: list[str] = []

    def section() -> dict[str, int]:
        runs.append("nets")
        first["failures"]["mosec"] = "did not start"
        return {"rows": 3}

    first: dict[str, Any] = {"failures": {}}
    again: dict[str, Any] = {"failures": {}}
    for figures in (first, again):
        measure("nets", section, figures, WorkCache(tmp_path), ("plan",))
    assert runs == ["nets"]
    assert first == again == {"nets": {"rows": 3}, "failures": {"mosec": "did not start"}}
    measure("nets", section, again, WorkCache(tmp_path), ("another plan",))
    assert len(runs) == 2


def test_repeats_a_section_with_a_wrong_answer(tmp_path: Path) -> None:
    def wrong() -> None:
        raise WrongAnswers("0.5 from torch's answer")

    figures: dict[str, Any] = {"failures": {}}
    measure("rows", wrong, figures, WorkCache(tmp_path), ())
    assert figures == {"failures": {"rows": "0.5 from torch's answer"}}
    assert not list(tmp_path.iterdir())
