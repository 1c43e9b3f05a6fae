"""The README's headline table is what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "headline.py"


@pytest.fixture(scope="module")
def headline() -> Any:
    spec = importlib.util.spec_from_file_location("headline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(folder: Path, **stages: Any) -> None:
    for stage, result in stages.items():
        (folder / stage).mkdir(parents=True, exist_ok=True)
        (folder / stage / "result.json").write_text(json.dumps(result))


def about(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}


VECTOR = {"kl_recovery": {"first_token": {"recovered_at_chosen": about(0.7)}}}
COSINE = {
    "chosen_site": "resid_post.1",
    "sites": {"resid_post.1": {"held_out": {"mean": about(0.5)}, "null": {"q95": 0.25}}},
}


def test_the_readme_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_numbers_of_a_run_and_of_its_nulls(headline: Any, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    put(
        run,
        vector=VECTOR,
        cosine=COSINE,
        dpo={"test": {"reward_accuracy": about(0.8)}},
        spectrum={
            "sites": {
                "resid_post.1": {
                    "shared_share": about(0.4),
                    "delta": {"uncentred": {"effective_rank": about(12.3)}},
                }
            }
        },
        profile={
            "chosen": {"site": "resid_post.0", "tokens": "all"},
            "sites": {"resid_post.0": {"all": {"v": {"kl_recovered_answers": about(-0.25)}}}},
        },
        rank={
            "sites": {
                "resid_post.0": {"width": 64, "tokens": "all", "k90": {"oracle": {"value": 3}}}
            }
        },
        claims={
            "claims": [{"name": "shared_shift", "verdict": "supported"}],
            "pairs": {"mine": {}, "coin_flip": {"shared_shift": "not supported"}},
        },
    )
    (run / "summary.json").write_text("{}")
    put(run / "nulls" / "coin_flip", cosine=COSINE, vector={})
    found = headline.block(tmp_path).splitlines()
    assert (
        "| `mine` | resid_post.1 | 0.5 [0.4, 0.6] | 0.25 | 0.4 [0.3, 0.5] | 12.3 [12.2, 12.4] "
        "| 3 of 64 (resid_post.0, all) | 0.7 [0.6, 0.8] | −0.25 [−0.35, −0.15] (resid_post.0, all) "
        "| 0.8 [0.7, 0.9] |"
    ) in found
    assert (
        "| mine's null coin_flip | resid_post.1 | 0.5 [0.4, 0.6] | 0.25 | – | – | – | – | – | – |"
    ) in found
    assert "| `mine` | supported | – | – | – | – |" in found
    assert "| mine's null coin_flip | not supported | – | – | – | – |" in found


def test_only_trained_pairs_and_undefined_is_no_number(headline: Any, tmp_path: Path) -> None:
    for name in ("compared", "control", "trained"):
        put(tmp_path / name, cosine={"chosen_site": None, "sites": {}})
        (tmp_path / name / "summary.json").write_text("{}")
    put(tmp_path / "compared", vector=VECTOR)  # models that existed: no dpo, no nulls
    put(tmp_path / "trained", vector={"kl_recovery": None}, dpo={"test": {}})
    found = headline.block(tmp_path)
    assert "compared" not in found
    assert "control" not in found
    assert "| `trained` | – | – | – | – | – | – | – | – | – |" in found
    assert "claimed" not in found  # no stage claims, no second table
    put(tmp_path / "trained" / "nulls" / "self", vector={"kl_recovery": None})
    found = headline.block(tmp_path)
    assert "| trained's null self" not in found
    assert "Nothing to measure in trained's null self." in found


def test_a_block_that_differs_is_found(headline: Any, tmp_path: Path) -> None:
    readme = f"before\n{headline.START}\nold\n{headline.END}\nafter\n"
    made = headline.written(readme, tmp_path)
    assert made != readme
    assert made.startswith(f"before\n{headline.START}\nThe committed runs")
    assert made.endswith(f"{headline.END}\nafter\n")
    assert headline.written(made, tmp_path) == made
    with pytest.raises(ValueError, match="once each"):
        headline.written("no block", tmp_path)
