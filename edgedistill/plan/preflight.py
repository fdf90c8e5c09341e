"""The plan of a recipe on this machine: what is refused or known before any work, and what the store already has."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence

from edgedistill.config.recipe import Recipe
from edgedistill.config.refusals import refuse_no_text, refuse_trimming
from edgedistill.config.targets import Target, parse_artifact
from edgedistill.data.prepare import Texts, find_data, prepare_data, read_part, read_texts
from edgedistill.data.split import held_out_chars, require_parts
from edgedistill.errors import UserError
from edgedistill.fit.artifact import artifacts_of
from edgedistill.machine import facts
from edgedistill.models.folder import (
    folder_notes,
    locate,
    open_model,
    require_loadable,
    require_same_tokenizer,
    require_sound_once,
)
from edgedistill.models.generation import generation_of
from edgedistill.models.shapes import config_of_student, refuse_family
from edgedistill.plan.asked import asked_of
from edgedistill.plan.plan import NF4_MULTIPLE, Plan, plan
from edgedistill.progress import QUIET, Progress
from edgedistill.records.data import DataResult
from edgedistill.records.shape import Shape
from edgedistill.records.training import StudentResult
from edgedistill.statistics import MIN_UNITS, effective_units
from edgedistill.store import Store, Stored
from edgedistill.verify.gate import MORE_DOCUMENTS

# English with a vocabulary of 2,048 (the quickstart's); larger vocabularies give fewer.
TOKENS_A_BYTE = 0.33
SAMPLE_CHARS = 200_000
SAMPLE_DOCUMENTS = 10_000


def preflight(recipe: Recipe, targets: Sequence[Target], *, store: Store, progress: Progress = QUIET) -> Plan:
    """The plan of this recipe on this machine, with what the store already has. Raises UserError.

    How large a trimmed vocabulary will be only its text tells: where one is asked for, the data are read and kept.
    """
    refuse_trimming(recipe)
    teacher, parameters = _teacher_sizes(recipe)
    require_sound_models(recipe, store)
    _require_exportable(recipe, targets)
    refuse_no_text(recipe)
    room = store.root
    while not room.exists():
        room = room.parent
    tokens = _trimmed_tokens(recipe, store, progress)
    student = _given_student_shape(recipe)
    sizes_only = plan(
        recipe, targets, teacher=teacher, teacher_parameters=parameters, student=student, trimmed_tokens=tokens
    )
    _require_widths(sizes_only)
    _require_sayable(recipe, sizes_only)
    texts = read_texts(recipe.data)
    data = find_data(recipe.data, store=store, texts=texts)
    require_usable_cache(recipe, store, data)
    planned = plan(
        recipe,
        targets,
        teacher=teacher,
        teacher_parameters=parameters,
        student=student,
        further_teachers=_further_shapes(recipe),
        trimmed_tokens=tokens,
        training_tokens=_training_tokens(recipe, data, texts),
        store_hits=_store_hits(with_start(recipe, sizes_only), sizes_only.student, store, data),
        data=texts.read,
        free_disk_bytes=shutil.disk_usage(room).free,
        machine_memory_bytes=facts.describe()["memory_bytes"],
        machine_cores=len(facts.usable_cpus()),
    )
    further = [*_two_lengths(recipe), *_too_little_held_out(recipe, texts), *model_notes(recipe)]
    sample = "\n".join(itertools.islice(texts.documents.texts, SAMPLE_DOCUMENTS)) if texts.documents is not None else ""
    asked = asked_of(recipe, texts, _tokens_a_byte(recipe, sample[:SAMPLE_CHARS]))
    return planned.model_copy(update={"warnings": [*planned.warnings, *further], "asked": asked})


def _two_lengths(recipe: Recipe) -> Iterator[str]:
    """Where both fields that say how long to train are set, which of them counts."""
    for name, settings in (("teacher.train", recipe.teacher.train), ("distill", recipe.distill)):
        if settings.tokens is not None and "epochs" in settings.model_fields_set:
            yield f"{name}.tokens ({settings.tokens:,}) counts, and {name}.epochs ({settings.epochs:g}) does nothing"


def _too_little_held_out(recipe: Recipe, texts: Texts) -> Iterator[str]:
    """Where the held-out part is so small that no gate will tell: said before the training, not after it."""
    if texts.documents is None:
        return
    held_out = texts.held_out.groups if texts.held_out is not None else None
    try:
        require_parts(texts.documents.groups, recipe.data, held_out)
    except UserError as error:
        yield f"build refuses this text: {error.cause}; {error.remedy}"
        return
    chars = held_out_chars(texts.documents.groups, recipe.data, held_out)
    weight = effective_units(chars) if chars else 0.0
    if weight < MIN_UNITS:
        yield (
            f"{len(chars)} documents are held out, which weigh as much as {weight:.1f} equal ones: too few for the gate"
            f" to tell, so there will be no bundle; {MORE_DOCUMENTS}"
        )


def _teacher_sizes(recipe: Recipe) -> tuple[Shape, int]:
    if recipe.teacher.model is None:
        from edgedistill.teacher.stage import teacher_shape

        shape = teacher_shape(recipe.teacher.train)
        return shape, shape.parameters
    folder = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
    return folder.shape, folder.shape.parameters


def _further_shapes(recipe: Recipe) -> list[Shape]:
    """Sizes of the teachers beside the first. UserError where one has another tokenizer."""
    from edgedistill.teacher.stage import open_further

    if recipe.teacher.model is None or not recipe.teacher.also:
        return []
    first = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
    return [folder.shape for folder in open_further(recipe, first)]


def _require_exportable(recipe: Recipe, targets: Sequence[Target]) -> None:
    """What the exporters would refuse after hours of training is refused now. UserError."""
    ask = recipe.student if recipe.student.start == "pretrained" else recipe.teacher
    if ask.model is None:
        return
    # A student that is made of the teacher has its tokenizer, its stop tokens and its chat template.
    folder = open_model(ask.model, revision=ask.revision, role="student" if ask is recipe.student else "teacher")
    formats = {parse_artifact(artifact)[0] for target in targets for artifact in artifacts_of(recipe, target)}
    if "gguf" in formats:
        from edgedistill.gguf.convert import tokenizer_of
        from edgedistill.models.architectures import model_of

        tokenizer_of(folder.path, model_of(folder.config, where=str(folder.path / "config.json")))
    if formats:
        generation_of(folder.path, vocab_size=folder.shape.vocab_size)
    for other in sorted(formats - {"gguf"}):
        refuse_family(folder.shape, other, where=str(folder.path))
    if "onnx" in formats:
        from edgedistill.onnx.decoder import require_runnable

        # a fresh student has no scaling, whatever its teacher has
        config = {} if recipe.student.start == "fresh" else folder.config
        require_runnable(config, folder.shape, where=str(folder.path))


def _require_widths(planned: Plan) -> None:
    """bitsandbytes' NF4 is exported and verified here: on a CPU it wants whole blocks. UserError."""
    shape = planned.student
    widths = (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    odd = [width for width in widths if width % NF4_MULTIPLE]
    if not odd or not any(artifact.artifact == "bitsandbytes:NF4" for artifact in planned.artifacts):
        return
    from edgedistill.models.device import training_device

    if training_device().type == "cpu":
        raise UserError(
            f"the student has matrices with {odd[0]} columns, and bitsandbytes:NF4 on a CPU takes multiples of"
            f" {NF4_MULTIPLE}",
            "set export.artifacts to bitsandbytes:INT8, or student.shape to such widths",
        )


def _require_sayable(recipe: Recipe, planned: Plan) -> None:
    """A student that its family's config cannot say, or that llama.cpp would run differently. UserError."""
    if recipe.teacher.model is None or planned.start == "pretrained" or not planned.student.layer_tensors:
        return
    teacher = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
    config_of_student(teacher.config, planned.student, {})


def _named_models(recipe: Recipe) -> list[tuple[str, str, str | None]]:
    """(role, name, revision) of the models that the recipe names."""
    teacher, student = recipe.teacher, recipe.student
    named = [("teacher", teacher.model, teacher.revision)]
    named += [("teacher", also.model, also.revision) for also in teacher.also]
    if student.start == "pretrained":
        named.append(("student", student.model, student.revision))
    return [(role, model, revision) for role, model, revision in named if model is not None]


def require_loadable_models(recipe: Recipe) -> None:
    """What transformers would refuse of the models that the recipe names is refused before any work. UserError."""
    for role, model, revision in _named_models(recipe):
        require_loadable(locate(model, revision=revision, role=role)[0], role)


def model_notes(recipe: Recipe) -> list[str]:
    """What is left out of the models that the recipe names."""
    return [
        f"{role} {model}: {note}"
        for role, model, revision in _named_models(recipe)
        for note in folder_notes(locate(model, revision=revision, role=role)[0])
    ]


def require_sound_models(recipe: Recipe, store: Store) -> None:
    """A weight that is NaN or infinite is found before any work, not as a loss that is none. UserError."""
    for role, model, revision in _named_models(recipe):
        require_sound_once(open_model(model, revision=revision, role=role), store, role)


def require_usable_cache(recipe: Recipe, store: Store, data: Stored[DataResult] | None) -> None:
    """A finished cache at the recipe's URL is looked into now, not after the teacher was trained. UserError."""
    from edgedistill.signals.cache_files import refuse_other_cache
    from edgedistill.teacher.stage import find_teacher

    refuse_other_cache(recipe, {})
    if recipe.distill.teacher_signals != "cached" or recipe.distill.cache.url is None:
        return
    teacher = find_teacher(recipe, data=data, store=store)
    known = {} if data is None else {"data_sha256": data.result.sha256}
    if teacher is not None:
        known |= {
            "teacher_weights_sha256": teacher.weights_sha256,
            "tokenizer_sha256": teacher.tokenizer_sha256,
        }
    refuse_other_cache(recipe, known)


def _trimmed_tokens(recipe: Recipe, store: Store, progress: Progress) -> int | None:
    """How many tokens the student's trimmed vocabulary has, where it is asked for."""
    if not recipe.student.trim_vocabulary or recipe.teacher.model is None:
        return None
    from edgedistill.student.vocabulary import obtain_vocabulary

    folder = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
    found = obtain_vocabulary(folder.path, data=prepare_data(recipe.data, store=store), store=store, progress=progress)
    progress.say(
        f"vocabulary: {found.result.tokens:,} of the teacher's {found.result.teacher_tokens:,} tokens are kept"
        f"{' (from the store)' if found.reused else ''}"
    )
    return found.result.tokens


def _given_student_shape(recipe: Recipe) -> Shape | None:
    """The shape where the recipe leaves nothing to design: a pretrained student's."""
    if recipe.student.start == "pretrained":
        if recipe.student.model is None:
            raise UserError("student.start is pretrained but no student.model is named", "give --student FOLDER")
        student = open_model(recipe.student.model, revision=recipe.student.revision, role="student")
        if recipe.teacher.model is not None:
            named = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
            require_same_tokenizer(named.path, student.path)
        return student.shape
    return None


def with_start(recipe: Recipe, planned: Plan) -> Recipe:
    """The recipe with the start that the plan chose, so that the student's key does not tell auto from its choice."""
    if recipe.student.start != "auto" or planned.start == "given":
        return recipe
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"start": planned.start})})


