"""`store: moments` through the stages: what it measures is what stored states give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured import SMALL, measure
from planted import byte_tokenizer, planted_pair, tiny_llama

from dsteer.activations import accumulate
from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import open_moments
from dsteer.activations.storage import States
from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError, StoreError
from dsteer.geometry.sums import NULL_DRAWS, signs_of
from dsteer.models.load import quiet
from dsteer.report.tables import STAGE_TABLES
from dsteer.store import Json, read_json, read_metadata, read_tensors

STAGES = ("vector", "cosine", "spectrum")
SIZES = {"fit": 60, "tune": 10, "test": 30}
KEEP = 12


def write_data(run: Path, sizes: dict[str, int] = SIZES) -> None:
    """Pairs of different lengths; two of each conversation."""
    (run / "data").mkdir(parents=True)
    number = 0
    for split, count in sizes.items():
        pairs = []
        for _ in range(count):
            prompt = f"\n\nHuman: Say {number * 7919} {'or so ' * (number % 5)}\n\nAssistant:"
            pairs.append(PreferencePair(prompt, " Yes.", " No.", conversation=str(number // 2)))
            number += 1
        write_pairs(run / "data" / f"{split}.jsonl", pairs)


def settings(models: tuple[Path, Path], **activations: Any) -> dict[str, Any]:
    return {
        "models": {"base": str(models[0]), "tuned": str(models[1]), "device": "cpu"},
        "activations": {
            "noise_floor_prompts": 8,
            "response_tokens": 3,
            "batch_tokens": 256,
            **({"keep": KEEP} if activations.get("store") == "moments" else {}),
            **activations,
        },
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return planted_pair(1).save(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of which one has every weight a little moved."""
    folder, base = tmp_path_factory.mktemp("moved"), tiny_llama(3)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    for name, model in (("base", base), ("tuned", tuned)):
        with quiet():
            model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder / "base", folder / "tuned"


def results(run: Path) -> dict[str, Json]:
    return {name: read_json(run / name / "result.json") for name in ("activations", *STAGES)}


def run_in(
    run: Path, models: tuple[Path, Path], sizes: dict[str, int] = SIZES, **activations: Any
) -> dict[str, Json]:
    """All results of a run."""
    write_data(run, sizes)
    measure(run, "activations", *STAGES, **settings(models, **activations))
    return results(run)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Json]]]:
    """Runs with every state stored, each made once."""
    runs: dict[str, tuple[Path, dict[str, Json]]] = {}

    def get(
        models: tuple[Path, Path], sizes: dict[str, int] = SIZES
    ) -> tuple[Path, dict[str, Json]]:
        key = f"{models} {sizes}"
        if key not in runs:
            run = tmp_path_factory.mktemp("stored")
            runs[key] = run, run_in(run, models, sizes)
        return runs[key]

    return get


def without_bounds(value: Json, dropped: tuple[str, ...] = ()) -> Json:
    """A result without intervals' ends."""
    if isinstance(value, dict):
        return {
            key: without_bounds(item, dropped)
            for key, item in value.items()
            if key not in {"low", "high", *dropped}
        }
    return [without_bounds(item, dropped) for item in value] if isinstance(value, list) else value


def assert_close(found: Json, expected: Json, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{where}.{index}")
    elif isinstance(expected, float):
        # float64 sums in another order; v* passes through float32 in its file
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-9), where
    else:
        assert found == expected, where


def with_hashed_null(run: Path, found: dict[str, Json]) -> Json:
    """The cosines of a run with every state stored, their null drawn with the keys' signs."""
    folder = run / "activations"
    rows = {name: slice(*span) for name, span in found["activations"]["rows"].items()}
    keys = [
        pair.conversation for name in rows for pair in read_pairs(run / "data" / f"{name}.jsonl")
    ]
    bits = np.array([np.unpackbits(np.frombuffer(signs_of(key), np.uint8)) for key in keys])
    signs = 2.0 * bits.reshape(len(keys), 2, -1)[..., : SMALL["cosine"]["null_draws"]] - 1
    cosine = copy.deepcopy(found["cosine"])
    for site, result in cosine["sites"].items():
        delta = PairedActivations.open(folder).displacement(site).numpy()
        fit, test = delta[rows["fit"]], delta[rows["test"]]
        if result["undefined"]:
            continue
        v = signs[rows["fit"], 0].T @ fit
        lengths = np.linalg.norm(v, axis=1)
        # constant displacements may cancel: then only rounding is left of v
        defined = lengths > len(fit) * np.finfo(float).eps * np.linalg.norm(fit)
        cosines = signs[rows["test"], 1].T * (v @ test.T)
        null = (cosines / np.linalg.norm(test, axis=1)).mean(axis=1)[defined] / lengths[defined]
        reached = int((null >= result["held_out"]["mean"]["value"] - 1e-9).sum())
        result["null"] = {
            "mean": null.mean(),
            "q95": np.quantile(null, 0.95),
            "p": (1 + reached) / (1 + len(null)),
            "draws": len(null),
        }
    cosine["headline"]["null_q95"] = cosine["sites"][cosine["chosen_site"]]["null"]["q95"]
    return cosine


