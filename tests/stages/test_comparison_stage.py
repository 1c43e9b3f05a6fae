"""The comparison of a study's variants: planted truth through the stages, and what is missing."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.linalg
import torch
from measured import WIDTH, N, measure, normal, rows, write_activations
from planted import byte_tokenizer, tiny_llama

from dsteer.activations.moments import open_streamed
from dsteer.config import ComparisonConfig, PipelineConfig
from dsteer.errors import ConfigError, StoreError
from dsteer.geometry.comparison import Halves
from dsteer.models.load import quiet
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.stages.comparison import compare_runs
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_file, read_json, read_tensors, to_json, write_json

SITES = ("resid_post.0", "resid_post.1", "final_norm")
FEW = ComparisonConfig(draws=20, null_draws=40)


def seed(*names: str) -> int:
    return PipelineConfig.seed_for(
        PipelineConfig.model_validate(
            {"name": "x", "data": {"sources": [{"format": "synthetic"}]}}
        ),
        "comparison",
        *names,
    )


def compare(runs: dict[str, Path], out: Path, config: ComparisonConfig = FEW, **more: Any) -> Json:
    with patch("dsteer.stages.comparison.draw_comparison"):
        result = compare_runs(runs, out, config, seed, SILENT, **more)
    return copy.deepcopy(result)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def pair(result: Json, a: str, b: str) -> Json:
    return next(p for p in result["pairs"] if (p["a"], p["b"]) == (a, b))


# ---------------------------------------------------------------------------------- planted truth

ORTHOGONAL = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(5)))[0].T
U, W = 2.0 * ORTHOGONAL


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base, and after its block 1: u, u and a little of other weights, and w ⟂ u."""
    root = tmp_path_factory.mktemp("study")
    base, tokenizer = tiny_llama(num_hidden_layers=3), byte_tokenizer()
    noisy = torch.Generator().manual_seed(9)
    for name, b, noise in (
        ("base", 0 * U, 0.0),
        ("u", U, 0.0),
        ("u-noisy", U, 0.02),
        ("w", W, 0.0),
    ):
        model = copy.deepcopy(base)
        with torch.no_grad():
            weights = model.model.layers[1].mlp.down_proj
            weights.bias += b
            weights.weight += noise * torch.randn(weights.weight.shape, generator=noisy)
        with quiet():
            model.save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
    for name in ("u", "u-noisy", "w"):
        run_variant(root, name)
    return root


def run_variant(root: Path, name: str, folder: str = "variants", **activations: Any) -> Path:
    """The run of one variant, as far as its spectrum."""
    config = PipelineConfig.model_validate(
        {
            "name": name,
            "data": {
                "sources": [{"format": "synthetic", "conversations": 90}],
                "splits": {"train": 10, "fit": 40, "tune": 16, "test": 24},
            },
            "models": {
                "base": str(root / "models" / "base"),
                "tuned": str(root / "models" / name),
                "device": "cpu",
            },
            "activations": {"noise_floor_prompts": 4, "response_tokens": 0, **activations},
            "vector": {"bootstrap": 20, "convergence_draws": 2},
            "cosine": {"bootstrap": 20, "null_draws": 20},
            "spectrum": {},
        }
    )
    with ExitStack() as undrawn:
        for stage in ("vector", "cosine", "spectrum"):
            undrawn.enter_context(patch(f"dsteer.stages.{stage}.draw_result"))
        run_pipeline(config, f"name: {name}\n", root / folder / name, reporter=SILENT)
    return root / folder / name


