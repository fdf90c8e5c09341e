"""Recipes: typed, unknown keys refused with a suggestion, every field settable."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from edgedistill.config.recipe import Recipe, builtin_recipes, load_recipe, parse_recipe
from edgedistill.errors import UserError


def fields(section: type[BaseModel], prefix: str = ""):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def value_at(recipe: Recipe, path: str):
    node = recipe.model_dump(mode="json")
    for part in path.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("path", list(fields(Recipe)))
def test_set_reaches_every_field(path):
    recipe = load_recipe()
    current = value_at(recipe, path)
    if path.endswith(".epochs"):  # takes the place of the recipe's tokens
        section = path.removesuffix("epochs")
        assert value_at(load_recipe("quickstart", [f"{path}=7"]), f"{section}tokens") is None
        recipe = load_recipe("quickstart", [f"{section}tokens=null", f"{path}={current}"])
    assert load_recipe(
        "quickstart", [f"{path}={yaml.safe_dump(current, default_flow_style=True).strip()}"]
    ) == recipe or (isinstance(current, str | None))
    with pytest.raises(UserError) as error:
        load_recipe("quickstart", [f"{path}={{not: [valid]}}"])
    assert path.split(".")[-1] in str(error.value)


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).name


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("distil: {}", "unknown key 'distil'", "did you mean 'distill'?"),
        ("distill: {learning_rat: 1}", "unknown key 'distill.learning_rat'", "did you mean 'learning_rate'?"),
        ("teacher: {train: {shape: {hiden_size: 8}}}", "unknown key 'teacher.train.shape.hiden_size'", "hidden_size"),
        ("distill: {lr: 1}", "unknown key 'distill.lr'", "did you mean 'learning_rate'?"),
        ("learning_rate: 1", "unknown key 'learning_rate'", "'distill.learning_rate'"),
        ("distill: {tokenz: 1, zz: 2}\nfoo: 3", "unknown keys 'distill.tokenz', 'distill.zz', 'foo'", "mean 'tokens'?"),
        ("distill: {tokens: 20k}", "distill.tokens = '20k'", "recipe-reference"),
        ("distill: {tokens: 1.5M}", "write 1500000", "distill.tokens"),
        ("seed: many\ndistill: {tokens: x}", "distill.tokens = 'x'", "each may be"),
        ("seed: many", "seed = 'many'", "recipe-reference"),
        ("distill: 3", "'distill' is 3", "section"),
        ("- a\n- b", "holds a list", "mapping"),
        ("a: [", "not YAML", ""),
        ("name: ../up", "name = '../up'", ""),
        ("student: {compression: 0.5}", "student.compression = 0.5", ""),
        ("data: {split: both}", "data.split = 'both'", ""),
        ("verify: {min_retention: -1}", "verify.min_retention = -1", ""),
        ("seed: '3'", "seed = '3'", ""),
        ("distill: {batch_sequences: true}", "distill.batch_sequences = True", ""),
    ],
)
def test_wrong_recipes(text, cause, remedy):
    with pytest.raises(UserError) as error:
        parse_recipe(text, where="mine.yaml")
    assert cause in error.value.cause
    assert remedy in error.value.remedy


@pytest.mark.parametrize("override", ["novalue", "=3", "seed.deeper=3", "a.b.c=1", "seed=[1"])
def test_wrong_overrides(override):
    with pytest.raises(UserError):
        load_recipe("quickstart", [override])


def test_numbers_as_people_write_them():
    assert load_recipe("quickstart", ["distill.learning_rate=2e-3"]).distill.learning_rate == 2e-3
    assert load_recipe("quickstart", ["export.artifacts=gguf:Q8_0, onnx:INT4"]).export.artifacts == [
        "gguf:Q8_0",
        "onnx:INT4",
    ]


def test_missing_recipe_suggests():
    with pytest.raises(UserError) as error:
        load_recipe("quickstrat")
    assert "did you mean 'quickstart'?" in error.value.remedy


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * (1 << 21)])
def test_files_that_are_no_recipes(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load_recipe(str(path))


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_user_error(text):
    try:
        parse_recipe(text, where="fuzz")
    except UserError:
        pass


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("distil.epochs=5", "--set 'distil.epochs=5': unknown key 'distil'"),
        ("distill.epoch=5", "--set 'distill.epoch=5': unknown key 'distill.epoch'"),
        ("distill.epochs=five", "--set 'distill.epochs=five': Input should be a valid number"),
        ("distill=5", "--set 'distill=5': 'distill' is 5"),
    ],
)
def test_what_an_option_says_wrongly_is_the_options(override, cause):
    with pytest.raises(UserError) as error:
        parse_recipe("name: mine", where="mine.yaml", overrides=[override])
    assert error.value.cause.startswith(cause) and "mine.yaml" not in error.value.cause


@pytest.mark.parametrize("section", ["distill", "teacher.train"])
def test_the_later_of_two_lengths_counts(section):
    """`--set` after the recipe; of two in one place both are kept, tokens count, and epochs are in no key."""

    def settings(*sets):
        node = load_recipe("quickstart", [f"{section}.{said}" for said in sets])
        for part in section.split("."):
            node = getattr(node, part)
        return node

    assert settings("epochs=7").tokens is None and settings("epochs=7").length == "epochs, 7 now"
    assert settings("tokens=1000").length == "tokens, 1,000 now"
    both = settings("epochs=7", "tokens=1000")
    assert (both.tokens, both.epochs) == (1000, 7)
    assert both.key() == settings("epochs=9", "tokens=1000").key() != settings("tokens=2000").key()
    assert settings("epochs=7").key() != settings("epochs=9").key()
