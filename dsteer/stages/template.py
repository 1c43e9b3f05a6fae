"""Divide the displacement into chat template and training: base/tuned × raw/templated.

Vectors are means over the fit prompts; what is reported of states, shares and KL is of the test
prompts. Both forms of a prompt end where the answer begins, and both models read the same ids of a
form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.reading import NoiseFloor, Reading, noise_floor
from dsteer.activations.sites import FINAL_NORM
from dsteer.activations.storage import States
from dsteer.config import TemplateConfig
from dsteer.data.forms import FORMS, BothForms, both_forms
from dsteer.data.jsonl import read_pairs
from dsteer.data.tokens import Encoded, Tokenizer, has_template, hash_ids
from dsteer.errors import DataError, ModelError
from dsteer.geometry.intervals import Interval
from dsteer.geometry.logits import NOTHING, noise_kl
from dsteer.geometry.template import (
    CELLS,
    COSINES,
    PARTS,
    Cells,
    FourWay,
    four_way,
    reach,
    training_across_forms,
)
from dsteer.models.pair import ModelPair, Which
from dsteer.models.readout import Readout
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.store import Json, write_tensors

MODELS: tuple[Which, ...] = ("base", "tuned")
SPLITS = ("fit", "test")

EFFECTS = ("training_raw", "training_templated", "template_base", "template_tuned")
"""The parts whose vectors are written."""

STEERING: Mapping[str, tuple[str, ...]] = {
    "v_training": ("training_raw",),
    "v_template": ("template_base",),
    "v_both": ("training_raw", "template_base"),
    "v_total": ("total",),
}
"""What is added to the base's raw final_norm states: sums of fit-split vectors."""

ABOVE_NOISE = 5.0
"""A part, or a KL, counts as measured when it is more than so many times what rounding makes."""

UNDEFINED: Mapping[str, str] = {
    "zero": "base on raw text and tuned in its template agree exactly on every prompt",
    "rounding": f"the mean displacement is not above {ABOVE_NOISE:g} times what rounding alone can "
    "make",
    "one_conversation": "all test prompts are of one conversation, and scatter is told from a mean "
    "between conversations",
    "scatter": "the mean displacement is not told from 0: the estimate of its squared norm, free "
    "of the prompts' scatter, is not positive",
}
"""Why the shares of a site are undefined."""

LAST_TOKEN = (
    "Each form is read at the token from which the model answers. The two forms end with other "
    "tokens, so the template part holds all that the template changes there, the last token itself "
    "included; it is no shift between states of one token."
)


def run(context: StageContext) -> Json:
    """Read the four cells into ``cells/``, divide every site, write ``vectors.safetensors``.

    The processes of a run share the reading; the first one does the rest.
    """
    config = context.config.template or TemplateConfig()
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    forms, keys = _forms(context, config, pair)
    states = _read(context, config, pair, forms)
    if not context.ranks.main:
        return None
    n_fit, n_test = len(keys["fit"]), len(keys["test"])
    rows = {"fit": slice(0, n_fit), "test": slice(n_fit, n_fit + n_test)}

    sites: dict[str, Json] = {}
    vectors: dict[str, np.ndarray] = {}
    kl: Json = None
    kl_floor: float | None = None
    with context.reporter.bar("four-way", len(states.sites), unit="site") as advance:
        for site in states.sites:
            fit, test = (states.at(site, rows[split]) for split in SPLITS)
            fitted = {name: fit.part(name).mean(dim=0) for name in EFFECTS}
            sites[site] = _site(
                *_measure(context, config, site, fit, test, keys), fitted, states.noise[site]
            )
            vectors |= {
                f"{site}/{name}": vector.numpy().astype(np.float32)
                for name, vector in fitted.items()
            }
            if site == FINAL_NORM:
                kl, kl_floor = _reach(context, config, fit, test, keys["test"], states)
            advance(1)
    write_tensors(
        context.folder / "vectors.safetensors",
        vectors,
        {"n": n_fit, "rows": "fit", "position": "prompt_last"},
    )
    result = {
        "n_fit": n_fit,
        "n_test": n_test,
        "dropped": {split: dict(sorted(forms[split].dropped.items())) for split in SPLITS},
        "forms": {form: _form(forms, form, pair.tokenizer_for("chat")) for form in FORMS},
        "sites": sites,
        "kl": kl,
        "kl_floor": kl_floor,
        "headline": _headline(sites, kl),
        "notes": [*pair.notes, *_notes(config, forms, sites, kl, kl_floor)],
    }
    draw_result("template", result, context.folder)
    return result


