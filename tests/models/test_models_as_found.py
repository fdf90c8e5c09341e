"""Model folders as people have them: tokenizers that cut, unsound weights, wrapped names, adapters, own code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, tiny
from command import Command, refused
from encoders import tiny_encoder
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer import read_tokenizer
from edgedistill.models import hf_tokenizer
from edgedistill.models.folder import require_sound
from edgedistill.models.hf_tokenizer import copy_tokenizer, open_auto_tokenizer, open_tokenizer, tokenizer_sha256
from edgedistill.tasks.causal_lm import TextTokenizer

LONG = "the old dog sees the quiet river and the river follows a lamp. " * 20
FAST = ("--set", "export.compare_speed=false", "--set", "export.compare_logits=false")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("found") / "model", tie_word_embeddings=True)


def change_weights(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    tensors = change(dict(load_file(path)))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def cutting(folder: Path) -> Path:
    """As transformers leaves tokenizer.json after a call with truncation and padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=32, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_that_cuts_and_pads_reads_the_whole_text(model: Path, tmp_path: Path) -> None:
    folder = cutting(copy(model, tmp_path / "cut"))
    whole = Tokenizer.from_file(str(model / "tokenizer.json")).encode(LONG).ids
    assert len(whole) > 100
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(LONG).ids) == 32
    assert open_tokenizer(folder / "tokenizer.json").encode(LONG).ids == whole
    assert open_auto_tokenizer(folder)(LONG)["input_ids"] == whole
    short, long = TextTokenizer.load(folder).encode(["the", LONG])
    assert len(short) < 8 and long.tolist() == [0, *whole]


def test_what_was_made_of_cut_texts_is_not_reused(model: Path, tmp_path: Path) -> None:
    folder = cutting(copy(model, tmp_path / "cut"))
    (tmp_path / "student").mkdir()
    copy_tokenizer(folder, tmp_path / "student")
    kept = json.loads((tmp_path / "student" / "tokenizer.json").read_text())
    assert kept["truncation"] is None and kept["padding"] is None
    assert kept["model"] == json.loads((folder / "tokenizer.json").read_text())["model"]
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in hf_tokenizer.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, plain / name)
    marked = tokenizer_sha256(plain)
    unmarked = re.compile(rb"never in a tokenizer\xff")
    before, hf_tokenizer._CUTS_OR_PADS = hf_tokenizer._CUTS_OR_PADS, unmarked
    try:
        assert tokenizer_sha256(plain) != marked
    finally:
        hf_tokenizer._CUTS_OR_PADS = before
    copy_tokenizer(model, tmp_path / "student")
    assert (tmp_path / "student" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_tokenizers_are_opened_in_one_place(repository: Path) -> None:
    opens = re.compile(
        r"Tokenizer\.from_(file|pretrained|buffer)\(|Fast\.from_pretrained\(|Processor\.from_pretrained\("
    )
    package = repository / "edgedistill"
    allowed = {"models/hf_tokenizer.py", "bundle/sample_transformers.py", "gguf/tokenizer_files.py"}  # in a remedy
    allowed.add("onnx/processors.py")
    assert "read_whole(AutoTokenizer.from_pretrained(" in (package / "onnx/processors.py").read_text()
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if opens.search(p.read_text(encoding="utf-8"))}
    assert "models/hf_tokenizer.py" in found and found <= allowed
    for path in package.rglob("*.py"):  # code that a checkpoint names is never run, and nobody is asked about it
        text = path.read_text(encoding="utf-8")
        calls = re.findall(
            r"(?:AutoConfig|AutoModel\w*|AutoTokenizer|loader|kind)\)?\.from_pretrained\((.*?)\)\n", text, re.S
        )
        if str(path.relative_to(package)) not in allowed - {"models/hf_tokenizer.py"}:
            ours = [call for call in calls if not call.startswith("sys.argv")]  # but for a remedy's own command
            assert all(re.search(r"trust_remote_code=False|\*\*options|\*\*LOADING", call) for call in ours), path


