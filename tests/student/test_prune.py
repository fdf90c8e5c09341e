"""Students cut out of their teachers: dead parts go without a trace, importance against loops, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgedistill.errors import UserError
from edgedistill.student import importance, prune
from edgedistill.student.axes import NORMS, Sizes, axes_of, axis_sizes, layer_number, norm_kind, parts_of, sizes_of
from edgedistill.student.importance import layer_damage, next_token_loss
from edgedistill.student.prune import chosen_layers, cut, layers_of, uniform_layers

VOCAB = 96
# Llama's names for sizes; what a family calls otherwise or adds, by family.
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "initializer_range": 0.15, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "smollm3": {"tie_word_embeddings": True},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "helium": {},
    "seed_oss": {},
    "nemotron": {},
    "cohere": {"tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True},
    "gpt2": {"num_key_value_heads": 6, "tie_word_embeddings": True},
}  # fmt: skip
# LayerNorms; families that derive the head size from the hidden size, so that heads go with it.
CENTERED, HEADS_MAKE_WIDTH = ("gpt2", "stablelm", "nemotron", "cohere"), ("gpt2", "stablelm", "helium")
# Families with norms over all heads at once: heads are dead where they add nothing to those either.
HEADS_NORMED = ("olmo2", "olmo3")
SIZES = Sizes(hidden=48, ffn=80, layers=4, heads=6, kv_heads=3, head_dim=8, vocab=VOCAB)
GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip


def teacher(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family; every vector is random too, and eps too small to count."""
    asked = {**COMMON, **FAMILIES[family], **changes}
    if family == "gpt2":
        asked = {GPT2_NAMES.get(name, name): value for name, value in asked.items() if name != "head_dim"}
    config = AutoConfig.for_model(family, **asked)
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"):
        if hasattr(config, name):
            setattr(config, name, 1e-12)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name or "ln_" in name) + 0.2 * torch.randn_like(parameter))
    return model


