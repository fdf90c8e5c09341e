"""LICENSE and NOTICE of a bundle: those of every model that went into the student, word for word.

A student that started from pretrained weights is under their licence; whoever taught it may ask for something too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgedistill.records.manifest import Manifest

LICENSE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
NOTICE_NAMES = ("NOTICE", "NOTICE.txt", "NOTICE.md")
MAX_LICENSE_BYTES = 1 << 20
LINE = "=" * 80


@dataclass(frozen=True)
class Source:
    """A model whose weights or answers are in the student. None: it has no such file."""

    role: Literal["student", "teacher"]
    name: str
    license: str | None
    notice: str | None

    @property
    def words(self) -> str:
        return f"the {self.role} ({plain(self.name)})"


def source_of(role: Literal["student", "teacher"], name: str, folder: Path) -> Source:
    """The licence and notice in a model's folder. `role`: student or teacher."""
    return Source(role, name, _first_text(folder, LICENSE_NAMES), _first_text(folder, NOTICE_NAMES))


def _first_text(folder: Path, names: Sequence[str]) -> str | None:
    for name in names:
        path = folder / name
        if path.is_file() and 0 < path.stat().st_size <= MAX_LICENSE_BYTES:
            return path.read_text(encoding="utf-8", errors="replace")
    return None


def whose(sources: Sequence[Source]) -> str:
    """Sources in words."""
    return " and of ".join(each.words for each in sources)


def license_text(sources: Sequence[Source], manifest: Manifest) -> str:
    """Each licence word for word, and who it is of where there are several; a text that says so where there is none."""
    licenses = list(dict.fromkeys(each.license for each in sources if each.license))
    missing = [each for each in sources if not each.license]
    if licenses and not missing and len(licenses) == 1:
        return licenses[0]
    if not licenses:
        return _unknown(sources, manifest)
    parts = [
        "These weights were made from several models. Each of their licences applies.\n",
        *(
            f"{LINE}\nLicence of {whose([each for each in sources if each.license == text])}\n{LINE}\n\n{text}"
            for text in licenses
        ),
    ]
    if missing:
        parts.append(
            f"{LINE}\nNot known: the licence of {whose(missing)}\n{LINE}\n\n"
            "No licence file was found beside those weights. Find it before you use or distribute this model; until\n"
            "then no permission is given or implied by this file.\n"
        )
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _unknown(sources: Sequence[Source], manifest: Manifest) -> str:
    models = whose(sources) if sources else _teacher_words(manifest)
    data = f"the text ({plain(manifest.data.source)})" if manifest.data else "the text that it was trained on"
    return (
        "The licence of these weights is not known.\n\n"
        f"It is decided by the licences of {models} and of {data}. No licence file was found\n"
        "beside the weights. Find the licences before you use or distribute this model; until then no permission\n"
        "is given or implied by this file.\n\n"
        "The files in samples/ are part of edgedistill and are licensed under the Apache License 2.0.\n"
    )


def _teacher_words(manifest: Manifest) -> str:
    return f"the teacher ({plain(manifest.teacher.name)})" if manifest.teacher else "the model that it was made from"


def notice_text(sources: Sequence[Source], manifest: Manifest) -> str:
    """Who made what, and what of others is inside."""
    lines = [
        f"{manifest.name}",
        "",
        f"Made with edgedistill {manifest.edgedistill} (Apache License 2.0, which covers samples/).",
    ]
    if manifest.teacher is not None:
        teacher = manifest.teacher
        lines.append(f"Teacher: {plain(teacher.name)} ({teacher.origin}), weights sha256 {teacher.weights_sha256}.")
        lines += [
            f"Further teacher: {plain(each.name)} ({each.origin}), weights sha256 {each.weights_sha256}."
            for each in manifest.further_teachers
        ]
    else:
        lines.append("Teacher: unknown; the student was given.")
    lines += [f"The student started from {plain(each.name)}." for each in sources if each.role == "student"]
    if manifest.data is not None:
        lines.append(f"Text: {plain(manifest.data.source)}, sha256 {manifest.data.sha256}.")
        if manifest.data.source == "python-docs":
            lines.append("That text is the documentation of Python's standard library (PSF License Version 2).")
    else:
        lines.append("Text: unknown.")
    lines += [
        f"Licence of {each.words}: {'in LICENSE' if each.license else 'not found: see LICENSE'}." for each in sources
    ] or ["Licence of the weights: not found: see LICENSE."]
    lines += [
        "golden/ holds short excerpts of the held-out text.",
        "No runtime is inside; llama.cpp and onnxruntime are under the MIT License.",
    ]
    notices = dict.fromkeys(each.notice for each in sources if each.notice)
    for text in notices:
        lines += ["", LINE, f"Notice of {whose([each for each in sources if each.notice == text])}", LINE, "", text]
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def plain(text: str) -> str:
    """One line without control characters."""
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() or c.isspace() else "?" for c in text)).strip()
