"""The geometry stage on planted truth: b after a block, pairs of known tokens, nothing to find."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from measured import measure
from planted import BOS, Planted, byte_tokenizer, planted_pair

from dsteer.data.jsonl import write_pairs
from dsteer.data.tokens import encode
from dsteer.data.types import PreferencePair
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, hash_file, read_json, read_tensors, to_json
from dsteer.training.divergence import DivergentPairs

BLOCK = 1
SIZES = {"fit": 40, "tune": 6, "test": 20}
ANSWERS = (
    (" Yes, of course.", " No."),
    (" Yes, I do.", " Yes, I do not."),
    (" Well, tea.", " Rain."),
    (" One.", " Two or three."),
)
SAME = (" It is so.", " It is so.")


def pairs(split: str, count: int, first: int, answers: bool = True) -> list[PreferencePair]:
    found = []
    for number in range(first, first + count):
        chosen, rejected = ANSWERS[number % len(ANSWERS)]
        if split == "test" and number - first == 3:
            chosen, rejected = SAME
        prompt = f"\n\nHuman: Tell me {number} things{'!' * (number % 5)}\n\nAssistant:"
        both = (chosen, rejected) if answers else (None, None)
        found.append(PreferencePair(prompt, *both, conversation=str(number), row=number))
    return found


def write_data(run: Path, answers: dict[str, bool] | None = None) -> None:
    (run / "data").mkdir(parents=True)
    starts = [0, *np.cumsum(list(SIZES.values()))]
    for (split, count), (first, _) in zip(SIZES.items(), pairwise(starts), strict=True):
        given = (answers or {}).get(split, True)
        write_pairs(run / "data" / f"{split}.jsonl", pairs(split, count, int(first), given))


def settings(planted: Planted, folder: Path, **geometry: Any) -> dict[str, Any]:
    base, tuned = planted.save(folder)
    return {
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
        "activations": {"noise_floor_prompts": 4, "response_tokens": 0},
        "geometry": {"bootstrap": 100, "gradient_pairs": 8, **geometry},
    }


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pair(BLOCK)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, planted: Planted) -> Path:
    """A run with its figures. Not to be changed."""
    folder = tmp_path_factory.mktemp("geometry")
    write_data(folder)
    given = settings(planted, folder / "models")
    measure(folder, "activations", "vector", **given)
    measure(folder, "geometry", figures=True, **given)
    return folder


def result_of(run: Path) -> Json:
    return read_json(run / "geometry" / "result.json")


def ids(planted: Planted, text: str) -> list[int]:
    return planted.tokenizer(text)["input_ids"]


def last_states(planted: Planted, prefixes: list[str]) -> dict[str, np.ndarray]:
    """final_norm states of the last token, one text at a time, straight from transformers."""
    found = {}
    for which in ("base", "tuned"):
        model = getattr(planted, which)
        with torch.no_grad():
            found[which] = np.stack(
                [
                    model.model(torch.tensor([ids(planted, text)])).last_hidden_state[0, -1].numpy()
                    for text in prefixes
                ]
            ).astype(np.float64)
    return found


def diverging(split: str, first: int) -> tuple[list[str], list[str], list[str]]:
    """Text before the first difference, and the two characters there (one token a byte)."""
    found = []
    for pair in pairs(split, SIZES[split], first):
        k = next((i for i, (a, b) in enumerate(zip(pair.chosen, pair.rejected, strict=False))
                  if a != b), None)  # fmt: skip
        if k is not None:
            found.append((pair.prompt + pair.chosen[:k], pair.chosen[k], pair.rejected[k]))
    before, chosen, rejected = zip(*found, strict=True)
    return list(before), list(chosen), list(rejected)


def directions(planted: Planted, chosen: list[str], rejected: list[str]) -> np.ndarray:
    head = planted.base.lm_head.weight.detach().double().numpy()
    token = {letter: ids(planted, letter)[-1] for letter in {*chosen, *rejected}}
    return np.stack(
        [head[token[w]] - head[token[r]] for w, r in zip(chosen, rejected, strict=True)]
    )


# ---------------------------------------------------------------------------------- 1a


def test_margins_are_those_of_the_states_before_the_difference(run: Path, planted: Planted) -> None:
    before, chosen, rejected = diverging("test", 46)
    e, states = directions(planted, chosen, rejected), last_states(planted, before)
    tensors = read_tensors(run / "geometry" / "geometry.safetensors")
    margin = {which: (states[which] * e).sum(1) for which in states}
    np.testing.assert_allclose(tensors["margin/base"], margin["base"], atol=2e-5)
    np.testing.assert_allclose(tensors["margin/tuned"], margin["tuned"], atol=2e-5)
    result = result_of(run)["preference"]
    change = margin["tuned"] - margin["base"]
    assert result["n"] == len(e) == 19
    assert result["margin_change"]["value"] == pytest.approx(change.mean(), abs=1e-5)
    assert result["margin_change"]["low"] < change.mean() < result["margin_change"]["high"]
    assert result["share_rising"]["value"] == np.mean(change > 0)
    delta = states["tuned"] - states["base"]
    cosine = (delta * e).sum(1) / np.linalg.norm(delta, axis=1) / np.linalg.norm(e, axis=1)
    assert result["cosine"]["value"] == pytest.approx(cosine.mean(), abs=1e-5)
    products = (delta @ e.T)[~np.eye(len(e), dtype=bool)]
    assert result["margin_change_other_pairs"]["value"] == pytest.approx(products.mean(), abs=1e-5)
    v = read_tensors(run / "vector" / "vectors.safetensors")["final_norm"].astype(np.float64)
    assert result["margin_change_v"]["value"] == pytest.approx((e @ v).mean(), abs=1e-9)
    assert result["margin_change_own_heads"] is None


@pytest.mark.parametrize("messages", [True, False])
def test_prompts_have_the_form_of_the_activations(
    tmp_path: Path, planted: Planted, messages: bool
) -> None:
    """The template is the tuned model's, for the base has none; texts stay texts, which is said."""
    (tmp_path / "data").mkdir()
    for split, count in SIZES.items():
        given = pairs("", count, len(split) * 100)
        if messages:
            given = [
                replace(pair, prompt=[{"role": "user", "content": f"Q{pair.row}"}])
                for pair in given
            ]
        write_pairs(tmp_path / "data" / f"{split}.jsonl", given)
    config = settings(planted, tmp_path / "models", bootstrap=20, gradient_pairs=2)
    byte_tokenizer(None).save_pretrained(tmp_path / "models" / "base")
    (tmp_path / "models" / "base" / "chat_template.jinja").unlink()
    config["activations"]["template"] = "chat"
    measure(tmp_path, "activations", "vector", "geometry", **config)
    before, chosen, rejected = [], [], []
    for pair in given:  # those of test
        start = f"<s><user>{pair.prompt[0]['content']}\n<assistant>" if messages else pair.prompt
        k = next(i for i, (a, b) in enumerate(zip(pair.chosen, pair.rejected, strict=False))
                 if a != b)  # fmt: skip
        before.append(start.removeprefix("<s>") + pair.chosen[:k])  # the tokenizer writes BOS
        chosen.append(pair.chosen[k])
        rejected.append(pair.rejected[k])
    e = directions(planted, chosen, rejected)
    margin = (last_states(planted, before)["base"] * e).sum(1)
    tensors = read_tensors(tmp_path / "geometry" / "geometry.safetensors")
    np.testing.assert_allclose(tensors["margin/base"], margin, atol=2e-5)  # as above
    notes = result_of(tmp_path)["notes"]
    assert any("read here as they stand" in note for note in notes) == (not messages)


