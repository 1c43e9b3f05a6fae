"""The stage ``learned`` on planted truth: v* is b, so adding it is the tuned model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured import measure
from planted import planted_pair

from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.synthetic import World
from dsteer.errors import ConfigError, DataError, MeasurementError
from dsteer.models.pair import ModelPair
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json
from dsteer.training.evaluate import evaluate, pair_likelihoods, reward_margins
from dsteer.training.examples import encode_pairs

BLOCK, WIDTH, SITE = 1, 16, "resid_post.1"
SIZES = {"train": 4, "fit": 8, "tune": 5, "test": 9}
BETA = 0.5
LEARNED: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "eval_every": 2,
    "strengths": [0.5, 1.0, 2.0],
    "tune_pairs": 5,
    "pairs": 9,
    "random_pairs": 4,
    "bootstrap": 100,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], torch.Tensor]:
    root = tmp_path_factory.mktemp("learned")
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3,
             "max_position_embeddings": 512}  # fmt: skip
    made = planted_pair(BLOCK, size=1.0, **shape)
    base, tuned = made.save(root)
    run = root / "run"
    pairs, start = World(0).pairs(sum(SIZES.values())), 0
    examples = encode_pairs(pairs, made.tokenizer)
    before, after = (pair_likelihoods(model, examples) for model in (made.base, made.tuned))
    pairs = [  # preferred is what b makes likelier
        pair if margin > 0 else replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        for pair, margin in zip(pairs, reward_margins(after, before, 1.0), strict=True)
    ]
    (run / "data").mkdir(parents=True)
    for split, size in SIZES.items():
        write_pairs(run / "data" / f"{split}.jsonl", pairs[start : start + size])
        start += size
    settings = {
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
        "activations": {"noise_floor_prompts": 2, "response_tokens": 0},
        "behaviour": {"beta": BETA},
        "learned": LEARNED,
    }
    measure(run, "activations", "vector", **settings)
    return run, settings, made.b


@pytest.fixture(scope="module")
def found(planted: tuple[Path, dict[str, Any], torch.Tensor]) -> Json:
    run, settings, _ = planted
    return measure(run, "learned", figures=True, **settings)


@pytest.fixture
def copied(planted, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The stage's inputs, in a run of its own."""
    run, settings, _ = planted
    for stage in ("data", "activations", "vector"):
        shutil.copytree(run / stage, tmp_path / "run" / stage)
    return tmp_path / "run", json.loads(json.dumps(settings))


def test_v_star_is_the_tuned_model_where_it_was_planted(found: Json) -> None:
    assert list(found["sites"]) == [SITE]
    here = found["sites"][SITE]
    assert (here["positions"], here["chosen_on"]) == ("all", "tune")
    own = here["arms"]["vector"]["metrics"]
    # b is rounded twice: into the float32 weights, and into v*
    for name in ("kl_recovered", "kl_recovered_first"):
        assert own[name]["value"] == pytest.approx(1, abs=1e-3)
        assert here["tuned"][name] == 1.0
    for name in ("reward_margin", "loss", "kl_to_base"):
        assert own[name]["value"] == pytest.approx(here["tuned"][name]["value"], rel=1e-3)
    assert here["arms"]["vector_least_kl"]["strength"] == 1.0


def test_the_tuned_models_rewards_are_those_of_dpos_own_evaluation(planted, found: Json) -> None:
    run, settings, _ = planted
    models = settings["models"]
    pair = ModelPair.load(models["base"], models["tuned"], device="cpu")
    examples = encode_pairs(read_pairs(run / "data" / "test.jsonl"), pair.tokenizer)
    theirs = evaluate(pair.tuned, pair.base, examples, beta=BETA, seed=0)
    tuned = found["sites"][SITE]["tuned"]
    # log-probabilities of float32 logits, summed over some hundred tokens
    assert tuned["reward_margin"]["value"] == pytest.approx(theirs.reward_margin.value, abs=1e-3)
    assert tuned["preference_accuracy"]["value"] == theirs.reward_accuracy.value
    assert tuned["kl_to_base"]["value"] == pytest.approx(theirs.kl_to_base.value, rel=1e-3)


