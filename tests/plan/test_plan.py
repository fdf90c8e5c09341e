"""The plan: figures that add up, limits that bind at the boundary, and refusals that say by how much."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from edgedistill.config.recipe import Recipe, parse_recipe
from edgedistill.config.targets import Target, load_target, targets_list
from edgedistill.errors import UserError
from edgedistill.fit import sizes
from edgedistill.fit.artifact import artifacts_of, context_of, decode_ceiling, human_bytes
from edgedistill.fit.training import PROCESS_BYTES, _relaxed, distillation, predict_distillation, propose
from edgedistill.plan.plan import AUTO_STARTS, Plan, plan, plan_rows
from edgedistill.records.figures import Figure
from edgedistill.records.shape import Shape

TEACHER = Shape(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
                num_attention_heads=8, num_key_value_heads=4, head_dim=64)  # fmt: skip
LLAMA_8B = Shape(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                 num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
                 max_position_embeddings=131072)  # fmt: skip
JETSON = load_target("jetson")
PHONE = load_target("phone")
SERVER = load_target("server-gpu")


def _recipe(*overrides: str) -> Recipe:
    return parse_recipe("teacher: {model: some-folder}", where="test", overrides=overrides)


def _limited(target: Target, **limits: Any) -> Target:
    return target.model_copy(update={"limits": target.limits.model_copy(update=limits)})


def _plan(*targets: Target, recipe: Recipe | None = None, teacher: Shape = TEACHER, **rest: Any) -> Plan:
    return plan(recipe or _recipe(), targets, teacher=teacher, **rest)


def test_figures_add_up_and_are_derived() -> None:
    planned = _plan(JETSON)
    assert planned.student_parameters == planned.student.parameters == 4_590_848
    assert planned.compression == pytest.approx(20_978_176 / 4_590_848)
    (artifact,) = planned.artifacts
    assert (artifact.target, artifact.artifact, artifact.context_tokens) == ("jetson-orin-nano", "gguf:Q4_K_M", 2048)
    cache = 2 * 6 * 2 * 64 * 2048 * 2
    assert artifact.kv_cache_bytes.value == cache
    assert artifact.artifact_bytes.value == sizes.artifact_bytes(planned.student, "gguf", "Q4_K_M")
    assert artifact.memory_bytes.value == artifact.artifact_bytes.value + cache + artifact.runtime_bytes.value
    assert artifact.runtime_bytes.value > JETSON.runtime_bytes.value
    read = sizes.read_bytes_a_token(planned.student, "gguf", "Q4_K_M") + cache // 2048 * JETSON.bench.prompt_tokens
    assert artifact.decode_ceiling_tokens_per_s.value == pytest.approx(102.4e9 / read)
    figures = [planned.training_memory_bytes, planned.disk_bytes, *(
        figure for a in planned.artifacts for figure in (a.artifact_bytes, a.memory_bytes, a.kv_cache_bytes,
                                                         a.runtime_bytes, a.decode_ceiling_tokens_per_s))]  # fmt: skip
    assert all(figure.basis == "derived" and figure.source and figure.value > 0 for figure in figures)
    assert Plan.model_validate_json(planned.model_dump_json()) == planned
    assert _plan(JETSON) == planned, "pure: the same arguments, the same plan"


def test_one_student_for_all_targets_and_a_later_target_reuses_it() -> None:
    together = _plan(*targets_list())
    assert {artifact.target for artifact in together.artifacts} == {target.name for target in targets_list()}
    for target in targets_list():
        assert _plan(target).student == together.student


def test_the_tightest_target_sizes_the_student() -> None:
    free = _plan(SERVER, teacher=LLAMA_8B).student
    small = _limited(PHONE, max_artifact_bytes=300_000_000)
    planned = _plan(SERVER, small, teacher=LLAMA_8B)
    assert planned.sized_by == "limits of phone-arm64-high"
    assert planned.student.parameters < free.parameters
    by_target = {artifact.target: artifact for artifact in planned.artifacts}
    assert by_target["phone-arm64-high"].artifact_bytes.value <= 300_000_000
    # Shrunk no further than needed: most of the limit is used.
    assert by_target["phone-arm64-high"].artifact_bytes.value > 0.6 * 300_000_000
    assert planned.student == _plan(small, teacher=LLAMA_8B).student
    assert any("step in between" in warning for warning in planned.warnings)


@pytest.mark.parametrize(
    ("limit", "figure", "up"),
    [
        ("max_artifact_bytes", "artifact_bytes", True),
        ("max_memory_bytes", "memory_bytes", True),
        ("min_decode_tokens_per_s", "decode_ceiling_tokens_per_s", False),
    ],
)
def test_limits_bind_exactly_at_the_boundary(limit: str, figure: str, up: bool) -> None:
    given = _plan(SERVER, teacher=LLAMA_8B).student
    exact = getattr(_plan(PHONE, teacher=LLAMA_8B, student=given).artifacts[0], figure).value
    kept = int(exact) if up else exact
    assert _plan(_limited(PHONE, **{limit: kept}), teacher=LLAMA_8B, student=given).student == given
    broken = kept - 1 if up else kept * 1.0001
    with pytest.raises(UserError, match=r"target phone-arm64-high, gguf:Q4_0: .*\n.*would fit"):
        _plan(_limited(PHONE, **{limit: broken}), teacher=LLAMA_8B, student=given)
    # Where the size is open, the same limit shrinks the student instead.
    assert _plan(_limited(PHONE, **{limit: broken}), teacher=LLAMA_8B).student.parameters < given.parameters


def test_memory_that_no_student_fits_is_refused_by_how_much() -> None:
    tiny = _limited(JETSON, max_memory_bytes=int(JETSON.runtime_bytes.value) + 5_000_000)
    with pytest.raises(UserError) as caught:
        _plan(tiny)
    assert "no student of this teacher fits jetson-orin-nano" in caught.value.cause
    assert "over the limit of 505 MB" in caught.value.cause
    with pytest.raises(UserError, match=r"tokens/s, .* below the limit of"):
        _plan(_limited(JETSON, min_decode_tokens_per_s=1e9))


def test_a_student_larger_than_its_teacher() -> None:
    larger = TEACHER.model_copy(update={"num_hidden_layers": 7})
    with pytest.raises(UserError) as caught:
        _plan(JETSON, student=larger)
    assert f"{larger.parameters:,} parameters, {TEACHER.layer_parameters:,} more than" in caught.value.cause
    assert _plan(JETSON, student=TEACHER).compression == 1.0
    assert not _plan(JETSON, student=TEACHER).designed


def test_artifacts_that_the_target_does_not_run() -> None:
    with pytest.raises(
        UserError, match=r"jetson-orin-nano does not run gguf:BF16\nset export\.artifacts to some of gguf:Q4_K_M"
    ):
        _plan(JETSON, recipe=_recipe("export.artifacts=gguf:BF16"))
    with pytest.raises(UserError, match="did you mean 'Q4_K_M'"):
        _plan(JETSON, recipe=_recipe("export.artifacts=gguf:Q4_K_MM"))
    assert artifacts_of(_recipe("export.artifacts=gguf:q4_0,onnx:INT4,gguf:Q4_0"), PHONE) == ["gguf:Q4_0", "onnx:INT4"]
    assert [a.artifact for a in _plan(PHONE, recipe=_recipe("export.artifacts=gguf:Q4_0,onnx:INT4")).artifacts] == [
        "gguf:Q4_0",
        "onnx:INT4",
    ]
    assert artifacts_of(_recipe(), PHONE) == PHONE.default_artifacts


def test_width_multiples() -> None:
    assert _plan(JETSON).width_multiple == 256
    assert _plan(JETSON, recipe=_recipe("student.compression=2")).width_multiple == 256
    # 256 would leave 45 % of the budget of 2x unused: without K-quants, 32 it is.
    phone = _plan(PHONE, recipe=_recipe("student.compression=2"))
    assert phone.width_multiple == 32
    assert phone.student.parameters > _plan(JETSON, recipe=_recipe("student.compression=2")).student.parameters
    assert any(
        "fix sizes in student.shape" in w for w in _plan(JETSON, recipe=_recipe("student.compression=2")).warnings
    )
    assert not phone.warnings


def test_a_teacher_too_narrow_for_k_quants_is_warned_about_not_refused() -> None:
    narrow = Shape(vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5,
                   num_attention_heads=8, num_key_value_heads=4, head_dim=8)  # fmt: skip
    planned = _plan(JETSON, teacher=narrow)
    assert planned.width_multiple == 32
    assert planned.artifacts[0].k_quant_fallbacks > 0
    assert any("not a multiple of 256" in warning for warning in planned.warnings)
    assert not any("not a multiple of 256" in warning for warning in _plan(JETSON).warnings)


def test_compression_beyond_five_warns_exactly() -> None:
    five = TEACHER.parameters // 5
    student = TEACHER.model_copy(update={"num_hidden_layers": 1})
    assert student.parameters > five
    assert not [
        w for w in _plan(JETSON, student=student, teacher_parameters=5 * student.parameters).warnings if "between" in w
    ]
    warned = _plan(JETSON, student=student, teacher_parameters=5 * student.parameters + 1).warnings
    assert any("beyond 5x a step in between" in warning for warning in warned)


def test_context() -> None:
    assert context_of(_recipe(), JETSON, TEACHER) == 2048
    assert context_of(_recipe(), JETSON, LLAMA_8B) == 4096
    assert context_of(_recipe("export.context_tokens=2048"), JETSON, TEACHER) == 2048
    with pytest.raises(UserError, match=r"export\.context_tokens is 2,049, but the model has 2,048 positions"):
        _plan(JETSON, recipe=_recipe("export.context_tokens=2049"))
    assert any("context is 2,048 tokens" in w for w in _plan(JETSON).warnings)
    longer = _plan(JETSON, teacher=LLAMA_8B, recipe=_recipe("export.context_tokens=8192")).artifacts[0]
    assert longer.kv_cache_bytes.value == 2 * _plan(JETSON, teacher=LLAMA_8B).artifacts[0].kv_cache_bytes.value


def test_disk() -> None:
    needed = int(_plan(JETSON).disk_bytes.value)
    assert _plan(JETSON, free_disk_bytes=needed).free_disk_bytes == needed
    with pytest.raises(UserError, match=r"of disk, 1 B more than .* that are free"):
        _plan(JETSON, free_disk_bytes=needed - 1)
    done = _plan(JETSON, store_hits={"teacher": True, "student": True})
    assert done.disk_bytes.value < needed
    trained_here = plan(Recipe(), [JETSON], teacher=TEACHER)
    assert trained_here.disk_bytes.value >= needed + 4 * TEACHER.parameters


def test_the_disk_holds_the_teachers_signals() -> None:
    cached = _recipe("distill.teacher_signals=cached", "distill.cache.kind=hidden")
    base = _plan(JETSON, recipe=cached, training_tokens=0).disk_bytes.value
    million = _plan(JETSON, recipe=cached, training_tokens=1_000_000)
    assert million.disk_bytes.value - base == 2 * TEACHER.hidden_size * 1_000_000
    assert "the teacher's signals" in million.disk_bytes.source
    with pytest.raises(UserError, match="of disk"):
        _plan(JETSON, recipe=cached, training_tokens=10**9, free_disk_bytes=10**11)
    # where the text is not known yet, it says so
    assert any("does not count the teacher's signals" in line for line in _plan(JETSON, recipe=cached).warnings)
    for other in (_recipe(), _recipe("distill.teacher_signals=cached", "distill.cache.url=elsewhere")):
        planned = _plan(JETSON, recipe=other, training_tokens=10**9)
        assert planned.disk_bytes.value == base and "signals" not in " ".join(planned.warnings)
    assert _plan(JETSON, recipe=cached, training_tokens=10**9, store_hits={"student": True}).disk_bytes.value < base


def test_verification_that_does_not_fit_is_refused_before_any_training() -> None:
    planned = _plan(JETSON)
    needed = int(planned.verification_memory_bytes.value)
    assert needed >= 4 * (TEACHER.parameters + 2 * planned.student.parameters)
    # an 8B teacher may teach in NF4 on this machine; verification holds it in fp32
    roomy = _plan(JETSON, teacher=LLAMA_8B)
    for_all = int(roomy.verification_memory_bytes.value)
    assert for_all > 4 * LLAMA_8B.parameters
    quantized = _recipe("teacher.precision=nf4", "distill.teacher_signals=live")
    with pytest.raises(UserError, match=r"verification needs about .* of memory \(teacher, student and dequantized"):
        _plan(JETSON, teacher=LLAMA_8B, recipe=quantized, machine_memory_bytes=for_all - 1)


def _whole(planned: Plan) -> int:
    """The training process's bytes: the peak, and what stands after its imports."""
    return PROCESS_BYTES + int(planned.training_memory_bytes.value)


