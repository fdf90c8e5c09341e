"""Stage of quantization.py that trains: quantization-aware distillation against a control, over three seeds.

Per seed both start at the distilled student and see the same extra tokens with the same loss (the teacher's and the float
student's probabilities, see strategies/qad.py); only the aware run computes with the stored weights. The control is then
quantized by the product's defaults. Both are held to the control's F16 file, in the runtimes that ship.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bound, as_text, upper
from quantization_setup import Scores, Subject, exported, kl_by_document, options, scored
from transformers import AutoModelForCausalLM

from edgedistill.config.targets import parse_artifact
from edgedistill.models.folder import copy_tokenizer
from edgedistill.progress import Progress
from edgedistill.records.artifact import Artifact
from edgedistill.records.base import Record
from edgedistill.records.training import TrainResult
from edgedistill.signals.signals import LiveSignals
from edgedistill.statistics import ByUnit, Estimate, ratio_of_means
from edgedistill.store import Store, Stored, Work, versions
from edgedistill.strategies.distill import load_teachers
from edgedistill.strategies.fake_quant import rounding_of
from edgedistill.strategies.qad import IMPORTANCE_FILE, float_importance, pinned, qad_settings, train_under_rounding
from edgedistill.training.ranks import Ranks
from edgedistill.training.save import save_model, weights_digest
from edgedistill.training.text import training_text

TYPES = ("gguf:Q4_0", "gguf:Q3_K_M", "gguf:Q2_K", "onnx:INT4")
TOKENS_SHARE = 0.09
MOST_TOKENS_SHARE = 0.10
HALF = 0.5


class Remembered(LiveSignals):
    """The teacher, which answers a batch once: all runs of a seed see the same batches in the same order."""

    def __init__(self, live: LiveSignals) -> None:
        super().__init__(live.teacher, low_precision=live.low_precision, device=live.device, kept=live.kept)
        self.answers: dict[tuple[int, ...], Any] = {}

    def batch(self, rows: Any, inputs: torch.Tensor, positions: torch.Tensor | None = None) -> Any:
        key = tuple(int(row) for row in rows)
        if key not in self.answers:
            self.answers[key] = super().batch(rows, inputs, positions)
        return self.answers[key]


class Run(Record):
    """model/ and, where the rounding has one, its importance matrix."""

    weights_sha256: str
    importance: bool
    signals: str
    training: TrainResult


def trained(
    of: Subject, artifact: str | None, seed: int, *, teacher: Remembered, store: Store, progress: Progress
) -> Stored[Run]:
    """The student after the extra tokens: under `artifact`'s rounding, or (None) as it is. Found in the store, or made."""
    asked = of.recipe.distill.qad.model_copy(update={"tokens_share": TOKENS_SHARE})
    settings = qad_settings(of.recipe.distill.model_copy(update={"qad": asked}), distilled_tokens=of.distilled_tokens)
    inputs = {
        "student": of.trained.student.result.weights_sha256, "artifact": artifact, "seed": seed,
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_every_s", "tracker"}),
        "versions": versions("torch", "llama-cpp-python", "onnxruntime"),
    }  # fmt: skip

    def make(work: Work) -> Run:
        chosen, rounding = options(of), None
        matrix = None
        if artifact is not None:
            matrix = float_importance(of.folder, artifact, chosen, work.out / IMPORTANCE_FILE, progress)
            rounding = rounding_of(
                of.folder, *parse_artifact(artifact), scratch=work.state / "rounding", options=pinned(chosen, matrix)
            )
        ranks = Ranks(0, 1, torch.device("cpu"), False)
        model, float_student = (AutoModelForCausalLM.from_pretrained(of.folder, dtype=torch.float32) for _ in range(2))
        result, signals = train_under_rounding(
            model, rounding, float_student=float_student, teacher=teacher,
            text=training_text(of.folder, of.trained.data, settings, seed=seed), settings=settings,
            state=work.state / "checkpoints", ranks=ranks, progress=progress,
        )  # fmt: skip
        save_model(model, work.out / "model", ranks)
        copy_tokenizer(of.folder, work.out / "model")
        digest = weights_digest(work.out / "model")
        return Run(weights_sha256=digest, importance=matrix is not None, signals=signals, training=result)

    return store.run("quantization-qad", inputs, make, Run)


