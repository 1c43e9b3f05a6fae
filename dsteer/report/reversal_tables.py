"""The table and the sentences of the ``reversal`` stage."""

from __future__ import annotations

from dsteer.report.tables import Column, Table
from dsteer.report.values import DASH, at, count, interval, mapping, number, percent, point, real
from dsteer.store import Json

WAYS = {
    "tuned": "tuned model, as it is",
    "inversion": "tuned − λv*",
    "dpo_swapped": "DPO, labels swapped",
    "sft_rejected": "SFT, rejected answers",
}

METRICS = {
    "reward_margin": ("reward margin", "mean β [Δ ln π(chosen) − Δ ln π(rejected)], Δ to the base"),
    "accuracy": ("accuracy", "share of margins above 0, a tie ½; the base has ½"),
    "way_back": ("way back", "share of the tuned margin that is gone; above 1: past the base"),
    "kl_to_base": ("KL(base‖·)", "nats a token of the chosen answers"),
    "kl_to_tuned": ("KL(tuned‖·)", "nats a token of the chosen answers"),
    "recovered": ("R", "1 − Σ KL(base‖·) / Σ KL(base‖tuned), chosen answers"),
    "recovered_rejected": ("R, rejected", "the same on the rejected answers"),
}  # fmt: skip


def reversal_tables(result: Json) -> list[Table]:
    """What each way reached, what it cost and whether it can be taken back."""
    ways = mapping(at(result, "ways"))
    columns = [
        Column("way", text=True),
        *(Column(words, meaning) for words, meaning in METRICS.values()),
        Column("steps", "of an optimiser"),
        Column("time, s", "on the machine of this run: training, or choosing λ, with the reading"),
        Column("λ", "chosen on tune; –: no strength can be set"),
        Column("taken back", "by adding λv* again: rounding, over the largest state; by training: "
               "only with the old weights, whose distance is told in lengths of tuned − base",
               text=True),
    ]  # fmt: skip
    rows = [
        [
            WAYS.get(way, way),
            *(interval(at(found, key)) for key in METRICS),
            count(at(found, "optimiser_steps")),
            number(real(at(result, "seconds", way))),
            number(real(at(found, "strength"))),
            _undoing(at(found, "undoing")),
        ]
        for way, found in ways.items()
    ]
    return [Table("reversal-ways", "Three ways to undo the tuning.", columns, rows)] if rows else []


def _undoing(undoing: Json) -> str:
    if undoing is None:
        return DASH
    if "rounding" in undoing:
        return f"exact to {number(real(undoing['rounding']))}"
    return (
        f"old weights, {number(real(undoing['distance_to_tuned']))} away; "
        f"{percent(real(undoing['changed_share']))} changed"
    )


def reversal_sentences(result: Json) -> list[str]:
    """How far each way came back, for the first page."""
    said = []
    for way, found in mapping(at(result, "ways")).items():
        if way == "tuned" or point(at(found, "recovered")) is None:
            continue
        said.append(
            f"{WAYS.get(way, way)}: R = {interval(at(found, 'recovered'))} of the way back to the "
            f"base in KL, and {interval(at(found, 'way_back'))} of the reward margin is gone, "
            f"after {count(at(found, 'optimiser_steps'))} optimiser steps."
        )
    return said
