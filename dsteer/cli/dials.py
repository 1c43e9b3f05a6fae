"""What commands that steer share: vectors with names, strengths and sites, and how they act."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsteer.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from dsteer.models.load import Model
    from dsteer.steering.dials import Dial, Dials, Measure
    from dsteer.steering.intervene import Positions, Schedule
    from dsteer.steering.vector import SteeringVectorSet

VectorOption = Annotated[
    list[str],
    typer.Option("--vector", metavar="[NAME=]FILE", help="Vectors; again for several at once."),
]
SiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--site",
        metavar="[NAME=]SITE",
        help="Where they act; default: the only site of a file, or a recommended one.",
    ),
]
LayerOption = Annotated[
    int | None, typer.Option("--layer", metavar="K", help="Short for --site resid_post.K.")
]
PositionsOption = Annotated[
    str,
    typer.Option(metavar="WHICH", help="all, prompt, prompt_last, generated, or a window A:B."),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOW", help="Over the new tokens: constant, linear:STEPS, exponential:HALF_LIFE."
    ),
]

_NAMED = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_ALL = ""
"""The name under which a value stands that is every vector's."""


def read_vectors(given: Sequence[str]) -> dict[str, SteeringVectorSet]:
    """Load the files of ``--vector``; one without a name is called like its file.

    Raises:
        ConfigError: two of one name.
        StoreError: a file that is no set of vectors.
    """
    from dsteer.steering.vector import SteeringVectorSet

    found: dict[str, SteeringVectorSet] = {}
    for text in given:
        name, file = _split(text)
        name = name or Path(file).stem
        if name in found:
            raise ConfigError(f"--vector {text}: another one is called {name!r}; use NAME=FILE")
        found[name] = SteeringVectorSet.load(file)
    return found


def read_strengths(
    given: Sequence[str] | None, names: Sequence[str], default: float
) -> list[dict[str, float]]:
    """The combinations of strengths that ``--strength`` asks for, each a strength a name.

    ``0,1,2`` turns all vectors without a value of their own alike, ``NAME=0,1,2`` one; several
    lists give every combination.

    Raises:
        ConfigError: no numbers, or a name that no vector has.
    """
    axes = {name: _numbers(text) for name, text in _by_name(given, names, "--strength").items()}
    if not names or any(name not in axes for name in names):
        axes.setdefault(_ALL, [default])
    return [
        {name: chosen.get(name, chosen.get(_ALL, default)) for name in names}
        for values in itertools.product(*axes.values())
        for chosen in [dict(zip(axes, values, strict=True))]
    ]


def make_dials(
    model: Model,
    sets: Mapping[str, SteeringVectorSet],
    strengths: Mapping[str, float],
    *,
    sites: Sequence[str] | None,
    layer: int | None,
    positions: str,
    schedule: str | None,
    measure: Measure | None = None,
) -> Dials:
    """Dials of a model as the options say.

    Raises:
        ConfigError: options that can't be followed.
        ModelError: vectors that are of another model.
    """
    from dsteer.steering.dials import Dials

    dials = place_dials(sets, strengths, sites, layer, partial(_site, model))
    return Dials(
        model,
        dials,
        positions=parse_positions(positions),
        schedule=parse_schedule(schedule),
        measure=measure,
    )


def place_dials(
    sets: Mapping[str, SteeringVectorSet],
    strengths: Mapping[str, float],
    sites: Sequence[str] | None,
    layer: int | None,
    default: Callable[[SteeringVectorSet, str], str],
) -> list[Dial]:
    """Each set at the site that the options give it, else at the one that ``default`` finds.

    Raises:
        ConfigError: options that can't be followed.
    """
    from dsteer.steering.dials import Dial

    if layer is not None:
        if sites:
            raise ConfigError("--layer beside --site, which say the same; give one of them")
        sites = [f"resid_post.{layer}"]
    at = _by_name(sites, list(sets), "--site")
    return [
        Dial(name, vectors, at.get(name) or at.get(_ALL) or default(vectors, name), strengths[name])
        for name, vectors in sets.items()
    ]


def _site(model: Model, vectors: SteeringVectorSet, name: str) -> str:
    """The only site of a set, else the first recommended one that it holds, which is said."""
    from dsteer.steering.provenance import require_fit
    from dsteer.steering.recommend import recommended_layers

    if len(vectors) == 1:
        return next(iter(vectors))
    require_fit(vectors, model)
    found = recommended_layers(model)
    sites = [f"resid_post.{layer}" for layer in found.layers]
    site = next((site for site in sites if site in vectors), None)
    if site is None:
        raise ConfigError(
            f"{name}: it holds vectors at {len(vectors)} sites ({', '.join(vectors)}), and none at "
            f"{', '.join(sites)} ({found.source}); choose one by --site"
        )
    print(f"dsteer: {name} at {site} ({found.source}); --site chooses", file=sys.stderr)  # noqa: T201
    return site


def parse_positions(text: str) -> Positions:
    """A name of positions, or a window ``A:B``."""
    from typing import get_args

    from dsteer.steering.intervene import Positions

    if re.fullmatch(r"\d+:\d+", text):
        start, stop = map(int, text.split(":"))
        if start < stop:
            return (start, stop)
    names = get_args(get_args(Positions)[0])
    if text not in names:
        raise ConfigError(
            f"--positions {text}: no such positions (or a window A:B with A < B)"
            f"{did_you_mean(text, names)}"
        )
    return text  # type: ignore[return-value]


def parse_schedule(text: str | None) -> Schedule | None:
    """A schedule such as ``linear:20``."""
    from dsteer.steering.intervene import Schedule

    if text is None:
        return None
    kind, _, length = text.partition(":")
    try:
        value = float(length) if length else None
    except ValueError:
        raise ConfigError(f"--schedule {text}: {length!r} is no number of steps") from None
    return Schedule(kind, **{_LENGTHS.get(kind, "steps"): value})  # type: ignore[arg-type]


_LENGTHS = {"exponential": "half_life"}


def _split(text: str) -> tuple[str, str]:
    """A name (or none) and a value; a path that exists as it stands has no name."""
    match = _NAMED.fullmatch(text)
    return (match[1], match[2]) if match and not Path(text).exists() else (_ALL, text)


def _by_name(given: Sequence[str] | None, names: Sequence[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given or ():
        name, value = _split(text)
        if name and name not in names:
            raise ConfigError(f"{option} {text}: no vector of this name{did_you_mean(name, names)}")
        if name in found:
            raise ConfigError(f"{option} {text}: given twice for {name or 'all vectors'}")
        found[name] = value
    return found


def _numbers(text: str) -> list[float]:
    import math

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError(f"--strength {text}: expected finite numbers, such as 1 or 0,0.5,1")
    return values