def qad_table(
    of: Subject, seeds: list[int], *, store: Store, progress: Progress
) -> tuple[dict[str, Any], list[tuple[str, ...]], list[Bound]]:
    """Mean KL from the control's F16 file: of the aware student's artifact over that of the control's own."""
    figures: dict[str, Any] = {"tokens_share": TOKENS_SHARE, "types": {}}
    rows, bounds = [], []
    pairs: dict[str, list[tuple[Scores, Scores]]] = {artifact: [] for artifact in TYPES}
    upper_of: dict[tuple[str, int], float] = {}
    for seed in seeds:
        live = load_teachers(of.recipe, of.trained.teacher, Ranks(0, 1, torch.device("cpu"), False))
        assert isinstance(live, LiveSignals)
        teacher = Remembered(live)
        control = trained(of, None, seed, teacher=teacher, store=store, progress=progress)
        figures["tokens"] = control.result.training.tokens
        where: dict[str, Any] = {"folder": control.directory / "model", "weights": control.result.weights_sha256}
        reference = exported(of, "gguf:F16", store=store, progress=progress, **where)
        for artifact in TYPES:
            plain = exported(of, artifact, store=store, progress=progress, **where)
            aware = exported_aware(of, artifact, seed, teacher=teacher, store=store, progress=progress)
            one, other = (scored(of, made, reference, store=store) for made in (aware, plain))
            kl, of_control = kl_by_document(one), kl_by_document(other)
            share = ratio_of_means(kl, of_control)
            pairs[artifact].append((one, other))
            upper_of[artifact, seed] = upper(share)
            figures["types"].setdefault(artifact, {})[f"seed {seed}"] = {
                "kl_aware": kl.mean, "kl_control": of_control.mean, "ratio": share.value, "ratio_ci95": share.ci95,
                "perplexity_aware": perplexity(one), "perplexity_control": perplexity(other),
            }  # fmt: skip
            rows.append(_row(artifact, str(seed), kl, of_control, share))
    for artifact, seen in pairs.items():
        kl, of_control = (pooled([pair[side] for pair in seen]) for side in (0, 1))
        share = ratio_of_means(kl, of_control)
        figures["types"][artifact]["all seeds"] = {"ratio": share.value, "ratio_ci95": share.ci95}
        uppers = [upper_of[artifact, seed] for seed in seeds]
        rows.append(_row(artifact, "all", kl, of_control, share))
        bounds.append(
            Bound(f"{artifact}: KL from the F16 control, aware / control, upper end", upper(share), "<=", HALF)
        )
        bounds.append(Bound(f"{artifact}: the same, worst of {len(seeds)} seeds", max(uppers), "<=", HALF))
    spent = figures["tokens"] / of.distilled_tokens
    bounds.append(Bound("extra tokens / tokens of the distillation", spent, "<=", MOST_TOKENS_SHARE))
    return figures, rows, bounds


def exported_aware(
    of: Subject, artifact: str, seed: int, *, teacher: Remembered, store: Store, progress: Progress
) -> Stored[Artifact]:
    run = trained(of, artifact, seed, teacher=teacher, store=store, progress=progress)
    matrix: Path | None = run.directory / IMPORTANCE_FILE if run.result.importance else None
    chosen = dataclasses.replace(pinned(options(of), matrix), compare_speed=False)
    return exported(
        of, artifact, store=store, folder=run.directory / "model", weights=run.result.weights_sha256, chosen=chosen,
        progress=progress,
    )  # fmt: skip


def perplexity(scores: Scores) -> float:
    return float(np.exp(scores.nll.mean(dtype=np.float64)))


def pooled(seen: list[Scores]) -> ByUnit:
    """The mean over seeds: a document's tokens of all seeds are one unit."""
    of = [kl_by_document(scores) for scores in seen]
    return ByUnit(np.mean([one.sums for one in of], axis=0), of[0].counts)


def _row(artifact: str, seed: str, kl: ByUnit, of_control: ByUnit, share: Estimate) -> tuple[str, ...]:
    return (
        artifact, seed, f"{kl.mean:.5f}", f"{of_control.mean:.5f}",
        as_text(share),
    )  # fmt: skip
