"""A small model, text and settings that the training tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgedistill.config.recipe import Training
from edgedistill.losses.losses import LossSpec
from edgedistill.tasks.causal_lm import Packed, pack, scoring_windows
from edgedistill.training.trainer import train

VOCAB = 64
CE = LossSpec({"cross_entropy": 1.0}, temperature=1.0, vocab=VOCAB)
KL = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=VOCAB)


def model(seed: int = 0, hidden: int = 32, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
            attention_dropout=dropout,
        )
    )  # fmt: skip


def documents(count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.cumsum(rng.integers(0, 3, size=60)).astype(np.int32) % VOCAB for _ in range(count)]


def packed() -> Packed:
    return pack(documents(), context=16, seed=1, eos=None, bos=None)


def settings(**changes) -> Training:
    base = {"tokens": 16 * 4 * 12, "context_tokens": 16, "batch_sequences": 4, "optimizer": "muon", "precision": "fp32"}
    return Training(**{**base, **changes})


def run(student, state: Path, loss=CE, signals=None, logs=None, taid=(1.0, 1.0), ranks=None, data=None, **changes):
    windows = scoring_windows(documents(4), context=16, stride=None, max_tokens=None)
    return train(
        student,
        data=packed() if data is None else data,
        evaluation=windows,
        settings=settings(**changes),
        loss=loss,
        signals=signals,
        state=state,
        logs=logs,
        taid=taid,
        ranks=ranks,
    )


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
