"""Random tiny checkpoints with real tokenizers, as transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = [
    "once upon a time there was a little girl named lily . she loved to play outside .",
    "The quick brown fox jumps over the lazy dog, 12345 times; isn't it? def f(x): return x + 1",
    "naïve café Straße 你好世界 мир 🙂 \n\n\t  spaces   and\r\nlines",
] * 4


def byte_level_bpe(folder: Path, *, vocab_size: int = 400, pre: str = "gpt-2", special: Sequence[str] = ()) -> None:
    """A byte-level BPE tokenizer, trained on a few lines, into `folder`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    cut = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), byte_level]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), byte_level]),
    }[pre]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny(folder: Path, family: str = "llama", *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of `family` with a GPT-2-style tokenizer; `changes` go into its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family == "qwen2":
        del settings["head_dim"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **settings | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms of one and biases of zero would hide that they are dropped or swapped.
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + 0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_level_bpe(folder)
    return folder


def copy(source: Path, folder: Path) -> Path:
    """A writable copy of a checkpoint folder."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file; None removes a key."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key, None)
        else:
            value[key] = new
    path.write_text(json.dumps(value))


def torch_model(folder: Path) -> Any:
    """The checkpoint in torch, float32, one thread: these models are too small to share."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model: Any, tokens_T: NDArray[Any]) -> NDArray[np.float32]:
    """[T, V] logits of one sequence."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(np.asarray(tokens_T, dtype=np.int64)[None])).logits[0]
    return np.asarray(logits.float().numpy())


def torch_greedy(model: Any, tokens: list[int], new_tokens: int) -> list[int]:
    """Argmax continuation, no stop at the end-of-sequence token."""
    import torch

    ids = list(tokens)
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(tokens) :]


def with_weights(folder: Path, weights: dict[str, NDArray[np.float32]]) -> Any:
    """The checkpoint's torch model with these weights in it; untied where a head of its own is given."""
    import torch

    model = torch_model(folder)
    if model.config.tie_word_embeddings and "lm_head.weight" in weights:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    state = {name: torch.from_numpy(np.array(values)) for name, values in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected, (missing, unexpected)
    return model


def mean_nll(logits_TV: NDArray[np.float32], tokens_T: NDArray[Any]) -> float:
    """Mean negative log likelihood (nats) of each token after the first, in float64."""
    rows = logits_TV[:-1].astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    log_p = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return float(-log_p[np.arange(len(tokens_T) - 1), np.asarray(tokens_T)[1:]].mean())
