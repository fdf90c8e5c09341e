"""Designs a student: a smaller decoder in its teacher's proportions.

The rule, exactly:

1. The budget is `floor(teacher.parameters / compression)`, or `max_parameters` where that is less.
2. Depth is kept before width. Depths are tried from the teacher's downwards; at each, every width from
   `width_multiple` to the teacher's, in steps of `width_multiple`; the largest student within the budget is
   that depth's best. The first depth whose best uses at least FILL (80 %) of the budget is taken; where none
   does, the best that uses most of it, the deeper one where two are equal. Depths below half the teacher's
   are looked at only where nothing deeper fits. So a layer is given up only where keeping it would leave more
   than a fifth of the budget unused, and more than half of them only where no width can shrink further.
3. The feed-forward width keeps the teacher's ratio to the hidden width, rounded to a multiple of
   `width_multiple`, down or up (both are candidates where the ratio is not whole).
4. Attention keeps the teacher's ratio of query width to hidden width, its head size and its grouping (query
   heads a key/value head), with the query width within an eighth of the exact ratio and a multiple of
   `width_multiple`. Where no whole number of groups of that head size does so, halves of it are tried, down
   to 32; then the head size is kept, heads are rounded, and the grouping is the nearest that divides.
   In Llama and Gemma models the heads always divide the hidden width: transformers refuses others. In GPT-2, OLMo 2
   and StableLM they make it up as a whole.
5. Vocabulary, positions, family, biases and norms are the teacher's. Embeddings are tied as the teacher's, but where
   no untied student fits, tied ones are tried before giving up (not where llama.cpp runs none: OLMo 2, StableLM).
6. Sizes that the user asks for are taken as they are; multiples, proportions and the teacher's size do not bind
   them, the budget does.
7. A student that is cut out of its teacher (`from_teacher`) has no width above the teacher's, its head size, at most
   its queries a key/value head, and its embedding tied or not as there. At the teacher's own width nothing is rounded.
   With "width" the depth is the teacher's, and the feed-forward ratio may fall to half of the teacher's: neurons are
   what a teacher misses least. With "layers" every width is the teacher's.

More compression never gives more parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from edgedistill.config.recipe import ShapeAsk
from edgedistill.errors import UserError
from edgedistill.models.families import DECODERS, Family
from edgedistill.records.shape import Shape

FILL = 0.8
MOST_QUERY_ERROR = 1 / 8
MIN_HALVED_HEAD_DIM = 32
Cut = Literal["layers", "width", "both"]
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def design_student(
    teacher: Shape,
    *,
    compression: float,
    ask: ShapeAsk | None = None,
    width_multiple: int,
    max_parameters: int | None = None,
    from_teacher: Cut | None = None,
) -> Shape:
    """The student's shape by the rule above; deterministic, and never above the budget.

    `compression` is teacher's parameters / student's, at least. Raises UserError where nothing fits, saying by
    how much the smallest possible student is too large and what would fit, and for asks that contradict themselves.
    """
    ask = ask or ShapeAsk()
    if compression < 1:
        raise UserError(f"compression is {compression:g}", "it is 1 or more: teacher's parameters / student's")
    if width_multiple < 1:
        raise UserError(f"width_multiple is {width_multiple}", "use 256 for K-quants, 32 otherwise")
    _refuse_contradictions(teacher, ask)
    if from_teacher is not None:
        ask = _cut_ask(teacher, ask, from_teacher)
    by_compression = int(teacher.parameters / compression)
    budget = by_compression if max_parameters is None else min(by_compression, max_parameters)
    deepest = ask.num_hidden_layers or teacher.num_hidden_layers
    may_tie = from_teacher is None and not family_of(teacher).needs_head
    for tied in dict.fromkeys((teacher.tie_word_embeddings, teacher.tie_word_embeddings or may_tie)):
        blocks = list(_single_layer_shapes(teacher, ask, width_multiple, tied, from_teacher))
        if not blocks:
            raise _no_width(teacher, ask, width_multiple, from_teacher)
        shallowest = deepest if ask.num_hidden_layers else 1
        best = _choose(blocks, deepest, shallowest, budget)
        if best is not None:
            return best
    smallest = min((_with_depth(block, shallowest) for block in blocks), key=lambda shape: shape.parameters)
    raise _nothing_fits(teacher, smallest, budget, compression, by_compression, ask, from_teacher)


def fill_of(student: Shape, budget: int) -> float:
    """Share of the budget that a student uses."""
    return student.parameters / budget if budget > 0 else 0.0


def _choose(blocks: list[Shape], deepest: int, shallowest: int, budget: int) -> Shape | None:
    half = max(shallowest, (deepest + 1) // 2)
    counted = [(block.parameters, block.layer_parameters, block) for block in blocks]
    for depths in (range(deepest, half - 1, -1), range(half - 1, shallowest - 1, -1)):
        most: tuple[int, Shape, int] | None = None
        for depth in depths:
            sized = ((one + (depth - 1) * layer, block) for one, layer, block in counted)
            fitting = [(parameters, block) for parameters, block in sized if parameters <= budget]
            if not fitting:
                continue
            parameters, block = max(fitting, key=lambda pair: pair[0])
            if parameters >= FILL * budget:
                return _with_depth(block, depth)
            if most is None or parameters > most[0]:
                most = (parameters, block, depth)
        if most is not None:
            return _with_depth(most[1], most[2])
    return None


def _with_depth(block: Shape, depth: int) -> Shape:
    return block.model_copy(update={"num_hidden_layers": depth})


def _single_layer_shapes(teacher: Shape, ask: ShapeAsk, multiple: int, tied: bool, cut: Cut | None) -> Iterator[Shape]:
    """Every candidate of one layer: widths ascending, both roundings of the feed-forward width."""
    if ask.hidden_size is not None:
        widths = [ask.hidden_size]
    else:
        widths = list(range(multiple, teacher.hidden_size + 1, multiple))
        if cut is not None and teacher.hidden_size % multiple:
            widths.append(teacher.hidden_size)
        if not widths:
            raise UserError(
                f"the teacher's hidden size {teacher.hidden_size} is below the width multiple {multiple}",
                f"use a smaller multiple (32), or fix student.shape.hidden_size (at most {teacher.hidden_size})",
            )
    for width in widths:
        choose = _attention if cut is None else _cut_attention
        attention = choose(teacher, ask, width, multiple)
        if attention is None:
            continue
        heads, kv_heads, head_dim = attention
        for feed_forward in _feed_forward_widths(teacher, ask, width, multiple, cut):
            yield teacher.model_copy(
                update={
                    "hidden_size": width,
                    "intermediate_size": feed_forward,
                    "num_hidden_layers": 1,
                    "num_attention_heads": heads,
                    "num_key_value_heads": kv_heads,
                    "head_dim": head_dim,
                    "tie_word_embeddings": tied,
                }
            )


def _feed_forward_widths(teacher: Shape, ask: ShapeAsk, width: int, multiple: int, cut: Cut | None) -> list[int]:
    if ask.intermediate_size is not None:
        return [ask.intermediate_size]
    # Whole-number arithmetic: width * ratio / multiple, rounded down and up.
    below = width * teacher.intermediate_size // (teacher.hidden_size * multiple) * multiple
    exact = below * teacher.hidden_size == width * teacher.intermediate_size
    widths = [max(below, multiple)] if exact or below == 0 else [below, below + multiple]
    if cut is None:
        return widths
    most = teacher.intermediate_size
    if width == teacher.hidden_size:
        widths = [most]
    if cut == "width":
        half = width * most // (2 * teacher.hidden_size)
        widths = [*range(-(-half // multiple) * multiple, widths[0], multiple), *widths]
    return [feed_forward for feed_forward in widths if feed_forward <= most]


def _attention(teacher: Shape, ask: ShapeAsk, width: int, multiple: int) -> tuple[int, int, int] | None:
    """Query heads, key/value heads, head size for a hidden width; None where the asks leave none."""
    fit = family_of(teacher).heads
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    query_width = width * teacher.num_attention_heads * teacher.head_dim / teacher.hidden_size
    if ask.num_attention_heads is not None:
        heads = ask.num_attention_heads
        head_dim = ask.head_dim or _even_head_dim(query_width / heads, teacher.head_dim)
        if not heads_fit(fit, width, heads, head_dim):
            return None
        return heads, ask.num_key_value_heads or _divisor_near(heads, heads / group), head_dim
    # Heads come in whole groups: as many as share a key/value head, or as many as key/value heads are asked for.
    unit = ask.num_key_value_heads or group
    sizes = [ask.head_dim] if ask.head_dim is not None else _head_dims(teacher.head_dim)
    for head_dim in sizes:
        heads = unit * int(query_width / (head_dim * unit) + 0.5)
        near = abs(heads * head_dim - query_width) <= MOST_QUERY_ERROR * query_width
        whole = heads > 0 and (heads * head_dim) % multiple == 0
        if whole and near and heads_fit(fit, width, heads, head_dim):
            return heads, ask.num_key_value_heads or heads // group, head_dim
    head_dim, step = sizes[0], ask.num_key_value_heads or 1
    exact = query_width / head_dim
    possible = [n for n in range(step, int(2 * exact) + step + 1, step) if heads_fit(fit, width, n, head_dim)]
    if not possible:
        return None
    heads = min(possible, key=lambda n: (abs(n - exact), n))
    return heads, ask.num_key_value_heads or _divisor_near(heads, heads / group), head_dim


def _cut_attention(teacher: Shape, ask: ShapeAsk, width: int, multiple: int) -> tuple[int, int, int] | None:
    """As `_attention`, of heads that can be cut: the teacher's size, no more of them, no larger groups."""
    size, most = teacher.head_dim, teacher.num_attention_heads
    group = most // teacher.num_key_value_heads
    exact = width * most / teacher.hidden_size
    fit = family_of(teacher).heads
    possible = [
        (heads, kv_heads)
        for heads in ([ask.num_attention_heads] if ask.num_attention_heads else range(1, most + 1))
        for kv_heads in ([ask.num_key_value_heads] if ask.num_key_value_heads else range(1, heads + 1))
        if heads % kv_heads == 0 and heads // kv_heads <= group and kv_heads <= teacher.num_key_value_heads
        and heads_fit(fit, width, heads, size)
    ]  # fmt: skip
    if not possible:
        return None

    def badness(pair: tuple[int, int]) -> tuple[bool, float, float]:
        heads, kv_heads = pair
        near = abs(heads - exact) <= MOST_QUERY_ERROR * exact
        return not (near and heads * size % multiple == 0), abs(heads - exact), group - heads / kv_heads

    return (*min(possible, key=badness), size)


