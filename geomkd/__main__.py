"""``python -m geomkd``: the command line."""

import sys

from geomkd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
