"""Grade five claims about the pair and about each of its nulls, and check the measurement itself.

Nothing is measured here but the difference of reward margins between the pair and its coin-flip
null; all else is read from the results of the stages that ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsteer.behaviour.claims import (
    CONTROL,
    NOT_TESTED,
    Control,
    Evidence,
    Grade,
    Margins,
    PreferenceSpecific,
    Rule,
    rules,
)
from dsteer.behaviour.selfcheck import self_check
from dsteer.config import ClaimsConfig, resolved
from dsteer.geometry.comparison import random_cosine
from dsteer.models.load import adapter_config, is_adapter
from dsteer.report.figures import draw_result
from dsteer.report.nulls_tables import results_of
from dsteer.report.values import at, items, mapping, real
from dsteer.stages import StageContext
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, read_json, read_tensors

SEEDS = 3
"""So many training seeds a claim about training needs."""

FEW = 40
"""Conversations below which intervals of skewed numbers are short of 95 % (results/coverage)."""

KINDS = (CONTROL, "swapped", "sft", "second_seed", "lora", "self")
"""What nulls are known as."""


def run(context: StageContext) -> Json:
    """Grade the pair and each null by the same rules against the same coin-flip null."""
    config = context.config.claims or ClaimsConfig()
    own = resolved(context.config)
    read = {
        stage: mapping(read_json(folder / "result.json"))
        for stage, folder in context.inputs.items()
    }
    pair = Evidence("pair", read, _margins(context.run, read), _lora(own, context.tuned_path))
    nulls: dict[str, Evidence] = {}
    kinds: dict[str, str] = {}
    known: dict[str, Json] = {}
    for name, path in context.nulls.items():
        settings = known[name] = _settings(path)
        kinds[name] = _kind(name, settings, own)
        found = results_of(path)
        tuned = path / "dpo" / "model" if "dpo" in found else at(settings, "models", "tuned")
        nulls[name] = Evidence(name, found, _margins(path, found), _lora(settings, tuned))
    control = _control(nulls, kinds, known, own)
    graded = rules(config, context.seed("bootstrap"))
    pairs = {
        evidence.name: {rule.name: rule.grade(evidence, control) for rule in graded}
        for evidence in (pair, *nulls.values())
    }
    checked = self_check(
        context.base_path,
        revision=None if "base" in context.inputs else context.config.models.base_revision,
        trust_remote_code=context.config.models.trust_remote_code,
        seed=context.seed("self_check"),
    )
    seeds = len({at(own, "dpo", "seed"), *(
        at(known[name], "dpo", "seed")
        for name, kind in kinds.items()
        if kind == "second_seed" and "dpo" in nulls[name].results
    )})  # fmt: skip
    trained = context.config.dpo is not None
    result = {
        "claims": [_told(rule, pairs["pair"][rule.name]) for rule in graded],
        "pairs": {
            name: {claim: grade.verdict for claim, grade in grades.items()}
            for name, grades in pairs.items()
        },
        "nulls": [{"name": name, "kind": kinds[name]} for name in nulls],
        "beside": _beside(context, pair, nulls, graded),
        "training_seeds": seeds if trained else None,
        "confidence": config.confidence,
        "self_check": checked,
        "headline": {
            **{rule.name: pairs["pair"][rule.name].verdict for rule in graded},
            "self_check": {True: "passed", False: "failed"}.get(checked["passed"], "not run"),
        },
        "notes": [
            *_notes(pairs["pair"], checked, seeds if trained else None),
            *_few(pair, context.result("activations")),
        ],
    }
    draw_result("claims", result, context.folder)
    return result


def _told(rule: Rule, grade: Grade) -> Json:
    return {
        "name": rule.name,
        "verdict": grade.verdict,
        "number": grade.number,
        "null": grade.null,
        "rule": rule.rule,
        "why": grade.why,
        "beside": list(grade.beside),
    }


# ---------------------------------------------------------------------------------- evidence


def _settings(run: Path) -> dict[str, Json]:
    """The config of a null's own manifest; empty where it has none."""
    path = run / "manifest.json"
    return mapping(at(read_json(path), "config")) if path.is_file() else {}


def _kind(name: str, settings: Json, own: Json) -> str:
    """Which of the known kinds a null is: by its name, else by what its config changes."""
    if name in KINDS:
        return name
    labels = at(settings, "dpo", "labels")
    if labels in KINDS:
        return str(labels)
    training, theirs = mapping(at(own, "dpo")), mapping(at(settings, "dpo"))
    if not training or not theirs:
        return "other"
    changed = {key for key in training.keys() | theirs.keys()
               if training.get(key) != theirs.get(key)}  # fmt: skip
    if changed == {"seed"}:
        return "second_seed"
    if theirs.get("loss_type") == "sft":
        return "sft"
    return "lora" if "lora" in changed and changed <= {"lora", "learning_rate"} else "other"


def _control(
    nulls: Mapping[str, Evidence], kinds: Mapping[str, str], settings: Mapping[str, Json], own: Json
) -> Control:
    """The first coin-flip null that was measured as the pair was, or why there is none."""
    flipped = [evidence for name, evidence in nulls.items() if kinds[name] == CONTROL]
    if not flipped:
        return Control(None, f"the pipeline names no null {CONTROL}")
    known = [evidence for evidence in flipped if "profile" in evidence.results]
    if not known:
        return Control(
            None, f"the null {flipped[0].name} failed: its run has no result of stage profile"
        )
    others = {evidence.name: _differs(own, settings[evidence.name]) for evidence in known}
    for evidence in known:
        if not others[evidence.name]:
            return Control(evidence)
    words = "; ".join(f"{name} changes {', '.join(keys)}" for name, keys in others.items())
    return Control(None, f"a coin-flip null differs from the pair in its labels alone, and {words}")


