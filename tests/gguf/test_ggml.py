"""libggml's block quantization through ctypes: held to the gguf package's own decoder, its limits refused in words."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from edgedistill.errors import UserError
from edgedistill.gguf import ggml

RNG = np.random.default_rng(3)
COLUMNS = 512
SLOW = ("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "IQ3_S", "IQ3_XXS")  # their search takes seconds for few rows


def inputs(rows: int) -> dict[str, np.ndarray]:
    plain = (0.05 * RNG.normal(size=(rows, COLUMNS))).astype(np.float32)
    outlier = plain.copy()
    outlier[:, 7] = 6e4
    return {
        "random": plain,
        "outliers": outlier,
        "zeros": np.zeros_like(plain),
        "denormals": (plain * np.float32(1e-39)).astype(np.float32),
        "one-sided": np.abs(plain),
        "constant": np.full_like(plain, 0.3),
    }


@pytest.mark.parametrize("type_name", ggml.TYPES)
def test_bytes_decode_as_the_gguf_package_decodes_them(type_name: str) -> None:
    rows = 1 if type_name in SLOW else 9  # building their grids alone takes seconds
    importance = RNG.uniform(0.01, 3, COLUMNS).astype(np.float32)
    kinds = inputs(rows)
    for kind in ("random", "zeros") if type_name in SLOW else kinds:
        data = ggml.quantize(kinds[kind], type_name, importance)
        assert data.shape == (rows, ggml.row_bytes(type_name, COLUMNS))
        values = ggml.dequantize(data, type_name, kinds[kind].shape)
        assert np.isfinite(values).all()
        if type_name not in ("F32", "F16"):  # which the package does not decode
            assert np.array_equal(values, quants.dequantize(data, GGMLQuantizationType[type_name]))
        if kind == "zeros":
            assert not values.any()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q3_K", "IQ4_NL"])
def test_threads_and_rows_change_nothing_and_the_importance_does(type_name: str) -> None:
    values = RNG.normal(size=(260, 256)).astype(np.float32)
    importance = RNG.uniform(0.01, 3, 256).astype(np.float32) ** 2
    whole = ggml.quantize(values, type_name, importance)
    assert np.array_equal(whole, ggml.quantize(values, type_name, importance, threads=3))
    assert np.array_equal(whole[17:18], ggml.quantize(values[17:18], type_name, importance))
    assert not np.array_equal(whole, ggml.quantize(values, type_name))


def test_what_would_abort_in_c_is_refused_in_words() -> None:
    values = np.ones((2, 256), dtype=np.float32)
    for arguments, words in (
        ((values, "Q4_K_M"), "no type 'Q4_K_M'"),
        ((values, "Q8_K"), "no type 'Q8_K'"),
        ((values[:, :250], "Q4_K"), "blocks of 256"),
        ((values, "IQ2_XXS"), "importance matrix"),
        ((values * np.float32(1e6), "IQ3_S"), "float16's largest"),
        ((np.where(values > 0, np.nan, values), "Q4_0"), "NaN"),
        ((values, "Q4_0", np.ones(255, dtype=np.float32)), "255"),
        ((values, "Q4_0", -np.ones(256, dtype=np.float32)), "importance of -1"),
        ((values, "IQ2_S", np.full(256, 1e30, dtype=np.float32)), "float32 sums"),
    ):
        with pytest.raises(UserError, match=words):
            ggml.quantize(*arguments)
    with pytest.raises(UserError, match="cut short"):
        ggml.dequantize(np.zeros(17, dtype=np.uint8), "Q4_0", (1, 32))


def test_empty_matrices_are_nothing() -> None:
    assert ggml.quantize(np.empty((0, 256), dtype=np.float32), "Q4_K").shape == (0, 144)
    assert ggml.dequantize(np.empty(0, dtype=np.uint8), "Q4_K", (0, 256)).shape == (0, 256)