@pytest.fixture
def free_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a machine could not verify; what training proposes on it is looked at alone."""
    nothing = Figure(value=0, unit="B", basis="derived", source="left out")
    monkeypatch.setattr("edgedistill.plan.plan.verification_memory", lambda *args, **kwargs: nothing)


@pytest.mark.usefixtures("free_verification")
def test_training_memory_is_predicted_with_its_parts() -> None:
    planned = _plan(JETSON)
    expected = predict_distillation(_recipe(), planned.student, TEACHER)
    assert planned.training_memory_bytes.value == expected.bytes == sum(planned.training_memory_parts.values())
    assert planned.training_memory_parts == expected.components
    assert "teacher 83.9 MB" in planned.training_memory_bytes.source
    assert "distillation, beside 450 MB for the process" in planned.training_memory_bytes.source
    done = _plan(JETSON, store_hits={"student": True}, machine_memory_bytes=1)
    assert done.training_memory_bytes.value == 0
    assert done.training_memory_parts == {}
    here = plan(Recipe(), [JETSON], teacher=LLAMA_8B, store_hits={"student": True})
    assert here.training_memory_bytes.source.startswith("the teacher's training")


@pytest.mark.usefixtures("free_verification")
def test_settings_that_fit_are_proposed_in_turn() -> None:
    """At each limit the nearest settings are named, with --set words that do fit when they are taken."""
    recipe = _recipe("distill.batch_sequences=8", "distill.context_tokens=1024", "distill.precision=fp32")
    asked = _plan(JETSON, recipe=recipe)
    assert not any("--set" in w for w in _plan(JETSON, recipe=recipe, machine_memory_bytes=_whole(asked)).warnings)
    limit, seen = _whole(asked) - 1, []
    while True:
        try:
            (advice,) = [w for w in _plan(JETSON, recipe=recipe, machine_memory_bytes=limit).warnings if "--set" in w]
        except UserError as error:
            assert "no settings make it fit this machine's" in error.cause
            assert f"distillation needs about {human_bytes(_whole(asked))}" in error.cause
            break
        words = re.findall(r"--set (\S+)", advice)
        taken = _plan(JETSON, recipe=parse_recipe("teacher: {model: some-folder}", where="test", overrides=[
            "distill.batch_sequences=8", "distill.context_tokens=1024", "distill.precision=fp32", *words]))  # fmt: skip
        assert _whole(taken) <= limit
        assert f"would need {human_bytes(_whole(taken))}" in advice
        seen.append(words)
        limit = _whole(taken) - 1
    assert seen[0] == ["distill.micro_batch_sequences=7"]
    steps = ["micro_batch_sequences", "activation_checkpointing=true", "optimizer=adamw8bit", "teacher_signals=cached",
             "teacher.precision=bf16", "teacher.precision=int8", "teacher.precision=nf4"]  # fmt: skip
    first = [next((i for i, words in enumerate(seen) if any(step in w for w in words)), None) for step in steps]
    known = [place for place in first if place is not None]
    assert None not in first[:3], (first, seen)
    assert known == sorted(known), (first, seen)
    # each relaxation keeps those before it
    own = [[w for w in words if "activation" in w or "optimizer" in w] for words in seen]
    assert all(after[: len(before)] == before for before, after in itertools.pairwise(own)), seen


def test_a_proposal_for_other_losses_asks_for_exact_states() -> None:
    student = _plan(JETSON).student
    recipe = _recipe("distill.forward_kl=0", "distill.reverse_kl=1")
    run = distillation(student, LLAMA_8B)
    cached = min(
        run.needs(_recipe("distill.forward_kl=0", "distill.reverse_kl=1", "distill.micro_batch_sequences=1",
                          "distill.activation_checkpointing=true", "distill.optimizer=adamw8bit",
                          "distill.teacher_signals=cached", "distill.cache.kind=hidden", f"teacher.precision={p}"))
        for p in ("bf16", "int8", "nf4"))  # fmt: skip
    found = propose(run, recipe, cached)
    assert found is not None
    assert found.bytes <= cached
    assert found.words[:2] == ("distill.activation_checkpointing=true", "distill.optimizer=adamw8bit")
    assert propose(run, recipe, cached // 4) is None
    ways = [words for _, words in _relaxed(run, recipe)]
    assert ways[3][2:] == ("distill.teacher_signals=cached", "distill.cache.kind=hidden")
    plain = [words for _, words in _relaxed(run, _recipe())]
    assert plain[3][2:] == ("distill.teacher_signals=cached",)
    assert plain[-1][-1] == "teacher.precision=nf4"


def test_the_teachers_own_training_is_proposed_for() -> None:
    recipe = Recipe()
    needed = _whole(plan(recipe, [JETSON], teacher=LLAMA_8B, store_hits={"student": True}))
    planned = plan(recipe, [JETSON], teacher=LLAMA_8B, store_hits={"student": True}, machine_memory_bytes=needed - 1)
    assert any("--set teacher.train.micro_batch_sequences=" in warning for warning in planned.warnings)


def test_threads_are_warned_about() -> None:
    assert not any("threads" in w for w in _plan(PHONE, recipe=_recipe("bench.threads=4"), machine_cores=4).warnings)
    assert any(
        "bench.threads is 5, but phone-arm64-high has 4 big cores" in w
        for w in _plan(PHONE, recipe=_recipe("bench.threads=5")).warnings
    )
    assert any(
        "this machine has 3 cores, fewer than the 4 threads" in w for w in _plan(PHONE, machine_cores=3).warnings
    )


def test_layers_cut_from_the_teacher_keep_its_widths() -> None:
    cut = _plan(JETSON, recipe=_recipe("student.start=layers", "student.compression=3")).student
    assert cut == TEACHER.model_copy(update={"num_hidden_layers": cut.num_hidden_layers})
    assert cut.num_hidden_layers == 1  # 2.1M of embedding leave one layer of 3.1M in 7.0M
    with pytest.raises(UserError, match="no student fits"):
        _plan(JETSON, recipe=_recipe("student.start=layers", "student.compression=5"))


def test_asked_sizes_are_kept_and_refused_with_a_remedy() -> None:
    planned = _plan(JETSON, recipe=_recipe("student.shape.num_hidden_layers=3"))
    assert planned.student.num_hidden_layers == 3
    with pytest.raises(UserError, match=r"set student\.compression to at most"):
        _plan(JETSON, recipe=_recipe("student.shape.hidden_size=512", "student.shape.num_hidden_layers=2"))


def test_no_target() -> None:
    with pytest.raises(UserError, match="no target\nname one"):
        plan(_recipe(), [], teacher=TEACHER)


def test_rows_for_people() -> None:
    rows = plan_rows(_plan(JETSON, PHONE, store_hits={"teacher": True, "student": False}))
    table = {what: (value, basis, source) for what, value, basis, source in rows}
    assert table["student"][2].startswith("4,590,848 parameters, sized by compression")
    assert table["jetson-orin-nano gguf:Q4_K_M: decode at most"][1] == "derived"
    assert table["store: teacher"][0] == "ready"
    assert table["store: student"][0] == "to be made"
    # A cache holds models this small: the ceiling says that it is none for them.
    assert "caches" in table["phone-arm64-high gguf:Q4_0: decode at most"][2]
    big = {what: source for what, _, _, source in plan_rows(_plan(JETSON, teacher=LLAMA_8B))}
    assert "caches" not in big["jetson-orin-nano gguf:Q4_K_M: decode at most"]


def test_decode_ceiling_and_human_bytes() -> None:
    ceiling = decode_ceiling(JETSON, read_bytes=1024)
    assert (ceiling.value, ceiling.unit, ceiling.basis) == (100_000_000, "tokens/s", "derived")
    assert [human_bytes(v) for v in (0, 999, 1000, 1_234_567, 150e6, 4.0e9, 141e9, 2e12)] == [
        "0 B", "999 B", "1 kB", "1.23 MB", "150 MB", "4 GB", "141 GB", "2,000 GB"]  # fmt: skip


def test_the_teacher_at_hand(test_data: Path) -> None:
    """The numbers of the real 21M teacher's plan, for the three targets that a build names."""
    import json

    from edgedistill.models.shapes import shape_from_config

    folder = test_data / "weights" / "teacher-tinystories-21m"
    teacher = shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), where="teacher")
    planned = _plan(JETSON, PHONE, SERVER, teacher=teacher)
    assert (planned.student.hidden_size, planned.student.num_hidden_layers, planned.compression > 4) == (256, 6, True)