def test_planted_directions_are_told_apart(planted: Path, tmp_path: Path) -> None:
    runs = {name: planted / "variants" / name for name in ("u", "u-noisy", "w")}
    result = compare(runs, tmp_path)
    site = "resid_post.1"
    assert {v["chosen_site"] for v in result["variants"].values()} == {site}
    assert result["sets"][0]["block_site"] == site
    assert result["sets"][0]["sites"] == [site, "final_norm"]
    assert all(p["why"] is None and p["base_cosine"] == pytest.approx(1) for p in result["pairs"])

    # float32 states of size about 5 round b by about 1e-7 a row
    apart, near = (pair(result, "u", other)["sites"][site] for other in ("w", "u-noisy"))
    assert apart["cosine"]["value"] == pytest.approx(0, abs=1e-5)
    assert apart["disattenuated"]["value"] == pytest.approx(0, abs=1e-5)
    assert 0.9 < near["cosine"]["value"] < 1 - 1e-4
    # what the other weights write is on average one more vector: it is there in each half
    assert near["disattenuated"]["value"] == pytest.approx(near["cosine"]["value"], abs=0.05)
    assert result["variants"]["u"]["reliability"][site]["full"]["value"] == pytest.approx(1)
    assert result["variants"]["u-noisy"]["reliability"][site]["full"]["value"] > 0.9

    # u and w span one direction each (the rest is rounding), and nothing once centred
    angles = pair(result, "u", "w")["angles"][site]
    assert angles["uncentred"]["dimensions"] == [1, 1]
    assert angles["uncentred"]["angles"] == pytest.approx([90], abs=1e-3)
    assert angles["centred"] is None
    assert pair(result, "u", "u-noisy")["angles"][site]["uncentred"]["dimensions"] == [1, 5]

    # two of three unit v*s (nearly) one, the third across to them: σ² of 1 + c, 1 − c, 1
    directions = result["sets"][0]["by_site"][site]["directions"]
    c = near["cosine"]["value"]
    noisy_w = pair(result, "u-noisy", "w")["sites"][site]["cosine"]["value"]
    expected = np.linalg.eigvalsh(np.array([[1, c, 0], [c, 1, noisy_w], [0, noisy_w, 1]]))[::-1]
    np.testing.assert_allclose(np.square(directions["singular_values"]), expected, atol=1e-6)
    assert directions["share"] == pytest.approx(expected[0] / 3)
    assert directions["share"] > directions["share_null_q95"]

    # before the planted block nothing was changed
    before = pair(result, "u", "w")["sites"]["resid_post.0"]
    assert (before["cosine"], before["disattenuated"]) == (None, None)
    assert before["undefined"] == "a vector is zero"


def test_numbers_are_those_of_numpy_and_of_the_variants_stages(
    planted: Path, tmp_path: Path
) -> None:
    runs = {name: planted / "variants" / name for name in ("u-noisy", "w", "u")}
    result = compare(runs, tmp_path)
    fit = slice(0, 40)
    deltas, vectors = {}, {}
    for name, run in runs.items():
        base, tuned = (
            read_tensors(run / "activations" / f"{which}.safetensors")
            for which in ("base", "tuned")
        )
        deltas[name] = {s: tuned[s][fit].astype(np.float64) - base[s][fit] for s in base}
        vectors[name] = read_tensors(run / "vector" / "vectors.safetensors")
    for each in result["pairs"]:
        a, b = each["a"], each["b"]
        for site in ("resid_post.1", "resid_post.2", "final_norm"):
            measured = each["sites"][site]
            # vectors are stored in float32
            expected = cosine(vectors[a][site], vectors[b][site])
            assert measured["cosine"]["value"] == pytest.approx(expected, abs=1e-6)
            assert measured["cosine"]["n"] == 40
        found = each["angles"]["final_norm"]["centred"]
        spans = [
            np.linalg.svd(d - d.mean(0))[2][:5].T
            for d in (deltas[a]["final_norm"], deltas[b]["final_norm"])
        ]
        expected = np.degrees(scipy.linalg.subspace_angles(*spans))[::-1]
        np.testing.assert_allclose(found["angles"], expected, atol=1e-6)
        assert found["null_low"] < found["null_mean"] < found["null_high"]

    matrices = read_tensors(tmp_path / "comparison.safetensors")
    place = {name: i for i, name in enumerate(runs)}
    for each in result["pairs"]:
        i, j = place[each["a"]], place[each["b"]]
        stored = matrices["cosine/final_norm"]
        value = each["sites"]["final_norm"]["cosine"]["value"]
        assert stored[i, j] == stored[j, i] == value

    for name, run in runs.items():
        row = result["variants"][name]["at"]["final_norm"]
        stage = {s: read_json(run / s / "result.json") for s in ("vector", "cosine", "spectrum")}
        held_out = stage["cosine"]["sites"]["final_norm"]["held_out"]["mean"]
        assert row["held_out"] == held_out
        delta = stage["spectrum"]["sites"]["final_norm"]["delta"]["uncentred"]
        assert row["sigma_ratio"] == delta["sigma_ratio"]
        assert row["relative_norm"] == stage["vector"]["sites"]["final_norm"]["relative_norm"]
        panel = result["variants"][name]["kl"]["first_token"]
        kl = stage["vector"]["kl_recovery"]["first_token"]
        assert panel["recovered_at_one"] == kl["recovered"][kl["strengths"].index(1.0)]
        assert result["variants"][name]["kl"]["response"] is None
        assert result["variants"][name]["interpolation"] is None


