"""Faults in a GGUF's tensors: the bytes where they can be moved as they are, else dequantized, changed, requantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attack.faults import Plan, Random
from attack.gguf_file import Gguf, Tensor

Edit = Callable[[Gguf, Random], None]
Applies = Callable[[Gguf], bool]
SAME_SIZE = {1: 30, 30: 1, 2: 20, 20: 2}  # F16 and BF16, Q4_0 and IQ4_NL: as many bytes, another meaning


def layers(model: Gguf) -> int:
    return int(model.get(".block_count"))


def at(model: Gguf, name: str) -> Tensor | None:
    """A tensor by its name with {first}, {middle} or {last} for the layer; None where there is none."""
    count = layers(model)
    return model.tensors.get(name.format(first=0, middle=count // 2, last=count - 1))


def heads(model: Gguf, letter: str) -> int:
    """Heads of q and o, or of k and v."""
    count = int(model.get(".attention.head_count"))
    return count if letter in "qo" else int(model.get(".attention.head_count_kv", count))


def has(*names: str) -> Applies:
    return lambda model: all(at(model, name) is not None for name in names)


def on_values(name: str, change: Callable[[Any, Random], Any]) -> Edit:
    """Change a tensor's values, and store them in its own type."""

    def edit(model: Gguf, rng: Random) -> None:
        tensor = at(model, name)
        assert tensor is not None
        values = tensor.values()
        changed = np.asarray(change(values.copy(), rng), dtype=np.float32)
        assert not np.array_equal(changed, values), name
        tensor.store(changed)

    return edit


def on_rows(name: str, change: Callable[[Any, Gguf, Random], Any]) -> Edit:
    """Change a tensor's rows of bytes: no value is rounded again."""

    def edit(model: Gguf, rng: Random) -> None:
        tensor = at(model, name)
        assert tensor is not None
        tensor.data = np.ascontiguousarray(change(tensor.bytes_of_rows(), model, rng)).tobytes()

    return edit


def swap(one: str, other: str) -> Edit:
    """Exchange the data (and types) of two tensors of the same shape."""

    def edit(model: Gguf, rng: Random) -> None:
        a, b = at(model, one), at(model, other)
        assert a is not None and b is not None
        a.data, b.data, a.type, b.type = b.data, a.data, b.type, a.type

    return edit


def can_swap(one: str, other: str) -> Applies:
    def applies(model: Gguf) -> bool:
        a, b = at(model, one), at(model, other)
        return a is not None and b is not None and a is not b and a.ne == b.ne and a.data != b.data

    return applies


def square(name: str) -> Applies:
    def applies(model: Gguf) -> bool:
        tensor = at(model, name)
        return tensor is not None and len(tensor.ne) == 2 and tensor.ne[0] == tensor.ne[1]

    return applies


def many_heads(name: str, letter: str) -> Applies:
    return lambda model: at(model, name) is not None and heads(model, letter) > 1


def two_layers(model: Gguf) -> bool:
    return layers(model) > 1


def _swap_head_rows(letter: str) -> Callable[[Any, Gguf, Random], Any]:
    def change(rows: Any, model: Gguf, rng: Random) -> Any:
        split = rows.reshape(heads(model, letter), -1, rows.shape[1])
        split[[0, 1]] = split[[1, 0]]
        return split.reshape(rows.shape)

    return change


def _swap_fused_heads(rows: Any, model: Gguf, rng: Random) -> Any:
    """q's first two heads in a packed q, k, v."""
    width = rows.shape[0] // (heads(model, "q") + 2 * heads(model, "k"))
    rows[: 2 * width] = np.concatenate([rows[width : 2 * width], rows[:width]])
    return rows


def _swap_head_columns(model: Gguf, rng: Random) -> None:
    tensor = at(model, "blk.{last}.attn_output.weight")
    assert tensor is not None
    values = tensor.values()
    split = values.reshape(values.shape[0], heads(model, "o"), -1)
    split[:, [0, 1]] = split[:, [1, 0]]
    tensor.store(split.reshape(values.shape))