def _cut_of(student: Shape, teacher: Shape) -> bool:
    """Whether a cut can give this student: nothing larger, its heads' size, no larger groups, the head tied alike."""
    sizes_ = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same = ("head_dim", "vocab_size", "tie_word_embeddings", "family", "attention_bias", "qk_norm")
    group = student.num_attention_heads / student.num_key_value_heads
    return (
        all(getattr(student, name) <= getattr(teacher, name) for name in sizes_)
        and all(getattr(student, name) == getattr(teacher, name) for name in same)
        and group == int(group) <= teacher.num_attention_heads // teacher.num_key_value_heads
    )


QWEN_HALF = Shape(family="qwen2", attention_bias=True, vocab_size=151936, hidden_size=896, intermediate_size=4864,
                  num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, head_dim=64,
                  max_position_embeddings=32768)  # fmt: skip
NARROW = Shape(vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
               num_key_value_heads=4, head_dim=8)  # fmt: skip


@pytest.mark.parametrize("teacher", [TEACHER, LLAMA_8B, QWEN_HALF, NARROW], ids=["21m", "8b", "qwen", "narrow"])
@pytest.mark.parametrize("start", ["width", "both"])
def test_cut_students_are_cuts_of_their_teacher(start: str, teacher: Shape) -> None:
    for target in (JETSON, PHONE):
        for compression in (1, 1.5, 2, 3, 4):
            recipe = _recipe(f"student.start={start}", f"student.compression={compression}")
            planned = _plan(target, recipe=recipe, teacher=teacher)
            assert planned.start == start
            assert _cut_of(planned.student, teacher), planned.student
            assert planned.student.parameters <= teacher.parameters / compression
            assert planned.student.parameters > 0.4 * teacher.parameters / max(compression, 3)
            if start == "width":
                assert planned.student.num_hidden_layers == teacher.num_hidden_layers
    whole = _plan(SERVER, recipe=_recipe(f"student.start={start}", "student.compression=1"), teacher=teacher)
    assert whole.student == teacher


