"""Settings: read from the environment, validated, immutable."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from models.cores import cores
from service.settings import BadSettings, Settings, read_settings, unknown_settings


def test_arguments_take_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVM_MAX_BATCH", "7")
    monkeypatch.setenv("LVM_SLO_MS", "1,2.5")
    monkeypatch.setenv("LVM_PORT", "9000")
    known = read_settings(port=1)
    assert (known.max_batch, known.slo_ms, known.port) == (7, (1, 2.5), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LVM_MAX_BATCH", "0"),
        ("LVM_PORT", "many"),
        ("LVM_DEVICE", "tpu"),
        ("LVM_WORKERS", "all"),
        ("LVM_MILVUS_URI", "a.db"),
    ],
)
def test_rejects_an_invalid_value_and_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings, match=name):
        read_settings()


def test_auto_workers_are_as_many_as_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVM_WORKERS", "auto")
    assert read_settings().workers == cores()


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = read_settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(f"LVM_{name.upper()}", "")
    assert read_settings() == unset


def test_finds_unknown_variables_with_the_closest_setting() -> None:
    known = [f"LVM_{name.upper()}" for name in Settings.model_fields]
    by_kubernetes = ["LVM_SERVICE_HOST", "LVM_SERVICE_PORT_HTTP", "LVM_PORT_8000_TCP_ADDR"]
    environment = [*known, *by_kubernetes, "LVM_TOKEN", "HOME", "LVM_WORKER", "LVM_TOKEN_FILE"]
    assert [*unknown_settings(environment)] == [("LVM_TOKEN_FILE", "LVM_TOKENS_FILE"), ("LVM_WORKER", "LVM_WORKERS")]


@pytest.mark.skipif(find_spec("pymilvus") is not None, reason="the extra is installed")
def test_rejects_milvus_without_its_extra_and_names_the_command_to_install_it() -> None:
    with pytest.raises(BadSettings, match=r"LVM_MILVUS_URI: .*\[milvus\]"):
        read_settings(milvus_uri="http://milvus:19530")


def test_every_setting_has_a_default_and_a_description() -> None:
    assert all(field.description and not field.is_required() for field in Settings.model_fields.values())
