"""What sets of steering vectors hold, and how their directions relate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from dsteer.activations.sites import site_order
from dsteer.errors import ConfigError, did_you_mean
from dsteer.geometry.alignment import cosine_to
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json


def overview(sets: Mapping[str, SteeringVectorSet], site: str | None = None) -> dict[str, Json]:
    """Provenance, norms and cosines of sets.

    The cosine of two sets at a site is cos(v, w). Their mean is over the sites that both hold and
    where both vectors have a direction; over none it is undefined.

    Args:
        sets: by name.
        site: this one alone; default: all.

    Returns:
        JSON values. ``sites``: those of any set. ``sets``: by name ``width``, ``metadata`` and
        ``sites``, each with ``norm``, ``relative_norm`` (of the residual stream's, where the file
        tells it, else null) and what else is known. ``cosines``: of each pair ``a``, ``b``,
        ``mean``, ``by_site`` and ``note``, why there is no mean.

    Raises:
        ConfigError: no set holds a vector at the site.
    """
    known = _in_order(dict.fromkeys(itertools.chain.from_iterable(sets.values())))
    if site is not None and site not in known:
        raise ConfigError(f"site {site!r}: no file holds a vector there{did_you_mean(site, known)}")
    chosen = {
        name: {at: vector for at, vector in vectors.items() if site in (None, at)}
        for name, vectors in sets.items()
    }
    return {
        "sites": known if site is None else [site],
        "sets": {
            name: {
                "width": vectors.width,
                "metadata": _told(vectors),
                "sites": {at: _facts(vector) for at, vector in chosen[name].items()},
            }
            for name, vectors in sets.items()
        },
        "cosines": [
            {"a": a, "b": b, **_cosines(chosen[a], chosen[b])}
            for a, b in itertools.combinations(sets, 2)
        ],
    }


_FIRST = ("method", "model", "tuned_model", "position", "component", "direction", "units")


def _told(vectors: SteeringVectorSet) -> dict[str, Json]:
    """A set's metadata, what tells most first: a file keeps no order."""
    known = vectors.metadata
    order = [key for key in _FIRST if key in known] + sorted(set(known) - set(_FIRST))
    return {key: known[key] for key in order}


def _in_order(sites: Iterable[str]) -> list[str]:
    """Sites as a pass reaches them; names that are none of ours stay as they come."""
    try:
        return sorted(sites, key=site_order)
    except ConfigError:
        return list(sites)


def _facts(vector: SteeringVector) -> dict[str, Json]:
    known = vector.metadata
    relative, state = known.get("relative_norm"), known.get("mean_state_norm")
    if relative is None and state:
        relative = vector.norm / state
    return {**known, "norm": vector.norm, "relative_norm": relative}


def _cosines(a: Mapping[str, SteeringVector], b: Mapping[str, SteeringVector]) -> dict[str, Json]:
    widths = {vector.width for vector in (*a.values(), *b.values())}
    common = _in_order([site for site in a if site in b])
    if len(widths) > 1:
        return {"mean": None, "by_site": {}, "note": "other widths: vectors of different models"}
    by_site = {
        site: float(cosine_to(torch.stack([a[site].tensor]), b[site].tensor)[0]) for site in common
    }
    defined = [value for value in by_site.values() if math.isfinite(value)]
    note = None if defined else "a vector is zero" if common else "no common sites"
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "by_site": {
            site: value if math.isfinite(value) else None for site, value in by_site.items()
        },
        "note": note,
    }
