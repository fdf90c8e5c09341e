"""`edgedistill report DIR`: the report of a bundle that holds, beside it."""

from __future__ import annotations

from pathlib import Path

from edgedistill.bundle.check import check_sealed
from edgedistill.bundle.claims import MAX_RECORD_BYTES
from edgedistill.errors import UserError
from edgedistill.records.manifest import MANIFEST
from edgedistill.records.reading import json_record
from edgedistill.records.retention import Retention
from edgedistill.report.html import render, render_gate
from edgedistill.strict import open_regular

RETENTION = "retention.json"


def report(bundle_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a bundle, from its records alone; the file written.

    Default: `<bundle_dir>.report.html` beside the bundle, as a file more in it would break its sums.
    The bundle is verified first, all but its golden vectors. Raises UserError where it does not hold, and where `out`
    cannot be written or lies in the bundle. Of a folder that a failed gate leaves, a retention.json without a bundle,
    it is the ladder and the gate: `report.html` in it.
    """
    bundle_dir = bundle_dir.absolute()
    if (bundle_dir / RETENTION).is_file() and not (bundle_dir / MANIFEST).exists():
        return _written(render_gate(_retention(bundle_dir)), (out or bundle_dir / "report.html").absolute())
    out = (out or bundle_dir.with_name(f"{bundle_dir.name}.report.html")).absolute()
    sealed = check_sealed(bundle_dir)
    try:
        inside = out.resolve().is_relative_to(bundle_dir.resolve())
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise UserError(f"{out} cannot be written: {error}", "name another --out") from error
    if inside:
        raise UserError(f"{out} is in the bundle, whose SHA256SUMS lists every file", "name an --out beside it")
    return _written(render(sealed.manifest, sealed.figures), out)


def _retention(folder: Path) -> Retention:
    with open_regular(folder / RETENTION, what="the record") as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    where = str(folder / RETENTION)
    remedy = "name a bundle, or the folder of reports that a failed gate names"
    return json_record(Retention, data, what=where, remedy=remedy, max_bytes=MAX_RECORD_BYTES)


def _written(page: str, out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}", "name another --out") from error
    return out