@pytest.mark.parametrize(
    ("pair", "rows", "sizes"),
    [
        ("planted", 17, SIZES),
        ("moved", None, SIZES),  # one part
        ("moved", 1, SIZES),  # a batch a part
        ("moved", 17, SIZES | {"fit": 20}),  # N < d = 32
    ],
)
def test_it_equals_stored_states(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    stored: Callable[..., tuple[Path, dict[str, Json]]],
    pair: str,
    rows: int | None,
    sizes: dict[str, int],
) -> None:
    if rows is not None:
        monkeypatch.setattr(accumulate, "part_rows", lambda _width: rows)
    models = request.getfixturevalue(pair)
    whole, expected = stored(models, sizes)
    found = run_in(tmp_path, models, sizes, store="moments")

    of_states = read_tensors(whole / "spectrum" / "spectra.safetensors")
    of_moments = read_tensors(tmp_path / "spectrum" / "spectra.safetensors")
    assert of_moments.keys() == of_states.keys()
    for name, sigma in of_states.items():
        assert of_moments[name].shape == sigma.shape
        # the promise is 1e-8 σ₁; both are good to 1e-10, relative to the uncentred matrix
        largest = of_states[name.replace("/centred", "/uncentred")][0]
        np.testing.assert_allclose(of_moments[name], sigma, atol=1e-10 * largest, rtol=0)
    v = [read_tensors(run / "vector" / "vectors.safetensors") for run in (whole, tmp_path)]
    for site, vector in v[0].items():
        np.testing.assert_allclose(v[1][site], vector, rtol=1e-6, atol=1e-9)  # float32 files

    activations = found["activations"]
    assert activations["store"] == "moments"
    assert activations["counts"] == sizes
    for key in ("ids_sha256", "n", "tokens", "truncated", "noise_floor", "sites", "headline"):
        assert activations[key] == expected["activations"][key], key

    others = {
        "spectrum": ("notes",),
        # of the kept states
        "cosine": ("median", "peak", "share_above_0.9", "leave_one_out", "rows_kept", "notes"),
        "vector": ("notes", "convergence", "kl_recovery", "headline"),
    }  # fmt: skip
    expected = expected | {"cosine": with_hashed_null(whole, expected)}
    for stage, dropped in others.items():
        pairs = [without_bounds(results[stage], dropped) for results in (found, expected)]
        if stage == "spectrum" and pair == "planted":
            for result in pairs:  # its σ but the first are those of rounding errors
                del result["sites"]["resid_post.1"]["delta"]
        assert_close(*pairs)


def test_the_null_narrows_with_conversations_as_that_of_stored_states(
    tmp_path: Path, moved: tuple[Path, Path]
) -> None:
    sizes = {"fit": 200, "tune": 2, "test": 800}
    given = {"sites": ["final_norm"], "response_tokens": 0, "batch_tokens": 4096}
    q95 = {}
    for store in ("states", "moments"):
        write_data(tmp_path / store, sizes)
        found = measure(
            tmp_path / store, "activations", "vector", "cosine",
            cosine={"null_draws": NULL_DRAWS}, **settings(moved, store=store, **given),
        )  # fmt: skip
        q95[store] = found["sites"]["final_norm"]["null"]["q95"]
        assert found["headline"]["null_q95"] == q95[store]
        assert not any("told from chance" in note for note in found["notes"])
    # of 200 draws each, about normal: the ratio's standard error is 13 %; 64 buckets' is above 2
    assert 0.7 < q95["moments"] / q95["states"] < 1.4
    assert any("flips each conversation by itself, in 200 draws" in n for n in found["notes"])


