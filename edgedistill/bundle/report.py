"""`edgedistill report DIR`: the report of a bundle that holds, beside it."""

from __future__ import annotations

from pathlib import Path

from edgedistill.bundle.check import check_sealed
from edgedistill.errors import UserError
from edgedistill.report.html import render


def report(bundle_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a bundle, from its records alone; the file written.

    Default: `<bundle_dir>.report.html` beside the bundle, as a file more in it would break its sums.
    The bundle is verified first, all but its golden vectors. Raises UserError where it does not hold, and where `out`
    cannot be written or lies in the bundle.
    """
    bundle_dir = bundle_dir.absolute()
    out = (out or bundle_dir.with_name(f"{bundle_dir.name}.report.html")).absolute()
    sealed = check_sealed(bundle_dir)
    try:
        inside = out.resolve().is_relative_to(bundle_dir.resolve())
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise UserError(f"{out} cannot be written: {error}", "name another --out") from error
    if inside:
        raise UserError(f"{out} is in the bundle, whose SHA256SUMS lists every file", "name an --out beside it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(sealed.manifest, sealed.figures), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}", "name another --out") from error
    return out