def test_the_mean_preference_is_that_of_the_fit_pairs(run: Path, planted: Planted) -> None:
    _, chosen, rejected = diverging("fit", 0)
    e = directions(planted, chosen, rejected)
    saved = SteeringVectorSet.load(run / "geometry" / "preference.safetensors")
    assert list(saved) == ["final_norm"]
    np.testing.assert_allclose(saved["final_norm"].tensor.numpy(), e.mean(0), atol=1e-6)
    assert saved["final_norm"].metadata["n"] == len(e) == 40
    v = read_tensors(run / "vector" / "vectors.safetensors")["final_norm"]
    mean = result_of(run)["preference"]["mean"]
    expected = e.mean(0) @ v / np.linalg.norm(e.mean(0)) / np.linalg.norm(v)
    assert mean["cosine_v"] == pytest.approx(expected, abs=1e-6)
    assert mean["norm"] == pytest.approx(np.linalg.norm(e.mean(0)), rel=1e-6)


def test_pairs_that_do_not_differ_are_counted_and_left_out(run: Path) -> None:
    counts = result_of(run)["pairs"]["test"]
    assert (counts["with_answers"], counts["used"], counts["no_divergence"]) == (20, 19, 1)
    assert counts["at_first_token"] == 0.0  # every answer begins with a space
    assert counts["distinct_token_pairs"] == 4
    assert any("1 of 20 pairs were left out" in note for note in result_of(run)["notes"])


