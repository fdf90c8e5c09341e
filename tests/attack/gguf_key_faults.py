"""Faults in a GGUF's metadata: vocabularies, special tokens, templates, the numbers that a runtime computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attack.faults import Plan, Random
from attack.gguf_file import FLOAT32, STRING, UINT32, Gguf, Value

TOKENS, TYPES, MERGES, SCORES = (f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "merges", "scores"))
TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL = 1, 3
LLAMA_FILE_TYPE = "general.file_type"
OTHER_TEMPLATE = "{% for message in messages %}### {{ message.role }}: {{ message.content }}\n{% endfor %}"


def given(key: str) -> Callable[[Gguf], bool]:
    return lambda model: model.get(key) is not None


def put(key: str, value: Any, type_: int | None = None) -> Callable[[Gguf, Random], None]:
    """Set a key; `value` may be a function of what is there."""

    def edit(model: Gguf, rng: Random) -> None:
        new = value(model.get(key)) if callable(value) else value
        assert new != model.get(key), key
        model.set(key, new, type_)

    return edit


def drop(key: str) -> Callable[[Gguf, Random], None]:
    def edit(model: Gguf, rng: Random) -> None:
        del model.kv[model.arch + key if key.startswith(".") else key]

    return edit


def changed(key: str, change: Callable[[list[Any], Gguf, Random], None]) -> Callable[[Gguf, Random], None]:
    """Change an array in place."""

    def edit(model: Gguf, rng: Random) -> None:
        before = list(model.get(key))
        change(model.get(key), model, rng)
        assert model.get(key) != before, key

    return edit


def plain_tokens(model: Gguf) -> list[int]:
    """Ids of normal tokens of one visible character or more, the frequent ones of any text first."""
    tokens, types = model.get(TOKENS), model.get(TYPES, [])
    normal = [i for i, t in enumerate(tokens) if (types[i] if types else NORMAL) == NORMAL]
    common = [i for i in normal if tokens[i] in {"e", "t", "a", "o", "n", "i", "h", "s"}]
    return [*common, *(i for i in normal if i not in common)]


def _shift(tokens: list[Any], model: Gguf, rng: Random) -> None:
    """Every normal token's text one id further, as of a converter that counts from one."""
    types = model.get(TYPES, [])
    places = [i for i in range(len(tokens)) if (types[i] if types else NORMAL) == NORMAL]
    texts = [tokens[i] for i in places]
    for place, text in zip(places, texts[-1:] + texts[:-1], strict=True):
        tokens[place] = text


def _swap_tokens(tokens: list[Any], model: Gguf, rng: Random) -> None:
    one, other = plain_tokens(model)[:2]
    tokens[one], tokens[other] = tokens[other], tokens[one]


def _rename_token(tokens: list[Any], model: Gguf, rng: Random) -> None:
    tokens[plain_tokens(model)[-1]] = "ĠxyzzyĠ"


def _reverse(values: list[Any], model: Gguf, rng: Random) -> None:
    values.reverse()


