"""Plants every fault that the generators know in healthy artifacts: for `benchmarks/attack.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

# What a bundle holds: a quantized and a float artifact of each format.
BUNDLES = (("gguf", "Q4_0"), ("gguf", "F32"), ("onnx", "INT4"), ("onnx", "FP32"))


def attack(count: int, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Name of each fault (format first), and what was wrong: it was accepted, or stopped without being named.

    All of them are planted, of which there are more than `count` should ask for.
    """
    from bundle_fixtures import Ingredients

    from attack.stopped import outcomes

    planted = 0
    for format_, quantization in BUNDLES:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            made = Ingredients(place / "of")
            artifact = made.exported(quantization, onnx=format_ == "onnx")
            bundle = made.make(place / "out" / "tiny", artifacts=[artifact])
            for one in outcomes(bundle, place / "work", made.store, seed=seed):
                planted += 1
                wrong = "" if one.named else "stopped, not named" if one.stopped else "accepted"
                name = f"{format_} {quantization} {one.fault} ({one.kind}: {one.names})"
                yield name, [f"{wrong}: {one.said[:300]}"] if wrong else []
    if planted < count:
        raise RuntimeError(f"there are {planted} faults to plant, not {count}")
