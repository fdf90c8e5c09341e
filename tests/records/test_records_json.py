"""JSON that others wrote is read strictly and within bounds; nothing of it that is printed moves a cursor."""

from __future__ import annotations

import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.bundle.npy import array_bytes, array_of, header
from edgedistill.cli.edge import plain
from edgedistill.errors import UserError
from edgedistill.records.base import FileEntry
from edgedistill.records.reading import json_record, json_value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" + b"9" * 5000 + b"]", "5,000 digits"),
        (b"[0." + b"1" * 5000 + b"]", "number"),
        (b"[" * 33 + b"]" * 33, "deep"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
        (b'["\\ud800"]', "surrogate"),
        (b"\xff", "UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'["\x01"]', "control character"),
        (b'"' + b'\\"' * 400_000, "Unterminated"),
        (b"[" + b"1," * 1_000_000 + b"1]", "values"),
    ],
)
def test_refused_quickly_and_small(text: bytes, why: str) -> None:
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(UserError, match=why) as caught:
        json_value(text, what="it.json", remedy="mend it", max_bytes=10 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - started < 5
    assert peak < 20 << 20
    assert caught.value.cause.startswith("it.json ")


def test_more_bytes_than_asked_for() -> None:
    with pytest.raises(UserError, match=r"it\.json has 11 bytes, more than 10"):
        json_value(b"[1,2,3,4,5]", what="it.json", remedy="", max_bytes=10)


@pytest.mark.parametrize(
    "change",
    [{"bytes": "1"}, {"bytes": 1.5}, {"bytes": True}, {"bytes": -1}, {"bytes": 2**63}, {"path": 3}, {"more": 1}],
)
def test_records_are_strict(change: dict[str, object]) -> None:
    whole = {"path": "a", "bytes": 1, "sha256": "0" * 64}
    read = json_record(FileEntry, json.dumps(whole).encode(), what="f", remedy="", max_bytes=1000)
    assert read.path == "a"
    with pytest.raises(UserError, match="f: "):
        json_record(FileEntry, json.dumps(whole | change).encode(), what="f", remedy="", max_bytes=1000)


def test_nothing_shown_moves_a_cursor_or_turns_the_text() -> None:
    found = plain("one\ttwo\n\x1b]0;title\x07\u202e\ud800é日\r\x9b")
    assert found == "one\ttwo\n\\x1b]0;title\\x07\\u202e\\ud800é日\\r\\x9b"


@given(st.sampled_from(["<i4", "<f4"]), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_headers_are_numpys(dtype: str, shape: list[int]) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, dtype=dtype))
    written = buffer.getvalue()
    assert len(written) == array_bytes(dtype, tuple(shape))  # type: ignore[arg-type]
    assert written.startswith(header(dtype, tuple(shape)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form", ["-" * 9000 + "1", "[" * 9000, "{'descr': '<f4', 'fortran_order': True, 'shape': (3,), }", "(" * 5000, ""]
)
def test_other_headers_are_refused_unread(form: str) -> None:
    data = b"\x93NUMPY\x01\x00" + len(form).to_bytes(2, "little") + form.encode() + bytes(12)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"a\.npy is not a \.npy file of <f4 \[3\]"):
        array_of(data, "<f4", (3,), what="a.npy")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("count", [1, 9, 10, 263, 128_256, 10**9, 10**15])
def test_headers_of_long_arrays(count: int) -> None:
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    assert buffer.getvalue() == header("<f4", (count,))
