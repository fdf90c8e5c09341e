"""The verify stage: the ladder in the store; the gate is read anew each time, since it changes no measurement."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.errors import GateFailed
from edgedistill.models import require_weights
from edgedistill.progress import QUIET, Progress
from edgedistill.recipe import Verify
from edgedistill.records import Artifact, Gate, Retention, StudentResult, TeacherResult
from edgedistill.runtimes.facts import runtime_facts
from edgedistill.store import Store, Stored, Work, canonical_json, versions, write_durably

FEW_DOCUMENTS = 20
MAX_MISMATCH_SHARE = 0.25  # known corners (a literal ▁, combining marks) touch a few texts, a wrong tokenizer most


def verify_artifact(
    exported: Stored[Artifact],
    *,
    student: StudentResult,
    teacher: TeacherResult,
    held_out: list[list[str]],
    settings: Verify,
    seed: int,
    store: Store,
    progress: Progress = QUIET,
) -> tuple[Retention, Path]:
    """The retention ladder of an artifact and the folder of its record, where retention.json lies.

    Raises GateFailed where the tokenizer in the artifact differs from the original's on more than corner cases.
    """
    inputs: dict[str, Any] = {
        "artifact": exported.result.sha256,
        "student": student.weights_sha256,
        "teacher": teacher.weights_sha256,
        "held_out": hashlib.sha256(canonical_json(held_out).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json", exclude={"min_retention"}),
        "seed": seed,
        "tokenizers": [teacher.tokenizer_sha256, student.tokenizer_sha256],
        "machine": machine.fingerprint(),
        "runtime": runtime_facts(exported.result.runtime, store),
        "versions": versions(
            "edgedistill", "torch", "transformers", "tokenizers", "gguf", "onnxruntime", "onnxruntime-genai"
        ),
    }

    def measure(work: Work) -> Retention:
        from edgedistill.verify.ladder import Subject, climb

        progress.say(f"verify: {exported.result.format}:{exported.result.quantization} in {exported.result.runtime}")
        require_weights(Path(student.path), student.weights_sha256, store, role="student")
        require_weights(Path(teacher.path), teacher.weights_sha256, store, role="teacher")
        return climb(
            Subject(artifact=exported.result, folder=exported.directory, student=student, teacher=teacher),
            held_out=held_out,
            settings=settings,
            seed=seed,
            threads=max(1, len(machine.usable_cpus())),
            store=store,
            progress=progress,
        )

    stored = store.run("verify", inputs, measure, Retention, progress.say)
    measured = stored.result
    gate = Gate(min_retention=settings.min_retention, passed=measured.retention.ci95[0] >= settings.min_retention)
    retention = measured.model_copy(update={"gate": gate})
    reports = store.root / "reports" / stored.key
    reports.mkdir(parents=True, exist_ok=True)
    write_durably(reports / "retention.json", retention.model_dump_json(by_alias=True, indent=2) + "\n")
    low, high = retention.retention.ci95
    progress.say(
        f"verify: retention {retention.retention.value:.3f} (95 % {low:.3f} to {high:.3f}), gate"
        f" {settings.min_retention:g} {'passed' if gate.passed else 'FAILED'}"
        f"{' (from the store)' if stored.reused else ''}"
    )
    if retention.documents < FEW_DOCUMENTS:
        progress.warn(f"only {retention.documents} held-out documents: their intervals are too narrow; give more text")
    check = retention.tokenizer
    if check.mismatches > MAX_MISMATCH_SHARE * check.texts:
        raise GateFailed(
            f"the artifact's tokenizer differs from the original on {check.mismatches} of {check.texts} texts:"
            f" {check.first_mismatch}; report in {reports}",
            "the runtime would read text that the model was not trained on: report it with the model's tokenizer.json",
        )
    if check.mismatches:
        progress.warn(
            f"the artifact's tokenizer differs from the original on {retention.tokenizer.mismatches} of"
            f" {retention.tokenizer.texts} texts: {retention.tokenizer.first_mismatch}"
        )
    return retention, reports
