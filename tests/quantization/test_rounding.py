"""How far a quantized tensor may lie from the model's: honest ones of any size pass, scaled and emptied ones do not."""

from __future__ import annotations

import numpy as np
import pytest

from edgedistill.gguf.ggml import block_size, dequantize, quantize
from edgedistill.quantization.rounding import PLAIN, difference

TYPES = [name for name in PLAIN if name not in ("INT8", "INT4")]


def matrices(type_name: str, count: int):
    rng = np.random.default_rng(7)
    for number in range(count):
        columns = block_size(type_name) * int(rng.integers(1, 5))
        rows = int(rng.choice([1, 4, 16, 64, 256]))
        values = rng.standard_normal((rows, columns)) if number % 2 else rng.standard_t(4, (rows, columns))
        values = values * np.exp(rng.normal(0, 0.5, (rows, 1)))  # rows as training leaves them: of several sizes
        yield (0.05 * values).astype(np.float32)


@pytest.mark.parametrize("type_name", TYPES)
def test_honest_tensors_pass_however_small(type_name):
    found = []
    for values in matrices(type_name, 80):
        stored = dequantize(quantize(values, type_name), type_name, values.shape)
        found.append((values.shape, difference(stored, values, type_name)))
    wrong = [(shape, why) for shape, why in found if why]
    assert not wrong, (len(wrong), wrong[0])


@pytest.mark.parametrize("type_name", TYPES)
def test_a_scaled_or_emptied_tensor_does_not(type_name):
    for values in matrices(type_name, 15):
        if values.size < 4096:
            continue
        stored = dequantize(quantize(values, type_name), type_name, values.shape)
        assert difference(stored * np.float32(1.1), values, type_name)
        assert difference(stored * np.float32(0.9), values, type_name)
        assert difference(stored[::-1].copy(), values, type_name)
        stored[0, : block_size(type_name)] = 0
        assert difference(stored, values, type_name)
