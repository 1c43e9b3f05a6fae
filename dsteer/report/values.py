"""How values are read from results and written for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from dsteer.store import Json

FINAL_NORM = "final_norm"
DASH = "–"
UNDEFINED = "undefined"

_BLOCK = re.compile(r"resid_post\.(\d+)")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def at(value: Json, *keys: str | int) -> Json:
    """Follow keys into a JSON value; None where one of them is absent."""
    for key in keys:
        if isinstance(value, dict) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
            value = value[key]
        else:
            return None
    return value


def mapping(value: Json) -> dict[str, Json]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Json) -> list[Json]:
    """The value if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


# ---------------------------------------------------------------------------------- sites


def block(site: str) -> int | None:
    """k of ``resid_post.k``; None for any other site."""
    match = _BLOCK.fullmatch(site)
    return int(match[1]) if match else None


def short_site(site: str) -> str:
    """The tick of a site: k of a block, ``norm``, else its name."""
    k = block(site)
    return str(k) if k is not None else "norm" if site == FINAL_NORM else site


def site_order(sites: Iterable[str]) -> list[str]:
    """Sites by depth: the blocks in order, then all others, ``final_norm`` last."""

    def key(site: str) -> tuple[int, int, str]:
        k = block(site)
        return (0, k, "") if k is not None else (2 if site == FINAL_NORM else 1, 0, site)

    return sorted(sites, key=key)


def split_rows(activations: Json) -> dict[str, int]:
    """Rows of each split that the stage ``activations`` read, whether it stored them or not."""
    counts = mapping(at(activations, "counts"))
    spans = mapping(at(activations, "rows"))
    return counts or {split: stop - start for split, (start, stop) in spans.items()}


def is_undefined(site: Json) -> bool:
    """Whether a result marks a site as undefined: its displacement is exactly zero."""
    return at(site, "undefined") is True


# ---------------------------------------------------------------------------------- numbers


class Estimate(NamedTuple):
    """A number with its interval; a part that is undefined is None."""

    value: float | None
    low: float | None
    high: float | None


def real(value: Json) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def estimate(value: Json) -> Estimate:
    """Read a number or an interval ``{"value", "low", "high"}``."""
    if isinstance(value, dict):
        return Estimate(*(real(value.get(key)) for key in ("value", "low", "high")))
    return Estimate(real(value), None, None)


def point(value: Json) -> float | None:
    """The number itself, of a number or of an interval."""
    return estimate(value).value


def ratio(top: float | None, bottom: float | None) -> float | None:
    """top / bottom; None where it is undefined."""
    return None if top is None or not bottom else top / bottom


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, as print has it: − for minus, 1.2 × 10⁻⁵."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    if isinstance(value, int) or (value.is_integer() and 10**digits <= abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−")
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if exponent < -3 or exponent >= 5:
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}"
        power = str(exponent).translate(_SUPERSCRIPT)
        return f"{mantissa}\u00a0×\u00a010{power}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def interval(value: Json, digits: int = 3) -> str:
    """``0.712 [0.690, 0.731]``; without bounds, the number alone."""
    middle, low, high = estimate(value)
    if middle is None:
        return DASH
    if low is None or high is None:
        return number(middle, digits)
    return f"{number(middle, digits)} [{number(low, digits)}, {number(high, digits)}]"


def percent(value: float | None) -> str:
    """A share as a percentage with three digits at most."""
    if value is None:
        return DASH
    scaled = 100 * value
    if 0 < abs(scaled) < 0.01:
        return "<\u00a00.01\u00a0%" if scaled > 0 else ">\u00a0−0.01\u00a0%"
    decimals = 0 if abs(scaled) >= 99.95 else 1
    return f"{scaled:.{decimals}f}\u00a0%".replace("-", "−")


def count(value: Json) -> str:
    """A whole number with thousands separators."""
    whole = real(value)
    return DASH if whole is None else f"{whole:,.0f}".replace("-", "−")


def plural(n: Json, one: str, many: str | None = None) -> str:
    """``1 prompt``, ``2,312 prompts``."""
    return f"{count(n)} {one if real(n) == 1 else many or one + 's'}"


def plain(value: Json) -> str:
    """Any JSON value in words: yes/no, numbers, text; a dash for none."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.6g}".replace("-", "−")
    if isinstance(value, dict) and "value" in value:
        return interval(value)
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) if value else "none"
    return str(value)


def duration(seconds: Json) -> str:
    """Seconds as ``0.8 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    value = real(seconds)
    if value is None:
        return DASH
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(amount: Json) -> str:
    """Bytes as MiB or GiB."""
    value = real(amount)
    if value is None:
        return DASH
    mebi = value / 2**20
    return f"{mebi:,.0f} MiB" if mebi < 1024 else f"{mebi / 1024:.2f} GiB"


def short_hash(text: Json) -> str:
    """The first 12 digits of a hash, keeping a prefix such as ``sha256:``."""
    if not isinstance(text, str):
        return DASH
    prefix, _, digits = text.rpartition(":")
    if not re.fullmatch(r"[0-9a-f]{16,}", digits):
        return text
    return f"{prefix}:{digits[:12]}…" if prefix else f"{digits[:12]}…"
