"""Who stops a planted fault: `bundle verify` of a bundle sealed again, and what it says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack.faults import Fault, seeded
from attack.gguf_faults import gguf_faults
from attack.onnx_faults import onnx_faults
from attack.reseal import reseal
from edgedistill.bundle.check import verify_bundle
from edgedistill.bundle.files import read_manifest
from edgedistill.errors import EdgedistillError
from edgedistill.store import Store


@dataclass(frozen=True)
class Outcome:
    """`said`: the error, "" where the bundle was accepted. `named`: whether the wrong tensor or key is in it."""

    artifact: str
    fault: str
    kind: str
    names: str
    said: str

    @property
    def stopped(self) -> bool:
        return bool(self.said)

    @property
    def named(self) -> bool:
        return any(part in self.said for name in self.names.split("|") for part in (name, name.rpartition("/")[2]))


def faults_of(bundle: Path) -> Iterator[tuple[Any, Path, list[Fault]]]:
    """Every artifact of a bundle (from its manifest), where it lies, and what can be planted in it."""
    for artifact in read_manifest(bundle).artifacts:
        model = bundle / artifact.folder / artifact.entry
        yield artifact, model, gguf_faults(model) if artifact.format == "gguf" else onnx_faults(model)


def outcomes(bundle: Path, work: Path, store: Store, *, seed: int = 0, every: int = 1) -> Iterator[Outcome]:
    """Plant each fault in a copy of the healthy bundle, seal it again, and verify that.

    `every`: only each so many-th fault. The golden vectors stay those of the healthy bytes.
    """
    for artifact, model, faults in faults_of(bundle):
        for fault in faults[::every]:
            copy = work / "planted"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(bundle, copy)
            fault.apply(copy / model.relative_to(bundle), seeded(fault, seed))
            reseal(copy, documents=True)
            said = ""
            try:
                verify_bundle(copy, store=store)
            except EdgedistillError as error:
                said = str(error)
            yield Outcome(artifact.name, fault.name, fault.kind, fault.names, said)
