"""Results as a person reads them (rich tables) and as a program does (dicts)."""

from __future__ import annotations

import io
import time
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedistill.bundle.check import BundleCheck
    from edgedistill.pipeline import Built, Trained
    from edgedistill.plan.plan import Plan
    from edgedistill.records.artifact import Artifact, Fallback, Sensitivity
    from edgedistill.records.latency import Latency
    from edgedistill.records.retention import Gate, Retention
    from edgedistill.records.training import SignalsResult

WIDTH = 140


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, fold: Sequence[str] = ()) -> str:
    """A table of text; no column wraps but those in `fold`, which share what is left of the width."""
    if not fold:
        return _unfolded(title, header, [list(row) for row in rows])
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in header:
        drawn.add_column(name, no_wrap=name not in fold, overflow="fold", min_width=24 if name in fold else None)
    for row in rows:
        drawn.add_row(*row)
    buffer = io.StringIO()
    console = Console(file=buffer, width=10_000, markup=False, highlight=False, emoji=False)
    console.width = WIDTH if fold else console.measure(drawn).maximum
    console.print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def _unfolded(title: str, header: Sequence[str], rows: list[list[str]]) -> str:
    """rich's table of this kind, line for line: loading rich takes as long as all the rest of `targets list`."""
    lines = [[cell.split("\n") for cell in row] for row in [list(header), *rows]]
    widths = [max(_cells(part) for row in lines for part in row[column]) for column in range(len(header))]
    drawn = [f"{title}\n"] if title else []
    for number, row in enumerate(lines):
        for at in range(max(len(cell) for cell in row)):
            parts = [cell[at] if at < len(cell) else "" for cell in row]
            padded = (part + " " * (width - _cells(part)) for part, width in zip(parts, widths, strict=True))
            drawn.append((" " + "   ".join(padded)).rstrip())
        if number == 0:
            drawn.append(" " + "─" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(drawn).strip("\n")


def _cells(text: str) -> int:
    """Columns of a terminal: wide characters take two, those that combine with the one before none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def with_interval(value: float, ci95: tuple[float, float] | None, form: str = ".3f") -> str:
    return f"{value:{form}} [{'too few' if ci95 is None else f'{ci95[0]:{form}}, {ci95[1]:{form}}'}]"


def intervals_note(ci95: tuple[float, float] | None, units: int, effective: float, what: str = "documents") -> str:
    """What the intervals of a table are, or why there are none."""
    from edgedistill.statistics import too_few  # numpy: no command that prints no interval waits for it

    return f"intervals: 95 %, t over {what}" if ci95 is not None else too_few(units, effective, what)


def human_bytes(count: float) -> str:
    """Decimal units, as disks and downloads count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def plan_text(plan: Plan, *, parts: bool = False) -> str:
    """`parts`: of what the memory here is made."""
    from edgedistill.data.report import HEADER, remarks, source_rows
    from edgedistill.plan.plan import plan_rows

    lines = [
        table(
            f"plan of {plan.recipe}",
            ("what", "value", "basis", "from"),
            plan_rows(plan, parts=parts),
            fold=("value", "from"),
        )
    ]
    if plan.data:
        lines.append("\n" + table("", HEADER, [row for read in plan.data for row in source_rows(read)]) + "\n")
        lines += [line for read in plan.data for line in remarks(read)]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def trained_json(trained: Trained) -> dict[str, Any]:
    return {
        "plan": trained.plan.model_dump(mode="json"),
        "data": trained.data.result.model_dump(mode="json"),
        "teacher": trained.teacher.model_dump(mode="json"),
        "student": trained.student.result.model_dump(mode="json")
        | {"path": str(trained.student.directory / trained.student.result.path), "reused": trained.student.reused},
    }


def signals_text(place: str, made: SignalsResult) -> str:
    """Where a cache of the teacher's signals lies, and what it costs."""
    return (
        f"{made.kind} signals of {made.tokens:,} tokens: {human_bytes(made.bytes)},"
        f" {made.bytes_per_token:.1f} bytes a token\n{place}"
    )


def trained_text(trained: Trained) -> str:
    student = trained.student.result
    how = "from the store" if trained.student.reused else "trained now"
    lines = [f"student: {student.parameters:,} parameters, {how}: {trained.student.directory / student.path}"]
    if student.training is not None and student.training.history:
        run = student.training
        lines.append(
            f"{run.loss}; {run.steps:,} steps, {run.tokens:,} tokens in {run.seconds:.0f} s;"
            f" perplexity on the calibration part {min(row['perplexity'] for row in run.history):.2f}"
            f" at step {run.best_step:,}"
        )
    return "\n".join(lines)


def built_json(trained: Trained, built: Sequence[Built]) -> dict[str, Any]:
    return {
        **trained_json(trained),
        "bundles": [
            {
                "target": item.target.name,
                "bundle": None if item.bundle is None else str(item.bundle),
                "artifacts": [
                    {
                        "artifact": done.exported.result.model_dump(mode="json"),
                        "retention": done.retention.model_dump(mode="json", by_alias=True),
                        "latency": None
                        if done.latency is None
                        else done.latency.model_dump(mode="json", by_alias=True),
                    }
                    for done in item.artifacts
                ],
            }
            for item in built
        ],
    }


def built_text(trained: Trained, built: Sequence[Built]) -> str:
    """The result table of a build and where the bundles lie."""
    header, rows = result_rows(built)
    retentions = [done.retention for item in built for done in item.artifacts]
    teacher = retentions[0].rungs[0]
    title = (
        f"teacher: {trained.teacher.parameters:,} parameters, perplexity"
        f" {with_interval(teacher.perplexity, teacher.perplexity_ci95, '.2f')}\n"
        f"student: {trained.student.result.parameters:,} parameters, {trained.plan.compression:.1f}x smaller"
    )
    some = next((r for r in retentions if r.retention.ci95 is None), retentions[0])
    lines = [title, table("", header, rows), retention_note(some)]
    measured = next((done.latency for item in built for done in item.artifacts if done.latency is not None), None)
    if measured is not None:
        where = measured.measured_on
        lines.append(f"speed: on {where.get('cpu')}, {where.get('threads')} threads ({measured.basis} for the target)")
    lines += [f"bundle: {item.bundle}" for item in built if item.bundle is not None]
    return "\n".join(lines)


def result_rows(built: Sequence[Built]) -> tuple[list[str], list[list[str]]]:
    """Header and one row an artifact. Speeds of two bases never share a column."""
    finished = [done for item in built for done in item.artifacts]
    bases = [b for b in ("measured", "proxy", "emulated") if any(d.latency and d.latency.basis == b for d in finished)]
    header = ["target", "artifact", "size", "perplexity", "retention", "top-1 as teacher"]
    header += [f"tokens/s ({basis})" for basis in bases]
    rows = []
    for done in finished:
        shipped, artifact = done.retention.rungs[-1], done.exported.result
        row = [
            done.target.name,
            f"{artifact.format}:{artifact.quantization}",
            human_bytes(artifact.bytes),
            with_interval(shipped.perplexity, shipped.perplexity_ci95, ".1f"),
            with_interval(shipped.retention, shipped.retention_ci95),
            f"{shipped.top1_agreement:.1%}",
        ]
        for basis in bases:
            shown = done.latency is not None and done.latency.basis == basis
            row.append(f"{done.latency.decode_tokens_per_s:,.0f}" if shown and done.latency else "")
        rows.append(row)
    return header, rows


def artifact_text(artifact: Artifact, out: Path) -> str:
    types = ", ".join(f"{count} {name}" for name, count in artifact.tensor_types.items())
    lines = [
        f"{out}: {artifact.format} {artifact.quantization}, {human_bytes(artifact.bytes)},"
        f" {artifact.bits_per_weight:.2f} bits a weight, context {artifact.context_tokens:,} tokens",
        f"tensors: {types}",
    ]
    lines += _fallback_lines(artifact.fallbacks)
    if artifact.sensitivity is not None:
        lines += sensitivity_lines(artifact.sensitivity)
    return "\n".join(lines)


def _fallback_lines(fallbacks: Sequence[Fallback]) -> list[str]:
    """One line for all tensors that got the same type for the same reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for one in fallbacks:
        groups.setdefault((one.got, one.wanted, one.why), []).append(one.tensor)
    lines = []
    for (got, wanted, why), tensors in groups.items():
        what = f"{tensors[0]} is" if len(tensors) == 1 else f"{len(tensors)} tensors ({tensors[0]}, ...) are"
        lines.append(f"fallback: {what} {got} instead of {wanted}: {why}")
    return lines


def sensitivity_lines(record: Sensitivity) -> list[str]:
    """What each group costs when it is quantized alone, the costliest a byte first, and what was chosen."""
    rows = [
        (
            row.group,
            with_interval(row.cost, row.cost_ci95, ".2e"),
            human_bytes(row.bytes_saved),
            row.type,
            row.chosen if row.chosen != row.type else "",
        )
        for row in record.rows
    ]
    one = record.rows[0]
    note = intervals_note(one.cost_ci95, one.documents, one.effective_documents)
    return [
        table("quantized alone", ("group", record.metric, "saves", "type", "raised to"), rows),
        f"on {record.examples:,} examples of {record.documents} documents of the {record.source}; {note}",
        f"retention {record.reached:.4f} (asked: {record.target:g}; {record.as_quantized:.4f} with nothing raised), for"
        f" {human_bytes(record.bytes_added)} more",
    ]


def retention_text(retention: Retention) -> str:
    """The ladder."""
    header = ("rung", "perplexity", "retention", "next-token accuracy", "mean KL (nats)", "p99 KL", "top-1", "basis")
    rows = [
        (
            rung.rung,
            with_interval(rung.perplexity, rung.perplexity_ci95, ".2f"),
            with_interval(rung.retention, rung.retention_ci95),
            with_interval(rung.next_token_accuracy, rung.next_token_accuracy_ci95),
            with_interval(rung.kl_mean_nats, rung.kl_mean_nats_ci95, ".4f"),
            "null" if rung.kl_p99_nats is None else f"{rung.kl_p99_nats:.3f}",
            f"{rung.top1_agreement:.1%}",
            rung.basis,
        )
        for rung in retention.rungs
    ]
    gate = retention.gate
    check = retention.tokenizer
    return "\n".join(
        [
            table("", header, rows),
            f"{retention.examples:,} tokens of {retention.documents} documents, windows of {retention.context_tokens};"
            f" {retention_note(retention)}",
            *(
                []
                if retention.kept_tokens is None
                else [f"vocabulary trimmed to {retention.kept_tokens:,} tokens: KL is over these, perplexity over all"]
            ),
            f"tokenizer: {check.texts - check.mismatches} of {check.texts} texts as the original",
            *checks_lines(gate),
            f"gate: {gate.min_retention:g} at the interval's lower end {shown_verdict(gate)}",
        ]
    )


def shown_verdict(gate: Gate) -> str:
    return gate.verdict if gate.passed else gate.verdict.upper()


def checks_lines(gate: Gate) -> list[str]:
    """Every check of the gate, a line each."""
    words = {True: "passed", False: "FAILED", None: "cannot tell"}
    return [f"check: {check.name} {words[check.passed]}: {check.why}" for check in gate.checks]


def retention_note(retention: Retention) -> str:
    return intervals_note(retention.retention.ci95, retention.documents, retention.effective_documents)


def latency_text(latency: Latency) -> str:
    decode = with_interval(latency.decode_tokens_per_s, latency.decode_tokens_per_s_ci95, ".1f")
    prefill = with_interval(latency.prefill_tokens_per_s, latency.prefill_tokens_per_s_ci95, ".1f")
    rows = [
        ("decode", decode, "tokens/s", latency.basis),
        ("prefill", prefill, "tokens/s", latency.basis),
        ("first token p50 / p90", f"{latency.ttft_ms.p50:.2f} / {latency.ttft_ms.p90:.2f}", "ms", latency.basis),
        ("token p50 / p90", f"{latency.token_ms.p50:.3f} / {latency.token_ms.p90:.3f}", "ms", latency.basis),
        ("load", f"{latency.load_ms:.1f}", "ms", latency.basis),
        ("peak resident memory", human_bytes(latency.peak_rss_bytes), "", latency.basis),
        ("drift (last ÷ first quarter)", f"{latency.drift:.3f}", "", latency.basis),
        ("decode at most", f"{latency.ceiling.value:,.0f}", "tokens/s", latency.ceiling.basis),
    ]  # fmt: skip
    where = latency.measured_on
    lines = [table("", ("what", "value", "unit", "basis"), rows)]
    lines.append(
        f"on {where.get('cpu')}, {where.get('threads')} threads, {where.get('runtime')} {where.get('runtime_version')}"
    )
    lines.append(intervals_note(latency.decode_tokens_per_s_ci95, latency.rate_units, latency.rate_units, "repeats"))
    return "\n".join([*lines, *(f"note: {note}" for note in latency.notes)])


def check_text(check: BundleCheck) -> str:
    lines = [f"{check.name} for {check.target}: {check.files} files, {human_bytes(check.bytes)}, every hash is right"]
    lines += [
        f"{r.artifact}: {r.cases} golden cases replayed in {r.runtime_version}, largest deviation"
        f" {r.largest_deviation:.3g} (tolerance {r.tolerance:.3g}), {r.tokens_compared} best tokens and"
        f" {r.greedy_compared} decoded ones equal, rms {r.found['rms']:.2g} (tolerance {r.allowed['rms']:.2g})"
        for r in check.replays
    ]
    return "\n".join([*lines, *check.notes])


def targets_text(targets: Sequence[tuple[str, list[str], str, list[str], float, float]]) -> str:
    """A table of `target_files.target_rows`."""
    rows = [
        (name, ", ".join(aliases), title, ", ".join(artifacts), human_bytes(memory), f"{bandwidth / 1e9:,.0f} GB/s")
        for name, aliases, title, artifacts, memory, bandwidth in targets
    ]
    return table("", ("name", "alias", "device", "default artifact", "usable memory", "bandwidth"), rows)


def store_text(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "the store is empty"
    now = time.time()
    shown = [
        (
            r["stage"],
            r["key"][:12],
            human_bytes(r["bytes"]),
            f"{(now - r['written_unix_s']) / 3600:.1f} h",
            r["state"],
            r["what"],
        )
        for r in rows
    ]
    total = human_bytes(sum(r["bytes"] for r in rows))
    return table("", ("stage", "key", "size", "age", "state", "what it is"), shown) + f"\n{total} in all"


def doctor_text(found: dict[str, Any]) -> str:
    here = found["machine"]
    lines = [
        f"{here['cpu']}, {here['usable_cores']} cores, {human_bytes(here['memory_bytes'] or 0)} memory, {here['os']}"
    ]
    rows = [(c["what"], c["state"], c["detail"], c["remedy"]) for c in found["checks"]]
    lines.append(table("this machine", ("what", "state", "detail", "remedy"), rows, fold=("detail", "remedy")))
    rows = [
        (t["target"], "yes" if t["can_build"] else "no", t["speed_basis"], "; ".join(t["missing"]))
        for t in found["targets"]
    ]
    lines.append(table("targets", ("target", "can be built here", "basis of speed here", "missing"), rows))
    return "\n".join(lines)
