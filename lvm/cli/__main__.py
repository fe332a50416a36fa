"""`python -m lvm.cli`: as `lvm`, where that is not on the path."""

from lvm.cli import main

if __name__ == "__main__":
    main()
