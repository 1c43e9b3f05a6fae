"""The stage ``transfer``: planted truth (B is A in another basis and vocabulary), two models that
have nothing to do with each other, and each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured import context, measure
from planted import tiny_llama
from rotated import rotated_pair, save

from dsteer.config import BaseConfig, TinyModelConfig
from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.synthetic import World
from dsteer.data.tokens import encode
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, DsteerError, MeasurementError, ModelError
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.steering.intervene import steer
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, read_json
from dsteer.training.language_model import pack, preference_texts, train_language_model
from dsteer.transfer.share import NULLS

BLOCK, WIDTH = 1, 48
SITE = f"resid_post.{BLOCK}"
SIZES = {"train": 60, "fit": 8, "tune": 6, "test": 12}
KEYS = {
    "sender", "receiver", "text", "candidates", "chosen", "chosen_on", "chosen_by", "positions",
    "native_best", "null_choices", "natural_norm", "strengths", "pairs", "cosine", "null_labels",
    "metrics", "headline", "notes",
}  # fmt: skip
METRICS = {"kl_recovered", "first_token", "reward_margin", "reward_accuracy"}
TRANSFER: dict[str, Any] = {
    "text_tokens": 5000,
    "text_length": 120,
    "strengths": [0.25, 1.0, 2.0],
    "tune_pairs": 6,
    "choice_pairs": 3,
    "pairs": 12,
    "response_tokens": 6,
    "max_tokens": 48,
    "shuffles": 3,
    "bootstrap": 200,
}


def write_data(run: Path, sizes: dict[str, int] = SIZES) -> None:
    """Splits of the synthetic world."""
    pairs = World(0).pairs(sum(sizes.values()))
    (run / "data").mkdir(parents=True)
    start = 0
    for split, size in sizes.items():
        write_pairs(run / "data" / f"{split}.jsonl", pairs[start : start + size])
        start += size


def settings(
    receiver: tuple[Path, Path], base: Path, tuned: Path | None = None, **transfer: Any
) -> dict[str, Any]:
    if tuned is not None:
        transfer["tuned"] = str(tuned)
    return {
        "models": {"base": str(receiver[0]), "tuned": str(receiver[1]), "device": "cpu"},
        "activations": {"noise_floor_prompts": 2, "response_tokens": 0, "max_tokens": 64},
        "transfer": {**TRANSFER, "base": str(base), **transfer},
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """A run of B with its vectors, the settings of its transfer, and R b."""
    root = tmp_path_factory.mktemp("rotated")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 3, "max_position_embeddings": 512}
    a, b, _ = rotated_pair(BLOCK, **shape)
    folders = save(a, root / "a"), save(b, root / "b")
    run = root / "run"
    write_data(run)
    whole = settings(folders[1], *folders[0])
    measure(run, "activations", "vector", **whole)
    return run, whole, b.b


@pytest.fixture(scope="module")
def carried(planted: tuple[Path, dict[str, Any], torch.Tensor]) -> Json:
    run, whole, _ = planted
    return measure(run, "transfer", **whole)


@pytest.fixture
def copied(
    planted: tuple[Path, dict[str, Any], torch.Tensor], tmp_path: Path
) -> tuple[Path, dict[str, Any]]:
    """The stage's inputs, in a run of its own."""
    run, whole, _ = planted
    for stage in ("data", "activations", "vector"):
        shutil.copytree(run / stage, tmp_path / "run" / stage)
    return tmp_path / "run", json.loads(json.dumps(whole))


def test_the_rotated_pair_is_the_same_pair() -> None:
    a, b, R = rotated_pair(BLOCK, hidden_size=WIDTH, num_hidden_layers=3)
    text = "\n\nHuman: Which bread keeps longest?\n\nAssistant:"
    (of_a,), (of_b,) = encode(a.tokenizer, [text]), encode(b.tokenizer, [text])
    assert of_a.ids != of_b.ids
    with torch.no_grad():
        for mine, other in ((a.base, b.base), (a.tuned, b.tuned)):
            own = mine(torch.tensor([of_a.ids]), output_hidden_states=True)
            turned = other(torch.tensor([of_b.ids]), output_hidden_states=True)
            for h, g in zip(own.hidden_states, turned.hidden_states, strict=True):
                # float32 weights, each rounded once more
                torch.testing.assert_close(g, (h.double() @ R.T).float(), atol=1e-3, rtol=1e-4)
            chosen = own.logits[0, -1].argmax(), turned.logits[0, -1].argmax()
            assert a.tokenizer.decode([chosen[0]]) == b.tokenizer.decode([chosen[1]])


