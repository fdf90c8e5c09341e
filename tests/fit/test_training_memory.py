"""Peak memory of training as predicted, against processes that train and torch's own account of what it keeps."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from memory_script import case_of, measure, model_of, predicted

from edgedistill.config.recipe import Distill, Lora
from edgedistill.fit.training_counts import adapter_parameters, chunk_rows, kept_bytes, matrix_parameters
from edgedistill.fit.training_memory import Teaching, predict
from edgedistill.losses.losses import Head, TeacherHead, _chunk_rows, _teacher_heads
from edgedistill.losses.model_parts import final_hidden
from edgedistill.records.shape import Shape


def shape(vocab, hidden, inner, layers, heads, kv_heads, *, tied=True, family="llama") -> Shape:
    return Shape(
        family=family, vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64, tie_word_embeddings=tied,
        attention_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip


SMALL = shape(2048, 256, 768, 5, 4, 2)  # 4.5M parameters
SMALL_TEACHER = shape(2048, 512, 1536, 6, 8, 4)  # 20M
MIDDLE = shape(8192, 384, 1024, 6, 6, 2)  # 13M
WIDE = shape(32000, 256, 768, 5, 4, 2)  # 12M, most of it the embedding
WIDE_TEACHER = shape(32000, 512, 1536, 4, 8, 4)  # 29M
UNTIED = shape(32000, 384, 1024, 6, 6, 2, tied=False, family="qwen3")  # 35M
# Some of each kind; benchmarks/training_memory.py has more, and larger ones.
SETUPS = {
    "fp32, live teacher": case_of(SMALL, SMALL_TEACHER, signals="live", context_tokens=256),
    "bf16, muon, activation checkpointing": case_of(
        SMALL, precision="bf16", optimizer="muon", context_tokens=256, activation_checkpointing=True
    ),
    "bf16, sampled cache, accumulated": case_of(
        MIDDLE, shape(8192, 512, 1536, 4, 8, 4), signals="cached", precision="bf16", micro_batch_sequences=2,
    ),
    "32k tokens, tied, live, accumulated": case_of(
        WIDE, WIDE_TEACHER, signals="live", batch_sequences=2, micro_batch_sequences=1
    ),
    "adapters": case_of(MIDDLE, lora={"rank": 8}, context_tokens=256),
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark of memory is Linux's")
def test_the_peak_is_predicted_within_15_percent() -> None:
    with ThreadPoolExecutor(2) as pool:
        measured = dict(zip(SETUPS, pool.map(measure, SETUPS.values()), strict=True))
    ratios = {name: predicted(case).bytes / measured[name]["peak_bytes"] for name, case in SETUPS.items()}
    print("\n".join(f"{ratio:.3f} {measured[name]['peak_bytes']:,} {name}" for name, ratio in ratios.items()))
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def saved_bytes(asked: Shape, *, sequences: int, context: int, low: bool, documents: bool) -> int:
    """Bytes that autograd keeps between forward and backward pass of the body, weights left out."""
    model = model_of(asked, 0).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(0, asked.vocab_size, (sequences, context))
    positions = (torch.arange(context) % (context // 3)).expand(sequences, context).contiguous() if documents else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        final_hidden(model, ids, low, positions)
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_what_a_layer_keeps_is_what_autograd_keeps(family: str, kv_heads: int, low: bool, documents: bool) -> None:
    sequences, context = 2, 96
    one, three = (shape(256, 192, 640, layers, 8, kv_heads, family=family) for layers in (1, 3))
    sizes = [
        saved_bytes(each, sequences=sequences, context=context, low=low, documents=documents) for each in (one, three)
    ]
    layer = (sizes[1] - sizes[0]) / 2 - (2 * matrix_parameters(one) if low else 0)
    expected = kept_bytes(one, context=context, low=low, documents=documents) * sequences * context
    assert layer == pytest.approx(expected, rel=1e-3)


def test_counts_are_those_of_the_models() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = model_of(UNTIED, 0)
    layers = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name)
    assert matrix_parameters(UNTIED) == layers
    for targets in ([], ["q_proj", "down_proj"]):
        names = targets or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = inject_adapter_in_model(LoraConfig(r=4, target_modules=names), model_of(SMALL, 0))
        count = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        assert adapter_parameters(SMALL, Lora(rank=4, targets=targets)) == count


@pytest.mark.parametrize("vocab", [64, 2048, 40_000])
@pytest.mark.parametrize("tokens", [100, 4096, 33_000])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_chunks_are_those_of_the_loss(vocab: int, tokens: int, with_teacher: bool, low: bool) -> None:
    hidden = torch.empty(tokens, 2, device="meta")
    head = Head(torch.empty(vocab, 2, device="meta"))
    compute = torch.bfloat16 if low else torch.float32
    teachers = _teacher_heads(TeacherHead(hidden, head) if with_teacher else None, vocab, compute)
    rows = _chunk_rows(torch.empty(tokens, 2), vocab, teachers, compute, None)
    assert chunk_rows(tokens, vocab, teachers=int(with_teacher), low=low, device="cpu") == min(tokens, rows)


def test_settings_that_save_memory_do() -> None:
    base = Distill(batch_sequences=16, context_tokens=512)
    live = Teaching(SMALL_TEACHER, signals="live")

    def needs(teaching: Teaching | None = live, lora: Lora | None = None, device: str = "cpu", **changes) -> int:
        return predict(SMALL, base.model_copy(update=changes), teaching, lora=lora, device=device).bytes

    whole = needs()
    assert needs(micro_batch_sequences=1) < needs(micro_batch_sequences=8) < whole
    assert needs(activation_checkpointing=True) < whole
    assert needs(optimizer="adamw8bit") < needs(optimizer="muon") < whole
    assert needs(Teaching(SMALL_TEACHER, signals="live", precision="nf4")) < whole
    assert needs(None) <= needs(Teaching(SMALL_TEACHER, signals="cached")) < whole
    assert needs(lora=Lora(rank=8), micro_batch_sequences=1) < needs(micro_batch_sequences=1)
    found = predict(SMALL, base, live)
    assert sum(found.components.values()) == found.bytes == found.moments[found.moment] == max(found.moments.values())
    assert all(name in found.text for name in found.components)


def test_nothing_heavy_is_imported() -> None:
    import subprocess

    script = "import sys, edgedistill.fit.training; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
