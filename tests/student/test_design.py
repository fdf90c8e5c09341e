"""The designed student: within budget, in proportion, deterministic; and its rule, case by case."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.config.recipe import ShapeAsk
from edgedistill.errors import UserError
from edgedistill.records.shape import Shape
from edgedistill.student.design import FILL, design_student, fill_of

TEACHER = Shape(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
                num_attention_heads=8, num_key_value_heads=4, head_dim=64)  # fmt: skip
LLAMA_8B = Shape(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                 num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)  # fmt: skip
QWEN3_06B = Shape(family="qwen3", qk_norm=True, vocab_size=151936, hidden_size=1024, intermediate_size=3072,
                  num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)  # fmt: skip


def _sizes(shape: Shape) -> tuple[int, int, int, int, int, int]:
    return (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.num_attention_heads,
            shape.num_key_value_heads, shape.head_dim)  # fmt: skip


@st.composite
def teachers(draw: st.DrawFn) -> Shape:
    head_dim = draw(st.sampled_from([32, 48, 64, 80, 128]))
    kv_heads = draw(st.integers(1, 8))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8]))
    hidden = draw(st.one_of(st.just(heads * head_dim), st.integers(8, 64).map(lambda n: 32 * n)))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    return Shape(
        family=family,
        vocab_size=draw(st.integers(16, 60000)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(hidden // 2, 6 * hidden)),
        num_hidden_layers=draw(st.integers(1, 40)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _try(teacher: Shape, **arguments: Any) -> Shape | None:
    try:
        return design_student(teacher, **arguments)
    except UserError:
        return None


@settings(deadline=None, max_examples=300)
@given(teachers(), st.floats(1, 60), st.sampled_from([32, 256]))
def test_always_within_budget_in_multiples_and_divisible(teacher: Shape, compression: float, multiple: int) -> None:
    student = _try(teacher, compression=compression, width_multiple=multiple)
    if student is None:
        return
    assert student.parameters <= teacher.parameters / compression
    assert student.hidden_size % multiple == 0
    assert student.intermediate_size % multiple == 0
    assert student.num_attention_heads % student.num_key_value_heads == 0
    assert student.family != "llama" or student.hidden_size % student.num_attention_heads == 0
    assert student.head_dim % 2 == 0
    assert student.hidden_size <= teacher.hidden_size
    assert student.num_hidden_layers <= teacher.num_hidden_layers
    # The feed-forward keeps its ratio to within one step.
    exact = student.hidden_size * teacher.intermediate_size / teacher.hidden_size
    assert abs(student.intermediate_size - exact) < multiple or student.intermediate_size == multiple
    same = ("family", "vocab_size", "max_position_embeddings", "attention_bias", "qk_norm")
    assert all(getattr(student, field) == getattr(teacher, field) for field in same)
    assert design_student(teacher, compression=compression, width_multiple=multiple) == student
    assert Shape.model_validate(student.model_dump()) == student


@settings(deadline=None, max_examples=300)
@given(teachers(), st.floats(1, 40), st.floats(1, 40), st.sampled_from([32, 256]))
def test_more_compression_never_gives_more_parameters(teacher: Shape, a: float, b: float, multiple: int) -> None:
    low, high = sorted((a, b))
    larger = _try(teacher, compression=low, width_multiple=multiple)
    smaller = _try(teacher, compression=high, width_multiple=multiple)
    if smaller is not None:
        assert larger is not None
        assert smaller.parameters <= larger.parameters


@settings(deadline=None, max_examples=100)
@given(teachers(), st.floats(1, 20), st.integers(-2, 2))
def test_max_parameters_binds(teacher: Shape, compression: float, delta: int) -> None:
    student = _try(teacher, compression=compression, width_multiple=32)
    if student is None:
        return
    most = student.parameters + delta
    capped = _try(teacher, compression=compression, width_multiple=32, max_parameters=most)
    if delta >= 0:
        assert capped is not None, "the student itself fits"
    assert capped is None or capped.parameters <= min(most, student.parameters)


@settings(deadline=None, max_examples=200)
@given(teachers(), st.floats(1, 30), st.data())
def test_what_is_asked_for_is_kept(teacher: Shape, compression: float, data: st.DataObject) -> None:
    kv_heads = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    ask = ShapeAsk(
        hidden_size=data.draw(st.one_of(st.none(), st.integers(8, 512))),
        intermediate_size=data.draw(st.one_of(st.none(), st.integers(8, 2048))),
        num_hidden_layers=data.draw(st.one_of(st.none(), st.integers(1, 12))),
        num_key_value_heads=kv_heads,
        num_attention_heads=data.draw(st.one_of(st.none(), st.integers(1, 3).map(lambda n: n * (kv_heads or 1)))),
        head_dim=data.draw(st.one_of(st.none(), st.integers(1, 32).map(lambda n: 2 * n))),
    )
    student = _try(teacher, compression=compression, width_multiple=32, ask=ask)
    if student is None:
        return
    for field, value in ask.model_dump(exclude_none=True).items():
        assert getattr(student, field) == value
    assert student.num_attention_heads % student.num_key_value_heads == 0
    assert student.parameters <= teacher.parameters / compression


@pytest.mark.parametrize(
    ("teacher", "compression", "multiple", "sizes"),
    [
        # The case that the design was made for: six layers of 256 would be 10 % over, so one layer is given up.
        (TEACHER, 4.0, 256, (256, 768, 5, 4, 2, 64)),
        (TEACHER, 3.5, 256, (256, 768, 6, 4, 2, 64)),
        (TEACHER, 4.0, 32, (224, 672, 6, 4, 2, 64)),
        (TEACHER, 1.0, 256, (512, 1536, 6, 8, 4, 64)),
        # Two layers of 512 would use more of the budget; half the depth is worth more than that.
        (TEACHER, 2.0, 256, (256, 768, 6, 4, 2, 64)),
        (LLAMA_8B, 4.0, 256, (1792, 6400, 32, 28, 7, 64)),
        (LLAMA_8B, 2.0, 256, (2816, 9728, 32, 44, 11, 64)),
        (QWEN3_06B, 4.0, 256, (512, 1536, 18, 8, 4, 128)),
    ],
)
def test_pinned_designs(teacher: Shape, compression: float, multiple: int, sizes: tuple[int, ...]) -> None:
    assert _sizes(design_student(teacher, compression=compression, width_multiple=multiple)) == sizes


def test_a_layer_is_given_up_only_where_a_fifth_of_the_budget_would_lie_idle() -> None:
    for compression in (2.5, 3.0, 4.0, 6.0, 9.0):
        budget = int(TEACHER.parameters / compression)
        student = design_student(TEACHER, compression=compression, width_multiple=32)
        deep = design_student(TEACHER, compression=compression, width_multiple=32, ask=ShapeAsk(num_hidden_layers=6))
        assert (student == deep) == (fill_of(deep, budget) >= FILL)


def test_an_untied_teacher_gets_a_tied_student_only_where_no_untied_one_fits() -> None:
    untied = TEACHER.model_copy(update={"tie_word_embeddings": False, "vocab_size": 8192})
    assert not design_student(untied, compression=4.0, width_multiple=256).tie_word_embeddings
    smallest_untied = design_student(
        untied, compression=1.0, width_multiple=256, ask=ShapeAsk(hidden_size=256, num_hidden_layers=1)
    )
    assert not smallest_untied.tie_word_embeddings
    below = design_student(untied, compression=1.0, width_multiple=256, max_parameters=smallest_untied.parameters - 1)
    assert below.tie_word_embeddings


def test_what_cannot_fit_is_refused_by_how_much_and_the_remedy_works() -> None:
    with pytest.raises(UserError) as caught:
        design_student(TEACHER, compression=20.0, width_multiple=256)
    assert "no student fits 1,048,908 parameters" in caught.value.cause
    assert "has 1,835,776, 786,868 more (75 %)" in caught.value.cause
    assert "at most 11.427 (it is 20)" in caught.value.remedy
    assert design_student(TEACHER, compression=11.427, width_multiple=256).parameters == 1_835_776
    with pytest.raises(UserError):
        design_student(TEACHER, compression=11.428, width_multiple=256)


def test_asks_that_do_not_fit_or_contradict_are_refused() -> None:
    with pytest.raises(UserError, match="or ask for smaller sizes"):
        design_student(TEACHER, compression=4.0, width_multiple=256, ask=ShapeAsk(num_hidden_layers=6))
    with pytest.raises(UserError, match="larger than its teacher"):
        design_student(
            TEACHER, compression=1.0, width_multiple=256, ask=ShapeAsk(hidden_size=1024, num_hidden_layers=6)
        )
    with pytest.raises(UserError, match="6 is not a multiple of num_key_value_heads 4\nuse 3 key/value heads"):
        design_student(TEACHER, compression=2.0, width_multiple=32,
                       ask=ShapeAsk(num_attention_heads=6, num_key_value_heads=4))  # fmt: skip
    with pytest.raises(UserError, match=r"no hidden size \(200\) is a multiple of 3 heads"):
        design_student(
            TEACHER, compression=2.0, width_multiple=32, ask=ShapeAsk(hidden_size=200, num_attention_heads=3)
        )
    with pytest.raises(UserError, match="head_dim 33 is odd"):
        design_student(TEACHER, compression=2.0, width_multiple=32, ask=ShapeAsk(head_dim=33))
    with pytest.raises(UserError, match=r"compression is 0\.5"):
        design_student(TEACHER, compression=0.5, width_multiple=32)
    with pytest.raises(UserError, match="the target allows no more"):
        design_student(TEACHER, compression=4.0, width_multiple=256, max_parameters=100)


def test_a_teacher_narrower_than_the_multiple_says_so() -> None:
    narrow = TEACHER.model_copy(update={"hidden_size": 64, "num_attention_heads": 8, "head_dim": 8})
    with pytest.raises(UserError, match="hidden size 64 is below the width multiple 256"):
        design_student(narrow, compression=2.0, width_multiple=256)
    assert design_student(narrow, compression=2.0, width_multiple=32).hidden_size == 32


def test_a_users_width_need_not_be_a_multiple() -> None:
    student = design_student(TEACHER, compression=4.0, width_multiple=256, ask=ShapeAsk(hidden_size=200))
    assert student.hidden_size == 200
    assert student.parameters <= TEACHER.parameters / 4