def test_width_gives_up_neurons_before_channels() -> None:
    """256 wide in the teacher's proportions is too large at six layers; with fewer neurons it fits, and K-quants do."""
    planned = _plan(JETSON, recipe=_recipe("student.start=width"))
    assert (planned.student.hidden_size, planned.student.intermediate_size) == (256, 512)
    assert planned.width_multiple == 256
    assert planned.artifacts[0].k_quant_fallbacks == 0


@pytest.mark.parametrize("start", ["layers", "width", "both"])
def test_the_tightest_target_sizes_a_cut_too(start: str) -> None:
    small = _limited(PHONE, max_artifact_bytes=1_500_000_000)
    recipe = _recipe(f"student.start={start}", "student.compression=2")
    planned = _plan(SERVER, small, teacher=LLAMA_8B, recipe=recipe)
    assert planned.sized_by == "limits of phone-arm64-high"
    assert planned.student.parameters < _plan(SERVER, teacher=LLAMA_8B, recipe=recipe).student.parameters
    assert _cut_of(planned.student, LLAMA_8B)
    used = {artifact.target: artifact.artifact_bytes.value for artifact in planned.artifacts}["phone-arm64-high"]
    assert 0.6 * 1_500_000_000 < used <= 1_500_000_000
    with pytest.raises(UserError, match="no student of this teacher fits phone-arm64-high"):
        _plan(_limited(PHONE, max_artifact_bytes=1_000_000), teacher=LLAMA_8B, recipe=recipe)


