"""Packed documents: which families keep them apart when positions start again, and that the others are refused."""

from __future__ import annotations

import pytest
import torch
from training_models import model, run
from transformers import AutoConfig, AutoModelForCausalLM

from edgedistill.config.recipe import Teacher
from edgedistill.errors import UserError
from edgedistill.losses.model_parts import final_hidden, require_separate_documents
from edgedistill.teacher.live import live_teacher

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
APART = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "mistral": {**SIZES, "sliding_window": 12},
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
CROSSING = {
    "bloom": {"vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {
        "vocab_size": 64, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 64, "max_position_embeddings": 64,
    },
}  # fmt: skip


def family(name: str, attention: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**APART, **CROSSING}[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", APART)
def test_a_packed_document_gets_the_states_it_has_alone(name, attention):
    made = family(name, attention).train()
    require_separate_documents(made)
    assert made.training
    made.eval()
    lengths = (5, 9, 18)
    ids = torch.randint(0, 64, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(2, 1)
    with torch.no_grad():
        together = final_hidden(made, ids, False, positions).view(2, sum(lengths), -1).split(lengths, dim=1)
        alone = [
            final_hidden(made, part.contiguous(), False).view(2, part.shape[1], -1) for part in ids.split(lengths, 1)
        ]
        crossed = final_hidden(made, ids, False).view(2, sum(lengths), -1).split(lengths, dim=1)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (crossed[2] - alone[2]).abs().max() > 1e-2


@pytest.mark.parametrize("name", CROSSING)
def test_a_family_whose_documents_see_each_other_is_refused(name, tmp_path):
    made = family(name, "eager")
    with pytest.raises(UserError, match=r"eager attention lets a document see the one before it"):
        require_separate_documents(made)
    made.save_pretrained(tmp_path)
    from edgedistill.training.ranks import ranks_here

    asked = {"low_precision": False, "ranks": ranks_here()}
    with pytest.raises(UserError, match="lets a document see the one before it"):
        live_teacher(tmp_path, Teacher(), documents=True, **asked)
    live_teacher(tmp_path, Teacher(), **asked)


def test_the_trainer_asks(tmp_path):
    with pytest.raises(UserError, match="BloomForCausalLM with eager"):
        run(family("bloom", "eager"), tmp_path, attention="documents")
    run(model(), tmp_path / "llama", attention="documents")
