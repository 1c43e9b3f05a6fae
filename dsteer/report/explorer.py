"""The λ explorer of the report: its data, made safe to embed, and its view without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from dsteer.report.sweep_values import nearest
from dsteer.report.values import at, items, mapping, plain
from dsteer.store import Json

_KINDS = {"empty": "empty", "loop": "loop", "role_header": "leaked role header"}

Side = tuple[str, list[str]]
"""A text and its marks."""


@dataclass(frozen=True)
class Explorer:
    """One sweep in the explorer."""

    stage: str
    title: str
    data: dict[str, Json]

    @property
    def place(self) -> int:
        """Place of the strength nearest 1, which is shown first, and alone without JavaScript."""
        return nearest(self.data, 1.0) or 0

    @property
    def strength(self) -> str:
        """The strength at that place, in print."""
        return plain(at(self.data, "strengths", self.place))

    @property
    def rows(self) -> list[tuple[str, list[Side]]]:
        """Each prompt with the texts of base, steered and tuned model at that strength."""
        return [
            (
                str(at(prompt, "prompt") or ""),
                [
                    _side(at(prompt, "base")),
                    _side(at(prompt, "steered", self.place)),
                    _side(at(prompt, "tuned")),
                ],
            )
            for prompt in items(self.data.get("prompts"))
        ]


def explorer(stage: str, title: str, data: Json) -> Explorer | None:
    """The explorer of a stage; None where it has no strengths or no prompts."""
    read = mapping(data)
    if not items(read.get("strengths")) or not items(read.get("prompts")):
        return None
    return Explorer(stage, title, read)


def _side(answer: Json) -> Side:
    marks = ["refusal"] if at(answer, "refusal") is True else []
    kind = at(answer, "degenerate")
    if kind:
        marks.append(f"degenerate: {_KINDS.get(kind, kind)}")
    return str(at(answer, "text") or ""), marks


def embedded(explorers: Sequence[Explorer]) -> str:
    """The data as JSON that is safe inside ``<script type="application/json">``.

    Everything beyond ASCII and ``<``, ``>``, ``&`` is escaped as ``\\uXXXX``, so that no text can
    close the element, open a comment, or end a line (U+2028, U+2029).
    """
    text = json.dumps({x.stage: x.data for x in explorers}, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def policy(style: str, script: str | None) -> str:
    """Content security policy: nothing but embedded images, this style and this script.

    Args:
        style: the inline style, exactly as it stands in the page.
        script: the inline script likewise; None where the page has none.
    """
    allowed = ["default-src 'none'", "img-src data:", f"style-src '{_hash(style)}'"]
    if script is not None:
        allowed.append(f"script-src '{_hash(script)}'")
    return "; ".join([*allowed, "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
