"""What a build will make, before it makes anything: sizes, memory, ceilings, disk; and refusal of the impossible.

Pure: the same arguments give the same Plan, and nothing is read or written. Every figure is `derived`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from edgedistill.config.recipe import Recipe
from edgedistill.config.refusals import (
    refuse_importance,
    refuse_mixed,
    refuse_mixture,
    refuse_rounding,
    refuse_trimming,
)
from edgedistill.config.targets import Target, parse_artifact
from edgedistill.errors import UserError
from edgedistill.fit import sizes
from edgedistill.fit.artifact import (
    ArtifactPlan,
    Breach,
    Wanted,
    artifact_plan,
    artifacts_of,
    breaches_of,
    context_of,
    human_bytes,
)
from edgedistill.fit.training import PROCESS_BYTES, Run, distillation, propose, teacher_training
from edgedistill.fit.verification_memory import verification_memory
from edgedistill.plan.asked import Asked, asked_rows
from edgedistill.quantization.mixes import BASE_TYPES, GGML_BLOCKS
from edgedistill.records.base import Record
from edgedistill.records.data import SourceRead
from edgedistill.records.figures import Figure
from edgedistill.records.shape import Shape
from edgedistill.signals.cache_files import estimate_bytes
from edgedistill.student.design import FILL, Cut, design_student, fill_of

# Mirzadeh et al. 2020 (teacher assistants); Minitron's two steps: beyond this, one in between pays.
MOST_COMPRESSION_IN_ONE_STEP = 5.0
K_QUANT_MULTIPLE = 256
BLOCK_MULTIPLE = 32
NF4_MULTIPLE = 64  # of bitsandbytes' layers on a CPU
# What student.start=auto is: the first of these that the teacher and the sizes asked for allow. Their order is that of
# benchmarks/results/student_start.json.
AUTO_STARTS = ("width", "both", "layers", "fresh")
MEASURED_BEST = "the best of benchmarks/student_start.py"
CUTS: dict[str, Cut] = {"layers": "layers", "width": "width", "both": "both"}
# Mixes in blocks of 256 weights: a narrower width gives larger types.
GGUF_K_QUANTS = tuple(mix for mix, base in BASE_TYPES.items() if GGML_BLOCKS[base][0] == K_QUANT_MULTIPLE)
# Two checkpoints stand side by side while one replaces the other: weights and two moments in float32 each.
CHECKPOINT_BYTES_A_PARAMETER = 24
FINAL_BYTES_A_PARAMETER = 4
F16_BYTES_A_PARAMETER = 2
# Text, split parts, tokenized data, reports, golden vectors.
DISK_FOR_DATA_BYTES = 200_000_000
UNKNOWN_SIGNALS = (
    "the disk needed does not count the teacher's signals: how many tokens the text has is not known before it is read"
)


class Plan(Record):
    """What will be built. `sized_by` says what set the student's size, `start_because` what set its start.

    `training_memory_bytes` is the process's peak less what stands after its imports (about 0.4 GB);
    `training_memory_parts` what lives at that peak. `verification_memory_bytes` is the peak of verification's process
    and of the runtime that it opens, together, for the artifact that needs most.
    """

    recipe: str
    teacher: Shape
    teacher_parameters: int
    further_teachers: list[Shape]
    student: Shape
    student_parameters: int
    compression: float
    designed: bool
    width_multiple: int
    sized_by: str
    start: str
    start_because: str
    targets: list[str]
    artifacts: list[ArtifactPlan]
    training_memory_bytes: Figure
    training_memory_parts: dict[str, int]
    verification_memory_bytes: Figure
    machine_memory_bytes: int | None
    disk_bytes: Figure
    free_disk_bytes: int | None
    store_hits: dict[str, bool]
    data: list[SourceRead]
    asked: Asked | None = None
    warnings: list[str]


def plan(
    recipe: Recipe,
    targets: Sequence[Target],
    *,
    teacher: Shape,
    teacher_parameters: int | None = None,
    student: Shape | None = None,
    further_teachers: Sequence[Shape] = (),
    trimmed_tokens: int | None = None,
    training_tokens: int | None = None,
    store_hits: Mapping[str, bool] | None = None,
    data: Sequence[SourceRead] = (),
    free_disk_bytes: int | None = None,
    machine_memory_bytes: int | None = None,
    machine_cores: int | None = None,
) -> Plan:
    """Sizes, ceilings and warnings of a build; one student for all targets, sized by the tightest.

    `further_teachers` are those that teach beside the first (`teacher.also`). `trimmed_tokens` is the size of a
    student's trimmed vocabulary: what it saves of the embedding goes into the layers. `training_tokens` are about those
    that a signal cache holds; None: not known.
    `student` is a given shape (pretrained, or a folder); without it one is designed. `store_hits` says by stage
    ("teacher", "student", ...) what is already in the store, `data` what of the text was read. `free_disk_bytes` is
    that of the store's disk,     `machine_memory_bytes` and `machine_cores` this machine's; None: not checked.

    Raises UserError (cause, value, remedy) for an artifact that a target cannot run, a student larger than its
    teacher or than a target's limits, a speed that not even the ceiling reaches, and too little memory or disk here.
    """
    if not targets:
        raise UserError("no target", "name one: --target jetson (see `edgedistill targets list`)")
    refuse_signals(recipe)
    refuse_mixture(recipe, caching=recipe.distill.teacher_signals == "cached")
    refuse_trimming(recipe)
    parameters = teacher.parameters if teacher_parameters is None else teacher_parameters
    hits = dict(store_hits or {})
    wanted = [(target, *parse_artifact(a)) for target in targets for a in artifacts_of(recipe, target)]
    refuse_importance(recipe, [(format_, quantization) for _, format_, quantization in wanted])
    refuse_mixed(recipe, [(format_, quantization) for _, format_, quantization in wanted])
    refuse_rounding(recipe, [(format_, quantization) for _, format_, quantization in wanted])
    multiple = K_QUANT_MULTIPLE
    designing, designed_from = _with_vocabulary(recipe, teacher, trimmed_tokens)
    if student is not None:
        shape, sized_by = student, "given"
        start, because = ("pretrained" if recipe.student.start == "pretrained" else "given"), "the recipe"
    elif recipe.student.start == "auto":
        start, because, (shape, multiple, sized_by) = _best_start(designing, wanted, designed_from)
    else:
        start, because = recipe.student.start, "the recipe"
        shape, multiple, sized_by = _design(designing, wanted, designed_from, start)
    if shape.parameters > parameters:
        raise UserError(
            f"the student has {shape.parameters:,} parameters, {shape.parameters - parameters:,} more than its "
            f"teacher's {parameters:,}",
            f"name a student of at most {parameters:,} parameters, or swap --teacher and --student",
        )
    breaches = breaches_of(shape, wanted, recipe)
    if breaches:
        worst = min(breaches, key=lambda breach: breach.scale)
        raise UserError(worst.cause, worst.remedy)
    artifacts = [artifact_plan(shape, recipe, *entry) for entry in wanted]
    training, parts, advice = _training_memory(recipe, shape, teacher, further_teachers, hits, machine_memory_bytes)
    verifying = _verification_memory(recipe, teacher, shape, artifacts, machine_memory_bytes)
    cached = _signal_bytes(recipe, designed_from, training_tokens, hits)
    disk = _disk(recipe, parameters, shape, artifacts, hits, cached, free_disk_bytes)
    return Plan(
        recipe=recipe.name,
        teacher=teacher,
        teacher_parameters=parameters,
        further_teachers=list(further_teachers),
        student=shape,
        student_parameters=shape.parameters,
        compression=parameters / shape.parameters,
        designed=student is None,
        width_multiple=multiple,
        sized_by=sized_by,
        start=start,
        start_because=because,
        targets=[target.name for target in targets],
        artifacts=artifacts,
        training_memory_bytes=training,
        training_memory_parts=parts,
        verification_memory_bytes=verifying,
        machine_memory_bytes=machine_memory_bytes,
        disk_bytes=disk,
        free_disk_bytes=free_disk_bytes,
        store_hits=hits,
        data=list(data),
        warnings=[
            *([f"the student's start is {start}: {because}"] if because not in ("the recipe", MEASURED_BEST) else []),
            *_warnings(recipe, targets, wanted, shape, teacher, parameters, student is None, machine_cores),
            *advice,
            *([UNKNOWN_SIGNALS] if cached is None else []),
        ],
    )  # fmt: skip


def refuse_signals(recipe: Recipe) -> None:
    """Refuse caches that cannot teach what the losses ask. UserError.

    A sample of the teacher's distribution is unbiased for forward KL (and gives nothing to cross-entropy, which needs
    none) at the temperature it was drawn at; top-k entries likewise hold no other loss.
    """
    settings = recipe.distill
    if settings.teacher_signals != "cached" or settings.cache.kind not in ("sampled", "topk"):
        return
    others = settings.general
    if others:
        raise UserError(
            f"distill.cache.kind is {settings.cache.kind}, which serves only forward_kl and cross_entropy, and"
            f" distill.{others[0]} is {getattr(settings, others[0]):g}",
            "set distill.cache.kind to hidden or dense, or distill.teacher_signals=live",
        )


def plan_rows(plan: Plan, *, parts: bool = True) -> list[tuple[str, str, str, str]]:
    """The plan for people: what, value, basis, from. `parts`: of what the memory here is made."""

    def row(what: str, figure: Figure, show: Callable[[float], str]) -> tuple[str, str, str, str]:
        return what, show(figure.value), figure.basis, figure.source

    rows = [
        *([] if plan.asked is None else asked_rows(plan.asked)),
        ("teacher", _sizes_text(plan.teacher), "", f"{plan.teacher_parameters:,} parameters"),
        ("student", _sizes_text(plan.student), "", f"{plan.student_parameters:,} parameters, sized by {plan.sized_by}"),
        ("student's start", plan.start, "", plan.start_because),
        ("compression", f"{plan.compression:.2f}x", "derived", "teacher's parameters / student's"),
    ]
    for artifact in plan.artifacts:
        name = f"{artifact.target} {artifact.artifact}"
        rows.append(row(f"{name}: bytes", artifact.artifact_bytes, human_bytes))
        rows.append(row(f"{name}: memory", artifact.memory_bytes, human_bytes))
        rows.append(
            row(f"{name}: decode at most", artifact.decode_ceiling_tokens_per_s, lambda v: f"{v:,.0f} tokens/s")
        )
    memory = [
        row("training memory here", plan.training_memory_bytes, human_bytes),
        row("verification memory here", plan.verification_memory_bytes, human_bytes),
    ]
    rows += memory if parts else [(what, value, basis, "its parts: -v") for what, value, basis, _ in memory]
    rows.append(row("disk needed", plan.disk_bytes, human_bytes))
    given = {"teacher"} if plan.asked is not None and plan.asked.teacher_steps is None else set()
    for stage, hit in plan.store_hits.items():
        rows.append((f"store: {stage}", "given" if stage in given else "ready" if hit else "to be made", "", ""))
    return rows


def _with_vocabulary(recipe: Recipe, teacher: Shape, tokens: int | None) -> tuple[Recipe, Shape]:
    """What is designed from: the teacher as it would be with the trimmed vocabulary, and the budget unchanged."""
    if tokens is None:
        return recipe, teacher
    trimmed = teacher.model_copy(update={"vocab_size": tokens})
    compression = max(1.0, recipe.student.compression * trimmed.parameters / teacher.parameters)
    student = recipe.student.model_copy(update={"compression": compression})
    return recipe.model_copy(update={"student": student}), trimmed


def _best_start(recipe: Recipe, wanted: list[Wanted], teacher: Shape) -> tuple[str, str, tuple[Shape, int, str]]:
    """The best start that this teacher and these sizes allow, why it is that one, and what `_design` gives for it."""
    refused: UserError | None = None
    for start in AUTO_STARTS[:-1]:
        try:
            designed = _design(recipe, wanted, teacher, start)
        except UserError as error:
            refused = refused or error
            continue
        return start, MEASURED_BEST if refused is None else refused.cause, designed
    last = AUTO_STARTS[-1]
    designed = _design(recipe, wanted, teacher, last)
    return last, MEASURED_BEST if refused is None else refused.cause, designed


def _design(recipe: Recipe, wanted: list[Wanted], teacher: Shape, start: str) -> tuple[Shape, int, str]:
    """The largest student in the teacher's proportions that every target can run: shape, multiple, what sized it.

    The width multiple is 256 where a K-quant will be used. Elsewhere it is 256 too where that leaves no more than a
    fifth of the budget unused, so that a later target with K-quants reuses the student; else 32, or 64 for NF4.
    """
    k_quants = any(format_ == "gguf" and quantization in GGUF_K_QUANTS for _, format_, quantization in wanted)
    cut: Cut | None = CUTS.get(start)
    try:
        shape, sized_by = _fit(recipe, wanted, teacher, K_QUANT_MULTIPLE, cut)
        budget = int(teacher.parameters / recipe.student.compression)
        if k_quants or cut == "layers" or sized_by != "compression" or fill_of(shape, budget) >= FILL:
            return shape, K_QUANT_MULTIPLE, sized_by
    except UserError:
        # Narrow teachers, or a budget below one 256-wide layer: fall back to blocks of 32, with a warning.
        if cut == "layers":
            raise
    multiple = NF4_MULTIPLE if any(quantization == "NF4" for _, _, quantization in wanted) else BLOCK_MULTIPLE
    shape, sized_by = _fit(recipe, wanted, teacher, multiple, cut)
    return shape, multiple, sized_by


def _fit(recipe: Recipe, wanted: list[Wanted], teacher: Shape, multiple: int, cut: Cut | None) -> tuple[Shape, str]:
    """Design, and shrink the allowance until no target's limit is broken."""
    most: int | None = None
    sized_by = "compression"
    blamed: Breach | None = None
    while True:
        try:
            shape = design_student(
                teacher,
                compression=recipe.student.compression,
                ask=recipe.student.shape,
                width_multiple=multiple,
                max_parameters=most,
                from_teacher=cut,
            )
        except UserError as error:
            if blamed is None:
                raise
            # It was made smaller already, as far as this teacher's proportions go: compression asks for nothing new.
            raise UserError(
                f"no student of this teacher fits {blamed.target}: {blamed.cause}",
                blamed.remedy.replace("raise student.compression, or ", ""),
            ) from error
        breaches = breaches_of(shape, wanted, recipe)
        if not breaches:
            return shape, sized_by
        blamed = min(breaches, key=lambda breach: breach.scale)
        sized_by = f"limits of {blamed.target}"
        most = min(shape.parameters - 1, int(shape.parameters * blamed.scale))


