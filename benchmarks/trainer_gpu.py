"""Distilling a Llama-shaped 1.5B teacher into 0.4B on one GPU: tokens/s, model FLOPs utilisation, peak memory.

Random weights and random tokens: speed does not depend on them. Teacher live with bf16 weights, student fp32 under bf16 autocast,
forward KL at T = 1, fused AdamW, no activation checkpointing. Tokens/s from first step to last after a warm-up, logging
counted, evaluation and checkpoints not. With --trl-python TRL's trainers do the same work in a process each (see trainer_trl.py),
after the measurement of ours has given the GPU back.

FLOPs a token (multiply and add are two), of matrix products alone: teacher 2·(its layers' weights + V·H_t), forward; student
three times that of its own, forward and backward; attention 2·T·(heads · head size) a layer and pass for T tokens of context:
half of the square, since the other half is masked. Nothing for embeddings, norms, softmax, optimizer. Utilisation is their
rate over the rate of a large matrix product measured in the same run, in the type that training computes in (bf16 on a GPU),
not over a data sheet.

    python benchmarks/trainer_gpu.py --trl-python ENVIRONMENT/bin/python --save

Without CUDA it ends with 2. `--device cpu --tiny` goes through the same steps with tiny models: a test of the script, no result.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bound, finish, parser
from trainer_setup import our_loop, run_trl, write_job
from trainer_trl import peak_bytes, reset_peak
from transformers import LlamaConfig, LlamaForCausalLM

from edgedistill.cli.show import human_bytes
from edgedistill.config.recipe import Training
from edgedistill.tasks.causal_lm import Packed

VOCAB = 128_256
TEACHER = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
STUDENT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 17, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TRL_KINDS = ("gkd", "distillation")


def config(shape: dict[str, int], vocab: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        **shape, vocab_size=vocab, max_position_embeddings=context + 1, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def forward_flops(shape: LlamaConfig, context: int, *, causal: bool = True) -> float:
    """FLOPs a token of one forward pass over `context` tokens: layers' matrices, head, attention (half where causal)."""
    query, pairs = shape.num_attention_heads * shape.head_dim, 2 * shape.num_key_value_heads * shape.head_dim
    matrices = (
        2 * shape.hidden_size * query + shape.hidden_size * pairs + 3 * shape.hidden_size * shape.intermediate_size
    )
    attention = 4 * context * query * (0.5 if causal else 1.0)
    return shape.num_hidden_layers * (2 * matrices + attention) + 2 * shape.vocab_size * shape.hidden_size


def step_flops(student: LlamaConfig, teacher: LlamaConfig, context: int) -> float:
    """FLOPs a token of distilling: the student's forward and backward (twice a forward), the teacher's forward."""
    return 3 * forward_flops(student, context) + forward_flops(teacher, context)


