"""An artifact in its runtime against the torch model, before anything says success.

Two questions, both answered by an error that names the tensor: are the stored weights those of the checkpoint, up to
the rounding of their type; and does the runtime compute with them what torch does (see gguf_layers.py)?

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.records.artifact import Parity
from edgedistill.tasks.causal_lm import TextTokenizer

TEXTS = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her dog.",
    "The city council met on Tuesday to discuss the new bridge, which will cost 12.5 million and open in 2031.",
    "def area(width: float, height: float) -> float:\n    return width * height  # square metres\n",
    "Water boils at 100 degrees at sea level; on a mountain it boils earlier, because the pressure is lower there.",
)
TOKENS = 64  # of each text
GREEDY_PROMPT = 8
GREEDY_TOKENS = 16
SAFE_MARGIN = 3.0  # times the largest difference of any logit: twice would do for one that moves up and one down
# A stored weight matrix w of the original o, fitted as w = s o: rounding leaves s near 1, a wrong scale does not.
SLOPE_LIMIT = 0.05
# What is left of it, relative: a wrong order of rows leaves about 1.4. Two bits a weight and less leave up to 0.5.
WEIGHT_LIMIT = 0.6
FLOAT_WEIGHT_LIMIT = 0.01
INVALID = "the artifact would not compute what the model does: report this with the model's config.json"


def real_inputs(
    checkpoint: Path, calibration: Sequence[Sequence[str]] | None, *, context_tokens: int
) -> tuple[str, list[NDArray[np.int64]]]:
    """What they are, and token ids [T] each: of the calibration text where there is one, else of texts shipped here.

    Raises UserError where the tokenizer gives fewer than two tokens, or one that the embedding lacks.
    """
    tokenizer = TextTokenizer.load(checkpoint)
    given = ["\n".join(block) for block in (calibration or ())[: len(TEXTS)]]
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    sequences = []
    for text in given or TEXTS:
        # A few characters a token: the whole of a long document is not tokenized for its beginning.
        ids = bos + list(tokenizer.backend.encode(text[: 64 * TOKENS], add_special_tokens=False).ids)
        sequences.append(np.array(ids[: min(TOKENS, context_tokens)], dtype=np.int64))
    kept = [ids for ids in sequences if len(ids) > 1]
    if not kept:
        raise UserError("the tokenizer gives no tokens of the parity texts", "correct tokenizer.json")
    return ("calibration text" if given else "texts of the package"), kept


def weight_difference(values: NDArray[np.float32], original: NDArray[np.float32], *, exact: bool) -> str:
    """How a stored weight departs from the original by more than rounding, in words; "" where it does not."""
    slope, rest = _fit(values, original)
    if abs(slope - 1) <= SLOPE_LIMIT and rest <= (FLOAT_WEIGHT_LIMIT if exact else WEIGHT_LIMIT):
        return ""
    return f"{slope:.3f} times as large, and {rest:.3g} of its size beside that"


def _fit(values: NDArray[np.float32], original: NDArray[np.float32]) -> tuple[float, float]:
    """The least-squares s of values = s · original, and the size of values - s · original over that of original."""
    x, y = original.reshape(-1), values.reshape(-1)
    squares = float(np.dot(x, x))
    if squares == 0:
        return 1.0, float(np.abs(y).max(initial=0.0))
    slope = float(np.dot(x, y)) / squares
    rest = y - np.float32(slope) * x
    return slope, float(np.sqrt(np.dot(rest, rest) / squares))


@torch.no_grad()
def torch_logits(model: Any, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
    """[T, V] float32."""
    logits = model(input_ids=torch.from_numpy(ids_T)[None].to(model.device), use_cache=False).logits[0]
    return np.asarray(logits.float().cpu().numpy())


def torch_greedy(model: Any, ids_T: NDArray[np.int64], new_tokens: int) -> tuple[list[int], list[float]]:
    """The argmax continuation and the margin of each token's logit over the next best; end tokens do not stop it."""
    ids, margins = [int(i) for i in ids_T], []
    for _ in range(new_tokens):
        row = torch_logits(model, np.array(ids))[-1]
        second, best = np.partition(row, len(row) - 2)[-2:]
        margins.append(float(best - second))
        ids.append(int(row.argmax()))
    return ids[len(ids_T) :], margins