def sample(seed: int = 3, sequences: int = 30, tokens: int = 20) -> torch.Tensor:
    """Enough tokens for each live neuron of a ReLU (Nemotron) to fire at least once."""
    return torch.randint(0, VOCAB, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def changed(**changes: int) -> Sizes:
    return Sizes(**{**SIZES.__dict__, **changes})


def own_heads(family: str) -> dict[str, int]:
    """GPT-2 has no groups: as many key/value heads as query heads."""
    return {"kv_heads": 6} if family == "gpt2" else {}


def dead(axis: str, count: int, seed: int) -> torch.Tensor:
    """A random choice of parts that die, of as many as the teacher has on that axis."""
    total = {"hidden": 48, "ffn": 80, "group": 3, "query": 6}[axis]
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def rows(model: Any, meaning: str, indices: torch.Tensor, ends: tuple[str, ...], only_layer: int | None = None) -> None:
    """Zero these indices of every axis of that meaning, in parameters whose names have one of the ends."""
    have = sizes_of(model.config)
    lengths = axis_sizes(have)
    for name, parameter in model.named_parameters():
        if not name.endswith(ends) or (only_layer is not None and layer_number(name) != only_layer):
            continue
        for axis, what in enumerate(axes_of(name) or ()):
            start = 0
            for number, part in enumerate(parts_of(what, parameter.shape[axis], have) if what else ()):
                # of a fused q, k, v the values alone: the last part
                fused_values = "+" in what and meaning != "ffn" and number < 2
                if part == meaning and not fused_values:
                    with torch.no_grad():
                        parameter.index_fill_(axis, indices + start, 0.0)
                start += lengths[part]


def kill_neurons(model: Any, layer: int, neurons: torch.Tensor) -> None:
    """Neurons that never fire: nothing comes in."""
    rows(
        model,
        "ffn",
        neurons,
        ("up_proj.weight", "up_proj.bias", "gate_up_proj.weight", "c_fc.weight", "c_fc.bias"),
        layer,
    )


def spread(numbers: torch.Tensor, width: int) -> torch.Tensor:
    return (numbers.unsqueeze(1) * width + torch.arange(width)).flatten()


def kill_groups(model: Any, layer: int, groups: torch.Tensor) -> None:
    """Key/value heads whose values are zero: all their queries read nothing."""
    width = spread(groups, 8)
    if model.config.model_type in HEADS_NORMED:
        rows(model, "kv", width, ("k_proj.weight",), layer)
        rows(model, "q", spread(groups, 16), ("q_proj.weight",), layer)
    meaning = "q" if model.config.model_type == "gpt2" else "kv"
    ends = ("v_proj.weight", "v_proj.bias", "qkv_proj.weight", "c_attn.weight", "c_attn.bias")
    rows(model, meaning, width, ends, layer)


def kill_channels(model: Any, channels: torch.Tensor) -> None:
    """Channels of the residual stream that nothing writes to. Where a norm takes the mean away, all that writes to the
    rest is centred, so that the mean is zero before and after, and the norms' outputs there are not read."""
    writers = ("embed_tokens.weight", "wte.weight", "wpe.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight",
               "down_proj.bias", "c_proj.weight", "c_proj.bias")  # fmt: skip
    rows(model, "hidden", channels, writers)
    family = model.config.model_type
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(NORMS):
                kind = norm_kind(name, module, 48)
                module.weight[channels] = -1.0 if kind.plus_one else 0.0
                if getattr(module, "bias", None) is not None:
                    module.bias[channels] = 0.0
    if family not in CENTERED:
        return
    alive = torch.ones(48, dtype=torch.bool)
    alive[channels] = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(writers):
                axis = (axes_of(name) or ()).index("hidden")
                rest = parameter.index_select(axis, alive.nonzero().flatten())
                shape = [1] * parameter.ndim
                shape[axis] = -1
                parameter -= rest.mean(axis, keepdim=True) * alive.float().view(shape)


def same_logits(model: Any, student: Any) -> None:
    ids = sample(seed=11, tokens=24)
    expected, given = logits(model, ids), logits(student, ids)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    assert float(expected.std()) > 0.01, "logits that say nothing prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_parts_go_without_a_trace(family):
    """Neurons, key/value groups and channels that do nothing are what is cut, and the logits stay."""
    model = teacher(family)
    groups = 2 if family == "gpt2" else 1
    for layer in range(4):
        kill_neurons(model, layer, dead("ffn", 24, seed=layer))
        kill_groups(model, layer, dead("query" if family == "gpt2" else "group", groups, seed=50 + layer))
    channels = dead("hidden", 16, seed=99)
    kill_channels(model, channels)
    before = logits(model, sample())
    heads = {"heads": 4, "kv_heads": 4 if family == "gpt2" else 2}
    student, kept = cut(model, changed(hidden=32, ffn=56, **heads), sample=sample())
    assert sizes_of(student.config) == changed(hidden=32, ffn=56, **heads)
    assert torch.equal(before, logits(model, sample())), "the teacher stays what it was"
    same_logits(model, student)
    assert kept["hidden"] == 32
    assert sum(p.numel() for p in student.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in HEADS_MAKE_WIDTH])
def test_each_width_is_cut_alone(family):
    ffn, heads, hidden = teacher(family), teacher(family), teacher(family)
    for layer in range(4):
        kill_neurons(ffn, layer, dead("ffn", 40, seed=layer))
        kill_groups(heads, layer, dead("group", 2, seed=layer))
    kill_channels(hidden, dead("hidden", 12, seed=5))
    same_logits(ffn, cut(ffn, changed(ffn=40), sample=sample())[0])
    same_logits(heads, cut(heads, changed(heads=2, kv_heads=1), sample=sample())[0])
    same_logits(hidden, cut(hidden, changed(hidden=36), sample=sample())[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["uniform", "first", "last"])
def test_layers_are_kept_bit_for_bit(family, choice):
    """The student is the teacher with the other layers taken out of its stack."""
    model = teacher(family)
    student, kept = cut(model, changed(layers=2, **own_heads(family)), layer_choice=choice)
    wished = {"uniform": [0, 3], "first": [0, 1], "last": [2, 3]}[choice]
    if family == "smollm3":  # its fourth layer has no rotary embedding, which no student's second may lack
        wished = {"uniform": [0, 2], "first": [0, 1], "last": [1, 2]}[choice]
    assert kept["layers"] == wished
    skipped = [layer for number, layer in enumerate(layers_of(model)) if number not in kept["layers"]]
    handles = [
        layer.register_forward_hook(lambda m, given, out: (given[0], *out[1:]) if isinstance(out, tuple) else given[0])
        for layer in skipped
    ]
    expected = logits(model, sample())
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(student, sample()), expected)


