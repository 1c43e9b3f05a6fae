"""Figures from made-up artifacts: what is plotted, what is not, and the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from fabricate import STAGES, edited, fabricate

from dsteer.errors import StoreError
from dsteer.report.figures import FIGURES, draw, draw_result, fig3_cosine, fig4a_entropy
from dsteer.report.style import styled
from dsteer.report.values import point
from dsteer.store import read_json, read_tensors, write_tensors

MEASURING = ("vector", "cosine", "spectrum")


def figure_json(run: Path, stage: str, name: str) -> Any:
    return json.loads((run / stage / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("figures/*"))
    }


def test_every_figure_as_pdf_png_and_json(drawn_run: Path) -> None:
    for stage in set(FIGURES) & set(STAGES):
        figures, folder = FIGURES[stage], drawn_run / stage / "figures"
        names = {f"{name}.{suffix}" for name in figures for suffix in ("pdf", "png", "json")}
        assert {path.name for path in folder.iterdir()} == names
        for name in figures:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
            assert figure_json(drawn_run, stage, name)["caption"].endswith(".")


def test_no_dates_in_the_files(drawn_run: Path) -> None:
    for path in drawn_run.glob("*/figures/*"):
        content = path.read_bytes()
        assert b"CreationDate" not in content
        assert b"Software" not in content


@pytest.mark.parametrize("stage", ["dpo", "cosine", "spectrum"])
def test_same_input_gives_same_bytes(drawn_run: Path, tmp_path: Path, stage: str) -> None:
    copy = tmp_path / stage
    shutil.copytree(drawn_run / stage, copy, ignore=shutil.ignore_patterns("figures"))
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):  # a user's matplotlibrc
        written = draw_result(stage, read_json(copy / "result.json"), copy)
    assert len(written) == 3 * len(FIGURES[stage])
    assert hashes(copy) == hashes(drawn_run / stage)


def test_needs_neither_torch_nor_pyplot(drawn_run: Path, tmp_path: Path) -> None:
    """In a process of its own, with another hash seed: same bytes, and no heavy import."""
    copy = tmp_path / "vector"
    shutil.copytree(drawn_run / "vector", copy, ignore=shutil.ignore_patterns("figures"))
    code = (
        "import sys; from pathlib import Path; from dsteer.report.figures import draw;"
        f"draw('vector', Path({str(copy)!r}));"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'matplotlib.pyplot'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
    assert hashes(copy) == hashes(drawn_run / "vector")


SHAPES: dict[str, dict[str, Any]] = {
    "one block": {"blocks": 1},
    "33 sites": {"blocks": 32, "undefined": {0, 1, 7}, "width": 64},
    "final_norm alone": {"blocks": 0},
    "no final_norm": {"norm": False, "blocks": 3},
    "few prompts": {"n_fit": 4, "n_test": 2},
    "no response": {"response": False},
    "all undefined": {"all_undefined": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_run(tmp_path: Path, shape: str) -> None:
    """Warnings are errors, so a layout that collapses or an empty slice would fail here."""
    run = fabricate(tmp_path / "run", stages=MEASURING, **({"n_fit": 60} | SHAPES[shape]))
    drawn: dict[str, Any] = {}
    for stage in MEASURING:
        result = read_json(run / stage / "result.json")
        for name, function in FIGURES[stage].items():
            with styled():
                drawing = function(result, run / stage)
                if drawing is not None:
                    drawing.figure.draw_without_rendering()
                    drawn[name] = drawing.data
    entropies = drawn["fig4a_entropy"]["entropy"]["uncentred"]["delta"]
    assert list(entropies) == list(result["sites"])
    if shape == "all undefined":
        assert {value["value"] for value in entropies.values()} == {None}
    if shape == "no response":
        assert list(drawn["kl_recovery"]["panels"]) == ["first_token"]
    assert ("kl_recovery" in drawn) == (shape != "no final_norm")


# ---------------------------------------------------------------------------------- content


def test_fig3_counts_every_prompt_once(drawn_run: Path) -> None:
    drawn = figure_json(drawn_run, "cosine", "fig3_cosine")
    tensors = read_tensors(drawn_run / "cosine" / "cosines.safetensors")
    edges = np.array(drawn["bin_edges"])
    assert edges[-1] == 1.0
    for site, kinds in drawn["distributions"].items():
        for kind, histogram in kinds.items():
            values = tensors[f"{site}/{kind}"]
            assert histogram["n"] == len(values)
            assert math.isclose(sum(histogram["share"]), 1.0, abs_tol=1e-12)
            inside = (values >= edges[3]) & (values < edges[4])
            assert math.isclose(histogram["share"][3], inside.mean(), abs_tol=1e-12)


def test_fig3_keeps_cosines_that_rounding_put_beyond_one(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=("cosine",), n_fit=40, n_test=20)
    path = run / "cosine" / "cosines.safetensors"
    tensors = read_tensors(path)
    tensors["final_norm/held_out"][:5] = 1 + 2e-16
    tensors["final_norm/held_out"][5] = np.nan  # a prompt whose displacement is zero
    write_tensors(path, tensors)
    draw("cosine", run / "cosine")
    held_out = figure_json(run, "cosine", "fig3_cosine")["distributions"]["final_norm"]["held_out"]
    assert held_out["n"] == 19
    assert held_out["share"][-1] >= 5 / 19


def test_fig3_holds_the_means_of_the_result(drawn_run: Path) -> None:
    drawn = figure_json(drawn_run, "cosine", "fig3_cosine")["sites"]
    result = read_json(drawn_run / "cosine" / "result.json")["sites"]
    for site, values in drawn.items():
        for bound in ("value", "low", "high"):
            assert values["held_out_mean"][bound] == result[site]["held_out"]["mean"][bound]
    assert drawn["resid_post.0"]["undefined"] is True
    assert drawn["resid_post.0"]["held_out_mean"]["value"] is None


def test_undefined_is_never_drawn_as_a_number(drawn_run: Path) -> None:
    """Block 0 has Δ = 0: its place in every curve is a gap, hatched and named."""
    for function, stage, series in ((fig3_cosine, "cosine", 3), (fig4a_entropy, "spectrum", 1)):
        folder = drawn_run / stage
        with styled():
            drawing = function(read_json(folder / "result.json"), folder)
        assert drawing is not None
        curves = [
            line
            for axes in drawing.figure.axes
            for line in axes.lines
            if axes.get_xlabel().startswith("block") and len(line.get_xdata()) == 4
        ]
        gaps = [line for line in curves if np.isnan(np.asarray(line.get_ydata(), float)[0])]
        assert len(gaps) >= series
        zeros = [line for line in curves if np.any(np.asarray(line.get_ydata(), float) == 0)]
        assert not zeros
        words = [text.get_text() for axes in drawing.figure.axes for text in axes.texts]
        assert any("undefined: Δ = 0" in text for text in words)


def test_final_norm_is_never_joined_to_the_blocks(drawn_run: Path) -> None:
    folder = drawn_run / "spectrum"
    with styled():
        drawing = fig4a_entropy(read_json(folder / "result.json"), folder)
    assert drawing is not None
    blocks, apart = drawing.figure.axes[0], drawing.figure.axes[1]
    assert [label.get_text() for label in apart.get_xticklabels()] == ["final_norm"]
    assert max(np.max(line.get_xdata()) for line in blocks.lines) == 3
    # One point a series and an error bar each: nothing in the narrow axes is a curve.
    assert all(len(line.get_xdata()) <= 2 for line in apart.lines)


def test_an_encoder_is_joined_to_nothing(drawn_run: Path) -> None:
    folder = drawn_run / "spectrum"
    result = read_json(folder / "result.json")
    result["sites"]["encoder"] = result["sites"]["final_norm"]
    with styled():
        drawing = fig4a_entropy(result, folder)
    assert drawing is not None
    for axes, name in zip(drawing.figure.axes[1:3], ("encoder", "final_norm"), strict=True):
        assert [label.get_text() for label in axes.get_xticklabels()] == [name]
        assert all(len(line.get_xdata()) <= 2 for line in axes.lines)
    assert "encoder and final_norm stand apart." in drawing.data["caption"]


def test_fig4_numbers_are_those_of_the_result(drawn_run: Path) -> None:
    result = read_json(drawn_run / "spectrum" / "result.json")["sites"]
    entropy = figure_json(drawn_run, "spectrum", "fig4a_entropy")["entropy"]
    top = figure_json(drawn_run, "spectrum", "fig4b_singular_values")["top"]
    for centring in ("uncentred", "centred"):
        for matrix in ("base", "tuned", "delta"):
            for site, row in result.items():
                measured = row[matrix][centring]
                assert entropy[centring][matrix][site]["value"] == point(measured["entropy"])
                assert top[centring][matrix][site] == measured["top"]


def test_kl_recovery_marks_what_lies_below_the_scale(drawn_run: Path) -> None:
    panels = figure_json(drawn_run, "vector", "kl_recovery")["panels"]
    for panel in panels.values():
        below = [
            strength
            for strength, share in zip(panel["strengths"], panel["recovered"], strict=True)
            if share["value"] < -1
        ]
        assert panel["off_scale_strengths"] == below
    assert panels["first_token"]["off_scale_strengths"]


def test_learning_curve_of_dpo_has_the_chance_lines(drawn_run: Path) -> None:
    drawn = figure_json(drawn_run, "dpo", "learning_curve")["panels"]
    assert math.isclose(drawn["loss"]["reference"], 0.6931471805599453)
    assert drawn["reward_accuracy"]["reference"] == 0.5
    result = read_json(drawn_run / "dpo" / "result.json")
    losses = [point["loss"] for point in result["curve"]["train"]]
    assert drawn["loss"]["train"]["loss"] == losses


def test_stage_without_figures(tmp_path: Path) -> None:
    assert draw_result("data", {"headline": {}}, tmp_path) == []


def test_missing_sections_of_a_result_draw_nothing(tmp_path: Path) -> None:
    for stage in FIGURES:
        assert draw_result(stage, {"headline": {}, "notes": []}, tmp_path) == []


def test_missing_tensors_are_said(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=("cosine",), n_fit=20, n_test=10)
    (run / "cosine" / "cosines.safetensors").unlink()
    with pytest.raises(StoreError, match=r"cosines\.safetensors: no such file"):
        draw("cosine", run / "cosine")


def test_a_result_without_intervals(tmp_path: Path) -> None:
    """Bounds may be undefined where a bootstrap was: the number alone is drawn."""
    run = fabricate(tmp_path / "run", stages=("cosine",), n_fit=20, n_test=10)
    with edited(run / "cosine" / "result.json") as result:
        for site in result["sites"].values():
            site["held_out"]["mean"] = {"value": 0.5, "low": None, "high": None}
    draw("cosine", run / "cosine")
    drawn = figure_json(run, "cosine", "fig3_cosine")["sites"]["final_norm"]["held_out_mean"]
    assert drawn == {"value": 0.5, "low": None, "high": None}