def _cut_ask(teacher: Shape, ask: ShapeAsk, cut: Cut) -> ShapeAsk:
    """What a cut leaves open, the rest fixed. UserError for sizes that no cut gives."""
    asked = ask.model_dump(exclude_none=True)
    for name, value in asked.items():
        most = getattr(teacher, name)
        fixed = name == "head_dim" or name in (WIDTHS if cut == "layers" else ["num_hidden_layers"] * (cut == "width"))
        if value > most or (fixed and value != most):
            raise UserError(
                f"student.shape.{name} is {value}, and a student whose start is {cut} has"
                f" {'the' if fixed else 'at most the'} teacher's {most}",
                f"leave student.shape.{name} open, or set student.start=fresh",
            )
    heads, kv_heads = ask.num_attention_heads, ask.num_key_value_heads
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    if heads is not None and kv_heads is not None and heads // kv_heads > group:
        raise UserError(
            f"student.shape: {heads} heads over {kv_heads} key/value heads, and the teacher has {group} a key/value"
            " head: a cut cannot give it more",
            f"ask for at least {-(-heads // group)} key/value heads, or set student.start=fresh",
        )
    fixed_sizes = {"layers": WIDTHS, "width": ("num_hidden_layers", "head_dim"), "both": ("head_dim",)}[cut]
    return ShapeAsk(**{**asked, **{name: getattr(teacher, name) for name in fixed_sizes}})