def test_more_draws_than_are_summed_are_not_passed_over(
    tmp_path: Path, moved: tuple[Path, Path]
) -> None:
    write_data(tmp_path, {"fit": 12, "tune": 2, "test": 4})
    for draws, null, words in ((300, 200, "null_draws 300 was not met"), (20, 20, "in 20 draws")):
        given = settings(moved, store="moments", sites=["final_norm"], response_tokens=0)
        measure(tmp_path, "activations", "vector", "cosine", cosine={"null_draws": draws}, **given)
        tensors = read_tensors(tmp_path / "cosine" / "cosines.safetensors")
        assert len(tensors["final_norm/null"]) == null
        notes = read_json(tmp_path / "cosine" / "result.json")["notes"]
        assert any(words in note for note in notes)


def test_kept_states_are_the_stored_ones(
    tmp_path: Path, moved: tuple[Path, Path], stored: Callable[..., tuple[Path, dict[str, Json]]]
) -> None:
    whole, results = stored(moved)
    expected = results["activations"]
    write_data(tmp_path)
    found = measure(tmp_path, "activations", **settings(moved, store="moments"))
    assert found["rows"] == {"fit": [0, 12], "tune": [12, 22], "test": [22, 34]}
    for which in ("base", "tuned"):
        every, kept = (
            States.open(run / "activations" / f"{which}.safetensors") for run in (whole, tmp_path)
        )
        for site in expected["sites"]:
            for split, (start, stop) in found["rows"].items():
                first = expected["rows"][split][0]
                rows = every.rows(site, first, first + stop - start)
                assert kept.rows(site, start, stop).equal(rows)
    for split, (start, stop) in found["rows"].items():
        assert found["conversations"][split] == expected["conversations"][split][: stop - start]
    assert found["response"] == {"pairs": 12, "tokens": 36}
    assert "fit 12 of 60, tune 10 of 10, test 12 of 30" in found["notes"][-1]


def test_with_every_state_kept_only_buckets_differ(
    tmp_path: Path, moved: tuple[Path, Path], stored: Callable[..., tuple[Path, dict[str, Json]]]
) -> None:
    _, expected = stored(moved)
    found = run_in(tmp_path, moved, store="moments", keep=100)
    # KL at final_norm, leave-one-out and single cosines come from the kept states: intervals too
    assert_close(found["vector"]["kl_recovery"], expected["vector"]["kl_recovery"])
    for site, cosines in found["cosine"]["sites"].items():
        others = expected["cosine"]["sites"][site]
        assert_close(cosines["leave_one_out"], others["leave_one_out"])
        for kind in ("in_sample", "held_out"):
            for key in ("median", "peak", "share_above_0.9"):
                assert_close(cosines[kind][key], others[kind][key])
            one, other = cosines[kind]["mean"], others[kind]["mean"]
            # some of the 45 conversations share a bucket: intervals of like width, not the same
            width = other["high"] - other["low"]
            assert one["high"] - one["low"] == pytest.approx(width, rel=0.5)
        assert found["spectrum"]["sites"][site]["delta"]["uncentred"]["entropy"]["low"] is None
    assert any("no intervals" in note for note in found["spectrum"]["notes"])
    assert not any("States were not stored" in note for note in found["activations"]["notes"])


def test_what_is_of_kept_prompts_is_said(
    tmp_path: Path, moved: tuple[Path, Path], stored: Callable[..., tuple[Path, dict[str, Json]]]
) -> None:
    whole, _ = stored(moved)
    found = run_in(tmp_path, moved, store="moments")
    cosine = found["cosine"]
    assert (cosine["n_fit"], cosine["n_test"]) == (60, 30)
    assert cosine["rows_kept"] == {"fit": 12, "test": 12}
    site = cosine["sites"]["final_norm"]
    assert site["held_out"]["mean"]["n"] == 30
    assert site["leave_one_out"]["mean"]["n"] == 12
    words = " ".join(cosine["notes"])
    assert "12 of 60 fit and 12 of 30 test rows" in words
    assert "leave-one-out cosine is of the kept fit prompts" in words
    cosines, every = (
        read_tensors(run / "cosine" / "cosines.safetensors") for run in (tmp_path, whole)
    )
    for kind in ("in_sample", "leave_one_out", "held_out"):  # of all rows' v, on the kept rows
        name = f"final_norm/{kind}"
        np.testing.assert_allclose(cosines[name], every[name][:12], atol=1e-7)  # v* is float32
    assert found["vector"]["kl_recovery"]["first_token"]["n"] == 12


