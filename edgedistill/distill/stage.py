"""The distill stage: teacher's signals + student + data → a trained checkpoint in the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgedistill.data.prepare import read_part
from edgedistill.distill.device import device_kind
from edgedistill.distill.student import start_student
from edgedistill.distill.teacher import weights_digest
from edgedistill.errors import UserError
from edgedistill.models import (
    ModelFolder,
    copy_tokenizer,
    open_model,
    require_same_tokenizer,
    tokenizer_sha256,
    weights_sha256,
)
from edgedistill.progress import QUIET, Progress
from edgedistill.recipe import Distill, Recipe
from edgedistill.records import DataResult, Shape, StudentResult, TeacherResult
from edgedistill.store import Store, Stored, Work, versions, write_durably

MAX_CACHE_BYTES = 16 << 30
EPOCHS_FOR_CACHE = 1.5  # below, writing the cache costs more than it saves


def student_inputs(
    recipe: Recipe, *, shape: Shape, teacher: TeacherResult, data: DataResult, pretrained_sha256: str | None
) -> dict[str, Any]:
    """What a student's key is made of: everything that can change its weights."""
    return {
        "distill": recipe.distill.model_dump(mode="json", exclude={"checkpoint_every_s", "micro_batch_sequences"})
        | {"micro_batch_sequences": recipe.distill.micro_batch_sequences or recipe.distill.batch_sequences},
        "start": recipe.student.start,
        "pretrained": pretrained_sha256,
        "shape": shape.model_dump(mode="json"),
        "teacher": teacher.weights_sha256,
        "tokenizer": teacher.tokenizer_sha256,
        "data": data.sha256,
        "seed": recipe.seed,
        "device": device_kind(),
        "versions": versions("torch", "transformers", "tokenizers", "edgedistill"),
    }


def distill(
    recipe: Recipe,
    *,
    shape: Shape,
    teacher: TeacherResult,
    data: Stored[DataResult],
    store: Store,
    progress: Progress = QUIET,
) -> Stored[StudentResult]:
    """The student of this recipe and shape: found in the store, or trained there.

    Raises UserError where tokenizers differ or the start does not fit, before anything is trained.
    """
    pretrained = None
    if recipe.student.start == "pretrained":
        if recipe.student.model is None:
            raise UserError("student.start is pretrained but no student.model is named", "give --student FOLDER")
        pretrained = open_model(recipe.student.model, revision=recipe.student.revision, role="student")
        require_same_tokenizer(Path(teacher.path), pretrained.path)
    inputs = student_inputs(
        recipe,
        shape=shape,
        teacher=teacher,
        data=data.result,
        pretrained_sha256=weights_sha256(pretrained, store) if pretrained else None,
    )
    return store.run(
        "student",
        inputs,
        lambda work: _train(recipe, shape, teacher, data, pretrained, work, progress),
        StudentResult,
        progress.say,
    )


