"""A vocabulary trimmed to its text: the same tokens, any text still spelled, and a chain that maps ids everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import ROOT, Command, refused, tiny_text
from gate_models import learn
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgedistill.config.recipe import Recipe, Student
from edgedistill.config.targets import load_target
from edgedistill.data.prepare import read_part
from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer import read_tokenizer
from edgedistill.models.folder import check_folder, vocabulary
from edgedistill.models.hf_tokenizer import BYTES
from edgedistill.plan.plan import plan
from edgedistill.records.shape import Shape
from edgedistill.signals.signals import LiveSignals
from edgedistill.student.start import start_student
from edgedistill.student.vocabulary import byte_alphabet, kept_ids, trim_rows, trim_tokenizer
from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks, scoring_windows
from edgedistill.teacher.stage import train_tokenizer
from edgedistill.verify.tokenizer_check import VARIED_TEXTS

TEACHERS = ("stories260k-hf", "teacher-tinystories-21m")


def parts_of(test_data: Path, lines: int = 300) -> dict[str, list[str]]:
    """Stories with some of what no story has: accents, tabs, control tokens spelled out."""
    text = (test_data / "text_lm" / "tinystories").glob("*.txt")
    stories = [line for line in max(text, key=lambda p: p.stat().st_size).read_text().splitlines() if line.strip()]
    extra = ["the café was naïve </s> <|endoftext|>\t\tend 🙂"]
    return {"train": stories[:lines] + extra, "calibration": stories[lines : lines + 40], "held_out": stories[-60:]}


@pytest.fixture(scope="module", params=TEACHERS)
def trimmed(request, test_data, tmp_path_factory):
    """The teacher's folder, the text, the trimmed tokenizer's folder, and what was found."""
    teacher = test_data / "weights" / request.param
    parts = parts_of(test_data)
    out = tmp_path_factory.mktemp("trimmed") / "tokenizer"
    return teacher, parts, out, trim_tokenizer(teacher, parts, out)


def test_the_text_has_the_same_tokens_under_other_numbers(trimmed):
    teacher, parts, out, result = trimmed
    kept = kept_ids(teacher, out)
    before, after = TextTokenizer.load(teacher), TextTokenizer.load(out)
    texts = [text for part in parts.values() for text in part]
    used = set()
    for was, now in zip(before.encode(texts), after.encode(texts), strict=True):
        assert kept[now].tolist() == was.tolist()
        used.update(was.tolist())
    assert len(used) == result.used_tokens <= result.tokens == after.vocab == len(kept)
    assert result.tokens < result.teacher_tokens == before.vocab
    assert (np.diff(kept) > 0).all()
    assert used <= set(kept.tolist())
    names = {index: token for token, index in vocabulary(teacher).items()}
    assert [names[index] for index in kept] == sorted(vocabulary(out), key=vocabulary(out).get)
    for end in ("bos", "eos"):
        assert kept[getattr(after, end)] == getattr(before, end)


def test_no_more_is_kept_than_merging_passes_through(trimmed):
    """Beside what is used, added or a byte: parts of used tokens; fewer than all that could merge into one."""
    teacher, parts, out, _ = trimmed
    tree = json.loads((teacher / "tokenizer.json").read_text())
    table, names = tree["model"]["vocab"], {index: token for token, index in vocabulary(teacher).items()}
    used = {int(i) for part in parts.values() for ids in TextTokenizer.load(teacher).encode(part) for i in ids}
    everything, waiting = set(used), list(used)
    while waiting:
        result_of = names[waiting.pop()]
        for left, right in tree["model"]["merges"]:
            if left + right == result_of:
                new = {table[left], table[right]} - everything
                everything |= new
                waiting += new
    spelled = {table[token] for token in (sorted(BYTES) if teacher.name == TEACHERS[0] else byte_alphabet())}
    others = set(kept_ids(teacher, out).tolist()) - used - spelled - {0, 1, 2}
    assert others
    assert others < everything
    assert all(any(names[index] in names[whole] for whole in used) for index in others)


def test_any_text_is_still_spelled(trimmed):
    teacher, _, out, _ = trimmed
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (teacher, out))
    for text in VARIED_TEXTS:
        ids = after.encode(text).ids
        assert after.decode(ids) == before.decode(before.encode(text).ids), text
    assert after.encode("hi", add_special_tokens=True).tokens == before.encode("hi", add_special_tokens=True).tokens


def test_what_llama_cpp_needs_still_holds(trimmed):
    teacher, _, out, result = trimmed
    tokens = read_tokenizer(out, vocab_size=result.tokens)
    original = read_tokenizer(teacher, vocab_size=result.teacher_tokens)
    assert (tokens.model, tokens.pre, tokens.add_bos) == (original.model, original.pre, original.add_bos)
    assert {name: tokens.tokens[index] for name, index in tokens.special.items()} == {
        name: original.tokens[index] for name, index in original.special.items()
    }


def test_tokens_that_only_the_held_out_text_uses_are_counted(test_data, tmp_path):
    teacher = test_data / "weights" / TEACHERS[1]
    word = next(t for t, i in vocabulary(teacher).items() if i > 3000 and t.startswith("Ġ") and t[1:].isalpha())
    parts = {"train": ["a dog sat."], "calibration": ["a cat sat."], "held_out": ["a dog sat.", f"a {word[1:]}"]}
    result = trim_tokenizer(teacher, parts, tmp_path / "t")
    assert word in vocabulary(tmp_path / "t")
    assert result.only_held_out_tokens >= 1
    same = trim_tokenizer(teacher, {**parts, "held_out": parts["train"]}, tmp_path / "s")
    assert same.only_held_out_tokens == 0
    assert word not in vocabulary(tmp_path / "s")
    assert same.kept_sha256 != result.kept_sha256


def test_special_ids_in_every_file_are_renumbered(test_data, tmp_path):
    """A tokenizer with padding, an end token behind the words, a decoder of added tokens and a list of ends."""
    teacher = shutil.copytree(test_data / "weights" / TEACHERS[0], tmp_path / "teacher")
    last = len(vocabulary(teacher))
    tree = json.loads((teacher / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][2], "id": last, "content": "<|end|>"})
    tree["post_processor"]["special_tokens"]["<|end|>"] = {"id": "<|end|>", "ids": [last], "tokens": ["<|end|>"]}
    tree["post_processor"]["single"].append({"SpecialToken": {"id": "<|end|>", "type_id": 0}})
    tree["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": last, "pad_type_id": 0,
        "pad_token": "<|end|>",
    }  # fmt: skip
    (teacher / "tokenizer.json").write_text(json.dumps(tree))
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"2": {"content": "</s>"}, str(last): {"content": "<|end|>"}}
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    (teacher / "added_tokens.json").write_text(json.dumps({"<|end|>": last}))
    (teacher / "model.safetensors").unlink()
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=last + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=[2, last],
            pad_token_id=last + 5,
        )
    ).save_pretrained(teacher)  # fmt: skip
    parts = {"train": ["a dog sat."], "calibration": ["a cat sat."], "held_out": ["a dog."]}
    result = trim_tokenizer(teacher, parts, tmp_path / "t")
    end = result.tokens - 1
    assert end < last
    found = {name: json.loads((tmp_path / "t" / name).read_text()) for name in
             ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json")}  # fmt: skip
    assert found["tokenizer.json"]["padding"] is None
    assert found["tokenizer.json"]["added_tokens"][-1]["id"] == end
    assert found["tokenizer_config.json"]["added_tokens_decoder"].keys() == {"2", str(end)}
    assert found["added_tokens.json"] == {"<|end|>": end}
    assert found["config.json"]["eos_token_id"] == [2, end]
    assert found["config.json"]["pad_token_id"] is None
    assert found["config.json"]["vocab_size"] == result.tokens
    encoded = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).encode("a dog sat.")
    assert (encoded.ids[0], encoded.ids[-1]) == (1, end)
    shape = check_folder(teacher, name="t", origin="folder", role="teacher").shape
    shape = shape.model_copy(update={"num_hidden_layers": 1, "vocab_size": result.tokens})
    for start in ("fresh", "layers"):
        student, _ = start_student(
            Student(start=start, trim_vocabulary=True), shape, teacher=teacher, pretrained=None, seed=0,
            trimmed=tmp_path / "t",
        )  # fmt: skip
        student.save_pretrained(tmp_path / start)
        for name in ("config.json", "generation_config.json"):
            saved = json.loads((tmp_path / start / name).read_text())
            assert (saved["bos_token_id"], saved["eos_token_id"], saved.get("pad_token_id")) == (1, [2, end], None), (
                name
            )
    assert student.get_output_embeddings().weight.shape[0] == result.tokens
    assert student.get_output_embeddings().weight is not student.get_input_embeddings().weight


def change(teacher: Path, out: Path, **model) -> Path:
    shutil.copytree(teacher, out)
    tree = json.loads((out / "tokenizer.json").read_text())
    tree["model"] |= model
    (out / "tokenizer.json").write_text(json.dumps(tree))
    return out


def test_what_cannot_be_trimmed_is_refused(test_data, tmp_path):
    parts = {"train": ["a dog"], "calibration": ["a cat"], "held_out": ["a cow"]}
    small, large = (test_data / "weights" / name for name in TEACHERS)
    unigram = change(small, tmp_path / "u", type="Unigram", vocab=[["<unk>", 0.0], ["a", -1.0]])
    with pytest.raises(UserError, match="Unigram, not BPE"):
        trim_tokenizer(unigram, parts, tmp_path / "1")
    with pytest.raises(UserError, match="not byte-level"):
        no_bytes = change(large, tmp_path / "b")
        tree = json.loads((no_bytes / "tokenizer.json").read_text())
        (no_bytes / "tokenizer.json").write_text(json.dumps({**tree, "pre_tokenizer": {"type": "Whitespace"}}))
        trim_tokenizer(no_bytes, parts, tmp_path / "2")
    with pytest.raises(UserError, match="dropout"):
        trim_tokenizer(change(large, tmp_path / "d", dropout=0.1), parts, tmp_path / "3")


def test_a_trimming_that_would_change_the_text_is_refused(test_data, tmp_path, monkeypatch):
    """Without the closure under merges a word's tokens cannot be built."""
    from edgedistill.student import vocabulary as module

    monkeypatch.setattr(module, "_closed", lambda tree, ids: sorted(ids))
    parts = {"train": ["a little girl played"], "calibration": ["a cat"], "held_out": ["a cow"]}
    with pytest.raises(UserError, match=r"document 0 of the train part .* other tokens"):
        trim_tokenizer(test_data / "weights" / TEACHERS[1], parts, tmp_path / "t")


