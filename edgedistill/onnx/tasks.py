"""What a checkpoint does, and the graphs that it becomes: its task, inputs, axes and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError, did_you_mean
from edgedistill.models.folder import require_plain_files
from edgedistill.models.loading import LOADING
from edgedistill.models.weights import refuse_wrapped
from edgedistill.onnx.model_inputs import IDS, MASK, PIXELS, require_image_inputs, text_inputs
from edgedistill.onnx.processors import (
    given_names,
    has_tokenizer,
    open_image_processor,
    open_tokenizer,
    processed_sizes,
)
from edgedistill.onnx.sentence import (
    CROSS_ENCODER,
    ENCODER,
    Pipeline,
    activation_of,
    model_folder,
    model_type,
    read_pipeline,
)
from edgedistill.strict import read_json

# Task → the transformers class that loads it, how its architectures are called in config.json, the graph's outputs.
TASKS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), ("logits",)),
    "embedding": ("AutoModel", (), ("sentence_embedding",)),
    "text-classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",), ("logits",)),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",), ("logits",)),
    "question-answering": (
        "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), ("start_logits", "end_logits"),
    ),
    "fill-mask": ("AutoModelForMaskedLM", ("ForMaskedLM",), ("logits",)),
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification",), ("logits",)),
    "text2text": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "MTModel"), ("logits",)),
    # Last, for its ending is that of other classes too.
    "feature-extraction": ("AutoModel", ("Model",), ("last_hidden_state",)),
}  # fmt: skip
SAMPLE_BATCH, SAMPLE_TOKENS, SAMPLE_PAST = 2, 8, 3
# Of logits, relative to their spread: what float32 sums in another order give.
STEPS_LIMIT = 1e-3
BATCH, SEQUENCE = "batch", "sequence"
# Tokens of a model whose positions have no end, and whose tokenizer says none: what is then promised.
ENDLESS_TOKENS = 512
# What an output holds: likelihoods of classes one of which is meant, of labels each by itself, of places in the text;
# numbers (a regression, a reranker's score); vectors; and what another output says already.
CLASSES, LABELS, PLACES, SCORES, VECTORS, DERIVED = "classes", "labels", "places", "scores", "vectors", "derived"
# Encoders that sentence-transformers loads without their decoder: the class by the config's model_type.
ENCODER_CLASSES = {
    "t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A graph to be: file name, the torch module, an example of each input, and the axes that may vary.

    `meanings`: what an output holds (CLASSES, ...), by its name.
    """

    file: str
    module: Any
    examples: dict[str, Any]
    axes: dict[str, dict[int, str]]
    meanings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskModel:
    """A checkpoint loaded for its task in float32.

    `folder`: of the model itself, which may lie within the checkpoint. `tokenizer`: None for images, and where there is
    none. `notes`: what a user of the graph has to know.
    """

    task: str
    folder: Path
    model: Any
    graphs: tuple[Graph, ...]
    parameters: int
    vocab_size: int
    max_tokens: int
    tokenizer: Any | None = None
    notes: tuple[str, ...] = ()

    @property
    def reads_text(self) -> bool:
        return bool(self.model.main_input_name == IDS)


def task_of(checkpoint: Path, asked: str | None = None) -> str:
    """What a transformers folder does by its config and pooling; `asked` overrides it. UserError where unknown."""
    if asked is not None:
        if asked not in TASKS:
            raise UserError(f"no task '{asked}'", f"{did_you_mean(asked, TASKS)} (tasks: {', '.join(TASKS)})")
        return asked
    kind = model_type(checkpoint)
    if kind == ENCODER:
        return "embedding"
    config = read_json(model_folder(checkpoint) / "config.json", what="config.json")
    names = [str(name) for name in config.get("architectures") or []]
    found = next(
        (task for task, (_, endings, _) in TASKS.items() if any(n.endswith(e) for n in names for e in endings)), None
    )
    if kind is not None and (kind != CROSS_ENCODER or found == "causal-lm"):
        what = "a reranker that reads a decoder's logits" if kind == CROSS_ENCODER else f"sentence-transformers' {kind}"
        raise UserError(
            f"{checkpoint} is {what}, and its last step cannot be exported",
            f"name what the transformer alone does with --task: {', '.join(TASKS)}",
        )
    if found is not None:
        return found
    raise UserError(
        f"{checkpoint}: no task is known for the architectures {names or 'that config.json does not name'}",
        f"name one with --task: {', '.join(TASKS)}; any torch module: edgedistill.onnx.encoder.export_module",
    )


