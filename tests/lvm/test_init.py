"""What callers import, and what that needs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import lvm
import lvm.client
import lvm.errors
from tests.conftest import PATIENCE_S, ROOT


def test_lvm_exports_the_clients_and_their_error() -> None:
    assert (lvm.Client, lvm.AsyncClient) == (lvm.client.Client, lvm.client.AsyncClient)
    assert lvm.ServiceError is lvm.errors.ServiceError
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = lvm.Server


@pytest.mark.parametrize("name", ["client", "errors"])
def test_the_old_module_warns_and_has_the_same_names(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"service.{name} is deprecated: import lvm.{name} instead"):
        old = importlib.import_module(f"service.{name}")
    assert old.ServiceError is lvm.ServiceError


def test_the_client_imports_neither_the_server_nor_its_packages() -> None:
    code = (
        "import sys, lvm; lvm.Client\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*(loaded & {'service', 'models', 'fastapi', 'orjson', 'uvicorn', 'typer', 'pydantic'}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (ended.stdout.strip(), ended.stderr) == ("", "")
