"""A small random model of each family with a GGUF converter, with what is odd about the real ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import byte_level_bpe
from numpy.typing import NDArray

COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 48}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.9, 2.2],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 5.0, 6.0],
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
NOPE: dict[str, Any] = {"num_hidden_layers": 5}
# case → (model_type, what differs from COMMON)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "mistral, wide heads": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "num_hidden_layers": 3}),
    "gemma2, small caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    "gemma3, other layers slide": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3, both ropes": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "gemma3, a head of its own": ("gemma3_text", {**GEMMA, "tie_word_embeddings": False}),
    "phi3": ("phi3", {}),
    "phi3, part rotates, tied": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.015625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite, biases, tied": (
        "granite",
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 1.5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, yarn": ("olmo2", {"rope_parameters": YARN}),
    "smollm3, layers without rope": ("smollm3", NOPE),
    "smollm3, yarn": ("smollm3", {**NOPE, "rope_parameters": YARN, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt2, inner width, head of its own": ("gpt2", {"n_inner": 80, "tie_word_embeddings": False}),
    "stablelm": ("stablelm", {}),
    "stablelm, biases, linear": (
        "stablelm",
        {"use_qkv_bias": True, "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
    ),
    "stablelm, normed heads, parallel": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "nomic-bert": ("nomic_bert", {}),
}


def family(folder: Path, model_type: str, changes: dict[str, Any], *, seed: int = 0) -> Path:
    """The random checkpoint with a byte-level tokenizer: llama.cpp takes token ids, whatever cut the text."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = COMMON | changes
    if model_type in ("gpt2", "bert", "nomic_bert"):
        settings.pop("num_key_value_heads")
    if model_type == "gpt2":
        settings.pop("intermediate_size")
    config = AutoConfig.for_model(model_type, **settings)
    kind = AutoModel if model_type in ("bert", "nomic_bert") else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms of one and biases of zero would hide that they are dropped or swapped.
            if parameter.ndim == 1:
                around = 0.0 if name.endswith("bias") or model_type.startswith("gemma") else 1.0
                parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_level_bpe(folder)
    return folder


def edit_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in config.json; None removes a key."""
    import json

    shutil.copytree(folder, target)
    path = target / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return target


def embedding(folder: Path, tokens_T: NDArray[Any], pooling: str) -> NDArray[np.float32]:
    """[H] of transformers, float32: the mean of the token vectors, or the first one."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states_TH = model(input_ids=torch.from_numpy(np.asarray(tokens_T, dtype=np.int64)[None])).last_hidden_state[0]
    return np.asarray((states_TH.mean(0) if pooling == "mean" else states_TH[0]).numpy())


# model_type → what its teacher has beside COMMON: what is odd about the real ones, and layers enough to cut
TEACHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {**GEMMA, "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "granite": {
        "embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "olmo2": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True},
    "gpt2": {"n_inner": 96},
}  # fmt: skip


def teacher(folder: Path, model_type: str, *, steps: int = 80, **changes: Any) -> Path:
    """A model of a family that learnt `tiny_text` beyond counts of its words."""
    import torch
    from command import tiny_text
    from gate_models import learn
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**COMMON, "initializer_range": 0.05, **TEACHERS[model_type], **changes}
    if model_type == "gpt2":
        settings = {k: v for k, v in settings.items() if k not in ("num_key_value_heads", "intermediate_size")}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    byte_level_bpe(folder)
    learn(model, folder, tiny_text(80, seed=1).split("\n\n"), steps=steps)
    model.save_pretrained(folder)
    return folder
