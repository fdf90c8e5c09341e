"""Golden vectors: what must move them does, what must not does not; what a manifest says of them is derived again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from attack.faults import seeded
from attack.gguf_faults import gguf_faults
from attack.onnx_faults import onnx_faults
from attack.reseal import reseal
from bundle_fixtures import HELD_OUT, Ingredients
from tiny_models import tiny_checkpoint

from edgedistill.bundle import golden, golden_make, golden_rules
from edgedistill.bundle.check import verify_bundle
from edgedistill.bundle.files import read_manifest
from edgedistill.bundle.fingerprint import first_difference
from edgedistill.bundle.golden_prompts import LONG, chosen
from edgedistill.bundle.golden_rules import compact, statistics
from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.gguf.quantize import export_gguf
from edgedistill.records.manifest import BundleArtifact
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.store import Store

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
# Fault → whether it must be seen on any machine, or where the kernels are those of the maker.
MOVED = {
    "a RoPE base of 100,000": True,
    "a RoPE base of 10,500": False,
    "all zero: blk.{last}.attn_q.weight": True,
    "heads 0 and 1 swapped: blk.{first}.attn_k.weight": True,
    "columns of heads 0 and 1 swapped": True,
    "times 0.9: output_norm.weight": True,
    "all norms times 1.04": True,
    "an epsilon of 0.001": True,
    "times 1.04: blk.{first}.attn_norm.weight": True,
    "one block's scale times 1.5: blk.{last}.ffn_down.weight": False,
    "noise of 2% on every matrix": True,
}  # fmt: skip
NAMED = {
    "another EOS": "tokenizer.ggml.eos_token_id is 70, not 1",
    "no EOS": "tokenizer.ggml.eos_token_id is missing",
    "a context of 64": "llama.context_length is 64, not 2048",
    "the chat template replaced": "tokenizer.chat_template",
    "an epsilon of 0.001": "llama.attention.layer_norm_rms_epsilon",
    "all zero: blk.{last}.attn_q.weight": "blk.1.attn_q.weight",
    "merges reversed": "tokenizer.ggml.merges",
}
NAMED_IN_ONNX = {
    "search.repetition_penalty: 9.0": "search.repetition_penalty is 9.0, not 1.0",
    "model.eos_token_id: one more": "model.eos_token_id",
    "a RoPE base of 10,500": "cos_cache",
    "attention's scale × 1.5": "GroupQueryAttention",
    "external offsets of gate and up swapped": "gate_proj",
}


def ingredients_of(folder: Path, quantization: str = "Q4_0") -> Ingredients:
    """As the others, of a model with a BOS before every text and a chat template."""
    from tokenizers import Tokenizer, processors

    checkpoint = tiny_checkpoint(folder / "student")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    made = object.__new__(Ingredients)
    made.folder, made.checkpoint, made.store = folder, checkpoint, Store(folder / "store")
    made.teacher_dir, made.artifact_dir = folder / "teacher", folder / "artifact"
    made.teacher_dir.mkdir()
    made.artifact = export_gguf(
        checkpoint, made.artifact_dir, quantization=quantization, context_tokens=2048, threads=2, name="tiny"
    )
    return made


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    return ingredients_of(tmp_path_factory.mktemp("ingredients"))


@pytest.fixture(scope="module")
def made(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of Q4_0 and an ONNX decoder of INT4."""
    both = [ingredients.bundled(), ingredients.exported("INT4", onnx=True)]
    return ingredients.make(tmp_path_factory.mktemp("out") / "bundle", artifacts=both)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def artifacts(bundle: Path) -> list[BundleArtifact]:
    return read_manifest(bundle).artifacts


def elsewhere(artifact: BundleArtifact) -> BundleArtifact:
    """The same, made on a machine that is not alike: the tolerances of any machine count."""
    return artifact.model_copy(update={"golden": artifact.golden.model_copy(update={"kernels": "others"})})