def test_figures_tables_and_zero_displacement(tmp_path: Path, planted: tuple[Path, Path]) -> None:
    write_data(tmp_path)
    given = settings(planted, store="moments", sites=["resid_post.0", "resid_post.2", "final_norm"])
    measure(tmp_path, "activations", *STAGES, figures=True, **given)
    found = results(tmp_path)
    for name in STAGES:
        assert found[name]["sites"]["resid_post.0"]["undefined"], name
    before = found["spectrum"]["sites"]["resid_post.0"]
    assert set(before["delta"]["uncentred"].values()) == {None}
    assert (before["held_out_cosine"], before["shared_share"]) == (None, None)
    for stage, names in (
        ("vector", {"convergence", "kl_recovery"}),
        ("cosine", {"fig3_cosine"}),
        ("spectrum", {"fig4a_entropy", "fig4b_singular_values"}),
    ):
        assert {path.stem for path in (tmp_path / stage / "figures").glob("*.png")} == names
    caption = read_json(tmp_path / "cosine" / "figures" / "fig3_cosine.json")["caption"]
    assert "12 fit and 12 test prompts" in caption
    caption = read_json(tmp_path / "spectrum" / "figures" / "fig4a_entropy.json")["caption"]
    assert "There are no intervals" in caption
    table = STAGE_TABLES["activations"](found["activations"])[0]
    assert ["prompts", "100 (fit 60, tune 10, test 30)"] in table.rows
    assert ["states kept", "fit 12, tune 10, test 12"] in table.rows


@pytest.mark.parametrize("position", ["all", "response_mean"])
def test_other_positions(tmp_path: Path, moved: tuple[Path, Path], position: str) -> None:
    sizes = {"fit": 12, "tune": 2, "test": 4}
    given = {"position": position, "sites": ["final_norm"], "response_tokens": 0}
    expected, found = (
        run_in(tmp_path / store["store"], moved, sizes, **store, **given)
        for store in ({"store": "states"}, {"store": "moments", "keep": 3})
    )
    assert found["activations"]["n"] == expected["activations"]["n"]
    assert found["vector"]["n"] == expected["vector"]["n"]
    one, other = (results["spectrum"]["sites"]["final_norm"] for results in (found, expected))
    assert one["shared_share"]["value"] == pytest.approx(other["shared_share"]["value"], rel=1e-9)
    assert one["held_out_cosine"] == pytest.approx(other["held_out_cosine"], rel=1e-6)


def test_a_killed_reading_ends_with_the_same_bytes(
    tmp_path: Path, moved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "part_rows", lambda _width: 20)
    given = settings(moved, store="moments")
    for name in ("whole", "cut"):
        write_data(tmp_path / name)
    expected = measure(tmp_path / "whole", "activations", **given)
    whole, cut = (tmp_path / name / "activations" for name in ("whole", "cut"))
    parts = read_metadata(whole / "moments.safetensors")["parts"][1]
    assert parts > 3
    read, calls = accumulate.Reading.read, []

    def counted(self: Any, *rest: Any, **more: Any) -> States:
        calls.append("of" in more)  # a part, and no reading of its own
        if sum(calls) == 6:  # the tuned model's turn in the third part
            raise KeyboardInterrupt
        return read(self, *rest, **more)

    monkeypatch.setattr(accumulate.Reading, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cut", "activations", **given)
    with pytest.raises(StoreError, match=f"holds 2 of {parts} parts of a reading; run it again"):
        open_moments(cut / "moments.safetensors")
    assert measure(tmp_path / "cut", "activations", **given) == expected
    assert sum(calls) == 6 + 2 * (parts - 2)  # two parts were not read again
    names = sorted(item.name for item in whole.iterdir())
    assert names == sorted(item.name for item in cut.iterdir())
    assert names == [
        "base.safetensors", "ids.safetensors", "moments.safetensors", "response.json",
        "response_base.safetensors", "response_tuned.safetensors", "result.json",
        "tuned.safetensors",
    ]  # fmt: skip
    assert all((cut / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_two_identical_models_are_refused(tmp_path: Path, moved: tuple[Path, Path]) -> None:
    write_data(tmp_path)
    with pytest.raises(MeasurementError, match="identical states at every site"):
        measure(tmp_path, "activations", **settings((moved[0], moved[0]), store="moments"))


def test_an_empty_split_is_refused(tmp_path: Path, moved: tuple[Path, Path]) -> None:
    write_data(tmp_path, SIZES | {"tune": 0})
    with pytest.raises(DataError, match=r"the tune split has no prompts"):
        measure(tmp_path, "activations", **settings(moved, store="moments"))
    assert not list((tmp_path / "activations").iterdir())