def test_the_teacher_speaks_over_the_kept_tokens(trimmed):
    """Its head has the kept rows, its inputs are its own ids: log-probabilities are those renormalised over them."""
    teacher, parts, out, result = trimmed
    kept = torch.from_numpy(kept_ids(teacher, out))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    ids = TextTokenizer.load(out).encode(parts["held_out"][:1])[0][:20]
    inputs = torch.from_numpy(ids.astype("int64"))[None]
    given = LiveSignals(model, low_precision=False, kept=kept).batch(np.array([0]), inputs)
    with torch.no_grad():
        own = model(kept[inputs]).logits[0]
    assert given.head.weight.shape[0] == result.tokens
    torch.testing.assert_close(given.hidden @ given.head.weight.T, own[:, kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["layers", "fresh", "both"])
def test_a_student_starts_with_the_kept_rows(trimmed, start):
    teacher, parts, out, result = trimmed
    kept = torch.from_numpy(kept_ids(teacher, out))
    source = check_folder(teacher, name="t", origin="folder", role="teacher")
    shape = source.shape.model_copy(update={"num_hidden_layers": 2, "vocab_size": result.tokens})
    sample = np.concatenate(TextTokenizer.load(out).encode(parts["train"][:20]))[: 2 * 64].reshape(2, 64)
    if start == "both":
        shape = shape.model_copy(update={"intermediate_size": 64})
    student, _ = start_student(
        Student(start=start, trim_vocabulary=True), shape, teacher=teacher, pretrained=None, seed=0, trimmed=out,
        sample=torch.from_numpy(sample.astype("int64")),
    )  # fmt: skip
    assert student.get_input_embeddings().weight.shape[0] == student.config.vocab_size == result.tokens
    after = TextTokenizer.load(out)
    assert student.config.bos_token_id == json.loads((out / "config.json").read_text())["bos_token_id"]
    assert student.generation_config.eos_token_id == student.config.eos_token_id
    assert after.vocab == student.get_output_embeddings().weight.shape[0]
    if start != "fresh":
        original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        assert torch.equal(student.get_input_embeddings().weight, original.get_input_embeddings().weight[kept])


def test_a_trimmed_model_gives_the_same_logits_at_the_kept_tokens(trimmed):
    teacher, parts, out, _ = trimmed
    kept = torch.from_numpy(kept_ids(teacher, out))
    original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    copy = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    small = trim_rows(copy, out, teacher)
    ids = torch.from_numpy(TextTokenizer.load(out).encode(parts["train"][:1])[0][:30].astype("int64"))[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, original(kept[ids]).logits[..., kept], rtol=1e-4, atol=1e-4)


TOKENS, ROWS = 700, 704
ASKED = ("-t", "phone", "--set", "student.trim_vocabulary=true", "--set", "distill.tokens=8000",
         "--set", "student.compression=2", "--set", "student.start=layers")  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Command, tuple[str, ...]]:
    """A teacher whose tokenizer was made from more than the data, with padded rows, and the words that name it."""
    command = Command(tmp_path_factory.mktemp("chain"), {"OMP_NUM_THREADS": "1"}, warm=True)
    folder = command.folder / "teacher"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ROWS, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=1,
        )
    )  # fmt: skip
    # from more than the data, so that tokens which these do not use stand between those that they do
    folder.mkdir()
    train_tokenizer([*tiny_text().split("\n\n"), (ROOT / "LICENSE").read_text()], TOKENS, folder)
    model.config.save_pretrained(folder)
    learn(model, folder, tiny_text().split("\n\n"), steps=300)
    model.get_input_embeddings().weight.data[TOKENS:] = 0  # padding is no model's choice
    model.save_pretrained(folder)
    return command, (command.recipe(), "--teacher", str(folder), *ASKED)