# ---------------------------------------------------------------------------------- 1b


def test_gradients_point_along_the_pairs_own_tokens_at_the_shared_context(run: Path) -> None:
    gradients = result_of(run)["gradients"]
    assert gradients["n"] == 8
    for policy in ("base", "tuned"):
        found = gradients["policies"][policy]
        assert found["formula_error"] < 1e-5
        sites = found["sites"]
        assert list(sites) == ["resid_post.1", "resid_post.3", "final_norm"]
        exact = sites["final_norm"]["context"]["cosine_preference"]
        assert exact["value"] == pytest.approx(1, abs=1e-9)
        assert sites["final_norm"]["sequence"]["cosine_preference"]["value"] < 0.99
        assert "cosine_preference" not in sites["resid_post.3"]["context"]
    start = gradients["policies"]["base"]["loss_weight"]
    assert start["value"] == pytest.approx(0.05, abs=1e-12)  # β/2, β = 0.1
    assert gradients["policies"]["tuned"]["loss_weight"]["value"] != pytest.approx(0.05, abs=1e-4)
    assert any("trains no model" in note for note in result_of(run)["notes"])


def test_pairwise_cosines_lie_beside_a_null_of_the_right_width(run: Path) -> None:
    tensors = read_tensors(run / "geometry" / "geometry.safetensors")
    sites = result_of(run)["gradients"]["policies"]["base"]["sites"]
    for site, found in sites.items():
        values = tensors[f"gradient/base/{site}/pairwise"]
        assert values.shape == (28,)
        mean = found["sequence"]["pairwise_cosine"]
        assert mean["value"] == pytest.approx(values.mean(), abs=1e-12)
        plane = tensors[f"gradient/base/{site}/plane"]
        assert (np.linalg.norm(plane, axis=1) <= 1 + 1e-9).all()
        # the part along the mean of n unit rows: its mean square gives the pairwise mean back
        squared = plane[:, 0].mean() ** 2
        assert (squared * 64 - 8) / 56 == pytest.approx(values.mean(), abs=1e-9)
    assert tensors["gradient/random"].std() == pytest.approx(32**-0.5, rel=0.03)


# ---------------------------------------------------------------------------------- 1c


def test_at_the_planted_site_the_steered_cloud_is_the_tuned_one(
    run: Path, planted: Planted
) -> None:
    v = read_tensors(run / "vector" / "vectors.safetensors")
    np.testing.assert_allclose(v[f"resid_post.{BLOCK}"], planted.b.numpy(), atol=1e-5)
    clouds, tensors = (
        result_of(run)["clouds"],
        read_tensors(run / "geometry" / "geometry.safetensors"),
    )
    assert list(clouds) == ["resid_post.1", "resid_post.3", "final_norm"]

    def gap(site: str, a: str, b: str) -> float:
        return float(abs(tensors[f"cloud/{site}/{a}"] - tensors[f"cloud/{site}/{b}"]).max())

    here = clouds["resid_post.1"]
    assert here["distance"]["value"] == pytest.approx(2, abs=1e-5)  # ‖b‖
    assert here["distance_ratio"]["value"] < 1e-5
    assert here["centre_distance_steered"] < 1e-5
    assert here["spread_tuned"] == pytest.approx(here["spread_base"], abs=1e-5)
    assert gap("resid_post.1", "base_plus", "tuned") < 1e-5
    assert gap("resid_post.1", "tuned_minus", "base") < 1e-5
    assert gap("resid_post.1", "base", "tuned") > 0.1
    for site in ("resid_post.3", "final_norm"):  # later blocks bend b
        assert clouds[site]["distance_ratio"]["value"] > 1e-3
        assert gap(site, "base_plus", "tuned") > 1e-3


