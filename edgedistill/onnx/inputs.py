"""Real inputs for a graph: texts through the checkpoint's own tokenizer, images with the statistics of photographs.

B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.tasks import TaskModel
from edgedistill.records import TensorSpec
from edgedistill.strict import read_json

Batch = dict[str, NDArray[Any]]
# Short and long, plain and not: what a graph is compared on where no text is given.
TEXTS = (
    "The film is a small miracle, and it knows it.",
    "No.",
    "Rain fell on the harbour all night; by morning the boats lay so low in the water that the men began to bail,"
    " and nobody spoke of going out before the wind had turned and the swell behind the mole was gone.",
    "What does the quarterly report say about the costs of transport between the two plants?",
    "Überraschend gut: ein naïver Anfang, ein kluger Schluß — 10 von 12 Punkten!",
    "def mean(values): return sum(values) / len(values)",
    "東京から京都まで、電車で二時間十五分かかります。",
    "She said that the second of the three answers was wrong, although she could not tell why it was wrong.",
)
BATCHES = (1, 3, 4)
LONGEST_TOKENS = 128
RANDOM_TOKENS = 24
IMAGES = 3
NEW_TOKENS = 8


def parity_batches(
    checkpoint: Path, opened: TaskModel, exports: Sequence[FloatExport], texts: Sequence[str] | None, source: str
) -> tuple[list[list[Batch]], str]:
    """For each graph the batches that it is compared on, of several sizes and lengths, and what they are."""
    first = exports[0]
    if opened.vocab_size == 0:
        return [image_batches(checkpoint, first.inputs)], f"{IMAGES} random images with the spectrum of photographs"
    names = [spec.name for spec in first.inputs]
    if (checkpoint / "tokenizer.json").is_file():
        given = [text for text in texts or () if text.strip()][: sum(BATCHES)]
        batches = text_batches(checkpoint, given or TEXTS, names, opened.max_tokens)
        said = f"{len(given)} texts of {source}" if given else f"{len(TEXTS)} texts of edgedistill's own"
    else:
        batches = random_batches(names, opened.vocab_size, opened.max_tokens)
        said = "random tokens, for the checkpoint has no tokenizer.json"
    if opened.task != "text2text":
        return [batches], said
    start = getattr(opened.model.config, "decoder_start_token_id", None) or 0
    return [batches, [b for batch in batches for b in decoder_batches(exports, batch, start)]], said


def text_batches(checkpoint: Path, texts: Sequence[str], names: Sequence[str], max_tokens: int) -> list[Batch]:
    """Texts in batches of several sizes, each padded to its longest, as the checkpoint's tokenizer pads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    if tokenizer.pad_token is None:
        raise UserError(f"{checkpoint}: its tokenizer has no padding token", "set pad_token in tokenizer_config.json")
    batches, rest = [], list(texts)
    for size in BATCHES:
        part, rest = rest[:size], rest[size:]
        if part:
            made = tokenizer(
                part, padding=True, truncation=True, max_length=min(max_tokens, LONGEST_TOKENS), return_tensors="np"
            )
            missing = set(names) - set(made)
            if missing:
                raise UserError(
                    f"{checkpoint}: its tokenizer does not give {', '.join(sorted(missing))}",
                    "save the tokenizer that the model was trained with into the folder",
                )
            batches.append({name: np.asarray(made[name], dtype=np.int64) for name in names})
    return batches


def random_batches(names: Sequence[str], vocab_size: int, max_tokens: int) -> list[Batch]:
    """Random tokens, padded: for a checkpoint without a tokenizer."""
    rng = np.random.default_rng(0)
    batches = []
    for size in BATCHES:
        length = int(min(max_tokens, RANDOM_TOKENS + size))
        mask_BT = np.ones((size, length), dtype=np.int64)
        for row in range(1, size):
            mask_BT[row, max(1, length - 3 * row) :] = 0
        offered = {
            "input_ids": rng.integers(0, vocab_size, (size, length)),
            "attention_mask": mask_BT,
            "token_type_ids": np.zeros((size, length), dtype=np.int64),
        }
        batches.append({name: offered[name] for name in names})
    return batches


