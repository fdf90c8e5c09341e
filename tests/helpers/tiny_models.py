"""Tiny random models for tests of runtimes: a transformers Llama with a byte-level tokenizer, as GGUF and as ONNX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("a", "n"), ("Ġ", "the")]
SPECIAL = ["<|bos|>", "<|eos|>"]


def tiny_vocabulary() -> dict[str, int]:
    """Two control tokens, the 256 byte tokens of byte-level BPE, and a few merges."""
    from tokenizers import pre_tokenizers

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    return {token: index for index, token in enumerate(tokens)}


def tiny_checkpoint(folder: Path, *, hidden: int = 256, seed: int = 0, tied: bool = False) -> Path:
    """A random Llama of two layers (grouped-query attention) and its tokenizer, as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = tiny_vocabulary()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    fast.save_pretrained(folder)
    return folder


def torch_logits(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    """[T, V] float32 of transformers: the reference."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.as_tensor(np.asarray(tokens)[None])).logits[0].numpy()


def tiny_gguf(checkpoint: Path, out: Path, *, half: bool = False) -> Path:
    """The checkpoint as GGUF, F32 or F16, tokenizer included: the slow and obvious way."""
    from safetensors.numpy import load_file
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary))
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in vocabulary])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for i in range(config.num_hidden_layers):
        for theirs, ours in {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items():
            names[f"model.layers.{i}.{theirs}"] = f"blk.{i}.{ours}"
    for theirs, ours in names.items():
        if f"{theirs}.weight" not in weights:
            continue
        array = weights[f"{theirs}.weight"].astype(np.float32)
        # llama.cpp rotates neighbouring pairs, transformers halves of a head.
        if ours.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if ours.endswith("attn_q") else config.num_key_value_heads
            rows, columns = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"{ours}.weight", array.astype(np.float16) if half and array.ndim > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def tiny_genai(checkpoint: Path, out: Path, *, precision: str) -> Path:
    """The checkpoint through the onnxruntime-genai builder, in a process of its own."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out)]
    done = subprocess.run(
        [*builder, "-p", precision, "-e", "cpu", "-c", str(out.parent / "cache")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out