def test_verify_scores_all_of_the_text_with_a_tokenizer_that_cuts(model: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    command.recipe()
    held_out = tmp_path / "held-out.jsonl"
    texts = (tmp_path / "text.txt").read_text().split("\n\n")[:8]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ("--data", str(held_out), "--json")
    scored = {}
    for name, folder in (("whole", model), ("cut", cutting(copy(model, tmp_path / "cut")))):
        done = command("export", "--student", str(folder), "--quantization", "F32", "--out", f"{name}-out", *FAST)
        assert done.returncode == 0, done.stderr
        assert ("cuts texts at 8 tokens" in done.stderr) == (name == "cut")
        found = json.loads(command("verify", f"{name}-out", "--student", str(folder), *words).stdout)
        scored[name] = [(rung["rung"], rung["perplexity"]) for rung in found["rungs"]]
    assert scored["cut"] == scored["whole"]  # the gate fails: a random teacher knows nothing


INFINITE = "model.layers.1.mlp.up_proj.weight"


def with_inf(tensors: dict[str, Any]) -> dict[str, Any]:
    halves = {name: value.astype(np.float16) for name, value in tensors.items()}
    halves[INFINITE][3, 2] = np.inf
    return halves


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_unsound_value_is_found_and_named(model: Path, tmp_path: Path, dtype: Any, value: float) -> None:
    folder = copy(model, tmp_path / "model")
    change_weights(folder, lambda tensors: {name: array.astype(dtype) for name, array in tensors.items()})
    require_sound(folder)

    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors[INFINITE][3, 2] = value
        return tensors

    with pytest.raises(UserError, match=rf"tensor {INFINITE} in model.safetensors holds 1 value .*\[3, 2\]"):
        require_sound(change_weights(folder, spoil))


def test_a_double_beyond_float32_is_unsound(model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "model")
    change_weights(
        folder, lambda tensors: {n: a.astype(np.float64) * (1e300 if n == INFINITE else 1) for n, a in tensors.items()}
    )
    with pytest.raises(UserError, match=INFINITE):
        require_sound(folder)


def test_unsound_weights_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    """In the teacher, in a further one and in the pretrained student; by every command that would begin with them."""
    command = Command(tmp_path, warm=True)
    recipe = command.recipe()
    unsound = str(change_weights(copy(model, tmp_path / "unsound"), with_inf))
    sound = str(model)
    named = f"tensor {INFINITE} in model.safetensors holds 1 value that is NaN or infinite"
    target = ("-t", "cpu-x86", "--set", "distill.context_tokens=64")
    for words in (
        ("plan", recipe, *target, "--teacher", unsound),
        ("plan", recipe, *target, "--teacher", sound, "--student", unsound),
        ("plan", recipe, *target, "--teacher", sound, "--set", f"teacher.also=[{{model: {unsound}}}]"),
        ("build", recipe, *target, "--teacher", unsound),
        ("teacher", "cache", recipe, "--teacher", unsound),
        ("distill", recipe, *target, "--teacher", sound, "--student", unsound),
        ("export", "--student", unsound, "--quantization", "Q8_0", "--out", "out"),
    ):
        refused(command(*words), named)
    assert not list((tmp_path / "store").glob("records/*"))
    cuts = cutting(copy(model, tmp_path / "cut"))
    done = command("plan", recipe, *target, "--teacher", str(cuts))
    assert done.returncode == 0 and "cuts texts at 8 tokens" in done.stdout + done.stderr, done.stderr


WRAPPED = {
    "_orig_mod.": (lambda name: f"_orig_mod.{name}", "torch.compile"),
    "module.": (lambda name: f"module.{name}", "DataParallel"),
    "a layer at a time": (lambda name: re.sub(r"(layers\.\d\.)", r"\1_orig_mod.", name), "torch.compile"),
    "peft": (lambda name: f"base_model.model.{name}", "merge_and_unload"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_that_a_wrapper_changed_are_told_from_missing_weights(how: str, model: Path, tmp_path: Path) -> None:
    rename, said = WRAPPED[how]
    folder = copy(model, tmp_path / "model")
    change_weights(folder, lambda tensors: {rename(name): value for name, value in tensors.items()})
    command = Command(tmp_path, warm=True)
    refused(command("export", "--student", str(folder), "--quantization", "F16", "--out", "out"), said)
    if how == "_orig_mod.":
        refused(command("plan", command.recipe(), "-t", "cpu-x86", "--teacher", str(folder)), said)


def test_an_encoders_wrapped_names_are_told_from_missing_weights(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder", "bert")
    change_weights(folder, lambda tensors: {f"module.{name}": value for name, value in tensors.items()})
    done = Command(tmp_path, warm=True)(
        "export", "--student", str(folder), "--format", "onnx", "--quantization", "FP32", "--out", "out"
    )
    refused(done, "DataParallel", "module.")


def test_an_adapter_is_refused_for_what_it_is(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"base_model.model.x.lora_A.weight": np.zeros((2, 4), np.float32)}, folder / "adapter_model.safetensors")
    command = Command(tmp_path, warm=True)
    refused(command("export", "--student", str(folder), "--out", "out"), "adapter", "merge_and_unload")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(command("export", "--student", str(folder), "--out", "out"), "adapter", "merge_and_unload")
    refused(command("teacher", "cache", command.recipe(), "--teacher", str(folder)), "adapter", "merge_and_unload")


def test_code_of_a_checkpoints_own_is_neither_run_nor_asked_about(model: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    map_ = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    own = copy(model, tmp_path / "own")
    (own / "own.py").write_text("raise SystemExit('it ran')\n")
    edit_json(own / "config.json", auto_map=map_, architectures=["OwnForCausalLM"])
    refused(command("export", "--student", str(own), "--quantization", "F16", "--out", "out"), "OwnForCausalLM")
    encoder = copy(own, tmp_path / "encoder")
    edit_json(encoder / "config.json", model_type="own", architectures=["OwnForSequenceClassification"])
    done = command("export", "--student", str(encoder), "--format", "onnx", "--quantization", "FP32", "--out", "out")
    refused(done, "own.OwnConfig", "never run")
    assert "[y/N]" not in done.stdout + done.stderr
    native = copy(model, tmp_path / "native")
    edit_json(native / "config.json", auto_map=map_)
    done = command("export", "--student", str(native), "--quantization", "F16", "--out", "out", *FAST)
    assert done.returncode == 0, done.stderr
    assert "own code (own.OwnConfig, own.OwnForCausalLM) is not run" in done.stderr


def test_added_words_that_llama_cpp_would_look_for_otherwise_are_refused(tmp_path: Path) -> None:
    """As people add them to a Llama's tokenizer: looked for behind the normalizer, which puts a space before them."""
    from edgedistill.gguf.tokenizer_files import _require_found_as_written

    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    llama = {"type": "Sequence", "normalizers": [prepend, replace]}
    word = {"content": "<new>", "special": False, "normalized": True}
    for normalizer in (llama, {"type": "Lowercase"}):
        shown = {**word, "content": "<New>"}
        with pytest.raises(UserError, match="'<New>' is normalized"):
            _require_found_as_written([shown], normalizer, "tokenizer.json")
    _require_found_as_written([{**word, "normalized": False}], llama, "tokenizer.json")
    _require_found_as_written([{**word, "special": True}], llama, "tokenizer.json")
    _require_found_as_written([{**word, "content": "two words"}], replace, "tokenizer.json")
    _require_found_as_written([word], None, "tokenizer.json")


def test_two_stop_tokens_are_both_kept(model: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = copy(model, tmp_path / "model")
    edit_json(folder / "config.json", eos_token_id=[0, 5])
    edit_json(folder / "generation_config.json", eos_token_id=[0, 5])
    command = Command(tmp_path, warm=True)
    done = command("export", "--student", str(folder), "--quantization", "F16", "--out", "out", "-q", *FAST)
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    said = {role: reader.get_field(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")}
    assert {role: int(value.contents()) for role, value in said.items() if value is not None} == {"eos": 0, "eot": 5}
    assert "5 (" in done.stderr and "generation stops at it" in done.stderr


def test_a_student_stops_where_its_teacher_does(model: Path, tmp_path: Path) -> None:
    """Stop tokens and settings that stand in the teacher's generation_config.json alone, and cannot be saved anew."""
    teacher = copy(model, tmp_path / "teacher")
    edit_json(teacher / "generation_config.json", eos_token_id=[0, 7], temperature=0.5, top_k=3)
    command = Command(tmp_path, warm=True)
    found = command.json(
        "distill", command.recipe(), "-t", "cpu-x86", "--teacher", str(teacher), "--set", "distill.tokens=2000", "-q"
    )
    record = next((tmp_path / "store" / "records" / "student").iterdir())
    kept = json.loads((record / "model" / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["temperature"], kept["top_k"]) == ([0, 7], 0.5, 3), found
    from edgedistill.models.generation import generation_of

    assert generation_of(record / "model", vocab_size=400).stops == (0, 7)


def test_a_tokenizer_with_an_added_word_reads_as_before(model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<new>", normalized=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder, vocab_size=512).tokens[400] == "<new>"


def test_a_chat_template_that_no_bundle_takes_is_no_export_either(model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only with tools') }}")
    command = Command(tmp_path, warm=True)
    done = command("export", "--student", str(folder), "--quantization", "F16", "--out", "out", *FAST)
    refused(done, "chat template", "only with tools")
