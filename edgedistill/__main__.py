"""`python -m edgedistill`, so that `accelerate launch -m edgedistill` works too, and the command `edgedistill`."""

import os
import sys

# `python -m` would import any module from where it is started first, and that may be a bundle of somebody else's.
try:
    _here = os.getcwd()  # noqa: PTH109  nothing is imported yet that such a module could stand for
except OSError:  # a current folder that is gone: the command says so
    _here = ""
if sys.path and sys.path[0] == _here and not sys.flags.safe_path:
    del sys.path[0]

# Python's own modules first: a resource.py or queue.py on PYTHONPATH is not meant for this program.
_OWN = os.path.dirname(os.__file__)  # noqa: PTH120
_ZIP = "python{}{}.zip".format(*sys.version_info)
sys.path.sort(key=lambda path: not ((path.startswith(_OWN) and "-packages" not in path) or path.endswith(_ZIP)))

from edgedistill.errors import EXIT_INTERRUPTED  # noqa: E402


def main() -> None:
    try:
        from edgedistill.cli import main as run
    except KeyboardInterrupt:  # within the half second of the imports
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
