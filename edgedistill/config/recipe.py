"""What the user asks for: typed, unknown keys refused, `--set a.b=c` over any field.

A recipe is YAML. Every field has a default, so a recipe says only what it changes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgedistill.config.recipe_errors import refuse_unknown, wrong_values
from edgedistill.config.strict_yaml import MAX_YAML_BYTES, parse_yaml
from edgedistill.errors import UserError, did_you_mean
from edgedistill.machine import facts
from edgedistill.strict import compiled_pattern, local_path, read_text, shown, unescape

QUICKSTART = "quickstart"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_OVERRIDE_CHARS = 1 << 16
# Tokens that verification scores together: windows of one length, at least one. The plan's memory counts with it.
GROUP_TOKENS = 2048
GROUP_VOCABULARY = 65_536  # beyond so many tokens in the vocabulary a group has fewer, so that its logits stay as large
MAX_KEY_PARTS = 8  # a field stands at most four deep
MAX_WHOLE_NUMBER = 10**15  # more tokens than anybody trains on; what is derived from it still fits in 64 bits


def group_windows(length: int, vocabulary: int) -> int:
    """How many windows of `length` tokens verification scores together, in a model of so many logits a token."""
    return max(1, GROUP_TOKENS * GROUP_VOCABULARY // max(vocabulary, GROUP_VOCABULARY) // length)


class Section(BaseModel):
    """Base of the recipe's sections: unknown keys refused, no silent conversions of kind."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


class ShapeAsk(Section):
    """Sizes of a decoder to build. What is left out is designed (student), or that of a small Llama (teacher)."""

    hidden_size: int | None = Field(None, ge=8, le=65536, description="width of the residual stream")
    intermediate_size: int | None = Field(None, ge=8, le=262144, description="width of the feed-forward layers")
    num_hidden_layers: int | None = Field(None, ge=1, le=512, description="depth")
    num_attention_heads: int | None = Field(None, ge=1, le=1024, description="query heads")
    num_key_value_heads: int | None = Field(None, ge=1, le=1024, description="key and value heads")
    head_dim: int | None = Field(None, ge=2, le=1024, description="width of a head")


class Training(Section):
    """How a model is trained, teacher or student."""

    tokens: int | None = Field(None, ge=1, description="tokens to train on; epochs is then ignored")
    epochs: float = Field(3.0, gt=0, le=10000, description="passes over the training part, if tokens is not set")
    context_tokens: int = Field(512, ge=8, le=1 << 20, description="length of a packed sequence")
    batch_sequences: int = Field(16, ge=1, description="packed sequences an optimizer step")
    micro_batch_sequences: int | None = Field(None, ge=1, description="sequences a forward pass; default: the batch")
    optimizer: Literal["adamw", "muon", "adamw8bit"] = Field(
        "adamw", description="muon: for the layers' matrices, AdamW elsewhere; adamw8bit: bitsandbytes"
    )
    learning_rate: float = Field(1e-3, gt=0, le=10, description="AdamW's peak")
    muon_learning_rate: float = Field(0.02, gt=0, le=10, description="Muon's peak, if it is used")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising rate")
    final_rate_share: float = Field(0.05, ge=0, le=1, description="the cosine's end, as a share of the peak")
    weight_decay: float = Field(0.1, ge=0, le=10, description="on the layers' matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        validate_default=True,
        description="bf16: autocast over fp32 weights; auto: bf16 on a GPU and on CPUs that multiply in it, else fp32",
    )
    evaluate_every_share: float = Field(0.1, gt=0, le=1, description="evaluations, as a share of the steps")
    patience: int = Field(0, ge=0, description="evaluations without a better one before stopping; 0: never stop early")
    checkpoint_every_s: float = Field(30.0, gt=0, description="seconds between checkpoints")
    attention: Literal["packed", "documents"] = Field(
        "packed", description="packed: over the whole packed sequence; documents: within each document"
    )
    activation_checkpointing: bool = Field(False, description="recompute layers in the backward pass: less memory")
    compile: bool = Field(False, description="torch.compile the model's body")
    on_bad_step: Literal["stop", "skip"] = Field(
        "stop", description="at a loss or gradient that is not finite, or a spike: stop, or skip that batch"
    )
    spike_factor: float = Field(
        20.0, gt=1, description="a loss above this many times the median of the last 64 steps is a spike"
    )
    tracker: str | None = Field(
        "tensorboard", description="where every step's figures go: tensorboard, or another that accelerate knows"
    )

    def key(self, leave_out: Collection[str] = ()) -> dict[str, Any]:
        """What of it can change the weights that come out; of tokens and epochs the one that counts."""
        loser = {"epochs"} if self.tokens is not None else set()
        return self.model_dump(mode="json", exclude={*leave_out, *loser})

    @property
    def length(self) -> str:
        """What says how long it trains, and what that is now."""
        return f"tokens, {self.tokens:,} now" if self.tokens is not None else f"epochs, {self.epochs:g} now"

    @field_validator("precision")
    @classmethod
    def _of_this_machine(cls, value: str) -> str:
        # At once, so that keys, plans and records name what is computed.
        return facts.training_precision() if value == "auto" else value


