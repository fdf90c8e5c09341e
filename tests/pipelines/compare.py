"""Raw input through the original by transformers, and through the exported folder by transformers and onnxruntime.

Nothing of edgedistill is used here: this is what a user of the exported folder has. B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
# task → the class that loads the original, and the outputs that are compared
CLASSES = {
    "text-classification": ("AutoModelForSequenceClassification", ("logits",)),
    "token-classification": ("AutoModelForTokenClassification", ("logits",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
    "fill-mask": ("AutoModelForMaskedLM", ("logits",)),
    "feature-extraction": ("AutoModel", ("last_hidden_state",)),
    "image-classification": ("AutoModelForImageClassification", ("logits",)),
    "text2text": ("AutoModelForSeq2SeqLM", ("logits",)),
}
SHORT = "a"
ODD = "DON'T Panic!  Naïve Café — 你好 мир 🙂\r\n\t(x+1)**2; the fox's <b>RIVER</b>, I'm 25"
SENTENCE = "The quiet fox jumps over a lazy dog and the Girl; café, 10 lamps?"
SECOND = "the river and I"
# Of the difference over the output's spread: float32 sums in another order.
LIMIT = 1e-4
NEW_TOKENS = 8


@dataclass(frozen=True)
class Compared:
    """`error`: the largest relative difference. `inputs`: what was compared. `wrong`: what is not equal."""

    error: float
    inputs: list[str]
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """A raw input: `what` for people, the texts or images, and for texts the second of a pair."""

    what: str
    raw: Sequence[Any]
    second: str | None = None


def text_inputs(
    tokenizer: Any, longest: int, *, shortest: str = SHORT, pairs: bool = False, mask: bool = False
) -> list[Given]:
    """Single texts of the shortest, a middle and more than the longest length, odd ones, a batch, and pairs."""

    def of(tokens: int) -> str:
        text = SENTENCE
        while len(tokenizer(text)["input_ids"]) < tokens:
            text += " " + SENTENCE
        words = text.split(" ")
        while len(words) > 1 and len(tokenizer(" ".join(words))["input_ids"]) > tokens:
            words.pop()
        return " ".join(words)

    middle, long = of(longest // 2), of(2 * longest) + " " + SENTENCE
    texts = [("shortest", shortest), ("odd", ODD), ("middle", middle), ("longest", long)]
    if mask and tokenizer.mask_token:
        texts.append(("masked", f"the {tokenizer.mask_token} jumps"))
    given = [Given(what, [text]) for what, text in texts]
    if tokenizer.pad_token is not None:
        given.append(Given("batch", [shortest, middle, ODD]))
    if pairs:
        given += [Given("pair", [SENTENCE], SECOND), Given("long pair", [SECOND], long)]
    return given


def original_text(folder: Path, task: str, longest: int, shortest: str = SHORT) -> tuple[list[Given], list[Arrays]]:
    """What the original gives for texts, of which it takes `longest` tokens, and none shorter than `shortest`."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name, outputs = CLASSES[task]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    pairs = task in ("text-classification", "question-answering")
    given = text_inputs(tokenizer, longest, shortest=shortest, pairs=pairs, mask=task == "fill-mask")
    if task == "question-answering":
        given = [part for part in given if part.second is not None or part.what in ("shortest", "batch")]
    found = []
    for part in given:
        tokens = _tokens(tokenizer, part, "pt", max_length=longest)
        with torch.inference_mode():
            if task == "text2text":
                found.append(_generated(model, tokens))
                continue
            made = model(**tokens)
        mask = tokens.get("attention_mask")
        found.append(
            {name: _real(made[name].float().numpy(), None if mask is None else mask.numpy()) for name in outputs}
        )
    return given, found