@pytest.fixture(scope="module")
def built(chain) -> tuple[Command, dict]:
    command, words = chain
    return command, command.json("build", *words)


def test_build_ships_a_trimmed_vocabulary_and_verifies_it(built):
    command, document = built
    student = document["student"]
    found = student["start_details"]["vocabulary"]
    assert found["teacher_tokens"] == TOKENS
    assert 258 < found["tokens"] < 500
    assert student["shape"]["vocab_size"] == found["tokens"]
    assert student["tokenizer_sha256"] == found["tokenizer_sha256"]
    artifact = document["bundles"][0]["artifacts"][0]
    assert artifact["artifact"]["vocab_size"] == found["tokens"]
    retention = artifact["retention"]
    assert retention["kept_tokens"] == found["tokens"]
    teacher, trained, quantized, shipped = retention["rungs"]
    assert (teacher["top1_agreement"], teacher["retention"]) == (1.0, 1.0)
    assert shipped["perplexity"] == pytest.approx(quantized["perplexity"], rel=0.05)
    assert trained["kl_mean_nats"] > 0
    bundle = Path(document["bundles"][0]["bundle"])
    for name in ("MODEL_CARD.md", "reports/report.html"):
        assert f"trimmed to {found['tokens']} tokens" in (bundle / name).read_text(encoding="utf-8"), name
    assert command("bundle", "verify", str(document["bundles"][0]["bundle"])).returncode == 0


