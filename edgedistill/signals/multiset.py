"""Codec for samples of a teacher's distribution: the multiset of n draws over V tokens, near its entropy bound.

Of a token's sample only which ids were drawn, and how often, matters. Its k distinct ids are a k-subset of V and its
counts a composition of n into k positive parts, that is, a subset of k − 1 cut places among n − 1. Coded as

    k − 1        all tokens' of a sequence first, as a Rice code (Rice and Plaunt 1971) whose parameter r stands before
                 them: the low r bits of each, then the high parts in unary; or plainly, in the fewest bits that hold it
    counts       the rank of the cuts among all C(n−1, k−1), in ⌈log2 C(n−1, k−1)⌉ bits (combinatorial number system)
    ids          the rank of the subset among all C(V, k) where k · C(V, k) < 2^63; else Elias–Fano (Elias 1974, Fano
                 1971): the low l bits of each sorted id, and their high parts in unary

so that a token's length is a function of (n, V, k) alone and all tokens decode side by side. No alignment: a sequence
is one run of bits, the least significant of a word first. Vocabularies of up to 64 rank every subset. Bit by bit, with
an example: docs/signal-cache.md.

Legend: N tokens, n draws, V vocabulary, k distinct ids of a token, K the largest k of a batch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
MAX_DRAWS = 64
MAX_VOCAB = 1 << 20
WORD = 64
TABLED = 2 * MAX_DRAWS  # places whose binomials are looked up: with more, no k in use is above half of them
RICE_BITS = 3  # of a sequence's Rice parameter: k − 1 has at most 6 bits


def k_bits(draws: int, vocab: int) -> int:
    """Bits of k − 1, which is below both draws and vocabulary."""
    return (min(draws, vocab) - 1).bit_length()


def rice_parameter(k: I64, draws: int, vocab: int) -> int:
    """The r that codes a sequence's k [N] in the fewest bits, the smallest of equals; k_bits says "plainly"."""
    return min(range(k_bits(draws, vocab) + 1), key=lambda r: _distinct_bits(k, r, draws, vocab))