def family_of(shape: Shape) -> Family:
    return DECODERS[shape.family]


def heads_fit(fit: str, hidden_size: int, heads: int, head_dim: int) -> bool:
    """Whether a family takes so many heads of that size (`Family.heads`): Llama's divide the hidden size, whatever
    head_dim is, GPT-2's make it up."""
    return heads * head_dim == hidden_size if fit == "whole" else fit == "any" or hidden_size % heads == 0


def _head_dims(head_dim: int) -> list[int]:
    sizes = [head_dim]
    while sizes[-1] % 4 == 0 and sizes[-1] // 2 >= MIN_HALVED_HEAD_DIM:
        sizes.append(sizes[-1] // 2)
    return sizes


def _even_head_dim(exact: float, otherwise: int) -> int:
    """Rotary embeddings turn pairs: an even whole number, or the teacher's head size."""
    return int(exact) if exact >= 2 and exact == int(exact) and int(exact) % 2 == 0 else otherwise


def _divisor_near(number: int, wanted: float) -> int:
    """The divisor of `number` nearest to `wanted`; the larger of two (fewer queries share a head)."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), -d))


def _refuse_contradictions(teacher: Shape, ask: ShapeAsk) -> None:
    heads, kv_heads = ask.num_attention_heads, ask.num_key_value_heads
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise UserError(
            f"student.shape: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            f"use {_divisor_near(heads, kv_heads)} key/value heads, or a multiple of {kv_heads} heads",
        )
    if ask.head_dim is not None and ask.head_dim % 2:
        raise UserError(
            f"student.shape: head_dim {ask.head_dim} is odd", "rotary embeddings turn pairs: use an even number"
        )
    if teacher.num_attention_heads % teacher.num_key_value_heads:
        raise UserError(
            f"the teacher's {teacher.num_attention_heads} heads are not a multiple of its "
            f"{teacher.num_key_value_heads} key/value heads",
            "correct its config.json",
        )


def _no_width(teacher: Shape, ask: ShapeAsk, multiple: int, cut: Cut | None) -> UserError:
    if cut is not None:
        return UserError(
            f"student.start is {cut}, and no heads of a {teacher.family} teacher's {teacher.num_attention_heads} over"
            f" {teacher.num_key_value_heads} go with the widths asked for",
            "leave the sizes in student.shape open, or set student.start=fresh",
        )
    heads = ask.num_attention_heads or ask.num_key_value_heads
    width = ask.hidden_size or f"up to {teacher.hidden_size} in steps of {multiple}"
    return UserError(
        f"student.shape: no hidden size ({width}) is a multiple of {heads} heads, which {teacher.family} models need",
        "ask for heads that divide the hidden size, or leave one of them open",
    )


def _nothing_fits(
    teacher: Shape,
    smallest: Shape,
    budget: int,
    compression: float,
    by_compression: int,
    ask: ShapeAsk,
    cut: Cut | None,
) -> UserError:
    over = smallest.parameters - budget
    share = f" ({100 * over / budget:.0f} %)" if budget > over / 10 else ""
    cause = (
        f"no student fits {budget:,} parameters: the smallest possible has {smallest.parameters:,}, "
        f"{over:,} more{share}; its embedding alone has {smallest.embedding_parameters:,}"
    )
    if cut is not None:
        cause = f"student.start is {cut}, and {cause}"
    if smallest.parameters > teacher.parameters:
        return UserError(cause, f"it is larger than its teacher ({teacher.parameters:,}): ask for smaller sizes")
    if budget < by_compression:
        return UserError(
            cause,
            "the target allows no more; use a looser target, or a teacher with a vocabulary "
            f"below {teacher.vocab_size:,}",
        )
    # Rounded down, so that what is recommended works.
    fits = int(1000 * teacher.parameters / smallest.parameters) / 1000
    asked = ", or ask for smaller sizes in student.shape" if ask != ShapeAsk() else ""
    if cut is not None:
        asked = f", or use another student.start than {cut}"
    return UserError(cause, f"set student.compression to at most {fits:g} (it is {compression:g}){asked}")
