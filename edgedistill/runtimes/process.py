"""A runtime in a child process, as the stages use it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.machine.facts import usable_cpus
from edgedistill.runtimes.bounds import OWN, Bounds
from edgedistill.runtimes.child import logits_of, open_artifact
from edgedistill.runtimes.probe import OVERRIDE, ExtraBufts, extra_bufts
from edgedistill.store import Store

RuntimeName = Literal["llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "executorch"]
IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float32]

TEXTS_PER_MESSAGE = 1000
SYS_CPUS = Path("/sys/devices/system/cpu")
SPEED_FILES = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")


class RuntimeProcess:
    """An artifact open in its runtime, in a child process of its own. A context manager.

    threads         CPU threads; with `pin`, the child may only run on so many CPUs, the fastest ones (Linux)
    context_tokens  the longest sequence, prompt and answer together; llama.cpp with 0 reads the vocabulary alone
    use_extra_bufts llama.cpp's repacked and AMX weights; None: as the probe of this machine says
    spin            waiting threads spin as the runtime's defaults have it: where speed is measured
    logits_all      False where only `greedy` and `timed` are wanted: llama.cpp then keeps one row of logits
    timeout_s       of one operation, after which the child is killed
    log             a file for what the runtime prints; default: a temporary one
    bounds          what the process may use: `OWN`, or `replay_of(tokens)` for an artifact that is not trusted

    The artifact is read before it is opened (guards/), and what it says to the runtime is checked, whoever made it.
    Raises RuntimeCrashed where the child dies or hangs, UserError where the runtime refuses the
    artifact or the input.
    """

    def __init__(
        self,
        runtime: RuntimeName,
        artifact: Path,
        *,
        threads: int,
        context_tokens: int,
        use_extra_bufts: bool | None = None,
        logits_all: bool = True,
        pin: bool = False,
        spin: bool = False,
        timeout_s: float = 900.0,
        log: Path | None = None,
        store: Store | None = None,
        bounds: Bounds = OWN,
    ) -> None:
        artifact = artifact.absolute()
        if not artifact.exists():
            raise UserError(f"no artifact {artifact}", "give the path of an existing artifact")
        choice = _extra_bufts_choice(runtime, use_extra_bufts, store)
        used = runtime == "llama.cpp" and choice.use
        self._child, self._room, self.info = open_artifact(
            runtime,
            artifact,
            bounds=bounds,
            threads=threads,
            context_tokens=context_tokens,
            use_extra_bufts=choice.use,
            logits_all=logits_all,
            cpus=_cpus_for(threads) if pin else None,
            spin=spin,
            timeout_s=timeout_s,
            log=log,
            remedies=dict.fromkeys(("SIGILL", "SIGSEGV"), _extra_bufts_remedy()) if used else None,
        )
        if runtime == "llama.cpp":
            self.info["options"]["use_extra_bufts_reason"] = choice.reason

    def logits(self, tokens_T: IntArray | Sequence[int]) -> FloatArray:
        """[T, V] float32: row t is the prediction after tokens 0..t, from an empty KV cache."""
        return logits_of(self._child, _token_array(tokens_T), self.info["vocab_size"])

    def embedding(self, tokens_T: IntArray | Sequence[int]) -> FloatArray:
        """[H] float32 of an encoder: the sequence's embedding, pooled as the artifact says, of any length."""
        tokens = _token_array(tokens_T)
        what = f"the embedding of {len(tokens)} tokens"
        _, arrays = next(self._child.stream("embedding", what, {}, {"tokens": tokens}))
        return np.array(arrays["embedding"], dtype=np.float32)

    def trace(self, tokens_T: IntArray | Sequence[int], names: Sequence[str]) -> Iterator[tuple[str, FloatArray]]:
        """llama.cpp's intermediate tensors of these names, flat [T * width], in the order of their computation.

        A name that the graph gives to several tensors in turn comes several times, one that it lacks not at all.
        """
        tokens = _token_array(tokens_T)
        what = f"tracing {len(tokens)} tokens"
        for params, arrays in self._child.stream("trace", what, {"names": list(names)}, {"tokens": tokens}):
            if "done" in params:
                break
            yield str(params["name"]), arrays["values"]

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids by the artifact's own tokenizer. `parse_special`: control tokens in the text are tokens."""
        params = {"text": text, "add_special": add_special, "parse_special": parse_special}
        return [int(t) for t in self._child.call("tokenize", f"tokenizing {len(text)} characters", params)["tokens"]]

    def tokenize_many(
        self, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """`tokenize` of each text, a thousand texts a message."""
        found: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_PER_MESSAGE):
            part = list(texts[start : start + TEXTS_PER_MESSAGE])
            params = {"texts": part, "add_special": add_special, "parse_special": parse_special}
            found += self._child.call("tokenize_many", f"tokenizing {len(part)} texts", params)["tokens"]
        return found

    def generation(self) -> dict[str, Any]:
        """Where the runtime stops, as it says itself (`stops`: ids), and what else it takes from the artifact."""
        return self._child.call("generation", "asking where it stops", {})

    def render(self, template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]) -> str:
        """What a chat template makes of a conversation, a prompt for an answer at its end; see runtimes/template.py."""
        params = {"template": template, "messages": [dict(m) for m in messages], "variables": dict(variables)}
        return str(self._child.call("render", "rendering the chat template", params)["text"])

    def greedy(self, tokens: Sequence[int] | IntArray, new_tokens: int) -> list[int]:
        """The `new_tokens` most likely tokens one after another; an end-of-sequence token does not stop it."""
        if new_tokens < 1:
            return []
        return [int(t) for t in self.timed(tokens, new_tokens)["tokens"]]

    def timed(self, tokens: Sequence[int] | IntArray, new_tokens: int) -> dict[str, Any]:
        """Greedy decoding from an empty KV cache, timed in the child.

        `tokens`: the new ones; `ttft_ms`: from the call to the first new token; `token_ms`: of each
        later one, new_tokens - 1 of them.
        """
        prompt = _token_array(tokens)
        what = f"decoding {new_tokens} tokens after {len(prompt)}"
        return self._child.call("timed", what, {"new_tokens": new_tokens}, {"tokens": prompt})

    def peak_rss_bytes(self) -> int:
        """The most memory that the child ever had resident; of a mapped artifact, the pages that were touched count."""
        return int(self._child.call("peak_rss", "reading its memory use", {})["bytes"])

    def close(self) -> None:
        self._child.close()
        self._room.close()

    def __enter__(self) -> RuntimeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # It may be in the middle of something long; nothing of it is wanted any more.
            self._child.kill()
        self.close()