def _training_memory(
    recipe: Recipe, student: Shape, teacher: Shape, further: Sequence[Shape], hits: Mapping[str, bool],
    machine: int | None,
) -> tuple[Figure, dict[str, int], list[str]]:  # fmt: skip
    """The larger of what is still to be trained, its parts, and for what does not fit here the settings that do.

    Raises UserError where no settings fit this machine's memory.
    """
    runs: list[Run] = []
    if not hits.get("student"):
        runs.append(distillation(student, teacher, further))
    if recipe.teacher.model is None and not hits.get("teacher"):
        runs.append(teacher_training(teacher))
    most = Figure(value=0, unit="B", basis="derived", source="nothing is left to train")
    parts: dict[str, int] = {}
    advice = []
    for run in runs:
        found = run.predict(recipe)
        needed = PROCESS_BYTES + found.bytes
        if machine is not None and needed > machine:
            advice.append(_advice(run, recipe, needed, machine))
        if found.bytes > most.value:
            source = f"{run.what}, beside {human_bytes(PROCESS_BYTES)} for the process: {found.text}"
            most = Figure(value=found.bytes, unit="B", basis="derived", source=source)
            parts = found.components
    return most, parts, advice


def _advice(run: Run, recipe: Recipe, needed: int, machine: int) -> str:
    what = f"{run.what} needs about {human_bytes(needed)} of memory"
    fitting = propose(run, recipe, machine)
    if fitting is None:
        raise UserError(
            f"{what}, and no settings make it fit this machine's {human_bytes(machine)}",
            "use a machine with more memory, a smaller teacher or student, or a shorter context_tokens",
        )
    words = " ".join(f"--set {word}" for word in fitting.words)
    return (
        f"{what}, this machine has {human_bytes(machine)}: {words} would need {human_bytes(fitting.bytes)}; the batch"
        " stays what it is"
    )