def test_the_least_damaging_layers_go():
    model = teacher("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if layer_number(name) in (1, 2) and name.endswith(
                ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
            ):
                parameter.zero_()
    # text that the model itself writes: what it knows, so that every layer that does something helps
    ids = sample()
    for position in range(1, 20):
        drawn = logits(model, ids)[:, position - 1].mul(3).softmax(-1)
        ids[:, position] = torch.multinomial(drawn, 1, generator=torch.Generator().manual_seed(position)).flatten()
    damage = layer_damage(model, ids, layers_of(model))
    assert damage[1:3] == [0.0, 0.0]
    assert min(damage[0], damage[3]) > 0.01
    assert chosen_layers(model, 2, "importance", ids) == [0, 3]
    student, kept = cut(model, changed(layers=2), layer_choice="importance", sample=ids)
    assert kept["layers"] == [0, 3]
    same_logits(model, student)


def test_damage_is_the_rise_of_the_loss_without_the_layer():
    model = teacher("qwen3")
    ids = sample(sequences=4)
    whole = loss_of(model, ids)
    assert next_token_loss(model, ids) == pytest.approx(whole, rel=1e-5)
    damage = layer_damage(model, ids, layers_of(model))
    for layer in range(4):
        without = copy.deepcopy(model)
        del without.model.layers[layer]
        without.config.num_hidden_layers = 3
        assert damage[layer] == pytest.approx(loss_of(without, ids) - whole, abs=1e-5)


def loss_of(model: Any, ids: torch.Tensor) -> float:
    """Mean cross-entropy of all tokens but each sequence's first, token by token."""
    p = logits(model, ids).double().log_softmax(-1)
    values = [-float(p[s, t, ids[s, t + 1]]) for s in range(len(ids)) for t in range(ids.shape[1] - 1)]
    return sum(values) / len(values)


def test_uniform_layers():
    assert uniform_layers(6, 3) == [0, 2, 5]
    assert uniform_layers(6, 1) == [0]
    assert uniform_layers(6, 6) == list(range(6))
    with pytest.raises(UserError, match="a student of 7 layers cannot be cut from a teacher of 6"):
        uniform_layers(6, 7)


def slow_importance(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The definition, token by token and part by part (Muralidharan et al. 2024): sums over the sample of the absolute
    outputs of the norms, of what enters the down projection, and of the length of each head's output."""
    hidden = torch.zeros(48, dtype=torch.float64)
    ffn, heads = torch.zeros(4, 80, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for sequence in ids:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(lambda m, x, y, name=name, seen=seen: seen.update({name: (x[0], y)}))
            for name, module in model.named_modules()
            if name.endswith(("layernorm", "model.norm", "down_proj", "o_proj"))
        ]
        logits(model, sequence[None])
        for handle in handles:
            handle.remove()
        for name, (given, out) in seen.items():
            for token in range(len(sequence)):
                if "norm" in name:
                    hidden += out[0, token].double().abs()
                elif name.endswith("down_proj"):
                    ffn[layer_number(name)] += given[0, token].double().abs()
                else:
                    for head in range(6):
                        heads[layer_number(name), head] += given[0, token, head * 8 : head * 8 + 8].double().norm()
    return {"hidden": hidden, "ffn": ffn, "heads": heads}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_importance_is_its_definition(family, monkeypatch):
    monkeypatch.setattr(importance, "BATCH_TOKENS", 40)  # several batches, the last one short
    model, ids = teacher(family), sample(sequences=5)
    found = prune._measured(model, SIZES, ids)
    expected = slow_importance(model, ids)
    torch.testing.assert_close(found.hidden.double(), expected["hidden"], rtol=1e-4, atol=1e-4)
    for layer in range(4):
        torch.testing.assert_close(found.ffn[layer].double(), expected["ffn"][layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.heads[layer].double(), expected["heads"][layer], rtol=1e-4, atol=1e-4)
    student, _ = cut(model, changed(ffn=30), sample=ids)
    for layer, block in enumerate(layers_of(student)):
        most = sorted(sorted(range(80), key=lambda n, layer=layer: -float(expected["ffn"][layer, n]))[:30])
        assert torch.equal(block.mlp.up_proj.weight, layers_of(model)[layer].mlp.up_proj.weight[most])
        assert torch.equal(block.mlp.down_proj.weight, layers_of(model)[layer].mlp.down_proj.weight[:, most])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (2, 1), (2, 2), (1, 1), (6, 3)])
