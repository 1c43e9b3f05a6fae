"""Every failure that a user can cause.

The command line prints these as one line and exits with 2; anything else is a bug and keeps its
traceback. A message names the value that was met, what was expected, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DsteerError(Exception):
    """Root of all errors that a user can cause and mend."""


class ConfigError(DsteerError):
    """A pipeline, an override or an argument that can't be followed."""


class DataError(DsteerError):
    """Preference data or prompts that are missing, malformed or too few."""


class ModelError(DsteerError):
    """A model or tokenizer that can't be loaded, or two that don't make a pair."""


class MeasurementError(DsteerError):
    """States that can't be measured: not finite, or not different at all."""


class StoreError(DsteerError):
    """A run folder that is locked, foreign, unwritable or incomplete."""


class StudyError(DsteerError):
    """Variants of a study that failed, beside others that did not."""


class MissingExtraError(DsteerError):
    """An optional dependency that is not installed.

    Args:
        extra: the name of the extra in ``pip install 'dsteer[extra]'``.
        what: what needs it.
    """

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs an extra: pip install 'dsteer[{extra}]'")


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, else the whole list."""
    names = sorted(known)
    near = get_close_matches(value, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