def _training_tokens(recipe: Recipe, data: Stored[DataResult] | None, texts: Texts) -> int | None:
    """About how many tokens a signal cache would hold; None where none is asked for or the text is not known yet."""
    if recipe.distill.teacher_signals != "cached":
        return None
    if data is not None:
        size = data.result.parts["train"].bytes
        sample = "\n".join(text for block in read_part(data.directory, "calibration") for text in block)
    elif texts.documents is not None:
        size = sum(len(text.encode()) for text in texts.documents.texts)
        sample = "\n".join(itertools.islice(texts.documents.texts, SAMPLE_DOCUMENTS))
    else:
        return None
    return round(size * recipe.distill.documents_share * _tokens_a_byte(recipe, sample[:SAMPLE_CHARS]))


def _tokens_a_byte(recipe: Recipe, sample: str) -> float:
    """Of the teacher's tokenizer on a sample of the text; of a tokenizer that is yet to be trained, about."""
    if recipe.teacher.model is None or not sample.strip():
        return TOKENS_A_BYTE
    from edgedistill.tasks.causal_lm import TextTokenizer

    folder = open_model(recipe.teacher.model, revision=recipe.teacher.revision, role="teacher")
    return len(TextTokenizer.load(folder.path).encode([sample])[0]) / len(sample.encode())


def _store_hits(recipe: Recipe, shape: Shape, store: Store, data: Stored[DataResult] | None) -> dict[str, bool]:
    """Which stages the store already has, as far as that can be told without doing any."""
    from edgedistill.models.folder import weights_sha256
    from edgedistill.strategies.distill import student_inputs
    from edgedistill.teacher.stage import find_teacher

    hits = {"data": data is not None, "teacher": False, "student": False}
    teacher = find_teacher(recipe, data=data, store=store)
    hits["teacher"] = teacher is not None
    if data is not None and teacher is not None:
        pretrained = None
        if recipe.student.start == "pretrained" and recipe.student.model is not None:
            pretrained = weights_sha256(open_model(recipe.student.model, revision=recipe.student.revision), store)
        inputs = student_inputs(recipe, shape=shape, teacher=teacher, data=data.result, pretrained_sha256=pretrained)
        hits["student"] = store.find("student", inputs, StudentResult) is not None
    return hits
