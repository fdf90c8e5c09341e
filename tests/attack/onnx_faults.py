"""Faults planted in a decoder folder of onnxruntime-genai: weights, the graph, its tables, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attack.faults import Fault, Plan, Random, bound
from attack.onnx_folder import CONFIG, DATA, TOKENIZER, Decoder, read, write

Edit = Callable[[Decoder, Random], None]
L0, L1 = "model.layers.{first}", "model.layers.{last}"
QKV, O = f"{L0}.attn.qkv_proj.MatMul.weight", f"{L1}.attn.o_proj.MatMul.weight"  # noqa: E741
GATE, UP, DOWN = (f"{L1}.mlp.{part}_proj.MatMul.weight" for part in ("gate", "up", "down"))
NORM, POST_NORM = f"{L0}.input_layernorm.weight", f"{L1}.post_attention_layernorm.weight"
FINAL_NORM, EMBEDDING, HEAD = "model.layers.{end}.final_norm_layernorm", "model.embed_tokens.weight", "lm_head.MatMul"


def onnx_faults(folder: Path) -> list[Fault]:
    """Every fault that can be planted in this folder."""
    decoder = read(folder)
    numbers = {"first": 0, "last": decoder.layers - 1, "end": decoder.layers}
    found = bound(WEIGHTS + GRAPH_PLANS + TABLES + SETTINGS + TOKENIZER_PLANS, decoder, numbers, _edit)
    found.append(Fault("the last 1,000 bytes of the data are cut off", "truncated", DATA, _cut))
    assert len({fault.name for fault in found}) == len(found)
    return found


def _edit(folder: Path, change: Callable[[Decoder], None]) -> None:
    decoder = read(folder)
    change(decoder)
    write(decoder, folder)


def _cut(folder: Path, rng: Random) -> None:
    with (folder / DATA).open("r+b") as file:
        file.truncate((folder / DATA).stat().st_size - 1000)


def has(*prefixes: str) -> Callable[[Decoder], bool]:
    return lambda decoder: all(decoder.tensor(prefix) is not None for prefix in prefixes)


def plan(name: str, kind: str, names: str, edit: Edit, applies: Any = None) -> Plan[Decoder]:
    return Plan(name, kind, names, edit, applies if applies is not None else has(names))


def on(prefix: str, change: Callable[[Any, Random], Any]) -> Edit:
    """Change the stored values of an initializer: floats, packed nibbles or scales, whatever they are."""

    def edit(decoder: Decoder, rng: Random) -> None:
        tensor = decoder.tensor(prefix)
        values = decoder.read(tensor)
        changed = change(values.copy(), rng)
        assert not np.array_equal(changed, values), tensor.name
        decoder.store(tensor, changed)

    return edit


def is_float(prefix: str) -> Callable[[Decoder], bool]:
    def applies(decoder: Decoder) -> bool:
        tensor = decoder.tensor(prefix)
        return tensor is not None and tensor.data_type in (1, 10)

    return applies


def is_square(prefix: str) -> Callable[[Decoder], bool]:
    def applies(decoder: Decoder) -> bool:
        tensor = decoder.tensor(prefix)
        return is_float(prefix)(decoder) and len(tensor.dims) == 2 and tensor.dims[0] == tensor.dims[1]

    return applies


def times(factor: float) -> Callable[[Any, Random], Any]:
    return lambda values, rng: values * values.dtype.type(factor)


def noise(share: float) -> Callable[[Any, Random], Any]:
    return lambda values, rng: values + (share * values.std() * rng.standard_normal(values.shape)).astype(values.dtype)


def _permute(values: Any, rng: Random) -> Any:
    return rng.permutation(values)


def _zero(values: Any, rng: Random) -> Any:
    # 0x88 is two nibbles of the zero point 8, and 128 that of a byte.
    return np.full_like(values, {"uint8": 0x88}.get(values.dtype.name, 0))


def _swap_heads(first: str) -> Edit:
    """The first two heads of q, k or v in the packed projection: rows of a quantized matrix, columns of a float one."""

    def edit(decoder: Decoder, rng: Random) -> None:
        q, kv, width = decoder.heads
        start = {"q": 0, "k": q, "v": q + kv}[first] * width
        for tensor in list(decoder.model.graph.initializer):
            if not tensor.name.startswith("model.layers.0.attn.qkv_proj.MatMul.weight"):
                continue
            values = decoder.read(tensor)
            rows = (q + 2 * kv) * width
            # zero points may be packed over several rows' blocks in one array without rows of their own
            view = values if values.shape[0] == rows else values.T if values.shape[-1] == rows else None
            view = values.reshape(rows, -1) if view is None else view
            one, two = slice(start, start + width), slice(start + width, start + 2 * width)
            view[one], view[two] = view[two].copy(), view[one].copy()
            decoder.store(tensor, values)

    return edit


def _swap_data(one: str, other: str) -> Edit:
    def edit(decoder: Decoder, rng: Random) -> None:
        a, b = decoder.tensor(one), decoder.tensor(other)
        values, others = decoder.read(a), decoder.read(b)
        decoder.store(a, others)
        decoder.store(b, values)

    return edit


def _can_swap(one: str, other: str) -> Callable[[Decoder], bool]:
    def applies(decoder: Decoder) -> bool:
        a, b = decoder.tensor(one), decoder.tensor(other)
        return (
            a is not None and b is not None and a is not b and list(a.dims) == list(b.dims)
            and not np.array_equal(decoder.read(a), decoder.read(b))
        )  # fmt: skip

    return applies


def _swap_offsets(decoder: Decoder, rng: Random) -> None:
    """Two initializers of one shape name each other's place in the external file."""
    a, b = decoder.tensor(GATE), decoder.tensor(UP)
    places = [next(entry for entry in t.external_data if entry.key == "offset") for t in (a, b)]
    places[0].value, places[1].value = places[1].value, places[0].value


