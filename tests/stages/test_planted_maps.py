"""The stages maps and strength beside scipy on a real model's logits, norm growth, and mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, byte_tokenizer, planted_pair, tiny_llama
from scipy.optimize import minimize_scalar

from dsteer.behaviour.answers import Answers
from dsteer.config import read_pipeline
from dsteer.data.jsonl import read_pairs
from dsteer.errors import DsteerError
from dsteer.models.pair import ModelPair
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import read_json

BLOCK, SITE = 1, "resid_post.1"
SHAPE = {"max_position_embeddings": 1024}
SIZES = "pairs: 8, tune_pairs: 6, fit_pairs: 8, response_tokens: 4, bootstrap: 50"
YAML = f"""
name: planted
data: {{sources: [{{format: synthetic, conversations: 90}}],
       splits: {{fit: 32, tune: 8, test: 12}}}}
models: {{base: ./base, tuned: ./tuned, device: cpu}}
activations: {{batch_tokens: 4096, noise_floor_prompts: 2, response_tokens: 0}}
vector: {{bootstrap: 50, convergence_draws: 2}}
maps: {{kl_sites: [{SITE}], tokens: all, ranks: [1, 2], {SIZES}}}
strength: {{sites: [{SITE}, final_norm], tokens: prompt_last, {SIZES},
           strengths: [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]}}
"""

Measure = Callable[..., Path]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measure]:
    """Runs the pipeline on models in memory, each in a folder of its own, without figures."""
    with pytest.MonkeyPatch.context() as patching:
        for stage in ("vector", "maps", "strength"):
            patching.setattr(f"dsteer.stages.{stage}.draw_result", lambda *_: [])

        def run(base: Any, tuned: Any, *overrides: str) -> Path:
            root = tmp_path_factory.mktemp("maps")

            def loaded(*_arguments: object) -> ModelPair:
                return ModelPair.load(base, tuned, tokenizer=byte_tokenizer())

            patching.setattr(ModelPair, "configured", loaded)
            patching.chdir(root)
            for name in ("base", "tuned"):
                (root / name).mkdir()
            run_pipeline(read_pipeline(YAML, overrides), YAML, root / "run", reporter=SILENT)
            return root / "run"

        yield run


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pair(BLOCK, **SHAPE)


@pytest.fixture(scope="module")
def constant(measure: Measure, planted: Planted) -> Path:
    return measure(planted.base, planted.tuned, "maps=null")


def test_the_best_strength_at_final_norm_is_scipys(constant: Path, planted: Planted) -> None:
    """KL of the first answer token over λ, from Hugging Face's own states and logits."""
    pairs = read_pairs(constant / "data" / "tune.jsonl")[:6]
    answers = Answers.read(pairs, planted.tokenizer, max_tokens=388, response_tokens=4)
    v = SteeringVectorSet.load(constant / "vector" / "vectors.safetensors")["final_norm"].tensor
    states, aims = [], []
    with torch.no_grad():
        for item in answers.texts[answers.chosen]:
            ids = torch.tensor([item.ids[: item.prompt_length]])
            states.append(planted.base.model(ids).last_hidden_state[0, -1].double())
            aims.append(planted.tuned(ids).logits[0, -1].double().log_softmax(-1))
    h, log_p = torch.stack(states), torch.stack(aims)
    head = planted.base.lm_head.weight.detach().double()

    def kl(strength: float) -> float:
        log_q = ((h + strength * v.double()) @ head.T).log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum())

    theirs = minimize_scalar(kl, bounds=(0, 2), method="bounded", options={"xatol": 1e-6})
    ours = read_json(constant / "strength" / "result.json")["sites"]["final_norm"]
    optimal = ours["kl_optimal"]["value"]
    # a parabola through three points ¼ apart misses the third derivative of KL
    assert optimal == pytest.approx(theirs.x, abs=0.02)
    assert kl(optimal) < (1 + 1e-3) * theirs.fun


def test_a_planted_constant_leaves_nothing_to_predict_at_one_token(constant: Path) -> None:
    """What is left of the strengths' scatter is float32 rounding, in few rows as in many."""
    found = read_json(constant / "strength" / "result.json")["sites"][SITE]
    assert found["per_prompt"]["sd"] < 1e-5
    assert found["predictable_r2"] is None
    recovered = {name: value["value"] for name, value in found["recovered"].items()}
    for name in ("predicted", "least_squares", "along_displacement"):
        # λ is 1 but for rounding; KL is smooth in it
        assert recovered[name] == pytest.approx(recovered["one"], abs=1e-4), name
    assert recovered["one"] < 0.9, "later tokens keep their states: one token is not all"


def test_norm_growth_is_a_scale_and_changes_nothing_that_is_said(measure: Measure) -> None:
    """All that is written into the stream grows by 0.3: each norm takes it away again."""
    base = tiny_llama(0, mlp_bias=False, **SHAPE)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight *= 1.3
        for block in tuned.model.layers:
            block.self_attn.o_proj.weight *= 1.3
            block.mlp.down_proj.weight *= 1.3
    run = measure(base, tuned, "strength=null")
    found = read_json(run / "maps" / "result.json")
    for site in ("resid_post.0", "resid_post.3"):
        here = found["sites"][site]
        # RMSNorm's ε beside the states' mean square leaves a difference of about 1e-5
        assert here["r2"]["scale"]["value"] == pytest.approx(1, abs=1e-8)
        assert here["chosen"]["scale"] == pytest.approx(0.3, abs=1e-5)
        assert here["r2"]["translation"]["value"] < 0.9
    recovered = found["kl"][SITE]["recovered"]
    assert set(recovered.values()) == {None}, "no KL that could be recovered"
    (note,) = (text for text in found["notes"] if "a scale predicts more" in text)
    assert note.startswith("At resid_post.0, resid_post.1, resid_post.2, resid_post.3")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("maps", "maps.sites: resid_post.9: the run holds no states there; name some of"),
        ("strength", "strength.sites resid_post.9: v* is zero or absent there"),
    ],
)
def test_mistakes(measure: Measure, planted: Planted, stage: str, words: str) -> None:
    other = "strength" if stage == "maps" else "maps"
    with pytest.raises(DsteerError) as met:
        measure(planted.base, planted.tuned, f"{other}=null", f"{stage}.sites=[resid_post.9]")
    assert str(met.value).startswith(words)
    assert "\n" not in str(met.value)


def test_one_test_pair_has_no_spread_of_strengths(measure: Measure, planted: Planted) -> None:
    run = measure(planted.base, planted.tuned, "maps=null", "data.splits.test=1")
    text = (run / "strength" / "result.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    found = read_json(run / "strength" / "result.json")["sites"][SITE]["per_prompt"]
    assert (found["n"], found["sd"]) == (1, None)
    assert found["mean"] == pytest.approx(1, abs=1e-5)
