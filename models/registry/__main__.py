"""`python -m models.registry rollback ALIAS` or `unset ALIAS`, on the standard library alone."""

import sys

from models.registry.registry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