def test_planted_truth_is_carried_over(
    planted: tuple[Path, dict[str, Any], torch.Tensor], carried: Json
) -> None:
    run, _, turned = planted
    assert carried["chosen"]["sender_site"] == carried["chosen"]["receiver_site"] == SITE
    assert carried["positions"] == "all"
    assert carried["cosine"]["carried"] > 0.99
    vector = SteeringVectorSet.load(run / "transfer" / "carried.safetensors")[SITE]
    assert vector.metadata == {"sender_site": SITE, "map": carried["chosen"]["map"]}
    # against R b itself, not against what was measured of B
    cosine = torch.cosine_similarity(vector.tensor, turned.double(), dim=0)
    assert float(cosine) > 0.9999
    assert vector.norm == pytest.approx(float(turned.norm()), rel=1e-4)
    assert carried["chosen"]["carried_norm"] == pytest.approx(2, rel=1e-3)
    assert carried["chosen"]["r_squared"] == pytest.approx(1, abs=1e-6)
    for metric in ("kl_recovered", "first_token"):
        for level in ("one", "tuned"):
            found = carried["metrics"][metric][level]
            assert found["native"]["value"] == pytest.approx(1, abs=1e-6)
            assert found["share"]["low"] > 0.95
            assert found["share"]["value"] == pytest.approx(1, abs=1e-4)
            assert found["above_nulls"] is True
    assert carried["strengths"]["tuned"]["native"] == [1.0]
    assert carried["strengths"]["tuned"]["carried"] == [1.0]


def test_nulls_stay_near_zero(carried: Json) -> None:
    assert set(carried["cosine"]["nulls"]) == set(NULLS)
    for band in carried["cosine"]["nulls"].values():
        # of random directions in 48 dimensions, the cosine has the standard deviation 0.14
        assert abs(band["mean"]) < 0.3
        assert max(abs(band["low"]), abs(band["high"])) < 0.5
    assert carried["cosine"]["above_nulls"] is True
    for metric in ("kl_recovered", "first_token"):
        for name, band in carried["metrics"][metric]["one"]["nulls"].items():
            # the best of their choices is to steer one token only: of the whole answer's KL it
            # changes little, the first token's it may as much as double
            least = -0.2 if metric == "kl_recovered" else -1.2
            assert least < band["share"]["low"] <= band["share"]["high"] < 0.1, name
        for name, band in carried["metrics"][metric]["tuned"]["nulls"].items():
            # at the best of their strengths, of which the smallest is a quarter
            assert abs(band["share"]["mean"]) < 0.1, name
            assert max(-band["share"]["low"], band["share"]["high"]) < 0.15, name
            assert len(carried["strengths"]["tuned"][name]) == band["share"]["draws"]


def test_every_key_is_there(
    planted: tuple[Path, dict[str, Any], torch.Tensor], carried: Json
) -> None:
    run, _, _ = planted
    assert set(carried) == KEYS
    assert set(carried["metrics"]) == METRICS
    assert carried["metrics"]["kl_recovered"]["one"]["nulls"]["random"]["share"]["draws"] == 20
    assert (
        carried["metrics"]["kl_recovered"]["one"]["nulls"]["mapped_random"]["effect"]["draws"] == 20
    )
    assert carried["pairs"] == {"choice": 3, "tune": 6, "test": 12, "written": False}
    assert carried["sender"]["norms"].keys() == {SITE, "resid_post.2"}
    assert carried["text"]["source"] == "the train split"
    assert sum(carried["text"]["positions"].values()) > 500
    kinds = {row["map"] for row in carried["candidates"]}
    assert kinds == {"ridge", "procrustes", "cca"}
    assert len(carried["candidates"]) == 2 * 2 * 3
    assert any("zero, and left out, at resid_post.0" in note for note in carried["notes"])
    text = json.dumps(carried)
    assert str(run.parent) not in text, "a path of the machine"
    assert "NaN" not in text
    # a share of an effect that may be none is undefined, and said to be
    for name in ("reward_margin", "reward_accuracy"):
        found = carried["metrics"][name]["one"]
        if found["native"]["low"] <= 0:
            assert found["share"] is None
            assert "includes 0" in found["why"]
            assert any(f"share of {name} at λ = 1 is undefined" in n for n in carried["notes"])


