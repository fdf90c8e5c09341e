"""Peak memory of training, predicted by `plan` and measured: every ratio within 0.85 and 1.15.

Each case trains three steps through the real trainer in a process of its own, with an evaluation a step, checkpoints and
the teacher's signals (tests/helpers/memory_script.py). Measured is the resident set's peak less what stands after imports.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Bound, finish, parser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from memory_script import case_of, measure, predicted

from edgedistill.records.shape import Shape


def shape(vocab, hidden, inner, layers, heads, kv_heads, *, tied=True, family="llama") -> Shape:
    return Shape(
        family=family, vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64, tie_word_embeddings=tied,
        attention_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip


S = shape(2048, 256, 768, 5, 4, 2)
M = shape(8192, 384, 1024, 6, 6, 2)
L = shape(32000, 512, 1536, 8, 8, 4)
LU = shape(32000, 512, 1536, 8, 8, 4, tied=False)
Q2 = shape(16000, 448, 1216, 7, 7, 7, family="qwen2")
Q3 = shape(32000, 384, 1024, 6, 6, 2, tied=False, family="qwen3")
TS = shape(2048, 512, 1536, 6, 8, 4)
TM = shape(8192, 512, 1536, 8, 8, 4)
TL = shape(32000, 768, 2048, 8, 12, 4)
GRID = {
    "4M fp32 adamw": (case_of(S), 1),
    "4M fp32 adamw, 2 threads": (case_of(S, context_tokens=256), 2),
    "4M fp32 live, 2048 tokens": (case_of(S, TS, signals="live", context_tokens=512), 1),
    "4M bf16 live bf16": (case_of(S, TS, signals="live", teacher_precision="bf16", precision="bf16", context_tokens=256), 1),
    "4M bf16 sampled cache": (case_of(S, TS, signals="cached", precision="bf16", context_tokens=256), 1),
    "4M fp32 reverse KL live": (case_of(S, TS, signals="live", forward_kl=0.0, reverse_kl=1.0), 1),
    "4M bf16 muon checkpointing": (case_of(S, optimizer="muon", precision="bf16", context_tokens=256, activation_checkpointing=True), 1),
    "4M fp32 checkpointing": (case_of(S, context_tokens=512, activation_checkpointing=True), 1),
    "13M bf16 documents": (case_of(M, context_tokens=256, precision="bf16", attention="documents"), 1),
    "13M fp32 top-k cache": (case_of(M, TM, signals="cached", cache={"kind": "topk"}), 1),
    "13M bf16 dense cache": (case_of(M, TM, signals="cached", cache={"kind": "dense"}, precision="bf16"), 1),
    "13M adapters": (case_of(M, lora={"rank": 16}, context_tokens=256), 1),
    "13M adapters bf16, live": (case_of(M, TM, signals="live", lora={"rank": 16}, precision="bf16", context_tokens=256), 1),
    "23M qwen2 fp32": (case_of(Q2, context_tokens=256, batch_sequences=2), 1),
    "35M qwen3 untied bf16 live accumulated": (case_of(Q3, TL, signals="live", precision="bf16", micro_batch_sequences=1), 1),
    "42M fp32 adamw": (case_of(L), 1),
    "42M fp32 muon accumulated": (case_of(L, optimizer="muon", micro_batch_sequences=1), 1),
    "42M bf16 live accumulated": (case_of(L, TL, signals="live", precision="bf16", micro_batch_sequences=2), 1),
    "58M untied bf16": (case_of(LU, precision="bf16"), 1),
    "58M untied fp32 hidden cache": (case_of(LU, TL, signals="cached", cache={"kind": "hidden"}), 1),
    "8M wide tensors, 4096 tokens": (case_of(shape(2048, 512, 2048, 2, 8, 8), context_tokens=512, batch_sequences=8), 1),
}  # fmt: skip


def _told(names: Iterable[str], results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results as they come, each said on standard error."""
    for name, result in zip(names, results, strict=True):
        print(f"{name}: {result['peak_bytes'] / 1e6:,.0f} MB", file=sys.stderr, flush=True)
        yield result


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", default="", help="cases whose name holds this")
    asked.add_argument("--workers", type=int, default=1, help="cases at a time: speed does not matter here")
    asked.add_argument("--measurements", type=Path, help="an earlier result: predict anew for what it measured")
    arguments = asked.parse_args()
    chosen = {name: entry for name, entry in GRID.items() if arguments.only in name}
    figures, rows = {}, []
    if arguments.measurements:
        earlier = json.loads(arguments.measurements.read_text(encoding="utf-8"))["figures"]
        chosen = {name: chosen[name] for name in earlier}
        measurements = {
            name: {
                "peak_bytes": entry["measured_bytes"],
                "phases": entry["measured_phases_bytes"],
                "after_imports_bytes": entry["after_imports_bytes"],
            }
            for name, entry in earlier.items()
        }
    else:
        with ThreadPoolExecutor(arguments.workers) as pool:
            results = pool.map(lambda entry: measure(entry[0], threads=entry[1]), chosen.values())
            measurements = dict(zip(chosen, _told(chosen, results), strict=True))
    for name, (case, threads) in chosen.items():
        measured, found = measurements[name], predicted(case)
        ratio = found.bytes / measured["peak_bytes"]
        figures[name] = {
            "parameters": Shape(**case["student"]).parameters, "predicted_bytes": found.bytes,
            "measured_bytes": measured["peak_bytes"], "ratio": ratio, "moment": found.moment,
            "parts_bytes": found.components, "measured_phases_bytes": measured["phases"], "threads": threads,
            "after_imports_bytes": measured["after_imports_bytes"], "training": case["training"],
        }  # fmt: skip
        rows.append(
            (name, f"{found.bytes / 1e6:,.0f}", f"{measured['peak_bytes'] / 1e6:,.0f}", f"{ratio:.3f}", found.moment)
        )
    ratios = [entry["ratio"] for entry in figures.values()]
    finish(
        "training_memory",
        arguments,
        figures=figures,
        header=("case", "predicted (MB)", "measured (MB)", "ratio", "predicted moment"),
        rows=rows,
        bounds=[
            Bound("smallest predicted / measured", min(ratios), ">=", 0.85),
            Bound("largest predicted / measured", max(ratios), "<=", 1.15),
        ],
        notes=[
            "with --measurements the peaks are those of an earlier run, and the predictions alone are new",
            "peaks are above what stands after imports; CPU, glibc's allocator; each case measured once",
        ],
    )


if __name__ == "__main__":
    main()