def open_task(checkpoint: Path, task: str | None = None) -> TaskModel:
    """Load a checkpoint for its task. UserError: unknown task; weights that are missing, damaged or not finite."""
    task = task_of(checkpoint, task)
    if task == "causal-lm":
        raise UserError(f"{checkpoint} is a decoder", "export it without --task: onnxruntime-genai's builder takes it")
    pipeline = read_pipeline(checkpoint) if task == "embedding" else None
    folder = model_folder(checkpoint) if pipeline is None else pipeline.transformer
    if folder != checkpoint:
        require_plain_files(folder, "model")
    model = _loaded(folder, task)
    _require_finite(folder, model)
    tokenizer = open_tokenizer(folder) if model.main_input_name == IDS else None
    notes = list(pipeline.notes if pipeline is not None else ())
    if tokenizer is None and model.main_input_name == IDS and has_tokenizer(folder):
        notes.append("its tokenizer could not be opened here, so that no text was compared: it ships as it is")
    graphs = _graphs(checkpoint, folder, model, task, tokenizer, pipeline)
    vocab_size = 0
    if model.main_input_name == IDS:
        vocab_size = _rows(model, tokenizer)
        _require_vocabulary(folder, vocab_size)
        _require_case(folder, tokenizer, pipeline)
    return TaskModel(
        task=task,
        folder=folder,
        model=model,
        graphs=graphs,
        parameters=sum(p.numel() for p in graphs[0].module.parameters()),
        vocab_size=vocab_size,
        max_tokens=_max_tokens(model, tokenizer, pipeline) if model.main_input_name == IDS else 0,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _loaded(folder: Path, task: str) -> Any:
    """The model in float32 and evaluation. UserError: not of this task, weights missing or damaged."""
    import transformers
    from safetensors import SafetensorError

    config = read_json(folder / "config.json", what="config.json")
    name = TASKS[task][0]
    if task in ("embedding", "feature-extraction"):
        encoders = [str(n) for n in config.get("architectures") or [] if str(n).endswith("EncoderModel")]
        alone = ENCODER_CLASSES.get(str(config.get("model_type")))
        if alone is not None and (task == "embedding" or alone in encoders):
            name = alone
    loader = getattr(transformers, name)
    try:
        model, loaded = loader.from_pretrained(
            folder, dtype="float32", local_files_only=True, output_loading_info=True, **LOADING,
            **({"add_pooling_layer": False} if name == "AutoModel" and _has_pooler(folder) else {}),
        )  # fmt: skip
    # transformers raises many kinds for a config that it cannot read as this class
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be loaded for {task}: {str(error).strip().splitlines()[0][:300]}",
            f"name what it does with --task: {', '.join(TASKS)}",
        ) from error
    wrong = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if wrong:
        refuse_wrapped(loaded["unexpected_keys"], loaded["missing_keys"], where=str(folder))
        raise UserError(
            f"{folder} has no weights for {task}: {len(wrong)} tensors are missing, {', '.join(wrong[:3])}",
            f"train it for that task, or name what it does with --task: {', '.join(TASKS)}",
        )
    return model.eval()


