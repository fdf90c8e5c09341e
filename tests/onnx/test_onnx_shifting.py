"""mBART's shift of its input: ours against transformers' own, and put back after a trace."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bart import modeling_bart
from transformers.models.mbart import modeling_mbart
from transformers.models.plbart import modeling_plbart

from edgedistill.onnx.shifting import _shifted, shift_keeps_the_batch

PAD = 1


@pytest.mark.parametrize("module", [modeling_mbart, modeling_plbart])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_is_what_transformers_does(module, batch):
    torch.manual_seed(batch)
    ids = torch.randint(2, 20, (batch, 7))
    for row, length in enumerate(torch.randint(1, 8, (batch,)).tolist()):
        ids[row, length:] = PAD
    found = _shifted(ids, PAD)
    assert found.shape == ids.shape
    assert torch.equal(found, module.shift_tokens_right(ids, PAD))


def test_it_stands_there_while_a_graph_is_traced_and_not_after():
    class Model:
        __module__ = modeling_mbart.__name__

    before = modeling_mbart.shift_tokens_right
    with pytest.raises(RuntimeError, match="within"), shift_keeps_the_batch(Model()):
        assert modeling_mbart.shift_tokens_right is _shifted
        raise RuntimeError("within")
    assert modeling_mbart.shift_tokens_right is before
    Model.__module__ = modeling_bart.__name__  # its own keeps the batch
    before = modeling_bart.shift_tokens_right
    with shift_keeps_the_batch(Model()):
        assert modeling_bart.shift_tokens_right is before
