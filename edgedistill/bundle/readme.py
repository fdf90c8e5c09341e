"""README.md of a bundle: its front door, for somebody who has never trained a model."""

from __future__ import annotations

from collections.abc import Sequence

from edgedistill.bundle.card import markdown, target_text
from edgedistill.bundle.samples import GENAI_CONFIG, PACKAGES
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import SUMS, BundleArtifact, Manifest
from edgedistill.records.retention import Retention

WORDS = (
    ("token", "a piece of text with a number: what the model reads and writes"),
    ("perplexity", "how badly a model predicts a text; lower is better"),
    ("retention", "the teacher's perplexity divided by this model's, on the same text; 1.0: nothing was lost"),
    ("the same first choice", "how often this model and its teacher find the same next token likeliest"),
    ("the gate", "the least retention that was asked for; a model below it gets no bundle"),
    ("measured", "run on the device that is named"),
    ("proxy", "run on another machine: says nothing about the speed of the device"),
    ("quantized", "stored with fewer bits a number: smaller, and not quite the same"),
)


def readme_text(manifest: Manifest, figures: Sequence[tuple[Retention, Latency | None]]) -> str:
    """What goes in and out, how large and fast it is, what to ship, how to check it. `figures`: a pair an artifact."""
    first = manifest.artifacts[0]
    lines = [
        f"# {markdown(manifest.name)}",
        "",
        f"A language model of {manifest.student.parameters:,} parameters for {target_text(manifest)}: text goes in, and"
        " the text that most likely follows comes out.",
        "",
        "## Try it",
        "",
        *_example(first),
        "",
        "## What goes in and out",
        "",
        f"- In: token ids, made from text by the tokenizer in `preprocess/`. {_starts(first)}",
        f"- Out: for each token the scores (logits) of the {first.vocab_size:,} tokens that may follow.",
        f"- Prompt: {_prompt(first)}",
        f"- It ends: {_stops(first)}",
        f"- Context: prompt and answer together have at most {first.context_tokens:,} tokens.",
        "",
        "## Size, quality, speed",
        "",
    ]
    for artifact, (retention, latency) in zip(manifest.artifacts, figures, strict=True):
        lines += _facts(artifact, retention, latency)
    lines += [
        "## What to ship",
        "",
        *(f"- `{artifact.folder}/`: the model for {artifact.runtime}." for artifact in manifest.artifacts),
        "- `preprocess/`: the tokenizer and the chat template, if your runtime does not read them from the model.",
        "- `LICENSE` and `NOTICE`. Read them first: what is unknown is called unknown there.",
        "",
        "`golden/`, `reports/`, `samples/`, `MODEL_CARD.md`, `sbom.cdx.json`, `manifest.json` and `SHA256SUMS` are for"
        " the people who check it.",
        "",
        "## Check it",
        "",
        "```sh",
        f"sha256sum -c {SUMS}     # every file is the one that was written",
        "edgedistill bundle verify .    # the same, and the model gives the recorded outputs in its runtime",
        "```",
        "",
        "## Golden vectors",
        "",
        *_golden(first),
        "",
        "## Words",
        "",
        *(f"- **{word}**: {meaning}." for word, meaning in WORDS),
    ]
    return "\n".join(lines) + "\n"


def _example(artifact: BundleArtifact) -> list[str]:
    if artifact.format not in PACKAGES:
        return [f"There is no sample program for {artifact.format}."]
    if artifact.format == "onnx" and not any(entry.path.endswith(GENAI_CONFIG) for entry in artifact.files):
        return ["There is no sample program: open the graph with onnxruntime."]
    return [
        "```sh",
        f"pip install {PACKAGES[artifact.format]}",
        'python samples/python/run.py "Once upon a time"',
        "```",
    ]


def _starts(artifact: BundleArtifact) -> str:
    golden = artifact.golden
    if golden.vocabulary.bos is None or golden.vocabulary.add_bos is False:
        return "No token stands before the text."
    return f"Token {golden.vocabulary.bos} (BOS) stands before the text."


def _prompt(artifact: BundleArtifact) -> str:
    if artifact.golden.chat is None:
        return "plain text; there is no chat template."
    return f"a conversation, written by the chat template in `preprocess/{markdown(artifact.golden.chat.template)}`."


def _stops(artifact: BundleArtifact) -> str:
    stops = artifact.golden.vocabulary.stop
    shown = ", ".join(str(token) for token in stops[:8]) + (", ..." if len(stops) > 8 else "")
    return f"at one of the tokens {shown}, or where you stop asking." if stops else "where you stop asking."


def _facts(artifact: BundleArtifact, retention: Retention, latency: Latency | None) -> list[str]:
    shipped = retention.rungs[-1]
    low = retention.retention.ci95
    kept = f"{retention.retention.value:.3f}" + ("" if low is None else f" (95 %: {low[0]:.3f} to {low[1]:.3f})")
    lines = [
        f"`{artifact.folder}/{artifact.entry}` ({markdown(artifact.name)}):",
        "",
        f"- Size: {artifact.bytes:,} bytes.",
        f"- Retention: {kept}; the gate asked for {retention.gate.min_retention:g}, and it"
        f" {'passed' if retention.gate.passed else 'did not pass'}. Perplexity {shipped.perplexity:.4g}, the teacher's"
        f" {retention.rungs[0].perplexity:.4g}.",
        f"- The same first choice as the teacher: {shipped.top1_agreement:.1%} of the tokens. Neither figure is a share"
        " of abilities.",
    ]
    if latency is None:
        return [*lines, "- Speed and memory: not measured.", ""]
    where = markdown(f"{latency.measured_on.get('cpu')}, {latency.measured_on.get('threads')} threads")
    return [
        *lines,
        f"- Speed ({latency.basis}, on {where}): {latency.decode_tokens_per_s:,.0f} tokens/s, the first after"
        f" {latency.ttft_ms.p50:,.1f} ms.",
        f"- Memory there: {latency.peak_rss_bytes:,} bytes at most.",
        "",
    ]


def _golden(artifact: BundleArtifact) -> list[str]:
    golden = artifact.golden
    case = golden.cases[0]
    return [
        f"`golden/` holds {len(golden.cases)} prompts and what {golden.runtime} gave for them. The files are NumPy"
        " arrays, little-endian. Of the first prompt:",
        "",
        f"- `{case.prompt}`: the text, in UTF-8.",
        f"- `{case.tokens}`: its {case.token_count} token ids, int32 [{case.token_count}].",
        f"- `{case.logits}`: float32 [{golden.vocab_size}], the scores after the prompt's last token.",
        f"- `{case.greedy}`: int32 [{golden.new_tokens}], the likeliest tokens one after another.",
        "",
        "`greedy_compared` in `manifest.json` says of each prompt how many of the likeliest tokens are compared: those"
        " that no tolerated difference could turn. Where it is 0, none is. The tolerance of each output is there too.",
    ]