class TeacherTraining(Training):
    """How a teacher is trained if none is named, as in the quickstart."""

    vocab_size: int = Field(2048, ge=300, le=1 << 20, description="tokens of the BPE that is trained on the data")
    shape: ShapeAsk = ShapeAsk()


class AlsoTeacher(Section):
    """A further teacher, with the first one's tokenizer."""

    model: str = Field(description="folder or hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    weight: float = Field(
        1.0, gt=0, le=1e6, description="its share of the mean, before the shares are made to sum to 1"
    )


class Teacher(Section):
    """The large model."""

    model: str | None = Field(None, description="folder or hub id; none: train one (`teacher.train`)")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    precision: Literal["auto", "fp32", "bf16", "int8", "nf4"] = Field(
        "auto",
        description="of its weights while it teaches; auto: bf16 on a GPU, fp32 on a CPU; int8, nf4: bitsandbytes",
    )
    placement: Literal["auto", "offload", "shard"] = Field(
        "auto",
        description="auto: beside the student; offload: on the CPU, layer by layer; shard: over the ranks (FSDP)",
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="its share of the mean if `also` names others")
    also: list[AlsoTeacher] = Field(
        [], description="teachers beside it: the student learns the mean of all their probabilities, by weight"
    )
    train: TeacherTraining = TeacherTraining()


class Student(Section):
    """The small model."""

    start: Literal["auto", "fresh", "pretrained", "layers", "width", "both"] = Field(
        "auto",
        description="width: all of the teacher's layers, their widths pruned by activation importance; layers: some of"
        " its layers; both: layers and widths; fresh: designed, random; pretrained: `student.model`; auto: width, else"
        " both, layers or fresh, the first that this teacher and these sizes allow (`plan` says which, and why)",
    )
    layer_choice: Literal["uniform", "first", "last", "importance"] = Field(
        "uniform", description="which of the teacher's layers are kept"
    )
    trim_vocabulary: bool = Field(
        False, description="keep only the tokens that the text uses (all three parts of it); not with pretrained"
    )
    model: str | None = Field(None, description="folder or hub id of a pretrained student")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    compression: float = Field(4.0, ge=1, le=10000, description="the teacher's parameters ÷ the student's, at least")
    shape: ShapeAsk = ShapeAsk()


class Data(Section):
    """The text, and how it is split."""

    source: str = Field("python-docs", description="python-docs, a file, a folder, or a hub id")
    subset: str | None = Field(None, description="configuration of a hub dataset")
    text_column: str = Field("text", description="column of .jsonl, .csv, .tsv, .parquet and hub data: the text")
    streaming: bool = Field(False, description="read a dataset row by row up to max_documents, without downloading it")
    max_documents: int | None = Field(None, ge=1, description="read only so many documents; required with streaming")
    document_separator: str | None = Field(
        None, min_length=1, description="what ends a document in a text file; default: a blank line, or each line"
    )
    min_document_chars: int = Field(
        2000,
        ge=0,
        description="running text is joined to blocks of this size; a block counts as one document",
    )
    split: Literal["hash", "tail"] = Field(
        "hash", description="hash: by each document's own hash; tail: the end is held out, calibration comes before it"
    )
    eval_data: str | None = Field(None, description="a held-out text of its own; then no part of the data is held out")
    eval_share: float = Field(0.05, gt=0, lt=0.9, description="share held out: of documents (hash), of lines (tail)")
    calibration_share: float = Field(0.05, gt=0, lt=0.9, description="share for evaluation while training, likewise")

    @field_validator("document_separator")
    @classmethod
    def _stands_for_something(cls, value: str | None) -> str | None:
        if value is not None:
            unescape(value)
        return value

    @model_validator(mode="after")
    def _streams_end(self) -> Data:
        if self.streaming and self.max_documents is None:
            raise ValueError("streaming needs max_documents: how many documents to read")
        return self


