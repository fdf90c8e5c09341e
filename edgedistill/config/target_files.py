"""Where the device profiles lie, and a list of them that needs no validation: light, for `targets list`.

One YAML file a device: `targets/` beside the package in a checkout or sdist, `edgedistill/_targets` inside a wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.config.strict_yaml import read_yaml
from edgedistill.errors import UserError

MAX_PROFILE_BYTES = 1 << 18
WHAT = "target profile"


def targets_folder() -> Path:
    """Where the profiles lie: inside the installed package, else beside it (checkout, editable install, sdist)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_targets"
    return inside if inside.is_dir() else package.parent / "targets"


def target_files() -> list[Path]:
    """The shipped profiles, sorted by name. UserError where there are none."""
    found = sorted(targets_folder().glob("*.yaml"))
    if not found:
        raise UserError(
            f"no device profiles in {targets_folder()}", "install edgedistill again: its targets are missing"
        )
    return found


def target_rows() -> list[tuple[str, list[str], str, list[str], float, float]]:
    """Of each shipped profile as it is written: name, aliases, title, default artifacts, usable memory in bytes,
    bandwidth in bytes/s. UserError naming a file that lacks one of these; all else is for `targets check`."""
    rows = []
    for path in target_files():
        tree: Any = read_yaml(path, what=WHAT, max_bytes=MAX_PROFILE_BYTES)
        try:
            memory, bandwidth = (float(tree[key]["value"]) for key in ("usable_memory_bytes", "bandwidth_bytes_per_s"))
            artifacts = [*tree["default_artifacts"]]
            rows.append((tree["name"], [*tree.get("aliases", ())], tree["title"], artifacts, memory, bandwidth))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{WHAT} {path} is damaged: {error!r}", f"edgedistill targets check {path}") from error
    return rows
