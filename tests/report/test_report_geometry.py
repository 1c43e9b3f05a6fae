"""Figures 1a to 1c and the geometry tables, from made-up artifacts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricate import edited
from fabricate_geometry import write_geometry

from dsteer.report.figures import FIGURES, draw
from dsteer.report.style import styled
from dsteer.report.tables import STAGE_TABLES
from dsteer.store import read_json, read_tensors, write_json, write_tensors

NAMES = ("fig1a_preference_geometry", "fig1b_gradients", "fig1c_clouds")


def states(blocks: int = 3, norm: bool = True, undefined: tuple[int, ...] = ()) -> tuple:
    random = np.random.default_rng(5)
    sites = [f"resid_post.{k}" for k in range(blocks)] + ["final_norm"] * norm
    base = {site: random.normal(size=(70, 12)) * np.linspace(3, 1, 12) for site in sites}
    delta = {
        site: (random.normal(size=12) + 0.3 * random.normal(size=(70, 12))) * (k not in undefined)
        for k, site in enumerate(sites)
    }
    return base, delta


def folder_of(tmp_path: Path, *, shape: dict[str, Any] | None = None, **given: Any) -> Path:
    folder = tmp_path / "geometry"
    folder.mkdir()
    base, delta = states(**(shape or {}))
    write_json(folder / "result.json", write_geometry(folder, base, delta, 50, **given))
    return folder


def drawn(folder: Path, name: str) -> Any:
    return json.loads((folder / "figures" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With figures. Not to be changed."""
    made = folder_of(tmp_path_factory.mktemp("geometry"))
    draw("geometry", made)
    return made


def test_1a_holds_the_margin_change_of_every_pair(folder: Path) -> None:
    found, tensors = drawn(folder, NAMES[0]), read_tensors(folder / "geometry.safetensors")
    result = read_json(folder / "result.json")["preference"]
    change = tensors["margin/tuned"] - tensors["margin/base"]
    counts, _ = np.histogram(change, found["bin_edges"])
    assert found["share"] == pytest.approx(counts / 40)
    assert sum(found["share"]) == pytest.approx(1)
    assert found["margin_change"]["value"] == result["margin_change"]["value"]
    assert found["margin_change_v"]["value"] == result["margin_change_v"]["value"]
    sketch = found["sketch"]
    assert len(sketch["drawn"]) == 24
    np.testing.assert_allclose(sketch["n_base"], tensors["sketch/base"][sketch["drawn"]])
    np.testing.assert_allclose(sketch["n_tuned"], tensors["sketch/tuned"][sketch["drawn"]])
    assert sketch["v"] == tensors["sketch/v"].tolist()
    # e_w − e_l is drawn as long as v*, and the caption says so
    size = sketch["preference_scale"] * np.linalg.norm(sketch["preference"])
    assert size == pytest.approx(np.linalg.norm(sketch["v"]))
    assert "drawn as long as v* is" in found["caption"]


def test_1b_counts_every_couple_once_and_prints_the_means(folder: Path) -> None:
    found, tensors = drawn(folder, NAMES[1]), read_tensors(folder / "geometry.safetensors")
    sites = read_json(folder / "result.json")["gradients"]["policies"]["base"]["sites"]
    assert list(found["pairwise"]) == ["resid_post.1", "resid_post.2", "final_norm"]
    for site, measured in found["pairwise"].items():
        assert measured["n"] == 40 * 39 / 2
        assert sum(measured["share"]) == pytest.approx(1)
        assert measured["mean"]["value"] == sites[site]["sequence"]["pairwise_cosine"]["value"]
    assert sum(found["random"]["share"]) == pytest.approx(1)
    lattice = found["lattice"]
    assert found["lattice_site"] == "final_norm"
    assert sorted(lattice["order"]) == list(range(40))
    plane = tensors["gradient/base/final_norm/plane"]
    np.testing.assert_allclose(lattice["plane"], plane[lattice["order"]])
    assert max(np.linalg.norm(plane, axis=1)) <= lattice["circle"] <= 1
    to_v = tensors["gradient/base/final_norm/cosine_v"]
    assert lattice["cosine_v"] == to_v[lattice["order"]].tolist()


