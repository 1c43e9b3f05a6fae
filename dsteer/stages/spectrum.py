"""Measure singular spectra of ΔH, H_base and H_tuned at each site, on the fit rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import SiteMoments, open_streamed
from dsteer.activations.sites import FINAL_NORM
from dsteer.config import PipelineConfig, SpectrumConfig
from dsteer.geometry.alignment import cosine_to
from dsteer.geometry.intervals import (
    Interval,
    ShareIntervals,
    SpectralIntervals,
    share_intervals,
    spectral_intervals,
)
from dsteer.geometry.spectrum import Spectrum, spectra, spectra_from_moments
from dsteer.geometry.sums import BUCKETS, shares_from_sums
from dsteer.models.load import is_adapter
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, write_tensors

NEARLY_ONE = 0.1
"""σ₂/σ₁ below which the paper calls ΔH nearly rank one."""

ABOVE_NOISE = 5.0
"""What is left after v* counts as measured when it is more than so many times the noise floor."""

ROUNDING = 2.0**-23
"""Relative rounding of the float32 states."""

WITHOUT_INTERVALS = (
    "store: moments: spectra and entropies have no intervals, which need the states of each "
    f"conversation; intervals of shared shares leave out one of {BUCKETS} buckets of conversations "
    "at a time."
)


def run(context: StageContext) -> Json:
    """Measure every site; write ``spectra.safetensors``: ``{site}/{matrix}/{centring}``."""
    config = context.config.spectrum or SpectrumConfig()
    measured = context.result("activations")
    rows = {split: slice(*measured["rows"][split]) for split in ("fit", "test")}
    folder = context.input("activations")
    activations = PairedActivations.open(folder)
    streamed = open_streamed(folder)
    vectors = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")

    sites: dict[str, Json] = {}
    tensors: dict[str, np.ndarray] = {}
    with context.reporter.bar("spectra", len(activations.sites), unit="site") as advance:
        for site in activations.sites:
            v = vectors[site].tensor
            if streamed is None:
                base, tuned = activations.base[site].double(), activations.tuned[site].double()
                delta = tuned - base
                found = _from_states(
                    {
                        "delta": delta[rows["fit"]],
                        "base": base[rows["fit"]],
                        "tuned": tuned[rows["fit"]],
                    },
                    _number(cosine_to(delta[rows["test"]], v).nanmean()),
                    measured["conversations"]["fit"],
                    config,
                )
            else:
                held_out = streamed["test"][site].sums.mean_cosine(v)
                found = _from_moments(streamed["fit"][site], held_out, config)
            sites[site] = _site(found, v, measured["noise_floor"][site]["rms"], config)
            n = found.spectra["delta"][0].n
            tensors |= {
                f"{site}/{name}/{_centring(spectrum)}": spectrum.singular_values.numpy()
                for name, pair in found.spectra.items()
                for spectrum in pair
            }
            advance(1)
    write_tensors(context.folder / "spectra.safetensors", tensors)

    d = int(measured["width"])
    shown = FINAL_NORM if FINAL_NORM in sites else activations.sites[-1]
    at_site = sites[shown]
    result = {
        "n": n,
        "d": d,
        "rows": "fit",
        "power": config.power,
        "sites": sites,
        "headline": {
            "site": shown,
            "n": n,
            "sigma_ratio": _value(at_site["delta"]["uncentred"]["sigma_ratio"]),
            "effective_rank": _value(at_site["delta"]["uncentred"]["effective_rank"]),
            "shared_share": _value(at_site["shared_share"]),
            "shared_share_debiased": _value(at_site["shared_share_debiased"]),
            "u1_cosine": at_site["u1_cosine"],
        },
        "notes": [
            *_notes(sites, n, d, _lora_rank(context.config)),
            *([] if streamed is None else [WITHOUT_INTERVALS]),
        ],
    }
    draw_result("spectrum", result, context.folder)
    return result


@dataclass(frozen=True)
class _Found:
    """What the fit rows of a site say.

    Attributes:
        spectra: uncentred and centred, of each matrix.
        intervals: theirs, without ends where the states of each conversation are not known.
        shares: the shared share of ΔH.
        held_out: mean cosine of the test rows with v*.
    """

    spectra: Mapping[str, tuple[Spectrum, Spectrum]]
    intervals: Mapping[str, tuple[SpectralIntervals, SpectralIntervals]]
    shares: ShareIntervals
    held_out: float | None


def _from_states(
    matrices: Mapping[str, Tensor],
    held_out: float | None,
    keys: Sequence[str],
    config: SpectrumConfig,
) -> _Found:
    measures = {name: spectra(matrix) for name, matrix in matrices.items()}
    intervals = {
        name: spectral_intervals(
            matrix,
            keys,
            power=config.power,
            confidence=config.confidence,
            measured=measures[name],
        )
        for name, matrix in matrices.items()
    }
    shares = share_intervals(matrices["delta"], keys, confidence=config.confidence)
    return _Found(measures, intervals, shares, held_out)


def _from_moments(fit: SiteMoments, held_out: float | None, config: SpectrumConfig) -> _Found:
    def bare(spectrum: Spectrum) -> SpectralIntervals:
        return SpectralIntervals.without_ends(spectrum, config.power)

    measures = {name: spectra_from_moments(matrix) for name, matrix in fit.matrices.items()}
    intervals = {name: (bare(pair[0]), bare(pair[1])) for name, pair in measures.items()}
    shares = shares_from_sums(fit.sums, confidence=config.confidence)
    return _Found(measures, intervals, shares, held_out)


def _site(found: _Found, v: Tensor, noise: float, config: SpectrumConfig) -> dict[str, Json]:
    """One site: three matrices' spectra, and what must be read beside σ₂/σ₁ of ΔH."""
    result: dict[str, Json] = {
        name: {
            _centring(spectrum): _spectrum(spectrum, intervals, config)
            for spectrum, intervals in zip(pair, found.intervals[name], strict=True)
        }
        for name, pair in found.spectra.items()
    }
    uncentred, centred = found.spectra["delta"]
    u1 = uncentred.first_right
    floor = max(noise, ROUNDING * _row_norm(found.spectra["base"][0]))
    return result | {
        "shared_share": _json(found.shares.plain),
        "shared_share_debiased": _json(found.shares.debiased),
        "u1_cosine": None if u1 is None else _number(cosine_to(u1[None], v)[0].abs()),
        "held_out_cosine": found.held_out,
        "undefined": u1 is None,
        "rest_within_rounding": None if u1 is None else _row_norm(centred) <= ABOVE_NOISE * floor,
    }


