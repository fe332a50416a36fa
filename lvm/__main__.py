"""The `lvm` command; it names the extra to install if a package is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from lvm.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("lvm", "service", "models", "bench", "loadtest"):
            raise
        sys.exit(f"lvm requires {error.name}, which is not installed: pip install 'lvm-serve[serve]'")
    run()


if __name__ == "__main__":
    main()
