"""The stage ``profile`` on planted truth: b after one block is all that training did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured import measure
from planted import planted_pair
from seq2seq_models import eos_tokenizer, planted_seq2seq

from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.synthetic import World
from dsteer.errors import ConfigError
from dsteer.models.load import quiet
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, read_tensors
from dsteer.training.evaluate import pair_likelihoods, reward_margins
from dsteer.training.examples import Example, encode_pairs

BLOCK, WIDTH, SITE = 1, 16, "resid_post.1"
SITES = ("resid_post.0", SITE, "resid_post.2", "final_norm")
SIZES = {"fit": 6, "tune": 4, "test": 6}
BETA = 0.5
SETTINGS: dict[str, Any] = {
    "activations": {"noise_floor_prompts": 2, "response_tokens": 0},
    "behaviour": {"beta": BETA},
    "profile": {
        "pairs": 6, "tune_pairs": 4, "fit_pairs": 4, "response_tokens": 6, "random_pairs": 3,
        "bootstrap": 100,
    },
}  # fmt: skip


def write_splits(run: Path) -> None:
    pairs, start = World(0).pairs(sum(SIZES.values())), 0
    (run / "data").mkdir(parents=True)
    for split, size in SIZES.items():
        write_pairs(run / "data" / f"{split}.jsonl", pairs[start : start + size])
        start += size


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("profile")
    made = planted_pair(BLOCK, size=1.0, hidden_size=WIDTH, intermediate_size=24,
                        num_hidden_layers=3, max_position_embeddings=512)  # fmt: skip
    base, tuned = made.save(root)
    run = root / "run"
    write_splits(run)
    settings = {
        **SETTINGS,
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
    }
    measure(run, "activations", "vector", **settings)
    return run, settings, made


@pytest.fixture(scope="module")
def found(planted) -> Json:
    run, settings, _ = planted
    return measure(run, "profile", figures=True, **settings)


def test_the_profile_names_the_planted_block(found: Json) -> None:
    before, at, after, last = (found["sites"][site]["all"] for site in SITES)
    # no displacement: nothing is put in, and there is no v*
    assert before["patched"]["kl_recovered"]["value"] == pytest.approx(0, abs=1e-6)
    assert before["v"] is before["v_here"] is before["random"] is before["efficiency"] is None
    assert "zero or absent" in before["efficiency_why"]
    # float32 rounding of states and weights: KL is second order in it
    for kind in ("patched", "v", "v_here"):
        assert at[kind]["kl_recovered"]["value"] == pytest.approx(1, abs=1e-5)
    assert at["efficiency"]["value"] == pytest.approx(1, abs=1e-5)
    for row in (after, last):
        assert row["patched"]["kl_recovered"]["value"] == pytest.approx(1, abs=1e-5)
        assert row["efficiency"]["value"] < 0.999
    assert found["peak"]["all"]["site"] == SITE
    assert found["chosen"] == {"site": SITE, "tokens": "all", "on": "tune"}
    assert found["readout_share"]["value"] == pytest.approx(0, abs=1e-5)  # the heads are the same
    assert found["headline"]["efficiency"] == at["efficiency"]["value"]
    assert at["random"]["kl_recovered"]["high"] < 0.9
    assert (at["random"]["draws"], at["random"]["pairs"]) == (20, 3)
    assert not any(row["inert"] for site in SITES for row in found["sites"][site].values())


def test_margins_are_those_of_dpos_own_evaluation(planted, found: Json) -> None:
    run, _, made = planted
    examples = encode_pairs(read_pairs(run / "data" / "test.jsonl"), made.tokenizer)
    cut = [
        Example(e.prompt, e.chosen[:6], e.rejected[:6], e.split_token, e.conversation)
        for e in examples
    ]
    before, after = (pair_likelihoods(model, cut) for model in (made.base, made.tuned))
    want = np.asarray(reward_margins(after, before, BETA))
    tensors = read_tensors(run / "profile" / "pairs.safetensors")
    assert tensors["margin.tuned"].shape == (SIZES["test"],)
    # log-probabilities of float32 logits, summed over 6 tokens
    np.testing.assert_allclose(tensors["margin.tuned"], want, atol=1e-4)
    # b at its block is the tuned model
    for kind in ("v", "patched"):
        np.testing.assert_allclose(tensors[f"margin.all.{kind}"][1], want, atol=1e-4)
    at = found["sites"][SITE]["all"]["v"]["reward_margin"]
    assert at["value"] == pytest.approx(want.mean(), abs=1e-4)
    assert np.isnan(tensors["margin.all.v"][0]).all()
    assert np.isfinite(tensors["margin.all.patched"]).all()
    assert found["conversations"] == [p.conversation for p in read_pairs(run / "data/test.jsonl")]


def test_one_prompt_token_is_scored_on_the_first_answer_token(planted, found: Json) -> None:
    """Against a hook written by hand, and KL in float64 from the model's own logits."""
    run, _, made = planted
    site, block = "resid_post.2", 2
    v = SteeringVectorSet.load(run / "vector" / "vectors.safetensors")[site].tensor.float()
    sums = {"base": 0.0, "v": 0.0, "patched": 0.0}
    for example in encode_pairs(read_pairs(run / "data" / "test.jsonl"), made.tokenizer):
        ids = torch.tensor([list(example.prompt)])
        layer, states = made.base.model.layers[block], []
        with torch.no_grad():
            handle = made.tuned.model.layers[block].register_forward_hook(
                lambda _m, _i, out: states.append(out[0, -1].clone())  # noqa: B023
            )
            p = made.tuned(ids).logits[0, -1].double().log_softmax(-1)
            handle.remove()
            for kind in sums:

                def hook(_m, _i, out, kind=kind, tuned=states[0]):
                    if kind != "base":
                        out = out.clone()
                        out[0, -1] = tuned if kind == "patched" else out[0, -1] + v
                    return out

                handle = layer.register_forward_hook(hook)
                q = made.base(ids).logits[0, -1].double().log_softmax(-1)
                handle.remove()
                sums[kind] += float((p.exp() * (p - q)).sum())
    row = found["sites"][site]["prompt_last"]
    for kind in ("v", "patched"):
        want = 1 - sums[kind] / sums["base"]
        assert row[kind]["kl_recovered"]["value"] == pytest.approx(want, abs=1e-3)  # float32 logits
    assert row["v_here"] is None  # v* is of that token
    gain = {kind: sums["base"] - sums[kind] for kind in ("v", "patched")}
    assert row["efficiency"]["value"] == pytest.approx(gain["v"] / gain["patched"], abs=1e-3)


