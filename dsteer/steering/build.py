"""Building steering vectors from activations: of two models, or of one over pairs of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import PairedMoments
from dsteer.activations.reading import Reading
from dsteer.activations.storage import States
from dsteer.data.contrast import ContrastPair
from dsteer.data.tokens import Encoded, Tokenizer, hash_ids
from dsteer.data.types import Prompt
from dsteer.errors import ConfigError, DataError, MeasurementError
from dsteer.geometry.displacement import StreamingMean, as_matrix
from dsteer.geometry.spectrum import principal
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.progress import SILENT, Reporter
from dsteer.steering.directions import Groups, direction, folds_of, require_method, separation
from dsteer.steering.intervene import Positions, steer
from dsteer.steering.provenance import of_model
from dsteer.steering.states import as_json, encode_texts, require_position, sites_of, states_of
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_json

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
    vectors = [_mean(chosen.base, chosen.tuned, site) for site in chosen.sites]
    metadata = {"position": chosen.position, "ids_sha256": hash_ids(chosen.encoded)}
    return SteeringVectorSet(vectors, metadata)


def _mean(base: States, tuned: States, site: str) -> SteeringVector:
    """The mean displacement at one site, read in chunks."""
    mean = StreamingMean()
    for start in range(0, base.n, _CHUNK):
        rows = tuned.rows(site, start, start + _CHUNK).double()
        mean.update(rows - base.rows(site, start, start + _CHUNK).double())
    return SteeringVector(mean.mean, site, n=mean.count)


def increments(
    pair: ModelPair, acts: PairedActivations, *, positions: Positions = "all"
) -> SteeringVectorSet:
    """Vectors to be added at several sites at once: each is what the ones before it leave.

    Every v*_ℓ already holds what the sites before ℓ contributed, so all of a set together shift far
    more than tuning did. Here u_ℓ = mean(h_tuned − h_base) at ℓ where the base is steered by u of
    all earlier sites; the first is v* itself. The base is read once a site.

    Args:
        pair: the models.
        acts: their states, read at the sites that will be steered and at no others.
        positions: the tokens that will be steered.

    Returns:
        One vector a site, for strength 1 at all of them.

    Raises:
        ModelError: the base is none that can be steered.
        MeasurementError: a state is not finite.
    """
    vectors: list[SteeringVector] = []
    for site in acts.sites:
        reading = Reading.of(pair, acts.encoded, sites=[site], position=acts.position)
        earlier = [vector for vector in vectors if not vector.undefined]
        with pair.using("base") as model, contextlib.ExitStack() as stack:
            if earlier:
                stack.enter_context(steer(model, SteeringVectorSet(earlier), positions=positions))
            vectors.append(_mean(reading.run(model, "base"), acts.tuned, site))
    metadata: dict[str, Json] = {
        "method": "increments over the sites before",
        "position": acts.position,
        "positions": positions if isinstance(positions, str) else list(positions),
        "ids_sha256": hash_ids(acts.encoded),
    }
    return SteeringVectorSet(vectors, metadata)


def principal_directions(
    acts: PairedActivations | PairedMoments, k: int = 1, *, centred: bool = False
) -> tuple[SteeringVectorSet, ...]:
    """Find the k leading right singular vectors of the displacements ΔH (N, d) at every site.

    Uncentred, the first is close to v*/‖v*‖ where the shift is shared; centred, v* is taken off
    first, and the directions are those in which displacements differ from each other. For a random
    prompt the displacement along direction j has size σ_j/√N, root mean square.

    Args:
        acts: paired activations, or their moments.
        k: how many.
        centred: whether the mean displacement is taken off first.

    Returns:
        k sets, the direction of the largest singular value first, each with one unit vector a site
        and, in its metadata, ``n`` (N), ``singular_value`` (σ_j, in the states' units) and
        ``share`` (σ_j²/‖D‖_F² of D as decomposed; None of a zero matrix). The sign is such that the
        mean projection of the displacements is not negative, centred such that the largest entry is
        positive. Where σ_j is zero the vector is zero and ``undefined``.

    Raises:
        MeasurementError: no displacements, ones that are not finite, or k not in 1 … min(N, d).
    """
    vectors: list[list[SteeringVector]] = [[] for _ in range(k)]
    for site in acts.sites:
        if isinstance(acts, PairedMoments):
            rows, n = _condensed(acts, site), acts[site].n
        else:
            rows = acts.displacement(site).numpy()
            n = len(rows)
        sigma, right = principal(rows, k, centred=centred)
        energy = float(((rows - rows.mean(axis=0) if centred else rows) ** 2).sum())
        for j in range(k):
            share = float(sigma[j]) ** 2 / energy if energy > 0 else None
            vectors[j].append(
                SteeringVector(right[j], site, n=n, singular_value=float(sigma[j]), share=share)
            )
    metadata: dict[str, Json] = {
        "method": "principal direction of the displacements",
        "centred": centred,
        "position": acts.position,
        "ids_sha256": acts.ids_sha256
        if isinstance(acts, PairedMoments)
        else hash_ids(acts.encoded),
        "units": "unit norm",
    }
    return tuple(
        SteeringVectorSet(own, {**metadata, "direction_number": j})
        for j, own in enumerate(vectors, 1)
    )


def _condensed(acts: PairedMoments, site: str) -> Float[np.ndarray, "n d"]:
    """Rows with the singular values and right singular vectors of the displacements."""
    matrices = acts[site].matrices
    if "delta" not in matrices:
        raise MeasurementError(
            f"{site}: these moments hold no matrix of displacements, so they have no directions; "
            "accumulate them with 'delta' among the matrices"
        )
    mean, rest = matrices["delta"].condensed()
    return np.asarray(mean + rest)


# ---------------------------------------------------------------------------------- contrast


def contrast(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Sequence[ContrastPair | Sequence[Prompt]],
    *,
    method: str = "mean",
    component: str = "residual",
    position: str = "last",
    layers: Sequence[int] | None = None,
    sites: str | Sequence[str] = "all",
    template: str = "none",
    c: float = 1.0,
    folds: int = 5,
    seed: int = 0,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> SteeringVectorSet:
    """Find what tells texts with a property from texts without it: contrastive activation addition.

    Every text is read once, all sites in one pass. Each vector points from the negative to the
    positive texts, so that adding it makes a model more like the positive ones.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pairs: (positive, negative): texts, tokenised as they stand, or message lists, which go
            through the chat template, an answer at the end included.
        method: ``mean``, ``pca``, ``pca_centred`` or ``logistic``, see
            :data:`dsteer.steering.directions.Method`. Only ``mean`` has the size of what it shifts;
            the others are of unit norm, and their ``gap`` says how far apart the means lie along
            them (of PCA, ``share`` too: Σ (dᵢ·v̂)² / Σ ‖dᵢ‖²).
        component: ``residual``, ``attn`` or ``mlp``.
        position: ``last``, ``first``, ``mean`` or ``all``, see
            :data:`dsteer.steering.states.TokenPosition`.
        layers: blocks, from 0; default: all, and ``final_norm`` of the residual stream.
        sites: names of sites instead.
        template: ``chat`` puts texts through the chat template too, each as a prompt.
        c: of ``logistic``: the weight of the loss beside the penalty ½‖w‖².
        folds: parts of the pairs, each left out once to measure how a direction separates; a pair
            that stands there twice is in one part.
        seed: of the parts.
        batch_tokens: tokens a batch, padding included; default: what suits the device.
        max_tokens: longer texts are cut on the left; at most what the model was made for.
        reporter: shows progress.

    Returns:
        One vector a site, in the units of its states. In its metadata: ``n`` (pairs), ``norm``,
        ``mean_state_norm`` (of the states ‖h‖ of both groups), ``gap`` (the difference of the
        means along the vector), ``accuracy`` and ``cohens_d`` (held out, see
        :class:`dsteer.steering.directions.Separation`; None where undefined).

    Raises:
        ConfigError: an unknown method, component, position, site or template, or ones that don't
            go together.
        DataError: no pairs, or a text that can't be encoded.
        ModelError: a model whose states can't be read, or without such a component.
        MeasurementError: states that are not finite, or the same in both texts of every pair.
    """
    require_position(position)
    require_method(method, paired=position != "all")
    _require_weight(c)
    wanted = sites_of(component, layers, sites)
    both = _both(pairs)
    encoded = [
        item
        for what, texts in (
            ("positive texts", [one.positive for one in both]),
            ("negative texts", [one.negative for one in both]),
        )
        for item in encode_texts(
            model, tokenizer, texts, template=template, max_tokens=max_tokens, what=what
        )
    ]
    parts = _parts(encoded, len(both), folds, seed)
    vectors = []
    with states_of(
        model,
        encoded,
        sites=wanted,
        position=position,
        batch_tokens=batch_tokens,
        reporter=reporter,
    ) as (states, offsets):
        lengths = np.diff(offsets)
        owner = np.repeat(np.arange(len(encoded)) % len(both), lengths)
        middle = offsets[len(both)]
        for site in states:
            rows = as_matrix(states[site], site)
            groups = Groups(
                rows[:middle], rows[middle:], owner[:middle], owner[middle:], position != "all"
            )
            vectors.append(_vector(groups, site, method, parts, c))
    if all(vector.undefined for vector in vectors):
        same = "; every text begins with the same token (BOS)" if position == "first" else ""
        raise MeasurementError(
            f"the states of positive and negative texts are the same at position {position!r} of "
            f"all {len(both)} pairs{same}; expected pairs that differ there, such as at 'last'"
        )
    return SteeringVectorSet(
        vectors,
        {
            "method": f"contrast {method}",
            **of_model(model),
            "position": position,
            "component": component,
            "template": template,
            "pairs": len(both),
            "truncated": sum(item.truncated for item in encoded),
            "data_sha256": hash_json(
                [[as_json(one.positive), as_json(one.negative)] for one in both]
            ),
            "ids_sha256": hash_ids(encoded),
            "folds": len(parts),
            "seed": seed,
            **({"c": c} if method == "logistic" else {}),
            "units": "states" if method == "mean" else "unit norm",
            "direction": "from negative to positive",
        },
    )


def contrast_from_states(
    positive: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    negative: Float[Tensor, "m e"] | Float[np.ndarray, "m e"],
    site: str,
    *,
    method: str = "mean",
    c: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> SteeringVector:
    """The contrast vector of states that were read already, row i of both being pair i.

    Args:
        positive: states of the positive texts at a site.
        negative: of the negative ones.
        site: the site.
        method: see :func:`contrast`, as c, folds and seed.

    Raises:
        ConfigError: an unknown method.
        MeasurementError: malformed states, or different numbers of them.
    """
    require_method(method, paired=True)
    _require_weight(c)
    p, n = as_matrix(positive, "positive"), as_matrix(negative, "negative")
    if p.shape != n.shape:
        raise MeasurementError(
            f"positive states {p.shape} and negative ones {n.shape}; expected one of each a pair"
        )
    return _vector(Groups.of_pairs(p, n), site, method, folds_of(len(p), folds, seed), c)


def _require_weight(c: float) -> None:
    if not 0 < c < np.inf:
        raise ConfigError(f"c {c}: expected a finite weight of the loss above 0")


def _parts(
    encoded: Sequence[Encoded], n: int, folds: int, seed: int
) -> list[Int[np.ndarray, " _"]]:
    """Parts of n pairs, of which ids are all positive, then all negative; equal pairs in one."""
    numbers: dict[object, int] = {}
    own = np.array(
        [numbers.setdefault((encoded[i].ids, encoded[n + i].ids), len(numbers)) for i in range(n)]
    )
    return [np.flatnonzero(np.isin(own, part)) for part in folds_of(len(numbers), folds, seed)]


def _vector(
    groups: Groups, site: str, method: str, parts: Sequence[np.ndarray], c: float
) -> SteeringVector:
    v = direction(groups, method, c=c)
    norm = float(np.linalg.norm(v))
    measured = separation(groups, lambda pairs: direction(groups.of(pairs), method, c=c), parts)
    metadata: dict[str, Json] = {
        "n": len(set(groups.positive_pair.tolist())),
        "norm": norm,
        "mean_state_norm": _mean_norm(np.concatenate([groups.positive, groups.negative])),
        "gap": float(groups.gap @ v) / norm if norm > 0 else None,
        **({"share": _share(groups, v)} if method in ("pca", "pca_centred") else {}),
        "accuracy": measured.accuracy,
        "cohens_d": measured.cohens_d,
    }
    return SteeringVector(v, site, **metadata)


def _share(groups: Groups, unit: Float[np.ndarray, " d"]) -> float | None:
    """Σ (dᵢ·v̂)² / Σ ‖dᵢ‖²; None where all differences are zero."""
    delta = groups.positive - groups.negative
    energy = float((delta**2).sum())
    return float(((delta @ unit) ** 2).sum()) / energy if energy > 0 else None


def _mean_norm(rows: Float[np.ndarray, "n d"]) -> float:
    return float(np.linalg.norm(rows, axis=1).mean())


def _both(pairs: Sequence[ContrastPair | Sequence[Prompt]]) -> list[ContrastPair]:
    if not pairs:
        raise DataError("there are no contrast pairs; give at least one")
    found = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, ContrastPair):
            found.append(pair)
            continue
        if isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"pair {number} is {pair!r}; expected (positive, negative)")
        positive, negative = pair
        found.append(ContrastPair(positive, negative))
    return found
