"""Checkpoints as other programs leave them: buffers, other names, two saves in one folder, how a program ran them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, tiny
from command import Command
from encoders import tiny_encoder
from family_models import family
from safetensors.numpy import load_file, save_file

from edgedistill.errors import UserError
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.models.folder import locate, open_model
from edgedistill.models.hf_tokenizer import open_tokenizer
from edgedistill.models.loading import RUN_SETTINGS
from edgedistill.models.weights import stored_tensors
from edgedistill.onnx.decoder import _stage
from edgedistill.onnx.tasks import open_task

Tensors = dict[str, Any]
RAN_ELSEWHERE = (
    {"return_dict": False, "output_hidden_states": True, "torchscript": True, "use_cache": False,
     "_attn_implementation": "flash_attention_2"},
    {"output_attentions": True, "attn_implementation": "eager"},
)  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("found") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("found") / "untied")


def change_weights(folder: Path, change: Callable[[Tensors], Tensors], **metadata: str) -> Path:
    tensors = change(dict(load_file(folder / "model.safetensors")))
    written = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    return folder


def gguf(folder: Path) -> bytes:
    out = folder.parent / f"{folder.name}.gguf"
    convert_to_gguf(folder, out)
    return out.read_bytes()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_buffers_of_older_versions_are_no_weights(tmp_path: Path, dtype: Any) -> None:
    bert = tiny_encoder(tmp_path / "bert", "bert-model")
    plain = set(stored_tensors(bert))
    ids = np.arange(66)[None].astype(dtype)
    change_weights(bert, lambda w: {**w, "embeddings.position_ids": ids, "embeddings.token_type_ids": ids})
    assert set(stored_tensors(bert)) == plain
    gpt2 = family(tmp_path / "gpt2", "gpt2", {})
    plain = gguf(gpt2)
    triangle = np.tril(np.ones((64, 64), dtype))[None, None]
    change_weights(gpt2, lambda w: {**w, **{f"transformer.h.{i}.attn.bias": triangle for i in range(2)}})
    assert gguf(gpt2) == plain
    # whole numbers under the name of a weight are a quantized model
    change_weights(gpt2, lambda w: {**w, "transformer.h.0.attn.c_attn.weight": np.zeros((64, 192)).astype(dtype)})
    with pytest.raises(UserError, match=r"c_attn\.weight is stored as"):
        stored_tensors(gpt2)


def _only_head(tensors: Tensors) -> Tensors:
    return {name.replace("model.embed_tokens", "lm_head"): value for name, value in tensors.items()}


def _no_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


@pytest.mark.parametrize("change", [_only_head, _no_prefix])
def test_names_that_transformers_understands_are_understood(
    change: Callable[[Tensors], Tensors], tied: Path, untied: Path, tmp_path: Path
) -> None:
    folder = change_weights(copy(tied, tmp_path / "found"), change)
    assert gguf(folder) == gguf(copy(tied, tmp_path / "usual"))
    assert open_model(str(folder)).shape == open_model(str(tied)).shape
    if change is _no_prefix:
        folder = change_weights(copy(untied, tmp_path / "own head"), change)
        assert gguf(folder) == gguf(copy(untied, tmp_path / "its usual"))


def test_a_weight_with_two_names_that_is_saved_once(tied: Path, untied: Path, tmp_path: Path) -> None:
    """As safetensors' save_model leaves it: the name that it dropped is in the file's metadata."""
    folder = copy(untied, tmp_path / "found")
    change_weights(folder, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"]})
    whole = gguf(folder)
    dropped = {"model.embed_tokens.weight": "lm_head.weight"}
    change_weights(folder, lambda w: {n: v for n, v in w.items() if n not in dropped}, **dropped)
    assert gguf(folder) == whole
    # a head of its own, and no embedding anywhere, is nothing that can be guessed
    lost = change_weights(copy(untied, tmp_path / "lost"), lambda w: {n: v for n, v in w.items() if n not in dropped})
    with pytest.raises(UserError, match="embed_tokens"):
        convert_to_gguf(lost, tmp_path / "lost.gguf")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_tokenizer_json_lacks_are_refused_until_it_has_them(name: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "found", vocab_size=416)
    first = max(open_tokenizer(folder / "tokenizer.json").get_vocab().values()) + 1
    whole = {index: token for token, index in open_tokenizer(folder / "tokenizer.json").get_vocab().items()}
    added = {first: "<|im_start|>", first + 1: "<|im_end|>"}
    listed = {str(index): {"content": token, "special": True} for index, token in (whole | added).items()}
    if name == "added_tokens.json":
        (folder / name).write_text(json.dumps({token: index for index, token in added.items()}))
    else:
        edit_json(folder / name, added_tokens_decoder=listed)
    found = []
    for opened in (open_model, lambda path: convert_to_gguf(Path(path), tmp_path / "out.gguf")):
        with pytest.raises(UserError, match=rf"adds the token '<\|im_start\|>' with the id {first}") as error:
            opened(str(folder))
        found.append(error.value.remedy.partition(": ")[2])
    subprocess.run(found[0].replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
    open_model(str(folder))
    convert_to_gguf(folder, tmp_path / "out.gguf")
    assert open_tokenizer(folder / "tokenizer.json").encode("<|im_start|>").ids[-1:] == [first]


def test_a_folder_without_tokenizer_json_gets_it_by_the_remedy(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "found folder")
    tree = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tree["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tree["merges"]))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(UserError, match=r"has no tokenizer\.json") as error:
        convert_to_gguf(folder, tmp_path / "out.gguf")
    command = error.value.remedy.partition(": ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    convert_to_gguf(folder, tmp_path / "out.gguf")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")  # which transformers reads where sentencepiece is installed
    with pytest.raises(UserError, match=r"only SentencePiece's tokenizer\.model(?s:.*)pip install sentencepiece"):
        convert_to_gguf(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["swish", "silu"])
def test_one_activation_has_two_names(name: str, untied: Path, tmp_path: Path) -> None:
    folder = copy(untied, tmp_path / "found")
    edit_json(folder / "config.json", hidden_act=name)
    assert open_model(str(folder)).shape == open_model(str(untied)).shape
    assert gguf(folder) == gguf(copy(untied, tmp_path / "usual"))


def _sharded(folder: Path) -> dict[str, Path]:
    """The folder's weights in two shards with an index. Name of a tensor → its shard."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    placed = {name: shards[index % 2] for index, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({n: tensors[n] for n, place in placed.items() if place == shard}, shard, metadata={"format": "pt"})
    weight_map = {name: shard.name for name, shard in placed.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return placed


def _into(shard: Path, name: str, value: Any) -> None:
    save_file({**load_file(shard), name: value}, shard, metadata={"format": "pt"})


def test_shards_that_say_two_things_are_refused(tied: Path, tmp_path: Path) -> None:
    folder = copy(tied, tmp_path / "found")
    placed = _sharded(folder)
    assert gguf(folder) == gguf(copy(tied, tmp_path / "usual"))
    for name, shard in list(placed.items())[:4]:  # from the first into the second, and the other way round
        other = next(place for place in placed.values() if place != shard)
        before = other.read_bytes()
        _into(other, name, np.ones_like(load_file(shard)[name]))
        with pytest.raises(UserError, match=f"(?s){name} is in .*two saves"):
            stored_tensors(folder)
        other.write_bytes(before)
    # what the index forgot is read as transformers reads it: a weight, or one too many
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    forgotten = weight_map.pop("model.norm.weight")
    edit_json(index, weight_map=weight_map)
    assert gguf(folder) == gguf(tmp_path / "usual")
    _into(folder / forgotten, "value_head.weight", np.ones((1, 64), np.float32))
    with pytest.raises(UserError, match="value_head"):
        convert_to_gguf(folder, tmp_path / "more.gguf")


def test_files_of_another_save_beside_the_model_are_not_read(tied: Path, tmp_path: Path) -> None:
    folder = copy(tied, tmp_path / "found")
    noise = {name: np.ones_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(noise, folder / "consolidated.safetensors")
    save_file(noise, folder / "model-00001-of-00003.safetensors")
    gone = {"weight_map": {"model.norm.weight": "model-00001-of-00030.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(gone))
    assert gguf(folder) == gguf(copy(tied, tmp_path / "usual"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "spiece.model", "vocab.txt"])
def test_what_git_left_in_a_files_place_is_called_so(name: str, tied: Path, tmp_path: Path) -> None:
    folder = copy(tied, tmp_path / "found")
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4827364\n")
    with pytest.raises(UserError, match=f"(?s){name} is a pointer of Git LFS.*git lfs pull"):
        locate(str(folder), role="student")


@pytest.mark.parametrize("ran", RAN_ELSEWHERE)
def test_how_another_program_ran_a_model_changes_nothing(ran: dict[str, Any], tied: Path, tmp_path: Path) -> None:
    folder = copy(tied, tmp_path / "found")
    edit_json(folder / "config.json", **ran)
    words = ("--quantization", "F16", "--out", "out", "--set", "export.compare_speed=false")
    done = Command(tmp_path, warm=True)("export", "--student", str(folder), *words)
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "config.json").read_text())
    staged = json.loads((_stage(folder, tmp_path / "staged", config, 64) / "config.json").read_text())
    assert not set(staged) & (set(ran) - {"use_cache"}) and staged["max_position_embeddings"] == 64
    for kind in ("t5", "bert", "marian"):
        encoder = tiny_encoder(tmp_path / kind, kind)
        edit_json(encoder / "config.json", **ran)
        model = open_task(encoder).model
        assert model.config._attn_implementation == "sdpa"
        found = model(**model.dummy_inputs)
        assert not {"hidden_states", "attentions", "encoder_attentions", "decoder_hidden_states"} & set(found)


def test_models_are_loaded_in_one_way(repository: Path) -> None:
    """Every call that loads weights takes LOADING, or says the same by itself where it cannot import it."""
    asked = 0
    for path in (repository / "edgedistill").rglob("*.py"):
        if path.name.startswith("sample_"):  # what a bundle's user runs, on a config.json that this program wrote
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "from_pretrained":
                continue
            said = ast.unparse(node)
            if "dtype=" not in said:  # a tokenizer, a processor, a configuration
                continue
            asked += 1
            assert "**LOADING" in said or all(f"{key}=" in said for key in RUN_SETTINGS), f"{path}: {said}"
    assert asked >= 9