class Cache(Section):
    """The teacher's signals on disk."""

    kind: Literal["sampled", "topk", "dense", "hidden"] = Field(
        "sampled",
        description="sampled: draws from the teacher's distribution (unbiased for forward KL); topk: its largest"
        " probabilities and their tail; dense: all logits; hidden: the states after its final norm (exact)",
    )
    draws: int = Field(50, ge=1, le=64, description="samples a token (sampled)")
    top_k: int = Field(50, ge=1, le=4096, description="kept entries a token (topk)")
    url: str | None = Field(None, description="folder or fsspec URL; default: in the store")
    hidden_layers: list[int] = Field([], description="layers whose hidden states are kept too")
    attention_layers: list[int] = Field([], description="layers whose attention maps are kept too")


class Lora(Section):
    """Low-rank adapters on a frozen student, merged before export (Hu et al. 2021)."""

    rank: int = Field(0, ge=0, le=1024, description="0: none, all weights are trained")
    alpha: float = Field(16.0, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input")
    targets: list[str] = Field([], description="names of linear layers; empty: all but the output head")
    base: Literal["fp32", "nf4", "int8"] = Field("fp32", description="the frozen weights; nf4: QLoRA")


class Qad(Section):
    """Quantization-aware distillation: a short run under each artifact's own rounding, before it is exported."""

    tokens_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="tokens of this run, as a share of the distillation's; 0: no run; 0.09 halved the KL of four types",
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="AdamW's peak; higher: drift from the float student")
    teacher_share: float = Field(
        0.5, ge=0, le=1, description="the teacher's share of the probabilities learnt; the rest is the float student's"
    )
    batch_sequences: int = Field(4, ge=1, description="packed sequences an optimizer step")


class LossWeights(Section):
    """The losses, each with its weight: a field for each line of `DIVERGENCES` in losses/divergences.py, and one."""

    forward_kl: float = Field(1.0, ge=0, description="weight of KL(teacher ‖ student)")
    reverse_kl: float = Field(0.0, ge=0, description="weight of KL(student ‖ teacher)")
    jsd: float = Field(0.0, ge=0, description="weight of the generalised Jensen-Shannon divergence")
    skewed_kl: float = Field(0.0, ge=0, description="weight of KL(teacher ‖ skew·teacher + (1−skew)·student)")
    skewed_reverse_kl: float = Field(0.0, ge=0, description="weight of KL(student ‖ (1−skew)·teacher + skew·student)")
    taid: float = Field(0.0, ge=0, description="weight of TAID: KL to a teacher that moves from student to teacher")
    total_variation: float = Field(0.0, ge=0, description="weight of half the L1 distance of the probabilities")
    cross_entropy: float = Field(0.0, ge=0, description="weight of the next token's cross-entropy")

    @model_validator(mode="after")
    def _learns_something(self) -> LossWeights:
        if not any(weight > 0 for weight in self.losses.values()):
            raise ValueError(f"no loss has a weight: set one of {', '.join(LossWeights.model_fields)} above 0")
        return self

    @property
    def losses(self) -> dict[str, float]:
        """Name → weight, zeros too."""
        return {name: getattr(self, name) for name in LossWeights.model_fields}

    @property
    def needs_teacher(self) -> bool:
        return any(weight > 0 for name, weight in self.losses.items() if name != "cross_entropy")

    @property
    def general(self) -> list[str]:
        """Those that are asked for beside forward KL and cross-entropy, for which there is a shorter way."""
        plain = ("forward_kl", "cross_entropy")
        return [name for name, weight in self.losses.items() if weight > 0 and name not in plain]


class Distill(Training, LossWeights):
    """The student's training: Training's fields, and the losses."""

    temperature: float = Field(
        1.0, gt=0, le=100, description="T: divides both models' logits in all losses but cross_entropy; these are × T²"
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="the teacher's share in jsd's mixture")
    skew: float = Field(0.1, gt=0, lt=1, description="what the skewed divergences mix in")
    taid_start: float = Field(0.4, ge=0, le=1, description="the teacher's share in TAID at the first step")
    taid_end: float = Field(1.0, ge=0, le=1, description="the teacher's share in TAID at the last step")
    documents_share: float = Field(1.0, gt=0, le=1, description="share of the training documents the student sees")
    teacher_signals: Literal["auto", "live", "cached"] = Field(
        "auto", description="cached: the teacher runs once over the text; auto: if that saves time and fits"
    )
    cache: Cache = Cache()
    lora: Lora = Lora()
    qad: Qad = Qad()