def _all_norms(factor: float) -> Edit:
    def edit(decoder: Decoder, rng: Random) -> None:
        for tensor in decoder.model.graph.initializer:
            if "norm" in tensor.name and tensor.name.endswith("weight"):
                decoder.store(tensor, decoder.read(tensor) * np.float32(factor))

    return edit


def _of_another_model(decoder: Decoder, rng: Random) -> None:
    for tensor in decoder.model.graph.initializer:
        if ".MatMul.weight" in tensor.name and "scale" not in tensor.name:
            decoder.store(tensor, rng.permutation(decoder.read(tensor).reshape(-1)).reshape(tuple(tensor.dims)))


WEIGHTS: list[Plan[Decoder]] = [
    plan("o transposed", "transposed", O, on(O, lambda v, rng: v.T), is_square(O)),
    *(plan(f"{x}'s heads 0 and 1 swapped", "swapped heads", QKV, _swap_heads(x),
           lambda d, x=x: has(QKV)(d) and d.heads[x != "q"] > 1) for x in "qkv"),
    *(plan(f"rows permuted: {t}", "permuted rows", t, on(t, _permute)) for t in (O, DOWN, EMBEDDING, HEAD)),
    *(plan(f"all zero: {t}", "zeroed", t, on(t, _zero)) for t in (QKV, O, DOWN)),
    *(plan(f"sign flipped: {t}", "sign flip", t, on(t, lambda v, rng: -v), is_float(t)) for t in (O, DOWN, UP)),
    *(plan(f"{one} and {other} swapped", "swapped tensors", one, _swap_data(one, other), _can_swap(one, other))
      for one, other in ((GATE, UP), (f"{L0}.mlp.down_proj.MatMul.weight", DOWN),
                         (f"{L0}.attn.qkv_proj.MatMul.weight", f"{L1}.attn.qkv_proj.MatMul.weight"),
                         (NORM, f"{L1}.input_layernorm.weight"))),
    *(plan(f"times {factor}: {t}", "scaled norm", t, on(t, times(factor)))
      for t, factor in ((NORM, 0.9), (NORM, 1.2), (POST_NORM, 1.04), (FINAL_NORM, 0.9))),
    plan("all norms times 1.04", "all norms", FINAL_NORM, _all_norms(1.04)),
    *(plan(f"scales times {factor}: {t}", "scales", f"{t}_scale", on(f"{t}_scale", times(factor)))
      for t, factor in ((QKV, 1.1), (DOWN, 1.1), (O, -1.0))),
    plan("one scale times 2", "one block", f"{DOWN}_scale", on(f"{DOWN}_scale", lambda v, rng: _one_scale(v))),
    plan("zero points moved by one", "zero points", f"{QKV}_zp", on(f"{QKV}_zp", lambda v, rng: v ^ 0x11)),
    plan("packed weights' nibbles exchanged", "packing", UP, on(UP, lambda v, rng: (v << 4) | (v >> 4)),
         lambda d: d.tensor(UP) is not None and d.tensor(UP).data_type == 2),
    plan("noise of 10 %", "noise", DOWN, on(DOWN, noise(0.1)), is_float(DOWN)),
    plan("noise of 5 % on the embedding", "noise", EMBEDDING, on(EMBEDDING, noise(0.05)), is_float(EMBEDDING)),
    plan("every matrix of another model", "another model", QKV, _of_another_model),
    plan("a value that is no number", "not a number", FINAL_NORM,
         on(FINAL_NORM, lambda v, rng: np.where(np.arange(v.size) == 1, np.nan, v).astype(v.dtype))),
    plan("external offsets of gate and up swapped", "offsets", GATE, _swap_offsets, _can_swap(GATE, UP)),
]  # fmt: skip