def _token_array(tokens: Sequence[int] | IntArray) -> NDArray[np.int64]:
    return np.asarray(tokens, dtype=np.int64)


def _extra_bufts_choice(runtime: str, asked: bool | None, store: Store | None) -> ExtraBufts:
    if runtime != "llama.cpp":
        return ExtraBufts(use=False, reason="not llama.cpp", signal=None)
    if asked is not None:
        return ExtraBufts(use=asked, reason="set by the caller", signal=None)
    return extra_bufts(store if store is not None else Store())


def _extra_bufts_remedy() -> str:
    return (
        "llama.cpp ran with its extra buffers (repacked or AMX weights), which some builds cannot: "
        f"set {OVERRIDE}=0 and run again"
    )


def _cpus_for(threads: int) -> list[int] | None:
    """The `threads` fastest CPUs; None where there are fewer, or where the system cannot pin."""
    cpus = usable_cpus()
    return fastest_first(cpus)[:threads] if hasattr(os, "sched_setaffinity") and threads <= len(cpus) else None


def fastest_first(cpus: Sequence[int], root: Path = SYS_CPUS) -> list[int]:
    """CPUs by what Linux says of their speed, equal ones by number: phones often number the little ones first."""
    for name in SPEED_FILES:
        speeds = {cpu: _whole_number(root / f"cpu{cpu}" / name) for cpu in cpus}
        # One that is not told of cannot be compared with the others.
        if all(speeds.values()):
            return sorted(cpus, key=lambda cpu: (-speeds[cpu], cpu))
    return sorted(cpus)


def _whole_number(path: Path) -> int:
    """What a file of the system says; 0 where it is not there or says something else."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