def exported_text(folder: Path, task: str, given: Sequence[Given]) -> Iterator[Arrays]:
    """What the exported folder gives for the same, by itself."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    run = text2text_run(folder) if task == "text2text" else session_run(folder / "model.onnx")
    for part in given:
        tokens = _tokens(tokenizer, part, "np")
        found = run({name: np.asarray(value) for name, value in tokens.items()})
        mask = tokens.get("attention_mask")
        yield {name: found[name] if task == "text2text" else _real(found[name], mask) for name in found}


def _tokens(tokenizer: Any, part: Given, tensors: str, **options: Any) -> Any:
    texts = list(part.raw)
    second = None if part.second is None else [part.second] * len(texts)
    return tokenizer(
        texts, *([second] if second else []), return_tensors=tensors, truncation=True, padding=len(texts) > 1, **options
    )


def _real(values: NDArray[Any], mask_BT: NDArray[Any] | None) -> NDArray[Any]:
    """Without what was computed of padding."""
    if mask_BT is None or values.shape[:2] != mask_BT.shape:
        return values
    return np.asarray(values[np.asarray(mask_BT) > 0])


def _generated(model: Any, tokens: Any) -> Arrays:
    """Greedy text of transformers' own generate, and the logits of each step."""
    made = model.generate(
        **tokens, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    logits = np.stack([step.float().numpy() for step in made.logits], axis=1)
    return {"logits": logits, "sequences": made.sequences[:, -logits.shape[1] :].numpy()}


def session_run(path: Path) -> Callable[[Arrays], Arrays]:
    """The graph in onnxruntime, as a function of all that the tokenizer or processor gives."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(arrays: Arrays) -> Arrays:
        found = session.run(None, {name: arrays[name] for name in names})
        return dict(zip(outputs, found, strict=True))

    return run


def text2text_run(folder: Path) -> Callable[[Arrays], Arrays]:
    """Encoder once, decoder token by token with its cache, as docs/onnx-export.md describes it."""
    import onnxruntime
    import transformers

    encode = session_run(folder / "encoder.onnx")
    decoder = onnxruntime.InferenceSession(str(folder / "decoder.onnx"), providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in decoder.get_inputs()}
    outputs = [value.name for value in decoder.get_outputs()]
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = transformers.GenerationConfig.from_pretrained(folder)
    start = settings.decoder_start_token_id
    start = config.decoder_start_token_id if start is None else start
    forced = {0: settings.forced_bos_token_id, NEW_TOKENS - 1: settings.forced_eos_token_id}
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]

    def run(arrays: Arrays) -> Arrays:
        encoded = encode(arrays)
        batch = len(arrays["input_ids"])
        cache = {
            name: np.zeros([batch, shape[1], 0, shape[3]], np.float32)
            for name, shape in shapes.items()
            if name.startswith("past_")
        }
        fixed = {name: encoded[name] for name in shapes if name.startswith("cross_")}
        if "encoder_attention_mask" in shapes:
            fixed["encoder_attention_mask"] = arrays["attention_mask"]
        ids_B1 = np.full((batch, 1), start, np.int64)
        logits, chosen = [], []
        done = np.zeros(batch, bool)
        for step in range(NEW_TOKENS):
            made = dict(zip(outputs, decoder.run(None, {"input_ids": ids_B1, **fixed, **cache}), strict=True))
            cache = {name: made[name.replace("past_", "present_")] for name in cache}
            logits.append(made["logits"][:, -1])
            best = made["logits"][:, -1].argmax(-1)
            if forced.get(step) is not None:
                best = np.full_like(best, forced[step])
            best = np.where(done, settings.pad_token_id or 0, best)
            done |= np.isin(best, [stop for stop in stops if stop is not None])
            chosen.append(best)
            ids_B1 = best[:, None].astype(np.int64)
            if done.all():
                break
        return {"logits": np.stack(logits, axis=1), "sequences": np.stack(chosen, axis=1)}

    return run


# Images


def images() -> list[Given]:
    """Photograph-like images: tiny, upright, flat and larger than any processor asks for."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def photograph(width: int, height: int) -> Any:
        coarse = (rng.random((6, 6, 3)) * 255).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = smooth + rng.normal(0, 12, smooth.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    sizes = {"smallest": (9, 7), "upright": (31, 60), "flat": (90, 41), "largest": (640, 427)}
    given = [Given(f"{what} {width}x{height}", [photograph(width, height)]) for what, (width, height) in sizes.items()]
    return [*given, Given("two", [photograph(50, 50), photograph(50, 50)])]


def original_images(folder: Path, task: str) -> tuple[list[Given], list[Arrays]]:
    import torch
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    name, outputs = CLASSES[task]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    given = images()
    for part in given:
        pixels = processor(list(part.raw), return_tensors="pt")
        with torch.inference_mode():
            made = model(**pixels)
        found.append({name: made[name].float().numpy() for name in outputs})
    return given, found


def exported_images(folder: Path, given: Sequence[Given]) -> Iterator[Arrays]:
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    run = session_run(folder / "model.onnx")
    for part in given:
        pixels = processor(list(part.raw), return_tensors="np")
        yield run({name: np.asarray(value) for name, value in pixels.items()})


# Differences


def compare(given: Sequence[Given], expected: Sequence[Arrays], found: Sequence[Arrays]) -> Compared:
    """Every output of every input by itself: its difference over its spread, or over that of all where it is larger."""
    worst, wrong = 0.0, []
    spreads: Mapping[str, float] = {
        name: max(float(np.std(_flat([part[name]]))) for part in expected) for name in expected[0]
    }
    for part, theirs, ours in zip(given, expected, found, strict=True):
        for name, reference in theirs.items():
            made = ours[name]
            if made.shape != reference.shape:
                wrong.append(f"{part.what}: {name} is {list(made.shape)}, not {list(reference.shape)}")
            elif name == "sequences":
                if not np.array_equal(made, reference):
                    wrong.append(f"{part.what}: the text is {made.tolist()}, not {reference.tolist()}")
            else:
                error = float(np.sqrt(np.mean(np.square(made.astype(np.float64) - reference))))
                error = error / spreads[name] if spreads[name] > 0 else error
                worst = max(worst, error) if np.isfinite(error) else float("inf")
                if not error <= LIMIT:
                    wrong.append(f"{part.what}: {name} differs by {error:.2g} of its spread")
    if not any(spread > 0 for name, spread in spreads.items() if name != "sequences"):
        wrong.append("the original gives the same whatever it reads")
    return Compared(worst, [part.what for part in given], wrong)


def _flat(parts: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in parts])
