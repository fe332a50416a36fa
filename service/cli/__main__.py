"""`python -m service.cli`: as `lvm`, where that is not on the path."""

from service.cli import main

if __name__ == "__main__":
    main()
