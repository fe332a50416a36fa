"""A loader serves a net in the precision of the settings, or in the one that is fastest here."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry, Version
from service.deploy.loading import ModelLoader
from service.settings import Settings
from tests.conftest import SHIPPED

Load = Callable[[Version], str]


@pytest.fixture(scope="module")
def amn_version() -> Version:
    return Registry(SHIPPED).resolve("primary")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that loads a net by LVM_PRECISION=auto, checks its answers and returns its runtime."""

    def loaded(version: Version) -> str:
        settings = Settings(device="cpu", threads=1, precision="auto", cache=tmp_path)
        predictor, checkpoint = ModelLoader(settings).load_predictor(version), load_checkpoint(version.path)
        assert np.allclose(predictor.predict_batch(checkpoint.golden_context), checkpoint.golden_vector, atol=0.02)
        return predictor.runtime

    return loaded


def test_the_choice_of_a_machine_is_kept(amn_version: Version, tmp_path: Path, load: Load) -> None:
    runtime = load(amn_version)
    (file,) = (tmp_path / "precision").iterdir()
    before = file.read_bytes()
    assert runtime.removeprefix("openvino-") in ("onnxruntime", "float32", "bf16", "int8")
    assert load(amn_version) == runtime
    assert file.read_bytes() == before


def test_a_choice_that_fails_now_is_replaced_by_float32(tmp_path: Path, load: Load) -> None:
    # Some processors do not compute in bf16, and on the others int8 does not keep the golden vectors of this net.
    version = Registry(SHIPPED).find("transformer")
    load(version)
    (file,) = (tmp_path / "precision").iterdir()
    choice = json.loads(file.read_bytes())
    rejected = {each["precision"]: each["rejected"] for each in choice["tried"] if each["rejected"]}
    failing = [precision for precision, reason in rejected.items() if "not tried" not in reason]
    file.write_text(json.dumps({**choice, "precision": failing[0]}))
    assert load(version) == "onnxruntime"


def test_a_choice_whose_temporary_file_has_no_room_is_replaced_by_float32(
    amn_version: Version, tmp_path: Path, load: Load
) -> None:
    load(amn_version)
    (file,) = (tmp_path / "precision").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "precision": "openvino-float32"}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert load(amn_version) == "onnxruntime"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