def replayed(bundle: Path, artifact: BundleArtifact, model: Path, store: Store, **options: Any) -> golden.Replayed:
    """The vectors alone: what the artifact says and holds is compared elsewhere."""
    settings: dict[str, Any] = {"threads": 1, "context_tokens": artifact.golden.context_tokens, "store": store}
    with RuntimeProcess(artifact.runtime, model, **settings | options) as runtime:
        return golden.replay_vectors(runtime, artifact, golden.read_cases(bundle, artifact))


def fault_of(name: str, faults: list[Any]) -> Any:
    return next(fault for fault in faults if fault.name == name)


class TestHonest:
    def test_other_threads_and_kernels(self, made: Path, ingredients: Ingredients) -> None:
        one = artifacts(made)[0]
        model = made / "model/model.gguf"
        with_threads = replayed(made, one, model, ingredients.store, threads=3)
        assert with_threads.alike and with_threads.found["rms"] <= with_threads.allowed["rms"]
        # Kernels without llama.cpp's extra buffers are others: the tolerance of any machine counts, and is enough.
        without = replayed(made, one, model, ingredients.store, use_extra_bufts=False)
        assert without.alike is (not one.golden.runtime_options["use_extra_bufts"])
        if not without.alike:
            assert 0 < without.found["rms"] < without.allowed["rms"] == 0.03
        assert with_threads.tokens_compared > without.tokens_compared >= golden_rules.MIN_ROWS_COMPARED

    def test_other_types_on_other_threads(self, ingredients: Ingredients, tmp_path: Path) -> None:
        types = ("Q8_0", "Q4_K_M")
        bundle = ingredients.make(tmp_path / "b", artifacts=[ingredients.exported(name) for name in types])
        for one in artifacts(bundle):
            for threads in (1, 2, 4):
                model = bundle / one.folder / one.entry
                done = replayed(bundle, one, model, ingredients.store, threads=threads)
                assert done.alike and done.found["rms"] <= done.allowed["rms"] <= 0.00015
            scale = next(output.scale for output in one.golden.outputs if output.scale)
            wide, alike = golden_rules.floors(one.quantization, scale)
            for output in one.golden.outputs:
                if output.name in golden_rules.COMPARED:
                    assert output.tolerance <= 1.5 * wide[output.name] * (1 + 1e-6)
                    assert output.tolerance_alike <= 1.5 * alike[output.name] * (1 + 1e-6)

    def test_the_whole_check_says_what_was_compared(self, made: Path, ingredients: Ingredients) -> None:
        check = verify_bundle(made, store=ingredients.store)
        for replay, artifact in zip(check.replays, artifacts(made), strict=True):
            assert replay.alike and replay.tokens_compared >= sum(c.tokens_compared for c in artifact.golden.cases)
            assert replay.cases == len(artifact.golden.cases) >= 3
            assert set(replay.found) == set(golden_rules.COMPARED)

    def test_no_key_of_the_record_is_forgotten(self, made: Path) -> None:
        first, second = (artifact.golden for artifact in artifacts(made))
        assert first.settings["llama.rope.freq_base"] == 10000.0
        assert str(first.settings["tokenizer.ggml.tokens"]).startswith("sha256:")
        assert len(first.weights) == 21 and "blk.1.attn_q.weight" in first.weights
        assert second.settings["search.repetition_penalty"] == 1.0
        assert "tokenizer.json" in second.settings and "cos_cache" in second.weights
        assert first.vocabulary.stop == second.vocabulary.stop == [1]
        assert first.vocabulary.add_bos is True and first.vocabulary.bos == 0