def image_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes, from its config."""
    size = getattr(model.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(model.config, "num_channels", 3)), int(height), int(width)


def _graphs(
    checkpoint: Path, folder: Path, model: Any, task: str, tokenizer: Any | None, pipeline: Pipeline | None
) -> tuple[Graph, ...]:
    import torch

    from edgedistill.onnx.task_modules import Outputs

    if model.main_input_name == PIXELS and task != "text2text":
        return (_image_graph(checkpoint, folder, model, task),)
    if task == "image-classification":
        raise UserError(
            f"{checkpoint}: a {type(model).__name__} takes {model.main_input_name}, which its processor makes of an"
            " image, and no graph of them is exported",
            "export the torch module itself: edgedistill.onnx.encoder.export_module takes any",
        )
    given = None if tokenizer is None else given_names(tokenizer, folder)
    names = text_inputs(model, given, str(checkpoint))
    if task == "text2text":
        if not getattr(model.config, "is_encoder_decoder", False):
            raise UserError(
                f"{checkpoint}: a {type(model).__name__} has no encoder of text before its decoder",
                f"name what it does with --task: {', '.join(TASKS)}",
            )
        return _text2text(checkpoint, model)
    module: Any = Outputs(model, TASKS[task][2])
    meanings = _meanings(task, model.config)
    if pipeline is not None:
        from edgedistill.onnx.sentence_modules import Sentence

        left = tokenizer is not None and tokenizer.padding_side == "left"
        module = Sentence(model, pipeline, left_padded=left)
        names = list(dict.fromkeys([*names[:1], MASK, *names[1:]]))  # the pooling reads it in any case
    elif task == "text-classification":
        module, meanings = _reranker(checkpoint, folder, model, module, meanings)
    examples = {name: torch.ones(SAMPLE_BATCH, SAMPLE_TOKENS, dtype=torch.int64) for name in names}
    _require_outputs(checkpoint, model, module, examples, task)
    return (Graph("model.onnx", module, examples, {name: {0: BATCH, 1: SEQUENCE} for name in names}, meanings),)


def _image_graph(checkpoint: Path, folder: Path, model: Any, task: str) -> Graph:
    """Of the size that the folder's image processor gives; one axis each for height and width where that varies."""
    import torch

    from edgedistill.onnx.task_modules import Outputs

    processor = open_image_processor(folder)
    axes = {0: BATCH}
    shapes = {image_size(model)}
    channels = 1 if image_size(model)[0] == 1 else 3
    given: set[str] = {PIXELS}
    if processor is not None:
        given, found = processed_sizes(processor, folder, channels=channels)
        shapes = {(size[0], size[1], size[2]) for size in found}
        if len(shapes) > 1:
            axes |= {2: "height", 3: "width"}
    require_image_inputs(model, given, str(checkpoint))
    module = Outputs(model, TASKS[task][2])
    for shape in sorted(shapes):
        examples = {PIXELS: torch.zeros(SAMPLE_BATCH, *shape)}
        _require_outputs(checkpoint, model, module, examples, task)
    # Height and width that are equal by chance would be traced as one axis
    largest = max(shapes, key=lambda shape: (shape[1] != shape[2], shape))
    return Graph(
        "model.onnx", module, {PIXELS: torch.zeros(SAMPLE_BATCH, *largest)}, {PIXELS: axes},
        _meanings(task, model.config),
    )  # fmt: skip


def _reranker(
    checkpoint: Path, folder: Path, model: Any, module: Any, meanings: dict[str, str]
) -> tuple[Any, dict[str, str]]:
    """The module with sentence-transformers' `scores` beside the logits, where the folder is a CrossEncoder."""
    config = read_json(folder / "config.json", what="config.json")
    name = activation_of(checkpoint, config, int(model.config.num_labels))
    if name is None:
        return module, meanings
    from edgedistill.onnx.sentence_modules import Reranked, activation

    return Reranked(model, activation(name, str(checkpoint))), meanings | {"scores": DERIVED}


def _meanings(task: str, config: Any) -> dict[str, str]:
    """What the outputs of a task hold, by the model's config."""
    if task in ("embedding", "feature-extraction"):
        return dict.fromkeys(TASKS[task][2], VECTORS)
    if task == "question-answering":
        return dict.fromkeys(TASKS[task][2], PLACES)
    problem = getattr(config, "problem_type", None)
    if task in ("text-classification", "image-classification", "token-classification"):
        if problem == "regression" or int(getattr(config, "num_labels", 2)) == 1:
            return {"logits": SCORES}
        if problem == "multi_label_classification":
            return {"logits": LABELS}
    return {"logits": CLASSES}


