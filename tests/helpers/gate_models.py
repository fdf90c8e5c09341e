"""A tiny model that knows its text, trained in seconds, and what can be done to one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import byte_level_bpe
from command import tiny_text

CONTEXT = 64


def trained(folder: Path, *, seed: int = 0, steps: int = 110, family: str = "llama", **changes: Any) -> Path:
    """A checkpoint of two layers that learnt `tiny_text` far beyond counts of its words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if family == "qwen2":
        del settings["head_dim"]
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | changes), dtype=torch.float32)
    byte_level_bpe(folder)
    model.save_pretrained(folder)
    learn(model, folder, tiny_text(80, seed=1).split("\n\n"), seed=seed, steps=steps)
    model.save_pretrained(folder)
    return folder


def learn(model: Any, folder: Path, texts: list[str], *, seed: int = 0, steps: int = 110) -> None:
    """Teach a model the texts, in the tokens of the folder's tokenizer."""
    import torch

    from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks

    stream = np.concatenate(encode_blocks(TextTokenizer.load(folder), [[text] for text in texts])).astype(np.int64)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(stream) - CONTEXT - 1, 8)
        ids_ST = torch.from_numpy(np.stack([stream[s : s + CONTEXT + 1] for s in starts]))
        logits_STV = model(input_ids=ids_ST[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_STV.flatten(0, 1), ids_ST[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def changed(folder: Path, source: Path, change: Callable[[str, Any], Any]) -> Path:
    """A copy of a checkpoint with every tensor as `change(name, tensor)` gives it."""
    from checkpoints import copy
    from safetensors.torch import load_file, save_file

    copy(source, folder)
    weights = load_file(source / "model.safetensors")
    kept = {name: change(name, tensor).contiguous() for name, tensor in weights.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def noisy(share: float) -> Callable[[str, Any], Any]:
    """Noise of `share` of each tensor's spread."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def change(name: str, tensor: Any) -> Any:
        spread = tensor.std() if tensor.numel() > 1 else tensor.abs()
        return tensor + share * spread * torch.randn(tensor.shape, generator=generator)

    return change


def resealed(folder: Path) -> Path:
    """`artifact.json` made to fit what lies in the folder, as a liar would."""
    import json

    from edgedistill.store import combined_sha256, file_entries

    path = folder / "artifact.json"
    record = json.loads(path.read_text())
    names = {entry["path"] for entry in record["files"]}
    files = [entry for entry in file_entries(folder) if entry.path in names]
    record["files"] = [entry.model_dump() for entry in files]
    record["bytes"], record["sha256"] = sum(entry.bytes for entry in files), combined_sha256(files)
    path.write_text(json.dumps(record))
    return folder