def _train(
    recipe: Recipe,
    shape: Shape,
    teacher: TeacherResult,
    data: Stored[DataResult],
    pretrained: ModelFolder | None,
    work: Work,
    progress: Progress,
) -> StudentResult:
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.distill.device import training_device
    from edgedistill.distill.losses import LossSpec
    from edgedistill.distill.signals import CachedSignals, LiveSignals, Signals, cache_bytes
    from edgedistill.distill.trainer import total_steps, train
    from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks, pack, scoring_windows

    settings = recipe.distill
    teacher_folder = Path(teacher.path)
    tokenizer = TextTokenizer.load(teacher_folder)
    blocks = transfer_part(read_part(data.directory, "train"), settings.documents_share)
    texts = [text for block in blocks for text in block]
    packed = pack(
        tokenizer.encode(texts), context=settings.context_tokens, seed=recipe.seed, eos=tokenizer.eos, bos=tokenizer.bos
    )
    evaluation = scoring_windows(
        encode_blocks(tokenizer, read_part(data.directory, "calibration")),
        context=settings.context_tokens,
        stride=None,
        max_tokens=None,
    )
    model = start_student(recipe.student.start, shape, teacher=teacher_folder, pretrained=pretrained, seed=recipe.seed)
    device = training_device()
    model.to(device)
    signals: Signals | None = None
    low_precision = settings.precision == "bf16"
    if settings.forward_kl > 0:
        original = AutoModelForCausalLM.from_pretrained(
            teacher_folder,
            dtype=torch.float32,
            use_safetensors=True,
        ).to(device)
        steps = total_steps(settings, packed)
        epochs = steps * settings.batch_sequences / packed.sequences
        size = cache_bytes(packed, teacher.shape.hidden_size)
        cached = _cache_signals(settings, epochs=epochs, size=size, state=work.state)
        if cached:
            signals = CachedSignals(
                original, packed, folder=work.state / "signals", low_precision=low_precision, progress=progress
            )
        else:
            signals = LiveSignals(original, low_precision=low_precision)
    progress.say(
        f"distill: {shape.parameters:,} parameters, {len(packed.stream):,} tokens of text,"
        f" teacher signals {signals.name if signals else 'none'}, on {device.type}"
    )
    result = train(
        model,
        data=packed,
        evaluation=evaluation,
        settings=settings,
        loss=LossSpec(
            forward_kl=settings.forward_kl,
            cross_entropy=settings.cross_entropy,
            temperature=settings.temperature,
            vocab=tokenizer.vocab,
        ),
        signals=signals,
        state=work.state / "checkpoints",
        progress=progress,
        label="distill",
    )
    folder = work.out / "model"
    model.cpu()
    model.save_pretrained(folder)  # type: ignore[operator]
    copy_tokenizer(teacher_folder if pretrained is None else pretrained.path, folder)
    return StudentResult(
        path="model",
        start=recipe.student.start,
        shape=shape,
        parameters=shape.parameters,
        weights_sha256=weights_digest(folder),
        tokenizer_sha256=tokenizer_sha256(folder),
        teacher_weights_sha256=teacher.weights_sha256,
        training=result,
    )


def _cache_signals(settings: Distill, *, epochs: float, size: int, state: Path) -> bool:
    """Whether the teacher's signals are cached; decided once, so that a resumed run does as the one before.

    Raises UserError where caching is asked for in fp32, or does not fit on the disk.
    """
    mark = state / "signals.json"
    if mark.is_file():
        return bool(json.loads(mark.read_text(encoding="utf-8"))["cached"])
    low_precision = settings.precision == "bf16"
    free = shutil.disk_usage(state).free
    if settings.teacher_signals == "cached":
        if not low_precision:
            raise UserError(
                "distill.teacher_signals is cached, which keeps bf16, and distill.precision is fp32",
                "set distill.teacher_signals=live, or distill.precision=bf16",
            )
        if size > free:
            raise UserError(
                f"the teacher's signals take {size:,} bytes on disk, and {free:,} are free",
                "free space, name another disk in EDGEDISTILL_STORE, or set distill.teacher_signals=live",
            )
        cached = True
    else:
        pays = low_precision and epochs >= EPOCHS_FOR_CACHE and size <= min(MAX_CACHE_BYTES, free // 4)
        cached = settings.teacher_signals == "auto" and pays
    write_durably(mark, json.dumps({"cached": cached}))
    return cached


def transfer_part(texts: list[list[str]], share: float) -> list[list[str]]:
    """The training blocks that the student learns from: evenly spread, `share` of them, at least one."""
    if share >= 1.0:
        return texts
    count = max(1, round(share * len(texts)))
    return [texts[int(i * len(texts) / count)] for i in range(count)]


def given_student(folder: ModelFolder, store: Store) -> StudentResult:
    """The record of a finished model that is exported without distilling."""
    return StudentResult(
        path=str(folder.path),
        start="given",
        shape=folder.shape,
        parameters=folder.shape.parameters,
        weights_sha256=weights_sha256(folder, store),
        tokenizer_sha256=tokenizer_sha256(folder.path),
    )