@pytest.mark.parametrize(
    ("start", "asked", "message"),
    [
        (
            "width",
            "num_hidden_layers=3",
            "num_hidden_layers is 3, and a student whose start is width has the teacher's 6",
        ),
        ("both", "head_dim=32", "head_dim is 32, and a student whose start is both has the teacher's 64"),
        (
            "both",
            "hidden_size=768",
            "hidden_size is 768, and a student whose start is both has at most the teacher's 512",
        ),
        ("layers", "intermediate_size=768", "intermediate_size is 768, and .* layers has the teacher's 1536"),
        (
            "width",
            "num_key_value_heads=1,num_attention_heads=4",
            "4 heads over 1 .* the teacher has 2 a key/value head",
        ),
        ("width", "num_attention_heads=7", "no heads of a llama teacher's 8 over 4 go with"),
    ],
)
def test_cuts_that_cannot_be_had_are_refused(start: str, asked: str, message: str) -> None:
    sizes_ = [f"student.shape.{size}" for size in asked.split(",")]
    with pytest.raises(UserError, match=message) as caught:
        _plan(JETSON, recipe=_recipe(f"student.start={start}", *sizes_))
    assert "student.start=fresh" in caught.value.remedy


def test_asked_sizes_of_a_cut_are_kept() -> None:
    recipe = _recipe("student.start=both", "student.shape.num_hidden_layers=4", "student.shape.num_attention_heads=4",
                     "student.shape.num_key_value_heads=4", "student.shape.intermediate_size=896")  # fmt: skip
    student = _plan(JETSON, recipe=recipe).student
    assert (student.num_hidden_layers, student.intermediate_size) == (4, 896)
    assert (student.num_attention_heads, student.num_key_value_heads) == (4, 4)


