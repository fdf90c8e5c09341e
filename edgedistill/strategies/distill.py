"""The distill stage: teacher's signals + student + data → a trained checkpoint in the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill.config.recipe import Cache, Distill, Recipe
from edgedistill.errors import UserError
from edgedistill.models.device import device_kind
from edgedistill.models.folder import (
    ModelFolder,
    copy_tokenizer,
    open_model,
    require_same_tokenizer,
    require_weights,
    tokenizer_sha256,
    weights_sha256,
)
from edgedistill.models.generation import GENERATION_FILE
from edgedistill.progress import QUIET, Progress
from edgedistill.records.data import DataResult, VocabularyResult
from edgedistill.records.shape import Shape
from edgedistill.records.training import SignalsResult, StudentResult, TeacherResult
from edgedistill.store import Store, Stored, Work, sha256_of, versions, write_durably
from edgedistill.student.start import start_student
from edgedistill.teacher.stage import mixture_key
from edgedistill.training.save import keep_generation, save_model, weights_digest
from edgedistill.training.text import Text, training_text

if TYPE_CHECKING:
    from edgedistill.losses.losses import LossSpec
    from edgedistill.signals.signals import LiveSignals, MixedSignals, Signals
    from edgedistill.training.ranks import Ranks

MAX_CACHE_BYTES = 16 << 30
EPOCHS_FOR_CACHE = 1.5  # below, writing the cache costs more than it saves
SAMPLE_TOKENS = 8192  # of the training text, from which the importance of the teacher's parts is measured
NOT_IN_KEY = {"checkpoint_every_s", "tracker", "qad"}


def student_inputs(
    recipe: Recipe, *, shape: Shape, teacher: TeacherResult, data: DataResult, pretrained_sha256: str | None
) -> dict[str, Any]:
    """What a student's key is made of: everything that can change its weights."""
    return {
        "distill": recipe.distill.key({*NOT_IN_KEY, "micro_batch_sequences"})
        | {"micro_batch_sequences": recipe.distill.micro_batch_sequences or recipe.distill.batch_sequences},
        "student": recipe.student.model_dump(mode="json", include={"start", "layer_choice", "trim_vocabulary"}),
        "pretrained": pretrained_sha256,
        "shape": shape.model_dump(mode="json"),
        "teacher": teacher.weights_sha256,
        "further_teachers": mixture_key(teacher),
        "teacher_precision": recipe.teacher.precision,
        "tokenizer": teacher.tokenizer_sha256,
        # rotary base, norms, stop tokens: the student takes them over
        "teacher_settings": {
            name: sha256_of(Path(teacher.path) / name)
            for name in ("config.json", GENERATION_FILE)
            if (Path(teacher.path) / name).is_file()
        },
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
    """The student of this recipe and shape: found in the store, or trained there by all ranks.

    Raises UserError where tokenizers differ or the start does not fit, before anything is trained. A trimmed
    vocabulary is found in the store, or made, first.
    """
    from edgedistill.training.ranks import ranks_here, run_together

    trimmed = trimmed_vocabulary(recipe, teacher, data, store, progress)
    if trimmed is not None and trimmed.result.tokens != shape.vocab_size:
        raise UserError(
            f"the student's shape has {shape.vocab_size:,} tokens, its trimmed vocabulary {trimmed.result.tokens:,}",
            "leave the vocabulary's size to the plan",
        )
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
    ranks = ranks_here()
    return run_together(
        ranks,
        store,
        "student",
        inputs,
        lambda work: _train(recipe, shape, teacher, data, pretrained, trimmed, work, store, ranks, progress),
        StudentResult,
        progress.say,
    )


def trimmed_vocabulary(
    recipe: Recipe, teacher: TeacherResult, data: Stored[DataResult], store: Store, progress: Progress = QUIET
) -> Stored[VocabularyResult] | None:
    """The student's own vocabulary where `student.trim_vocabulary` asks for one. UserError where there can be none."""
    if not recipe.student.trim_vocabulary:
        return None
    from edgedistill.student.vocabulary import obtain_vocabulary

    return obtain_vocabulary(Path(teacher.path), data=data, store=store, progress=progress)


def loss_of(settings: Distill, vocab: int) -> LossSpec:
    """The recipe's mix of losses."""
    from edgedistill.losses.losses import LossSpec

    return LossSpec(
        settings.losses,
        temperature=settings.temperature,
        vocab=vocab,
        jsd_beta=settings.jsd_beta,
        skew=settings.skew,
    )


def _train(
    recipe: Recipe,
    shape: Shape,
    teacher: TeacherResult,
    data: Stored[DataResult],
    pretrained: ModelFolder | None,
    trimmed: Stored[VocabularyResult] | None,
    work: Work,
    store: Store,
    ranks: Ranks,
    progress: Progress,
) -> StudentResult:
    import torch

    from edgedistill.student.lora import add_adapters, merge_adapters
    from edgedistill.training.trainer import train

    settings = recipe.distill
    teacher_folder = Path(teacher.path)
    trimmed_folder = None if trimmed is None else trimmed.directory / trimmed.result.path
    tokenizer_folder = trimmed_folder or teacher_folder
    text = training_text(tokenizer_folder, data, settings, seed=recipe.seed, share=settings.documents_share)
    sample = torch.from_numpy(
        text.packed.sequence_ids(np.arange(min(text.packed.sequences, SAMPLE_TOKENS // settings.context_tokens + 1)))
    )[:, :-1]

    def start() -> tuple[Any, dict[str, Any]]:
        return start_student(
            recipe.student, shape, teacher=teacher_folder, pretrained=pretrained, seed=recipe.seed, sample=sample,
            trimmed=trimmed_folder,
        )  # fmt: skip

    model, kept = start()
    if settings.lora.rank:
        model = add_adapters(
            model, settings.lora, folder=work.state / f"start-{ranks.rank}", device=ranks.device, seed=recipe.seed,
            sharded=ranks.sharded,
        )  # fmt: skip
    if not settings.lora.rank or settings.lora.base == "fp32":
        model.to(ranks.device)
    loss = loss_of(settings, text.tokenizer.vocab)
    signals = None
    if loss.needs_teacher:
        signals = _signals(recipe, teacher, data.result, text, trimmed, work, store, ranks, progress)
    if ranks.main:  # both are in memory now, as they were when they were hashed
        require_weights(teacher_folder, teacher.weights_sha256, store, role="teacher")
    progress.say(
        f"distill: {shape.parameters:,} parameters, {len(text.packed.stream):,} tokens of text,"
        f" teacher signals {signals.name if signals else 'none'}, on {ranks.device.type}"
        + (f", {ranks.world} ranks" if ranks.world > 1 else "")
    )
    result = train(
        model,
        data=text.packed,
        evaluation=text.evaluation,
        settings=settings,
        loss=loss,
        signals=signals,
        state=work.state / "checkpoints",
        progress=progress,
        label="distill",
        ranks=ranks,
        taid=(settings.taid_start, settings.taid_end) if settings.taid > 0 else (1.0, 1.0),
        logs=store.root / "logs" / f"student-{work.key}",
    )
    if settings.lora.rank:
        model = merge_adapters(model, start()[0])
    folder = work.out / "model"
    save_model(model, folder, ranks)
    if ranks.main:
        # Where generation stops and how it samples is the teacher's, also where config.json says less.
        source = tokenizer_folder if pretrained is None else pretrained.path
        copy_tokenizer(source, folder)
        keep_generation(source, folder)
    ranks.barrier()
    return StudentResult(
        path="model",
        start=recipe.student.start,
        start_details=kept | ({} if trimmed is None else {"vocabulary": trimmed.result.model_dump(exclude={"path"})}),
        shape=shape,
        parameters=shape.parameters,
        weights_sha256=weights_digest(folder),
        tokenizer_sha256=tokenizer_sha256(folder),
        teacher_weights_sha256=teacher.weights_sha256,
        further_teachers=teacher.also,
        signals=signals.name if signals else "none",
        training=result,
    )


def _signals(
    recipe: Recipe,
    teacher: TeacherResult,
    data: DataResult,
    text: Text,
    trimmed: Stored[VocabularyResult] | None,
    work: Work,
    store: Store,
    ranks: Ranks,
    progress: Progress,
) -> Signals:
    """The teacher live, or a cache: the recipe's choice, or the exact cache where it pays and fits."""
    from edgedistill.signals.signals import LiveSignals
    from edgedistill.teacher.cached import cache_key, hidden_in, obtain_cache
    from edgedistill.training.trainer import total_steps

    settings = recipe.distill
    kept = None if trimmed is None else trimmed.result.kept_sha256

    def load() -> LiveSignals | MixedSignals:
        return load_teachers(recipe, teacher, ranks, trimmed)

    if settings.teacher_signals == "cached":
        return obtain_cache(
            recipe, teacher=teacher, data=data, tokenizer=text.tokenizer, packed=text.packed, load=load, store=store,
            ranks=ranks, kept_sha256=kept, progress=progress,
        )  # fmt: skip
    epochs = total_steps(settings, text.packed) * settings.batch_sequences / text.packed.sequences
    size = 2 * text.packed.sequences * text.packed.context * teacher.shape.hidden_size
    # several teachers have no states in common to keep
    if teacher.also or not ranks.broadcast(_cache_pays(settings, epochs=epochs, size=size, state=work.state)):
        return load()
    live = load()
    assert isinstance(live, LiveSignals)
    hidden = recipe.model_copy(update={"distill": settings.model_copy(update={"cache": Cache(kind="hidden")})})
    key = cache_key(
        hidden, teacher=teacher, data=data, tokenizer=text.tokenizer, packed=text.packed, ranks=ranks, kept_sha256=kept
    )
    return hidden_in(work.state / "signals", live=live, packed=text.packed, key=key, ranks=ranks, progress=progress)


def load_teachers(
    recipe: Recipe, teacher: TeacherResult, ranks: Ranks, trimmed: Stored[VocabularyResult] | None = None
) -> LiveSignals | MixedSignals:
    """The teacher in memory, ready to teach; with `teacher.also`, all of them. `trimmed`: the student's vocabulary."""
    from edgedistill.signals.signals import MixedSignals
    from edgedistill.teacher.live import live_teacher

    low = recipe.distill.precision == "bf16"
    folders = [(Path(teacher.path), teacher.weight), *((Path(each.path), each.weight) for each in teacher.also)]
    kept = None
    if trimmed is not None:
        from edgedistill.student.vocabulary import kept_rows

        kept = kept_rows(Path(teacher.path), trimmed.directory / trimmed.result.path).to(ranks.device)
    apart = recipe.distill.attention == "documents"
    live = [
        (live_teacher(path, recipe.teacher, low_precision=low, ranks=ranks, kept=kept, documents=apart), weight)
        for path, weight in folders
    ]
    return live[0][0] if len(live) == 1 else MixedSignals(live)


def cache_signals(
    recipe: Recipe, *, teacher: TeacherResult, data: Stored[DataResult], store: Store, progress: Progress = QUIET
) -> tuple[str, SignalsResult]:
    """The cache that `distill` will read: found or made by all ranks. Where it lies, and its size."""
    from edgedistill.teacher.cached import obtain_cache
    from edgedistill.training.ranks import ranks_here

    settings = recipe.distill
    ranks = ranks_here()
    trimmed = trimmed_vocabulary(recipe, teacher, data, store, progress)
    folder = Path(teacher.path) if trimmed is None else trimmed.directory / trimmed.result.path
    text = training_text(folder, data, settings, seed=recipe.seed, share=settings.documents_share)
    made = obtain_cache(
        recipe, teacher=teacher, data=data.result, tokenizer=text.tokenizer, packed=text.packed,
        load=lambda: load_teachers(recipe, teacher, ranks, trimmed), store=store, ranks=ranks,
        kept_sha256=None if trimmed is None else trimmed.result.kept_sha256, progress=progress,
    )  # fmt: skip
    tokens = text.packed.sequences * text.packed.context
    per_token = made.reader.bytes_per_token
    return made.url, SignalsResult(
        path=made.url, kind=made.reader.kind, tokens=tokens, bytes=round(per_token * tokens), bytes_per_token=per_token
    )


def _cache_pays(settings: Distill, *, epochs: float, size: int, state: Path) -> bool:
    """Whether the exact cache pays and fits; decided once, so that a resumed run does as the one before."""
    mark = state / "signals.json"
    if mark.is_file():
        return bool(json.loads(mark.read_text(encoding="utf-8"))["cached"])
    free = shutil.disk_usage(state).free
    pays = settings.precision == "bf16" and epochs >= EPOCHS_FOR_CACHE and size <= min(MAX_CACHE_BYTES, free // 4)
    cached = settings.teacher_signals == "auto" and pays
    write_durably(mark, json.dumps({"cached": cached}))
    return cached


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
