"""`python -m edgedistill`, so that `accelerate launch -m edgedistill` works too."""

import sys
from pathlib import Path

# `python -m` would import any module from where it is started first, and that may be a bundle of somebody else's.
if sys.path and Path(sys.path[0]) == Path.cwd() and not sys.flags.safe_path:
    del sys.path[0]

from edgedistill.cli import main

if __name__ == "__main__":
    main()