def test_axes_are_those_of_the_base_states_of_the_fit_prompts(run: Path) -> None:
    base = read_tensors(run / "activations" / "base.safetensors")["resid_post.3"]
    fit = base[:40].astype(np.float64)
    _, values, axes = np.linalg.svd(fit - fit.mean(0), full_matrices=False)
    found = result_of(run)["clouds"]["resid_post.3"]
    assert found["explained"] == pytest.approx((values**2 / (values**2).sum())[:2], rel=1e-8)
    assert (found["n_fit"], found["n"]) == (40, 20)
    cloud = read_tensors(run / "geometry" / "geometry.safetensors")["cloud/resid_post.3/base"]
    expected = (base[46:] - fit.mean(0)) @ axes[:2].T
    np.testing.assert_allclose(np.abs(cloud), np.abs(expected), atol=1e-6)


def test_where_v_is_zero_no_steered_cloud_is_made(tmp_path: Path) -> None:
    planted = planted_pair(3)
    write_data(tmp_path)
    given = settings(planted, tmp_path / "models", inner_site="resid_post.0")
    result = measure(tmp_path, "activations", "vector", "geometry", **given)
    assert result["sites"] == ["resid_post.0", "resid_post.3", "final_norm"]
    before = result["clouds"]["resid_post.0"]
    assert before["undefined"]
    assert before["distance_ratio"] is before["v_in_plane"] is before["distance_steered"] is None
    assert before["distance"]["value"] == 0
    tensors = read_tensors(tmp_path / "geometry" / "geometry.safetensors")
    assert "cloud/resid_post.0/base_plus" not in tensors
    found = result["gradients"]["policies"]["base"]["sites"]["resid_post.0"]["sequence"]
    assert found["cosine_v"] is None
    assert found["pairwise_cosine"]["value"] is not None
    assert any("v* is zero: resid_post.0" in note for note in result["notes"])
    assert result["clouds"]["resid_post.3"]["distance_ratio"]["value"] < 1e-5


# ---------------------------------------------------------------------------------- the stage


def test_figures_and_determinism(run: Path, planted: Planted) -> None:
    figures = run / "geometry" / "figures"
    names = ("fig1a_preference_geometry", "fig1b_gradients", "fig1c_clouds")
    assert {path.stem for path in figures.glob("*.png")} == set(names)
    tensors, result = run / "geometry" / "geometry.safetensors", result_of(run)
    before = hash_file(tensors)
    again = measure(run, "geometry", **settings(planted, run / "models"))
    assert again == result
    assert hash_file(tensors) == before
    assert str(run) not in to_json(result)


def test_prompts_alone_give_clouds_and_say_what_is_missing(
    tmp_path: Path, planted: Planted
) -> None:
    write_data(tmp_path, dict.fromkeys(SIZES, False))
    given = settings(planted, tmp_path / "models")
    measure(tmp_path, "activations", "vector", **given)
    result = measure(tmp_path, "geometry", figures=True, **given)
    assert result["preference"] is result["gradients"] is None
    assert result["headline"]["margin_change"] is None
    assert list(result["clouds"]) == ["resid_post.1", "resid_post.3", "final_norm"]
    figures = tmp_path / "geometry" / "figures"
    assert {path.stem for path in figures.iterdir()} == {"fig1c_clouds"}
    assert not (tmp_path / "geometry" / "preference.safetensors").exists()
    said = " ".join(result["notes"])
    assert "Figures 1a and 1b were left out: no test prompt has two answers." in said
    assert "preference.safetensors was not written: no fit pair" in said


