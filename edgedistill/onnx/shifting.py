"""mBART's and PLBart's shift of the source to the decoder's input, for a batch of one too. T: tokens, B: batch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shift_keeps_the_batch(model: Any) -> Iterator[None]:
    """While a graph is traced: transformers' own function drops every axis of size one, the batch's as well.

    In torch that is the same for a batch of one; a graph that was traced with more does not run on it.
    """
    module = sys.modules.get(type(model).__module__)
    before = getattr(module, "shift_tokens_right", None)
    if before is None or ".squeeze()" not in inspect.getsource(before):
        yield
        return
    setattr(module, "shift_tokens_right", _shifted)  # noqa: B010  a module's attribute, for a while
    try:
        yield
    finally:
        setattr(module, "shift_tokens_right", before)  # noqa: B010


def _shifted(input_ids_BT: Any, pad_token_id: int) -> Any:
    """The last token that is no padding (the language's) to the front, all others one further, the last one away."""
    ids = input_ids_BT.clone()
    ids.masked_fill_(ids == -100, pad_token_id)
    last = ids.gather(1, (ids.ne(pad_token_id).sum(dim=1) - 1).unsqueeze(-1)).squeeze(-1)
    ids[:, 1:] = ids[:, :-1].clone()
    ids[:, 0] = last
    return ids
