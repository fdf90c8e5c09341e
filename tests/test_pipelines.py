"""Raw input through the original and through what was exported, for some of each kind; benchmarks/pipelines.py has all.

That every class of tokenizer and image processor reads the same from the files that ship is held here for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from command import Command
from pipelines import cases
from pipelines.compare import ODD, SENTENCE, SHORT, images
from pipelines.family_table import LONGEST, config_of, text_checkpoint
from pipelines.image_table import IMAGES
from pipelines.tokenizer_table import TOKENIZERS, save_tokenizer

from edgedistill.errors import UserError
from edgedistill.onnx.inputs import length_batches
from edgedistill.onnx.processors import open_image_processor, open_tokenizer, ship
from edgedistill.onnx.tasks import open_task

ALL = {f"{case.kind}: {case.name}": case for case in cases.cases()}
# Cased, cut and padded on the left, inputs of a tokenizer's own; sizes that are no square.
COMPARED = (
    *(f"tokenizer: {kind}Tokenizer" for kind in ("MPNet", "Qwen2")),
    "image processor: ViTImageProcessor",
    "family: mbart, text-classification",  # which shifts its input with a function that drops a batch of one
)  # fmt: skip
REFUSED = (
    "tokenizer: PerceiverTokenizer", "tokenizer: ProphetNetTokenizer", "image processor: Siglip2ImageProcessor",
    "image processor: ImageGPTImageProcessor", "family: longformer, text-classification",
)  # fmt: skip


def exporter(folder: Path) -> cases.Export:
    command = Command(folder, warm=True)

    def export(student: Path, out: Path, task: str) -> tuple[int, str]:
        words = ["export", "--student", str(student), "--format", "onnx", "--quantization", "FP32", "--out", str(out)]
        done = command(*words, *(["--task", task] if task else []))
        return done.returncode, done.stderr

    return export


@pytest.mark.parametrize("name", COMPARED)
def test_the_exported_folder_alone_gives_what_the_original_gives(name: str, tmp_path: Path) -> None:
    found = cases.run(ALL[name], tmp_path, exporter(tmp_path))
    assert found.state == "equal", found.said
    assert len(found.inputs) >= 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_of_tokens_or_pixels_gives_is_refused_by_name(name: str, tmp_path: Path) -> None:
    found = cases.run(ALL[name], tmp_path, exporter(tmp_path))
    assert found.state == "refused", found.said


@pytest.mark.parametrize("name", [name for name, row in TOKENIZERS.items() if not row.needs])
def test_a_tokenizer_reads_the_same_from_what_ships(name: str, tmp_path: Path) -> None:
    folder, built = tmp_path / "model", tmp_path / "built"
    built.mkdir()
    save_tokenizer(name, folder)  # which cuts nowhere: what ships has to
    config_of(TOKENIZERS[name].family).save_pretrained(folder)
    original = transformers.AutoTokenizer.from_pretrained(folder)
    ship([folder], built, tokenizer=open_tokenizer(folder), max_tokens=LONGEST)
    shipped = transformers.AutoTokenizer.from_pretrained(built)
    assert type(shipped) is type(original)
    texts = [ODD, SENTENCE * 8] if original.pad_token is None else [SHORT, ODD, SENTENCE * 8]
    for given in [[text] for text in texts] + ([texts] if original.pad_token is not None else []):
        padded = {"padding": len(given) > 1, "truncation": True}
        assert dict(shipped(given, **padded)) == dict(original(given, max_length=LONGEST, **padded))


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_processor_gives_the_same_from_what_ships(name: str, tmp_path: Path) -> None:
    folder, built = tmp_path / "model", tmp_path / "built"
    built.mkdir()
    getattr(transformers, f"{name}Pil")(**IMAGES[name].settings).save_pretrained(folder)
    ship([folder], built, tokenizer=None, max_tokens=0)
    shipped = open_image_processor(built)
    assert shipped is not None
    defaults = getattr(transformers, f"{name}Pil")()
    differs = False
    for part in images():
        expected = transformers.AutoImageProcessor.from_pretrained(folder)(list(part.raw), return_tensors="np")
        found = shipped(list(part.raw), return_tensors="np")
        assert set(found) == set(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{part.what} {key}")
        differs |= not _same(expected, defaults, part.raw)
    assert differs, "its settings change nothing, so that losing them would not be seen"


def _same(expected: Any, processor: Any, raw: Any) -> bool:
    try:
        found = processor(list(raw), return_tensors="np")
    except Exception:  # that has no defaults for what is asked of it
        return False
    return all(np.array_equal(np.asarray(found[key]), np.asarray(value)) for key, value in expected.items())


def test_the_shortest_text_is_the_shortest_that_the_model_takes(tmp_path: Path) -> None:
    save_tokenizer("BertTokenizer", tmp_path)
    tokenizer = open_tokenizer(tmp_path)

    def lengths(least: int) -> list[int]:
        found = length_batches(
            tmp_path, tokenizer, [SENTENCE], ["input_ids"], 24, takes=lambda batch: batch["input_ids"].shape[1] >= least
        )
        return [batch["input_ids"].shape[1] for batch in found]

    assert lengths(1) == [3, 12, 24] and lengths(7) == [7, 12, 24] and lengths(99)[0] == 24


def test_a_decoder_that_takes_one_token_at_a_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache FSMT masks nothing: of several tokens each would see those behind it, in torch and graph alike."""
    text_checkpoint(tmp_path / "t5", "T5Tokenizer")
    assert [graph.file for graph in open_task(tmp_path / "t5").graphs] == ["encoder.onnx", "decoder.onnx"]
    text_checkpoint(tmp_path / "m2m_100", "NllbTokenizer", layers=1)  # whose positions leave padding out
    assert len(open_task(tmp_path / "m2m_100").graphs) == 2
    from transformers.models.t5 import modeling_t5

    monkeypatch.setattr(modeling_t5, "create_causal_mask", lambda **_given: None)
    with pytest.raises(UserError, match="T5ForConditionalGeneration does not take several tokens with a cache: they"):
        open_task(tmp_path / "t5")


def test_a_break_of_what_ships_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: other files, another length, another crop or a changed graph is no equal."""
    from pipelines import compare

    expected = [{"logits": np.array([[1.0, 2.0, 4.0]])}, {"logits": np.array([[0.0, 3.0, 1.0]])}]
    given = [compare.Given("one", ["a"]), compare.Given("two", ["b"])]
    near = [{"logits": part["logits"] + 1e-5} for part in expected]
    assert not compare.compare(given, expected, near).wrong
    far = [expected[0], {"logits": expected[1]["logits"] + 1e-3}]
    assert compare.compare(given, expected, far).wrong == ["two: logits differs by 0.0008 of its spread"]
    assert "is [1, 2], not [1, 3]" in compare.compare(given, expected, [{"logits": np.ones((1, 2))}] * 2).wrong[0]
    flat = [{"logits": np.ones((1, 3))}] * 2
    assert compare.compare(given, flat, flat).wrong == ["the original gives the same whatever it reads"]