def _require_outputs(checkpoint: Path, model: Any, module: Any, examples: Mapping[str, Any], task: str) -> None:
    """Run the module once. UserError where it raises, or gives other outputs than the task's."""
    import torch

    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in examples.items())
    examples = {name: value.clone() for name, value in examples.items()}
    if IDS in examples and isinstance(getattr(model.config, "eos_token_id", None), int):
        examples[IDS][:, -1] = model.config.eos_token_id  # BART reads its classes there
    try:
        with torch.inference_mode():
            found = module(**examples)
    except KeyError as error:
        raise UserError(
            f"{checkpoint}: a {type(model).__name__} gives no {error.args[0] if error.args else 'such output'}, which"
            f" {task} is about",
            f"name what it does with --task: {', '.join(TASKS)}",
        ) from error
    # Whatever a model raises for inputs that it does not take: sizes, a missing decoder's input
    except Exception as error:
        raise UserError(
            f"{checkpoint}: a {type(model).__name__} does not run on {shapes}: {_reason(error)}",
            f"correct the model's files where they disagree, or name what it does with --task: {', '.join(TASKS)}",
        ) from error
    odd = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise UserError(
            f"{checkpoint}: a {type(model).__name__} gives {', '.join(odd)} that is not a tensor",
            f"name what it does with --task: {', '.join(TASKS)}",
        )


def _text2text(checkpoint: Path, model: Any) -> tuple[Graph, ...]:
    """Encoder and decoder. UserError where the decoder has no cache that takes several tokens at once."""
    import torch

    from edgedistill.onnx.task_modules import Decoder, Encoder

    encoder = Encoder(model)
    tokens = torch.ones(SAMPLE_BATCH, SAMPLE_TOKENS, dtype=torch.int64)
    source = {"input_ids": tokens, "attention_mask": tokens}
    try:
        with torch.inference_mode():
            made = encoder(**source)
    except Exception as error:  # a decoder of another signature, a cache of its own
        raise _no_cache(checkpoint, model, _reason(error)) from error
    cross = {name: value.clone() for name, value in made.items() if name.startswith("cross_")}
    layers = len(cross) // 2
    examples = {"input_ids": tokens[:, :5], "encoder_attention_mask": tokens}
    for name, value in cross.items():
        examples[name.replace("cross_", "past_")] = value[:, :, :SAMPLE_PAST].clone()
    axes: dict[str, dict[int, str]] = {
        name: {0: BATCH, 2: "past"} if name.startswith("past_") else {0: BATCH, 1: "tokens"} for name in examples
    }
    axes["encoder_attention_mask"] = {0: BATCH, 1: SEQUENCE}
    axes.update({name: {0: BATCH, 2: SEQUENCE} for name in cross})
    decoder = Decoder(model, layers)
    _require_steps(checkpoint, model, decoder, examples | cross)
    return (
        Graph("encoder.onnx", encoder, source, {name: {0: BATCH, 1: SEQUENCE} for name in source}),
        Graph("decoder.onnx", decoder, examples | cross, axes),
    )


def _require_steps(checkpoint: Path, model: Any, decoder: Any, examples: Mapping[str, Any]) -> None:
    """UserError where several tokens at once are something else than one after another, for a graph takes both."""
    import torch

    count = examples["input_ids"].shape[1]
    rows, padding = _rows(model, None), getattr(model.config, "pad_token_id", None)
    # Different tokens, so that one which sees those behind it is noticed; no padding, which is not counted (M2M100).
    known = torch.tensor([token for token in range(min(rows, 64)) if token != padding] or [0])
    ids_BT = known[torch.arange(SAMPLE_BATCH * count) % len(known)].view(SAMPLE_BATCH, count)
    try:
        with torch.inference_mode():
            together = decoder(**{**examples, "input_ids": ids_BT})["logits"]
            steps, cache = [], {name: value for name, value in examples.items() if name.startswith("past_")}
            for step in range(count):
                made = decoder(**{**examples, **cache, "input_ids": ids_BT[:, step : step + 1]})
                steps.append(made["logits"])
                cache = {name: made[name.replace("past_", "present_", 1)] for name in cache}
    except Exception as error:
        raise _no_cache(checkpoint, model, _reason(error)) from error
    difference = float((torch.cat(steps, dim=1) - together).std() / together.std().clamp_min(1e-30))
    if not difference <= STEPS_LIMIT:
        raise _no_cache(checkpoint, model, f"they give other tokens than one after another, by {difference:.2g}")