def _one_scale(values: Any) -> Any:
    values.reshape(-1)[int(np.abs(values).argmax())] *= 2
    return values


def _attribute(op_type: str, name: str, value: Any, part: str = "") -> Edit:
    def edit(decoder: Decoder, rng: Random) -> None:
        for node in decoder.nodes(op_type, part):
            for attribute in node.attribute:
                if attribute.name == name:
                    old = attribute.f if attribute.type == 1 else attribute.i
                    new = value(old) if callable(value) else value
                    assert new != old, name
                    if attribute.type == 1:
                        attribute.f = new
                    else:
                        attribute.i = new

    return edit


def _with_attribute(op_type: str, name: str, value: Any, part: str) -> Callable[[Decoder], bool]:
    def applies(decoder: Decoder) -> bool:
        found = [a for node in decoder.nodes(op_type, part) for a in node.attribute if a.name == name]
        return bool(found) and all(callable(value) or value != (a.f if a.type == 1 else a.i) for a in found)

    return applies


def _swap_inputs(decoder: Decoder, rng: Random) -> None:
    """gate and up read each other's matrix, by the nodes' inputs."""
    one, other = (
        next(n for n in decoder.model.graph.node if n.op_type.startswith("MatMul") and f".{0}/mlp/{part}" in n.name)
        for part in ("gate_proj", "up_proj")
    )
    for place in range(1, len(one.input)):
        one.input[place], other.input[place] = other.input[place], one.input[place]


def _drop_residual(decoder: Decoder, rng: Random) -> None:
    """A layer's residual left out: the skip is the branch itself, minus nothing."""
    node = decoder.nodes("SkipSimplifiedLayerNormalization", "layers.0/post_attention")[0]
    node.input[0] = node.input[1]


def _bypass(decoder: Decoder, rng: Random) -> None:
    """The activation left out: silu(x) = x · sigmoid(x) becomes x · x."""
    sigmoid = decoder.nodes("Sigmoid")[0]
    multiply = next(n for n in decoder.model.graph.node if sigmoid.output[0] in n.input)
    multiply.input[list(multiply.input).index(sigmoid.output[0])] = sigmoid.input[0]


def _attentions(decoder: Decoder) -> Any:
    return decoder.nodes(GQA)[:2]


def _swap_presents(decoder: Decoder, rng: Random) -> None:
    """A layer's key leaves as its value: nothing that reads a whole text at once shows it."""
    node = _attentions(decoder)[0]
    node.output[1], node.output[2] = node.output[2], node.output[1]


def _swap_pasts(decoder: Decoder, rng: Random) -> None:
    one, other = _attentions(decoder)
    one.input[3], other.input[3] = other.input[3], one.input[3]


def _swap_layers_presents(decoder: Decoder, rng: Random) -> None:
    one, other = _attentions(decoder)
    one.output[1], other.output[1] = other.output[1], one.output[1]


def _two_layers(decoder: Decoder) -> bool:
    return len(_attentions(decoder)) == 2


def _swap_cache_names(decoder: Decoder, rng: Random) -> None:
    outputs = decoder.config["model"]["decoder"]["outputs"]
    key, value = outputs["present_key_names"], outputs["present_value_names"]
    outputs["present_key_names"], outputs["present_value_names"] = value, key


GQA, SKIP, NORMALIZE = "GroupQueryAttention", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"
NODE_NAMES = {GQA: GQA, SKIP: "SkipLayerNorm", NORMALIZE: "input_layernorm"}


