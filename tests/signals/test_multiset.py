"""The codec of sampled signals against plain integers, and its cost against the entropy bound."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgedistill.signals import multiset


def tables(draws):
    """ids and counts [N, K] of rows of draws, by a dictionary each."""
    rows = [sorted({int(v): list(row).count(v) for v in row}.items()) for row in draws]
    most = max(len(row) for row in rows)
    ids = np.zeros((len(rows), most), dtype=np.int64)
    counts = np.zeros((len(rows), most), dtype=np.int64)
    for i, row in enumerate(rows):
        for j, (value, count) in enumerate(row):
            ids[i, j], counts[i, j] = value, count
    return ids, counts


def slow_bits(ids, counts, draws, vocab):
    """The same code as one Python integer, field by field, subsets ranked by counting those before them."""

    def rank(chosen):
        return sum(math.comb(c, j + 1) for j, c in enumerate(chosen))

    total, at = 0, 0
    k = [int((row > 0).sum()) for row in counts]
    width = (min(draws, vocab) - 1).bit_length()

    def put(value, size):
        nonlocal total, at
        assert 0 <= value < (1 << size) or (value == 0 and size == 0)
        total |= value << at
        at += size

    def rice(r):
        return [((kk - 1) & ((1 << r) - 1), (kk - 1) >> r) for kk in k]

    costs = [len(k) * r + sum(high + 1 for _, high in rice(r)) for r in range(width)] + [len(k) * width]
    r = costs.index(min(costs))
    put(r, 3)
    for low, _ in rice(r):
        put(low, r)
    for _, high in rice(r) if r < width else []:
        put(1 << high, high + 1)
    for row, kk in enumerate(k):
        cuts = np.cumsum(counts[row, :kk])[:-1] - 1
        put(rank(cuts.tolist()), (math.comb(draws - 1, kk - 1) - 1).bit_length())
        chosen = ids[row, :kk].tolist()
        if vocab <= 64 or math.comb(vocab, kk) * kk < 2**63:
            put(rank(chosen), (math.comb(vocab, kk) - 1).bit_length())
            continue
        low = (vocab // kk).bit_length() - 1
        for value in chosen:
            put(value & ((1 << low) - 1), low)
        unary = sum(1 << ((value >> low) + j) for j, value in enumerate(chosen))
        put(unary, kk + ((vocab - 1) >> low))
    return total, at


@settings(max_examples=120, deadline=None)
@example(seed=0, tokens=1, sequences=3, draws=63, vocab=65, spread=30.0)  # C(65, 46) fits in a word, C(65, 33) does not
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(1, 9), sequences=st.integers(1, 3),
    draws=st.sampled_from([1, 2, 3, 12, 50, 63, 64]),
    vocab=st.sampled_from([1, 2, 5, 63, 64, 65, 70, 100, 128, 129, 4096, 131072, 1 << 20]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
def test_round_trip_and_the_bits_of_the_slow_code(seed, tokens, sequences, draws, vocab, spread):
    rng = np.random.default_rng(seed)
    size = min(vocab, 200)
    support = rng.choice(vocab, size=size, replace=False)
    weights = rng.dirichlet(np.full(size, spread))
    runs, first, used, expected = [], [], 0, []
    for _ in range(sequences):
        ids, counts = tables(support[rng.choice(size, size=(tokens, draws), p=weights)])
        words, bits = multiset.encode(ids, counts, draws=draws, vocab=vocab)
        slow, length = slow_bits(ids, counts, draws, vocab)
        assert bits == length
        assert sum(int(word) << (64 * i) for i, word in enumerate(words)) == slow
        first.append(64 * used)
        used += len(words)
        runs.append(words)
        expected.append((ids, counts))
    got_ids, got_counts = multiset.decode(
        np.concatenate(runs), np.array(first), tokens, draws=draws, vocab=vocab
    )  # fmt: skip
    for number, (ids, counts) in enumerate(expected):
        part = slice(number * tokens, (number + 1) * tokens)
        k = ids.shape[1]
        assert (got_counts[part][:, k:] == 0).all()
        assert (got_counts[part][:, :k] == counts).all()
        assert (got_ids[part][:, :k] * (counts > 0) == ids).all()


def test_ranks_are_the_order_of_subsets():
    for places, size in ((9, 3), (7, 1), (70, 2)):
        subsets = sorted(combinations(range(places), size), key=lambda s: s[::-1])
        array = np.array(subsets, dtype=np.int64)
        ranks = multiset._rank(array, places)
        assert ranks.tolist() == list(range(len(subsets)))
        assert (multiset._unrank(ranks, places, size) == array).all()


@pytest.mark.parametrize("vocab", [4096, 32000, 131072])
@pytest.mark.parametrize("k", [4, 8, 12, 20, 30])
def test_cost_is_near_the_entropy_bound(vocab, k):
    rng = np.random.default_rng(0)
    ids = np.sort(np.stack([rng.choice(vocab, k, replace=False) for _ in range(64)]), axis=1)
    cuts = np.sort(np.stack([rng.choice(49, k - 1, replace=False) for _ in range(64)]), axis=1) + 1
    edges = np.concatenate([np.zeros((64, 1), int), cuts, np.full((64, 1), 50)], axis=1)
    _, bits = multiset.encode(ids, np.diff(edges, axis=1), draws=50, vocab=vocab)
    # k is the same everywhere, so that telling it is all overhead here
    assert bits / multiset.entropy_bound_bits(np.full(64, k), draws=50, vocab=vocab) <= 1.15
    if k == 12:
        assert bits / 64 / 8 <= 40


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([4096, 5000, 32000, 50257, 65537, 128256, 131072, 262144]),
    parts=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 400)), min_size=1, max_size=4),
)
def test_no_mix_of_distinct_counts_costs_much_more_than_the_bound(vocab, parts):
    """Length is a function of the k alone; confident teachers (k of 1 to 3) are where telling k would cost most.

    The 66 bits are a sequence's own: its parameter, and the rest of its last word.
    """
    k = np.repeat([k for k, _ in parts], [count for _, count in parts])
    r = multiset.rice_parameter(k, 50, vocab)
    bits = multiset._distinct_bits(k, r, 50, vocab) + multiset.payload_bits(50, vocab)[k].sum()
    bound = multiset.entropy_bound_bits(k, draws=50, vocab=vocab)
    assert bits <= 1.15 * bound + 66


def test_what_is_no_sample_is_refused():
    ids, counts = np.array([[3, 5]]), np.array([[2, 1]])
    for bad_ids, bad_counts, match in (
        (ids, counts + 1, "sum to 5"), (ids[:, ::-1], counts, "ascend"), (ids + 7, counts, "outside"),
        (ids, np.array([[0, 3]]), "ascend"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            multiset.encode(bad_ids, bad_counts, draws=3, vocab=10)
    words, _ = multiset.encode(ids, counts, draws=3, vocab=10)
    with pytest.raises(ValueError, match="outside"):
        multiset.decode(words, np.array([200]), 1, draws=3, vocab=10)


def test_damaged_bits_do_not_decode_to_something_out_of_range():
    rng = np.random.default_rng(1)
    ids, counts = tables(rng.integers(0, 5000, size=(40, 50)))
    words, _ = multiset.encode(ids, counts, draws=50, vocab=5000)
    for _ in range(50):
        broken = words.copy()
        broken[rng.integers(len(words))] ^= np.uint64(1) << np.uint64(rng.integers(64))
        try:
            got, n = multiset.decode(broken, np.array([0]), 40, draws=50, vocab=5000)
        except ValueError:
            continue
        assert (n.sum(1) == 50).all()
        assert (got >= 0).all()
        assert (got < 5000).all()
