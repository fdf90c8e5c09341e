"""What training takes of one GPU, predicted by `plan` and measured: live teachers in bf16, INT8 and NF4, caches, FSDP2.

Each case trains three steps through the real trainer in a process of its own (tests/helpers/memory_script.py). Measured is the most
that torch's allocator had given out; FSDP2 shards over the one GPU, so that what it gathers counts beside what it keeps. Without
bitsandbytes the INT8 and NF4 teachers are left out, and named as not measured.

    python benchmarks/gpu_memory.py --save --check

Without CUDA it ends with 2. `--tiny` tries the script anywhere, at tiny sizes: no result.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from common import Bound, finish, parser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from memory_script import case_of, device, measure, predicted

from edgedistill.cli.show import human_bytes
from edgedistill.records.shape import Shape


def shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Shape:
    return Shape(
        family="llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64, tie_word_embeddings=True,
        attention_bias=False, qk_norm=False,
    )  # fmt: skip


def cases(*, tiny: bool) -> dict[str, dict[str, Any]]:
    student = shape(512, 64, 128, 2, 1, 1) if tiny else shape(32_000, 1024, 2816, 16, 16, 8)
    teacher = shape(512, 128, 256, 2, 2, 1) if tiny else shape(32_000, 2048, 5632, 16, 32, 8)
    common: dict[str, Any] = {"precision": "bf16", "batch_sequences": 4, "context_tokens": 64 if tiny else 1024}
    live: dict[str, Any] = {**common, "signals": "live", "weights": "bfloat16"}
    return {
        "no teacher": case_of(student, **common),
        "no teacher, FSDP2": case_of(student, sharded=True, **common),
        "no teacher, Muon, activation checkpointing": case_of(
            student, optimizer="muon", activation_checkpointing=True, **common
        ),
        "live bf16 teacher": case_of(student, teacher, teacher_precision="bf16", **live),
        "live bf16 teacher, FSDP2": case_of(student, teacher, teacher_precision="bf16", sharded=True, **live),
        "live INT8 teacher": case_of(student, teacher, teacher_precision="int8", **live),
        "live NF4 teacher": case_of(student, teacher, teacher_precision="nf4", **live),
        "sampled cache": case_of(student, teacher, signals="cached", weights="bfloat16", **common),
    }


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--tiny", action="store_true", help="tiny models, any device: tries the script, gives no result")
    asked.add_argument("--only", default="", help="cases whose name holds this")
    arguments = asked.parse_args()
    if device() != "cuda" and not arguments.tiny:
        print(
            "gpu_memory: torch finds no CUDA device, and this measures one: nothing was measured.\n"
            "Run it on a machine with a GPU of 40 GB or more, or try the script itself with --tiny.",
            file=sys.stderr,
        )
        sys.exit(2)
    if arguments.tiny and arguments.save:
        asked.error("--tiny only tries the script: its figures are not saved")
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    figures: dict[str, Any] = {}
    rows, bounds, notes = [], [], []
    for name, case in cases(tiny=arguments.tiny).items():
        if arguments.only not in name:
            continue
        if case["teacher_precision"] in ("int8", "nf4") and not bitsandbytes:
            notes.append(f"{name}: not measured, bitsandbytes is not installed")
            continue
        found, expected = measure(case), predicted(case)
        ratio = expected.bytes / found["peak_bytes"]
        figures[name] = {
            "predicted_bytes": expected.bytes, "measured_bytes": found["peak_bytes"], "ratio": ratio,
            "moment": expected.moment, "parts_bytes": expected.components, "measured_phases_bytes": found["phases"],
            "training": case["training"],
        }  # fmt: skip
        rows.append((name, human_bytes(expected.bytes), human_bytes(found["peak_bytes"]), f"{ratio:.3f}"))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
        if not arguments.tiny:
            bounds.append(Bound(f"{name}: predicted / measured, at least", ratio, ">=", 0.85))
            bounds.append(Bound(f"{name}: predicted / measured, at most", ratio, "<=", 1.15))
    finish(
        "gpu_memory", arguments, figures=figures, rows=rows, bounds=bounds, notes=notes,
        header=("case", "predicted", "measured", "predicted / measured"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
