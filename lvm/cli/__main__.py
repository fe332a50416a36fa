"""Runs `lvm` as `python -m lvm.cli`, for an environment whose scripts are not on the PATH."""

from lvm.cli import main

if __name__ == "__main__":
    main()