def matrix_rate(device: torch.device, size: int, repeats: int, precision: str) -> float:
    """FLOPs/s of a product of two [size, size] matrices in `precision`: the best of `repeats` after a warm-up."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for number in range(repeats + 3):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        if number >= 3:
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(
    folder: Path, device: torch.device, data: Packed, settings: Training, steps: int, warm_up: int, vocab: int
) -> dict[str, Any]:
    """Ours: a warm-up of its own, then `steps` steps; with what TRL starts from left in `folder`."""
    context = settings.context_tokens
    teacher: Any = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16).to(device).eval()
    base = reset_peak() if device.type == "cpu" else 0
    student: Any = LlamaForCausalLM.from_pretrained(folder / "job" / "student", dtype=torch.float32).to(device)
    per_step = settings.batch_sequences * context
    our_loop(
        student, teacher, data, settings.model_copy(update={"tokens": warm_up * per_step}), vocab, folder / "warm-up"
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result, spent = our_loop(student, teacher, data, settings, vocab, folder / "run")
    seconds = result.seconds - sum(spent.values())
    return {
        "contender": "edgedistill",
        "seconds": seconds,
        "tokens_per_s": steps * per_step / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes() - base,
        "losses": [row["loss"] for row in result.history],
        "micro_batch_sequences": result.micro_batch_sequences,
    }


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--trl-python", type=Path, help="the interpreter of an environment with TRL")
    asked.add_argument("--trl", default=",".join(TRL_KINDS), help="which of TRL's trainers, by commas")
    asked.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked.add_argument("--tiny", action="store_true", help="tiny models: tries the script, gives no result")
    asked.add_argument("--context", type=int, default=2048)
    asked.add_argument("--batch", type=int, default=16, help="sequences a step")
    asked.add_argument("--micro-batch", type=int, default=4, help="sequences a forward pass")
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    asked.add_argument("--compile", action="store_true", help="torch.compile the student's body (ours alone)")
    arguments = asked.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "trainer_gpu: torch finds no CUDA device, and this measures one: nothing was measured.\n"
            "Run it on a machine with a GPU of 40 GB or more, or try the script itself with --device cpu --tiny.",
            file=sys.stderr,
        )
        sys.exit(2)
    if arguments.device == "cpu" and (not arguments.tiny or arguments.save):
        asked.error("--device cpu only tries the script: it needs --tiny, and its figures are not saved")
    device = torch.device(arguments.device)
    vocab = 512 if arguments.tiny else VOCAB
    shapes = [config(TINY if arguments.tiny else shape, vocab, arguments.context) for shape in (STUDENT, TEACHER)]
    tokens = arguments.steps * arguments.batch * arguments.context
    settings = Training(
        tokens=tokens, context_tokens=arguments.context, batch_sequences=arguments.batch,
        micro_batch_sequences=arguments.micro_batch, evaluate_every_share=1.0, compile=arguments.compile,
        checkpoint_every_s=1e9, learning_rate=1e-4,
    )  # fmt: skip
    stream = np.random.default_rng(0).integers(0, vocab, size=tokens + 1).astype(np.int32)
    data = Packed(stream=stream, context=arguments.context, seed=0)
    rate = matrix_rate(device, 256 if arguments.tiny else 8192, 20, settings.precision)
    per_token = step_flops(shapes[0], shapes[1], arguments.context)
    with tempfile.TemporaryDirectory(prefix="edgedistill-gpu-") as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        LlamaForCausalLM(shapes[1]).bfloat16().save_pretrained(folder / "teacher")
        student = LlamaForCausalLM(shapes[0])
        write_job(
            folder / "job", student=student, teacher=folder / "teacher", data=data, settings=settings,
            steps=arguments.steps, device=arguments.device, vocab=vocab, uncounted=arguments.warm_up,
        )  # fmt: skip
        parameters = sum(p.numel() for p in student.parameters())
        del student
        results = {"ours": measured(folder, device, data, settings, arguments.steps, arguments.warm_up, vocab)}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if arguments.trl_python is not None:
            for kind in arguments.trl.split(","):
                (folder / kind).mkdir()
                results[kind] = run_trl(arguments.trl_python, kind, folder / "job", folder / kind)
    rows, bounds = [], []
    for name, result in results.items():
        result["model_flops_utilisation"] = result["tokens_per_s"] * per_token / rate
        rows.append((
            result["contender"], f"{result['tokens_per_s']:,.0f}", f"{result['model_flops_utilisation']:.1%}",
            human_bytes(result["peak_bytes"]),
        ))  # fmt: skip
        if name != "ours":
            ours = results["ours"]
            bounds += [
                Bound(f"tokens/s, ours ÷ {result['contender']}", ours["tokens_per_s"] / result["tokens_per_s"], ">=", 1.0),
                Bound(f"peak memory, ours ÷ {result['contender']}", ours["peak_bytes"] / result["peak_bytes"], "<=", 1.0),
            ]  # fmt: skip
    finish(
        "trainer_gpu", arguments, rows=rows, bounds=bounds,
        figures={
            "results": results, "flops_a_token": per_token, "matrix_flops_a_second": rate,
            "student_parameters": parameters, "settings": settings.model_dump(mode="json"),
        },
        header=("contender", "tokens/s", "model FLOPs utilisation", "peak memory"),
        notes=[f"{per_token / 1e9:.2f} GFLOPs a token; matrix rate {rate / 1e12:.2f} TFLOPs/s, {settings.precision}"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