def test_the_ladders_figures_are_those_computed_by_hand(built):
    """Perplexity of the teacher over all of its tokens, KL over the kept ones, agreement with its choice of all."""
    command, document = built
    store = command.folder / "store"
    (data,) = (store / "records" / "data").glob("*")
    student_folder, teacher_folder = Path(document["student"]["path"]), command.folder / "teacher"
    tokenizer = TextTokenizer.load(teacher_folder)
    own = TextTokenizer.load(student_folder)
    kept = kept_ids(teacher_folder, student_folder)
    known = {index: token for token, index in vocabulary(teacher_folder).items()}
    assert [known[index] for index in kept] == sorted(vocabulary(student_folder), key=vocabulary(student_folder).get)
    blocks = read_part(data, "held_out")
    windows = [
        scoring_windows(encode_blocks(each, blocks), context=64, stride=None, max_tokens=3_000)
        for each in (tokenizer, own)
    ]
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (teacher_folder, student_folder)
    )
    nll, kl, agree, lost = [], [], [], []
    for theirs, ours in zip(*windows, strict=True):
        assert kept[ours.ids].tolist() == theirs.ids.tolist()
        ids = torch.from_numpy(theirs.ids.astype("int64"))
        with torch.no_grad():
            t = teacher(ids[None]).logits[0, :-1][ours.first :]
            s = student(torch.from_numpy(ours.ids.astype("int64"))[None]).logits[0, :-1][ours.first :]
        nll.append(torch.nn.functional.cross_entropy(t, ids[1:][ours.first :], reduction="none"))
        lost.append(-torch.log_softmax(t, -1)[:, kept].logsumexp(-1))
        p, q = torch.log_softmax(t[:, kept], -1), torch.log_softmax(s, -1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append(torch.from_numpy(kept)[s.argmax(-1)] == t[:, :TOKENS].argmax(-1))
    rungs = document["bundles"][0]["artifacts"][0]["retention"]["rungs"]
    assert rungs[0]["perplexity"] == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-4)
    assert rungs[0]["kl_mean_nats"] == pytest.approx(torch.cat(lost).mean().item(), rel=1e-3)
    assert rungs[1]["kl_mean_nats"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert rungs[1]["top1_agreement"] == pytest.approx(torch.cat(agree).double().mean().item(), abs=1e-9)


def test_a_trimmed_student_is_verified_alone_and_other_text_is_refused(built):
    command, document = built
    student = document["student"]["path"]
    command.json("export", "--student", student, "--quantization", "Q8_0", "--out", "alone")
    words = ("verify", "alone", "--student", student, "--teacher", str(command.folder / "teacher"),
             "--set", "verify.context_tokens=64", "--set", "verify.max_tokens=2000",
             "--set", "verify.min_retention=0", "--set", "data.min_document_chars=200")  # fmt: skip
    retention = command.json(*words, "--data", str(command.folder / "text.txt"))
    assert retention["kept_tokens"] == document["student"]["shape"]["vocab_size"]
    refused(command(*words, "--data", str(ROOT / "README.md")), "other tokens", "trimmed vocabulary")


def test_cached_and_fresh_and_reused(chain):
    command, words = chain
    one = command.json("distill", *words)["student"]
    assert "signals" in one and one["signals"].startswith("live")
    sampled = command.json("distill", *words, "--set", "distill.teacher_signals=cached")["student"]
    assert sampled["signals"] == "cached, sampled"
    ends = [each["training"]["history"][-1]["perplexity"] for each in (one, sampled)]
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    (key,) = [
        json.loads(p.read_text())["key"] for p in (command.folder / "store").glob("records/signals/*/cache/cache.json")
    ]
    assert key["kept_sha256"] == one["start_details"]["vocabulary"]["kept_sha256"]
    assert key["vocab"] == one["shape"]["vocab_size"]
    planned = command.json("plan", *words)
    assert planned["store_hits"] == {"data": True, "teacher": True, "student": True}
    assert planned["student"]["vocab_size"] == one["shape"]["vocab_size"]
    whole = command.json("plan", *(word.replace("trim_vocabulary=true", "trim_vocabulary=false") for word in words))
    assert whole["student"]["vocab_size"] == ROWS
    assert whole["store_hits"]["student"] is False


def test_what_has_no_vocabulary_to_trim_is_refused_at_plan(chain):
    command, (recipe, *_) = chain
    refused(command("plan", recipe, *ASKED), "trained here", "trim_vocabulary=false")
    folder = str(command.folder / "teacher")
    pretrained = ("--teacher", folder, "--student", folder, "--set", "student.trim_vocabulary=true")
    refused(command("plan", recipe, "-t", "phone", *pretrained), "pretrained", "trim_vocabulary=false")


@pytest.mark.parametrize("compression", [1.0, 4.0])
def test_what_the_embedding_saves_goes_into_the_layers(compression):
    teacher = Shape(
        vocab_size=128_256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    recipe = Recipe.model_validate({"student": {"compression": compression, "trim_vocabulary": True},
                                    "teacher": {"model": "a/b"}})  # fmt: skip
    targets = [load_target("server-gpu")]
    whole = plan(recipe, targets, teacher=teacher).student
    trimmed = plan(recipe, targets, teacher=teacher, trimmed_tokens=20_000).student
    assert (whole.vocab_size, trimmed.vocab_size) == (128_256, 20_000)
    assert trimmed.parameters <= teacher.parameters / compression
    if compression > 1:
        bodies = [shape.num_hidden_layers * shape.layer_parameters for shape in (whole, trimmed)]
        assert bodies[1] > 1.5 * bodies[0]
    else:  # no student is larger than the teacher it is cut from
        assert trimmed == teacher.model_copy(update={"vocab_size": 20_000})
