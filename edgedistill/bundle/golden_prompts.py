"""Which prompts become golden vectors: those where an app that damages its tokens gets other logits.

A prompt that gives the same answer without its BOS, or with a token lost or doubled, says nothing of the tokens
that an app feeds. So every candidate text is run damaged in each of these ways, the deviation of the last logits is
known for every length that it could be cut to, and it is cut where the least of them is largest.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgedistill.runtimes.process import RuntimeProcess

Encode = Callable[[str], list[int]]
PASSAGE = (
    "The quick brown fox jumps over the lazy dog, and once upon a time there was a little girl who asked: \"How many "
    "people live in a city of 1,234,567 houses if every house has 3.5 rooms?\" Nobody knew. In the morning she walked "
    "to the river, where the old man was mending his nets; he had seen the answer in a book, he said, but the book "
    "was lost when the bridge fell. So they went to look for it together, through the forest, over the hill and past "
    "the mill, until it was dark and the lamps of the town were lit. First they met a dog. Then they met a cat that "
    "could count, but only to ten. It is not far, said the cat, if you know the way; and if you do not know the way "
    "it is far enough. They thanked it and went on."
)  # fmt: skip
CODE = "def add(a, b):\n    return a + b  # naïve café, 你好 🙂\t\tend\n"
# The least and most tokens of each prompt: short ones tell of every token, long ones of positions.
SHORT, MIDDLE, LONG, WHOLE = (3, 14), (20, 64), (96, 192), (6, 48)
TRIES = 12


@dataclass(frozen=True)
class Prompt:
    """A text and its tokens; `damaged`: damage → the largest difference of a logit after it, absolute.

    `moved`: damage → the root mean square difference of all rows that both have, relative to the logits' spread.
    """

    text: str
    tokens: list[int]
    damaged: dict[str, float]
    moved: dict[str, float]


def candidates(held_out_texts: Sequence[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Texts, each with the least and most tokens that its prompt may have; held-out text is what the model is for."""
    texts = [text.strip() for text in held_out_texts if text.strip()]
    given = [*texts[:3], *(PASSAGE[150 * i :] for i in range(3 - len(texts[:3])))]
    yield PASSAGE, SHORT
    yield CODE, WHOLE
    yield max(given, key=len), LONG
    yield given[-1], MIDDLE
    yield given[0], SHORT


def chosen(
    runtime: RuntimeProcess, encode: Encode, plain: Encode, held_out_texts: Sequence[str], room: int
) -> list[Prompt]:
    """A prompt of each candidate that has tokens. `plain`: without special tokens; `room`: the most tokens."""
    found: list[Prompt] = []
    for text, (least, most) in candidates(held_out_texts):
        most = min(most, room)
        text, tokens = _fitted(text, encode, most)
        if len(tokens) < 2:
            continue
        prompt = _cut(runtime, encode, plain, text, tokens, min(least, len(tokens)))
        if prompt is not None and prompt.tokens not in [other.tokens for other in found]:
            found.append(prompt)
    return found


def _fitted(text: str, encode: Encode, most: int) -> tuple[str, list[int]]:
    """The text cut to about as many tokens as there is room for, and those."""
    tokens = encode(text)
    while len(tokens) > most:
        text = text[: max(1, min(len(text) - 1, len(text) * (most + 2) // len(tokens)))]
        tokens = encode(text)
        if len(text) == 1:
            break
    return text, tokens[:most]


def _cut(
    runtime: RuntimeProcess, encode: Encode, plain: Encode, text: str, tokens: list[int], least: int
) -> Prompt | None:
    """The text cut where damage shows most, among the lengths at which its tokens are a beginning of the whole's."""
    start = _specials(tokens, plain(text))
    healthy_TV = runtime.logits(tokens)
    deviations = {
        name: _deviations(runtime, damaged, healthy_TV, offset, begin)
        for name, (damaged, offset, begin) in _damages(tokens, start, least).items()
    }
    if not deviations:
        return None
    weakest_T = np.min([values_T for values_T, _ in deviations.values()], axis=0)
    ends = [end for end in np.argsort(-weakest_T, kind="stable") if end + 1 >= least and weakest_T[end] > 0]
    for end in ends[:TRIES]:
        part = _text_of(text, tokens[: end + 1], encode)
        if part:
            last = {name: float(values_T[end]) for name, (values_T, _) in deviations.items()}
            moved = {name: float(rms_T[end]) for name, (_, rms_T) in deviations.items()}
            return Prompt(part, tokens[: end + 1], last, moved)
    return None


def _specials(tokens: list[int], without: list[int]) -> int:
    """How many tokens stand before the text's own."""
    for count in range(min(3, len(tokens))):
        if tokens[count : count + len(without)] == without[: len(tokens) - count]:
            return count
    return 0


def _damages(tokens: list[int], start: int, least: int) -> dict[str, tuple[list[int], int, int]]:
    """Damage → the tokens that an app might feed, how many more they are, and the first row that is comparable."""
    place = min(max(start, least // 2), len(tokens) - 2)
    found = {
        "token_lost": ([*tokens[:place], *tokens[place + 1 :]], -1, place + 1),
        "token_doubled": ([*tokens[: place + 1], *tokens[place:]], 1, place),
    }
    if start and len(tokens) > start:
        found["no_bos"] = (tokens[start:], -start, start)
    return found


def _deviations(
    runtime: RuntimeProcess, damaged: list[int], healthy_TV: NDArray[np.float32], offset: int, begin: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[T] the largest difference of a logit after each token that both have, and the rms of all rows up to it.

    0 where there is nothing to compare.
    """
    found, apart, power = np.zeros((3, len(healthy_TV)))
    # One token more than the whole prompt may be one too many for the context: its last row is not needed.
    damaged_TV = runtime.logits(damaged[: len(healthy_TV)])
    for row in range(begin, min(len(healthy_TV), len(damaged_TV) - offset)):
        whole, other = healthy_TV[row].astype(np.float64), damaged_TV[row + offset].astype(np.float64)
        found[row] = np.abs(other - whole).max()
        apart[row] = ((other - other.mean() - whole + whole.mean()) ** 2).sum()
        power[row] = ((whole - whole.mean()) ** 2).sum()
    return found, np.sqrt(apart.cumsum() / np.maximum(power.cumsum(), 1e-30))


def _text_of(text: str, tokens: list[int], encode: Encode) -> str:
    """The beginning of `text` that gives exactly these tokens; "" where none does."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high) // 2
        if len(encode(text[:middle])) < len(tokens):
            low = middle + 1
        else:
            high = middle
    # A longer word may have fewer tokens than its beginning: look around.
    for length in range(max(1, low - 4), min(len(text), low + 12) + 1):
        if encode(text[:length]) == tokens:
            return text[:length]
    return ""