# ---------------------------------------------------------------------------------- reading


def _forms(
    context: StageContext, config: TemplateConfig, pair: ModelPair
) -> tuple[dict[str, BothForms], dict[str, list[str]]]:
    """Both forms of each split's prompts, and the conversation of each that is kept."""
    if pair.encoder_decoder:
        raise ModelError(
            f"stage template: {pair.name('base')} is an encoder-decoder model, which the four-way "
            "design does not read; leave the `template:` section out"
        )
    tokenizer = pair.tokenizer_for("chat")
    if not has_template(tokenizer):
        raise ModelError(
            f"stage template: the tokenizer of base {pair.name('base')} and tuned "
            f"{pair.name('tuned')} has no chat template; give one as models.chat_template, or "
            "leave the `template:` section out"
        )
    limits = [limit for limit in (config.max_tokens, pair.max_positions) if limit is not None]
    forms: dict[str, BothForms] = {}
    keys: dict[str, list[str]] = {}
    for split in SPLITS:
        pairs = read_pairs(context.input("data") / f"{split}.jsonl")
        found = both_forms(tokenizer, pairs, most=config.prompts, max_tokens=min(limits))
        if not found.kept:
            rules = ", ".join(f"{rule} {count}" for rule, count in sorted(found.dropped.items()))
            raise DataError(
                f"stage template: none of the {len(pairs)} prompts of the {split} split can be "
                f"read both raw and through the chat template ({rules or 'the split is empty'}); "
                "give conversations that end where the answer begins, or a larger "
                "template.max_tokens"
            )
        forms[split] = found
        keys[split] = [pairs[number].conversation for number in found.kept]
    return forms, keys


@dataclass(frozen=True)
class _States:
    """The four cells of every site, on disk.

    Attributes:
        sites: in the model's order.
        cells: cell → states, fit rows first, then test rows.
        noise: site → rounding noise of the base's states, the larger of both forms.
        heads: the two unembeddings; empty where final_norm is not read.
    """

    sites: tuple[str, ...]
    cells: Mapping[str, States]
    noise: Mapping[str, NoiseFloor]
    heads: Mapping[Which, Readout]

    def at(self, site: str, rows: slice) -> Cells:
        """The four cells at a site, for some rows."""
        return Cells(*(self.cells[cell].rows(site, rows.start, rows.stop) for cell in CELLS))


def _read(
    context: StageContext,
    config: TemplateConfig,
    pair: ModelPair,
    forms: Mapping[str, BothForms],
) -> _States:
    """Both models on both forms, one model after the other."""
    readings = {
        form: Reading.of(
            pair,
            _encoded(forms, form),
            sites=config.sites,
            position="prompt_last",
            batch_tokens=config.batch_tokens,
        )
        for form in FORMS
    }
    sites = readings[FORMS[0]].sites
    cells: dict[str, States] = {}
    noise = dict.fromkeys(sites, NoiseFloor(0.0, 0.0))
    heads: dict[Which, Readout] = {}
    for which in MODELS:
        with pair.using(which) as model:
            for form, reading in readings.items():
                cell = f"{which}_{form}"
                path = context.folder / "cells" / f"{cell}.safetensors"
                cells[cell] = reading.run(model, which, path, context.reporter, context.ranks)
                if which == "base" and context.ranks.main:
                    floors = noise_floor(reading, model, cells[cell], config.noise_floor_prompts)
                    noise = {
                        site: NoiseFloor(
                            max(noise[site].rms, floors[site].rms),
                            max(noise[site].mean_norm, floors[site].mean_norm),
                        )
                        for site in sites
                    }
            if FINAL_NORM in sites:
                heads[which] = Readout.of(model, vocabulary=pair.vocabulary)
            del model
    pair.release()
    return _States(sites, cells, noise, heads)


def _encoded(forms: Mapping[str, BothForms], form: str) -> list[Encoded]:
    """The ids of a form: fit prompts, then test prompts."""
    return [item for split in SPLITS for item in getattr(forms[split], form)]


