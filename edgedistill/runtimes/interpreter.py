"""How this interpreter is started again: what is Python's own comes before any file of the same name.

Site-packages and PYTHONPATH may hold a pathlib.py, a typing.py or a queue.py: backports of another age, or a user's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import edgedistill

# `os` was imported before any path was read; nothing else is imported until the order is right.
STANDARD_FIRST = (
    "own = os.path.dirname(os.__file__); zipped = 'python%d%d.zip' % sys.version_info[:2]; "
    "sys.path.sort(key=lambda p: not (p.startswith(own) and '-packages' not in p or p.endswith(zipped))); "
)
# This package from where it is, then the parent's paths, so that both find the same libraries.
BOOT_MODULE = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); import edgedistill; del sys.path[0]; "
    "sys.path += [p for p in sys.argv[2].split(os.pathsep) if p not in sys.path]; "
    f"{STANDARD_FIRST}"
    "import runpy; sys.argv[:] = sys.argv[3:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def package_parent() -> str:
    """The folder that this package lies in."""
    return str(Path(edgedistill.__file__).resolve().parent.parent)


def search_paths() -> list[str]:
    """This process's paths for modules, but for the working folder: what lies there may have any module's name."""
    here = Path.cwd()
    return [path for path in sys.path if path and Path(path).is_absolute() and Path(path) != here]


def users_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH as a child gets it: the user's own, but no folder that depends on where the program was started."""
    return os.pathsep.join(p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if Path(p).is_absolute())


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs a module as `python -m` does, in the environment of this process."""
    paths = os.pathsep.join(search_paths())
    return [sys.executable, "-P", "-c", BOOT_MODULE, package_parent(), paths, module, *arguments]