def test_the_default_start_is_said_and_so_is_why_it_is_another() -> None:
    best, second, last = AUTO_STARTS[0], AUTO_STARTS[1], AUTO_STARTS[-1]
    assert _recipe().student.start == "auto"
    planned = _plan(JETSON)
    assert (planned.start, planned.start_because) == (best, "the best of benchmarks/student_start.py")
    assert planned.student == _plan(JETSON, recipe=_recipe(f"student.start={best}")).student
    assert not any("start is" in warning for warning in planned.warnings)
    shallow = "student.shape.num_hidden_layers=3"
    other = _plan(JETSON, recipe=_recipe(shallow))
    assert other.start == second
    assert other.student == _plan(JETSON, recipe=_recipe(shallow, f"student.start={second}")).student
    assert any(f"the student's start is {second}: student.shape.num_hidden_layers is 3" in w for w in other.warnings)
    asked = "student.shape.head_dim=32"
    fresh = _plan(JETSON, recipe=_recipe(asked))
    assert fresh.start == last == "fresh"
    assert fresh.student == _plan(JETSON, recipe=_recipe("student.start=fresh", asked)).student
    assert any("the student's start is fresh: student.shape.head_dim is 32" in w for w in fresh.warnings)
    assert ("student's start", "fresh", "", fresh.start_because) in plan_rows(fresh)
    with pytest.raises(UserError, match="head_dim is 32"):
        _plan(JETSON, recipe=_recipe(f"student.start={best}", asked))
    assert _plan(JETSON, student=TEACHER).start == "given"