def _verification_memory(
    recipe: Recipe, teacher: Shape, student: Shape, artifacts: list[ArtifactPlan], machine: int | None
) -> Figure:
    """What verifying the largest artifact takes. UserError where this machine lacks it: now, not after the training."""
    found = max(
        (
            verification_memory(teacher, student, recipe.verify, artifact_bytes=int(each.artifact_bytes.value))
            for each in artifacts
        ),
        key=lambda figure: figure.value,
    )
    if machine is not None and found.value > machine:
        raise UserError(
            f"verification needs about {human_bytes(found.value)} of memory ({found.source}), and this machine has"
            f" {human_bytes(machine)}",
            "use a machine with more memory, a smaller teacher or student, or a shorter verify.context_tokens",
        )
    return found


def _signal_bytes(recipe: Recipe, teacher: Shape, tokens: int | None, hits: Mapping[str, bool]) -> int | None:
    """What the teacher's signals take where the store keeps them; 0 where it does not, None where nobody knows yet."""
    ask = recipe.distill
    if ask.teacher_signals != "cached" or ask.cache.url is not None or hits.get("student"):
        return 0
    if tokens is None:
        return None
    vocab, width = teacher.vocab_size, teacher.hidden_size
    each = estimate_bytes(ask.cache.kind, vocab=vocab, width=width, draws=ask.cache.draws, top_k=ask.cache.top_k)
    each += 2 * width * len(ask.cache.hidden_layers)
    each += 2 * teacher.num_attention_heads * ask.context_tokens * len(ask.cache.attention_layers)
    return math.ceil(tokens * each)


