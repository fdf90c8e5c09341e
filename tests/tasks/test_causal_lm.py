"""Packing and scoring windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UserError
from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks, pack, scoring_windows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=12),
    context=st.integers(8, 40),
    stride=st.none() | st.integers(1, 40),
)
def test_every_token_but_the_first_is_scored_once(lengths, context, stride):
    documents = [np.arange(n, dtype=np.int32) + 1000 * k for k, n in enumerate(lengths)]
    windows = scoring_windows(documents, context=context, stride=stride, max_tokens=None)
    scored = [int(t) for w in windows for t in w.ids[1:][w.first :]]
    assert scored == [int(t) for d in documents for t in d[1:]]
    for window in windows:
        assert 2 <= len(window.ids) <= context
        assert window.scored > 0
        assert set(window.ids) <= set(documents[window.document])


def test_stride_gives_every_later_window_context():
    windows = scoring_windows([np.arange(100, dtype=np.int32)], context=20, stride=10, max_tokens=None)
    assert all(w.first >= 9 for w in windows[1:])


def test_max_tokens_keeps_whole_documents_and_at_least_two():
    documents = [np.arange(50, dtype=np.int32)] * 5
    windows = scoring_windows(documents, context=20, stride=None, max_tokens=10)
    assert {w.document for w in windows} == {0, 1}
    windows = scoring_windows(documents, context=20, stride=None, max_tokens=150)
    assert {w.document for w in windows} == {0, 1, 2}


def test_batches_are_a_function_of_the_step():
    data = pack([np.arange(200, dtype=np.int32)], context=9, seed=3, eos=None, bos=None)
    batches = data.batches(4, 0)
    straight = [next(batches).tolist() for _ in range(20)]
    for start in (1, 5, 13):
        later = data.batches(4, start)
        assert [next(later).tolist() for _ in range(20 - start)] == straight[start:]
    flat = [row for batch in straight for row in batch]
    assert sorted(flat[: data.sequences]) == list(range(data.sequences))
    assert flat[: data.sequences] != flat[data.sequences : 2 * data.sequences]


def test_targets_are_the_next_inputs():
    data = pack([np.arange(50, dtype=np.int32)], context=7, seed=0, eos=None, bos=None)
    ids = data.sequence_ids(np.array([0, 2]))
    assert ids.shape == (2, 8)
    assert (ids[:, 1:] == ids[:, :-1] + 1).all()


def test_documents_end_with_eos_where_it_is_not_bos():
    documents = [np.array([7, 1, 2], dtype=np.int32), np.array([7, 3, 4], dtype=np.int32)]
    with_end = pack(documents, context=2, seed=0, eos=9, bos=7).stream
    assert (with_end == 9).sum() == 2
    assert (pack(documents, context=2, seed=0, eos=7, bos=7).stream != 9).all()


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="fewer than one sequence"):
        pack([np.arange(5, dtype=np.int32)], context=10, seed=0, eos=None, bos=None)


def test_real_tokenizer_puts_bos_in_front_and_reads_control_tokens_as_text(test_data):
    tokenizer = TextTokenizer.load(test_data / "weights" / "stories260k-hf")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab) == (1, 2, 512)
    ids = tokenizer.encode(["once upon a time", "</s>"])
    assert ids[0][0] == 1
    assert 2 not in ids[1].tolist()


def test_documents_of_a_block_each_have_their_bos(test_data):
    tokenizer = TextTokenizer.load(test_data / "weights" / "stories260k-hf")
    one, two, three = tokenizer.encode(["once", "upon a time", "there was"])
    blocks = encode_blocks(tokenizer, [["once", "upon a time"], ["there was"]])
    assert blocks[0].tolist() == [*one, *two]
    assert blocks[1].tolist() == three.tolist()
    assert blocks[0].tolist().count(1) == 2