def compare_greedy(
    model: Any,
    prompt_T: NDArray[np.int64],
    new_tokens: int,
    greedy: Callable[[NDArray[np.int64], int], list[int]],
    *,
    margin: float,
) -> int:
    """How many of torch's greedy tokens have a margin above `margin`; the runtime has the same in their place.

    At a token with a smaller one, a coin's toss, the runtime goes on from torch's. Raises UserError where it decodes
    another token than torch at a larger margin.
    """
    wanted, margins = torch_greedy(model, prompt_T, new_tokens)
    compared = done = 0
    while done < new_tokens:
        prompt = np.concatenate([prompt_T, np.array(wanted[:done], dtype=np.int64)])
        for token in greedy(prompt, new_tokens - done):
            decisive, same = margins[done] > margin, token == wanted[done]
            done += 1
            compared += decisive
            if decisive and not same:
                raise UserError(
                    f"the runtime's greedy token {done} is {token}, torch's {wanted[done - 1]} by a margin of"
                    f" {margins[done - 1]:.3g}, where no logit of a prompt differs by more than"
                    f" {margin / SAFE_MARGIN:.3g}",
                    INVALID,
                )
            if not same:
                break
    return compared


class Differences:
    """Sums of found - expected over blocks of one output, so that no logits are kept."""

    def __init__(self) -> None:
        self.values = 0
        self.largest = 0.0
        self.absolute = 0.0
        self.squares = 0.0
        self.reference_squares = 0.0

    def add(self, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Both [..., V]. The reference counts about the mean of its row: a constant there changes no probability.

        A value that is no number counts as an infinite difference.
        """
        difference = np.nan_to_num(found.astype(np.float64) - expected, nan=np.inf, posinf=np.inf, neginf=-np.inf)
        centred = expected - expected.mean(axis=-1, keepdims=True, dtype=np.float64)
        self.values += difference.size
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.absolute += float(np.abs(difference).sum())
        self.squares += float(np.square(difference).sum())
        self.reference_squares += float(np.square(centred).sum())

    @property
    def relative_rms(self) -> float:
        if self.reference_squares == 0:
            return 0.0 if self.squares == 0 else float("inf")
        return float(np.sqrt(self.squares / self.reference_squares))


def measure(
    model: Any,
    sequences: Sequence[NDArray[np.int64]],
    *,
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    greedy: Callable[[NDArray[np.int64], int], list[int]] | None,
    runtime: str,
    inputs: str,
    reference: Any,
    limit: float,
    context_tokens: int,
    expected_of: Callable[[Any, NDArray[np.int64]], NDArray[np.float32]] | None = None,
) -> Parity:
    """The figures; whether `relative_rms` is within `limit` is for the caller to act on.

    `logits` and `greedy` are the runtime's. Rows beyond the shorter vocabulary (padding) are not compared.
    `expected_of`: torch's output where it is not logits. Raises UserError where the runtime's greedy text differs at a
    token whose margin no rounding turns: it decodes otherwise than it reads a prompt.
    """
    differences = Differences()
    for ids in sequences:
        expected, found = (expected_of or torch_logits)(model, ids), logits(ids)
        shared = min(expected.shape[1], found.shape[1])
        differences.add(found[:, :shared], expected[:, :shared])
    asked = compared = None
    if greedy is not None:
        prompt = sequences[0][:GREEDY_PROMPT]
        asked = max(0, min(GREEDY_TOKENS, context_tokens - len(prompt)))
        compared = compare_greedy(model, prompt, asked, greedy, margin=SAFE_MARGIN * differences.largest)
    return Parity(
        runtime=runtime,
        inputs=f"{len(sequences)} sequences, {sum(map(len, sequences))} tokens: {inputs}",
        reference=reference,
        values=differences.values,
        max_abs_difference=differences.largest,
        mean_abs_difference=differences.absolute / max(1, differences.values),
        relative_rms=differences.relative_rms,
        limit=limit,
        greedy_tokens=asked,
        greedy_compared=compared,
        greedy_tokens_equal=compared,
    )
