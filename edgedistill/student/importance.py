"""How much each part of a teacher matters on some text: measured activations (Muralidharan et al. 2024, Minitron).

Legend: S sequences of T tokens, H hidden width, F feed-forward width, A query heads, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.student.axes import NormKind

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Norm:
    """A norm, and over which kind of axis it goes: "hidden", or (OLMo 2) "q" or "kv" over all heads."""

    over: str
    kind: NormKind


@dataclass
class Importance:
    """Sums over the sample's tokens; larger is more important.

    `hidden` [H]: |norm outputs| over all norms of the residual stream. `squares` name of a norm → sum of the squares
    of its input channels (of their distance from the mean, for a LayerNorm).
    `ffn` [L, F]: |input of the down projection|. `heads` [L, A]: L2 of a head's output into the output projection.
    """

    norms: dict[str, Norm]
    hidden: Tensor | None = None
    squares: dict[str, Tensor] = field(default_factory=dict)
    ffn: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def measure(
    model: nn.Module,
    sample: Tensor,
    *,
    norms: dict[str, Norm],
    down: dict[int, str],
    output: dict[int, str],
    heads: int,
) -> Importance:
    """Run the sample [S, T] through the model and sum activations.

    `norms` by name; `down`, `output`: layer → name of the module that takes the
    feed-forward's neurons, and of the one that takes the heads' outputs.
    """
    found = Importance(norms)
    modules = dict(model.named_modules())
    hooks = []

    def on_norm(name: str, norm: Norm) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            x = arguments[0].float().flatten(0, -2)
            x = x - x.mean(-1, keepdim=True) if norm.kind.centered else x
            found.squares[name] = found.squares.get(name, 0) + x.square().sum(0)
            if norm.over == "hidden":
                y = out.float().flatten(0, -2).abs().sum(0)
                found.hidden = y if found.hidden is None else found.hidden + y

        return hook

    def on_input(table: dict[int, Tensor], layer: int, by_head: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].float().flatten(0, -2)
            value = x.view(len(x), heads, -1).norm(dim=-1).sum(0) if by_head else x.abs().sum(0)
            table[layer] = table[layer] + value if layer in table else value

        return hook

    for name, norm in norms.items():
        hooks.append(modules[name].register_forward_hook(on_norm(name, norm)))
    for layer, name in down.items():
        hooks.append(modules[name].register_forward_pre_hook(on_input(found.ffn, layer, by_head=False)))
    for layer, name in output.items():
        hooks.append(modules[name].register_forward_pre_hook(on_input(found.heads, layer, by_head=True)))
    try:
        for batch in _batches(sample):
            body(model)(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def layer_damage(model: nn.Module, sample: Tensor, layers: nn.ModuleList) -> list[float]:
    """Rise of the next-token loss (nats a token) on the sample when a layer alone is skipped, layer by layer."""
    base = next_token_loss(model, sample)
    damage = []
    for layer in layers:
        handle = layer.register_forward_hook(_skip, with_kwargs=True)
        try:
            damage.append(next_token_loss(model, sample) - base)
        finally:
            handle.remove()
    return damage


@torch.no_grad()
def next_token_loss(model: nn.Module, sample: Tensor) -> float:
    """Mean cross-entropy of the sample's tokens but the first of each sequence, nats."""
    total, count = 0.0, 0
    for batch in _batches(sample):
        anything: Any = model
        logits = anything(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return total / max(1, count)


def body(model: nn.Module) -> Any:
    return model.get_decoder()  # type: ignore[operator]


def _skip(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
    given = arguments[0] if arguments else named["hidden_states"]
    return (given, *out[1:]) if isinstance(out, tuple) else given


def _batches(sample: Tensor) -> list[Tensor]:
    return list(torch.split(sample, max(1, BATCH_TOKENS // sample.shape[1])))