def test_types_by_tensor_and_matrices_are_planned_and_refused() -> None:
    """What export would refuse after hours of training is refused now; what it takes is in the sizes."""
    plain = _plan(JETSON).artifacts[0].artifact_bytes.value
    higher = _plan(JETSON, recipe=_recipe("export.tensor_types={ffn_down: Q8_0}"), student=_plan(JETSON).student)
    assert higher.artifacts[0].artifact_bytes.value > plain
    with pytest.raises(UserError, match="matches no matrix"):
        _plan(JETSON, recipe=_recipe("export.tensor_types={ffn_dwn: Q8_0}"))
    with pytest.raises(UserError, match="no ggml type 'Q8'"):
        _plan(JETSON, recipe=_recipe("export.tensor_types={ffn_down: Q8}"))
    low = ("export.artifacts=gguf:IQ2_XS", "export.importance_matrix=off")
    with pytest.raises(UserError, match="writes IQ2_XS only with an importance matrix"):
        _plan(JETSON, recipe=_recipe(*low))
    assert _plan(JETSON, recipe=_recipe(low[0])).artifacts[0].artifact_bytes.value < plain


def test_a_search_for_a_mix_is_refused_where_it_cannot_be() -> None:
    plain = _plan(JETSON, recipe=_recipe("export.mixed_retention=0.98")).artifacts[0]
    assert "at least: export.mixed_retention" in plain.artifact_bytes.source
    for settings, cause in (
        (["export.artifacts=[onnx:INT4]"], "onnx:INT4 of a decoder is not a GGUF"),
        (["distill.qad.tokens_share=0.05"], "are both set"),
    ):
        with pytest.raises(UserError, match=cause):
            _plan(JETSON, recipe=_recipe("export.mixed_retention=0.98", *settings))


