"""The training text as a model sees it: encoded, packed, with windows to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgedistill.config.recipe import Training
from edgedistill.data.prepare import read_part
from edgedistill.records.data import DataResult
from edgedistill.store import Stored
from edgedistill.tasks.causal_lm import Packed, TextTokenizer, Window, encode_blocks, pack, scoring_windows


@dataclass(frozen=True)
class Text:
    """The training text as the student sees it: tokenizer, packed sequences, and windows to evaluate on."""

    tokenizer: TextTokenizer
    packed: Packed
    evaluation: list[Window]


def training_text(folder: Path, data: Stored[DataResult], settings: Training, *, seed: int, share: float = 1.0) -> Text:
    """Encode and pack the training part with the tokenizer of `folder`; windows of the calibration part."""
    tokenizer = TextTokenizer.load(folder)
    blocks = transfer_part(read_part(data.directory, "train"), share)
    texts = [text for block in blocks for text in block]
    packed = pack(
        tokenizer.encode(texts), context=settings.context_tokens, seed=seed, eos=tokenizer.eos, bos=tokenizer.bos
    )
    evaluation = scoring_windows(
        encode_blocks(tokenizer, read_part(data.directory, "calibration")),
        context=settings.context_tokens,
        stride=None,
        max_tokens=None,
    )
    return Text(tokenizer, packed, evaluation)


def transfer_part(texts: list[list[str]], share: float) -> list[list[str]]:
    """The training blocks that the student learns from: evenly spread, `share` of them, at least one."""
    if share >= 1.0:
        return texts
    count = max(1, round(share * len(texts)))
    return [texts[int(i * len(texts) / count)] for i in range(count)]
