"""Print what some extras need, each package at the lowest version that pyproject.toml allows and pip finds.

`make bounds` installs it: `python tests/bounds.py EXTRA...`.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def lowest(requirement: Requirement) -> str:
    """Return the lowest version that a requirement allows, pinned; pip names those that have a wheel for us."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--only-binary=:all:", requirement.name]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("Available versions: ")]
    found = map(Version, line.partition(": ")[2].split(", "))
    return f"{requirement.name}=={min(filter(requirement.specifier.contains, found))}"


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][extra] for extra in sys.argv[1:])
    for declared in chain(project["dependencies"], *extras):
        print(lowest(Requirement(declared)))
