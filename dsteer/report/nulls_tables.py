"""The null beside the pair: one table a stage, of the stage's main numbers in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsteer.report.sweep_values import nearest
from dsteer.report.tables import Column, Results, Table, recovered_at
from dsteer.report.values import at, estimate, interval, items, mapping, plain
from dsteer.store import Json, read_json

LABELS = {
    "pair": "the pair",
    "coin_flip": "coin-flip labels",
    "swapped": "swapped labels",
    "sft": "SFT on chosen",
    "second_seed": "second seed",
    "lora": "LoRA",
    "self": "base against itself",
}
"""What known nulls are called."""


@dataclass(frozen=True)
class Compared:
    """The pair, or one of its nulls."""

    name: str
    folder: Path
    results: Results
    tokens: str | None = None
    """Those that the pair's profile chose: curves of all runs are of the same ones."""

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return LABELS.get(self.name, self.name)


@dataclass(frozen=True)
class Number:
    """One number of a stage: its column, and where it stands in the result."""

    title: str
    meaning: str
    read: Callable[[dict[str, Json]], Json]


def results_of(run: Path) -> Results:
    """The results in a run folder that its manifest counts as up to date."""
    manifest = run / "manifest.json"
    recorded = at(read_json(manifest), "stages") if manifest.is_file() else None
    return {
        path.parent.name: mapping(read_json(path))
        for path in sorted(run.glob("*/result.json"))
        if recorded is None or path.parent.name in recorded
    }


def compared(run: Path, names: Sequence[str], own: Results | None = None) -> list[Compared]:
    """The pair and, in order, its nulls of these names that have any result."""
    read = results_of(run) if own is None else own
    tokens = at(read.get("profile"), "chosen", "tokens")
    runs = [Compared("pair", run, read, tokens)]
    for name in names:
        folder = run / "nulls" / name
        if found := results_of(folder):
            runs.append(Compared(name, folder, found, tokens))
    return runs


def null_tables(runs: Sequence[Compared], stage: str) -> list[Table]:
    """`Beside its nulls`: the pair and each null that has the stage; none without such a null."""
    numbers = NUMBERS.get(stage, ())
    shown = [each for each in runs if stage in each.results]
    if not numbers or len(shown) < 2 or shown[0].name != "pair":
        return []
    values = [[_cell(number.read(each.results[stage])) for number in numbers] for each in shown]
    return [
        Table(
            f"nulls-{stage}",
            "Beside its nulls: the same measured on pairs that differ from this one in one thing.",
            [Column("pair", text=True), *(Column(n.title, n.meaning) for n in numbers)],
            [[each.label, *cells] for each, cells in zip(shown, values, strict=True)],
        )
    ]


def shown(value: Json) -> str:
    """A number or an interval; whole ones, such as counts of directions, without decimals."""
    found = estimate(value)
    parts = [part for part in found if part is not None]
    if found.value is None or not all(part.is_integer() for part in parts):
        return interval(value)
    return (
        f"{found.value:g} [{found.low:g}, {found.high:g}]" if len(parts) == 3 else f"{parts[0]:g}"
    )


def _cell(value: Json) -> str:
    measured = isinstance(value, dict | int | float) and not isinstance(value, bool)
    return shown(value) if measured else plain(value)


# ---------------------------------------------------------------------------------- what is told


def place(profile: Json) -> Json:
    """What a profile measured at the place that it chose."""
    site, tokens = (str(at(profile, "chosen", key)) for key in ("site", "tokens"))
    return at(profile, "sites", site, tokens)


def first_site(result: Json) -> Json:
    """What `rank`, `maps` or `strength` measured at the first of its sites."""
    return next(iter(mapping(at(result, "sites")).values()), None)


def _chosen(*keys: str) -> Callable[[dict[str, Json]], Json]:
    """At the site that a cosine stage chose."""
    return lambda result: at(result, "sites", str(at(result, "chosen_site")), *keys)


def _spectral(*keys: str) -> Callable[[dict[str, Json]], Json]:
    return lambda result: at(result, "sites", str(at(result, "headline", "site")), *keys)


def _profile(*keys: str) -> Callable[[dict[str, Json]], Json]:
    return lambda result: at(place(result), *keys)


def _first(*keys: str | int) -> Callable[[dict[str, Json]], Json]:
    return lambda result: at(first_site(result), *keys)


def _at(*keys: str) -> Callable[[dict[str, Json]], Json]:
    return lambda result: at(result, *keys)


def _site(result: dict[str, Json]) -> Json:
    return next(iter(mapping(result.get("sites"))), None)


def _recovered(panel: str) -> Callable[[dict[str, Json]], Json]:
    def read(result: dict[str, Json]) -> Json:
        found = at(result, "kl_recovery", panel)
        return None if found is None else recovered_at(found, 1.0)

    return read


def _steered(metric: str) -> Callable[[dict[str, Json]], Json]:
    """A sweep's metric under v* at the strength nearest to 1."""

    def read(result: dict[str, Json]) -> Json:
        i = nearest(result, 1.0)
        return None if i is None else at(result, "metrics", metric, "curves", "v", i)

    return read


def _map_kl(name: str) -> Callable[[dict[str, Json]], Json]:
    def read(result: dict[str, Json]) -> Json:
        return at(next(iter(mapping(at(result, "kl")).values()), None), "recovered", name)

    return read