class TestPrompts:
    def test_damaged_tokens_fail_every_prompt(self, made: Path, ingredients: Ingredients) -> None:
        """As an app would: other tokens in, the logits after the last one compared with golden/NN.logits.npy."""
        for artifact in artifacts(made):
            tolerance = next(o.tolerance for o in artifact.golden.outputs if o.name == "logits")
            model = made / artifact.folder / artifact.entry
            with RuntimeProcess(artifact.runtime, model, threads=1, context_tokens=256, store=ingredients.store) as run:
                for case in artifact.golden.cases:
                    tokens = np.load(made / case.tokens).tolist()
                    expected = np.load(made / case.logits)
                    assert tokens[0] == 0, "the BOS"
                    assert np.abs(run.logits(tokens)[-1] - expected).max() <= tolerance
                    found = float(np.abs(run.logits(tokens[1:])[-1] - expected).max()) / tolerance
                    long = len(tokens) >= LONG[0]  # there all rows tell, and its last one need not
                    assert long or (found > 1 and found == pytest.approx(case.damaged["no_bos"], rel=0.3, abs=0.3))
                    assert set(case.damaged) == {"no_bos", "token_lost", "token_doubled"}
                    assert min(case.damaged.values()) > 1

    def test_prompts_give_their_tokens(self, made: Path, ingredients: Ingredients) -> None:
        one = artifacts(made)[0]
        with RuntimeProcess("llama.cpp", made / "model/model.gguf", threads=1, context_tokens=0) as run:
            for case in one.golden.cases:
                text = (made / case.prompt).read_text(encoding="utf-8")
                assert run.tokenize(text, add_special=True) == np.load(made / case.tokens).tolist()
        assert max(case.token_count for case in one.golden.cases) >= LONG[0]

    @pytest.mark.parametrize("texts", [[], ["short"], ["日本語 and émigré 🙂" * 40]])
    def test_any_text_will_do(self, texts: list[str], made: Path, ingredients: Ingredients) -> None:
        with RuntimeProcess("llama.cpp", made / "model/model.gguf", threads=1, context_tokens=64) as run:
            found = chosen(run, lambda t: run.tokenize(t, add_special=True), run.tokenize, texts, 47)
        assert len(found) >= 2 and all(2 <= len(prompt.tokens) <= 47 for prompt in found)

    def test_a_model_that_does_not_look_at_its_tokens_is_refused(
        self, ingredients: Ingredients, tmp_path: Path
    ) -> None:
        from attack import gguf_file

        file = tmp_path / "model.gguf"
        model = gguf_file.read(ingredients.artifact_dir / "model.gguf")
        embedding = model.tensors["token_embd.weight"]
        embedding.data = embedding.bytes_of_rows()[5].tobytes() * embedding.ne[1]
        gguf_file.write(model, file)
        with pytest.raises(UserError, match=r"no golden vectors|gives no tokens"):
            golden_make.make_golden(
                ingredients.artifact, file, tmp_path, "golden", HELD_OUT,
                tokenizer_json=ingredients.checkpoint / "tokenizer.json", threads=1, store=ingredients.store,
            )  # fmt: skip

    def test_a_runtime_that_disagrees_with_itself_is_refused(
        self, ingredients: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(golden_rules, "MAX_SEEN", 1e-6)
        with pytest.raises(RuntimeCrashed, match="disagrees with itself"):
            golden_make.make_golden(
                ingredients.artifact, ingredients.artifact_dir / "model.gguf", tmp_path, "golden", HELD_OUT,
                tokenizer_json=ingredients.checkpoint / "tokenizer.json", threads=1, store=ingredients.store,
            )  # fmt: skip


class TestFaults:
    @pytest.mark.parametrize("name", MOVED)
    def test_wrong_models_move_the_vectors(
        self, name: str, made: Path, ingredients: Ingredients, tmp_path: Path
    ) -> None:
        """Without a look at what the file says or holds: what it computes alone tells."""
        model = tmp_path / "model.gguf"
        shutil.copyfile(made / "model/model.gguf", model)
        fault = fault_of(name, gguf_faults(model))
        fault.apply(model, seeded(fault))
        one = artifacts(made)[0]
        with pytest.raises(UserError, match="golden replay of gguf:Q4_0 failed"):
            replayed(made, elsewhere(one) if MOVED[name] else one, model, ingredients.store)

    @pytest.mark.parametrize("name", NAMED)
    def test_the_check_names_the_key_or_the_tensor(self, name: str, copy: Path, ingredients: Ingredients) -> None:
        fault = fault_of(name, gguf_faults(copy / "model/model.gguf"))
        fault.apply(copy / "model/model.gguf", seeded(fault))
        named(copy, 0, ingredients, NAMED[name])

    @pytest.mark.parametrize("name", NAMED_IN_ONNX)
    def test_the_check_names_what_differs_in_a_decoder(self, name: str, copy: Path, ingredients: Ingredients) -> None:
        fault = fault_of(name, onnx_faults(copy / "model/onnx"))
        fault.apply(copy / "model/onnx", seeded(fault))
        named(copy, 1, ingredients, NAMED_IN_ONNX[name])

    def test_the_runtimes_own_stop_tokens_are_compared(self, made: Path, ingredients: Ingredients) -> None:
        one = artifacts(made)[0]
        vocabulary = one.golden.vocabulary.model_copy(update={"stop": [1, 7]})
        told = one.model_copy(update={"golden": one.golden.model_copy(update={"vocabulary": vocabulary})})
        with pytest.raises(UserError, match=r"the special tokens: stop is \[1\], not \[1, 7\]"):
            replayed(made, told, made / "model/model.gguf", ingredients.store)


LIARS = (
    "a RoPE base of 100,000",
    "all zero: blk.{last}.attn_q.weight",
    "all zero: blk.{first}.attn_q.weight",
    "times 0.9: output_norm.weight",
)


class TestAllThatMayBeClaimed:
    """A liar seals a wrong model with its own hashes, and claims that his runtime is as noisy as is believed."""

    @staticmethod
    def claim(bundle: Path, floors_seen: float) -> None:
        """Every tolerance as wide as noise of so many floors makes it; all that follows from it and the files."""
        one = artifacts(bundle)[0]
        cases = golden.read_cases(bundle, one)
        scale = golden_rules.scale_of([case.last_V for case in cases])
        wide, alike = (
            {name: floors_seen * value for name, value in floor.items()}
            for floor in golden_rules.floors(one.quantization, scale)
        )
        claimed = golden_rules.outputs(one.quantization, scale, wide, alike)  # type: ignore[arg-type]
        tolerance = next(output.tolerance for output in claimed if output.name == "logits")
        said = golden.fingerprint(one.format, bundle / one.folder / one.entry)

        def lie(manifest: dict[str, Any]) -> None:
            told = manifest["artifacts"][0]["golden"]
            told |= {"kernels": "others", "settings": dict(said.settings), "weights": dict(said.weights)}
            told["outputs"] = [output.model_dump(mode="json") for output in claimed]
            for told_case, case in zip(told["cases"], cases, strict=True):
                told_case |= golden_make.compared(case.kept, case.record.token_count, one.golden.new_tokens, tolerance)
                told_case["damaged"] = {"no_bos": 100.0}

        reseal(bundle, lie)

    @pytest.mark.parametrize("name", LIARS)
    def test_lets_no_wrong_model_pass(self, name: str, copy: Path, ingredients: Ingredients) -> None:
        fault = fault_of(name, gguf_faults(copy / "model/model.gguf"))
        fault.apply(copy / "model/model.gguf", seeded(fault))
        self.claim(copy, golden_rules.MAX_SEEN)
        one = artifacts(copy)[0]
        with pytest.raises(UserError, match="golden replay of gguf:Q4_0 failed"):
            golden.replay(copy, one, store=ingredients.store)
        # Not by a best token, of which a flat model has none that is sure: a statistic tells by itself, and clearly.
        cases = golden.read_cases(copy, one)
        with RuntimeProcess("llama.cpp", copy / "model/model.gguf", threads=1, context_tokens=256) as run:
            rows = [run.logits([*case.tokens.tolist(), *case.greedy.tolist()]) for case in cases]
        found = statistics([case.kept for case in cases], rows)
        assert max(found[output.name] / output.tolerance for output in one.golden.outputs if output.tolerance) > 2

    def test_is_a_bundle_as_others(self, copy: Path, ingredients: Ingredients) -> None:
        """So that the wrong ones are refused for what they compute."""
        self.claim(copy, golden_rules.MAX_SEEN)
        done = golden.replay(copy, artifacts(copy)[0], store=ingredients.store)
        assert not done.alike and done.allowed["rms"] == pytest.approx(0.045)

    @pytest.mark.parametrize("which", ["largest_seen", "seen_alike"])
    def test_is_no_more(self, which: str, copy: Path, ingredients: Ingredients) -> None:
        def lie(manifest: dict[str, Any]) -> None:
            (rms,) = [one for one in manifest["artifacts"][0]["golden"]["outputs"] if one["name"] == "rms"]
            rms[which] = 0.031 if which == "largest_seen" else 0.000101

        reseal(copy, lie)
        with pytest.raises(UserError, match=r"let everything pass: rms differ by"):
            golden.replay(copy, artifacts(copy)[0], store=ingredients.store)


class TestChat:
    def test_what_the_template_renders_is_recorded(self, made: Path) -> None:
        chat = artifacts(made)[0].golden.chat
        assert chat is not None and chat.template == "chat_template.jinja"
        assert chat.rendered.startswith("<|bos|><user>What is 12 × 3?\n<assistant>It is 36.\n<user>Thank")
        assert chat.rendered.endswith('"naïve café" <twice>,\nplease.\n<bot>')

    def test_another_rendering_or_template_is_refused(self, copy: Path, ingredients: Ingredients) -> None:
        def lie(manifest: dict[str, Any]) -> None:
            for artifact in manifest["artifacts"]:
                artifact["golden"]["chat"]["rendered"] += " "

        reseal(copy, lie)
        with pytest.raises(UserError, match=r"chat_template\.jinja: the conversation is rendered as"):
            golden.replay(copy, artifacts(copy)[0], store=ingredients.store)
        (copy / "preprocess/chat_template.jinja").write_text(TEMPLATE + " ", encoding="utf-8")
        with pytest.raises(UserError, match=r"preprocess/chat_template\.jinja is not the chat template"):
            golden.replay(copy, artifacts(copy)[0], store=ingredients.store)


def test_tolerances_are_those_of_the_prompts_that_are_kept(
    ingredients: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a prompt is dropped, what is derived from the kept ones is what the maker wrote."""
    made_by = golden_make._with_damage

    def one_fails(case: Any, *tolerances: float) -> Any:
        found = made_by(case, *tolerances)
        if len(case.prompt.tokens) >= LONG[0]:
            found.prompt.damaged["token_lost"] = 0.5
        return found

    monkeypatch.setattr(golden_make, "_with_damage", one_fails)
    bundle = ingredients.make(tmp_path / "b")
    cases = artifacts(bundle)[0].golden.cases
    assert cases and all(case.token_count < LONG[0] for case in cases)
    verify_bundle(bundle, store=ingredients.store)


class TestLies:
    """What a manifest says of its vectors, changed: each is derived again and refused."""

    CHANGES: ClassVar[dict[str, tuple[Callable[[dict[str, Any]], Any], str]]] = {
        "greedy_compared": (lambda g: g["cases"][0].update(greedy_compared=2**40), "greedy_compared"),
        "greedy_compared, possible": (lambda g: g["cases"][0].update(greedy_compared=16), "greedy_compared"),
        "tokens_compared": (lambda g: g["cases"][0].update(tokens_compared=10_000), "tokens_compared"),
        "tolerance": (lambda g: g["outputs"][1].update(tolerance=1e308), "tolerance"),
        "tolerance, possible": (lambda g: g["outputs"][2].update(tolerance=0.5), "tolerance of rms"),
        "seen": (lambda g: g["outputs"][2].update(largest_seen=0.5, tolerance=2.0), "let everything pass"),
        "an output less": (lambda g: g["outputs"].pop(2), "vectors of"),
        "damaged": (lambda g: g["cases"][0]["damaged"].update(token_lost=0.5), "damaged"),
        "stops_after": (lambda g: g["cases"][0].update(stops_after=3), "stops_after"),
        "weights": (lambda g: g["weights"].clear(), "not among what was recorded"),
        "settings": (lambda g: g["settings"].update({"llama.rope.freq_base": 10500.0}), "llama.rope.freq_base"),
    }  # fmt: skip

    @pytest.mark.parametrize("name", CHANGES)
    def test_is_refused(self, name: str, copy: Path, ingredients: Ingredients) -> None:
        change, said = self.CHANGES[name]
        refused(copy, ingredients, said, lambda manifest: change(manifest["artifacts"][0]["golden"]))

    def test_rows_that_are_not_the_logits(self, copy: Path, ingredients: Ingredients) -> None:
        case = artifacts(copy)[0].golden.cases[1]
        rows = np.load(copy / case.rows)
        rows[case.token_count - 1] += 1
        np.save(copy / case.rows, rows)
        refused(copy, ingredients, case.rows)


def named(bundle: Path, which: int, ingredients: Ingredients, said: str) -> None:
    """Sealed again it is refused, and its replay says what differs (documents that name sizes may speak first)."""
    reseal(bundle)
    with pytest.raises(UserError):
        verify_bundle(bundle, store=ingredients.store)
    with pytest.raises(UserError) as caught:
        golden.replay(bundle, artifacts(bundle)[which], store=ingredients.store)
    assert said in caught.value.cause, caught.value.cause


def refused(bundle: Path, ingredients: Ingredients, said: str, change: Callable[[Any], Any] = lambda m: None) -> None:
    """Sealed again as a liar would, the bundle is refused with these words."""
    reseal(bundle, change, documents=True)
    with pytest.raises(UserError) as caught:
        verify_bundle(bundle, store=ingredients.store)
    assert said in caught.value.cause, caught.value.cause


class TestStatistics:
    def logits(self, seed: int = 0) -> Any:
        return np.random.default_rng(seed).standard_normal((40, 300)).astype(np.float32) * 3

    def test_the_same_is_zero(self) -> None:
        found = statistics([compact(self.logits())], [self.logits()])
        assert all(value < 1e-9 for value in found.values())

    def test_scale_and_direction_are_told_apart(self) -> None:
        whole = self.logits()
        scaled = statistics([compact(whole)], [whole * np.float32(1.04)])
        assert scaled["scale"] == pytest.approx(0.04, rel=1e-3) and scaled["rank"] < 1e-9
        noise = np.random.default_rng(1).standard_normal(whole.shape).astype(np.float32) * 0.3
        noisy = statistics([compact(whole)], [whole + noise])
        assert noisy["scale"] < 0.01 < noisy["rms"] and noisy["rank"] > 1e-4

    def test_kl_against_the_plain_formula(self) -> None:
        """All tokens among the best ones: then it is the whole sum."""
        ours, theirs = self.logits()[:, :12], self.logits(3)[:, :12]
        p, q = (
            np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (ours, theirs)
        )
        plain = float((p * np.log(p / q)).sum(axis=1).mean())
        assert statistics([compact(ours)], [theirs])["kl"] == pytest.approx(plain, rel=1e-4)

    def test_what_is_no_number_is_infinitely_far(self) -> None:
        broken = self.logits()
        broken[3, 7] = np.nan
        assert set(statistics([compact(self.logits())], [broken]).values()) == {np.inf}

    def test_first_difference(self) -> None:
        assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
        assert first_difference({"a": 1}, {"a": True}) == "a is True, not 1"
        assert first_difference({"a": 1}, {}) == "a is missing"
        assert first_difference({}, {"a": 1}) == "a is not among what was recorded"


def test_the_manifest_stays_small(made: Path) -> None:
    assert len(json.dumps(json.loads((made / "manifest.json").read_text(encoding="utf-8")))) < 100_000
