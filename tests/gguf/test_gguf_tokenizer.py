"""Tokenizers inside a GGUF, run by llama.cpp, against the tokenizers library and llama.cpp's own vectors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import byte_level_bpe, edit_json, tiny
from vocabularies import differing, random_texts, unknown_to_llama_cpp, vocabulary_in_llama_cpp

from edgedistill.errors import UserError
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.gguf.pretokenizers import BYTES_ONLY, NEW_CHARACTERS_NOTE
from edgedistill.gguf.tokenizer import CONTROL, UNUSED, USER_DEFINED, added_ends, general_name, read_tokenizer
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.verify.tokenizer_check import VARIED_TEXTS, check_tokenizer

# Runs that tokenizers treat specially, and special tokens.
PIECES = (
    *("the", " the", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12345", "é", "e\u0301", "你好", "🙂", "_", "--"),
    *("\u2581", "\u00a0", "\u3000", "\u017f", "\u212a", "İ", "٣٤", "½", ".", " !", "a", "aa", "ed"),
    *("<s>", "</s>", "<|endoftext|>", "<unk>", "<0x41>"),
)
TRICKY = ["".join(random.Random(seed).choices(PIECES, k=1 + seed % 20)) for seed in range(1000)]


def opened(checkpoint: Path, out: Path) -> RuntimeProcess:
    convert_to_gguf(checkpoint, out)
    return RuntimeProcess("llama.cpp", out, threads=1, context_tokens=32, use_extra_bufts=False)


def with_tokenizer(folder: Path, *files: Path, vocab_size: int, **config: Any) -> Path:
    """A random model of that vocabulary with these tokenizer files instead of its own."""
    tiny(folder, vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, **config)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def gpt2_tokenizer(test_data: Path, folder: Path) -> None:
    """vocab.json and merges.txt as a tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    files = test_data / "tokenizers" / "hf_gpt2"
    tokenizer = Tokenizer(models.BPE.from_file(str(files / "vocab.json"), str(files / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def real(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, RuntimeProcess]]]:
    """name → (folder of the original, llama.cpp with the converted one): three real tokenizers."""
    base = tmp_path_factory.mktemp("tokenizers")
    tinyllama = test_data / "tokenizers" / "hf_tinyllama"
    folders = {
        "tinyllama": with_tokenizer(base / "tinyllama", *tinyllama.iterdir(), vocab_size=32000),
        "gpt2": with_tokenizer(base / "gpt2", vocab_size=50257),
        "stories260k": test_data / "weights" / "stories260k-hf",
    }
    gpt2_tokenizer(test_data, folders["gpt2"])
    processes = {name: opened(folder, base / f"{name}.gguf") for name, folder in folders.items()}
    yield {name: (folders[name], process) for name, process in processes.items()}
    for process in processes.values():
        process.close()


def checked(folder: Path, runtime: RuntimeProcess) -> None:
    result = check_tokenizer(
        folder, lambda text, special, parse: runtime.tokenize(text, add_special=special, parse_special=parse)
    )
    assert result.texts >= len(VARIED_TEXTS)
    assert result.mismatches == 0, result.first_mismatch


@pytest.mark.parametrize("name", ["tinyllama", "gpt2", "stories260k"])
def test_real_tokenizers_on_varied_texts(name: str, real: dict[str, tuple[Path, RuntimeProcess]]) -> None:
    checked(*real[name])


@pytest.mark.parametrize("name", ["tinyllama", "gpt2", "stories260k"])
def test_real_tokenizers_on_ten_thousand_random_texts(name: str, real: dict[str, tuple[Path, RuntimeProcess]]) -> None:
    """No difference, special tokens parsed or not; GPT-2's only in characters that llama.cpp does not know."""
    folder, runtime = real[name]
    texts = [*random_texts(), *TRICKY]
    for plain, specials in ((True, False), (False, False), (False, True)):
        wrong = differing(folder, runtime, texts, plain=plain, specials=specials)
        assert [t for t in wrong if name != "gpt2" or not unknown_to_llama_cpp(t)] == []


def test_sentencepiece_without_a_space_in_front(test_data: Path, tmp_path: Path) -> None:
    """As Gemma has it: spaces become marks, and the cut at spaces finds none."""
    folder = tmp_path / "model"
    with_tokenizer(folder, *(test_data / "tokenizers" / "hf_tinyllama").iterdir(), vocab_size=32000)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    edit_json(folder / "tokenizer.json", normalizer=replace, pre_tokenizer=cut)
    assert not read_tokenizer(folder, vocab_size=32000).add_space_prefix
    with vocabulary_in_llama_cpp(folder, 32000) as runtime:
        assert differing(folder, runtime, [*random_texts(), *TRICKY]) == []
        assert runtime.tokenize("hello") != runtime.tokenize(" hello")


@pytest.mark.parametrize(("name", "vectors"), [("gpt2", "gpt-2"), ("tinyllama", "llama-spm")])
def test_llama_cpp_s_own_test_vectors(
    name: str, vectors: str, real: dict[str, tuple[Path, RuntimeProcess]], test_data: Path
) -> None:
    stem = test_data / "tokenizers" / "llamacpp" / f"ggml-vocab-{vectors}.gguf"
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text(encoding="utf-8").splitlines()
    folder, runtime = real[name]
    assert differing(folder, runtime, texts) == differing(folder, runtime, texts, specials=True) == []
    pairs = [(text, [int(t) for t in line.split()]) for text, line in zip(texts, lines, strict=False)]
    assert len(pairs) > 40
    for text, expected in pairs:
        assert runtime.tokenize(text) == expected, text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_every_known_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    byte_level_bpe(folder, pre=pre, special=["<|im_start|>", "<|eot_id|>"])
    if pre == "llama-bpe":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["ignore_merges"] = True
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_tokenizer(folder, vocab_size=400).pre == pre
    assert read_tokenizer(folder, vocab_size=400).notes == [NEW_CHARACTERS_NOTE]
    with opened(folder, tmp_path / "model.gguf") as runtime:
        checked(folder, runtime)


def test_a_wrong_pre_tokenizer_would_be_seen(tmp_path: Path) -> None:
    """The check fails when the tokenizer in the artifact is another one: as if llama-bpe were taken for gpt-2."""
    folder = tiny(tmp_path / "model")
    byte_level_bpe(folder, pre="gpt-2")
    with opened(folder, tmp_path / "model.gguf") as runtime:
        byte_level_bpe(folder, pre="qwen2")
        result = check_tokenizer(
            folder, lambda text, special, parse: runtime.tokenize(text, add_special=special, parse_special=parse)
        )
    assert result.mismatches > 0
    assert result.first_mismatch is not None


def test_padded_vocabulary_and_token_types(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", vocab_size=420)
    byte_level_bpe(folder, special=["<|im_start|>"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = max(t["id"] for t in tokenizer["added_tokens"])
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][-1], "id": last + 1, "content": "[TOOL]", "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = read_tokenizer(folder, vocab_size=420)
    assert found.tokens[last : last + 3] == ["<|im_start|>", "[TOOL]", f"[PAD{last + 2}]"]
    assert found.types[last : last + 3] == [CONTROL, USER_DEFINED, UNUSED]
    assert len(found.tokens) == 420
    with opened(folder, tmp_path / "model.gguf") as runtime:
        assert runtime.info["vocab_size"] == 420
        assert runtime.tokenize("a[TOOL]b")[1] == last + 1
        checked(folder, runtime)


@pytest.mark.parametrize("template", ["$A", "<|endoftext|> $A", "<|endoftext|> $A !"])
@pytest.mark.parametrize("flag", [None, True, False])
def test_bos_and_eos_as_transformers_adds_them(template: str, flag: bool | None, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    folder = tiny(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<|endoftext|>", "!")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", add_bos_token=flag, eos_token="!")
    expected = AutoTokenizer.from_pretrained(folder)("hello world").input_ids
    with opened(folder, tmp_path / "model.gguf") as runtime:
        assert runtime.tokenize("hello world", add_special=True) == expected
        checked(folder, runtime)


def test_bos_from_the_post_processor(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    token = "<|endoftext|>"
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    edit_json(folder / "tokenizer.json", post_processor={"type": "Sequence", "processors": [byte_level, template]})
    assert added_ends(json.loads((folder / "tokenizer.json").read_text()), where="here") == (token, None)
    with opened(folder, tmp_path / "model.gguf") as runtime:
        assert runtime.tokenize("hello", add_special=True)[0] == 0
        checked(folder, runtime)
    edit_json(folder / "tokenizer_config.json", bos_token="!")
    with pytest.raises(UserError, match="which is not the bos_token"):
        read_tokenizer(folder, vocab_size=400)


def test_metaspace_as_transformers_5_saves_it(test_data: Path, tmp_path: Path) -> None:
    """Equal but for what the notes say: a text that begins with a space, and text after special tokens."""
    from transformers import AutoTokenizer

    folder = with_tokenizer(
        tmp_path / "model", *(test_data / "tokenizers" / "hf_tinyllama").iterdir(), vocab_size=32000
    )
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["pre_tokenizer"]["type"] == "Metaspace"
    found = read_tokenizer(folder, vocab_size=32000)
    assert found.add_space_prefix
    assert any("begins with one" in note for note in found.notes)
    with vocabulary_in_llama_cpp(folder, 32000) as runtime:
        wrong = differing(folder, runtime, [*VARIED_TEXTS, *random_texts()], plain=True)
        assert wrong
        assert [text for text in wrong if not text.startswith((" ", "\u2581"))] == []


def test_special_tokens_that_take_the_white_space_behind_them(test_data: Path, tmp_path: Path) -> None:
    """Phi-3's: llama.cpp strips by the model's name, which is therefore set, and cleared where nothing is stripped."""
    folder = tmp_path / "model"
    with_tokenizer(folder, *(test_data / "tokenizers" / "hf_tinyllama").iterdir(), vocab_size=32004)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert not read_tokenizer(folder, vocab_size=32004).strips_right
    added = tokenizer["added_tokens"]
    next(a for a in added if a["content"] == "</s>")["rstrip"] = True
    more = {**added[0], "rstrip": True}
    added += [{**more, "id": 32000 + i, "content": c} for i, c in enumerate(("<|user|>", "<|end|>", "<|assistant|>"))]
    added.append({**more, "id": 32003, "content": "<|endoftext|>", "rstrip": False})
    edit_json(folder / "tokenizer.json", added_tokens=added)
    found = read_tokenizer(folder, vocab_size=32004)
    assert found.strips_right
    assert [n for n in found.notes if "ASCII white space" not in n] == []
    texts = ["<|user|>\n hello <|end|>\n<|assistant|>  hi</s>\t\n x<s>  y <unk> z"]
    texts += [t for t in TRICKY if not {"\u00a0", "\u3000"} & set(t)]
    with vocabulary_in_llama_cpp(folder, 32004) as runtime:
        assert differing(folder, runtime, texts) == []
        assert differing(folder, runtime, ["<|end|>\u00a0a"]) == ["<|end|>\u00a0a"]
    assert (general_name("Phi3-mini", found), general_name("mine", found)) == ("Phi3-mini", "mine (phi-3)")


def test_a_model_called_phi_3_with_another_tokenizer(tmp_path: Path) -> None:
    """llama.cpp would not load it: it looks for Phi-3's tokens by the name."""
    folder = tiny(tmp_path / "model")
    convert_to_gguf(folder, tmp_path / "model.gguf", name="my-Phi-3-student")
    with RuntimeProcess(
        "llama.cpp", tmp_path / "model.gguf", threads=1, context_tokens=32, use_extra_bufts=False
    ) as runtime:
        checked(folder, runtime)


def test_chat_template_from_file_and_config(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    assert read_tokenizer(folder, vocab_size=400).chat_template == ""
    edit_json(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ a }}"}])
    assert read_tokenizer(folder, vocab_size=400).chat_template == "{{ a }}"
    (folder / "chat_template.jinja").write_text("{{ b }}")
    assert read_tokenizer(folder, vocab_size=400).chat_template == "{{ b }}"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "a Unigram model without an unknown token"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "a WordLevel model"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"no pre-tokenizer of llama\.cpp cuts"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "add_prefix_space"),
        ({"normalizer": {"type": "Lowercase"}}, "a Lowercase normalizer"),
        ({"post_processor": {"type": "Nonsense"}}, "a Nonsense post-processor"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
                        {**BYTES_ONLY},
                    ],
                }
            },
            r"no pre-tokenizer of llama\.cpp cuts",
        ),
    ],
)
def test_unknown_tokenizers_are_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    byte_level_bpe(folder)
    edit_json(folder / "tokenizer.json", **change)
    with pytest.raises(UserError, match=cause) as caught:
        read_tokenizer(folder, vocab_size=400)
    assert "--converter" in caught.value.remedy


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path, vocab_size=400)


def test_merges_that_llama_cpp_would_extend_are_refused(test_data: Path, tmp_path: Path) -> None:
    """SentencePiece-style BPE whose merge list leaves out a pair: llama.cpp joins by token, not by pair."""
    source = test_data / "weights" / "stories260k-hf" / "tokenizer.json"
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].remove(["\u2581th", "e"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"leave out '▁th' \+ 'e'"):
        read_tokenizer(tmp_path, vocab_size=512)