def test_what_was_learned(planted, found: Json) -> None:
    run, _, b = planted
    arms = found["sites"][SITE]["arms"]
    learned = {name: arm for name, arm in arms.items() if "curve" in arm}
    assert list(learned) == [
        "learned_zero", "learned_zero_bounded", "learned_vector", "learned_vector_bounded"
    ]  # fmt: skip
    for name, arm in learned.items():
        vector = SteeringVectorSet.load(run / "learned" / "vectors" / f"{SITE}-{name}.safetensors")
        v = vector[SITE].tensor
        assert arm["norm"] == pytest.approx(float(v.norm()), rel=1e-6)
        cosine = float(v @ b.double() / (v.norm() * b.double().norm()))
        assert arm["cosine"] == pytest.approx(cosine, abs=1e-5)
        losses = {row["step"]: row["heldout"]["loss"] for row in arm["curve"]}
        assert list(losses) == [0, 2, 4, 6]
        assert losses[arm["chosen_step"]] == min(losses.values())
        if name.endswith("bounded"):
            assert arm["norm"] <= found["sites"][SITE]["vector_norm"] * (1 + 1e-6)
        gap = arm["metrics"]["loss"]["value"] - arms["vector"]["metrics"]["loss"]["value"]
        assert arm["against"]["vector"]["loss"]["value"] == pytest.approx(gap, abs=1e-9)
    zero = learned["learned_zero"]["curve"][0]["heldout"]
    assert zero["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert learned["learned_vector"]["curve"][0]["norm"][SITE] == pytest.approx(1.0, rel=1e-3)
    headline = found["headline"]
    assert headline["reward_margin"] == learned["learned_zero"]["metrics"]["reward_margin"]["value"]
    assert headline["beats_vector"] in {"yes", "no", "not told apart"}


def test_controls(found: Json) -> None:
    here = found["sites"][SITE]
    low, high = here["cosine_null"]["low"], here["cosine_null"]["high"]
    # the cosine of random directions has variance 1/d; 1000 draws
    assert high == pytest.approx(1.96 / math.sqrt(WIDTH), rel=0.15)
    assert low == pytest.approx(-high, rel=0.2)
    for name in ("vector", here["learned"]):
        band = here["random"][name]
        assert band["norm"] == pytest.approx(here["arms"][name]["norm"], rel=1e-6)
        assert (band["draws"], band["pairs"]) == (20, 4)
        for metric in band["metrics"].values():
            assert metric["low"] <= metric["mean"] <= metric["high"]
        assert band["metrics"]["kl_recovered"]["high"] < 0.9


def test_a_kill_ends_with_the_same_result(planted, copied, found: Json) -> None:
    """Learning that was finished is read from its checkpoint, what is missing is done again."""
    run, settings = copied
    shutil.copytree(planted[0] / "learned" / "checkpoints", run / "learned" / "checkpoints")
    (run / "learned" / "checkpoints" / f"{SITE}-learned_vector.safetensors").unlink()
    assert measure(run, "learned", **settings) == found
    assert "/" not in json.dumps([arm["label"] for arm in found["sites"][SITE]["arms"].values()])
    assert str(run.parent) not in json.dumps(found)


def test_named_sites_and_tokens(copied) -> None:
    run, settings = copied
    settings["learned"] |= {
        "sites": ["resid_post.2", "final_norm"], "positions": "prompt_last", "starts": ["zero"],
        "max_norm": ["vector"], "split": "train", "steps": 2,
    }  # fmt: skip
    found = measure(run, "learned", **settings)
    assert list(found["sites"]) == ["resid_post.2", "final_norm"]
    assert found["n_fit"] == SIZES["train"]
    for here in found["sites"].values():
        assert (here["positions"], here["chosen_on"]) == ("prompt_last", "given")
        assert here["learned"] == "learned_zero_bounded"
    assert any("act on the first token of an answer alone" in note for note in found["notes"])
    assert any("same logit bias" in note for note in found["notes"])


def test_mistakes(copied) -> None:
    run, settings = copied

    def ask(**changes: Any) -> Json:
        return measure(run, "learned", **{**settings, "learned": {**LEARNED, **changes}})

    with pytest.raises(MeasurementError, match=r"v\* at resid_post\.0 is zero"):
        ask(sites=["resid_post.0"])
    with pytest.raises(ConfigError, match="has 3 blocks"):
        ask(sites=["resid_post.7"])
    with pytest.raises(DataError, match="none of which fits into 9 tokens"):
        ask(max_length=9)
    path = run / "vector" / "vectors.safetensors"
    vectors = SteeringVectorSet.load(path)
    SteeringVectorSet([vectors["final_norm"]]).save(path)
    with pytest.raises(MeasurementError, match=r"the run holds no v\* there"):
        ask(sites=[SITE])
    SteeringVectorSet([SteeringVector(np.zeros(WIDTH), SITE)]).save(path)
    with pytest.raises(MeasurementError, match=r"v\* is zero at every site"):
        ask()
