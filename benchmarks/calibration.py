"""Static INT8's calibration: the same scales for every batch size, and memory that does not grow with the samples.

python benchmarks/calibration.py --check --save
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Bound, finish, parser

from edgedistill.onnx.calibration import observe_ranges, ranges_of, text_samples
from edgedistill.onnx.float_export import FloatExport, export_float
from edgedistill.onnx.int8_scheme import SCHEMES
from edgedistill.onnx.qdq import activation_step
from edgedistill.onnx.quantized_graph import static_tensors
from edgedistill.quantization.histogram import METHODS
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import TensorSpec

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 10_000
COMPARED_SAMPLES = 500
BATCHES = (1, 8, 32)
MAX_SCALE_DIFFERENCE = 1e-5
MAX_RSS_BYTES = 2e9
BERT = {
    "vocab_size": 4000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
    "max_position_embeddings": 128,
}  # fmt: skip


def checkpoint(folder: Path, texts: list[str]) -> Path:
    """A random BERT classifier with a WordPiece tokenizer of the texts."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(folder)
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=BERT["vocab_size"], show_progress=False)
    tokenizer.save(str(folder / "wordpiece.json"))
    BertTokenizerFast(tokenizer_file=str(folder / "wordpiece.json"), model_max_length=128).save_pretrained(folder)
    return folder


def sentences(count: int) -> list[str]:
    """Sentences of SST-2's training part, in pairs drawn at random: no two samples need be the same."""
    data = Path(os.environ.get("EDGEDISTILL_TEST_DATA", ROOT.parent / "shared" / "data"))
    lines = (data / "classification" / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.rpartition("\t")[0] for line in lines]
    picks = np.random.default_rng(0).integers(0, len(rows), (count, 2))
    return [f"{rows[a]} . {rows[b]}" for a, b in picks]


def calibrate(folder: Path, batch: int, count: int) -> dict[str, Any]:
    """Scales of every tensor by method, and the most memory of this process and of the one with the runtime."""
    specs = tuple(TensorSpec.model_validate(row) for row in json.loads((folder / "inputs.json").read_text()))
    export = FloatExport(folder / "graph" / "model.onnx", specs, (), module=None, parameters=0)
    options = ExportOptions(
        calibration_batch=batch, calibration_samples=count, calibration_tokens=64, calibration_source="SST-2"
    )
    names = [spec.name for spec in export.inputs]
    samples = text_samples(folder, sentences(count), names, max_tokens=128, options=options)
    observed = observe_ranges(export, samples, static_tensors(export), method="entropy")
    scales = {
        method: {
            name: float(activation_step(limits, SCHEMES["u8s8"])[0])
            for name, limits in ranges_of(observed, method, symmetric=False).items()
        }
        for method in METHODS
    }
    rss = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"scales": scales, "rss_bytes": rss, "tokens": samples.record.tokens, "samples": samples.record.samples}


def in_process(folder: Path, batch: int, count: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder), str(batch), str(count)], check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(calibrate(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(Path(scratch), sentences(2000))
        (export,) = export_float(folder, folder / "graph")
        (folder / "inputs.json").write_text(json.dumps([spec.model_dump() for spec in export.inputs]))
        runs = {batch: in_process(folder, batch, COMPARED_SAMPLES) for batch in BATCHES}
        large = in_process(folder, 8, SAMPLES)
    rows, worst = [], 0.0
    for method in METHODS:
        first = runs[BATCHES[0]]["scales"][method]
        for batch in BATCHES[1:]:
            other = runs[batch]["scales"][method]
            difference = max(abs(other[name] - scale) / scale for name, scale in first.items())
            worst = max(worst, difference)
            rows.append((method, f"batch {batch} against {BATCHES[0]}", f"{len(first)} tensors", f"{difference:.2g}"))
    total = sum(large["rss_bytes"])
    rows.append(("memory", f"{large['samples']:,} samples", f"{large['tokens']:,} tokens", f"{total / 1e9:.2f} GB"))
    figures = {
        "scale_difference": worst,
        "samples": large["samples"],
        "tokens": large["tokens"],
        "peak_rss_bytes": {"both": total, "this_process": large["rss_bytes"][0], "runtime": large["rss_bytes"][1]},
        "peak_rss_bytes_500_samples": runs[8]["rss_bytes"],
    }
    finish(
        "calibration", arguments, figures=figures, rows=rows, header=("what", "case", "of", "figure"),
        bounds=[
            Bound("largest relative difference of a scale, batches of 1, 8 and 32", worst, "<=", MAX_SCALE_DIFFERENCE),
            Bound("samples of the run whose memory is measured", float(large["samples"]), ">=", float(SAMPLES)),
            Bound("peak memory of both processes, bytes", float(total), "<=", MAX_RSS_BYTES),
        ],
        notes=(
            "A random BERT of 2 layers, 64 wide; pairs of SST-2 sentences through its own WordPiece tokenizer.",
            "Scales are compared on 500 samples. Memory is that of the process that tokenizes and of the one with the runtime.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
