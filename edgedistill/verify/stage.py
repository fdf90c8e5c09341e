"""The verify stage: the ladder in the store; the gate is read anew each time, since it changes no measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill import statistics
from edgedistill.config.recipe import Verify
from edgedistill.errors import GateFailed
from edgedistill.machine import facts
from edgedistill.models.folder import require_weights
from edgedistill.models.generation import generation_sha256
from edgedistill.progress import QUIET, Progress
from edgedistill.records.artifact import Artifact
from edgedistill.records.retention import Measured, Retention
from edgedistill.records.training import QadResult, StudentResult, TeacherResult
from edgedistill.runtimes.facts import runtime_facts
from edgedistill.runtimes.unchanged import unchanged
from edgedistill.store import Store, Stored, Work, canonical_json, versions, write_durably
from edgedistill.verify.gate import failures, judged, remedy, spanned

RECORD_VERSION = 3  # what Measured holds: raise it where the ladder measures something else


def verify_artifact(
    exported: Stored[Artifact],
    *,
    student: StudentResult,
    teacher: TeacherResult,
    held_out: list[list[str]],
    settings: Verify,
    store: Store,
    masters: QadResult | None = None,
    progress: Progress = QUIET,
) -> tuple[Retention, Path]:
    """The retention ladder of an artifact with its gate, and the folder of its record, where retention.json lies.

    A gate that did not pass is in the record; it is for the caller to raise it (`require_gate`), so that other work
    ends first. `masters`, its path absolute: what the artifact was exported from where that is not the student.
    """
    inputs: dict[str, Any] = {
        "artifact": exported.result.sha256,
        # what the record says of the bytes decides what they are held to
        "artifact_record": exported.result.model_dump(mode="json", exclude={"speed", "sensitivity", "parity"}),
        "student": student.weights_sha256,
        # what ends a text, and with what settings, is held to the student's files too
        "generation": generation_sha256(Path(student.path)),
        "masters": None if masters is None else masters.weights_sha256,
        "teacher": teacher.weights_sha256,
        "held_out": hashlib.sha256(canonical_json(held_out).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json", exclude={"min_retention"}),
        "intervals": statistics.METHOD,
        "gate": RECORD_VERSION,
        "tokenizers": [teacher.tokenizer_sha256, student.tokenizer_sha256],
        "machine": facts.fingerprint(),
        "runtime": runtime_facts(exported.result.runtime, store),
        "versions": versions(
            "edgedistill", "torch", "transformers", "tokenizers", "gguf", "onnxruntime", "onnxruntime-genai"
        ),
    }

    def measure(work: Work) -> Measured:
        from edgedistill.verify.ladder import Subject, climb

        progress.say(f"verify: {exported.result.format}:{exported.result.quantization} in {exported.result.runtime}")

        def require_models() -> None:
            require_weights(Path(student.path), student.weights_sha256, store, role="student")
            require_weights(Path(teacher.path), teacher.weights_sha256, store, role="teacher")

        require_models()
        with unchanged(exported.result, exported.directory, store):
            measured = climb(
                Subject(
                    artifact=exported.result,
                    folder=exported.directory,
                    student=student,
                    teacher=teacher,
                    masters=None if masters is None else Path(masters.path),
                ),
                held_out=held_out,
                settings=settings,
                threads=max(1, len(facts.usable_cpus())),
                store=store,
                progress=progress,
            )
        require_models()
        return measured

    stored = store.run("verify", inputs, measure, Measured, progress.say)
    retention = judged(stored.result, settings.min_retention)
    reports = store.root / "reports" / stored.key
    reports.mkdir(parents=True, exist_ok=True)
    write_durably(reports / "retention.json", retention.model_dump_json(by_alias=True, indent=2) + "\n")
    gate = retention.gate
    progress.say(
        f"verify: retention {spanned(retention.retention)}, gate {settings.min_retention:g}"
        f" {gate.verdict if gate.passed else gate.verdict.upper()}{' (from the store)' if stored.reused else ''}"
    )
    for line in [] if gate.passed else failures(gate):
        progress.say(f"verify: {line}")
    check = retention.tokenizer
    if check.mismatches:
        progress.warn(
            f"the artifact's tokenizer differs from the original on {check.mismatches} of {check.texts} texts:"
            f" {check.first_mismatch}"
        )
    return retention, reports


def require_gate(verified: Sequence[tuple[str, Retention, Path]], *, length: str = "") -> None:
    """GateFailed that names every check that did not pass. `verified`: what it is called, its record, its reports.

    `length`: the recipe's field that says how long the student trains, and what it is, for the remedy.
    """
    failed = [one for one in verified if not one[1].gate.passed]
    if not failed:
        return
    lines = [
        f"{name}: the gate {'failed' if retention.gate.verdict == 'failed' else 'cannot tell'}: "
        + "; ".join(failures(retention.gate))
        + f"; reports in {reports} (`edgedistill report` with that folder shows them)"
        for name, retention, reports in failed
    ]
    raise GateFailed("\n".join(lines), remedy(failed[0][1].gate, length))