def test_the_choice_is_made_on_tune_alone(planted, tmp_path: Path) -> None:
    """v* is what suits the site on tune pairs, whatever the test pairs say."""
    run, settings, made = planted
    copy = tmp_path / "run"
    (copy / "vector").mkdir(parents=True)
    (copy / "data").mkdir()
    for split in SIZES:
        text = (run / "data" / f"{split}.jsonl").read_bytes()
        (copy / "data" / f"{split}.jsonl").write_bytes(text)
    settings = {**settings, "profile": {**settings["profile"], "tokens": ["all"],
                                        "sites": ["resid_post.1", "resid_post.2"]}}  # fmt: skip
    vectors = SteeringVectorSet.load(run / "vector" / "vectors.safetensors")

    def chosen(at_one: torch.Tensor) -> Json:
        SteeringVectorSet([SteeringVector(at_one, SITE), vectors["resid_post.2"]]).save(
            copy / "vector" / "vectors.safetensors"
        )
        return measure(copy, "profile", **settings)

    first = chosen(made.b)
    assert first["chosen"]["site"] == SITE
    kept = (copy / "data" / "test.jsonl").read_bytes()
    (copy / "data" / "test.jsonl").write_bytes((copy / "data" / "tune.jsonl").read_bytes())
    assert chosen(made.b)["chosen"] == first["chosen"]
    (copy / "data" / "test.jsonl").write_bytes(kept)
    assert chosen(-made.b)["chosen"]["site"] == "resid_post.2"


def test_models_that_agree_have_no_profile(planted, tmp_path: Path) -> None:
    _, settings, _ = planted
    copy = tmp_path / "run"
    write_splits(copy)
    base = settings["models"]["base"]
    settings = {**settings, "models": {"base": base, "tuned": base, "device": "cpu"}}
    (copy / "vector").mkdir()
    zeros = [SteeringVector(np.zeros(WIDTH), site) for site in SITES]
    SteeringVectorSet(zeros).save(copy / "vector" / "vectors.safetensors")
    same = measure(copy, "profile", figures=True, **settings)
    assert same["chosen"] is None
    assert same["readout_share"] is None
    assert set(same["peak"].values()) == {None}
    for rows in same["sites"].values():
        for row in rows.values():
            assert row["patched"]["kl_recovered"] is None
            assert row["patched"]["reward_margin"]["value"] == pytest.approx(0, abs=1e-5)
            assert row["v"] is row["efficiency"] is None
    assert any("No site was chosen" in note for note in same["notes"])
    assert str(tmp_path) not in json.dumps(same)


def test_encoder_decoder_pairs(tmp_path: Path) -> None:
    base, tuned, _ = planted_seq2seq("mbart", BLOCK)
    for model, name in ((base, "base"), (tuned, "tuned")):
        with quiet():
            model.save_pretrained(tmp_path / name)
        eos_tokenizer().save_pretrained(tmp_path / name)
    run = tmp_path / "run"
    write_splits(run)
    settings = {**SETTINGS, "models": {"base": str(tmp_path / "base"), "device": "cpu",
                                       "tuned": str(tmp_path / "tuned")}}  # fmt: skip
    measure(run, "activations", "vector", **settings)
    found = measure(run, "profile", **settings)
    assert list(found["sites"]) == list(SITES)
    assert found["peak"]["all"]["site"] == found["chosen"]["site"] == SITE
    # float32 rounding, in KL of second order
    assert found["sites"][SITE]["all"]["efficiency"]["value"] == pytest.approx(1, abs=1e-4)
    assert any("the decoder's" in note for note in found["notes"])


def test_a_site_that_is_not_there(planted) -> None:
    run, settings, _ = planted
    settings = {**settings, "profile": {**settings["profile"], "sites": ["resid_post.9"]}}
    with pytest.raises(ConfigError, match="has 3 blocks"):
        measure(run, "profile", **settings)
