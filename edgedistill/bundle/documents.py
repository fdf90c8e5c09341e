"""What a person reads of a bundle, made from its manifest and records: written by `build`, made again by `verify`.

So a card, a notice, a report or a sample program that somebody changed is found, even where every hash was made
right again. The words of others (a licence, a notice) cannot be made again; who they are of can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import metadata, util
from typing import Any

from edgedistill import __version__
from edgedistill.bundle.card import digest_line, digest_text, model_card
from edgedistill.bundle.claims import refuse
from edgedistill.bundle.licenses import Source, license_text, notice_text
from edgedistill.bundle.readme import readme_text
from edgedistill.bundle.samples import sample_texts
from edgedistill.bundle.sbom import sbom_text
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import CARD, MANIFEST, Manifest
from edgedistill.records.retention import Retention

Read = Callable[[str], bytes]
Figures = Sequence[tuple[Retention, Latency | None]]
README = "README.md"
REPORT = "reports/report.html"
REPORT_PACKAGES = ("jinja2", "matplotlib")
# Where a plot's ink is; the last digit may differ from CPU to CPU, and with it the ids that are made of the rest.
_GEOMETRY = re.compile(
    r'(?<=[\s"])(d|x|y|x1|x2|y1|y2|cx|cy|r|width|height|points|transform|viewBox|clip-path|(?:xlink:)?href|id)="([^"<>]*)"'
)
_NAMED = ("id", "href", "xlink:href", "clip-path")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
_REFERENCE = {
    "id": re.compile(r"()([A-Za-z][\w.-]*)()"),
    "href": re.compile(r"(#)([A-Za-z][\w.-]*)()"),
    "clip-path": re.compile(r"(url\(#)([A-Za-z][\w.-]*)(\))"),
}
INK = 0.05  # of a plot's units, 72 to the inch
_DIGEST = re.compile(re.escape(digest_text("?")).replace(r"\?", "[0-9a-f]{64}").encode(), re.MULTILINE)
_SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)


def documents(manifest: Manifest, figures: Figures, sources: Sequence[Source]) -> dict[str, str]:
    """Path → text of every document but the card and the report. `sources`: whose licences and notices are in it."""
    return {
        README: readme_text(manifest, figures),
        "LICENSE": license_text(sources, manifest),
        "NOTICE": notice_text(sources, manifest),
        "sbom.cdx.json": sbom_text(manifest),
        **sample_texts(manifest.artifacts),
    }


def check_documents(manifest: Manifest, figures: Figures, read: Read) -> list[str]:
    """Raises UserError naming the document that is not what manifest and records say; notes on what was not compared.

    Another version of edgedistill words them otherwise: its documents are not compared, and the note says so.
    """
    ours = manifest.edgedistill == __version__
    if ours:
        _check_texts(manifest, figures, read)
    # After those, since it names no file; of whatever version, since a card of another says it in the same words.
    if digest_line(manifest) not in read(CARD).decode("utf-8", errors="replace").split("\n"):
        refuse(f"{CARD} was written for another {MANIFEST}, or for other files: its sha256 of them is not theirs")
    if not ours:
        return [
            f"written by edgedistill {manifest.edgedistill}: this version, {__version__}, did not compare its card, "
            "report, notices and samples with its records"
        ]
    return _check_report(manifest, figures, read)


def _check_texts(manifest: Manifest, figures: Figures, read: Read) -> None:
    sources = [
        Source(each.role, each.name, "?" if each.has_license else None, "?" if each.has_notice else None)
        for each in manifest.sources
    ]
    for path, text in documents(manifest, figures, sources).items():
        found = read(path)
        # The words of others are in these.
        if path == "LICENSE" and any(each.license for each in sources):
            continue
        if path == "NOTICE" and any(each.notice for each in sources):
            own = notice_text([Source(each.role, each.name, each.license, None) for each in sources], manifest)
            if found.startswith(own.encode()) and len(found) > len(own.encode()):
                continue
        if found != text.encode():
            refuse(f"{path} is not what manifest.json and the records say{_first_difference(found, text)}")
    card, made = read(CARD), model_card(manifest, figures, sources)
    if _without_digest(card) != _without_digest(made.encode()):
        refuse(f"{CARD} is not what {MANIFEST} and the records say{_first_difference(card, made)}")


def _without_digest(card: bytes) -> bytes:
    """The card with its one line of a hash blank, so that what else differs is named first."""
    return _DIGEST.sub(b"", card, count=1)


def _check_report(manifest: Manifest, figures: Figures, read: Read) -> list[str]:
    here = {name: _version(name) for name in REPORT_PACKAGES}
    if any(version is None or manifest.tool_versions.get(name) != version for name, version in here.items()):
        wanted = " and ".join(f"{name} {manifest.tool_versions.get(name, '')}".strip() for name in REPORT_PACKAGES)
        return [
            f"{REPORT} was not compared with the records, which takes {wanted}: `edgedistill report` makes it again"
        ]
    from edgedistill.report.html import render

    found, made = read(REPORT).decode("utf-8", errors="replace"), render(manifest, figures)
    if found != made and not _same_page(found, made):
        refuse(f"{REPORT} is not what manifest.json and the records say")
    return []


def _same_page(found: str, made: str) -> bool:
    """Equal but for the last digits of where a plot's ink is; every attribute counts, and no link leads outside."""
    plots = [_SVG.findall(page) for page in (found, made)]
    if _SVG.sub("", found) != _SVG.sub("", made) or len(plots[0]) != len(plots[1]):
        return False
    return all(_same_plot(one, other) for one, other in zip(*plots, strict=True))


def _same_plot(found: str, made: str) -> bool:
    if _GEOMETRY.sub("", found) != _GEOMETRY.sub("", made):
        return False
    pairs = list(zip(_GEOMETRY.finditer(found), _GEOMETRY.finditer(made), strict=False))
    if len(pairs) != len(_GEOMETRY.findall(made)) or len(pairs) != len(_GEOMETRY.findall(found)):
        return False
    names: dict[str, str] = {}
    for one, other in pairs:
        kind, value, wanted = one[1], one[2], other[2]
        if kind != other[1] or found[one.start() - 1] != made[other.start() - 1]:
            return False
        if kind in _NAMED:
            here, there = (_REFERENCE[kind.removeprefix("xlink:")].fullmatch(text) for text in (value, wanted))
            if here is None or there is None or names.setdefault(there[2], here[2]) != here[2]:
                return False
        elif _NUMBER.split(value) != _NUMBER.split(wanted) or any(
            abs(float(a) - float(b)) > INK for a, b in zip(_NUMBER.findall(value), _NUMBER.findall(wanted), strict=True)
        ):
            return False
    return len(set(names.values())) == len(names)


def _version(package: str) -> str | None:
    """Of a package that can be imported here; None where it cannot."""
    try:
        return metadata.version(package) if util.find_spec(package) is not None else None
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        return None


def _first_difference(found: bytes, text: str) -> str:
    """The line that differs, in words."""
    pairs: Any = zip(found.split(b"\n"), text.encode().split(b"\n"), strict=False)
    for number, (one, other) in enumerate(pairs, start=1):
        if one != other:
            return f": line {number} is {one.decode('utf-8', errors='replace')[:120]!a}"
    return ": it is longer or shorter"