def _differs(own: Json, theirs: Json) -> list[str]:
    """In what a coin-flip null differs from its pair beyond the labels, as dotted names."""
    found = [
        section
        for section in ("seed", "data", "base", "activations", "vector", "profile")
        if at(own, section) != at(theirs, section)
    ]
    training, flipped = mapping(at(own, "dpo")), mapping(at(theirs, "dpo"))
    if training:  # of models that exist, the name of the null is all that there is to go by
        wanted = {**training, "labels": CONTROL}
        found += [
            f"dpo.{key}"
            for key in sorted(wanted.keys() | flipped.keys())
            if wanted.get(key) != flipped.get(key)
        ]
    return found


def _margins(run: Path, results: Mapping[str, Json]) -> Margins | None:
    """The reward margins of a profile, place by place; None where it chose none."""
    profile, path = results.get("profile"), run / "profile" / "pairs.safetensors"
    site, tokens = (at(profile, "chosen", key) for key in ("site", "tokens"))
    if site is None or tokens is None or not path.is_file():
        return None
    rows, tensors = list(mapping(at(profile, "sites"))), read_tensors(path)
    values = {
        f"{name}, {kind}": tensors[f"margin.{kind}.v"][row].astype(np.float64)
        for row, name in enumerate(rows)
        for kind in map(str, items(at(profile, "tokens")))
    }
    finite = {place: each for place, each in values.items() if np.isfinite(each).all()}
    place = f"{site}, {tokens}"
    if place not in finite:
        return None
    return Margins(
        finite,
        place,
        tuple(map(str, at(profile, "conversations") or ())),
        float(at(profile, "beta")),
    )


def _lora(settings: Json, tuned: Path | str | None) -> int | None:
    """The rank of a LoRA that was trained, or of an adapter on this machine."""
    rank = real(at(settings, "dpo", "lora", "rank"))
    if rank is None and tuned is not None and Path(tuned).is_dir() and is_adapter(str(tuned)):
        rank = real(getattr(adapter_config(tuned), "r", None))
    return None if rank is None else int(rank)


# ---------------------------------------------------------------------------------- beside


def _beside(
    context: StageContext,
    pair: Evidence,
    nulls: Mapping[str, Evidence],
    graded: tuple[Rule, ...],
) -> Json:
    """What each null's v* is and does beside the pair's: cosine, margin, paired difference."""
    site = at(pair.results.get("profile"), "chosen", "site") or at(
        pair.results.get("cosine"), "chosen_site"
    )
    path = "vector/vectors.safetensors"
    if site is None or not nulls or not (context.run / path).is_file():
        return {"site": site, "random_cosine": None, "nulls": {}}
    v = SteeringVectorSet.load(context.run / path)[str(site)]
    rule = next(rule for rule in graded if isinstance(rule, PreferenceSpecific))
    found = {}
    for name, evidence in nulls.items():
        theirs = context.nulls[name] / path
        vectors = SteeringVectorSet.load(theirs) if theirs.is_file() else None
        other = vectors[str(site)] if vectors is not None and str(site) in vectors else None
        same = other is not None and other.width == v.width
        difference = (
            rule.difference(pair.margins, evidence.margins)
            if pair.margins is not None and evidence.margins is not None
            else None
        )
        found[name] = {
            "cosine": v.cosine(other) if other is not None and same else None,
            "norm": other.norm if other is not None else None,
            "reward_margin": rule.margin(evidence.margins).json() if evidence.margins else None,
            "difference": difference.json() if difference else None,
        }
    return {
        "site": site,
        "norm": v.norm,
        "random_cosine": random_cosine(v.width),
        "reward_margin": rule.margin(pair.margins).json() if pair.margins else None,
        "nulls": found,
    }


def _few(pair: Evidence, read: Json) -> list[str]:
    """What to think of intervals over few conversations: of the profile, or of the states."""
    keys = items(at(pair.results.get("profile"), "conversations"))
    count = len(set(map(str, keys or items(at(read, "conversations", "test")))))
    if not 0 < count < FEW:
        return []
    return [
        f"Measured on {count} test conversations: below {FEW} (and, of very skewed numbers, below "
        "128) intervals hold the true value less often than they say, 95 % ones in about 92 % of "
        "cases at 20, 90 % at 10 and 64 % at 3. A verdict that hangs on the last digit of an end "
        "is none."
    ]


def _notes(grades: Mapping[str, Grade], checked: Json, seeds: int | None) -> list[str]:
    notes = []
    if checked["passed"] is False:
        lost = [str(check["what"]) for check in checked["checks"] if not check["passed"]]
        notes.append(
            f"The self-check failed ({'; '.join(lost)}): on this architecture the measurement does "
            "not find what was planted, so no number of this run can be trusted."
        )
    elif checked["passed"] is None:
        notes.append(f"The self-check was not run: {checked.get('why')}.")
    untested = [name for name, grade in grades.items() if grade.verdict == NOT_TESTED]
    if untested:
        notes.append(f"Not tested, so not supported either: {', '.join(untested)}.")
    if seeds is not None and seeds < SEEDS:
        notes.append(
            f"The verdicts are about this pair: a claim about training needs {SEEDS} training "
            f"seeds or more, and this run has {seeds} (its own and the nulls of kind second_seed)."
        )
    return notes
