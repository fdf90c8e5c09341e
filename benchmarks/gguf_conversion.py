"""Memory and speed of GGUF conversion and quantization on a model of 1.1 billion parameters (2.2 GB in BF16).

The model is synthetic: TinyLlama's shape, random weights in three safetensors shards, a byte-level tokenizer of 32,000
random merges. Every measurement is a process of its own; its high-water mark is VmHWM, which counts mapped pages too.
Conversion is compared with `cp` plus fsync of the file that it writes, in turns; the sources are in the page cache for
both. Claims: high-water marks under 1.0 GB for conversion and for quantization, each; conversion at at least half the
speed of `cp` plus fsync.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Bound, finish, parser

from edgedistill.models.architectures import model_of
from edgedistill.models.weights import INDEX_FILE
from edgedistill.strict import read_json

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHARDS = 3
CONVERSIONS = ("F16", "BF16")
QUANTIZATIONS = ("Q4_0", "Q4_K_M")
MOST_BYTES = 1.0e9
LEAST_RATIO = 0.5
ROUNDS = 7


def make_model(folder: Path, layers: int) -> None:
    """config.json, a tokenizer and the shards."""
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder, CONFIG["vocab_size"])
    specs = model_of(read_json(folder / "config.json", what="config.json"), where=str(folder)).specs
    names = list(specs)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        held = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        weight_map |= dict.fromkeys(held, file)
        write_shard(folder / file, {name: specs[name].shape for name in held}, seed=shard)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], *, seed: int) -> None:
    """Normal weights of deviation 0.02 as BF16, from one drawn block: speed is the same, and drawing takes no minutes."""
    rng = np.random.default_rng(seed)
    drawn = (rng.standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    block = drawn.astype(np.uint16)
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for shape in shapes.values():
            left = int(np.prod(shape))
            shift = int(rng.integers(0, block.size))
            while left:
                part = block[shift : shift + left]
                part.tofile(file)
                left -= part.size
                shift = 0


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE whose merges are drawn, each of two tokens that are there already."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rng = np.random.default_rng(0)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{piece: index + 1 for index, piece in enumerate(pieces)}}
    merges = []
    while len(vocabulary) < vocab_size:
        left, right = (pieces[int(rng.integers(len(pieces)))] for _ in range(2))
        if len(left + right) <= 12 and left + right not in vocabulary:
            merges.append((left, right))
            vocabulary[left + right] = len(vocabulary)
            pieces.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))


def high_water_bytes() -> int:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def child(what: str, source: str, out: str, kind: str) -> None:
    """One measurement, in this process alone; its seconds (imports left out) and high-water mark as JSON."""
    start = time.perf_counter()
    if what == "convert":
        from edgedistill.gguf.convert import convert_to_gguf

        start = time.perf_counter()
        convert_to_gguf(Path(source), Path(out), dtype=kind, name="synthetic")  # type: ignore[arg-type]
    elif what == "quantize":
        # The function that the export's worker process runs.
        from edgedistill.runtimes.llama_quantize import quantize

        start = time.perf_counter()
        quantize(source, out, kind, threads=1)
    else:
        subprocess.run(["cp", source, out], check=True)
    descriptor = os.open(out, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    print(json.dumps({"seconds": time.perf_counter() - start, "high_water_bytes": high_water_bytes()}))


def measure(what: str, source: Path, out: Path, kind: str = "") -> dict[str, float]:
    """A child process's figures. Earlier writes are on the disk first, and the source is read once, so that neither is
    paid for by who happens to come next."""
    out.unlink(missing_ok=True)
    os.sync()
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    command = [sys.executable, __file__, "--child", what, str(source), str(out), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} {kind} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=ROUNDS, help="of conversion and cp, in turns")
    asked.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer: a trial run")
    asked.add_argument("--folder", type=Path, default=None, help="where to write some 8 GB; default: a temporary one")
    asked.add_argument("--skip-quantization", action="store_true")
    arguments = asked.parse_args()
    figures: dict[str, Any] = {}
    rows, bounds = [], []
    with tempfile.TemporaryDirectory(prefix="edgedistill-gguf-", dir=arguments.folder) as scratch:
        folder = Path(scratch)
        if shutil.disk_usage(folder).free < 12e9:
            sys.exit(f"{folder} has less than 12 GB left")
        model = folder / "model"
        model.mkdir()
        make_model(model, arguments.layers)
        figures["model_bytes"] = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for dtype in CONVERSIONS:
            gguf = folder / f"{dtype}.gguf"
            measure("convert", model, gguf, dtype)  # gives the file to copy, and the machine its pages
            measure("copy", gguf, folder / "again.gguf")
            pairs = []
            out = folder / "again.gguf"
            for turn in range(arguments.rounds):
                # Whoever comes second finds the first one's pages: they take turns at that too.
                first = measure("copy", gguf, out) if turn % 2 else None
                made = measure("convert", model, out, dtype)
                pairs.append((made, first or measure("copy", gguf, out)))
            out.unlink()
            ratios = [copied["seconds"] / made["seconds"] for made, copied in pairs]
            figure = {
                "bytes": gguf.stat().st_size,
                "seconds": [made["seconds"] for made, _ in pairs],
                "copy_seconds": [copied["seconds"] for _, copied in pairs],
                "ratio_median": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "high_water_bytes": max(made["high_water_bytes"] for made, _ in pairs),
            }
            figures[f"convert {dtype}"] = figure
            rows.append(
                (
                    f"convert BF16 to {dtype}", f"{statistics.median(figure['seconds']):.2f} s",
                    f"{statistics.median(figure['copy_seconds']):.2f} s",
                    f"{figure['ratio_median']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    f"{figure['high_water_bytes'] / 1e6:,.0f} MB",
                )
            )  # fmt: skip
            bounds.append(Bound(f"convert {dtype}: speed / cp's", figure["ratio_median"], ">=", LEAST_RATIO))
            bounds.append(Bound(f"convert {dtype}: high-water bytes", figure["high_water_bytes"], "<=", MOST_BYTES))
            if dtype != CONVERSIONS[0]:
                gguf.unlink()
        for mix in () if arguments.skip_quantization else QUANTIZATIONS:
            found = measure("quantize", folder / f"{CONVERSIONS[0]}.gguf", folder / "quantized.gguf", mix)
            figures[f"quantize {mix}"] = {**found, "bytes": (folder / "quantized.gguf").stat().st_size}
            rows.append(
                (
                    f"quantize to {mix}, 1 thread",
                    f"{found['seconds']:.2f} s",
                    "",
                    "",
                    f"{found['high_water_bytes'] / 1e6:,.0f} MB",
                )
            )
            bounds.append(Bound(f"quantize {mix}: high-water bytes", found["high_water_bytes"], "<=", MOST_BYTES))
    finish(
        "gguf_conversion", arguments, figures=figures, rows=rows, bounds=bounds,
        header=("what", "time", "cp + fsync", "speed / cp's (range)", "high-water mark"),
        notes=[f"the range of {arguments.rounds} rounds; of seven it is a 98 % interval of the median"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
