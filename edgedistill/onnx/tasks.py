"""What a checkpoint does, and the graphs that it becomes: its task, inputs, axes and outputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError, did_you_mean
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
POOLING_FILE = "1_Pooling/config.json"
NORMALIZE_FOLDER = "2_Normalize"
SAMPLE_BATCH, SAMPLE_TOKENS, SAMPLE_PAST = 2, 8, 3
BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True)
class Graph:
    """A graph to be: file name, the torch module, an example of each input, and the axes that may vary."""

    file: str
    module: Any
    examples: dict[str, Any]
    axes: dict[str, dict[int, str]]


@dataclass(frozen=True)
class TaskModel:
    """A checkpoint loaded for its task in float32."""

    task: str
    model: Any
    graphs: tuple[Graph, ...]
    parameters: int
    vocab_size: int
    max_tokens: int


def task_of(checkpoint: Path, asked: str | None = None) -> str:
    """What a transformers folder does by its config and pooling; `asked` overrides it. UserError where unknown."""
    if asked is not None:
        if asked not in TASKS:
            raise UserError(f"no task '{asked}'", f"{did_you_mean(asked, TASKS)} (tasks: {', '.join(TASKS)})")
        return asked
    if (checkpoint / POOLING_FILE).is_file():
        return "embedding"
    config = read_json(checkpoint / "config.json", what="config.json")
    names = [str(name) for name in config.get("architectures") or []]
    for task, (_, endings, _) in TASKS.items():
        if any(name.endswith(ending) for name in names for ending in endings):
            return task
    raise UserError(
        f"{checkpoint}: no task is known for the architectures {names or 'that config.json does not name'}",
        f"name one with --task: {', '.join(TASKS)}; any torch module: edgedistill.onnx.encoder.export_module",
    )


def open_task(checkpoint: Path, task: str | None = None) -> TaskModel:
    """Load a checkpoint for its task. UserError: unknown task; weights that are missing, damaged or not finite."""
    import transformers
    from safetensors import SafetensorError

    task = task_of(checkpoint, task)
    if task == "causal-lm":
        raise UserError(f"{checkpoint} is a decoder", "export it without --task: onnxruntime-genai's builder takes it")
    loader = getattr(transformers, TASKS[task][0])
    try:
        model, loaded = loader.from_pretrained(
            checkpoint, dtype="float32", local_files_only=True, use_safetensors=True, output_loading_info=True,
            **({"add_pooling_layer": False} if task in ("embedding", "feature-extraction") and _has_pooler(checkpoint)
               else {}),
        )  # fmt: skip
    # transformers raises many kinds for a config that it cannot read as this class
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint} cannot be loaded for {task}: {str(error).strip().splitlines()[0][:300]}",
            f"name what it does with --task: {', '.join(TASKS)}",
        ) from error
    wrong = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if wrong:
        raise UserError(
            f"{checkpoint} has no weights for {task}: {len(wrong)} tensors are missing, {', '.join(wrong[:3])}",
            f"train it for that task, or name what it does with --task: {', '.join(TASKS)}",
        )
    model.eval()
    _require_finite(checkpoint, model)
    vocab_size = int(getattr(model.config, "vocab_size", 0) or 0)
    _require_vocabulary(checkpoint, model, vocab_size)
    return TaskModel(
        task=task,
        model=model,
        graphs=_graphs(checkpoint, model, task),
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=vocab_size if model.main_input_name == "input_ids" else 0,
        max_tokens=_max_tokens(checkpoint, model) if model.main_input_name == "input_ids" else 0,
    )


def text_inputs(checkpoint: Path, model: Any) -> list[str]:
    """Names of the inputs that a text model takes, as its tokenizer gives them."""
    known = set(inspect.signature(model.forward).parameters)
    names = ["input_ids", "attention_mask"]
    config_path = checkpoint / "tokenizer_config.json"
    listed = read_json(config_path, what="tokenizer_config.json") if config_path.is_file() else {}
    types = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    if "token_type_ids" in known and types and "token_type_ids" in listed.get("model_input_names", ["token_type_ids"]):
        names.append("token_type_ids")
    return [name for name in names if name in known]


def image_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes, from its config."""
    size = getattr(model.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(model.config, "num_channels", 3)), int(height), int(width)