def test_1c_draws_the_clouds_where_they_are(folder: Path) -> None:
    found, tensors = drawn(folder, NAMES[2])["sites"], read_tensors(folder / "geometry.safetensors")
    result = read_json(folder / "result.json")["clouds"]
    for site, panel in found.items():
        assert panel["explained"] == result[site]["explained"]
        assert list(panel["clouds"]) == ["base", "tuned_minus", "tuned", "base_plus"]
        for name, cloud in panel["clouds"].items():
            rows = tensors[f"cloud/{site}/{name}"]
            np.testing.assert_allclose(cloud["points"], rows)
            np.testing.assert_allclose(cloud["centre"], rows.mean(0))


def test_series_differ_by_more_than_colour(folder: Path) -> None:
    result = read_json(folder / "result.json")
    with styled():
        gradients = FIGURES["geometry"][NAMES[1]](result, folder)
        clouds = FIGURES["geometry"][NAMES[2]](result, folder)
    assert gradients is not None
    assert clouds is not None
    (legend,) = [axes.get_legend() for axes in gradients.figure.axes if axes.get_legend()]
    assert len({line.get_linestyle() for line in legend.get_lines()}) == 3
    shapes = {
        scatter.get_paths()[0].vertices.tobytes() for scatter in clouds.figure.axes[0].collections
    }
    assert len(shapes) == 4


def test_a_zero_vector_is_said_and_not_drawn(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, shape={"undefined": (1,)})
    draw("geometry", folder)
    found = drawn(folder, NAMES[2])
    assert list(found["sites"]["resid_post.1"]["clouds"]) == ["base", "tuned"]
    assert "No steered cloud, because v* = 0, at resid_post.1." in found["caption"]
    clouds = STAGE_TABLES["geometry"](read_json(folder / "result.json"))[2]
    assert clouds.rows[0][0] == "resid_post.1"
    assert clouds.rows[0][4:6] == ["undefined", "undefined"]


def test_without_v_there_is_no_arrow_and_no_colour_of_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    tensors = read_tensors(folder / "geometry.safetensors")
    for name in [name for name in tensors if name.endswith(("cosine_v", "sketch/v"))]:
        del tensors[name]
    write_tensors(folder / "geometry.safetensors", tensors)
    with edited(folder / "result.json") as result:
        result["preference"]["margin_change_v"] = None
        for policy in result["gradients"]["policies"].values():
            for site in policy["sites"].values():
                site["sequence"]["cosine_v"] = site["context"]["cosine_v"] = None
    draw("geometry", folder)
    sketch, lattice = drawn(folder, NAMES[0]), drawn(folder, NAMES[1])["lattice"]
    assert "v" not in sketch["sketch"]
    assert "v* is zero, or was not read, at final_norm." in sketch["caption"]
    assert lattice["cosine_v"] is None


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ({"blocks": 1}, {}),
        ({"blocks": 0}, {}),
        ({"norm": False}, {}),
        ({}, {"pairs": 1}),
        ({}, {"pairs": 2}),
        ({}, {"pairs": 150}),
    ],
)
def test_every_shape_of_run(tmp_path: Path, shape: dict[str, Any], given: dict[str, Any]) -> None:
    folder = folder_of(tmp_path, shape=shape, **given)
    draw("geometry", folder)
    for name in NAMES:
        assert drawn(folder, name)["caption"].endswith(".")
    if given.get("pairs") == 1:  # one pair has no other to agree with
        site = drawn(folder, NAMES[1])["pairwise"]["final_norm"]
        assert site["mean"]["value"] is None
        assert "share" not in site


def test_prompts_alone_give_only_the_clouds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, answers=False)
    draw("geometry", folder)
    assert {path.stem for path in (folder / "figures").iterdir()} == {NAMES[2]}
    tables = STAGE_TABLES["geometry"](read_json(folder / "result.json"))
    assert [table.key for table in tables] == ["geometry-clouds"]


def test_tables_hold_the_results_numbers(folder: Path) -> None:
    result = read_json(folder / "result.json")
    preference, gradients, clouds = STAGE_TABLES["geometry"](result)
    for table in (preference, gradients, clouds):
        assert all(len(row) == len(table.columns) for row in table.rows)
    values = {row[0]: row[1] for row in preference.rows}
    change = result["preference"]["margin_change"]["value"]
    printed = float(re.match(r"[\d.]+", values["margin change"])[0])
    assert printed == pytest.approx(change, rel=5e-3)
    assert "margin change, each model's own head" not in values  # not measured: the heads agree
    assert len(gradients.rows) == 2 * 3 * 2
    assert gradients.rows[0][:3] == ["resid_post.1", "base", "all tokens"]
    assert [row[0] for row in clouds.rows] == ["resid_post.1", "resid_post.2", "final_norm"]
