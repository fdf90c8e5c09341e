"""One HTML page from a bundle's records, with nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from edgedistill.records.latency import Latency
from edgedistill.records.manifest import BundleArtifact, Manifest
from edgedistill.records.retention import Retention, Rung
from edgedistill.report import plots
from edgedistill.statistics import too_few

PAGES = ("report.html.j2", "gate.html.j2")
LABELS = {
    "machine": "Machine",
    "cpu": "CPU",
    "arch": "Architecture",
    "isa": "Instruction sets",
    "cores": "Cores",
    "usable_cores": "Cores it may use",
    "memory_bytes": "Memory",
    "os": "System",
    "python": "Python",
    "governor": "CPU governor",
    "power_mode": "Power mode",
    "runtime": "Runtime",
    "runtime_version": "Runtime version",
    "threads": "Threads",
}


def render(manifest: Manifest, figures: Sequence[tuple[Retention, Latency | None]]) -> str:
    """The page. `figures`: retention and latency of each artifact, in the manifest's order."""
    sections = [
        _section(artifact, manifest, retention, latency, f"a{position}")
        for position, (artifact, (retention, latency)) in enumerate(zip(manifest.artifacts, figures, strict=True))
    ]
    return str(
        _environment()
        .get_template("report.html.j2")
        .render(
            m=manifest,
            sections=sections,
            ratio=manifest.teacher.parameters / manifest.student.parameters if manifest.teacher else None,
            labels=LABELS,
        )
    )


def render_gate(retention: Retention) -> str:
    """The page of an artifact's ladder and gate, where there is no bundle."""
    section = {
        "plots": _ladder_plots(retention, "a0"),
        "by_basis": _by_basis(retention),
    }
    return str(_environment().get_template("gate.html.j2").render(r=retention, s=section))


def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        text = (resources.files("edgedistill.report") / name).read_text(encoding="utf-8")
        return text if name in PAGES else f"{text}\n"  # jinja takes a template's last line feed away

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(source)
    )
    environment.filters |= {
        "number": number, "size": size, "interval": interval, "plain": plain,
        "too_few": lambda units, what="documents", effective=None: too_few(units, effective or units, what),
    }  # fmt: skip
    return environment


def limits_of(limits: dict[str, Any], artifact: BundleArtifact, latency: Latency | None) -> list[dict[str, Any]]:
    """One row a limit: what it allows, what was counted or run, and the verdict.

    Size and memory are known anywhere; no limit on speed is `met` by another machine's figures.
    """
    measured = latency is not None and latency.basis == "measured"
    memory, decode, ttft = None, None, None
    if latency is not None:
        memory, decode, ttft = latency.peak_rss_bytes, latency.decode_tokens_per_s, latency.ttft_ms.p50
    found: list[tuple[str, str, str, float | None, bool]] = [
        ("max_artifact_bytes", "Artifact size", "B", artifact.bytes, True),
        ("max_memory_bytes", "Peak memory", "B", memory, True),
        ("min_decode_tokens_per_s", "Decode", "tokens/s", decode, measured),
        ("max_ttft_ms", "First token, p50", "ms", ttft, measured),
    ]
    rows = []
    for key, label, unit, value, counts in found:
        limit = limits.get(key)
        if not isinstance(limit, int | float):
            continue
        least = key.startswith("min")
        verdict = "not measured"
        if counts and value is not None:
            verdict = "met" if (value >= limit if least else value <= limit) else "BROKEN"
        allowed = f"at {'least' if least else 'most'} {_with_unit(limit, unit)}"
        shown = "" if verdict == "not measured" or value is None else _with_unit(value, unit)
        # The artifact's bytes are counted, not run: they have a column of their own.
        counted = key == "max_artifact_bytes"
        rows.append(
            {
                "label": label,
                "allowed": allowed,
                "counted": shown if counted else "",
                "run": "" if counted else shown,
                "verdict": verdict,
            }
        )
    return rows


def _with_unit(value: float, unit: str) -> str:
    return size(value) if unit == "B" else f"{value:,.6g} {unit}"


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for people: thousands apart, significant digits; a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    # Trailing zeros stay, so that the figures of a column line up.
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def size(value: float | None) -> str:
    """Bytes in units of 1000."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.2f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def interval(ci95: tuple[float, float] | None, digits: int = 4) -> str:
    """low–high."""
    return "too few" if ci95 is None else f"{number(ci95[0], digits)}–{number(ci95[1], digits)}"


def plain(value: Any) -> str:
    """Any value of a record as words."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items()) or "none"
    return str(value)


def _by_basis(retention: Retention) -> dict[str, list[Rung]]:
    return {
        basis: [rung for rung in retention.rungs if rung.basis == basis]
        for basis in dict.fromkeys(rung.basis for rung in retention.rungs)
    }


def _ladder_plots(retention: Retention, key: str) -> dict[str, str]:
    return {
        "perplexity": plots.perplexity_svg(retention, f"{key}-ppl"),
        "retention": plots.retention_svg(retention, f"{key}-ret"),
    }


def _section(
    artifact: BundleArtifact, manifest: Manifest, retention: Retention, latency: Latency | None, key: str
) -> dict[str, Any]:
    """What the template shows of one artifact. `key` makes ids of the page unique."""
    drawn = _ladder_plots(retention, key)
    if latency is not None:
        drawn |= {
            "token_ms": plots.token_ms_svg(latency, f"{key}-tok"),
            "drift": plots.drift_svg(latency, f"{key}-drift"),
            "ttft": plots.ttft_svg(latency, f"{key}-ttft"),
        }
    return {
        "key": key,
        "artifact": artifact,
        "retention": retention,
        "latency": latency,
        "by_basis": _by_basis(retention),
        "plots": drawn,
        "limits": limits_of(manifest.limits, artifact, latency),
        "limits_why": manifest.limits.get("rationale", ""),
        "logits": next(output for output in artifact.golden.outputs if output.name == "logits"),
    }
