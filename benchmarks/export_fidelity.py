"""A finished model exported as it is: the same text and the same likelihoods as in transformers.

stories260k-hf as F16 GGUF in llama.cpp and as FP32 ONNX in onnxruntime, against transformers in fp32 on the whole
TinyStories calibration text. Claims: 200 greedy tokens from BOS are the same; the mean negative log-likelihood lies
within 1e-3 nats. Q8_0, Q4_0, INT8 and INT4 stand beside them without a bound.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Bound, finish, parser

from edgedistill import stages
from edgedistill.config.recipe import Data
from edgedistill.data.documents import read_documents
from edgedistill.data.split import blocks_of
from edgedistill.machine import facts
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.runtimes.runners import ArtifactScorer, Scorer, TorchScorer, load_torch
from edgedistill.store import Store
from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks, groups, scoring_windows

DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
EXPORTS = (("gguf", "F16"), ("onnx", "FP32"), ("gguf", "Q8_0"), ("gguf", "Q4_0"), ("onnx", "INT8"), ("onnx", "INT4"))
BOUNDED = ("gguf:F16", "onnx:FP32")
NEW_TOKENS = 200


def mean_nll(scorer: Scorer, windows: list) -> float:
    total, count = 0.0, 0
    for group in groups(windows):
        ids = np.stack([w.ids for w in group]).astype(np.int64)
        logits = scorer.logits(ids)[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(ids[:, 1:].reshape(-1)), reduction="none"
        )
        for row, window in zip(nll.view(len(group), -1), group, strict=True):
            total += float(row[window.first :].sum())
            count += window.scored
    return total / count


@torch.no_grad()
def greedy(model: torch.nn.Module, start: int, new_tokens: int) -> list[int]:
    ids = [start]
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[1:]


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--model", default=str(DATA / "weights" / "stories260k-hf"))
    asked.add_argument("--text", default=str(DATA / "text_lm" / "tinystories" / "tinystories_calib.txt"))
    arguments = asked.parse_args()
    store, threads = Store(), len(facts.usable_cpus())
    tokenizer = TextTokenizer.load(Path(arguments.model))
    blocks = encode_blocks(tokenizer, blocks_of(read_documents(arguments.text, Data()), 2000))
    windows = scoring_windows(blocks, context=256, stride=None, max_tokens=None)
    model = load_torch(Path(arguments.model))
    reference, text = mean_nll(TorchScorer(model), windows), greedy(model, tokenizer.bos or 0, NEW_TOKENS)
    figures, rows, bounds = {"transformers fp32": {"mean_nll": reference}}, [], []
    with tempfile.TemporaryDirectory(prefix="edgedistill-export-") as folder:
        for format_, quantization in EXPORTS:
            name, out = f"{format_}:{quantization}", Path(folder) / quantization
            made = stages.export(
                arguments.model, format_=format_, quantization=quantization, context_tokens=None, out=out, store=store
            )
            scoring = "onnxruntime" if format_ == "onnx" else "llama.cpp"
            with RuntimeProcess(scoring, out / made.entry, threads=threads, context_tokens=256, store=store) as process:
                found = mean_nll(ArtifactScorer(process), windows)
            with RuntimeProcess(
                made.runtime, out / made.entry, threads=threads, context_tokens=256, store=store
            ) as process:
                tokens = process.greedy([tokenizer.bos or 0], NEW_TOKENS)
            same = next((i for i, (a, b) in enumerate(zip(tokens, text, strict=True)) if a != b), NEW_TOKENS)
            figures[name] = {
                "mean_nll": found,
                "greedy_equal_tokens": same,
                "bytes": made.bytes,
                "fallbacks": len(made.fallbacks),
            }
            rows.append(
                (name, made.runtime, f"{found:.5f}", f"{found - reference:+.6f}", str(same), str(len(made.fallbacks)))
            )
            if name in BOUNDED:
                bounds.append(Bound(f"{name}: |mean NLL − transformers'|, nats", abs(found - reference), "<=", 1e-3))
                bounds.append(Bound(f"{name}: greedy tokens as transformers'", float(same), ">=", NEW_TOKENS))
    finish(
        "export_fidelity",
        arguments,
        figures=figures,
        header=("artifact", "runtime", "mean NLL", "difference", f"greedy tokens equal of {NEW_TOKENS}", "fallbacks"),
        rows=rows,
        bounds=bounds,
        notes=[f"transformers fp32: mean NLL {reference:.5f} nats over {sum(w.scored for w in windows):,} tokens"],
    )


if __name__ == "__main__":
    main()