def test_identical_answers_and_fit_pairs_alone(tmp_path: Path, planted: Planted) -> None:
    write_data(tmp_path)
    same = [PreferencePair(p.prompt, *SAME, p.conversation) for p in pairs("test", 20, 46)]
    write_pairs(tmp_path / "data" / "test.jsonl", same)
    given = settings(planted, tmp_path / "models")
    result = measure(tmp_path, "activations", "vector", "geometry", **given)
    assert result["preference"] is result["gradients"] is None
    assert result["pairs"]["test"]["no_divergence"] == 20
    assert any("none of the 20 test pairs has answers that diverge" in n for n in result["notes"])
    assert (tmp_path / "geometry" / "preference.safetensors").is_file()


def test_long_pairs_are_cut_on_the_left_and_counted(tmp_path: Path, planted: Planted) -> None:
    write_data(tmp_path)
    given = settings(planted, tmp_path / "models", max_tokens=30, pairs=6, gradient_pairs=3)
    measure(tmp_path, "activations", "vector", **given)
    result = measure(tmp_path, "geometry", **given)
    counts = result["pairs"]["test"]
    assert counts["used"] == result["preference"]["n"] == 6
    assert counts["prompts_cut"] > 0
    assert any("prompts lost their left" in note for note in result["notes"])
    # a cut prompt keeps its BOS and its end: the same states as transformers gives for these ids
    pair = pairs("test", 1, 46)[0]
    index = next(i for i, (a, b) in enumerate(zip(pair.chosen, pair.rejected, strict=False))
                 if a != b)  # fmt: skip
    longest = max(len(pair.chosen), len(pair.rejected)) + 1  # and EOS
    room = 30 - min(longest, 15)
    whole = ids(planted, pair.prompt)
    assert planted.tokenizer.convert_ids_to_tokens(whole[0]) == BOS
    kept = [whole[0], *whole[len(whole) - room + 1 :], *ids(planted, pair.chosen[:index])[1:]]
    with torch.no_grad():
        state = planted.base.model(torch.tensor([kept])).last_hidden_state[0, -1].double().numpy()
    e = directions(planted, [pair.chosen[index]], [pair.rejected[index]])[0]
    margin = read_tensors(tmp_path / "geometry" / "geometry.safetensors")["margin/base"][0]
    assert margin == pytest.approx(float(state @ e), abs=2e-5)


def test_other_heads_are_said(tmp_path: Path) -> None:
    planted = planted_pair(BLOCK)
    with torch.no_grad():
        planted.tuned.lm_head.weight *= 2
    write_data(tmp_path)
    given = settings(planted, tmp_path / "models", gradient_pairs=2)
    result = measure(tmp_path, "activations", "vector", "geometry", **given)
    found = result["preference"]
    change = 2 * found["margin_tuned"]["value"] - found["margin_base"]["value"]
    assert found["margin_change_own_heads"]["value"] == pytest.approx(change, abs=1e-6)
    assert any("unembeddings differ" in note for note in result["notes"])


def test_messages_go_through_the_template_that_the_activations_went_through(
    tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's tokenizer has no template, the tuned model's has one."""
    from dsteer.stages import geometry

    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    for start, split in enumerate(SIZES):
        told = [
            PreferencePair(
                [{"role": "user", "content": str(pair.prompt)}],
                pair.chosen,
                pair.rejected,
                conversation=pair.conversation,
            )
            for pair in pairs(split, 4, 4 * start)
        ]
        write_pairs(run / "data" / f"{split}.jsonl", told)
    given = settings(planted, tmp_path / "models")
    given["activations"]["template"] = "chat"
    byte_tokenizer(None).save_pretrained(given["models"]["base"])
    (Path(given["models"]["base"]) / "chat_template.jinja").unlink(missing_ok=True)
    read = []

    def of(*args: Any, **options: Any) -> DivergentPairs:
        read.append(DivergentPairs.of(*args, **options))
        return read[-1]

    monkeypatch.setattr(geometry, "DivergentPairs", SimpleNamespace(of=of))
    measure(run, "activations", "vector", "geometry", **given)
    (wanted,) = encode(byte_tokenizer(), [told[0].prompt], template="chat")
    assert read[1].examples[0].prompt == wanted.ids
