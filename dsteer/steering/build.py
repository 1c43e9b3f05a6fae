"""Building steering vectors from paired activations."""

from __future__ import annotations

from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import PairedMoments
from dsteer.data.tokens import hash_ids
from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import StreamingMean
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

_CHUNK = 1024
"""Rows that are in memory at once."""


def mean_difference(
    acts: PairedActivations | PairedMoments, *, rows: slice | None = None
) -> SteeringVectorSet:
    """Average the displacements into one steering vector a site: v* = (1/N) Σᵢ Δᵢ, in float64.

    Args:
        acts: paired activations, as :func:`dsteer.extract` returns them, or their moments, as
            :func:`dsteer.activations.accumulate.accumulate` does.
        rows: the prompts to fit on, consecutive ones; default: all. Moments know no rows.

    Returns:
        One vector a site, each with N as ``n`` in its metadata. Where no displacement differs from
        zero the vector is zero and ``undefined``.

    Raises:
        MeasurementError: no prompts, or displacements that are not finite; rows of moments.
    """
    if isinstance(acts, PairedMoments):
        if rows is not None:
            raise MeasurementError(
                f"rows {rows}: moments can't be taken apart; accumulate those prompts alone"
            )
        means = (SteeringVector(acts[site].sums.mean, site, n=acts[site].n) for site in acts.sites)
        return SteeringVectorSet(means, {"position": acts.position, "ids_sha256": acts.ids_sha256})
    chosen = acts if rows is None else acts.select(rows)
    if chosen.base.n == 0:
        raise MeasurementError(
            f"rows {rows}: none of the {len(acts.encoded)} prompts; v* needs at least one"
        )
    vectors = []
    for site in chosen.sites:
        mean = StreamingMean()
        for start in range(0, chosen.base.n, _CHUNK):
            tuned = chosen.tuned.rows(site, start, start + _CHUNK).double()
            mean.update(tuned - chosen.base.rows(site, start, start + _CHUNK).double())
        vectors.append(SteeringVector(mean.mean, site, n=mean.count))
    metadata = {"position": chosen.position, "ids_sha256": hash_ids(chosen.encoded)}
    return SteeringVectorSet(vectors, metadata)
