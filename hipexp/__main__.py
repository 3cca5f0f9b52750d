"""``python -m hipexp``."""

import sys

from hipexp.cli import main

if __name__ == "__main__":
    sys.exit(main())
