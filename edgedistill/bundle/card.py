"""MODEL_CARD.md: what is known is said, what is not known is called unknown."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from edgedistill.bundle.licenses import Source, plain, whose
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import Manifest, claims_digest
from edgedistill.records.retention import Retention
from edgedistill.statistics import too_few

HUB_ID = re.compile(r"[A-Za-z0-9._-]{1,96}(/[A-Za-z0-9._-]{1,96})?")
LIBRARIES = {
    "gguf": "llama.cpp", "onnx": "onnxruntime", "bitsandbytes": "transformers", "executorch": "executorch"
}  # fmt: skip
TO_FILL = "**To be filled in by whoever ships this model.**"


def model_card(
    manifest: Manifest, figures: Sequence[tuple[Retention, Latency | None]], sources: Sequence[Source]
) -> str:
    """The card, with the metadata block that model hubs read. `figures`: one pair an artifact, in its order."""
    teacher = manifest.teacher
    # A name that no hub can have stays out of the metadata; the text below has it.
    on_hub = teacher is not None and teacher.origin == "hub" and HUB_ID.fullmatch(teacher.name)
    fields = {
        "base_model": teacher.name if teacher is not None and on_hub else None,
        "library_name": LIBRARIES[manifest.artifacts[0].format],
        "license": "other" if sources and all(each.license for each in sources) else "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["edgedistill", "knowledge-distillation", *dict.fromkeys(a.format for a in manifest.artifacts)],
    }
    told = {name: value for name, value in fields.items() if value is not None}
    metadata = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{_body(manifest, figures, sources)}".rstrip() + "\n"


def _body(manifest: Manifest, figures: Sequence[tuple[Retention, Latency | None]], sources: Sequence[Source]) -> str:
    student, teacher = manifest.student, manifest.teacher
    parts = [f"# {markdown(manifest.name)}", ""]
    parts.append(f"A language model of {student.parameters:,} parameters for {target_text(manifest)}.")
    if teacher is not None:
        parts.append(f"Distilled from {markdown(teacher.name)} ({teacher.parameters:,} parameters, {teacher.origin}).")
        parts += [
            f"Beside it taught {markdown(each.name)} ({each.parameters:,} parameters, {each.origin})."
            for each in manifest.further_teachers
        ]
    else:
        parts.append("Its teacher is unknown: the student was given.")
    parts += ["", "## Intended use", "", TO_FILL, "", "## Out of scope, risks, bias", ""]
    parts += [f"Not evaluated. {TO_FILL}", "", "## What it kept of its teacher", ""]
    for artifact, (retention, _latency) in zip(manifest.artifacts, figures, strict=True):
        parts += _retention(artifact.name, retention)
    parts += ["## Speed", ""]
    for artifact, (_retention_record, latency) in zip(manifest.artifacts, figures, strict=True):
        parts += _speed(artifact.name, latency)
    data = manifest.data
    parts += ["## Training text", ""]
    parts.append(
        f"{markdown(data.source)}, split `{markdown(data.split)}`, sha256 `{data.sha256}`." if data else "Unknown."
    )
    if data is not None:
        parts += ["", f"Text in both parts: {data.in_both()}."]
    parts += ["", "## Licence", ""]
    found, missing = [each for each in sources if each.license], [each for each in sources if not each.license]
    if found:
        parts.append(f"See LICENSE: it has those of {markdown(whose(found))}. The text's licence may add to it.")
        if missing:
            parts.append(f"Unknown: no licence was found beside the weights of {markdown(whose(missing))}.")
    else:
        parts.append("Unknown: no licence was found beside the weights. See LICENSE.")
    parts += ["", "## Check it", "", "    edgedistill bundle verify .", ""]
    parts.append(digest_line(manifest))
    return "\n".join(parts)


def digest_line(manifest: Manifest) -> str:
    """What ties the card to the manifest, and by it to every other file."""
    return digest_text(claims_digest(manifest))


def digest_text(digest: str) -> str:
    return (
        f"sha256 of all that manifest.json says, the hashes of all other files among it: `{digest}`."
        " Compare it with what the maker published."
    )


OUTCOMES = {True: "passed", False: "FAILED", None: "cannot tell"}


def _retention(name: str, retention: Retention) -> list[str]:
    gate = retention.gate
    lines = [
        f"### {markdown(name)}",
        "",
        f"{retention.documents} documents, {retention.examples:,} tokens, sha256 `{retention.eval_sha256[:16]}…`. "
        f"The gate asks for at least {gate.min_retention:g} at the lower end of the interval: "
        f"**{gate.verdict if gate.passed else gate.verdict.upper()}**. Its checks:",
        "",
        "| check | value | limit | |",
        "| --- | --- | --- | --- |",
        *(
            f"| {check.name} | {check.value:.4g} {check.unit} | {check.bound} {check.limit:g} "
            f"| {OUTCOMES[check.passed]} |"
            for check in gate.checks
        ),
        "",
    ]
    # Two bases never share a column: each has a table of its own.
    for basis in dict.fromkeys(rung.basis for rung in retention.rungs):
        lines += [
            f"| rung (basis: {basis}) | perplexity | 95 % | retention | 95 % | top-1 agreement |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {rung.rung} | {rung.perplexity:.3f} | {_interval(rung.perplexity_ci95)} "
            f"| {rung.retention:.4f} | {_interval(rung.retention_ci95)} | {rung.top1_agreement:.3f} |"
            for rung in retention.rungs
            if rung.basis == basis
        ]
        lines.append("")
    if retention.retention.ci95 is None:
        lines += [f"{too_few(retention.documents, retention.effective_documents).capitalize()}.", ""]
    if retention.kept_tokens is not None:
        lines += [
            f"Its vocabulary was trimmed to {retention.kept_tokens:,} tokens, by what the text uses, the held-out text"
            " included: its perplexity is over those, the teacher's over all of its own. Other text takes more tokens.",
            "",
        ]
    return lines


def _speed(name: str, latency: Latency | None) -> list[str]:
    if latency is None:
        return [f"{markdown(name)}: not measured.", ""]
    on = latency.measured_on
    where = markdown(f"{on.get('machine')}, {on.get('cpu')}, {on.get('threads')} threads")
    figures = f"decode {latency.decode_tokens_per_s:,.1f} tokens/s, first token {latency.ttft_ms.p50:,.1f} ms (p50)"
    lines = [f"{markdown(name)}: {figures}; basis **{latency.basis}** on {where}.", ""]
    if latency.basis == "proxy":
        lines[1:1] = ["That is not the target, or not with the target's GPU: it tells nothing of the target's speed."]
    return lines


def target_text(manifest: Manifest) -> str:
    return markdown(str(manifest.target.get("title") or manifest.target.get("name", "an unnamed target")))


def _interval(ci95: tuple[float, float] | None) -> str:
    return "too few documents" if ci95 is None else f"{ci95[0]:.4g}–{ci95[1]:.4g}"


def markdown(text: str) -> str:
    """Text of a record as Markdown that shows it as it is: no tables, links, HTML or headings come of it."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", plain(text))
