"""What `export` wrote is held to the model: a fault that a converter plants is refused and named, no folder is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from attack.faults import seeded
from attack.gguf_faults import gguf_faults
from attack.onnx_faults import onnx_faults
from checkpoints import copy, edit_json, tiny
from command import Command, refused

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.gguf.quantize import export_gguf
from edgedistill.models.generation import chat_templates, generation_of, generation_settings, render
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.verify.faithful import check_faithful

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\r\n{{ m['content'] }}\n{% endfor %}"
# The artifact says nothing less that way, or says it of nothing that is computed with.
COSMETIC = {"another name"}
# The converter is asked for the file that was prepared: name → the words that the refusal must hold.
PLANTED = {
    "token ids shifted by one": "tokenizer.ggml.tokens",
    "two merges swapped": "tokenizer.ggml.merges",
    "the BOS flag flipped": "tokenizer.ggml.add_bos_token",
    "another pre-tokenizer": "tokens differ",
    "another EOS": "eos_token_id",
    "an EOT that is a letter": "eot_token_id",
    "the chat template replaced": "tokenizer.chat_template",
    "a context of 64": "llama.context_length",
    "a context of 100000": "llama.context_length",
    "all norms times 1.04": "attn_norm.weight",
    "an epsilon of 0.001": "layer_norm_rms_epsilon",
    "a RoPE base of 10,500": "llama.rope.freq_base",
    "transposed: blk.{first}.attn_q.weight": "blk.0.attn_q.weight",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny(tmp_path_factory.mktemp("checks") / "model", vocab_size=400)
    edit_json(folder / "tokenizer_config.json", chat_template="{{ 'not this one' }}")
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    return folder


@pytest.fixture(scope="module")
def float_gguf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model.gguf"
    convert_to_gguf(model, path, dtype="F16")
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("command"), warm=True)


def converter(folder: Path, given: Path) -> Path:
    """A script with the arguments of llama.cpp's own, which writes the file `given`."""
    script = folder / "convert.py"
    script.write_text(f"import shutil, sys\nshutil.copy({str(given)!r}, sys.argv[sys.argv.index('--outfile') + 1])\n")
    return script


@pytest.mark.parametrize("name", PLANTED)
def test_what_a_converter_plants_is_refused(
    name: str, model: Path, float_gguf: Path, command: Command, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.gguf"
    shutil.copyfile(float_gguf, planted)
    fault = next(f for f in gguf_faults(planted) if f.name == name)
    fault.apply(planted, seeded(fault))
    out = tmp_path / "out"
    done = command(
        "export", "--student", str(model), "--format", "gguf", "--quantization", "F16", "--out", str(out),
        "--converter", str(converter(tmp_path, planted)),
    )  # fmt: skip
    refused(done, PLANTED[name])
    assert not out.exists() and not list(tmp_path.glob(".out.*"))


def test_an_honest_converter_is_compared_and_passes(model: Path, float_gguf: Path, tmp_path: Path) -> None:
    from edgedistill.quantization.options import ExportOptions

    for quantization in ("F16", "Q4_0"):
        made = write_artifact(
            model, tmp_path / quantization, format_="gguf", quantization=quantization, context_tokens=64, name="m",
            options=ExportOptions(converter=converter(tmp_path, float_gguf), compare_speed=False),
        )  # fmt: skip
        assert made.parity is not None and made.tool_versions["converter"] == "convert.py"


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_every_fault_of_a_gguf_is_found_without_running_it(model: Path, quantization: str, tmp_path: Path) -> None:
    """A sample of the planted faults, another one for each type; all of them are benchmarks/attack.py's."""
    good = tmp_path / "good"
    made = export_gguf(model, good, quantization=quantization, context_tokens=64, threads=1, name="m")
    assert check_faithful(made, good, model) == []
    faults = [f for f in gguf_faults(good / "model.gguf") if f.name not in COSMETIC]
    step, first = 7, 0 if quantization == "F16" else 3
    added = [f for f in faults if f.kind == "added key"]
    assert len(added) > 10
    for fault in [*faults[first::step], *added]:
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        fault.apply(bad / "model.gguf", seeded(fault))
        try:
            found = [str(finding) for finding in check_faithful(made, bad, model)]
        except UserError as error:
            found = [str(error)]
        assert found, fault.name
        shutil.rmtree(bad)


def test_all_stop_tokens_travel_into_a_gguf(model: Path, tmp_path: Path) -> None:
    stopping = copy(model, tmp_path / "model")
    edit_json(stopping / "config.json", eos_token_id=[300, 301])
    edit_json(stopping / "generation_config.json", eos_token_id=[300, 301], repetition_penalty=9, max_length=3)
    edit_json(stopping / "tokenizer_config.json", eos_token=None)
    facts = convert_to_gguf(stopping, tmp_path / "model.gguf")
    with RuntimeProcess("llama.cpp", tmp_path / "model.gguf", threads=1, context_tokens=0) as process:
        runtime = process.generation()
    # <|endoftext|> ends a text in llama.cpp by what it is called
    assert runtime["stops"] == [0, 300, 301] and runtime["eos"] == 300
    assert runtime["template"].encode() == TEMPLATE.encode()
    said = " ".join(facts["notes"])
    assert "300 ('ju') is a word" in said and "max_length 3" in said and "may also stop at 0" in said
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.sampling.penalty_repeat").contents() == 9.0
    assert reader.get_field("tokenizer.ggml.eot_token_id").contents() == 301


@pytest.mark.parametrize(
    ("eos", "cause"),
    [
        ([300, 301, 302, 303], "5 stop tokens"),
        (400, "eos_token_id 400 is not a token"),
        (-1, "eos_token_id -1 is not a token"),
        ("<|endoftext|>", "it is a token's id"),
        (True, "it is a token's id"),
    ],
)
def test_stop_tokens_that_mean_nothing_or_too_much_are_refused(
    eos: Any, cause: str, model: Path, tmp_path: Path
) -> None:
    stopping = copy(model, tmp_path / "model")
    edit_json(stopping / "generation_config.json", eos_token_id=eos)
    with pytest.raises(UserError) as caught:
        convert_to_gguf(stopping, tmp_path / "model.gguf")
    assert cause in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_model_without_a_stop_token_is_refused(model: Path, tmp_path: Path) -> None:
    silent = copy(model, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        edit_json(silent / name, eos_token_id=None)
    edit_json(silent / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r"names no token that ends a text, and llama\.cpp would take number 11"):
        convert_to_gguf(silent, tmp_path / "model.gguf")


def test_files_that_name_different_stop_tokens(model: Path, tmp_path: Path) -> None:
    """Generation stops at each of them, and the notes say which file says what."""
    stopping = copy(model, tmp_path / "model")
    edit_json(stopping / "generation_config.json", eos_token_id=301)
    found = generation_of(stopping, vocab_size=400)
    assert found.stops == (0, 301) and found.plain == (301,)
    assert any("generation_config.json says 301" in note for note in found.notes)


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for key, value in (("temperature", -1), ("top_p", 2), ("repetition_penalty", "high"), ("max_length", 0)):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value, "do_sample": True}))
        with pytest.raises(UserError, match=key):
            generation_settings(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "top_k": 50}))
    assert (
        generation_settings(tmp_path) == {}
    )  # without do_sample transformers takes the best token, at any temperature