def test_same_result_twice_and_no_path_in_it(planted: Path, tmp_path: Path) -> None:
    runs = {name: planted / "variants" / name for name in ("u", "w")}
    first, again = (compare(runs, tmp_path / name) for name in ("a", "b"))
    assert to_json(first) == to_json(again)
    tensors = [hash_file(tmp_path / name / "comparison.safetensors") for name in ("a", "b")]
    assert tensors[0] == tensors[1]
    assert str(planted) not in to_json(first)
    assert {"headline", "notes"} <= first.keys()


def test_streamed_variants_give_what_stored_ones_do(planted: Path, tmp_path: Path) -> None:
    names = ("u-noisy", "w")
    stored = compare({name: planted / "variants" / name for name in names}, tmp_path / "a")
    runs = {name: run_variant(planted, name, "streamed", store="moments", keep=8) for name in names}
    streamed = compare(runs, tmp_path / "b")
    assert streamed["variants"]["w"]["n_fit"] == stored["variants"]["w"]["n_fit"] == 40
    site, sums = "final_norm", {}
    for name, run in runs.items():
        found = open_streamed(run / "activations")
        assert found is not None
        sums[name] = found["fit"][site].sums.total
    found, whole = (r["pairs"][0]["sites"][site]["cosine"]["value"] for r in (streamed, stored))
    assert found == pytest.approx(whole, abs=1e-9)
    for centring in ("uncentred", "centred"):
        found, whole = (r["pairs"][0]["angles"][site][centring] for r in (streamed, stored))
        assert found["dimensions"] == whole["dimensions"] == [5, 5]
        np.testing.assert_allclose(found["angles"], whole["angles"], atol=1e-6)
    # halves are of the 64 buckets instead of the conversations: other draws of one quantity
    a, b = (
        Halves.of_sums(s[s.any(axis=1)], 40, draws=20, seed=seed("halves")) for s in sums.values()
    )
    agreement = a.agreement(b)
    assert agreement.disattenuated is not None
    measured = streamed["pairs"][0]["sites"][site]["disattenuated"]
    assert measured["value"] == pytest.approx(agreement.disattenuated.value, abs=1e-12)
    whole = stored["pairs"][0]["sites"][site]["disattenuated"]
    assert whole["low"] < measured["value"] < whole["high"]
    mixed = compare({"u-noisy": planted / "variants" / "u-noisy", "w": runs["w"]}, tmp_path / "c")
    assert mixed["pairs"][0]["why"] == "one kept states, the other moments"


def test_figures_are_drawn(planted: Path, tmp_path: Path) -> None:
    runs = {name: planted / "variants" / name for name in ("u", "w")}
    compare_runs(runs, tmp_path, FEW, seed, SILENT)
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"variants_forest", "vector_cosines", "cosines_over_depth", "principal_angles"}


