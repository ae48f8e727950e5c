"""``python -m teleport`` is the ``teleport`` command."""

import sys

from teleport.cli import main

if __name__ == "__main__":
    sys.exit(main())
