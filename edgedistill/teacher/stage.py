"""The teacher: the user's own, or the quickstart's, trained on first use and kept in the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.config.recipe import Recipe, TeacherTraining
from edgedistill.data.prepare import read_part
from edgedistill.errors import UserError
from edgedistill.models.device import device_kind
from edgedistill.models.folder import (
    ModelFolder,
    open_model,
    require_same_tokenizer,
    tokenizer_sha256,
    weights_sha256,
)
from edgedistill.models.shapes import config_from_shape
from edgedistill.progress import QUIET, Progress
from edgedistill.records.data import DataResult
from edgedistill.records.shape import Shape
from edgedistill.records.training import FurtherTeacher, TeacherResult
from edgedistill.store import Store, Stored, Work, versions
from edgedistill.training.save import save_model, weights_digest
from edgedistill.training.text import training_text

if TYPE_CHECKING:
    from edgedistill.training.ranks import Ranks

BOS, EOS = "<s>", "</s>"
DEFAULT_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def teacher_shape(train: TeacherTraining) -> Shape:
    """Sizes of the teacher that `teacher.train` asks for, before it exists."""
    sizes = {name: getattr(train.shape, name) or value for name, value in DEFAULT_SHAPE.items()}
    return Shape(
        family="llama",
        vocab_size=train.vocab_size,
        tie_word_embeddings=True,
        max_position_embeddings=max(1024, train.context_tokens),
        **sizes,
    )


def obtain_teacher(
    recipe: Recipe, *, data: Stored[DataResult] | None, store: Store, progress: Progress = QUIET
) -> TeacherResult:
    """The recipe's teacher: a checked folder (`teacher.model`) with those beside it, or one trained on the data."""
    if recipe.teacher.model is not None:
        return _given(recipe, store)
    if data is None:
        raise UserError("no teacher is named and there is no data to train one on", "give --teacher or --data")
    from edgedistill.training.ranks import ranks_here, run_together

    ranks = ranks_here()
    stored = run_together(
        ranks,
        store,
        "teacher",
        teacher_inputs(recipe, data),
        lambda work: _train(recipe, data, work, ranks, store.root / "logs", progress),
        TeacherResult,
        progress.say,
    )
    return stored.result.model_copy(update={"path": str(stored.directory / "model")})


def find_teacher(recipe: Recipe, *, data: Stored[DataResult] | None, store: Store) -> TeacherResult | None:
    """The teacher where it exists already; nothing is trained."""
    if recipe.teacher.model is not None:
        return _given(recipe, store)
    stored = None if data is None else store.find("teacher", teacher_inputs(recipe, data), TeacherResult)
    # by its folder, as obtain_teacher names it: the student's key reads its settings
    return None if stored is None else stored.result.model_copy(update={"path": str(stored.directory / "model")})


def teacher_inputs(recipe: Recipe, data: Stored[DataResult]) -> dict[str, Any]:
    """What a trained teacher's key is made of."""
    return {
        "train": recipe.teacher.train.key({"checkpoint_every_s", "tracker"}),
        "seed": recipe.seed,
        "device": device_kind(),
        "data": data.result.sha256,
        "versions": versions("torch", "transformers", "tokenizers", "edgedistill"),
    }


def open_further(recipe: Recipe, first: ModelFolder) -> list[ModelFolder]:
    """The teachers of `teacher.also`, checked. UserError where one has another tokenizer than the first."""
    folders = []
    for ask in recipe.teacher.also:
        folder = open_model(ask.model, revision=ask.revision, role="teacher")
        require_same_tokenizer(first.path, folder.path, role=f"further teacher {ask.model}")
        folders.append(folder)
    return folders


def mixture_key(teacher: TeacherResult) -> list[list[str | float]]:
    """Weights' hash and normalised share of every teacher where several teach together; empty for one alone."""
    if not teacher.also:
        return []
    all_of_them = [(teacher.weights_sha256, teacher.weight), *((t.weights_sha256, t.weight) for t in teacher.also)]
    total = sum(weight for _, weight in all_of_them)
    return [[sha256, weight / total] for sha256, weight in all_of_them]


def _given(recipe: Recipe, store: Store) -> TeacherResult:
    assert recipe.teacher.model is not None
    first = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
    also = [
        FurtherTeacher(
            name=folder.name,
            origin="hub" if folder.origin == "hub" else "folder",
            path=str(folder.path),
            shape=folder.shape,
            parameters=folder.shape.parameters,
            weights_sha256=weights_sha256(folder, store),
            tokenizer_sha256=tokenizer_sha256(folder.path),
            weight=ask.weight,
        )
        for ask, folder in zip(recipe.teacher.also, open_further(recipe, first), strict=True)
    ]
    return describe(first, store).model_copy(update={"weight": recipe.teacher.weight, "also": also})


def describe(folder: ModelFolder, store: Store) -> TeacherResult:
    """The record of a teacher that the user gave."""
    return TeacherResult(
        origin="hub" if folder.origin == "hub" else "folder",
        name=folder.name,
        path=str(folder.path),
        shape=folder.shape,
        parameters=folder.shape.parameters,
        weights_sha256=weights_sha256(folder, store),
        tokenizer_sha256=tokenizer_sha256(folder.path),
    )


def _train(
    recipe: Recipe, data: Stored[DataResult], work: Work, ranks: Ranks, logs: Path, progress: Progress
) -> TeacherResult:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgedistill.losses.losses import LossSpec
    from edgedistill.training.trainer import train

    settings = recipe.teacher.train
    shape = teacher_shape(settings)
    folder = work.out / "model"
    if ranks.main:
        folder.mkdir()
        texts = [text for block in read_part(data.directory, "train") for text in block]
        train_tokenizer(texts, settings.vocab_size, folder)
    ranks.barrier()
    text = training_text(folder, data, settings, seed=recipe.seed)
    config = config_from_shape(shape, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(ranks.device)
    progress.say(f"teacher: training {shape.parameters:,} parameters on {len(text.packed.stream):,} tokens")
    result = train(
        model,
        data=text.packed,
        evaluation=text.evaluation,
        settings=settings,
        loss=LossSpec({"cross_entropy": 1.0}, temperature=1.0, vocab=text.tokenizer.vocab),
        signals=None,
        state=work.state,
        progress=progress,
        label="teacher",
        ranks=ranks,
        logs=logs / f"teacher-{work.key}",
    )
    save_model(model, folder, ranks, dtype=torch.bfloat16)
    ranks.barrier()
    return TeacherResult(
        origin="trained",
        name=f"a teacher trained on {data.result.source}",
        path="model",
        shape=shape,
        parameters=shape.parameters,
        weights_sha256=weights_digest(folder),
        tokenizer_sha256=tokenizer_sha256(folder),
        training=result,
    )


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE (GPT-2's pre-tokenizer) over `texts`, written as transformers reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the text gave {tokenizer.get_vocab_size()} tokens of the {vocab_size} asked for",
            "give more text, or a smaller teacher.train.vocab_size",
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(folder)