# ---------------------------------------------------------------------------------- made-up runs


def write_run(
    run: Path, displacements: dict[str, np.ndarray], *, base: np.ndarray | None = None
) -> Path:
    """A run of made-up displacements, as far as its spectrum."""
    write_activations(run, displacements, base=base)
    (run / "vector").mkdir()
    fitted = {site: delta[rows("fit")].mean(0) for site, delta in displacements.items()}
    SteeringVectorSet(
        (SteeringVector(v, site) for site, v in fitted.items()), {"base": "b", "tuned": run.name}
    ).save(run / "vector" / "vectors.safetensors")
    sites = {site: {"norm": float(np.linalg.norm(v)), "undefined": not v.any()}
             for site, v in fitted.items()}  # fmt: skip
    write_json(run / "vector" / "result.json", {"sites": sites, "kl_recovery": None})
    measure(run, "cosine", cosine={"bootstrap": 20, "null_draws": 20})
    return run


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made-up")
    shared, runs = normal(1, WIDTH), {}
    for number, name in enumerate(("one", "two", "three")):
        delta = shared + (1 + number) * normal(10 + number, N, WIDTH)
        runs[name] = write_run(root / name, dict.fromkeys(SITES, delta))
    return runs


@pytest.fixture
def runs(made_up: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies, to be changed."""
    return {
        name: Path(shutil.copytree(run, tmp_path / "variants" / name))
        for name, run in made_up.items()
    }


def edit(run: Path, change: Callable[[Any], object]) -> None:
    result = read_json(run / "activations" / "result.json")
    change(result)
    write_json(run / "activations" / "result.json", result)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"width": 32}, "widths differ (16 and 32)"),
        ({"ids_sha256": "1" * 64}, "prompts differ (other token ids)"),
        ({"store": "moments"}, "one kept states, the other moments"),
        ({"position": "prompt_mean"}, "positions differ (prompt_last and prompt_mean)"),
        ({"rows": {"fit": [0, 95], "tune": [95, 128], "test": [128, 192]}},
         "the prompts are split differently"),
    ],
)  # fmt: skip
def test_variants_of_another_design_are_null_with_words(
    runs: dict[str, Path], tmp_path: Path, change: Json, why: str
) -> None:
    edit(runs["three"], lambda result: result.update(change))
    if "rows" in change:
        edit(runs["three"], lambda result: result["conversations"]["fit"].pop())
    if "width" in change:  # nothing else of that run has it: only the words are of interest
        (runs["three"] / "activations" / "base.safetensors").unlink()
    result = compare(runs, tmp_path / "out")
    for other in ("one", "two"):
        found = pair(result, other, "three")
        assert (found["why"], found["sites"], found["angles"]) == (why, {}, {})
    assert pair(result, "one", "two")["sites"]["final_norm"]["disattenuated"] is not None
    assert [each["members"] for each in result["sets"]] == [["one", "two"]]
    assert result["variants"]["three"]["at"]["final_norm"]["held_out"] is not None
    assert result["headline"]["pairs_compared"] == 1
    note = next(note for note in result["notes"] if why in note)
    assert "one and three; two and three" in note
    matrix = read_tensors(tmp_path / "out" / "comparison.safetensors")["cosine/final_norm"]
    assert np.isfinite(matrix).sum() == 2


@pytest.mark.parametrize("how", ["deleted", "deleted sums"])
def test_without_rows_the_cosines_of_the_vectors_remain(
    runs: dict[str, Path], tmp_path: Path, how: str
) -> None:
    before = compare(runs, tmp_path / "before")
    words = "no longer in the run's folder"
    if how == "deleted":  # as in a run that was committed without its states
        (runs["one"] / "activations" / "tuned.safetensors").unlink()
    else:
        for run in runs.values():
            edit(run, lambda result: result.update(store="moments"))
    result = compare(runs, tmp_path / "after")
    found, whole = (pair(r, "one", "two")["sites"]["final_norm"] for r in (result, before))
    # vectors are stored in float32
    assert found["cosine"]["value"] == pytest.approx(whole["cosine"]["value"], abs=1e-6)
    assert found["cosine"]["low"] is None
    assert found["disattenuated"] is None
    assert words in found["undefined"]
    assert pair(result, "one", "two")["angles"]["final_norm"]["uncentred"] is None
    assert words in result["variants"]["one"]["reliability"]["final_norm"]["undefined"]
    assert result["sets"][0]["by_site"]["final_norm"]["subspace"]["uncentred"] is None
    if how == "deleted":
        assert pair(result, "two", "three") == pair(before, "two", "three")
    assert any(note.startswith("one: ") and words in note for note in result["notes"])


def test_failed_and_missing_variants_stop_no_other(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.rmtree(runs["two"] / "vector")
    asked = runs | {"never": tmp_path / "never"}
    result = compare(asked, tmp_path / "out", failed={"three": "out of memory"})
    failed = {name: v["failed"] for name, v in result["variants"].items()}
    assert failed == {
        "one": None,
        "two": "vector/result.json is missing: it was not run to its end",
        "three": "out of memory",
        "never": "its run folder is missing",
    }
    assert (result["pairs"], result["sets"]) == ([], [])
    assert result["headline"]["failed"] == 3
    # one variant alone has its row, its reliability too
    assert result["variants"]["one"]["reliability"]["final_norm"]["full"] is not None
    with pytest.raises(StoreError) as error:
        compare({"two": runs["two"]}, tmp_path / "none")
    assert "no variant of the study can be compared (two: vector/result.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


def test_sites_are_as_asked(runs: dict[str, Path], tmp_path: Path) -> None:
    fixed = ComparisonConfig(sites=("resid_post.0",), draws=5, null_draws=5, subspace=2)
    result = compare(runs, tmp_path / "out", fixed)
    assert result["sets"][0]["sites"] == list(pair(result, "one", "two")["angles"])
    assert list(pair(result, "one", "two")["angles"]) == ["resid_post.0"]
    assert list(pair(result, "one", "two")["sites"]) == list(SITES)
    found = pair(result, "one", "two")["angles"]["resid_post.0"]["uncentred"]
    assert found["dimensions"] == [2, 2]
    with pytest.raises(ConfigError) as error:
        compare(runs, tmp_path / "bad", ComparisonConfig(sites=("resid_post.9",)))
    assert str(error.value).startswith("comparison.sites: resid_post.9: no variant read this site")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ValueError, match="name at least one site"):
        ComparisonConfig(sites=())


def test_vectors_without_a_meaning_are_noted(runs: dict[str, Path], tmp_path: Path) -> None:
    path = runs["two"] / "vector" / "result.json"
    result = read_json(path)
    result["sites"]["resid_post.0"]["within_rounding"] = True
    result["sites"]["resid_post.1"]["inert"] = True
    write_json(path, result)
    notes = compare(runs, tmp_path / "out")["notes"]
    assert "v* is within rounding, so its direction there means nothing: two at resid_post.0." in (
        notes
    )
    assert "v* is along the state itself and inert after the norm: two at resid_post.1." in notes


def test_two_bases_are_noted(tmp_path: Path) -> None:
    delta = {"final_norm": normal(3, WIDTH) + normal(4, N, WIDTH)}
    runs = {
        "one": write_run(tmp_path / "one", delta, base=normal(5, N, WIDTH)),
        "two": write_run(tmp_path / "two", delta, base=normal(6, N, WIDTH)),
    }
    result = compare(runs, tmp_path / "out")
    found = result["pairs"][0]
    a, b = (normal(s, N, WIDTH)[rows("fit")] for s in (5, 6))
    expected = np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)])
    assert found["base_cosine"] == pytest.approx(expected, abs=1e-6)
    assert any("Not the same base" in note for note in result["notes"])
    # final_norm alone: no block to show
    assert result["sets"][0]["block_site"] is None