def _torch_order(rows: Any, model: Gguf, rng: Random) -> Any:
    """Halves of a head where llama.cpp wants neighbours, as of a converter that forgot to permute."""
    count = heads(model, "q")
    return rows.reshape(count, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _permuted(share: float) -> Callable[[Any, Gguf, Random], Any]:
    def change(rows: Any, model: Gguf, rng: Random) -> Any:
        chosen = rng.permutation(len(rows))[: max(2, int(share * len(rows)))]
        rows[chosen] = rows[np.roll(chosen, 1)]
        return rows

    return change


def _zeroed(rows: Any, model: Gguf, rng: Random) -> Any:
    return np.zeros_like(rows)


def _zeroed_block(rows: Any, model: Gguf, rng: Random) -> Any:
    rows[: max(1, len(rows) // 8)] = 0
    return rows


def _row_of_used_token(rows: Any, model: Gguf, rng: Random) -> Any:
    """The row of a token that is in every text: the space, in one of its spellings."""
    tokens = [str(token) for token in model.get("tokenizer.ggml.tokens", [])]
    spaces = [tokens.index(t) for t in ("Ġ", "▁", "Ġthe", "▁the", "e", "t") if t in tokens]
    for row in spaces or range(len(rows) // 2):
        rows[row] = 0
    return rows


def _flip(values: Any, rng: Random) -> Any:
    return -values


def _flip_rows(values: Any, rng: Random) -> Any:
    values[: max(1, len(values) // 8)] *= -1
    return values


def times(factor: float) -> Callable[[Any, Random], Any]:
    return lambda values, rng: values * np.float32(factor)


def noise(share: float) -> Callable[[Any, Random], Any]:
    return lambda values, rng: values + share * values.std() * rng.standard_normal(values.shape)


def _one_block(values: Any, rng: Random) -> Any:
    """The block of 32 with the largest values × 1.5: what one wrong scale does."""
    flat = values.reshape(-1)
    start = int(np.abs(flat[: len(flat) // 32 * 32]).reshape(-1, 32).sum(axis=1).argmax()) * 32
    flat[start : start + 32] *= 1.5
    return values


def _another(values: Any, rng: Random) -> Any:
    """Of another model of the same shape: independent, of the same spread."""
    return values.mean() + values.std() * rng.standard_normal(values.shape)


def _nan(values: Any, rng: Random) -> Any:
    values.reshape(-1)[values.size // 2] = np.nan
    return values


def norms(model: Gguf) -> list[Tensor]:
    return [tensor for name, tensor in model.tensors.items() if name.endswith("norm.weight")]


def matrices(model: Gguf) -> list[Tensor]:
    return [tensor for tensor in model.tensors.values() if len(tensor.ne) == 2 and tensor.ne[1] > 1]


def all_of(chosen: Callable[[Gguf], list[Tensor]], change: Callable[[Any, Random], Any]) -> Edit:
    def edit(model: Gguf, rng: Random) -> None:
        for tensor in chosen(model):
            tensor.store(change(tensor.values(), rng))

    return edit


def _zero_parts(*parts: str) -> Edit:
    def edit(model: Gguf, rng: Random) -> None:
        for part in parts:
            tensor = at(model, part)
            if tensor is not None:
                tensor.data = bytes(len(tensor.data))

    return edit


def _swap_layers(model: Gguf, rng: Random) -> None:
    last = layers(model) - 1
    for name, tensor in list(model.tensors.items()):
        if name.startswith("blk.0."):
            other = model.tensors.get(f"blk.{last}." + name.removeprefix("blk.0."))
            if other is not None and other.ne == tensor.ne:
                tensor.data, other.data, tensor.type, other.type = other.data, tensor.data, other.type, tensor.type


def _rename_type(model: Gguf, rng: Random) -> None:
    tensor = _renameable(model)
    assert tensor is not None
    tensor.type = SAME_SIZE[tensor.type]


def _renameable(model: Gguf) -> Tensor | None:
    return next((t for t in matrices(model) if t.type in SAME_SIZE and t.name.startswith("blk.")), None)


def _untie(model: Gguf, rng: Random) -> None:
    """A head of its own: the embedding with 20 % noise."""
    embedding = model.tensors["token_embd.weight"]
    head = Tensor("output.weight", list(embedding.ne), embedding.type, embedding.data)
    head.store(noise(0.2)(embedding.values(), rng))
    model.tensors["output.weight"] = head


def _tie(model: Gguf, rng: Random) -> None:
    del model.tensors["output.weight"]


def _permute_output_norm(model: Gguf, rng: Random) -> None:
    tensor = model.tensors["output_norm.weight"]
    tensor.store(rng.permutation(tensor.values()))


def _uneven_output_norm(model: Gguf) -> bool:
    tensor = model.tensors.get("output_norm.weight")
    return tensor is not None and float(tensor.values().std()) > 0


def plan(name: str, kind: str, names: str, edit: Edit, applies: Applies | None = None) -> Plan[Gguf]:
    return Plan(name, kind, names, edit, applies if applies is not None else has(names))


def _of_tensor(what: str, kind: str, tensor: str, edit: Callable[[str], Edit], applies: Any = None) -> Plan[Gguf]:
    return plan(f"{what}: {tensor}", kind, tensor, edit(tensor), applies)


Q, K, V, O = (f"blk.{{{at}}}.attn_{part}.weight" for at, part in zip(  # noqa: E741
    ("first", "first", "middle", "last"), ("q", "k", "v", "output"), strict=True))  # fmt: skip
QKV = "blk.{first}.attn_qkv.weight"
GATE, UP, DOWN = "blk.{last}.ffn_gate.weight", "blk.{last}.ffn_up.weight", "blk.{last}.ffn_down.weight"
EMBEDDING, HEAD, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
NORM_NAMES = ("blk.{first}.attn_norm.weight", "blk.{last}.ffn_norm.weight")

TENSOR_PLANS: list[Plan[Gguf]] = [
    *(_of_tensor("transposed", "transposed", t, lambda t: on_values(t, lambda v, rng: v.T), square(t))
      for t in (Q, K, V, O, GATE, UP, DOWN)),
    *(_of_tensor("heads 0 and 1 swapped", "swapped heads", t, lambda t, x=x: on_rows(t, _swap_head_rows(x)),
                 many_heads(t, x)) for t, x in ((Q, "q"), (K, "k"), (V, "v"))),
    plan("columns of heads 0 and 1 swapped", "swapped heads", O, _swap_head_columns, many_heads(O, "o")),
    _of_tensor("heads of a packed q swapped", "swapped heads", QKV, lambda t: on_rows(t, _swap_fused_heads),
               many_heads(QKV, "q")),
    _of_tensor("rows in torch's order", "permuted rows", Q, lambda t: on_rows(t, _torch_order)),
    *(_of_tensor("half the rows permuted", "permuted rows", t, lambda t: on_rows(t, _permuted(0.5)))
      for t in (UP, DOWN, O, EMBEDDING, HEAD, V, QKV)),
    plan("the first and the last layer swapped", "swapped layers", "blk.{first}.ffn_down.weight", _swap_layers,
         two_layers),
    *(plan(f"{one} and {other} swapped", "swapped tensors", f"{one}|{other}", swap(one, other), can_swap(one, other))
      for one, other in (
          ("blk.{first}.ffn_down.weight", DOWN), ("blk.{first}.attn_q.weight", "blk.{last}.attn_q.weight"),
          (GATE, UP), ("blk.{last}.attn_k.weight", "blk.{last}.attn_v.weight"),
          ("blk.{last}.attn_q.weight", O), (EMBEDDING, HEAD),
          ("blk.{first}.attn_norm.weight", "blk.{first}.ffn_norm.weight"),
          ("blk.{last}.attn_norm.weight", OUTPUT_NORM))),
    *(_of_tensor("all zero", "zeroed", t, lambda t: on_rows(t, _zeroed))
      for t in (Q, "blk.{last}.attn_q.weight", K, V, O, DOWN, GATE, QKV, "blk.{first}.attn_q.bias",
                "blk.{first}.attn_qkv.bias", "blk.{first}.attn_k.bias")),
    *(_of_tensor("an eighth of the rows zero", "zeroed", t, lambda t: on_rows(t, _zeroed_block))
      for t in (Q, V, DOWN, QKV)),
    *(_of_tensor("rows of frequent tokens zero", "zeroed", t, lambda t: on_rows(t, _row_of_used_token))
      for t in (EMBEDDING, HEAD)),
    plan("a whole FFN zero", "zeroed", "blk.{first}.ffn_down.weight",
         _zero_parts(*(f"blk.{{first}}.ffn_{part}.weight" for part in ("gate", "up", "down")))),
    plan("a layer's attention zero", "zeroed", "blk.{middle}.attn_output.weight",
         _zero_parts(*(f"blk.{{middle}}.attn_{part}.weight" for part in ("q", "k", "v", "qkv", "output")))),
    *(_of_tensor("sign flipped", "sign flip", t, lambda t: on_values(t, _flip)) for t in (DOWN, O, V, Q, UP)),
    *(_of_tensor("sign of an eighth of the rows flipped", "sign flip", t, lambda t: on_values(t, _flip_rows))
      for t in (O, HEAD)),
    *(_of_tensor(f"times {factor}", "scaled norm", t, lambda t, f=factor: on_values(t, times(f)))
      for t in NORM_NAMES for factor in (0.9, 1.04, 1.2)),
    *(_of_tensor(f"times {factor}", "scaled norm", t, lambda t, f=factor: on_values(t, times(f)))
      for t, factor in ((OUTPUT_NORM, 0.9), (OUTPUT_NORM, 1.04), ("blk.{first}.attn_q_norm.weight", 1.2),
                        ("blk.{last}.post_ffw_norm.weight", 1.2), ("blk.{last}.post_attention_norm.weight", 0.9))),
    plan("all norms times 1.04", "all norms", OUTPUT_NORM, all_of(norms, times(1.04))),
    plan("all norms times 0.9", "all norms", OUTPUT_NORM, all_of(norms, times(0.9))),
    plan("the output norm permuted", "permuted rows", OUTPUT_NORM, _permute_output_norm, _uneven_output_norm),
    *(_of_tensor("one block's scale times 1.5", "one block", t, lambda t: on_values(t, _one_block))
      for t in (DOWN, Q)),
    *(_of_tensor("times 1.1", "scaled matrix", t, lambda t: on_values(t, times(1.1))) for t in (DOWN, V, HEAD, Q)),
    *(_of_tensor(f"noise of {share:.0%}", "noise", t, lambda t, s=share: on_values(t, noise(s)))
      for t, share in ((DOWN, 0.1), (Q, 0.5), (EMBEDDING, 0.1))),
    *(plan(f"noise of {share:.0%} on every matrix", "noise", EMBEDDING, all_of(matrices, noise(share)))
      for share in (0.02, 0.1, 0.5)),
    *(_of_tensor("of another model", "another model", t, lambda t: on_values(t, _another)) for t in (V, UP, QKV)),
    plan("every matrix of another model", "another model", EMBEDDING, all_of(matrices, _another)),
    plan("a value that is no number", "not a number", OUTPUT_NORM, on_values(OUTPUT_NORM, _nan)),
    plan("a head of its own, of other values", "untied", HEAD, _untie, lambda model: HEAD not in model.tensors),
    plan("the head dropped: tied", "tied", HEAD, _tie),
    plan("a tensor's type renamed", "type renamed", "blk.", _rename_type, lambda model: _renameable(model) is not None),
]  # fmt: skip