def _form(forms: Mapping[str, BothForms], form: str, tokenizer: Tokenizer) -> Json:
    """What was read of a form: its ids, and the token at which states were read."""
    encoded = _encoded(forms, form)
    (token, times), *_ = Counter(item.ids[-1] for item in encoded).most_common(1)
    return {
        "tokens": sum(len(item.ids) for item in encoded),
        "ids_sha256": hash_ids(encoded),
        "last_token": tokenizer.decode([token]),
        "last_token_share": times / len(encoded),
    }


# ---------------------------------------------------------------------------------- measures


def _measure(
    context: StageContext,
    config: TemplateConfig,
    site: str,
    fit: Cells,
    test: Cells,
    keys: Mapping[str, Sequence[str]],
) -> tuple[FourWay, dict[str, dict[str, Interval | None]]]:
    """The parts on test prompts, and the training effect's held-out cosines across forms."""
    seed = context.seed(site)
    parts = four_way(
        test, keys["test"], draws=config.bootstrap, confidence=config.confidence, seed=seed
    )
    across = training_across_forms(
        fit,
        test,
        keys["fit"],
        keys["test"],
        draws=config.bootstrap,
        confidence=config.confidence,
        seed=seed,
    )
    return parts, across


def _site(
    measured: FourWay,
    across: Mapping[str, Mapping[str, Interval | None]],
    fitted: Mapping[str, Tensor],
    noise: NoiseFloor,
) -> dict[str, Json]:
    """One site's result; norms also in units of the base's states.

    A ratio or cosine of what is within rounding is undefined.
    """
    rounding = _rounding(noise.mean_norm, measured.base_norm)

    def within(name: str, mean: Tensor) -> bool:
        floor = ABOVE_NOISE * rounding * math.sqrt(sum(weight**2 for weight in PARTS[name]))
        return float(mean.norm()) <= floor

    small = {name: within(name, part.mean) for name, part in measured.parts.items()}
    unfit = {name: within(name, mean) for name, mean in fitted.items()}
    why = _undefined(measured, small["total"])
    parts: dict[str, Json] = {}
    for name, part in measured.parts.items():
        parts[name] = {
            "norm_squared": _json(part.squared),
            "norm": _json(part.norm),
            "relative_norm": _json(part.norm and _scaled(part.norm, measured.base_norm)),
            "share": None if why else _json(part.share),
            "energy": None if small["total"] else _json(part.energy),
            "shared_share": None if small[name] else _json(part.shared),
            "zero": part.norm is not None and part.norm.value == 0,
            "within_rounding": small[name],
        }
    return {
        "base_norm": measured.base_norm,
        "noise_mean_norm": noise.mean_norm,
        "parts": parts,
        "cosines": {
            name: None if small["total"] or small[a] or small[b] else _json(measured.cosines[name])
            for name, (a, b) in COSINES.items()
        },
        "held_out": {
            ours: {
                theirs: None
                if small["total"] or unfit[f"training_{ours}"] or small[f"training_{theirs}"]
                else _json(cosine)
                for theirs, cosine in row.items()
            }
            for ours, row in across.items()
        },
        "undefined": why is not None,
        "why": why,
    }


def _rounding(noise: float, base_norm: float) -> float:
    """What rounding makes: a stored state is a float32, which a second reading does not show."""
    return max(noise, torch.finfo(torch.float32).eps * base_norm)


def _undefined(measured: FourWay, rounding: bool) -> str | None:
    """The key of :data:`UNDEFINED` that holds at a site; None where shares are defined."""
    total = measured.parts["total"]
    if total.norm is not None and total.norm.value == 0:
        return "zero"
    if rounding:
        return "rounding"
    if total.squared is None:
        return "one_conversation"
    return "scatter" if total.share is None else None


def _scaled(interval: Interval, unit: float) -> Interval | None:
    if unit == 0:
        return None
    value, low, high = (
        None if end is None else end / unit for end in (interval.value, interval.low, interval.high)
    )
    assert value is not None
    return Interval(value, low, high, interval.n)