class Export(Section):
    """What is written. Default: what the target runs best."""

    artifacts: list[str] = Field([], description="e.g. [gguf:Q4_K_M, onnx:INT4]; empty: the target's default")
    context_tokens: int | None = Field(None, ge=8, description="context on the device; default: the target's")
    importance_matrix: Literal["auto", "on", "off"] = Field(
        "auto", description="GGUF: weigh columns by calibration activations; auto: for the types where it helps"
    )
    tensor_types: dict[str, str] = Field(
        {}, description="regular expression of a tensor's (GGUF) or node's (ONNX) name: its type, e.g. {ffn_down: Q6_K}"
    )
    mixed_retention: float | None = Field(
        None,
        gt=0,
        le=1,
        description="GGUF: give the layers that cost most a higher type, until the quantized student keeps this much of"
        " the float one, at the smallest size",
    )
    max_file_bytes: int | None = Field(None, ge=1 << 20, description="split a larger GGUF into files of at most this")
    calibration_samples: int = Field(128, ge=2, le=1_000_000, description="sequences or inputs for calibration")
    calibration_tokens: int = Field(256, ge=8, le=1 << 20, description="length of a calibration sequence")
    calibration_method: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="how the ranges of static INT8 are found"
    )
    calibration_batch: int = Field(8, ge=1, le=4096, description="samples in a run; the ranges do not depend on it")
    int8_scheme: Literal["auto", "u8s8", "u8s8-7bit", "u8u8", "s8s8"] = Field(
        "auto",
        description="signs and bits of ONNX INT8; auto: what this CPU multiplies without saturating; s8s8: TensorRT",
    )
    opset: int | None = Field(None, ge=17, le=30, description="opset of ONNX graphs; default: the exporter's")
    ort_format: bool = Field(False, description="write the graph in ORT format too, for mobile builds of the runtime")
    tensorrt: bool = Field(
        False, description="ONNX encoders with standard operators only, and a script that builds a TensorRT engine"
    )
    compare_logits: bool = Field(
        True, description="compare a GGUF or ONNX decoder with the float32 model's logits; false: only with its weights"
    )
    compare_speed: bool = Field(True, description="time float against quantized if the runtime is installed")

    @field_validator("tensor_types")
    @classmethod
    def _patterns_end(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern in value:
            compiled_pattern(pattern)
        return value

    @field_validator("artifacts", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Verify(Section):
    """How retention is measured."""

    min_retention: float = Field(0.80, ge=0, le=10, description="least retention, at its interval's lower end")
    context_tokens: int = Field(256, ge=8, description="window of the evaluation")
    stride_tokens: int | None = Field(None, ge=1, description="step between windows; default: the window (disjoint)")
    max_tokens: int = Field(60_000, ge=64, description="score at most this many held-out tokens, in whole documents")


class Bench(Section):
    """How speed is measured. Default: the target's settings."""

    prompt_tokens: int | None = Field(None, ge=1, description="length of the prompt; default: the target's")
    new_tokens: int | None = Field(None, ge=2, description="tokens decoded after it; default: the target's")
    warmup: int | None = Field(None, ge=0, description="runs before those that count; default: the target's")
    repeats: int | None = Field(None, ge=1, description="runs that count; default: the target's")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: the target's")


class Recipe(Section):
    """A whole recipe."""

    name: str = Field(QUICKSTART, pattern=NAME_PATTERN, description="first part of the bundle's name")
    task: Literal["causal-lm"] = Field("causal-lm", description="what the model does")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")
    teacher: Teacher = Teacher()
    student: Student = Student()
    data: Data = Data()
    distill: Distill = Distill()
    export: Export = Export()
    verify: Verify = Verify()
    bench: Bench = Bench()


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with edgedistill."""
    folder = resources.files("edgedistill.config") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def about_recipe(name: str) -> str:
    """The first sentence of a built-in recipe's comment: what it is for."""
    text = recipe_text(name)
    words = " ".join(line.lstrip("# ") for line in text[: text.index("name:")].splitlines())
    return words.partition(". ")[0].rstrip(".")


def load_recipe(
    name_or_path: str = QUICKSTART, overrides: Iterable[str] = (), *, values: Mapping[str, Any] | None = None
) -> Recipe:
    """A built-in recipe by name, or a YAML file, with `values` by path and `key.path=value` overrides on top.

    Raises UserError with cause, value and remedy for anything that is not a recipe.
    """
    return parse_recipe(recipe_text(name_or_path), where=name_or_path, overrides=overrides, values=values)


def recipe_text(name_or_path: str) -> str:
    """The YAML of a built-in recipe or of a file."""
    if name_or_path in builtin_recipes():
        return (resources.files("edgedistill.config") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = local_path(name_or_path, what="recipe")
    if not os.path.lexists(path):
        endings = (".yaml", ".yml") if path.suffix in (".yaml", ".yml") else ()
        near = [path.with_suffix(ending) for ending in endings if path.with_suffix(ending).is_file()]
        raise UserError(
            f"no recipe {shown(name_or_path)}: not a built-in one and no such file",
            f"did you mean {shown(str(near[0]))}?" if near else _recipe_remedy(name_or_path, path),
        )
    return read_text(path, what="recipe", max_bytes=MAX_YAML_BYTES)


def _recipe_remedy(name: str, path: Path) -> str:
    """Where no recipe is found: of a path, to check it; of a name, the built-in one that it is near."""
    if path.suffix or "/" in name:
        return f"check the path, or take a built-in one: {', '.join(builtin_recipes())}"
    return did_you_mean(name, builtin_recipes())


def parse_recipe(
    text: str, *, where: str, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> Recipe:
    """Text of YAML → Recipe; `where` names it in errors."""
    tree = parse_yaml(text, where=f"recipe {where}")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"recipe {where} holds a {type(tree).__name__}", "a recipe is a mapping, like `data: {...}`")
    refuse_unknown(tree, Recipe, f"recipe {where}")
    sources: dict[str, str] = {}
    for path, value, said in _asked(overrides, values or {}):
        refuse_unknown(_nested(path, value), Recipe, said)
        _set(tree, path, value, said)
        sources[path] = said
    _later_length_wins(tree, sources)
    refuse_unknown(tree, Recipe, f"recipe {where}")
    _refuse_huge(tree, where, "")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise wrong_values(error, where, sources) from error


def _later_length_wins(tree: dict[str, Any], sources: Mapping[str, str]) -> None:
    """`--set distill.epochs=10` is meant, whatever the recipe's distill.tokens says; and the other way round."""
    for section in ("teacher.train", "distill"):
        for asked, other in (("epochs", "tokens"), ("tokens", "epochs")):
            if f"{section}.{asked}" in sources and f"{section}.{other}" not in sources:
                node: Any = tree
                for part in section.split("."):
                    node = node.get(part) if isinstance(node, dict) else None
                if isinstance(node, dict):
                    node.pop(other, None)


def _nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    tree: dict[str, Any] = {}
    _set(tree, path, value, path)
    return tree


def _asked(overrides: Iterable[str], values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Path, value, and how it was said; UserError where one field is given twice with two values."""
    yield from ((path, value, path) for path, value in values.items())
    seen = dict(values)
    for override in overrides:
        said = f"--set {shown(override)}"
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path:
            raise UserError(f"{said} has no value", "write --set key.path=value")
        if len(override) > MAX_OVERRIDE_CHARS:
            raise UserError(f"{said} has {len(override):,} characters", f"at most {MAX_OVERRIDE_CHARS:,}")
        if path.count(".") >= MAX_KEY_PARTS or "" in path.split("."):
            raise UserError(
                f"{said}: no field has the path {shown(path)}", "see `edgedistill recipes show` for the fields"
            )
        value = _override_value(text, said)
        if path in seen and seen[path] != value:
            raise UserError(f"{said}: {path} is given twice, as {shown(seen[path])} too", "give it once")
        seen[path] = value
        yield path, value, said


def _override_value(text: str, said: str) -> Any:
    value = parse_yaml(text, where=f"{said}, its value")
    written = text.strip().removesuffix("\n...")  # as PyYAML ends a document
    if isinstance(value, str) and written[:1] not in "'\"|>" and value != written:
        raise UserError(f"{said}: YAML reads {shown(value)}", "quote the whole value")
    if value is None and written.startswith("#"):
        raise UserError(f"{said}: for YAML that is a comment", "quote the whole value")
    return value


def _set(tree: dict[str, Any], path: str, value: Any, said: str) -> None:
    node = tree
    *parents, leaf = path.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"{said}: {part} is not a section", "see `edgedistill recipes show`")
        node = child
    node[leaf] = value


def _refuse_huge(value: Any, where: str, path: str) -> None:
    """Whole numbers that no field means: arithmetic on them would end in an overflow, or never."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_huge(inner, where, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            _refuse_huge(inner, where, path)
    elif isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
        raise UserError(f"recipe {where}: {path} = {shown(value)}", f"at most {MAX_WHOLE_NUMBER:,}")
