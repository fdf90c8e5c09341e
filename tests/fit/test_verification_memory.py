"""Peak memory of verification as predicted, against processes that verify."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, tiny_text

from edgedistill.config.recipe import Verify
from edgedistill.fit.verification_memory import verification_memory
from edgedistill.models.folder import open_model

# Peaks as Linux keeps them for each process (VmHWM): `ru_maxrss` would be at least that of pytest, which starts this.
RUN = """
import sys, threading, time
from pathlib import Path
from edgedistill.cli.app import main
from edgedistill.machine.facts import peak_rss_bytes

peaks = {}

def watch():
    while True:
        for children in Path("/proc/self/task").glob("*/children"):
            try:
                for child in children.read_text().split():
                    status = Path("/proc", child, "status").read_text()
                    if "VmHWM:" in status:
                        peaks[child] = int(status.split("VmHWM:")[1].split()[0]) * 1024
            except OSError:
                pass  # it has just ended
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
try:
    main()
finally:
    print("peak", peak_rss_bytes(), max(peaks.values(), default=0), file=sys.stderr)
"""


def checkpoint(folder: Path, *, tokens: int, **sizes: int) -> Path:
    """A random Llama whose byte-level BPE really has so many tokens: merges of any two bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: tokens - len(alphabet) - 1]
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=0, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def sizes(hidden: int, inner: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "mostly logits": {"tokens": 24_000, "teacher": sizes(128, 256, 2), "student": sizes(64, 128, 2)},
    "mostly weights": {"tokens": 1_000, "teacher": sizes(1024, 4096, 4), "student": sizes(1024, 2048, 4)},
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_predicted(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    teacher = checkpoint(tmp_path / "teacher", tokens=case["tokens"], **case["teacher"])
    student = checkpoint(tmp_path / "student", tokens=case["tokens"], **case["student"])
    (tmp_path / "text.txt").write_text(tiny_text(40))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEDISTILL_STORE": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RUN, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    exported = run(
        "export", "--student", str(student), "--format", "gguf", "--quantization", "F16", "--context-tokens", "256",
        "--out", "out", "--set", "export.compare_logits=false",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    done = run(
        "verify", "out", "--student", str(student), "--teacher", str(teacher), "--data", "text.txt",
        "--min-retention", "0", "--set", "verify.max_tokens=4096", "--json",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    own, child = map(int, done.stderr.split("peak ")[1].split()[:2])
    artifact = json.loads((tmp_path / "out" / "artifact.json").read_text())
    shapes = [open_model(str(folder)).shape for folder in (teacher, student)]
    predicted = verification_memory(*shapes, Verify(), artifact_bytes=artifact["bytes"]).value
    print(f"{name}: predicted {predicted / 1e6:,.0f} MB, measured {own / 1e6:,.0f} + {child / 1e6:,.0f} MB")
    # What it refuses must be too much indeed, and what it lets pass must fit.
    assert 0.8 <= predicted / (own + child) <= 1.35