def test_what_is_asked_first_stands_first(tmp_path):
    """Text, steps and gate of a real file; steps of epochs follow from what the tokenizer makes of a sample."""
    from command import Command, tiny_text

    command = Command(tmp_path, warm=True)
    text = tmp_path / "mine.txt"
    text.write_text(tiny_text())
    words = ("-t", "phone", "--set", f"data.source={text}", "--set", "verify.min_retention=0.7")
    found = command.json("plan", command.recipe(), *words)["asked"]
    assert found["source"] == str(text) and found["documents"] > 2
    assert found["teacher_steps"] == round(60_000 / (8 * 64)) and found["student_steps"] == round(40_000 / (8 * 64))
    assert found["min_retention"] == 0.7
    tokens = found["training_tokens"]
    assert 0.2 * text.stat().st_size < tokens < 0.4 * text.stat().st_size
    epochs = command.json("plan", command.recipe(), *words, "--set", "distill.epochs=5")["asked"]
    assert epochs["student_steps"] == round(5 * tokens / (8 * 64))
    shown = command("plan", command.recipe(), *words).stdout
    first = [line[:20].split("   ")[0].strip() for line in shown.splitlines() if line.startswith(" ")]
    assert [what for what in first[2:] if what][:5] == [
        "text",
        "training part",
        "teacher's training",
        "student's training",
        "gate",
    ]
    assert "its parts: -v" in shown and "optimizer" not in shown
    assert "optimizer" in command("plan", command.recipe(), *words, "-v").stdout