def attribute(name: str, op_type: str, key: str, value: Any, part: str = "") -> Plan[Decoder]:
    return plan(name, f"attribute {key}", NODE_NAMES[op_type], _attribute(op_type, key, value, part),
                _with_attribute(op_type, key, value, part))  # fmt: skip


GRAPH_PLANS: list[Plan[Decoder]] = [
    attribute("every epsilon 1e-3", SKIP, "epsilon", 1e-3),
    attribute("the first norm's epsilon 0.1", NORMALIZE, "epsilon", 0.1, "layers.0/input_layernorm"),
    attribute("rotary interleaved", GQA, "rotary_interleaved", 1),
    attribute("no rotation", GQA, "do_rotary", 0),
    attribute("attention's scale × 1.5", GQA, "scale", lambda s: s * 1.5),
    attribute("a soft cap of 1", GQA, "softcap", 1.0),
    attribute("a local window of 8", GQA, "local_window_size", 8),
    attribute("half the heads", GQA, "num_heads", lambda n: n // 2),
    attribute("other KV heads", GQA, "kv_num_heads", lambda n: n // 2 if n > 1 else 2),
    attribute("a layer's scale × 0.8", GQA, "scale", lambda s: s * 0.8, "layers.{last}"),
    plan("gate and up read each other's matrix", "node inputs", "mlp/gate_proj", _swap_inputs,
         lambda d: any("/mlp/gate_proj" in n.name for n in d.model.graph.node)),
    plan("a residual left out", "residual", "post_attention_layernorm", _drop_residual,
         lambda d: bool(d.nodes(SKIP, "layers.0/post_attention"))),
    plan("present key and value of a layer swapped", "cache", f"{GQA}|present", _swap_presents, _two_layers),
    plan("past keys of two layers swapped", "cache", f"{GQA}|present", _swap_pasts, _two_layers),
    plan("present keys of two layers swapped", "cache", f"{GQA}|present", _swap_layers_presents, _two_layers),
    plan("caches named the other way round", "cache", "present_key_names|present", _swap_cache_names, _two_layers),
    plan("the activation without its sigmoid", "activation", "act_fn", _bypass, lambda d: bool(d.nodes("Sigmoid"))),
]  # fmt: skip


def _rope_tables(base: float) -> Edit:
    """cos and sin of another base, as a builder that reads the wrong key writes them."""

    def edit(decoder: Decoder, rng: Random) -> None:
        for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
            tensor = decoder.tensor(name)
            positions, half = tensor.dims
            angles = np.outer(np.arange(positions), base ** (-np.arange(half) / half))
            decoder.store(tensor, function(angles))

    return edit


TABLES: list[Plan[Decoder]] = [
    *(plan(f"a RoPE base of {base:,}", "rope base", "cos_cache", _rope_tables(float(base)), has("cos_cache"))
      for base in (100_000, 10_500)),
    plan("cos and sin swapped", "cos and sin", "cos_cache", _swap_data("cos_cache", "sin_cache"), has("cos_cache")),
    plan("the sine's sign flipped", "cos and sin", "sin_cache", on("sin_cache", lambda v, rng: -v), has("sin_cache")),
    plan("the tables one position late", "cos and sin", "cos_cache", on("cos_cache", lambda v, rng: np.roll(v, 1, 0)),
         has("cos_cache")),
]  # fmt: skip


def setting(path: str, value: Any, shown: str = "") -> Plan[Decoder]:
    """A value of genai_config.json; `value` may be a function of the old one, None removes the key."""
    *parents, key = path.split(".")

    def parent(decoder: Decoder) -> dict[str, Any]:
        node = decoder.config
        for part in parents:
            node = node[part]
        return node

    def edit(decoder: Decoder, rng: Random) -> None:
        node = parent(decoder)
        new = value(node.get(key)) if callable(value) else value
        assert new != node.get(key), path
        if new is None:
            del node[key]
        else:
            node[key] = new

    shown = shown or ("removed" if value is None else "changed" if callable(value) else json.dumps(value))
    return Plan(f"{path}: {shown}", f"{CONFIG}: {path}", path, edit, lambda d: key in parent(d))


SETTINGS: list[Plan[Decoder]] = [
    setting("model.context_length", 64),
    setting("model.context_length", 100_000),
    setting("model.eos_token_id", lambda old: 70 if old != 70 else 71),
    setting("model.eos_token_id", lambda old: [*(old if isinstance(old, list) else [old]), 75], "one more"),
    setting("model.eos_token_id", None),
    setting("model.eos_token_id", 10**6),
    setting("model.bos_token_id", lambda old: 70 if old != 70 else 71),
    setting("model.pad_token_id", lambda old: 70 if old != 70 else 71),
    setting("model.vocab_size", lambda old: old - 1),
    setting("model.type", "gemma"),
    setting("model.decoder.head_size", lambda old: old // 2),
    setting("model.decoder.num_key_value_heads", lambda old: old * 2),
    setting("model.decoder.num_hidden_layers", lambda old: old - 1),
    setting("search.max_length", 3),
    setting("search.repetition_penalty", 9.0),
    setting("search.temperature", 0.1),
    setting("search.do_sample", True),
    setting("search.top_k", 1),
    setting("search.min_length", 50),
    setting("search.no_repeat_ngram_size", 2),
]


def _tokens(change: Callable[[dict[str, Any], Random], None]) -> Edit:
    def edit(decoder: Decoder, rng: Random) -> None:
        before = json.dumps(decoder.tokenizer)
        change(decoder.tokenizer, rng)
        assert json.dumps(decoder.tokenizer) != before

    return edit


def _plain(tokenizer: dict[str, Any]) -> list[str]:
    added = {entry["content"] for entry in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer["model"]["vocab"]
    common = [t for t in ("e", "t", "a", "o", "n") if t in vocabulary and t not in added]
    return common + [t for t in vocabulary if t not in added and t not in common]


def _shift(tokenizer: dict[str, Any], rng: Random) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    names = sorted(_plain(tokenizer), key=vocabulary.__getitem__)
    ids = [vocabulary[name] for name in names]
    for name, place in zip(names, ids[1:] + ids[:1], strict=True):
        vocabulary[name] = place


def _swap_two(tokenizer: dict[str, Any], rng: Random) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    one, other = _plain(tokenizer)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def _reverse_merges(tokenizer: dict[str, Any], rng: Random) -> None:
    tokenizer["model"]["merges"].reverse()


def _drop_merges(tokenizer: dict[str, Any], rng: Random) -> None:
    del tokenizer["model"]["merges"][: len(tokenizer["model"]["merges"]) // 2 + 1]


def _is_bpe(decoder: Decoder) -> bool:
    model = decoder.tokenizer["model"]
    return isinstance(model.get("vocab"), dict) and bool(model.get("merges"))


def _template(decoder: Decoder, rng: Random) -> None:
    tree = json.loads(decoder.files["tokenizer_config.json"])
    tree["chat_template"] = "{% for m in messages %}#{{ m.content }}{% endfor %}"
    decoder.files["tokenizer_config.json"] = json.dumps(tree)
    if "chat_template.jinja" in decoder.files:
        decoder.files["chat_template.jinja"] = tree["chat_template"]


def _empty_tokenizer(decoder: Decoder, rng: Random) -> None:
    decoder.tokenizer.clear()


def _no_post_processor(tokenizer: dict[str, Any], rng: Random) -> None:
    tokenizer["post_processor"] = None


def tokens(name: str, names: str, change: Any, applies: Any = _is_bpe) -> Plan[Decoder]:
    return Plan(name, f"tokenizer {names}", TOKENIZER, _tokens(change), applies)


TOKENIZER_PLANS: list[Plan[Decoder]] = [
    tokens("token ids shifted by one", "vocab", _shift),
    tokens("two letters' tokens swapped", "vocab", _swap_two),
    tokens("merges reversed", "merges", _reverse_merges),
    tokens("half the merges dropped", "merges", _drop_merges),
    tokens("no post-processor: the BOS lost", "post_processor", _no_post_processor,
           lambda d: bool(d.tokenizer.get("post_processor"))),
    tokens("no added tokens", "added_tokens", lambda t, rng: t["added_tokens"].clear(),
           lambda d: bool(d.tokenizer.get("added_tokens"))),
    Plan("an empty tokenizer", "tokenizer", TOKENIZER, _empty_tokenizer, lambda d: True),
    Plan("the chat template replaced", "template", "chat_template|tokenizer_config.json", _template,
         lambda d: "tokenizer_config.json" in d.files),
]  # fmt: skip
