"""Arrays packed as a whole, held to the `gguf` package's own way."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedistill.gguf.array_writer import ArrayWriter, packed_array

INTEGERS = st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.floats(width=32, allow_nan=False)
ARRAYS = st.one_of(
    st.lists(st.text(max_size=12), min_size=1), st.lists(INTEGERS, min_size=1), st.lists(NUMBERS, min_size=1),
    st.lists(st.booleans(), min_size=1), st.binary(min_size=1), st.lists(st.binary(max_size=4), min_size=1),
    st.lists(st.lists(INTEGERS, min_size=1), min_size=1), st.tuples(INTEGERS, INTEGERS),
)  # fmt: skip


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArrayWriter, GGUFWriter]:
    folder: Path = tmp_path_factory.mktemp("writers")
    return ArrayWriter(folder / "ours.gguf", "llama"), GGUFWriter(folder / "theirs.gguf", "llama")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARRAYS)
def test_the_bytes_are_the_packages(writers: tuple[ArrayWriter, GGUFWriter], values: Any) -> None:
    ours, theirs = (writer._pack_val(values, GGUFValueType.ARRAY, add_vtype=True) for writer in writers)
    assert ours == theirs


@pytest.mark.parametrize("values", [["a", ""], [1, -2], [1.5], b"ab"])
def test_what_a_vocabulary_holds_is_packed_as_a_whole(values: Any) -> None:
    assert packed_array(values) is not None


@pytest.mark.parametrize("values", [[], b"", [1, "a"], [1, 2.5], [1 << 40], ["a", None]])
def test_what_the_package_refuses_is_refused_as_it_does(writers: tuple[ArrayWriter, GGUFWriter], values: Any) -> None:
    said = []
    for writer in writers:
        with pytest.raises((ValueError, struct.error)) as refused:
            writer._pack_val(values, GGUFValueType.ARRAY, add_vtype=True)
        said.append((refused.type, str(refused.value)))
    assert said[0] == said[1]
