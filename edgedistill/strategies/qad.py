"""Quantization-aware distillation: a short run under the artifact's own rounding, after distillation, before export.

The student computes with what the artifact will store (`fake_quant`), and its fp32 masters learn from the teacher and
from the float student that they started as. Forward KL is linear in what is learnt from, so the two together are one
mixture of probabilities: the teacher's share keeps improving the student, the float student's holds the quantized model
to it with little noise. What is saved are the masters; exporting them rounds them to what training saw at its end.
"""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.config.recipe import Distill, Recipe
from edgedistill.config.targets import parse_artifact
from edgedistill.errors import UserError
from edgedistill.machine import facts
from edgedistill.models.device import device_kind
from edgedistill.models.loading import LOADING
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.data import DataResult
from edgedistill.records.training import QadResult, StudentResult, TeacherResult
from edgedistill.store import Store, Stored, Work, versions
from edgedistill.strategies.distill import load_teachers, trimmed_vocabulary
from edgedistill.teacher.stage import mixture_key

if TYPE_CHECKING:
    from torch import nn

    from edgedistill.records.training import TrainResult
    from edgedistill.signals.signals import LiveSignals, MixedSignals
    from edgedistill.strategies.fake_quant import Rounding
    from edgedistill.training.ranks import Ranks
    from edgedistill.training.text import Text

IMPORTANCE_FILE = "importance.safetensors"
FLOATS = ("F32", "F16", "BF16", "FP32", "FP16")
# What decides neither the rounding nor the run that learns under it.
NOT_IN_KEY = {"checkpoint_every_s", "tracker", "lora", "teacher_signals", "cache"}


def wanted(recipe: Recipe, artifact: str) -> bool:
    """Whether this artifact gets a run under its rounding: the recipe asks for one, and it is quantized."""
    return recipe.distill.qad.tokens_share > 0 and parse_artifact(artifact)[1] not in FLOATS


def pinned(options: ExportOptions, importance_file: Path | None = None) -> ExportOptions:
    """The export whose rounding training saw: its importance matrix is this one or none, its mix not searched for.

    A matrix that the export computed itself, or a mix that it chose, would follow weights that have moved since. Raises
    UserError where a search for a mix is asked for.
    """
    if options.mixed_retention is not None:
        raise UserError(
            "distill.qad.tokens_share and export.mixed_retention are both set: the mix would be chosen again after"
            " training under it",
            "name the mix with export.tensor_types, or set distill.qad.tokens_share=0",
        )
    return dataclasses.replace(options, importance_matrix="off", importance_file=importance_file)


def quantization_aware(
    recipe: Recipe,
    artifact: str,
    *,
    student: Stored[StudentResult],
    teacher: TeacherResult,
    data: Stored[DataResult],
    options: ExportOptions,
    context_tokens: int,
    store: Store,
    progress: Progress = QUIET,
) -> Stored[QadResult]:
    """The masters of `artifact` ("gguf:Q4_0"), trained under its rounding: found in the store, or made there.

    Resumable as the student's own training. Raises UserError where options and rounding do not go together.
    """
    settings = qad_settings(recipe.distill, distilled_tokens=_distilled_tokens(recipe, student.result))
    pinned(options)  # refuses before any work
    inputs = {
        "artifact": artifact,
        "qad": recipe.distill.qad.model_dump(mode="json"),
        "settings": settings.key({*NOT_IN_KEY, "qad"}),
        "options": dataclasses.replace(options, compare_logits=False, compare_speed=False, notes=()).key(),
        "context_tokens": context_tokens,
        "student": student.result.weights_sha256,
        "teacher": teacher.weights_sha256,
        "further_teachers": mixture_key(teacher),
        "teacher_precision": recipe.teacher.precision,
        "tokenizer": student.result.tokenizer_sha256,
        "data": data.result.sha256,
        "seed": recipe.seed,
        "device": device_kind(),
        "versions": versions(
            "torch", "transformers", "edgedistill", "gguf", "llama-cpp-python", "onnxruntime", "onnxruntime-genai"
        ),
    }

    def make(work: Work) -> QadResult:
        return _make(recipe, artifact, settings, student, teacher, data, options, context_tokens, store, work, progress)

    return store.run("qad", inputs, make, QadResult, progress.say)


def qad_settings(settings: Distill, *, distilled_tokens: int) -> Distill:
    """The recipe's training settings as the run under rounding takes them: short, AdamW, one evaluation at its end."""
    asked = settings.qad
    return settings.model_copy(
        update={
            "tokens": max(1, round(asked.tokens_share * distilled_tokens)),
            "learning_rate": asked.learning_rate,
            "batch_sequences": asked.batch_sequences,
            "micro_batch_sequences": None,
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "warmup_share": 0.05,
            "final_rate_share": 0.05,
            # the weights are those of the end: an earlier evaluation could only pick others by chance
            "evaluate_every_share": 1.0,
            "patience": 0,
            "compile": False,
        }
    )


