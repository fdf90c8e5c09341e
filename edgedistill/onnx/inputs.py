"""Real inputs for a graph: texts through the checkpoint's own tokenizer, images with the statistics of photographs.

B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.machine import facts
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.model_inputs import MASK
from edgedistill.onnx.processors import SIZES, open_image_processor, pixels, tokenized
from edgedistill.onnx.tasks import TaskModel
from edgedistill.records.artifact import TensorSpec

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
# Lengths beyond this are compared, and promised, where --context-tokens asks for them.
LONGEST_COMPARED = 8192
SHORTEST = 4  # room for one token between what a tokenizer puts around it
# Of a layer's scores, and of what is compared: torch's, the runtime's, and both as float64.
COPIES = 6
PAIRED = ("text-classification", "question-answering")
RANDOM_TOKENS = 24
IMAGES = 3
NEW_TOKENS = 8


@dataclass(frozen=True)
class Compared:
    """What a graph is held to torch on: batches of usual sizes, and single inputs from the shortest to the longest."""

    batches: list[Batch]
    lengths: list[Batch] = field(default_factory=list)


def parity_batches(
    folder: Path, opened: TaskModel, exports: Sequence[FloatExport], texts: Sequence[str] | None, source: str,
    *, tokenizer: Any | None, longest: int,
) -> tuple[list[Compared], str]:  # fmt: skip
    """For each graph what it is compared on, of several sizes and lengths up to `longest` tokens, and what that is.

    `folder`, `tokenizer`: those that ship.
    """
    first = exports[0]
    names = [spec.name for spec in first.inputs]
    if not opened.reads_text:
        batches = image_batches(folder, first.inputs)
        return [Compared(batches)], f"{IMAGES} random images with the spectrum of photographs"
    usual = min(longest, LONGEST_TOKENS)

    def takes(batch: Batch) -> bool:
        try:
            first.reference(batch)
        except Exception:  # a model that pools or halves its text raises whatever it meets where nothing is left
            return False
        return True

    if tokenizer is not None:
        given = [text for text in texts or () if text.strip()][: sum(BATCHES)]
        batches = text_batches(folder, tokenizer, given or TEXTS, names, usual)
        said = f"{len(given)} texts of {source}" if given else f"{len(TEXTS)} texts of edgedistill's own"
        if opened.task in PAIRED:
            pairs = list(zip(TEXTS[:2], TEXTS[2:4], strict=True))
            batches.append(tokenized(tokenizer, pairs, names, max_tokens=usual, where=folder))
            said += f", {len(pairs)} pairs"
        lengths = length_batches(folder, tokenizer, given or TEXTS, names, longest, takes=takes)
    else:
        batches = random_batches(names, opened.vocab_size, usual)
        rows = opened.vocab_size
        shortest = next(n for n in range(1, longest + 1) if n == longest or takes(random_batch(names, rows, n)))
        tokens = sorted({shortest, max(shortest, longest // 2), longest})
        lengths = [random_batch(names, rows, length) for length in tokens]
        said = "random tokens, for no tokenizer could be opened from the checkpoint"
    said += f", and of {', '.join(f'{len(batch[names[0]][0]):,}' for batch in lengths)} tokens"
    if opened.task != "text2text":
        return [Compared(batches, lengths)], said
    start = getattr(opened.model.config, "decoder_start_token_id", None) or 0
    usual_steps = [made for batch in batches for made in decoder_batches(exports, batch, start, tokens=3)]
    steps = [
        made
        for batch in lengths
        for made in decoder_batches(exports, batch, start, tokens=max(1, batch[names[0]].shape[1] - 1))
    ]
    return [Compared(batches, lengths), Compared(usual_steps, steps)], said


def text_batches(
    folder: Path, tokenizer: Any, texts: Sequence[str], names: Sequence[str], max_tokens: int
) -> list[Batch]:
    """Texts in batches of several sizes, each padded to its longest, as the tokenizer pads."""
    batches, rest = [], list(texts)
    for size in BATCHES:
        part, rest = rest[:size], rest[size:]
        if part:
            batches.append(tokenized(tokenizer, part, names, max_tokens=max_tokens, where=folder))
    return batches


def length_batches(
    folder: Path, tokenizer: Any, texts: Sequence[str], names: Sequence[str], longest: int,
    *, takes: Callable[[Batch], bool] = lambda _batch: True,
) -> list[Batch]:  # fmt: skip
    """One input each: the shortest that the model `takes`, one of half of `longest` tokens, one of `longest`."""
    found = [_shortest(folder, tokenizer, names, longest, takes)]
    for length in sorted({max(1, longest // 2), longest} - {1}):
        text, tokens = " ".join(texts), 0
        while tokens < length:
            before, tokens = tokens, len(tokenizer(text)["input_ids"])
            text = f"{text} {text}"
            if tokens <= before:  # whatever it reads, it gives no more
                break
        found.append(tokenized(tokenizer, [text], names, max_tokens=max(length, SHORTEST), where=folder))
    return found


def _shortest(
    folder: Path, tokenizer: Any, names: Sequence[str], longest: int, takes: Callable[[Batch], bool]
) -> Batch:
    """Of one word, or of as many as the model needs: CANINE and Funnel halve their texts and take none of one token."""
    words, before = 1, 0
    while True:
        text = " ".join(["a"] * words)
        made = tokenized(tokenizer, [text], names, max_tokens=max(SHORTEST, longest if words > 1 else 0), where=folder)
        tokens = made[names[0]].shape[1]
        if takes(made) or tokens <= before or tokens >= longest:
            return made
        words, before = words + 1, tokens


def longest_compared(opened: TaskModel, context_tokens: int | None) -> tuple[int, list[str]]:
    """How many tokens a graph is compared on at most, and so is promised for; a note where that is less than asked.

    Bound by what is free of the memory that attention's scores [heads, T, T] and an output [T, vocabulary] take.
    """
    asked = min(context_tokens or opened.max_tokens, opened.max_tokens)
    longest = asked if context_tokens else min(asked, LONGEST_COMPARED)
    config = opened.model.config
    heads = int(getattr(config, "num_attention_heads", 0) or 12)
    wide = opened.vocab_size if opened.task in ("fill-mask", "text2text") else 0
    free = facts.available_bytes()

    def needed(tokens: int) -> int:
        return COPIES * 4 * tokens * (heads * tokens + wide)

    while free is not None and longest > LONGEST_TOKENS and needed(longest) > free // 2:
        longest = max(LONGEST_TOKENS, longest // 2)
    if longest == asked:
        return longest, []
    remedy = "" if context_tokens else "; --context-tokens asks for more"
    return longest, [
        f"the model takes {asked:,} tokens, and the graph was compared with it on up to {longest:,}: it is promised for"
        f" those{remedy}"
    ]


def random_batches(names: Sequence[str], vocab_size: int, max_tokens: int) -> list[Batch]:
    """Random tokens, padded: for a checkpoint without a tokenizer."""
    batches = []
    for size in BATCHES:
        length = int(min(max_tokens, RANDOM_TOKENS + size))
        made = random_batch(names, vocab_size, length, rows=size)
        for row in range(1, size if MASK in made else 0):
            made[MASK][row, max(1, length - 3 * row) :] = 0
        batches.append(made)
    return batches


def random_batch(names: Sequence[str], vocab_size: int, length: int, *, rows: int = 1) -> Batch:
    """Random tokens, none of them padding, all of one type."""
    ids_BT = np.random.default_rng(length).integers(0, vocab_size, (rows, length))
    ones = np.ones((rows, length), dtype=np.int64)
    return {name: ids_BT if name == "input_ids" else ones.copy() if name == MASK else 0 * ones for name in names}


def image_batches(folder: Path, inputs: Sequence[TensorSpec]) -> list[Batch]:
    """Random images whose power falls with the square of the frequency, as photographs' does, through the processor.

    In a folder without one, scaled to [-1, 1] as most do. Source: D. J. Field, Relations between the statistics of
    natural images and the response properties of cortical cells, J. Opt. Soc. Am. A 4 (1987).
    """
    name, shape = inputs[0].name, inputs[0].shape
    rng = np.random.default_rng(0)
    processor = open_image_processor(folder)
    if processor is None:
        sizes = [dim if isinstance(dim, int) else 1 for dim in shape]
        made = np.stack([_photograph(rng, sizes[1], sizes[2], sizes[3]) for _ in range(IMAGES)]).astype(np.float32)
        made = 2 * made - 1
        return [{name: made[:1]}, {name: made}]
    batches = []
    channels = 1 if shape[1] == 1 else 3
    for width, height in SIZES if any(isinstance(dim, str) for dim in shape[2:]) else SIZES[:1]:
        images = [
            (_photograph(rng, channels, height, width) * 255).astype(np.uint8).transpose(1, 2, 0) for _ in range(IMAGES)
        ]
        for part in (images[:1], images):
            batches.append({name: pixels(processor, part, folder)[name].astype(np.float32)})
    return batches


def _photograph(rng: np.random.Generator, channels: int, height: int, width: int) -> NDArray[np.float64]:
    """[C, H, W] between 0 and 1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
    frequency[0, 0] = 1.0
    image = np.fft.ifft2(np.fft.fft2(rng.standard_normal((channels, height, width))) / frequency).real
    scaled: NDArray[np.float64] = (image - image.min()) / (image.max() - image.min())
    return scaled


def decoder_batches(exports: Sequence[FloatExport], source: Batch, start: int, *, tokens: int) -> list[Batch]:
    """Two steps of a sequence-to-sequence decoder on a batch: `tokens` on an empty cache, one on a filled one."""
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
    given_BS = source["input_ids"]
    own = np.tile(given_BS, (1, -(-tokens // given_BS.shape[1])))[:, : tokens - 1]
    ids_BT = np.concatenate([np.full((batch, 1), start), own], axis=1).astype(np.int64)
    one = {"input_ids": ids_BT, **fixed, **empty}
    after = _fed_back(decoder.reference(one))
    return [one, {"input_ids": ids_BT[:, -1:], **fixed, **after}]


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
