"""`python -m edgedistill`, so that `accelerate launch -m edgedistill` works too, and the command `edgedistill`."""

import sys
from contextlib import suppress
from pathlib import Path

# `python -m` would import any module from where it is started first, and that may be a bundle of somebody else's.
with suppress(OSError):  # a current folder that is gone: the command says so
    if sys.path and Path(sys.path[0]) == Path.cwd() and not sys.flags.safe_path:
        del sys.path[0]

from edgedistill.errors import EXIT_INTERRUPTED


def main() -> None:
    try:
        from edgedistill.cli import main as run
    except KeyboardInterrupt:  # within the half second of the imports
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