def test_the_choice_was_the_best_on_tune(carried: Json) -> None:
    best = max(row["kl_recovered_tune"] for row in carried["candidates"])
    assert carried["chosen"]["kl_recovered_tune"] == pytest.approx(best, abs=1e-8)
    assert carried["chosen"] in carried["candidates"]


def test_the_native_best_is_the_block_where_the_models_part(carried: Json) -> None:
    for level in ("one", "tuned"):
        best = carried["native_best"][level]
        assert (best["receiver_site"], best["positions"], best["strength"]) == (SITE, "all", 1)


def test_a_null_goes_through_the_choice_of_the_carried_vector(
    planted: tuple[Path, dict[str, Any], torch.Tensor],
    copied: tuple[Path, dict[str, Any]],
    carried: Json,
) -> None:
    """The first random direction of A, given as the sender's vector, is chosen as the null was; and
    a sender that knows nothing is not above its nulls."""
    run, whole = copied
    seed = context(run, "transfer", **whole).seed
    path = run / "random.safetensors"
    SteeringVectorSet(
        [
            SteeringVector(
                np.random.default_rng(seed("directions of A", site)).standard_normal((20, WIDTH))[
                    0
                ],
                site,
            )
            for site in carried["sender"]["norms"]
        ]
    ).save(path)
    del whole["transfer"]["tuned"]
    whole["transfer"]["vectors"] = str(path)
    result = measure(run, "transfer", **whole)
    null = carried["null_choices"]["mapped_random"][0]
    for key in ("sender_site", "receiver_site", "map", "positions"):
        assert result["chosen"][key] == null[key]
    assert result["chosen"]["kl_recovered_tune"] == pytest.approx(
        null["kl_recovered_tune"], abs=1e-6
    )
    for metric in ("kl_recovered", "first_token"):
        for level in ("one", "tuned"):
            assert result["metrics"][metric][level]["above_nulls"] is False
    assert result["cosine"]["above_nulls"] is False
    # the choice that suits it is poor for the native vector, and the ceiling is not
    found = result["metrics"]["kl_recovered"]["one"]
    assert found["native_best"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["native"]["value"] < 0.5
    assert result["headline"]["share"] == pytest.approx(found["carried"]["value"], abs=1e-6)


def test_kl_recovered_is_what_the_models_themselves_give(
    planted: tuple[Path, dict[str, Any], torch.Tensor], carried: Json
) -> None:
    """Plain passes of whole models with a hook, text by text, in float64."""
    run, whole, _ = planted
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = (
        AutoModelForCausalLM.from_pretrained(whole["models"][which]).eval()
        for which in ("base", "tuned")
    )
    tokenizer = AutoTokenizer.from_pretrained(whole["models"]["base"])
    texts = encode(
        tokenizer,
        read_pairs(run / "data" / "test.jsonl"),
        max_tokens=TRANSFER["max_tokens"],
        response="chosen",
        response_tokens=TRANSFER["response_tokens"],
    )
    vector = SteeringVectorSet.load(run / "transfer" / "carried.safetensors")[SITE]
    other = SteeringVector(vector.tensor.flip(0), SITE)
    sums = {"base": 0.0, "carried": 0.0, "other": 0.0}
    for item in texts:
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            aim = tuned(ids).logits[0, item.prompt_length - 1 : -1].double().log_softmax(-1)
            for name, v in (("base", None), ("carried", vector), ("other", other)):
                if v is None:
                    logits = base(ids).logits
                else:
                    with steer(base, v, strength=1.0, positions="all"):
                        logits = base(ids).logits
                log_q = logits[0, item.prompt_length - 1 : -1].double().log_softmax(-1)
                sums[name] += float((aim.exp() * (aim - log_q)).sum())
    wanted = 1 - sums["carried"] / sums["base"]
    measured_value = carried["metrics"]["kl_recovered"]["one"]["carried"]["value"]
    assert measured_value == pytest.approx(wanted, abs=1e-6)
    assert 1 - sums["other"] / sums["base"] < 0.3, "the direction matters, not the size"


def test_vectors_of_a_file_and_named_sites(
    copied: tuple[Path, dict[str, Any]], planted: Any
) -> None:
    run, whole = copied
    sender = SteeringVectorSet.load(planted[0] / "transfer" / "sender.safetensors")
    path = run / "from_elsewhere.safetensors"
    SteeringVectorSet([SteeringVector(2 * sender[SITE].tensor, SITE)]).save(path)
    del whole["transfer"]["tuned"]
    whole["transfer"] |= {
        "vectors": str(path),
        "maps": ["procrustes"],
        "components": [WIDTH],
        "receiver_sites": [SITE, "final_norm"],
    }
    result = measure(run, "transfer", **whole)
    assert {row["receiver_site"] for row in result["candidates"]} == {SITE, "final_norm"}
    assert {row["map"] for row in result["candidates"]} == {"procrustes"}
    assert result["cosine"]["carried"] > 0.99
    assert result["chosen"]["carried_norm"] == pytest.approx(4, rel=1e-3)
    assert result["natural_norm"] == pytest.approx(2, rel=1e-3)
    assert result["metrics"]["kl_recovered"]["one"]["share"]["value"] > 0.95
    assert result["sender"]["vectors"] == "from_elsewhere.safetensors"
    assert result["sender"]["tuned"] is None


def test_prompts_without_answers(copied: tuple[Path, dict[str, Any]]) -> None:
    run, whole = copied
    for split in ("train", "fit", "tune", "test"):
        path = run / "data" / f"{split}.jsonl"
        bare = [
            PreferencePair(pair.prompt, conversation=pair.conversation) for pair in read_pairs(path)
        ]
        write_pairs(path, [] if split == "train" else bare)
    whole["transfer"] |= {
        "maps": ["ridge"],
        "positions": "all",
        "sender_sites": [SITE],
        "receiver_sites": [SITE],
        "text": {"format": "synthetic", "conversations": 40, "seed": 3},
    }
    result = measure(run, "transfer", **whole)
    assert result["pairs"]["written"] is True
    assert result["text"]["source"] == "synthetic"
    assert result["metrics"]["kl_recovered"]["one"]["share"]["value"] > 0.95
    assert result["metrics"]["reward_margin"] is None
    assert result["metrics"]["reward_accuracy"] is None
    assert "reward_margin is undefined: the test pairs have no rejected answers." in result["notes"]


def test_what_was_read_is_not_read_again(
    copied: tuple[Path, dict[str, Any]], carried: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = copied
    from dsteer.transfer import study

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study._Run, "_candidates", killed)
        with pytest.raises(KeyboardInterrupt):
            measure(run, "transfer", **whole)
    assert not (run / "transfer" / "result.json").exists()
    monkeypatch.setattr(study, "read_states", killed)
    assert measure(run, "transfer", **whole) == carried


def other_model(folder: Path, width: int, vocabulary: int, texts: list[str]) -> tuple[Path, Path]:
    """A tiny model trained on texts, and the same after a little more training on polite ones."""
    tokenizer = build_tokenizer(texts, vocabulary)
    shape = TinyModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = build_model(shape, tokenizer, width)
    chosen = [str(pair.prompt) + str(pair.chosen) for pair in World(1).pairs(60)]
    for name, read, rate in (("base", texts, 5e-3), ("tuned", chosen, 5e-3)):
        config = BaseConfig(
            model=shape, steps=12, batch_size=4, context_length=48, warmup_steps=1,
            learning_rate=rate,
        )  # fmt: skip
        train_language_model(
            model,
            pack(read, tokenizer, 48, 0),
            config,
            checkpoint=folder / f"{name}.safetensors",
            seed=width,
            device=torch.device("cpu"),
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "base", folder / "tuned"


def test_two_models_of_their_own(tmp_path: Path) -> None:
    """Other widths, vocabularies, tokenizers and training: whatever comes out, with its nulls."""
    texts = preference_texts(World(0).pairs(80))
    sender = other_model(tmp_path / "a", 32, 400, texts[:80])
    receiver = other_model(tmp_path / "b", 24, 330, texts[80:])
    run = tmp_path / "run"
    write_data(run)
    whole = settings(receiver, *sender, text_length=60, maps=["ridge"])
    measure(run, "activations", "vector", **whole)
    result = measure(run, "transfer", figures=True, **whole)
    assert result == read_json(run / "transfer" / "result.json")
    assert (result["sender"]["width"], result["receiver"]["width"]) == (32, 24)
    own, vector = (
        SteeringVectorSet.load(run / stage / name)[result["chosen"]["receiver_site"]]
        for stage, name in (("vector", "vectors.safetensors"), ("transfer", "carried.safetensors"))
    )
    cosine = torch.cosine_similarity(own.tensor, vector.tensor, dim=0)
    assert result["cosine"]["carried"] == pytest.approx(float(cosine), abs=1e-6)
    assert vector.norm == pytest.approx(own.norm, rel=1e-6)
    assert result["text"]["tokens"]["sender"] != result["text"]["tokens"]["receiver"]
    for row in result["candidates"]:
        assert row["r_squared"] < 1
        assert np.isfinite(row["kl_recovered_tune"])
    for metric in result["metrics"].values():
        for found in metric.values():
            assert (found["share"] is None) == (found["why"] is not None)
            assert set(found["nulls"]) == set(NULLS)
            for band in found["nulls"].values():
                assert band["effect"]["low"] <= band["effect"]["mean"] <= band["effect"]["high"]
            highest = max(band["effect"]["high"] for band in found["nulls"].values())
            assert found["above_nulls"] == (found["carried"]["low"] > max(highest, 0))
            assert found["harms"] == (found["carried"]["high"] < 0)
    drawn = read_json(run / "transfer" / "figures" / "share_of_native.json")
    for level, metrics in drawn["levels"].items():
        for name, shown in metrics.items():
            share = result["metrics"][name][level]["share"]
            assert (shown is None) == (share is None)
            if share is not None:
                assert shown["share"]["value"] == share["value"]


# ---------------------------------------------------------------------------------- mistakes


def failing(
    copied: tuple[Path, dict[str, Any]], error: type[DsteerError], words: str, **changes: Any
) -> None:
    run, whole = copied
    whole["transfer"] |= changes
    whole["transfer"] = {key: x for key, x in whole["transfer"].items() if x is not None}
    with pytest.raises(error, match=words) as caught:
        measure(run, "transfer", **whole)
    assert "\n" not in str(caught.value)
    assert not (run / "transfer" / "result.json").exists()


def test_a_site_without_a_vector(copied: tuple[Path, dict[str, Any]]) -> None:
    failing(
        copied,
        MeasurementError,
        r"transfer\.receiver_sites: resid_post\.9: the receiver has no v\* there; name some of",
        receiver_sites=["resid_post.9"],
    )


def test_a_site_that_the_sender_lacks(copied: tuple[Path, dict[str, Any]]) -> None:
    failing(
        copied, ConfigError, "'resid_post.9': the model has 3 blocks", sender_sites=["resid_post.9"]
    )


def test_a_site_where_nothing_changed(copied: tuple[Path, dict[str, Any]]) -> None:
    failing(
        copied,
        MeasurementError,
        r"the sender's v\* is zero at every site that was asked for \(resid_post\.0\)",
        sender_sites=["resid_post.0"],
    )


def test_vectors_of_another_width(copied: tuple[Path, dict[str, Any]]) -> None:
    path = copied[0] / "narrow.safetensors"
    SteeringVectorSet([SteeringVector(torch.ones(8), SITE)]).save(path)
    failing(
        copied,
        MeasurementError,
        "narrow.safetensors has vectors of width 8, and base states of width 48",
        tuned=None,
        vectors=str(path),
    )


def test_too_little_text(copied: tuple[Path, dict[str, Any]]) -> None:
    failing(copied, DataError, "has 1 texts in which both", text_tokens=5)


def test_no_room_for_prompts(copied: tuple[Path, dict[str, Any]]) -> None:
    failing(
        copied, DataError, "transfer.response_tokens: 600 tokens leave no room", response_tokens=600
    )


def test_receivers_that_agree(copied: tuple[Path, dict[str, Any]]) -> None:
    """v* says that they differ, but the models that are read now do not."""
    run, whole = copied
    whole["models"]["tuned"] = whole["models"]["base"]
    failing((run, whole), MeasurementError, "predict the same on the tune pairs")


def test_a_tokenizer_of_another_model(copied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    small = tiny_llama(vocab_size=100, hidden_size=WIDTH, num_hidden_layers=3)
    small.save_pretrained(tmp_path / "small")
    failing(
        copied,
        ModelError,
        "the models have only 100 tokens; give the tokenizer that belongs to them",
        base=str(tmp_path / "small"),
        tuned=str(tmp_path / "small"),
        tokenizer=copied[1]["transfer"]["base"],
    )
