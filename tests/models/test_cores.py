"""Cores: those of the affinity, or of the least CPU quota. The pools of libraries keep to them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from models.cores import cores, pool_limits
from models.registry.registry import Registry
from tests.conftest import ROOT, SHIPPED

ALL = len(os.sched_getaffinity(0))
V2 = "30 23 0:27 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {} /sys/fs/cgroup/cpu,cpuacct rw shared:5 master:1 - cgroup cgroup rw,cpu,cpuacct"
OTHERS = ("24 1 8:1 / / rw - ext4 /dev/sda1 rw", "33 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory")
MAX, QUOTA, PERIOD = "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"
LIBRARIES = ("faiss", "tokenizers", "numpy", "onnxruntime", "openvino")


def system(root: Path, groups: str, mount: str, files: Mapping[str, str]) -> Path:
    """Write what the kernel shows: the cgroups of this process, what is mounted, and files of cgroups."""
    shown = {"proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join((*OTHERS, mount))}
    for path, text in (shown | {f"sys/fs/cgroup/{path}": text for path, text in files.items()}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


@pytest.mark.skipif(ALL < 2, reason="this process may use one core only")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({MAX: "50000 100000"}, 1),
        ({MAX: "199999 100000"}, 1),
        ({MAX: "100000 50000"}, 2),
        ({MAX: "max 100000"}, ALL),
        ({MAX: "99900000 100000"}, ALL),
        ({f"pod/{MAX}": "100000 100000"}, ALL),
        ({"memory.max": "max"}, ALL),
        ({MAX: ""}, ALL),
    ],
)
def test_a_quota_of_version_2_limits_the_cores(tmp_path: Path, files: Mapping[str, str], expected: int) -> None:
    assert cores(system(tmp_path, "0::/", V2, files)) == expected


@pytest.mark.skipif(ALL < 2, reason="this process may use one core only")
@pytest.mark.parametrize("tightest", ["", "kubepods/", "kubepods/pod/", "kubepods/pod/container/"])
def test_the_least_quota_on_the_path_limits_the_cores(tmp_path: Path, tightest: str) -> None:
    quotas = {f"{at}{MAX}": "max 100000" for at in ("", "kubepods/", "kubepods/pod/", "kubepods/pod/container/")}
    quotas[f"{tightest}{MAX}"] = "120000 100000"
    assert cores(system(tmp_path, "0::/kubepods/pod/container", V2, quotas)) == 1


@pytest.mark.skipif(ALL < 2, reason="this process may use one core only")
@pytest.mark.parametrize(
    ("exported", "group", "at"),
    [
        ("/", "/", ""),
        ("/", "/docker/abc", "docker/abc/"),
        ("/", "/docker/abc", "docker/"),
        ("/docker/abc", "/docker/abc", ""),
        ("/docker/abc", "/docker/abc/inner", "inner/"),
        ("/docker/abc", "/", ""),
    ],
)
def test_a_quota_of_version_1_limits_the_cores(tmp_path: Path, exported: str, group: str, at: str) -> None:
    groups = f"12:cpuset:/other\n4:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/"
    limited = {f"cpu,cpuacct/{at}{QUOTA}": "50000", f"cpu,cpuacct/{at}{PERIOD}": "100000"}
    unlimited = {path: "-1" if QUOTA in path else text for path, text in limited.items()}
    assert cores(system(tmp_path / "limited", groups, V1.format(exported), limited)) == 1
    assert cores(system(tmp_path / "unlimited", groups, V1.format(exported), unlimited)) == ALL


def test_without_cgroups_the_affinity_says_how_many_cores_there_are(tmp_path: Path) -> None:
    assert cores(tmp_path) == ALL


def test_limits_only_pools_that_the_environment_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    assert pool_limits(2) == {"RAYON_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def one_core() -> Iterator[Path]:
    """Return the file of a real cgroup whose processes get one core; of whichever version has the controller."""
    for home, name, quota in (("", MAX, "100000 100000"), ("cpu", QUOTA, "100000")):
        group = Path("/sys/fs/cgroup", home, f"lvm-test-{os.getpid()}")
        with ExitStack() as stack, suppress(OSError):
            group.mkdir()
            stack.callback(group.rmdir)
            # The kernel made it, unless this is no file system of cgroups.
            with (group / name).open("r+") as file:
                file.write(quota)
            yield group / "cgroup.procs"
            return
    pytest.skip("cannot make a cgroup with a CPU quota")


def run_in(cgroup: Path, *arguments: str) -> str:
    """Return what a Python in a cgroup prints."""
    join = f'echo $$ > {cgroup} && exec "$@"'
    command = ("sh", "-c", join, "sh", sys.executable, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_counts_the_cores_of_a_real_cgroup(one_core: Path) -> None:
    assert run_in(one_core, "-c", "from models.cores import cores; print(cores())") == "1"


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_library_works_in_more_threads_than_there_are_cores(one_core: Path, library: str) -> None:
    if not find_spec(library):
        pytest.skip(f"{library} is not installed")
    version = Registry(SHIPPED).resolve("primary").path
    assert run_in(one_core, "-m", "tests.models.busy_threads", library, str(version)) == "1"