def _map_r2(name: str) -> Callable[[dict[str, Json]], Json]:
    def read(result: dict[str, Json]) -> Json:
        site = next(iter(mapping(at(result, "kl"))), None) or _site(result)
        return at(result, "sites", str(site), "r2", name)

    return read


_SWEEP = (
    Number("site", "chosen on tune", _at("site")),
    Number("KL recovered", "share, under v* at λ = 1", _steered("kl_recovered")),
    Number("reward margin", "under v* at λ = 1", _steered("reward_margin")),
    Number("preference", "share of pairs with r(chosen) > r(rejected), λ = 1",
           _steered("preference_match")),
    Number("λ-equivalent, margin", "λ at which the margin meets the target model's",
           _at("metrics", "reward_margin", "crossing", "strength")),
)  # fmt: skip

NUMBERS: dict[str, tuple[Number, ...]] = {
    "dpo": (
        Number("accuracy", "share of test pairs with r(chosen) > r(rejected)",
               _at("test", "reward_accuracy")),
        Number("margin", "mean r(chosen) − r(rejected)", _at("test", "reward_margin")),
        Number("KL to base", "nats a token", _at("kl_to_base")),
        Number("learned", "by the stage's own rule", _at("learned")),
    ),
    "vector": (
        Number("‖v*‖ / ‖h‖", "norm of v* over that of the base's states",
               _at("headline", "relative_norm")),
        Number("KL recovered, first", "at final_norm, λ = 1, first token",
               _recovered("first_token")),
        Number("KL recovered, answer", "at final_norm, λ = 1, answer tokens",
               _recovered("response")),
    ),
    "cosine": (
        Number("site", "chosen on tune", _at("chosen_site")),
        Number("held-out cosine", "mean on test prompts", _chosen("held_out", "mean")),
        Number("its null", "95 % quantile with random signs", _chosen("null", "q95")),
        Number("p", "of that null, one site", _chosen("null", "p")),
        Number("m", "shared share on test prompts", _chosen("shared_share_test")),
    ),
    "spectrum": (
        Number("site", "that the stage tells of", _at("headline", "site")),
        Number("m", "shared share", _spectral("shared_share")),
        Number("m, debiased", "without each prompt's own part", _spectral("shared_share_debiased")),
        Number("σ₂/σ₁", "uncentred", _spectral("delta", "uncentred", "sigma_ratio")),
        Number("entropy", "of ΔH, nats", _spectral("delta", "uncentred", "entropy")),
        Number("effective rank", "of ΔH", _spectral("delta", "uncentred", "effective_rank")),
    ),
    "profile": (
        Number("site", "chosen on tune", _at("chosen", "site")),
        Number("tokens", "whose states are changed", _at("chosen", "tokens")),
        Number("KL, v*", "share recovered by v*, of the first answer token with prompt_last",
               _profile("v", "kl_recovered")),
        Number("KL of answers, v*", "share of all answer tokens", _profile("v",
               "kl_recovered_answers")),
        Number("KL, patched", "by the tuned states", _profile("patched", "kl_recovered")),
        Number("efficiency", "v* over patched", _profile("efficiency")),
        Number("margin, v*", "reward margin under v*", _profile("v", "reward_margin")),
        Number("margin, random", "the most of random directions",
               _profile("random", "reward_margin", "high")),
    ),
    "rank": (
        Number("site", "the first measured", _site),
        Number("k₅₀", "directions for half of the KL", _first("k50", "oracle")),
        Number("k₉₀", "for 90 %", _first("k90", "oracle")),
        Number("k₉₀, deployable", "fitted without the test states", _first("k90", "deployable")),
        Number("k₉₀, random", "of random subspaces", _first("k90", "random")),
    ),
    "maps": (
        Number("R², scale", "held-out share of the displacement", _map_r2("scale")),
        Number("R², translation", "", _map_r2("translation")),
        Number("R², low rank", "", _map_r2("low_rank")),
        Number("R², ridge", "", _map_r2("ridge")),
        Number("KL, translation", "share recovered", _map_kl("translation")),
        Number("KL, ridge", "share recovered", _map_kl("ridge")),
    ),
    "strength": (
        Number("site", "the first measured", _site),
        Number("λ, least squares", "", _first("least_squares")),
        Number("λ, KL", "of least KL on tune", _first("kl_optimal")),
        Number("KL at 1", "share recovered", _first("recovered", "one")),
        Number("KL at its λ", "share recovered", _first("recovered", "kl_optimal")),
        Number("regret at 1", "", _first("regret", "one")),
        Number("regret, constant", "of one λ for all", _first("regret", "constant")),
    ),
    "interpolation": _SWEEP,
    "inversion": _SWEEP,
}  # fmt: skip
"""Stage → the numbers that its table shows beside the nulls'."""


def null_names(run: Path, manifest: dict[str, Json]) -> list[str]:
    """The nulls of a run: as its claims graded them, else as its config names them."""
    path = run / "claims" / "result.json"
    graded = at(read_json(path), "nulls") if path.is_file() else None
    if graded is not None:
        return [str(at(null, "name")) for null in items(graded)]
    return list(mapping(at(manifest, "config", "nulls")))
