"""What the manifest says of golden vectors.

Legend: T tokens of a prompt, N greedy tokens, R = T + N rows of logits, V vocabulary, K best ids of a row, P probed
ids.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from edgedistill.records.base import Record

Finite = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
OutputName = Literal["tokens", "greedy", "logits", "rms", "scale", "kl", "rank"]
DamageSeen = Literal["anywhere", "alike"]
ArrayType = Literal["<i4", "<f4"]
Setting = str | int | float | bool | None
TOP_IDS = 16
PROBED_IDS = 48
MAX_NEW_TOKENS = 4096
MAX_CONTEXT = 1 << 20


class GoldenOutput(Record):
    """What is compared, and what difference is let pass; 0 is exact equality.

    `tolerance` holds on any machine, `tolerance_alike` where the runtime and its kernels are those that made the
    vectors (`Golden.kernels`). `largest_seen` and `seen_alike`: the largest difference between ways to compute the
    same, of other kernels and of other thread counts. `scale`: of logits, the mean standard deviation over the
    vocabulary. Each is derived again when it is replayed: see `derivation`.
    """

    name: OutputName
    tolerance: Finite
    tolerance_alike: Finite
    largest_seen: Finite
    seen_alike: Finite
    scale: Finite | None = None
    derivation: str


class GoldenCase(Record):
    """One prompt: its files (paths in the bundle), and how many tokens are held to the recorded ones.

    `greedy_compared`: greedy tokens until the first that a tolerated difference could turn. `tokens_compared`: rows
    whose best token leads by more than such a difference. `damaged`: what became of this prompt where its tokens
    were damaged, as the largest difference of a logit after it, ÷ the tolerance (of a long
    prompt, as the rms of all rows ÷ its tolerance, where that is more). `stops_after`: how many greedy
    tokens stand before the first that stops generation; None where none does.
    """

    prompt: str
    tokens: str
    logits: str
    greedy: str
    ids: str
    rows: str
    token_count: int = Field(ge=1, le=MAX_CONTEXT)
    greedy_compared: int = Field(ge=0, le=MAX_NEW_TOKENS)
    tokens_compared: int = Field(ge=0, le=MAX_CONTEXT)
    stops_after: int | None = Field(default=None, ge=0, le=MAX_NEW_TOKENS)
    damaged: dict[Literal["no_bos", "token_lost", "token_doubled"], Finite]


class GoldenVocabulary(Record):
    """The special tokens as the runtime itself reports them; None where it has none, or does not tell.

    `stop`: every token that ends generation, in ascending order.
    """

    bos: int | None = None
    eos: int | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    stop: list[int] = Field(default=[], max_length=4096)


class ChatMessage(Record):
    """One turn of a recorded conversation."""

    role: str = Field(max_length=20)
    content: str = Field(max_length=1000)


class GoldenChat(Record):
    """A conversation and what the chat template makes of it, a prompt for an answer at its end.

    `template`: the file in preprocess/ that holds it.
    """

    template: str
    template_sha256: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=8)
    rendered: str = Field(max_length=100_000)


class Golden(Record):
    """Golden vectors of one artifact, computed on its shipped bytes in its own runtime.

    `settings`: what the artifact says to the runtime (a GGUF's metadata, genai_config.json), key by key, long values as
    `sha256:…`. `weights`: tensor → the first 16 digits of the sha256 of its stored bytes. Both name what differs.
    `damage_is_seen`: where every prompt tells damaged tokens from whole ones (`GoldenCase.damaged` above 1): on any
    machine, or, of a model that hardly looks at its tokens, where the kernels are alike.
    """

    runtime: str
    runtime_version: str
    runtime_options: dict[str, Any]
    kernels: str
    tokenized_by: Literal["artifact", "tokenizer.json"]
    add_special: bool
    parse_special: bool
    context_tokens: int = Field(ge=1, le=MAX_CONTEXT)
    new_tokens: int = Field(ge=1, le=MAX_NEW_TOKENS)
    vocab_size: int = Field(ge=1, le=1 << 24)
    outputs: list[GoldenOutput] = Field(min_length=1, max_length=16)
    cases: list[GoldenCase] = Field(min_length=1, max_length=64)
    damage_is_seen: DamageSeen
    vocabulary: GoldenVocabulary
    chat: GoldenChat | None
    settings: dict[str, Setting]
    weights: dict[str, str]
    seen_with: list[str]

    def files(self, case: GoldenCase) -> dict[str, tuple[ArrayType, tuple[int, ...]]]:
        """Path → type and shape of every array of a case."""
        rows, top = case.token_count + self.new_tokens, min(TOP_IDS, self.vocab_size)
        return {
            case.tokens: ("<i4", (case.token_count,)),
            case.logits: ("<f4", (self.vocab_size,)),
            case.greedy: ("<i4", (self.new_tokens,)),
            case.ids: ("<i4", (rows, top)),
            case.rows: ("<f4", (rows, 1 + top + min(PROBED_IDS, self.vocab_size))),
        }
