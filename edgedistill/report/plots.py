"""The report's plots: matplotlib to SVG that stands inside the page, with its text as text.

Drawn from records only. No words of a record get into a plot: every label is ours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from edgedistill.records.base import Interval
from edgedistill.records.latency import Latency
from edgedistill.records.retention import Retention, Rung

INK = "#1f2933"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
BLUE = "#1f6feb"
RED = "#b42318"
# Narrow enough to be read on a phone without shrinking.
WIDTH_IN, HEIGHT_IN = 4.6, 3.0
MAX_POINTS = 4000
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def perplexity_svg(retention: Retention, name: str) -> str:
    """Perplexity of every rung with its 95 % interval. `name` is unique in the page."""
    rungs = retention.rungs

    def draw(axes: Any) -> None:
        _rung_points(axes, rungs, [r.perplexity for r in rungs], [r.perplexity_ci95 for r in rungs], "{:.2f}")
        axes.set_title("Perplexity (lower is better)")

    spoken = "; ".join(f"{r.rung} {r.perplexity:.3f}, 95 % {_span(r.perplexity_ci95)}" for r in rungs)
    return _svg(draw, name, f"Perplexity by rung: {spoken}")


def retention_svg(retention: Retention, name: str) -> str:
    """Retention of every rung with its 95 % interval, and the gate."""
    rungs = retention.rungs
    gate = retention.gate.min_retention

    def draw(axes: Any) -> None:
        _rung_points(axes, rungs, [r.retention for r in rungs], [r.retention_ci95 for r in rungs], "{:.3f}")
        axes.axhline(gate, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"gate {gate:g}", (1, gate), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom",
            color=RED, xytext=(0, 2), textcoords="offset points",
        )  # fmt: skip
        axes.set_title("Retention (1.0 is lossless)")

    spoken = "; ".join(f"{r.rung} {r.retention:.4f}, 95 % {_span(r.retention_ci95)}" for r in rungs)
    return _svg(draw, name, f"Retention by rung: {spoken}. The gate is at {gate:g}")


def token_ms_svg(latency: Latency, name: str) -> str:
    """Distribution of the milliseconds a token; "" where the record holds no samples."""
    samples = latency.samples.get("token_ms", [])
    if len(samples) < 2:
        return ""
    p = latency.token_ms

    def draw(axes: Any) -> None:
        # A few slow outliers would squeeze everything else into one bar; they are counted in the last one.
        top = max(p.p90 * 1.5, float(np.percentile(samples, 99)))
        axes.hist(np.minimum(samples, top), bins=30, color=BLUE, alpha=0.85)
        lines = {"p50": p.p50, "p90": p.p90, "p99": p.p99}
        for position, (label, value) in enumerate(lines.items()):
            if value is None:
                continue
            axes.axvline(min(value, top), color=INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.annotate(
                f"{label} {value:.3g}", (min(value, top), 0.98 - 0.1 * position), xycoords=axes.get_xaxis_transform(),
                xytext=(3, 0), textcoords="offset points", va="top",
            )  # fmt: skip
        axes.set_xlabel("ms a token (slowest 1 % in the last bar)")
        axes.set_ylabel("tokens")
        axes.set_title("Time a token")
        axes.margins(x=0.12)

    p99 = f", p99 {p.p99:.3g}" if p.p99 is not None else ""
    return _svg(draw, name, f"Milliseconds a token, {len(samples)} samples: p50 {p.p50:.3g}, p90 {p.p90:.3g}{p99}")


def drift_svg(latency: Latency, name: str) -> str:
    """Milliseconds a token in the order measured, its first and last quarter marked; "" without samples."""
    samples = latency.samples.get("token_ms", [])
    if len(samples) < 8:
        return ""
    quarter = len(samples) // 4

    def draw(axes: Any) -> None:
        step = max(1, len(samples) // MAX_POINTS)
        positions = np.arange(0, len(samples), step)
        axes.plot(positions, np.asarray(samples)[::step], ".", color=BLUE, markersize=2.5, alpha=0.7)
        for start, end in ((0, quarter), (len(samples) - quarter, len(samples))):
            axes.plot([start, end], [float(np.mean(samples[start:end]))] * 2, color=RED, linewidth=1.6)
        axes.set_ylim(bottom=0, top=max(latency.token_ms.p90 * 1.6, float(np.percentile(samples, 99)) * 1.1))
        axes.set_xlabel("token, in the order measured")
        axes.set_ylabel("ms")
        axes.set_title(f"Drift {latency.drift:.2f} (last ÷ first quarter)")

    spoken = f"Milliseconds a token in the order measured; the last quarter took {latency.drift:.3f} times the first"
    return _svg(draw, name, spoken)


def ttft_svg(latency: Latency, name: str) -> str:
    """Time to the first token of every repeat; "" without samples."""
    samples = latency.samples.get("ttft_ms", [])
    if not samples:
        return ""

    def draw(axes: Any) -> None:
        axes.plot(range(1, len(samples) + 1), samples, "o", color=BLUE, markersize=5)
        axes.axhline(latency.ttft_ms.p50, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.set_ylim(bottom=0, top=max(samples) * 1.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("repeat")
        axes.set_ylabel("ms")
        axes.set_title(f"Time to the first token, p50 {latency.ttft_ms.p50:.3g} ms")

    return _svg(draw, name, f"Time to the first token of {len(samples)} repeats, p50 {latency.ttft_ms.p50:.3g} ms")


def _rung_points(
    axes: Any, rungs: Sequence[Rung], values: Sequence[float], intervals: Sequence[Interval | None], label: str
) -> None:
    for position, (rung, value, ci95) in enumerate(zip(rungs, values, intervals, strict=True)):
        shipped = rung.rung == "shipped"
        color = BLUE if shipped else INK
        if ci95 is not None:
            axes.plot([position, position], list(ci95), color=color, linewidth=1.6)
        for end in ci95 or ():
            axes.plot([position - 0.07, position + 0.07], [end, end], color=color, linewidth=1.6)
        # Other bases are hollow: they are not to be read against a measured one.
        face = color if rung.basis == "measured" else "white"
        axes.plot([position], [value], "o", color=color, markersize=7, markerfacecolor=face)
        axes.annotate(label.format(value), (position, value), xytext=(8, 0), textcoords="offset points", va="center")
    # Shorter than their words: four of them stand side by side on a phone.
    axes.set_xticks(range(len(rungs)), [rung.rung for rung in rungs])
    axes.set_xlim(-0.4, len(rungs) - 0.4 + 0.25)
    axes.margins(y=0.18)
    axes.grid(axis="x", visible=False)


def _span(ci95: tuple[float, float] | None) -> str:
    return "too few documents" if ci95 is None else f"{ci95[0]:.4g} to {ci95[1]:.4g}"


def _svg(draw: Callable[[Any], None], name: str, spoken: str) -> str:
    """Draw and make it fit to stand in a page: own ids, no metadata, a title that is read aloud."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Not the reader's own matplotlibrc: the same records are to give the same page.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(defaults | STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    # Several plots share one page, and ids are the page's.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    head, tail = text.split(">", 1)
    label = escape(spoken, {'"': "&quot;"})
    return f'{head} aria-labelledby="{name}-title"><title id="{name}-title">{label}</title>{tail}'