def image_batches(checkpoint: Path, inputs: Sequence[TensorSpec]) -> list[Batch]:
    """Random images whose power falls with the square of the frequency, as photographs' does, then normalised.

    Source: D. J. Field, Relations between the statistics of natural images and the response properties of cortical
    cells, J. Opt. Soc. Am. A 4 (1987).
    """
    shape = [dim if isinstance(dim, int) else 1 for dim in inputs[0].shape]
    mean, std = _normalisation(checkpoint, shape[1])
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(shape[2]), np.fft.fftfreq(shape[3]), indexing="ij"))
    frequency[0, 0] = 1.0
    images = []
    for _ in range(IMAGES):
        noise = rng.standard_normal((shape[1], shape[2], shape[3]))
        image = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
        image = (image - image.min()) / (image.max() - image.min())
        images.append((image - mean) / std)
    stacked = np.stack(images).astype(np.float32)
    return [{inputs[0].name: stacked[:1]}, {inputs[0].name: stacked}]


def decoder_batches(exports: Sequence[FloatExport], source: Batch, start: int) -> list[Batch]:
    """Two steps of a sequence-to-sequence decoder on a batch: three tokens on an empty cache, one on a filled one."""
    encoder, decoder = exports
    encoded = encoder.reference(source)
    batch = len(source["input_ids"])
    empty = {
        spec.name: np.zeros([batch if d == "batch" else 0 if d == "past" else int(d) for d in spec.shape], np.float32)
        for spec in decoder.inputs
        if spec.name.startswith("past_")
    }
    fixed = {name: value for name, value in encoded.items() if name.startswith("cross_")}
    fixed["encoder_attention_mask"] = source["attention_mask"]
    tokens = np.concatenate([np.full((batch, 1), start), source["input_ids"][:, :2]], axis=1).astype(np.int64)
    one = {"input_ids": tokens, **fixed, **empty}
    after = _fed_back(decoder.reference(one))
    return [one, {"input_ids": tokens[:, -1:], **fixed, **after}]


def greedy_text2text(runs: Sequence[Any], specs: Sequence[TensorSpec], source: Batch, start: int) -> list[list[int]]:
    """The most likely tokens one after another for each row; `runs`: encoder and decoder as functions of arrays."""
    encode, decode = runs
    encoded = encode(source)
    batch = len(source["input_ids"])
    cache: Mapping[str, NDArray[Any]] = {
        spec.name: np.zeros([batch if d == "batch" else 0 if d == "past" else int(d) for d in spec.shape], np.float32)
        for spec in specs
        if spec.name.startswith("past_")
    }
    fixed = {name: value for name, value in encoded.items() if name.startswith("cross_")}
    fixed["encoder_attention_mask"] = source["attention_mask"]
    tokens = np.full((batch, 1), start, dtype=np.int64)
    found = []
    for _ in range(NEW_TOKENS):
        made = decode({"input_ids": tokens, **fixed, **cache})
        tokens = np.argmax(made["logits"][:, -1:], axis=-1).astype(np.int64)
        cache = _fed_back(made)
        found.append(tokens[:, 0])
    return [[int(token) for token in row] for row in np.stack(found, axis=1)]


def _fed_back(made: Mapping[str, NDArray[Any]]) -> Batch:
    return {name.replace("present_", "past_", 1): value for name, value in made.items() if name.startswith("present_")}


def _normalisation(checkpoint: Path, channels: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and deviation of the preprocessor, [C, 1, 1]; 0.5 each where there is none."""
    path = checkpoint / "preprocessor_config.json"
    config = read_json(path, what="preprocessor_config.json") if path.is_file() else {}
    mean, std = config.get("image_mean", 0.5), config.get("image_std", 0.5)
    shape = (channels, 1, 1)
    return (
        np.broadcast_to(np.asarray(mean, dtype=np.float64).reshape(-1, 1, 1), shape),
        np.broadcast_to(np.asarray(std, dtype=np.float64).reshape(-1, 1, 1), shape),
    )
