"""How figures look: one palette, safe for colour-blind readers and in grey, and how they are saved.

Series never differ by colour alone: each has its own line, marker and hatch. Colours are those of
Okabe & Ito (2008), https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from PIL import Image

from dsteer.store import Json, atomic_path, write_json

WIDE = 6.9
"""Width of a figure over two columns, inches."""
COLUMN = 3.4
"""Width of a figure in one column, inches."""

INK = "#1a1a1a"
GREY = "#6b6b6b"
PALE = "#d9d9d9"
BLUE = "#0072B2"
SKY = "#56B4E9"
ORANGE = "#E69F00"
VERMILLION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"

SHADES = "Blues"
"""The colour map of heat maps: one hue, darker is more, so it reads in grey."""


Line = str | tuple[int, tuple[int, ...]]
"""A line style of matplotlib: its name, or an offset with lengths of dashes and gaps."""


@dataclass(frozen=True)
class Mark:
    """How one series is drawn."""

    label: str
    colour: str
    line: Line
    marker: str


HELD_OUT = Mark("held-out", BLUE, "-", "o")
LEAVE_ONE_OUT = Mark("leave-one-out", ORANGE, "--", "s")
IN_SAMPLE = Mark("in-sample", VERMILLION, ":", "^")
NULL = Mark("null", GREY, "-.", "x")

H_BASE = Mark("H_base", ORANGE, "--", "s")
H_TUNED = Mark("H_tuned", VERMILLION, "-.", "^")
DELTA_H = Mark("ΔH", BLUE, "-", "o")

TRAIN = Mark("train", ORANGE, "--", "")
HELD_OUT_PAIRS = Mark("held-out", BLUE, "-", "o")

_RC: dict[str, Json] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same glyphs on every machine
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.constrained_layout.h_pad": 0.05,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.8,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "savefig.facecolor": "white",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw with this style and nothing of the user's matplotlibrc."""
    with matplotlib.style.context(_RC, after_reset=True):
        yield


@dataclass(frozen=True)
class Drawing:
    """A figure and every number in it."""

    name: str
    figure: Figure
    data: dict[str, Json]

    def save(self, folder: Path) -> list[Path]:
        """Write PDF, PNG (200 dpi, 256 colours) and JSON; the same drawing gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, metadata in (
            ("pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
            ("png", {"Software": None}),
        ):
            path = folder / f"{self.name}.{suffix}"
            with atomic_path(path) as temporary:
                self.figure.savefig(temporary, format=suffix, dpi=200, metadata=metadata)
                if suffix == "png":
                    _to_palette(temporary)
            written.append(path)
        path = folder / f"{self.name}.json"
        write_json(path, {"figure": self.name, **self.data})
        return [*written, path]


def _to_palette(path: Path) -> None:
    """Store a PNG with a palette: a third of the size, and no difference that an eye sees."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, format="PNG", optimize=True)