def _no_cache(checkpoint: Path, model: Any, reason: str) -> UserError:
    return UserError(
        f"{checkpoint}: the decoder of a {type(model).__name__} does not take several tokens with a cache: {reason}",
        "export its encoder, and its decoder as you call it, as modules: edgedistill.onnx.encoder.export_module takes"
        " any",
    )


def _reason(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300] or type(error).__name__


def _has_pooler(checkpoint: Path) -> bool:
    """Whether the class of a checkpoint takes `add_pooling_layer`: its pooled output is not among the graph's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    try:
        kind = transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        return False
    return "add_pooling_layer" in inspect.signature(kind.__init__).parameters


def _require_finite(checkpoint: Path, model: Any) -> None:
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        bad = int((~values.isfinite()).sum()) if values.is_floating_point() else 0
        if bad:
            raise UserError(
                f"{checkpoint}: tensor {name} holds {bad:,} values that are NaN or infinite",
                "train or download the model again",
            )


def _rows(model: Any, tokenizer: Any | None) -> int:
    """How many tokens the model knows: rows of its embedding, or where it has no such table, what its tokenizer has."""
    size = getattr(model.config, "vocab_size", None)
    if size:
        return int(size)
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):  # CANINE adds up tables of hashes of a character
        return len(tokenizer) if tokenizer is not None else SAMPLE_TOKENS


def _max_tokens(model: Any, tokenizer: Any | None, pipeline: Pipeline | None) -> int:
    """The longest text: of the positions and what the tokenizer and sentence-transformers say, the smallest.

    Of relative positions a config says nothing, or -1.
    """
    said = [int(getattr(model.config, "max_position_embeddings", 0) or 0)]
    embeddings = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    padding = getattr(embeddings, "padding_idx", None)
    if padding is not None and said[0] > padding + 1:
        said[0] -= int(padding) + 1  # RoBERTa counts its positions from behind the padding token
    if tokenizer is not None:
        longest = tokenizer.model_max_length
        said.append(int(longest) if isinstance(longest, int | float) and longest < 1 << 31 else 0)
    if pipeline is not None and pipeline.max_tokens is not None:
        said.append(pipeline.max_tokens)
    if getattr(model.config, "attention_type", None) == "block_sparse":
        # BigBird attends to everything up to here, and to blocks beyond. The first short text switches blocks off for
        # good, so that torch itself would agree with a graph that is wrong for a long one.
        said.append((5 + 2 * int(model.config.num_random_blocks)) * int(model.config.block_size))
    return min((tokens for tokens in said if tokens > 0), default=ENDLESS_TOKENS)


def _require_case(folder: Path, tokenizer: Any | None, pipeline: Pipeline | None) -> None:
    """UserError where sentence-transformers makes texts small before a tokenizer that does not."""
    if pipeline is None or not pipeline.lower_case or tokenizer is None:
        return
    if tokenizer("ABC DÉF")["input_ids"] != tokenizer("abc déf")["input_ids"]:
        raise UserError(
            f"{folder}: sentence-transformers makes texts lower case (do_lower_case), and its tokenizer does not",
            "put a Lowercase normalizer into tokenizer.json, so that the folder does it by itself",
        )


def _require_vocabulary(folder: Path, vocab_size: int) -> None:
    if not (folder / "tokenizer.json").is_file():
        return
    from edgedistill.models.folder import vocabulary

    largest = max(vocabulary(folder, "model").values())
    if largest >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has the id {largest:,}, the embedding {vocab_size:,} rows",
            "resize the embedding (resize_token_embeddings) and save the model again",
        )
