"""The causal profile in the report: figure, tables, sentences, section."""

from __future__ import annotations

import copy
from pathlib import Path

from fabricate import edited, fabricate
from fabricate_profile import SITES, about, profile_result

from dsteer.report.figures import draw_result
from dsteer.report.html import write_report
from dsteer.report.profile_figures import layer_profile
from dsteer.report.profile_tables import profile_sentences, profile_tables
from dsteer.report.style import styled
from dsteer.store import write_json


def test_the_figure_shows_every_number() -> None:
    result = profile_result()
    with styled():
        drawing = layer_profile(result, Path())
    assert drawing is not None
    assert drawing.data["sites"] == list(SITES)
    panel = drawing.data["tokens"]["all"]
    for metric in ("kl_recovered", "reward_margin"):
        for kind in ("patched", "v", "v_here", "random"):
            rows = [result["sites"][site]["all"][kind] for site in SITES]
            assert panel[metric][kind] == [row and row[metric] for row in rows]
    assert layer_profile({**result, "sites": {}}, Path()) is None


def test_tables() -> None:
    tables = profile_tables(profile_result())
    assert [table.key for table in tables] == ["profile-prompt-last", "profile-all"]
    first, *_, last = tables[1].rows
    assert [row[0] for row in tables[1].rows] == list(SITES)
    assert first[4] == "–"
    assert last[1].startswith("1.20")
    assert last[4] == "\N{MINUS SIGN}0.0500 [\N{MINUS SIGN}0.200, 0.0200]"
    assert last[5].startswith("0.500")
    assert last[6].startswith("0.600")
    assert profile_tables(None) == []


def test_sentences() -> None:
    result = profile_result()
    said = profile_sentences(result)
    assert said[0].startswith("v* recovers most at resid_post.3, on all tokens")
    assert "0.450" in said[0]
    assert "v* over patched: 0.500" in said[0]
    assert "0.0200" in said[-1]
    assert len(profile_sentences({**result, "readout_share": None})) == len(said) - 1
    result["chosen"]["tokens"] = "prompt_last"
    result["sites"]["resid_post.3"]["all"]["efficiency_here"] = about(0.123)
    assert any("an efficiency of 0.123" in sentence for sentence in profile_sentences(result))
    assert profile_sentences({**result, "chosen": None}) == []


def test_section(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=("data", "activations"))
    result = profile_result()
    write_json(run / "profile" / "result.json", result)
    with edited(run / "manifest.json") as manifest:
        manifest["stages"]["profile"] = copy.deepcopy(manifest["stages"]["data"])
    html = write_report(run).read_text(encoding="utf-8")
    assert 'href="profile/figures/profile.pdf"' in html
    assert "v* recovers most at resid_post.3" in html
    assert [path.name for path in draw_result("profile", result, run / "profile")] == [
        f"profile.{s}" for s in ("pdf", "png", "json")
    ]