def _swap_first(values: list[Any], model: Gguf, rng: Random) -> None:
    values[0], values[len(values) // 2] = values[len(values) // 2], values[0]


def _drop_half(values: list[Any], model: Gguf, rng: Random) -> None:
    del values[: len(values) // 2 + 1]


def _control_to_normal(types: list[Any], model: Gguf, rng: Random) -> None:
    for place, kind in enumerate(types):
        types[place] = NORMAL if kind == CONTROL else kind


def _normal_to_control(types: list[Any], model: Gguf, rng: Random) -> None:
    for place in plain_tokens(model)[:3]:
        types[place] = CONTROL


def _negate(values: list[Any], model: Gguf, rng: Random) -> None:
    values[:] = [-value for value in values]


def special(which: str) -> str:
    return f"tokenizer.ggml.{which}_token_id"


def _other_id(old: int | None) -> int:
    """The id of a letter."""
    return 70 if old != 70 else 71


def _out_of_range(model: Gguf, rng: Random) -> None:
    model.set(special("eos"), len(model.get(TOKENS)) + 5)


def _rename_arch(model: Gguf, rng: Random) -> None:
    """Everything of one architecture under the name of another that takes the same tensors."""
    old, new = model.arch, ARCHITECTURES[model.arch]
    model.kv = {
        key.replace(f"{old}.", f"{new}.", 1) if key.startswith(f"{old}.") else key: v for key, v in model.kv.items()
    }
    model.set("general.architecture", new)


def _rope_scaling(model: Gguf, rng: Random) -> None:
    model.set(".rope.scaling.type", "linear")
    model.set(".rope.scaling.factor", 2.0)


def _yarn(model: Gguf, rng: Random) -> None:
    model.set(".rope.scaling.type", "yarn")
    model.set(".rope.scaling.factor", 4.0)
    model.set(".rope.scaling.original_context_length", 64, UINT32)


def _add_eot(model: Gguf, rng: Random) -> None:
    model.kv[special("eot")] = Value(UINT32, 70)


def _add_template(model: Gguf, rng: Random) -> None:
    model.kv[TEMPLATE] = Value(STRING, OTHER_TEMPLATE)


def _swap_eos_bos(model: Gguf, rng: Random) -> None:
    bos, eos = model.get(special("bos")), model.get(special("eos"))
    model.set(special("bos"), eos)
    model.set(special("eos"), bos)


def eps_key(model: Gguf) -> str:
    return next(k for k in (".attention.layer_norm_rms_epsilon", ".attention.layer_norm_epsilon")
                if model.get(k) is not None)  # fmt: skip


def _eps(value: float) -> Callable[[Gguf, Random], None]:
    def edit(model: Gguf, rng: Random) -> None:
        assert abs(model.get(eps_key(model)) - value) > 1e-3 * value
        model.set(eps_key(model), value)

    return edit


ARCHITECTURES = {"qwen2": "llama", "llama": "granite", "qwen3": "qwen2", "phi3": "llama"}
ROPE_BASE = ".rope.freq_base"
PRE = "tokenizer.ggml.pre"


def plan(
    name: str, names: str, edit: Callable[[Gguf, Random], None], applies: Any = None, kind: str = ""
) -> Plan[Gguf]:
    return Plan(name, kind or names, names, edit, applies if applies is not None else given(names))


def always(model: Gguf) -> bool:
    return True


def uses_rope(model: Gguf) -> bool:
    return model.arch not in ("gpt2", "bert")


def two_specials(model: Gguf) -> bool:
    bos, eos = model.get(special("bos")), model.get(special("eos"))
    return bos is not None and eos is not None and bos != eos


VOCABULARY: list[Plan[Gguf]] = [
    plan("token ids shifted by one", TOKENS, changed(TOKENS, _shift)),
    plan("two letters' tokens swapped", TOKENS, changed(TOKENS, _swap_tokens)),
    plan("a token's text changed", TOKENS, changed(TOKENS, _rename_token)),
    plan("merges reversed", MERGES, changed(MERGES, _reverse)),
    plan("two merges swapped", MERGES, changed(MERGES, _swap_first)),
    plan("half the merges dropped", MERGES, changed(MERGES, _drop_half)),
    plan("scores negated", SCORES, changed(SCORES, _negate)),
    plan("control tokens are normal ones", TYPES, changed(TYPES, _control_to_normal),
         lambda model: CONTROL in model.get(TYPES, [])),
    plan("letters are control tokens", TYPES, changed(TYPES, _normal_to_control)),
    plan("token types dropped", TYPES, drop(TYPES)),
    plan("the BOS flag flipped", "tokenizer.ggml.add_bos_token", put("tokenizer.ggml.add_bos_token", lambda b: not b)),
    plan("the BOS flag lost", "tokenizer.ggml.add_bos_token", drop("tokenizer.ggml.add_bos_token")),
    plan("an EOS after every text", "tokenizer.ggml.add_eos_token",
         put("tokenizer.ggml.add_eos_token", True), lambda model: not model.get("tokenizer.ggml.add_eos_token")),
    plan("the space prefix flipped", "tokenizer.ggml.add_space_prefix",
         put("tokenizer.ggml.add_space_prefix", lambda b: not b)),
    plan("another pre-tokenizer", PRE, put(PRE, lambda pre: "llama-bpe" if pre != "llama-bpe" else "gpt-2")),
    plan("the default pre-tokenizer", PRE, put(PRE, "default"), lambda model: model.get(PRE, "default") != "default"),
    plan("the pre-tokenizer dropped", PRE, drop(PRE)),
]  # fmt: skip

STOPPING: list[Plan[Gguf]] = [
    *(plan(f"another {which.upper()}", special(which), put(special(which), _other_id))
      for which in ("bos", "eos", "eot", "padding", "unknown")),
    plan("no EOS", special("eos"), drop(special("eos"))),
    plan("no BOS", special("bos"), drop(special("bos"))),
    plan("no EOT", special("eot"), drop(special("eot"))),
    plan("an EOS out of range", special("eos"), _out_of_range),
    plan("BOS and EOS swapped", f"{special('eos')}|{special('bos')}", _swap_eos_bos, two_specials),
    plan("an EOT that is a letter", special("eot"), _add_eot, lambda model: model.get(special("eot")) is None),
    plan("the chat template replaced", TEMPLATE, put(TEMPLATE, OTHER_TEMPLATE)),
    plan("the chat template's end cut off", TEMPLATE, put(TEMPLATE, lambda text: text[: len(text) // 2])),
    plan("the chat template removed", TEMPLATE, drop(TEMPLATE)),
    plan("a chat template added", TEMPLATE, _add_template, lambda model: model.get(TEMPLATE) is None),
]  # fmt: skip

NUMBERS: list[Plan[Gguf]] = [
    *(plan(f"a context of {n}", ".context_length", put(".context_length", n)) for n in (64, 100_000)),
    *(plan(f"a RoPE base of {base:,}", ROPE_BASE, put(ROPE_BASE, float(base), FLOAT32), uses_rope, "rope base")
      for base in (100_000, 10_500, 5_000)),
    plan("the RoPE base dropped", ROPE_BASE, drop(ROPE_BASE), lambda model: model.get(ROPE_BASE, 1e4) != 1e4),
    plan("linear RoPE scaling added", ".rope.scaling.type", _rope_scaling,
         lambda model: uses_rope(model) and not model.get(".rope.scaling.type"), "rope scaling"),
    plan("YaRN added", ".rope.scaling.type", _yarn,
         lambda model: uses_rope(model) and not model.get(".rope.scaling.type"), "rope scaling"),
    plan("RoPE scaling dropped", ".rope.scaling.type", drop(".rope.scaling.type"), kind="rope scaling"),
    plan("another RoPE factor", ".rope.scaling.factor", put(".rope.scaling.factor", lambda f: f * 1.5)),
    plan("half the RoPE dimensions", ".rope.dimension_count", put(".rope.dimension_count", lambda n: n // 2)),
    *(plan(f"an epsilon of {eps}", ".attention.layer_norm", _eps(eps), always, "epsilon") for eps in (1e-3, 1e-2)),
    plan("half the heads", ".attention.head_count", put(".attention.head_count", lambda n: n // 2),
         lambda model: model.get(".attention.head_count") % 2 == 0),
    plan("other KV heads", ".attention.head_count_kv",
         put(".attention.head_count_kv", lambda n: n // 2 if n > 1 else 2)),
    plan("half the key length", ".attention.key_length", put(".attention.key_length", lambda n: n // 2)),
    plan("another scale of attention", ".attention.scale", put(".attention.scale", lambda s: s * 1.5)),
    *(plan(f"another {key}", f".{key}", put(f".{key}", lambda s: s * 1.2))
      for key in ("residual_scale", "embedding_scale", "logit_scale")),
    plan("attention's soft cap × 0.1", ".attn_logit_softcapping", put(".attn_logit_softcapping", lambda c: c / 10)),
    plan("the logits' soft cap × 0.5", ".final_logit_softcapping", put(".final_logit_softcapping", lambda c: c / 2)),
    plan("a sliding window of 8", ".attention.sliding_window", put(".attention.sliding_window", 8)),
    plan("another pattern of sliding windows", ".attention.sliding_window_pattern",
         put(".attention.sliding_window_pattern", lambda p: [not x for x in p] if isinstance(p, list) else p + 1)),
    plan("a layer fewer", ".block_count", put(".block_count", lambda n: n - 1)),
    plan("another width of the FFN", ".feed_forward_length", put(".feed_forward_length", lambda n: n // 2)),
    plan("another file type", LLAMA_FILE_TYPE, put(LLAMA_FILE_TYPE, lambda t: 7 if t != 7 else 2)),
    plan("another name", "general.name", put("general.name", "gpt-5")),
    plan("another architecture, keys renamed", "general.architecture", _rename_arch,
         lambda model: model.arch in ARCHITECTURES),
    plan("an unknown architecture", "general.architecture", put("general.architecture", "llama9")),
    plan("another vocabulary size", ".vocab_size", put(".vocab_size", lambda n: n - 1)),
    plan("attention said to be two-way", ".attention.causal", put(".attention.causal", False),
         lambda model: model.get(".attention.causal") is None),
]  # fmt: skip

# Keys that the model's files say nothing of, and a runtime or a person may heed.
ADDED: dict[str, Any] = {
    special("fim_pre"): 3, special("mask"): 3, special("seperator"): 3, special("cls"): 3,
    "tokenizer.ggml.add_sep_token": True, "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.treat_whitespace_as_suffix": True, "tokenizer.ggml.normalizer.lowercase": True,
    "tokenizer.huggingface.json": "{}", "tokenizer.chat_templates": "tool_use", "general.license": "mit",
    "general.base_model.0.name": "gpt-5", "general.author": "somebody", "adapter.type": "lora",
}  # fmt: skip


def _added(key: str, value: Any) -> Plan[Gguf]:
    def edit(model: Gguf, rng: Random) -> None:
        model.set(key, value)

    return plan(f"{key} added", key, edit, lambda model: model.get(key) is None, "added key")


KEY_PLANS = VOCABULARY + STOPPING + NUMBERS + [_added(key, value) for key, value in ADDED.items()]