def _disk(
    recipe: Recipe, teacher_parameters: int, student: Shape, artifacts: list[ArtifactPlan], hits: Mapping[str, bool],
    signals: int | None, free: int | None,
) -> Figure:  # fmt: skip
    """Checkpoints while training, weights kept, signals, an F16 file between, artifacts in the store and the bundle."""
    kept = 0
    peak = 0
    if recipe.teacher.model is None and not hits.get("teacher"):
        kept += FINAL_BYTES_A_PARAMETER * teacher_parameters
        peak = max(peak, CHECKPOINT_BYTES_A_PARAMETER * teacher_parameters)
    if not hits.get("student"):
        kept += FINAL_BYTES_A_PARAMETER * student.parameters
        peak = max(peak, CHECKPOINT_BYTES_A_PARAMETER * student.parameters)
    peak = max(peak, F16_BYTES_A_PARAMETER * student.parameters)
    needed = kept + peak + sum(2 * int(a.artifact_bytes.value) for a in artifacts) + DISK_FOR_DATA_BYTES
    needed += signals or 0
    if free is not None and needed > free:
        raise UserError(
            f"the build needs about {human_bytes(needed)} of disk, {human_bytes(needed - free)} more than the "
            f"{human_bytes(free)} that are free where the store is",
            "free some (`edgedistill store prune`), or name another disk in EDGEDISTILL_STORE",
        )
    return Figure(
        value=needed,
        unit="B",
        basis="derived",
        source="checkpoints, kept weights, the F16 file between, artifacts in store and bundle, data"
        + (f", the teacher's signals ({human_bytes(signals)})" if signals else ""),
    )


