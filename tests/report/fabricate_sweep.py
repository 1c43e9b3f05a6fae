"""Made-up results of the stages interpolation and inversion, and their explorer files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsteer.store import write_json

STRENGTHS = [-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
N, TEXTS = 96, 32

NASTY = (
    "</script><img src=x onerror=\"alert('pwned')\">",
    "<!-- <script>alert(1)</script> --> & \"double\" 'single' `back` ${1} {{ 2 }}",
    "שלום עולם، مرحبا بالعالم — right to left",
    "w" * 400,
    "first line\n\nthird line\ttab \u2028 separator \u2029 end",
)
"""Prompts and texts that break pages which do not escape, or do not wrap."""

# name → label, unit, better, source, start, gain to the target, rule-off per λ²
_METRICS: dict[str, tuple[str, str, str | None, str, float, float]] = {
    "kl_recovered": ("KL recovered", "share", "up", "teacher_forced", 0.0, 1.0),
    "kl_recovered_reverse": ("KL recovered, reverse", "share", "up", "teacher_forced", 0.0, 1.0),
    "kl_first_token": ("KL of the first token", "nats", "down", "teacher_forced", 0.8, -0.8),
    "top1_agreement": ("top-1 agreement", "share", "up", "teacher_forced", 0.55, 0.45),
    "reward_margin": ("implicit reward margin", "nats", "up", "teacher_forced", 0.0, 3.2),
    "preference_match": ("preference match", "share", "up", "teacher_forced", 0.5, 0.4),
    "bleu_reference": ("BLEU, reference", "points", "up", "generated", 12.0, 4.0),
    "rouge_l_reference": ("ROUGE-L, reference", "share", "up", "generated", 0.31, 0.05),
    "bleu_target": ("BLEU, target's own output", "points", "up", "generated", 22.0, 78.0),
    "rouge_l_target": ("ROUGE-L, target's own output", "share", "up", "generated", 0.4, 0.6),
    "perplexity": ("perplexity under the base", "", None, "generated", 9.0, 2.0),
    "distinct_2": ("distinct-2", "share", "up", "generated", 0.82, -0.04),
    "repetition": ("repetition", "share", "down", "generated", 0.05, 0.02),
    "length": ("length", "tokens", None, "generated", 31.0, 9.0),
    "degenerate": ("degenerate outputs", "share", "down", "generated", 0.0, 0.0),
    "refusal": ("refusals", "share", None, "generated", 0.09, 0.25),
    "oracle_polite": ("oracle: polite", "score", "up", "generated", 0.2, 0.6),
    "oracle_brief": ("oracle: brief", "score", None, "generated", 0.4, -0.1),
}


def with_baselines(result: dict[str, Any]) -> dict[str, Any]:
    """The same sweep with both baselines, which do next to nothing for the target."""
    kinds = (("amplify", "layer amplified", "scale", 0.25), ("noise", "seeded noise", "noise", 1.0))
    for number, (name, label, operation, unit) in enumerate(kinds):
        result["arms"][name] = {
            **result["arms"]["v"], "label": label, "operation": operation, "unit": unit
        }  # fmt: skip
        for metric in result["metrics"].values():
            start, target = metric["start"]["value"], metric["target"]["value"]
            lost = [0.05 * (1 + number) * abs(target - start) * s * s for s in STRENGTHS]
            metric["curves"][name] = [_interval(start - less, 0.01) for less in lost]
    return result


def sweep(direction: str, *, collapsed: bool = True) -> dict[str, Any]:
    """A result in the form of the stages; inverting swaps start and target."""
    inverse = direction == "inversion"
    degenerate = [_degenerate(s) if collapsed else 0.0 for s in STRENGTHS]
    metrics = {
        name: _metric(name, values, degenerate, inverse) for name, values in _METRICS.items()
    }
    arms = {
        "v": {"label": "v*", "site": "resid_post.2", "norm": 3.1, "generated": True},
        "final_norm": {
            "label": "v* at final_norm", "site": "final_norm", "norm": 7.4, "generated": False
        },
        "preference": {
            "label": "mean e_w − e_l", "site": "final_norm", "norm": 5.2, "generated": True
        },
    }  # fmt: skip
    if inverse:
        del arms["preference"]
    kinds = {
        "empty": [round(TEXTS * d / 4) for d in degenerate],
        "loop": [round(TEXTS * d) - round(TEXTS * d / 4) for d in degenerate],
        "role_header": [0] * len(STRENGTHS),
    }
    return {
        "direction": direction,
        "start": "tuned" if inverse else "base",
        "target": "base" if inverse else "tuned",
        "sign": -1 if inverse else 1,
        "site": "resid_post.2",
        "site_chosen_on": "tune",
        "sites": {
            "resid_post.0": {"kl_recovered": {"all": None, "prompt_last": None}, "norm": 0.0},
            "resid_post.1": {"kl_recovered": {"all": 0.31, "prompt_last": 0.02}, "norm": 1.2},
            "resid_post.2": {"kl_recovered": {"all": 0.72, "prompt_last": 0.04}, "norm": 3.1},
        },
        "positions": "all",
        "strengths": STRENGTHS,
        "grid": {
            "chosen_on": "tune",
            "collapse": 4.0 if collapsed else None,
            "collapse_negative": None,
            "probes": [
                {"strength": 1.0, "degenerate": 0.03},
                {"strength": 2.0, "degenerate": 0.125},
                {"strength": 4.0, "degenerate": 0.53},
            ],
        },
        "arms": arms,
        "random": {"draws": 20, "generated": 3, "matched": "norm"},
        "sham": {"texts_identical": True, "logits_identical": True, "texts": TEXTS},
        "metrics": metrics,
        "texts": {
            "n": TEXTS,
            "degenerate": degenerate,
            "kinds": kinds,
            "greedy": True,
            "max_new_tokens": 64,
            "fast_path": True,
            "decoder_note": None,
        },
        "absent": [
            {"metric": "toxicity", "reason": "behaviour.toxicity is not configured"},
            {"metric": "judge", "reason": "behaviour.judge is not configured"},
        ],
        "diagnoses": [
            "Held-out cosine 0.71 [0.68, 0.74] is below 0.85: the change differs between prompts.",
            *(["Over-steering from λ = 3: overlap falls and degeneration rises."] * collapsed),
        ],
        "headline": {"kl_recovered_at_1": 0.72},
        "notes": [],
    }


def _degenerate(strength: float) -> float:
    return round(TEXTS / (1 + math.exp(-2.2 * (strength - 3.4)))) / TEXTS


def _interval(value: float, half: float, n: int = N) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def _metric(
    name: str,
    values: tuple[str, str, str | None, str, float, float],
    degenerate: list[float],
    inverse: bool,
) -> dict[str, Any]:
    label, unit, better, source, start, gain = values
    generated = source == "generated"
    relative = name.startswith("kl_recovered")
    if inverse and not relative:
        start, gain = start + gain, -gain
    half = max(0.04 * abs(gain), 0.01)

    def level(strength: float, reach: float = 1.35, optimum: float = 1.4) -> float:
        share = reach * (1 - ((strength - optimum) / optimum) ** 2)
        share = max(share, -0.4) if not relative else share
        bent = start + gain * share
        if name == "perplexity":
            bent = start + gain * strength + (math.exp(1.2 * abs(strength)) - 1) / 3
        if name == "repetition":
            bent = start + 0.9 / (1 + math.exp(-2.2 * (strength - 3.4)))
        return min(max(bent, 0.0), 1.0) if unit == "share" and not relative else bent

    def curve(**shape: float) -> list[dict[str, Any] | None]:
        if name == "degenerate":
            return [_interval(d, 0.03, TEXTS) for d in degenerate]
        return [_interval(level(s, **shape), half) for s in STRENGTHS]

    curves = {"v": curve()}
    if generated:
        # All outputs of the largest strength are degenerate: nothing is left to average.
        if name != "degenerate" and degenerate[-1] > 0.9:
            curves["v"][-1] = None
    else:
        curves["final_norm"] = curve(reach=0.7)
    if not inverse:
        curves["preference"] = curve(reach=0.3, optimum=1.1)
    crossing = _crossing(curves["v"], start + gain) if generated else None
    drift = [0.12 * gain * abs(s) for s in STRENGTHS]
    return {
        "label": label,
        "unit": unit,
        "better": better,
        "definition": f"what {label} means, in one sentence.",
        "source": source,
        "split": "test",
        "n": TEXTS if generated else N,
        "curves": curves,
        "random": {
            "low": [start - abs(d) for d in drift],
            "high": [start + abs(d) / 2 for d in drift],
            "mean": [start - abs(d) / 4 for d in drift],
            "draws": 3 if generated else 20,
        },
        "start": _interval(start, half),
        "target": _interval(start + gain, half),
        "crossing": {
            "strength": None if crossing is None else _interval(crossing, 0.08),
            "why": "the curve stays below the target's level" if crossing is None else None,
        },
        "worst": [
            (1 - d) * level(s) if better == "up" else None
            for s, d in zip(STRENGTHS, degenerate, strict=True)
        ]
        if generated and better == "up"
        else None,
    }


def _crossing(curve: list[dict[str, Any] | None], target: float) -> float | None:
    """The first λ ≥ 0 at which the straight line between two points meets the target."""
    first = STRENGTHS.index(0.0)
    for i in range(first, len(STRENGTHS) - 1):
        a, b = curve[i], curve[i + 1]
        if a and b and (a["value"] - target) * (b["value"] - target) < 0:
            share = (target - a["value"]) / (b["value"] - a["value"])
            return STRENGTHS[i] + share * (STRENGTHS[i + 1] - STRENGTHS[i])
    return None


def explorer(direction: str, prompts: int = 12) -> dict[str, Any]:
    """Texts of base, tuned and steered model; the first prompts are those of ``NASTY``."""
    inverse = direction == "inversion"

    def text(words: str, refusal: bool = False, degenerate: str | None = None) -> dict[str, Any]:
        return {"text": words, "refusal": refusal, "degenerate": degenerate}

    def steered(i: int, strength: float) -> dict[str, Any]:
        if strength >= 6:
            return text("", degenerate="empty")
        if strength >= 4:
            return text("and and and and and and and and", degenerate="loop")
        if strength >= 3:
            return text("Fine.\n\nHuman: and now?", degenerate="role_header")
        if strength >= 2:
            return text("I'm sorry, but I can't help with that.", refusal=True)
        nasty = f" {NASTY[i]}" if i < len(NASTY) else ""
        return text(f"Answer {i} of the steered model at λ = {strength:g}.{nasty}")

    return {
        "start": "tuned" if inverse else "base",
        "target": "base" if inverse else "tuned",
        "sign": -1 if inverse else 1,
        "arm": "v",
        "site": "resid_post.2",
        "strengths": STRENGTHS,
        "source": f"test prompts of a made-up world ({direction})",
        "prompts": [
            {
                "prompt": NASTY[i] if i < len(NASTY) else f"Question {i}: who keeps otter {i}?",
                "reference": None if i % 2 else f"Reference answer {i}.",
                "base": text(f"Plain answer {i}." + (NASTY[i] if i < len(NASTY) else "")),
                "tuned": text(f"I'm sorry, I won't say {i}.", refusal=True)
                if i % 4 == 3
                else text(f"Kind answer {i}, if you please."),
                "steered": [steered(i, strength) for strength in STRENGTHS],
            }
            for i in range(prompts)
        ],
    }


def write_sweep(folder: Path, direction: str, *, texts: bool = True) -> dict[str, Any]:
    """Write the explorer file of a stage into its folder and return its result."""
    if texts:
        write_json(folder / "explorer.json", explorer(direction))
    return sweep(direction)
