"""The packages that a machine without a package index lacks, as wheels that `make device-kit` downloads."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
# By module: the package. Without torch nothing can be measured; the others are of the service.
NEEDED: Mapping[str, str] = {
    "torch": "torch",
    "safetensors": "safetensors",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "psutil": "psutil",
    "yaml": "pyyaml",
    "typer": "typer",
    "rich": "rich",
    "httpx": "httpx",
    "uvloop": "uvloop",
    "xxhash": "xxhash",
    "prometheus_client": "prometheus-client",
    "annotated_types": "annotated-types",
    "dotenv": "python-dotenv",
    "fastapi": "fastapi",
    "fastapi_offline": "fastapi-offline",
    "httptools": "httptools",
    "opentelemetry": "opentelemetry-api",
    "orjson": "orjson",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "pydantic_settings": "pydantic-settings",
    "simdjson": "pysimdjson",
    "starlette": "starlette",
    "structlog": "structlog",
    "typing_inspection": "typing-inspection",
    "uvicorn": "uvicorn",
}


def missing() -> list[str]:
    """Return the packages that cannot be imported here."""
    return [package for module, package in NEEDED.items() if find_spec(module) is None]


def unpack(kit: Path, target: Path) -> None:
    """Unpack the wheels of `kit` into `target`, and what else this machine lacks.

    The version of the service is that of pyproject.toml. Without faiss an empty module stands for it: nets run, but
    nothing is searched.
    """
    for wheel in sorted(kit.glob("*.whl")):
        with ZipFile(wheel) as files:
            files.extractall(target)
    if not _is_installed("lvm-serve"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        facts = target / f"lvm_serve-{project['version']}.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lvm-serve\nVersion: {project['version']}\n")
    if find_spec("faiss") is None and not (target / "faiss").exists():
        (target / "faiss.py").write_text('"""Nothing is searched on this machine."""\n')


def environment(target: Path) -> dict[str, str]:
    """Return the environment of processes that find what is unpacked in `target`."""
    known = [os.environ[name] for name in ("PYTHONPATH",) if os.environ.get(name)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT), *known])}


def use(target: Path) -> None:
    """Let this process find what is unpacked in `target`."""
    sys.path.insert(0, str(target))


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
