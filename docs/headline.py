"""The README's headline table, from the committed results.

    python docs/headline.py            write the block of README.md between its two markers
    python docs/headline.py --check    fail where it is not what the results say

One row a run whose pair was trained in it (``results/*/dpo``), or that has nulls, and one a null.
Stages that were not run, and what is undefined, are –; a null that has no number is told in words.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- headline -->", "<!-- /headline -->"
NONE = "–"
CLAIMS = {
    "shared_shift": "shared shift",
    "low_dimensional": "low-dimensional",
    "constant_suffices": "one constant vector suffices",
    "preference_specific": "preference-specific",
    "reversible": "reversible",
}
COLUMNS = (
    "run",
    "site",
    "held-out cosine",
    "null's 95 %",
    "shared share m",
    "effective rank",
    "k₉₀",
    "KL recovered by λv\\*, first token at final_norm",
    "KL of whole answers recovered by v\\*, best place",
    "reward accuracy",
)


def at(tree: Any, *keys: str) -> Any:
    """What lies under the keys; None where one is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number(value: Any) -> str:
    """Three significant digits; – where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE
    return f"{value:.3g}".replace("-", "−")


def interval(found: Any) -> str:
    """``value [low, high]``; the number alone where it has no ends."""
    told = number(at(found, "value") if isinstance(found, Mapping) else found)
    ends = number(at(found, "low")), number(at(found, "high"))
    return told if NONE in (told, *ends) else f"{told} [{ends[0]}, {ends[1]}]"


class Run:
    """A run's folder, read stage by stage."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def result(self, stage: str) -> Any:
        """A stage's result; None where it was not run."""
        path = self.folder / stage / "result.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def nulls(self) -> Iterator[Run]:
        """The runs of its null pairs, by name."""
        for folder in sorted((self.folder / "nulls").glob("*/")):
            yield Run(folder.name, folder)


def runs(results: Path) -> list[Run]:
    """Runs that trained their pair, or that have nulls."""
    folders = sorted(path.parent for path in results.glob("*/summary.json"))
    return [
        Run(folder.name, folder)
        for folder in folders
        if (folder / "vector" / "result.json").is_file()
        and ((folder / "dpo" / "result.json").is_file() or (folder / "nulls").is_dir())
    ]


def numbers(run: Run, label: str) -> tuple[str, ...]:
    """The cells of one row."""
    cosine, vector = run.result("cosine"), run.result("vector")
    site = at(cosine, "chosen_site")
    measured = at(cosine, "sites", site or "")
    place, recovered = best_place(run)
    return (
        label,
        site or NONE,
        interval(at(measured, "held_out", "mean")),
        number(at(measured, "null", "q95")),
        interval(at(run.result("spectrum"), "sites", site or "", "shared_share")),
        interval(
            at(run.result("spectrum"), "sites", site or "", "delta", "uncentred", "effective_rank")
        ),
        k90(run),
        interval(at(vector, "kl_recovery", "first_token", "recovered_at_chosen")),
        NONE if recovered == NONE else f"{recovered} ({place})",
        interval(at(run.result("dpo"), "test", "reward_accuracy")),
    )


def best_place(run: Run) -> tuple[str, str]:
    """Where v* recovers most KL of answers on tune pairs, and how much it does on test pairs."""
    profile, sweep = run.result("profile"), run.result("interpolation")
    chosen = at(profile, "chosen")
    if chosen:
        site, tokens = chosen["site"], chosen["tokens"]
        return f"{site}, {tokens}", interval(
            at(profile, "sites", site, tokens, "v", "kl_recovered_answers")
        )
    curve = at(sweep, "metrics", "kl_recovered", "curves", "v")
    if not curve or 1.0 not in sweep["strengths"]:
        return NONE, NONE
    found = interval(curve[sweep["strengths"].index(1.0)])
    return f"{sweep['site']}, {sweep['positions']}", found


def k90(run: Run) -> str:
    """Directions of the oracle that recover 90 % of what patching does, of how many."""
    sites = at(run.result("rank"), "sites") or {}
    told = []
    for site, found in sites.items():
        k = number(at(found, "k90", "oracle", "value"))
        place = f"{site}, {at(found, 'tokens')}"
        told.append(f"{k} of {number(at(found, 'width'))} ({place})" if k != NONE else NONE)
    return ", ".join(told) or NONE


def verdicts(run: Run) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The claims' verdicts for the pair and for each null, by label."""
    claims = run.result("claims")
    if claims is None:
        return
    yield f"`{run.name}`", {claim["name"]: claim["verdict"] for claim in claims["claims"]}
    for name in (null.name for null in run.nulls()):
        yield f"{run.name}'s null {name}", at(claims, "pairs", name) or {}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def block(results: Path) -> str:
    """The README's block, without its markers."""
    rows, graded, empty = [], [], []
    for run in runs(results):
        rows.append(numbers(run, f"`{run.name}`"))
        for null in run.nulls():
            label = f"{run.name}'s null {null.name}"
            cells = numbers(null, label)
            if set(cells[1:]) == {NONE}:
                empty.append(label)
            else:
                rows.append(cells)
        graded += [
            (label, *(told.get(name, NONE) for name in CLAIMS)) for label, told in verdicts(run)
        ]
    parts = [
        "The committed runs in numbers (95 % intervals in brackets; site: chosen on tune prompts, "
        "numbers on test prompts):",
        table(COLUMNS, rows),
    ]
    if empty:
        parts.append(f"Nothing to measure in {', '.join(empty)}.")
    if graded:
        parts += [
            "And what may be claimed (the rules and their numbers are in each report):",
            table(("run", *CLAIMS.values()), graded),
        ]
    return "\n\n".join(parts)


def written(readme: str, results: Path) -> str:
    """The README with its block as the results say.

    Raises:
        ValueError: the markers are not there, once each.
    """
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: expected {START} and {END} once each")
    made = f"{START}\n{block(results)}\n{END}"
    return re.sub(f"{START}.*?{END}", lambda _: made, readme, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where it differs")
    asked = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text("utf-8")
    after = written(before, ROOT / "results")
    if asked.check and after != before:
        sys.exit("README.md: the headline table is not what results/ says; run docs/headline.py")
    if not asked.check:
        path.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