def low_bits(vocab: int, k: int) -> int:
    """l of Elias–Fano: ⌊log2(V / k)⌋."""
    return max(0, (vocab // max(1, k)).bit_length() - 1)


@lru_cache(maxsize=64)
def payload_bits(draws: int, vocab: int) -> I64:
    """[draws + 1] bits of a token's counts and ids by its k; index 0 is unused."""
    made = [0] + [_count_bits(draws, k) + _id_bits(vocab, k) for k in range(1, min(draws, vocab) + 1)]
    return np.array(made + [0] * (draws + 1 - len(made)), dtype=np.int64)


def entropy_bound_bits(k: I64, *, draws: int, vocab: int, with_k: bool = True) -> float:
    """Σ log2 C(V, k) + log2 C(n−1, k−1) over tokens: what no code can go below that knows n, V and k alone.

    With `with_k`, plus N·H(k), the empirical entropy of the distinct counts, which any decoder must be told too.
    """
    values, counts = np.unique(k, return_counts=True)
    total = sum(
        int(count) * (_log2_choose(vocab, int(v)) + _log2_choose(draws - 1, int(v) - 1))
        for v, count in zip(values, counts, strict=True)
    )
    if with_k:
        share = counts / counts.sum()
        total += float(-(share * np.log2(share)).sum() * counts.sum())
    return float(total)


def encode(ids: I64, counts: I64, *, draws: int, vocab: int) -> tuple[U64, int]:
    """Words and length in bits of one sequence's N multisets: r, all k, then token after token.

    `ids` [N, K] ascending where `counts` [N, K] is above 0; the used entries stand first. Raises ValueError where
    counts do not sum to `draws` or ids are out of order or range.
    """
    _check(ids, counts, draws, vocab)
    k = (counts > 0).sum(1)
    r = rice_parameter(k, draws, vocab)
    head = RICE_BITS + _distinct_bits(k, r, draws, vocab)
    ends = head + np.cumsum(payload_bits(draws, vocab)[k])
    words = np.zeros(int(ends[-1]) // WORD + 2, dtype=np.uint64)
    words[0] = r
    _put(words, RICE_BITS + np.arange(len(k)) * r, ((k - 1) & ((1 << r) - 1)).astype(np.uint64), np.full(len(k), r))
    if r < k_bits(draws, vocab):
        # unary: a token's one stands after as many zeros as its high part says
        _set(words, RICE_BITS + len(k) * r + np.cumsum((k - 1 >> r) + 1) - 1)
    at = ends - payload_bits(draws, vocab)[k]
    for value in np.unique(k):
        rows, kk = np.flatnonzero(k == value), int(value)
        size = _count_bits(draws, kk)
        cuts = np.cumsum(counts[rows, :kk], axis=1)[:, :-1] - 1
        _put(words, at[rows], _rank(cuts, draws - 1), np.full(len(rows), size))
        begin, chosen = at[rows] + size, ids[rows, :kk]
        if _ranked(vocab, kk):
            _put(words, begin, _rank(chosen, vocab), np.full(len(rows), _id_bits(vocab, kk)))
            continue
        low = low_bits(vocab, kk)
        places = begin[:, None] + np.arange(kk) * low
        _put(words, places.ravel(), (chosen & ((1 << low) - 1)).ravel().astype(np.uint64), np.full(chosen.size, low))
        # unary: the j-th id's one stands at its high part plus j
        _set(words, (begin[:, None] + kk * low + (chosen >> low) + np.arange(kk)).ravel())
    return words[: -(-int(ends[-1]) // WORD)], int(ends[-1])


def decode(words: U64, first_bits: I64, tokens: int, *, draws: int, vocab: int) -> tuple[I64, I64]:
    """ids [N, K] and counts [N, K] (0 where unused) of S sequences of `tokens`, N = S · tokens, K the largest k.

    `first_bits` [S]: where each begins. Raises ValueError where the bits are no such code.
    """
    padded = np.concatenate([words, np.zeros(2, dtype=np.uint64)])
    last = len(words) * WORD
    if (first_bits < 0).any() or (first_bits + RICE_BITS > last).any():
        raise ValueError("a sequence begins outside of its shard")
    heads = [_distinct(padded, int(at), last, tokens, draws, vocab) for at in first_bits]
    k = np.concatenate([each for each, _ in heads])
    sizes = payload_bits(draws, vocab)[k].reshape(-1, tokens)
    starts = (np.array([end for _, end in heads])[:, None] + np.cumsum(sizes, axis=1) - sizes).ravel()
    if (starts + sizes.ravel() > last).any():
        raise ValueError("a sequence ends outside of its shard")
    counts, columns = _decode_counts(padded, starts, k, draws)
    ids = np.zeros_like(counts)
    begin = starts + np.array([0] + [_count_bits(draws, kk) for kk in range(1, draws + 1)])[k]
    coded = np.ones(len(k), dtype=bool)
    for kk in (kk for kk in range(1, min(draws, vocab) + 1) if _ranked(vocab, kk)):
        rows = np.flatnonzero(k == kk)
        coded[rows] = False
        if len(rows):
            ids[rows, :kk] = _unrank(_get(padded, begin[rows], _id_bits(vocab, kk)), vocab, kk)
    rows = np.flatnonzero(coded)
    if len(rows):
        ids[rows] = _elias_fano(padded, begin[rows], k[rows], vocab, columns)
    if (ids >= vocab).any():
        raise ValueError(f"an id of {ids.max()} among {vocab} tokens")
    return ids, counts


def _distinct(words: U64, first: int, last: int, tokens: int, draws: int, vocab: int) -> tuple[I64, int]:
    """k [tokens] of the sequence that begins at bit `first`, and the bit after them; `last` ends the words."""
    r = int(_get(words, np.array([first]), RICE_BITS)[0])
    width, most = k_bits(draws, vocab), min(draws, vocab)
    begin, end = first + RICE_BITS, first + RICE_BITS + tokens * r
    if r > width or end > last:
        raise ValueError(f"distinct ids coded with parameter {r}")
    k = _get(words, begin + np.arange(tokens) * r, r).astype(np.int64) + 1
    if r < width:
        longest = min(last, end + tokens * (1 + (most - 1 >> r)))
        bits = np.unpackbits(words[end >> 6 : (longest + 63) >> 6].view(np.uint8), bitorder="little")
        ones = np.flatnonzero(bits[end & 63 : longest - (end & ~63)])[:tokens]
        if len(ones) < tokens:
            raise ValueError("a sequence's distinct ids end outside of its shard")
        k += np.diff(ones, prepend=-1) - 1 << r
        end += int(ones[-1]) + 1
    if (k > most).any():
        raise ValueError(f"a token has {k.max()} distinct ids of {draws} draws over {vocab} tokens")
    return k, end


def _decode_counts(words: U64, starts: I64, k: I64, draws: int) -> tuple[I64, int]:
    """Counts [N, K]: the cuts are found place by place, for all tokens at once."""
    most = int(k.max(initial=1))
    sizes = np.array([0] + [_count_bits(draws, kk) for kk in range(1, draws + 1)])[k]
    left = _get_many(words, starts, sizes).astype(np.int64)
    table = _binomials(MAX_DRAWS, MAX_DRAWS)
    wanted = k - 1
    edges = np.full((len(k), most + 1), draws - 1, dtype=np.int64)
    edges[:, 0] = -1
    token = np.arange(len(k))
    for place in range(draws - 2, -1, -1):
        value = table[wanted, place]
        taken = (wanted > 0) & (value <= left)
        rows = token[taken]
        edges[rows, wanted[rows]] = place
        left -= np.where(taken, value, 0)
        wanted = wanted - taken
    return np.diff(edges, axis=1), most


def _elias_fano(words: U64, begin: I64, k: I64, vocab: int, columns: int) -> I64:
    """ids [N, columns] of tokens whose low parts begin at bits `begin`."""
    by_k = np.array([0] + [low_bits(vocab, kk) for kk in range(1, columns + 1)])
    low, total = by_k[k], int(k.sum())
    owner = np.repeat(np.arange(len(k)), k)
    column = np.arange(total) - (np.cumsum(k) - k)[owner]
    lows = _get_many(words, (begin[owner] + column * low[owner]), low[owner]).astype(np.int64)
    # the unary parts, 63 bits to a word: all of them unpack in one call
    length = k + (vocab - 1 >> low)
    pieces = -(-int(length.max()) // 63)
    high = np.zeros((len(k), pieces), dtype=np.uint64)
    for piece in range(pieces):
        size = np.clip(length - 63 * piece, 0, 63)
        high[:, piece] = _get_many(words, np.where(size > 0, begin + k * low + 63 * piece, 0), size)
    ones = np.flatnonzero(np.unpackbits(high.view(np.uint8).ravel(), bitorder="little").view(np.bool_))
    if len(ones) != total:
        raise ValueError("a token's ids are damaged")
    offset = ones - owner * (WORD * pieces)
    if (offset < 0).any() or (offset >= WORD * pieces).any():
        raise ValueError("a token's ids are damaged")
    out = np.zeros((len(k), columns), dtype=np.int64)
    out[owner, column] = ((offset - (offset >> 6) - column) << low[owner]) + lows
    return out


def _check(ids: I64, counts: I64, draws: int, vocab: int) -> None:
    if not (1 <= draws <= MAX_DRAWS and 1 <= vocab <= MAX_VOCAB):
        raise ValueError(f"{draws} draws over {vocab} tokens: at most {MAX_DRAWS} over {MAX_VOCAB}")
    used = counts > 0
    if not (counts.sum(1) == draws).all():
        raise ValueError(f"counts of a token sum to {counts.sum(1)[counts.sum(1) != draws][0]}, not {draws}")
    if ((ids < 0) | (ids >= vocab))[used].any():
        raise ValueError(f"an id is outside of 0 … {vocab - 1}")
    if (used[:, 1:] & ~used[:, :-1]).any() or (np.diff(ids, axis=1)[used[:, 1:]] <= 0).any():
        raise ValueError("ids must ascend, used entries first")


def _distinct_bits(k: I64, r: int, draws: int, vocab: int) -> int:
    """Bits of a sequence's k with Rice parameter r."""
    return len(k) * r + (int((k - 1 >> r).sum()) + len(k) if r < k_bits(draws, vocab) else 0)


def _count_bits(draws: int, k: int) -> int:
    return (math.comb(draws - 1, k - 1) - 1).bit_length()


def _ranked(vocab: int, k: int) -> bool:
    return vocab <= MAX_DRAWS or math.comb(vocab, k) * k < 1 << 63


def _id_bits(vocab: int, k: int) -> int:
    if _ranked(vocab, k):
        return max(0, math.comb(vocab, k) - 1).bit_length()
    low = low_bits(vocab, k)
    return k * low + k + ((vocab - 1) >> low)


def _log2_choose(n: int, k: int) -> float:
    return math.log2(math.comb(n, k)) if 0 <= k <= n else 0.0


@lru_cache(maxsize=8)
def _binomials(places: int, most: int) -> I64:
    """[most + 1, places + 1] C(place, j) as int64, clipped where they would not be needed and not fit."""
    table = np.zeros((most + 1, places + 1), dtype=np.int64)
    for j in range(most + 1):
        for place in range(places + 1):
            table[j, place] = min(math.comb(place, j), np.iinfo(np.int64).max)
    return table


def _rank(chosen: I64, places: int) -> U64:
    """Rank of ascending subsets [N, m] of `places`: Σ C(c_j, j + 1)."""
    total = np.zeros(len(chosen), dtype=np.int64)
    for column in range(chosen.shape[1]):
        total += _choose(chosen[:, column], column + 1, places)
    return total.astype(np.uint64)


def _choose(value: I64, j: int, places: int) -> I64:
    if places <= TABLED:
        table: I64 = _binomials(places, min(places, MAX_DRAWS))[j]
        return np.take(table, value)
    made = value
    for i in range(1, j):  # each quotient is whole; the products ascend to j · C(value, j), which fits
        made = made * (value - i) // (i + 1)
    return made


def _unrank(rank: U64, places: int, size: int) -> I64:
    """The ascending subsets [N, size] of the ranks."""
    left = rank.astype(np.int64)
    out = np.zeros((len(rank), size), dtype=np.int64)
    for column in range(size - 1, -1, -1):
        if places <= TABLED:
            table = _binomials(places, min(places, MAX_DRAWS))[column + 1]
            # the table ascends over the places that can stand here
            value = np.searchsorted(table[: places + 1], left, side="right") - 1
        else:
            value = _largest(left, column + 1, places)
        out[:, column] = value
        left = left - _choose(value, column + 1, places)
    return out


def _largest(rank: I64, j: int, places: int) -> I64:
    """The largest c < places with C(c, j) ≤ rank, by bisection."""
    low, high = np.zeros_like(rank), np.full_like(rank, places)
    while (high - low > 1).any():
        middle = (low + high) // 2
        fits = _choose(middle, j, places) <= rank
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low


def _put(words: U64, at: I64, values: U64, sizes: I64) -> None:
    """Or `values` of `sizes` ≤ 63 bits into the run at bits `at`."""
    if not len(at) or not int(sizes.max()):
        return
    word, shift = at >> 6, (at & 63).astype(np.uint64)
    np.bitwise_or.at(words, word, values << shift)
    spills = (shift.astype(np.int64) + sizes) > WORD
    np.bitwise_or.at(words, word[spills] + 1, values[spills] >> (np.uint64(WORD) - shift[spills]))


def _set(words: U64, at: I64) -> None:
    """Set the bits `at`."""
    np.bitwise_or.at(words, at >> 6, np.uint64(1) << (at & 63).astype(np.uint64))


def _get_many(words: U64, at: I64, sizes: I64) -> U64:
    """`_get` with a size for each place."""
    word, shift = at >> 6, (at & 63).astype(np.uint64)
    value = words[word] >> shift
    value |= (words[word + 1] << (np.uint64(63) - shift)) << np.uint64(1)
    kept: U64 = value & ((np.uint64(1) << sizes.astype(np.uint64)) - np.uint64(1))
    return kept


def _get(words: U64, at: I64, size: int) -> U64:
    """`size` ≤ 63 bits from bits `at`. `words` has two spare words at its end."""
    if size == 0:
        return np.zeros(len(at), dtype=np.uint64)
    word, shift = at >> 6, (at & 63).astype(np.uint64)
    value = words[word] >> shift
    # a shift by 64 is undefined: two shifts make it zero
    value |= (words[word + 1] << (np.uint64(63) - shift)) << np.uint64(1)
    kept: U64 = value & ((np.uint64(1) << np.uint64(size)) - np.uint64(1))
    return kept