def test_query_heads_stay_with_their_keys_and_values(heads, kv_heads):
    """The groups that matter most, in each the queries that do, next to each other as they were."""
    model, ids = teacher("llama", attention_bias=False), sample(sequences=5)
    strength = slow_importance(model, ids)["heads"]
    student, _ = cut(model, changed(heads=heads, kv_heads=kv_heads, ffn=79), sample=ids)
    for layer in range(4):
        old, new = layers_of(model)[layer].self_attn, layers_of(student)[layer].self_attn
        by_group = {
            g: sorted([2 * g, 2 * g + 1], key=lambda q: -float(strength[layer, q]))[: heads // kv_heads]
            for g in range(3)
        }
        best = sorted(by_group, key=lambda g: -sum(float(strength[layer, q]) for q in by_group[g]))[:kv_heads]
        for place, group in enumerate(sorted(best)):
            assert torch.equal(new.k_proj.weight[8 * place :][:8], old.k_proj.weight[8 * group :][:8])
            assert torch.equal(new.v_proj.weight[8 * place :][:8], old.v_proj.weight[8 * group :][:8])
            for number, query in enumerate(sorted(by_group[group])):
                here = place * (heads // kv_heads) + number
                assert torch.equal(new.q_proj.weight[8 * here :][:8], old.q_proj.weight[8 * query :][:8])
                assert torch.equal(new.o_proj.weight[:, 8 * here :][:, :8], old.o_proj.weight[:, 8 * query :][:, :8])


def test_phi3_is_cut_as_its_llama_twin():
    """Fused q, k, v and gate, up are cut where the separate ones are."""
    phi = teacher("phi3")
    llama = teacher("llama", attention_bias=False, mlp_bias=False, rms_norm_eps=1e-12)
    state = {}
    for name, value in phi.state_dict().items():
        if name.endswith("qkv_proj.weight"):
            parts = zip(("q_proj", "k_proj", "v_proj"), value.split([48, 24, 24]), strict=True)
        elif name.endswith("gate_up_proj.weight"):
            parts = zip(("gate_proj", "up_proj"), value.chunk(2), strict=True)
        else:
            parts = [(None, value)]
        for own, part in parts:
            state[name if own is None else name.replace("qkv_proj", own).replace("gate_up_proj", own)] = part
    llama.load_state_dict(state)
    wanted = changed(hidden=32, ffn=40, heads=4, kv_heads=2, layers=3)
    same_logits(cut(phi, wanted, sample=sample())[0], cut(llama, wanted, sample=sample())[0])


def test_a_layer_norm_loses_variance_and_not_its_mean():
    """All channels stand on one offset, which the norm takes away: what counts is that half of them vary most."""
    model = teacher("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[:, :24] *= 300.0
        model.transformer.wte.weight += 400.0
    student, _ = cut(model, changed(hidden=24, heads=3, kv_heads=3), sample=sample())
    given = []
    for which in (model, student):
        handle = which.transformer.h[0].ln_1.register_forward_hook(lambda m, x, y: given.append(y))
        logits(which, sample(seed=5))
        handle.remove()
    # the mean over those kept is not quite that over all, so by their spread, not one by one
    assert float(given[1].std() / given[0][..., :24].std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_the_norms_lose_is_made_up_for(family):
    """Half of the channels are loud: their mean square is twice that of all, and the norms give what they gave."""
    model = teacher(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :24] *= 30.0
    student, _ = cut(model, changed(hidden=24), sample=sample())
    given = []
    for which in (model, student):
        norm = which.model.layers[0].input_layernorm
        handle = norm.register_forward_hook(lambda m, x, y: given.append(y))
        logits(which, sample(seed=5))
        handle.remove()
    torch.testing.assert_close(given[1], given[0][..., :24], rtol=0.05, atol=0.02)


def test_nothing_cut_is_a_copy():
    model = teacher("qwen3")
    student, kept = cut(model, SIZES)
    assert kept == {"layers": [0, 1, 2, 3], "layer_choice": "uniform"}
    assert torch.equal(logits(student, sample()), logits(model, sample()))
    with torch.no_grad():
        student.get_input_embeddings().weight.zero_()
        assert float(model.get_input_embeddings().weight.abs().sum()) > 0


def test_a_cut_student_is_what_transformers_loads(tmp_path):
    for family in ("qwen2", "gemma3_text", "phi3", "gpt2"):
        heads = {"heads": 4, "kv_heads": 4 if family == "gpt2" else 2}
        student, _ = cut(teacher(family), changed(hidden=32, ffn=56, layers=3, **heads), sample=sample())
        student.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        assert torch.equal(logits(again, sample()), logits(student, sample()))
        assert sizes_of(again.config) == changed(hidden=32, ffn=56, layers=3, **heads)


def test_layers_keep_their_kind_of_attention():
    model = teacher(
        "gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    )
    student, kept = cut(model, changed(layers=2), layer_choice="last")
    assert kept["layers"] == [2, 3]
    assert student.config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("llama", {"hidden": 64}, "a student with hidden 64 cannot be cut from a teacher's 48"),
        ("llama", {"ffn": 0}, "a student with ffn 0 cannot be cut"),
        ("llama", {"layers": 5}, "layers 5 cannot be cut from a teacher's 4"),
        ("llama", {"kv_heads": 4}, "kv_heads 4 cannot be cut from a teacher's 3"),
        ("llama", {"head_dim": 4}, "head_dim 4 cannot be cut from a teacher's 8"),
        ("llama", {"vocab": 90}, "vocab 90 cannot be cut from a teacher's 96"),
        ("llama", {"heads": 3, "kv_heads": 1}, "3 query heads over 1 key/value heads .* a group may only lose queries"),
        ("llama", {"heads": 5, "kv_heads": 3}, "5 query heads over 3"),
        ("llama", {"hidden": 40, "heads": 3, "kv_heads": 3}, "cannot make a llama .*40.* is not a multiple .* heads"),
        ("stablelm", {"hidden": 32}, "a stablelm of the sizes asked for|transformers cannot make a stablelm"),
        ("gpt2", {"hidden": 32, "kv_heads": 6}, "a gpt2 of the sizes asked for|transformers cannot make a gpt2"),
        ("helium", {"heads": 4, "kv_heads": 2}, r"o_proj.weight \[48, 48\], and the cut gives \[48, 32\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_the_reason(family, wanted, message):
    with pytest.raises(UserError, match=message) as caught:
        cut(teacher(family), changed(**wanted), sample=sample())
    assert caught.value.remedy


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "bloom", "starcoder2", "apertus", "qwen3_moe"])
def test_families_that_the_table_does_not_know_are_refused(family):
    dropped = ("head_dim", "initializer_range", "attention_dropout", "max_position_embeddings")
    asked = {name: value for name, value in COMMON.items() if name not in dropped} | {"pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **asked))
    with pytest.raises(UserError, match=f"a {family} teacher cannot be cut: what the axes of .* mean is not known"):
        cut(model, sizes_of(model.config))


def test_norms_without_weights_and_of_unknown_arithmetic_are_refused():
    config = AutoConfig.for_model("olmo", **{**COMMON, "pad_token_id": 2})
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="its norms have no weights"):
        cut(model, changed(hidden=32), sample=sample())
    student, _ = cut(model, changed(ffn=40), sample=sample())
    assert sizes_of(student.config).ffn == 40
    odd = teacher("llama")

    class Cubic(torch.nn.Module):
        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.pow(3) * self.weight

    odd.model.norm = Cubic(odd.model.norm.weight)
    with pytest.raises(UserError, match=r"what its norm model\.norm \(Cubic\) does is not known"):
        cut(odd, changed(hidden=32), sample=sample())


def test_gpt2_that_scales_attention_by_the_layer_keeps_its_layers():
    model = teacher("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="scales attention by the layer's number"):
        cut(model, changed(layers=2, kv_heads=6))


def test_importance_needs_text():
    with pytest.raises(ValueError, match="a sample is needed"):
        cut(teacher("llama"), changed(ffn=40))


@pytest.mark.parametrize("choice", ["uniform", "first", "last"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_layers_without_rotary_embeddings_stay_in_their_places(choice: str, count: int) -> None:
    """SmolLM 3: llama.cpp leaves the rotary embedding out of every fourth layer, whatever the file says."""
    from types import SimpleNamespace

    rotary = [int((layer + 1) % 4 != 0) for layer in range(12)]
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 8}
    config = SimpleNamespace(model_type="smollm3", num_hidden_layers=12, no_rope_layers=rotary, **sizes)
    kept = chosen_layers(SimpleNamespace(config=config), count, choice, None)  # type: ignore[arg-type]
    assert [rotary[layer] for layer in kept] == rotary[:count]
    assert kept == sorted(set(kept))