def _reach(
    context: StageContext,
    config: TemplateConfig,
    fit: Cells,
    test: Cells,
    keys: Sequence[str],
    states: _States,
) -> tuple[Json, float]:
    """KL to the tuned model in its template, of the other cells and of steered base raw states.

    Returns:
        The KLs, and the floor that the base's own must be above for a share of it to mean anything.
    """
    heads, seed = states.heads, context.seed("kl")
    rms = _rounding(states.noise[FINAL_NORM].rms, float(test.base_raw.double().norm(dim=1).mean()))
    floor = max(NOTHING, ABOVE_NOISE * noise_kl(test.base_raw, heads["base"], rms, seed))
    vectors = {
        name: sum(
            (fit.part(part).mean(dim=0) for part in parts),
            start=torch.zeros((), dtype=torch.float64),
        )
        for name, parts in STEERING.items()
    }
    reached = reach(
        test,
        vectors,
        heads["base"],
        heads["tuned"],
        keys,
        floor=floor,
        draws=config.bootstrap,
        confidence=config.confidence,
        seed=seed,
    )
    found = {
        name: {"kl": _json(item.kl), "recovered": _json(item.recovered)}
        for name, item in reached.items()
    }
    nothing = {"kl": None, "recovered": None}
    return found | {name: nothing for name in STEERING if name not in found}, floor


def _json(interval: Interval | None) -> Json:
    return interval.json() if interval else None


# ---------------------------------------------------------------------------------- words


def _headline(sites: Mapping[str, Json], kl: Json) -> dict[str, Json]:
    shown = FINAL_NORM if FINAL_NORM in sites else list(sites)[-1]
    parts = sites[shown]["parts"]

    def share(part: str) -> float | None:
        found = parts[part]["share"]
        return found["value"] if found else None

    recovered = kl["v_both"]["recovered"] if kl else None
    return {
        "site": shown,
        "template_share": share("template_base"),
        "training_share": share("training_raw"),
        "interaction_share": share("interaction"),
        "kl_recovered_both": recovered["value"] if recovered else None,
    }


def _notes(
    config: TemplateConfig,
    forms: Mapping[str, BothForms],
    sites: Mapping[str, Json],
    kl: Json,
    kl_floor: float | None,
) -> list[str]:
    notes = [LAST_TOKEN]
    for split in SPLITS:
        if dropped := forms[split].dropped:
            rules = ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items()))
            notes.append(
                f"{sum(dropped.values())} of the {split} prompts can't be read in both forms and "
                f"were left out by rule: {rules}."
            )
        if len(forms[split].kept) < config.prompts:
            notes.append(
                f"The {split} split gave {len(forms[split].kept)} prompts, not the "
                f"{config.prompts} asked for."
            )
    if all(_same_ids(found) for found in forms.values()):
        notes.append(
            "The chat template writes the ids of the raw transcript, so the template part is 0 by "
            "construction."
        )
    words = {
        "training_raw": "the training effect on raw text",
        "template_base": "the template effect in the base",
        "interaction": "the interaction",
    }
    for part, meant in words.items():
        zero = [site for site, result in sites.items() if result["parts"][part]["zero"]]
        if zero:
            notes.append(f"{meant[:1].upper()}{meant[1:]} is exactly zero at {', '.join(zero)}.")
        rounding = [
            site
            for site, result in sites.items()
            if result["parts"][part]["within_rounding"] and site not in zero
        ]
        if rounding:
            notes.append(
                f"The mean of {meant} is within rounding at {', '.join(rounding)}: it is not above "
                f"{ABOVE_NOISE:g} times what rounding alone can make, so its direction means "
                "nothing."
            )
        untold = [
            site
            for site, result in sites.items()
            if result["parts"][part]["norm"] is None
            and not result["parts"][part]["within_rounding"]
            and result["why"] != "one_conversation"
        ]
        if untold:
            notes.append(
                f"{meant[:1].upper()}{meant[1:]} is not told from 0 at {', '.join(untold)}: the "
                "estimate of its mean's squared norm, free of the prompts' scatter, is not "
                "positive, so it has no norm and no cosine."
            )
    for why, words_of in UNDEFINED.items():
        undefined = [site for site, result in sites.items() if result["why"] == why]
        if undefined:
            notes.append(f"No share is defined at {', '.join(undefined)}: {words_of}.")
    if kl is None:
        notes.append("KL was not measured: final_norm is not among the sites read.")
    elif kl["base_raw"]["recovered"] is None:
        notes.append(
            "KL recovered is undefined: the base on raw text is "
            f"{kl['base_raw']['kl']['value']:.3g} nats from the tuned model in its template, not "
            f"above {kl_floor:.3g}, what rounding could make."
        )
    return notes


def _same_ids(forms: BothForms) -> bool:
    return all(a.ids == b.ids for a, b in zip(forms.raw, forms.templated, strict=True))