def _warnings(
    recipe: Recipe, targets: Sequence[Target], wanted: list[Wanted], student: Shape, teacher: Shape,
    teacher_parameters: int, designed: bool, machine_cores: int | None,
) -> list[str]:  # fmt: skip
    found = []
    compression = teacher_parameters / student.parameters
    if compression > MOST_COMPRESSION_IN_ONE_STEP:
        between = math.sqrt(teacher_parameters * student.parameters)
        found.append(
            f"the student is {compression:.1f}x smaller than its teacher; beyond {MOST_COMPRESSION_IN_ONE_STEP:g}x a "
            f"step in between (about {between / 1e6:,.1f}M parameters) keeps more"
        )
    budget = int(teacher.parameters / recipe.student.compression)
    if designed and fill_of(student, budget) < FILL / 1.3:
        found.append(
            f"the student uses {100 * fill_of(student, budget):.0f} % of the {budget:,} parameters that compression "
            f"{recipe.student.compression:g} allows; fix sizes in student.shape to use more"
        )
    if student.embedding_parameters > student.parameters / 2:
        found.append(
            f"{100 * student.embedding_parameters / student.parameters:.0f} % of the student is its embedding of "
            f"{student.vocab_size:,} entries; a teacher with a smaller vocabulary leaves more for layers"
            + ("" if recipe.student.trim_vocabulary else ", and so may student.trim_vocabulary")
        )
    for quantization in dict.fromkeys(q for _, format_, q in wanted if format_ == "gguf"):
        count = sizes.k_quant_fallbacks(student, quantization)
        if count:
            found.append(
                f"{count} matrices cannot be {quantization} because a width ({student.hidden_size}, "
                f"{student.intermediate_size} or {student.num_attention_heads * student.head_dim}) is not a multiple "
                "of 256; llama.cpp takes larger types for them"
            )
    for target in targets:
        threads = recipe.bench.threads
        if threads is not None and threads > target.bench.threads:
            found.append(
                f"bench.threads is {threads}, but {target.name} has {target.bench.threads} big cores; more threads can "
                "be 100x slower (llama.cpp #21763)"
            )
        if context_of(recipe, target, student) < target.context_tokens and recipe.export.context_tokens is None:
            found.append(
                f"{target.name}: context is {student.max_position_embeddings:,} tokens (the model's positions), not "
                f"the target's {target.context_tokens:,}"
            )
    threads_here = recipe.bench.threads or max(target.bench.threads for target in targets)
    if machine_cores is not None and threads_here > machine_cores:
        found.append(
            f"this machine has {machine_cores} cores, fewer than the {threads_here} threads of the bench: "
            "its figures will differ"
        )
    return found


def _sizes_text(shape: Shape) -> str:
    return (
        f"{shape.family}: {shape.num_hidden_layers} layers x {shape.hidden_size}, feed-forward "
        f"{shape.intermediate_size}, heads {shape.num_attention_heads}/{shape.num_key_value_heads} of "
        f"{shape.head_dim}, vocabulary {shape.vocab_size:,}"
    )
