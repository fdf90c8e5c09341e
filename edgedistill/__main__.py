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


def _open_streams() -> None:
    """Give a process that was started without standard input, output or error (a service, `2>&-`) empty ones.

    The next file that is opened would get the number of the missing one, and what is said would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def main() -> None:
    _open_streams()
    try:
        from edgedistill.cli.app import main as run
    except KeyboardInterrupt:  # within the half second of the imports
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