def test_named_chat_templates_travel(model: Path, tmp_path: Path) -> None:
    named = copy(model, tmp_path / "model")
    (named / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    edit_json(named / "tokenizer_config.json", chat_template=templates)
    assert chat_templates(named) == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    made = export_gguf(named, tmp_path / "out", quantization="F16", context_tokens=64, threads=1, name="m")
    assert check_faithful(made, tmp_path / "out", named) == []
    edit_json(
        named / "tokenizer_config.json", chat_template=[*templates[:1], {"name": "tool_use", "template": "{{ 3 }}"}]
    )
    assert [f.name for f in check_faithful(made, tmp_path / "out", named)] == ["tokenizer.chat_template.tool_use"]


def test_a_template_is_rendered_as_transformers_does(model: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Hi"}]
    asked = AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert render(TEMPLATE, messages) == asked


def test_an_onnx_folder_is_held_to_the_model(model: Path, tmp_path: Path) -> None:
    """Stop tokens, search settings and template as the model has them; a sample of the planted faults is found."""
    asked = copy(model, tmp_path / "model")
    (asked / "chat_template.jinja").write_text(TEMPLATE.replace("\r", ""))  # the planters read text, not bytes
    edit_json(asked / "generation_config.json", eos_token_id=[0, 300, 301], repetition_penalty=1.25)
    good = tmp_path / "good"
    made = write_artifact(asked, good, format_="onnx", quantization="INT4", context_tokens=128, name="m")
    config = json.loads((good / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [0, 300, 301]
    assert config["search"]["repetition_penalty"] == 1.25 and config["search"]["max_length"] == 128
    assert check_faithful(made, good, asked) == []
    wanted = {
        "an epsilon of 0.001", "a residual left out", "the activation without its sigmoid", "all norms times 1.04",
        "model.eos_token_id: changed", "model.context_length: 64", "the chat template replaced",
    }  # fmt: skip
    faults = [f for f in onnx_faults(good) if f.name in wanted]
    assert len(faults) > 4, [f.name for f in onnx_faults(good)]
    for fault in faults:
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        fault.apply(bad, seeded(fault))
        assert check_faithful(made, bad, asked), fault.name
        shutil.rmtree(bad)
