"""Our reader against the `gguf` package's, on files with every type of key and tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedistill.errors import UserError
from edgedistill.gguf.reader import PLAIN, GgufFile
from edgedistill.guards.gguf import TYPES

BITS = {"UINT8": (0, 8), "INT8": (-1, 8), "UINT16": (0, 16), "INT16": (-1, 16), "UINT32": (0, 32), "INT32": (-1, 32),
        "UINT64": (0, 64), "INT64": (-1, 64)}  # fmt: skip
VALUES: dict[str, st.SearchStrategy[Any]] = {
    name: st.integers(0, 2**bits - 1) if sign == 0 else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for name, (sign, bits) in BITS.items()
} | {
    "FLOAT32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FLOAT64": st.floats(allow_nan=False, allow_infinity=False),
    "BOOL": st.booleans(), "STRING": st.text(max_size=20).filter(lambda text: "\x00" not in text),
}  # fmt: skip


@st.composite
def pairs(draw: Any) -> list[tuple[str, Any, str, bool]]:
    names = draw(st.lists(st.from_regex(r"[a-z]{1,6}\.[a-z_]{1,6}", fullmatch=True), unique=True, max_size=6))
    made = []
    for name in names:
        kind, array = draw(st.sampled_from(sorted(VALUES))), draw(st.booleans())
        made.append(
            (name, draw(st.lists(VALUES[kind], min_size=1, max_size=5) if array else VALUES[kind]), kind, array)
        )
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs(), st.integers(0, 2**32 - 1))
def test_values_and_tensors_are_the_packages(tmp_path: Path, keys: list[Any], seed: int) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for name, value, kind, array in keys:
        vtype = GGUFValueType[kind]
        writer.add_key_value(name, value, GGUFValueType.ARRAY if array else vtype, vtype if array else None)
    rng = np.random.default_rng(seed)
    for number in rng.choice(sorted(TYPES), size=3, replace=False):
        type_ = GGMLQuantizationType(int(number))
        shape = (*rng.integers(1, 4, int(rng.integers(0, 3))).tolist(), 2 * GGML_QUANT_SIZES[type_][0])
        if number in PLAIN:
            values = rng.integers(-100, 100, shape).astype(PLAIN[int(number)])
        else:
            values = rng.integers(0, 256, quant_shape_to_byte_shape(shape, type_)).astype(np.uint8)
        writer.add_tensor(f"t{number}", values, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours, reference = GgufFile(path), GGUFReader(path)
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert {key: ours.value(key) for key in ours.keys} == {name: field.contents() for name, field in fields.items()}
    assert ours.value("no.such", 7) == 7
    assert len(ours.tensors) == len(reference.tensors)
    for mine, theirs in zip(ours.tensors, reference.tensors, strict=True):
        names = ("name", "tensor_type", "n_elements", "n_bytes", "data_offset")
        assert [getattr(mine, name) for name in names] == [getattr(theirs, name) for name in names]
        assert list(mine.shape) == theirs.shape.tolist()
        assert mine.data.dtype == theirs.data.dtype and np.array_equal(mine.data, theirs.data)


def test_texts_that_are_no_utf8_are_refused_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["one", "two", "thr"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path.write_bytes(path.read_bytes().replace(b"two", b"t\xff\xff"))
    with pytest.raises(UserError, match=r"tokenizer.ggml.tokens: text 1 is not UTF-8"):
        GgufFile(path).value("tokenizer.ggml.tokens")