def _graphs(checkpoint: Path, model: Any, task: str) -> tuple[Graph, ...]:
    import torch

    from edgedistill.onnx.task_modules import Outputs, Pooled

    if task == "text2text":
        return _text2text(model)
    if model.main_input_name == "pixel_values":
        examples = {"pixel_values": torch.zeros(SAMPLE_BATCH, *image_size(model))}
        return (Graph("model.onnx", Outputs(model, TASKS[task][2]), examples, {"pixel_values": {0: BATCH}}),)
    if model.main_input_name != "input_ids":
        raise UserError(
            f"{checkpoint} takes {model.main_input_name}",
            "text (input_ids) and image (pixel_values) models are exported",
        )
    names = text_inputs(checkpoint, model)
    examples = {name: torch.ones(SAMPLE_BATCH, SAMPLE_TOKENS, dtype=torch.int64) for name in names}
    module: Any = Outputs(model, TASKS[task][2])
    if task == "embedding":
        module = Pooled(model, _pooling(checkpoint), normalize=(checkpoint / NORMALIZE_FOLDER).is_dir())
    return (Graph("model.onnx", module, examples, {name: {0: BATCH, 1: SEQUENCE} for name in names}),)


def _text2text(model: Any) -> tuple[Graph, ...]:
    import torch

    from edgedistill.onnx.task_modules import Decoder, Encoder

    encoder = Encoder(model)
    tokens = torch.ones(SAMPLE_BATCH, SAMPLE_TOKENS, dtype=torch.int64)
    source = {"input_ids": tokens, "attention_mask": tokens}
    with torch.inference_mode():
        made = encoder(**source)
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
    return (
        Graph("encoder.onnx", encoder, source, {name: {0: BATCH, 1: SEQUENCE} for name in source}),
        Graph("decoder.onnx", Decoder(model, layers), examples | cross, axes),
    )


def _pooling(checkpoint: Path) -> str:
    """How a sentence-transformers folder pools; mean where it says nothing. UserError for what is not exported."""
    path = checkpoint / POOLING_FILE
    if not path.is_file():
        return "mean"
    config = read_json(path, what=POOLING_FILE)
    modes = [key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
             for key, value in config.items() if key.startswith("pooling_mode_") and value is True]  # fmt: skip
    if len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
        raise UserError(f"{path} pools by {modes}", "mean, cls or max are exported; or use --task feature-extraction")
    return modes[0]


def _has_pooler(checkpoint: Path) -> bool:
    """Whether the class of a checkpoint takes `add_pooling_layer`: its pooled output is not among the graph's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True)
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


def _max_tokens(checkpoint: Path, model: Any) -> int:
    """The longest text: of the positions and what the tokenizer says, the smaller."""
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 512)
    padding = model.config.pad_token_id
    embeddings = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    if embeddings is not None and getattr(embeddings, "padding_idx", None) is not None:
        positions -= int(padding) + 1  # RoBERTa counts its positions from behind the padding token
    path = checkpoint / "tokenizer_config.json"
    longest = read_json(path, what="tokenizer_config.json").get("model_max_length") if path.is_file() else None
    return int(min(positions, longest)) if isinstance(longest, int | float) and longest > 0 else positions


def _require_vocabulary(checkpoint: Path, model: Any, vocab_size: int) -> None:
    if model.main_input_name != "input_ids" or not (checkpoint / "tokenizer.json").is_file():
        return
    from edgedistill.models import vocabulary

    largest = max(vocabulary(checkpoint, "model").values())
    if largest >= vocab_size:
        raise UserError(
            f"{checkpoint}: the tokenizer has the id {largest:,}, the embedding {vocab_size:,} rows",
            "resize the embedding (resize_token_embeddings) and save the model again",
        )