def _spectrum(spectrum: Spectrum, intervals: SpectralIntervals, config: SpectrumConfig) -> Json:
    found = {each.name: _json(getattr(intervals, each.name)) for each in fields(intervals)}
    return found | {"top": spectrum.top_shares(config.top)}


def _row_norm(spectrum: Spectrum) -> float:
    """‖·‖_F / √N: the root mean square norm of a row."""
    return float(spectrum.singular_values.norm()) / math.sqrt(spectrum.n)


def _centring(spectrum: Spectrum) -> str:
    return "centred" if spectrum.centred else "uncentred"


def _json(interval: Interval | None) -> Json:
    return interval.json() if interval else None


def _value(interval: Json) -> float | None:
    return interval["value"] if interval else None


def _number(value: Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None


def _lora_rank(config: PipelineConfig) -> int | None:
    """Rank of the adapter that makes the tuned model; None for full weights."""
    if config.dpo is not None:
        return config.dpo.lora.rank if config.dpo.lora else None
    tuned, revision = config.models.tuned, config.models.tuned_revision
    if tuned is None or not is_adapter(tuned, revision=revision):
        return None
    from peft import PeftConfig

    return getattr(PeftConfig.from_pretrained(tuned, revision=revision), "r", None)


def _notes(sites: Mapping[str, Json], n: int, d: int, lora_rank: int | None) -> list[str]:
    notes = [
        f"Spectra are of the fit prompts: N = {n}, d = {d}. Entropies and ranks depend on N; "
        "compare them only at equal N."
    ]
    undefined = [site for site, result in sites.items() if result["undefined"]]
    if undefined:
        notes.append(
            "ΔH has no spectrum where the displacement of every fit prompt is exactly zero: "
            f"{', '.join(undefined)}."
        )
    small = [
        site
        for site, result in sites.items()
        if (ratio := _value(result["delta"]["uncentred"]["sigma_ratio"])) is not None
        and ratio < NEARLY_ONE
    ]
    if small:
        beside = "; ".join(
            f"{site}: σ₂/σ₁ {_say(_value(sites[site]['delta']['uncentred']['sigma_ratio']))}, "
            f"m {_say(_value(sites[site]['shared_share']))}, "
            f"held-out cosine {_say(sites[site]['held_out_cosine'])}"
            for site in small
        )
        notes.append(
            f"σ₂/σ₁ < {NEARLY_ONE} alone says little (cosines of only 0.5 with v* give 0.10 at "
            f"N = 500); read it with the shared share m and the held-out cosine. {beside}."
        )
    rounding = [site for site, result in sites.items() if result["rest_within_rounding"]]
    if rounding:
        notes.append(
            "What is left of ΔH after taking v* off is within rounding at "
            f"{', '.join(rounding)}: centred spectra there are those of rounding errors."
        )
    if lora_rank is not None:
        notes.append(
            f"The tuned model is a LoRA of rank {lora_rank}: each weight's change has at most that "
            "rank by construction, so low ranks here are partly built in."
        )
    return notes


def _say(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"