def train_under_rounding(
    model: nn.Module,
    rounding: Rounding | None,
    *,
    float_student: nn.Module,
    teacher: LiveSignals | MixedSignals,
    text: Text,
    settings: Distill,
    state: Path,
    ranks: Ranks | None = None,
    progress: Progress = QUIET,
    logs: Path | None = None,
) -> tuple[TrainResult, str]:
    """Train `model` in place under `rounding` (None: as it is, for a control); how it went, and the signals' name.

    `float_student` is frozen and teaches beside `teacher`, whose share is settings.qad.teacher_share.
    """
    from edgedistill.losses.losses import LossSpec
    from edgedistill.models.device import training_device
    from edgedistill.signals.signals import LiveSignals, MixedSignals
    from edgedistill.strategies.fake_quant import FakeQuantizer
    from edgedistill.training.ranks import Ranks
    from edgedistill.training.trainer import train

    ranks = ranks or Ranks(0, 1, training_device(), False)
    share = settings.qad.teacher_share
    low = settings.precision == "bf16"
    teachers = teacher.parts if isinstance(teacher, MixedSignals) else [(teacher, 1.0)]
    parts = [(part, share * weight) for part, weight in teachers if share > 0]
    if share < 1:
        own = LiveSignals(float_student.to(ranks.device), low_precision=low, name="float student")
        parts.append((own, 1.0 - share))
    signals = MixedSignals(parts)
    model.to(ranks.device).requires_grad_(True)
    threads = max(1, len(facts.usable_cpus()))
    quantizer = None if rounding is None else FakeQuantizer(model, rounding, threads=threads)
    result = train(
        model,
        data=text.packed,
        evaluation=text.evaluation,
        settings=settings,
        loss=LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=text.tokenizer.vocab),
        signals=signals,
        state=state,
        progress=progress,
        label="qad",
        ranks=ranks,
        logs=logs,
        weights=nullcontext if quantizer is None else quantizer.applied,
    )
    return result, signals.name


def _make(
    recipe: Recipe,
    artifact: str,
    settings: Distill,
    student: Stored[StudentResult],
    teacher: TeacherResult,
    data: Stored[DataResult],
    options: ExportOptions,
    context_tokens: int,
    store: Store,
    work: Work,
    progress: Progress,
) -> QadResult:
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.models.device import training_device
    from edgedistill.models.folder import copy_tokenizer
    from edgedistill.strategies.fake_quant import rounding_of
    from edgedistill.training.ranks import Ranks
    from edgedistill.training.save import keep_generation, save_model, weights_digest
    from edgedistill.training.text import training_text

    folder = student.directory / student.result.path
    format_, quantization = parse_artifact(artifact)
    ranks = Ranks(0, 1, training_device(), False)  # the launch's other processes have left by now
    scratch = work.state / "rounding"
    shutil.rmtree(scratch, ignore_errors=True)
    progress.say(f"qad: {artifact}, {settings.tokens:,} tokens under its rounding")
    work.out.mkdir(parents=True, exist_ok=True)
    importance = float_importance(folder, artifact, options, work.out / IMPORTANCE_FILE, progress)
    options = dataclasses.replace(pinned(options, importance), compare_speed=False)
    rounding = rounding_of(
        folder, format_, quantization, scratch=scratch, options=options, context_tokens=context_tokens,
        progress=progress,
    )  # fmt: skip
    shutil.rmtree(scratch)
    text = training_text(folder, data, settings, seed=recipe.seed, share=settings.documents_share)
    trimmed = trimmed_vocabulary(recipe, teacher, data, store, progress)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **LOADING)

    model = load()
    result, signals = train_under_rounding(
        model, rounding, float_student=load(), teacher=load_teachers(recipe, teacher, ranks, trimmed), text=text,
        settings=settings, state=work.state / "checkpoints", ranks=ranks, progress=progress,
        logs=store.root / "logs" / f"qad-{work.key}",
    )  # fmt: skip
    save_model(model, work.out / "model", ranks)
    copy_tokenizer(folder, work.out / "model")
    keep_generation(folder, work.out / "model")
    return QadResult(
        path="model",
        artifact=artifact,
        weights_sha256=weights_digest(work.out / "model"),
        student_weights_sha256=student.result.weights_sha256,
        tokenizer_sha256=student.result.tokenizer_sha256,
        tensor_types=dict(rounding.types),
        importance_file=None if importance is None else importance.name,
        signals=signals,
        training=result,
    )


def float_importance(folder: Path, artifact: str, options: ExportOptions, out: Path, progress: Progress) -> Path | None:
    """The importance matrix of the float student, written to `out`, where an export of it would use one; else None."""
    from edgedistill.gguf.importance import calibration_sequences, compute_importance, write_importance
    from edgedistill.quantization.mixes import MIXES_THAT_NEED_IMPORTANCE, uses_importance

    format_, quantization = parse_artifact(artifact)
    if format_ != "gguf" or not uses_importance(quantization, options.importance_matrix):
        return None
    if options.importance_file is not None:
        shutil.copyfile(options.importance_file, out)
        return out
    try:
        sequences, record = calibration_sequences(folder, options)
    except UserError as error:
        if options.importance_matrix == "on" or quantization in MIXES_THAT_NEED_IMPORTANCE:
            raise
        progress.warn(f"qad: no importance matrix: {error.cause}")
        return None
    write_importance(compute_importance(folder, sequences, calibration=record, progress=progress), out)
    return out


def _distilled_tokens(recipe: Recipe, student: StudentResult) -> int:
    if student.training is not None:
        return student.training.tokens
    raise UserError(
        "distill.qad.tokens_share is a share of the distillation's tokens, and this student was not distilled here",
        "set distill.qad.tokens_share=0",
    )
