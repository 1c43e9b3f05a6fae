"""Interpolation and inversion over a pair whose answer is known: b after block 1."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "behaviour"))
import test_behaviour_reward as reward_model
import test_behaviour_toxicity as toxicity_model
from measured import measure
from planted import byte_tokenizer, planted_pair

from dsteer.behaviour.metrics import GENERATED, TEACHER_FORCED
from dsteer.behaviour.validity import screen
from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.synthetic import AXES
from dsteer.data.tokens import encode
from dsteer.data.types import PreferencePair
from dsteer.errors import DsteerError, MeasurementError
from dsteer.steering import decode
from dsteer.steering.decode import sweep as sweep_prompts
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, read_json, write_json
from dsteer.training.evaluate import Continuation, log_likelihoods

BLOCK = 1
SITE = f"resid_post.{BLOCK}"
SIZES = {"fit": 12, "tune": 8, "test": 10}
GRID = [-1.0, 0.0, 0.5, 1.0, 2.0]
ONE, ZERO = GRID.index(1.0), GRID.index(0.0)
SWEEP = {
    "strengths": GRID,
    "pairs": 8,
    "prompts": 6,
    "response_tokens": 6,
    "max_new_tokens": 8,
    "range_prompts": 3,
    "sample_prompts": 3,
    "random_directions": 3,
    "random_generations": 1,
    "bootstrap": 60,
}
THINGS = ("tea", "bread", "rivers", "a lemma", "bees", "snow", "tin", "the moon")
KEYS = {
    "direction", "start", "target", "sign", "site", "site_chosen_on", "sites", "positions",
    "strengths", "grid", "arms", "random", "sham", "metrics", "texts", "absent", "diagnoses",
    "headline", "notes",
}  # fmt: skip
METRIC_KEYS = {
    "label", "unit", "better", "definition", "source", "split", "n", "curves", "random", "start",
    "target", "crossing", "worst",
}  # fmt: skip
OUTSIDE = {
    "external_reward", "toxicity", "judge", "refusal_judge", "truthfulqa_mc1", "truthfulqa_mc2"
}  # fmt: skip


def write_data(run: Path, answers: bool = True) -> None:
    """Benign prompts of different lengths, two of a conversation in the test split."""
    (run / "data").mkdir(parents=True)
    number = 0
    for split, count in SIZES.items():
        pairs = []
        for place in range(count):
            thing = THINGS[number % len(THINGS)]
            pairs.append(
                PreferencePair(
                    f"\n\nHuman: Say {number} words about {thing}.\n\nAssistant:",
                    f" Well, {thing}." if answers else None,
                    " No." if answers else None,
                    conversation=str(number - place % 2 if split == "test" else number),
                )
            )
            number += 1
        write_pairs(run / "data" / f"{split}.jsonl", pairs)


def models(base: Path, tuned: Path) -> dict[str, Any]:
    return {
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
        "activations": {"noise_floor_prompts": 4, "response_tokens": 4},
    }


def prepared(root: Path, *, answers: bool = True) -> tuple[Path, Any]:
    """A run with activations and vectors; returns its folder and its settings."""
    base, tuned = planted_pair(BLOCK).save(root / "models")
    settings = models(base, tuned)
    run = root / "run"
    write_data(run, answers)
    if not answers:
        settings["activations"]["response_tokens"] = 0
    measure(run, "activations", "vector", **settings)
    return run, settings


def sweep(run: Path, settings: Any, stage: str, changes: Any = None, **sections: Any) -> Json:
    return measure(run, stage, **{**settings, **sections, stage: {**SWEEP, **(changes or {})}})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    run, settings = prepared(tmp_path_factory.mktemp("planted"))
    for stage in ("interpolation", "inversion"):
        sweep(run, settings, stage)
    return run, settings


@pytest.fixture
def copied(planted: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """The inputs of the sweeps, in a run of its own."""
    run, settings = planted
    for stage in ("data", "activations", "vector"):
        shutil.copytree(run / stage, tmp_path / "run" / stage)
    return tmp_path / "run", settings


def rows(folder: Path) -> dict[tuple[str, float | None], list[str]]:
    """Texts of each arm and strength, by prompt."""
    found: dict[tuple[str, float | None], list[str]] = {}
    for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts = found.setdefault((row["arm"], row["strength"]), [])
        assert row["prompt"] == len(texts)
        texts.append(row["text"])
    return found


def values(result: Json, metric: str, arm: str = "v") -> list[float | None]:
    curve = result["metrics"][metric]["curves"][arm]
    return [None if point is None else point["value"] for point in curve]


BOTH = pytest.mark.parametrize("stage", ["interpolation", "inversion"])


@BOTH
def test_planted_truth_is_reached(planted: tuple[Path, Any], stage: str) -> None:
    run, _ = planted
    result = read_json(run / stage / "result.json")
    start, target = ("base", "tuned") if stage == "interpolation" else ("tuned", "base")
    assert (result["start"], result["target"]) == (start, target)
    assert result["sign"] == (1 if start == "base" else -1)
    assert (result["site"], result["positions"]) == (SITE, "all")
    assert result["site_chosen_on"] == "tune"
    assert result["direction"] == stage
    assert result["sites"][SITE]["kl_recovered"]["all"] == pytest.approx(1, abs=1e-6)
    assert result["sites"][SITE]["norm"] == pytest.approx(2, abs=1e-4)
    nothing = {"all": None, "prompt_last": None, "generated": None}
    assert result["sites"]["resid_post.0"] == {"norm": 0.0, "kl_recovered": nothing}
    for key in ("kl_recovered", "kl_recovered_reverse"):
        curve = values(result, key)
        assert curve[ONE] == pytest.approx(1, abs=1e-6)
        assert curve[ZERO] == 0
        assert all(value is not None and value < 0.99 for value in curve[:ONE] + curve[ONE + 1 :])
        assert all(value < 0.9 for value in result["metrics"][key]["random"]["high"])
    assert values(result, "kl_first_token")[ONE] == pytest.approx(0, abs=1e-6)
    assert values(result, "top1_agreement")[ONE] == 1
    assert values(result, "top1_agreement")[ZERO] != 1
    for key, wanted in (("reward_margin", 0.0), ("preference_match", 0.5)):  # against itself
        assert result["metrics"][key]["start" if start == "base" else "target"]["value"] == wanted
    aim = result["metrics"]["reward_margin"]["target"]["value"]
    assert values(result, "reward_margin")[ONE] == pytest.approx(aim, abs=1e-6)
    if start == "base":
        assert (
            values(result, "preference_match")[ONE]
            == (result["metrics"]["preference_match"]["target"]["value"])
        )

    texts = rows(run / stage)
    other = rows(run / {"interpolation": "inversion", "inversion": "interpolation"}[stage])
    assert texts["v", 1.0] == texts["target", None] == other["v", 0.0]
    assert texts["v", 0.0] == other["target", None]
    assert texts["v", 0.0] != texts["v", 1.0]
    explorer = read_json(run / stage / "explorer.json")
    assert (explorer["start"], explorer["target"]) == (start, target)
    for prompt in explorer["prompts"]:
        assert prompt["steered"][ONE] == prompt[target]
        assert prompt["steered"][ZERO] == prompt[start]
    for key in ("length", "perplexity", "distinct_2", "refusal", "oracle_polite"):
        metric = result["metrics"][key]
        aim = metric["target"]
        assert metric["curves"]["v"][ONE] == (aim if aim is None else pytest.approx(aim)), key
    assert set(values(result, "rouge_l_target")[ONE : ONE + 1]) <= {1.0, None}
    assert result["sham"] == {"texts_identical": True, "logits_identical": True, "texts": 6}
    assert result["texts"]["fast_path"]
    assert result["texts"]["decoder_note"] is None
    assert not any("Inversion" in said or "is not where" in said for said in result["diagnoses"])


@BOTH
def test_every_key_is_there(planted: tuple[Path, Any], stage: str) -> None:
    run, _ = planted
    result = read_json(run / stage / "result.json")
    json.dumps(result, allow_nan=False)
    assert set(result) >= KEYS
    order = [*TEACHER_FORCED, *GENERATED, *(f"oracle_{axis.name}" for axis in AXES)]
    assert list(result["metrics"]) == [name for name in order if name in result["metrics"]]
    absent = {row["metric"]: row["reason"] for row in result["absent"]}
    assert set(absent) == set(order) - set(result["metrics"]) >= OUTSIDE
    assert all("configured" in absent[name] for name in OUTSIDE)
    assert set(TEACHER_FORCED) - OUTSIDE <= set(result["metrics"])
    assert set(result["arms"]) == {"v", "final_norm"}
    for name, arm in result["arms"].items():
        assert arm["generated"]
        assert arm["positions"] == "all"
        assert arm["norm"] > 0
        assert arm["site"] == (SITE if name == "v" else "final_norm")
    assert result["random"]["draws"] == 3
    assert result["random"]["generated"] == 1
    assert result["strengths"] == GRID
    assert result["grid"]["chosen_on"] == "given"
    for name, metric in result["metrics"].items():
        assert set(metric) == METRIC_KEYS
        assert metric["split"] == "test"
        assert metric["source"] == ("teacher_forced" if name in TEACHER_FORCED else "generated")
        assert metric["n"] == (8 if name in TEACHER_FORCED else 6)
        assert set(metric["curves"]) == {"v", "final_norm"}
        assert all(len(curve) == len(GRID) for curve in metric["curves"].values())
        assert all(len(metric["random"][end]) == len(GRID) for end in ("low", "high", "mean"))
        assert metric["random"]["draws"] == (3 if name in TEACHER_FORCED else 1)
        assert set(metric["crossing"]) == {"strength", "why"}
        assert (metric["crossing"]["strength"] is None) == (metric["crossing"]["why"] is not None)
        assert metric["start"] == metric["curves"]["v"][ZERO]
        if metric["random"]["low"][ZERO] is not None:
            # λ = 0 is the start, whatever the direction
            assert metric["random"]["low"][ZERO] == pytest.approx(metric["start"]["value"])
    texts = rows(run / stage)
    assert list(texts) == [
        *((arm, s) for arm in ("v", "final_norm", "random-0") for s in GRID), ("target", None)
    ]  # fmt: skip
    assert {len(found) for found in texts.values()} == {6}
    assert result["texts"]["n"] == 6
    assert result["texts"]["greedy"]
    shares = [sum(found) / 6 for found in zip(*result["texts"]["kinds"].values(), strict=True)]
    assert result["texts"]["degenerate"] == shares == values(result, "degenerate")
    explorer = read_json(run / stage / "explorer.json")
    assert len(explorer["prompts"]) == 3
    assert explorer["strengths"] == GRID
    assert explorer["source"] == "test prompts"
    assert explorer["site"] == SITE
    assert explorer["prompts"][0]["prompt"].startswith("Human: Say 20 words")
    assert explorer["prompts"][0]["reference"] == "Well, bees."


@BOTH
def test_fewer_than_twenty_random_directions_are_said(
    planted: tuple[Path, Any], stage: str
) -> None:
    run, _ = planted
    notes = read_json(run / stage / "result.json")["notes"]
    assert any(note.startswith("The random band is thin: 3 directions") for note in notes)


def test_perplexity_is_the_bases(planted: tuple[Path, Any]) -> None:
    run, _ = planted
    pair, tokenizer = planted_pair(BLOCK), byte_tokenizer()
    prompts = [item.prompt for item in read_pairs(run / "data" / "test.jsonl")][:6]
    vector = SteeringVector(pair.b, SITE)
    made = sweep_prompts(pair.base, tokenizer, prompts, vector, [0.0, 1.0], 8)
    interpolation, inversion = (
        read_json(run / stage / "result.json")["metrics"]["perplexity"]
        for stage in ("interpolation", "inversion")
    )
    for tokens, texts, points in (
        (made.tokens[0], made.texts[0], (interpolation["start"], inversion["target"])),
        (made.tokens[1], made.texts[1], (interpolation["target"], inversion["start"])),
    ):
        kept = [
            Continuation(encoded.ids, ids)
            for encoded, ids, text in zip(encode(tokenizer, prompts), tokens, texts, strict=True)
            if screen(text) is None
        ]
        assert kept
        cost = -float(log_likelihoods(pair.base, kept).sum()) / sum(len(i.tokens) for i in kept)
        for point in points:
            assert point["value"] == pytest.approx(math.exp(cost), rel=1e-4)
            assert point["n"] == len(kept)


def test_again_byte_for_byte(planted: tuple[Path, Any], copied: tuple[Path, Any]) -> None:
    run, settings = copied
    sweep(run, settings, "inversion")
    files = ("result.json", "explorer.json", "generations.jsonl")
    for _ in range(2):  # from nothing, and over the journals of the first time
        for name in files:
            assert (run / "inversion" / name).read_bytes() == (
                planted[0] / "inversion" / name
            ).read_bytes()
        sweep(run, settings, "inversion")


def test_a_killed_sweep_goes_on(
    planted: tuple[Path, Any], copied: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = copied
    own = decode.Shared.run
    done: list[int] = []

    def dying(after: int) -> Callable[..., Any]:
        def work(*args: Any) -> Any:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(len(args[2].prompts))
            return own(*args)

        return work

    (run / "interpolation").mkdir()
    for _ in range(3):  # after the texts of v, of final_norm, and of the random direction
        done.clear()
        monkeypatch.setattr(decode.Shared, "run", dying(3))
        with pytest.raises(KeyboardInterrupt):
            sweep(run, settings, "interpolation")
    assert not (run / "interpolation" / "result.json").exists()
    done.clear()
    monkeypatch.setattr(decode.Shared, "run", dying(-1))
    sweep(run, settings, "interpolation")
    assert len(done) == 3  # the sham twice, then what is left: the target's texts
    for name in ("result.json", "explorer.json", "generations.jsonl"):
        assert (run / "interpolation" / name).read_bytes() == (
            planted[0] / "interpolation" / name
        ).read_bytes()


def test_a_site_can_be_given(copied: tuple[Path, Any]) -> None:
    run, settings = copied
    given = {"site": "final_norm", "positions": "all", "strengths": [0.0, 0.5, 1.5]}
    result = sweep(run, settings, "interpolation", given)
    assert (result["site"], result["site_chosen_on"]) == ("final_norm", "given")
    assert result["sites"] == {}
    assert set(result["arms"]) == {"v"}
    assert values(result, "kl_recovered")[0] == 0
    assert result["headline"]["kl_recovered"] is None


def test_drawn_texts_are_the_targets_too(copied: tuple[Path, Any]) -> None:
    run, settings = copied
    warm = {"temperature": 1.0, "strengths": [0.0, 0.5, 1.0], "random_generations": 0}
    result = sweep(run, settings, "interpolation", warm)
    texts = rows(run / "interpolation")
    assert texts["v", 1.0] == texts["target", None] != texts["v", 0.0]  # the draws are shared
    assert not result["texts"]["greedy"]
    assert result["sham"]["texts_identical"]


@BOTH
def test_baselines_beside_v(copied: tuple[Path, Any], stage: str) -> None:
    run, settings = copied
    asked = {"baselines": ["noise", "amplify"], "random_generations": 0}
    result = sweep(run, settings, stage, asked)
    assert list(result["arms"]) == ["v", "final_norm", "noise", "amplify"]
    assert values(result, "kl_recovered")[ONE] == pytest.approx(1, abs=1e-6)
    for name, operation in (("amplify", "scale"), ("noise", "noise")):
        arm, curve = result["arms"][name], values(result, "kl_recovered", name)
        assert (arm["site"], arm["positions"], arm["operation"]) == (SITE, "all", operation)
        assert curve[ZERO] == 0
        assert all(value is not None and value < 0.9 for value in curve)
        texts = rows(run / stage)
        assert texts[name, 0.0] == texts["v", 0.0] != texts[name, 2.0]
        assert len(result["metrics"]["perplexity"]["curves"][name]) == len(GRID)
    assert not any("baseline" in said for said in result["diagnoses"])
    assert not any("amplification" in note for note in result["notes"])

    # by hand, from the models' own hidden states and a plain hook
    pair, tokenizer = planted_pair(BLOCK), byte_tokenizer()

    def ids(split: str) -> list[torch.Tensor]:
        pairs = read_pairs(run / "data" / f"{split}.jsonl")
        return [torch.tensor([item.ids]) for item in encode(tokenizer, [p.prompt for p in pairs])]

    with torch.no_grad():
        norms = [
            float(pair.base(x, output_hidden_states=True).hidden_states[BLOCK + 1][0, -1].norm())
            for x in ids("fit")
        ]
        unit = 2 / (sum(norms) / len(norms))  # ‖b‖ over the mean norm
        assert result["arms"]["amplify"]["unit"] == pytest.approx(unit, rel=1e-4)
        assert result["arms"]["noise"]["unit"] == 1
        start, target = pair.base, pair.tuned
        if stage == "inversion":
            start, target = target, start
        prompts = ids("test")[:8]
        aims = [target(x).logits[0, -1].double().log_softmax(-1) for x in prompts]
        for i, strength in enumerate(GRID):
            factor = 1 + result["sign"] * strength * unit
            handle = start.model.layers[BLOCK].register_forward_hook(
                lambda _module, _inputs, out, by=factor: (
                    (out[0] * by, *out[1:]) if isinstance(out, tuple) else out * by
                )
            )
            found = [start(x).logits[0, -1].double().log_softmax(-1) for x in prompts]
            handle.remove()
            kl = [float((p.exp() * (p - q)).sum()) for p, q in zip(aims, found, strict=True)]
            # float32 states, of a file against fresh ones
            assert values(result, "kl_first_token", "amplify")[i] == pytest.approx(
                sum(kl) / 8, rel=1e-3
            )


def test_baselines_behind_the_last_block(copied: tuple[Path, Any]) -> None:
    """Noise is as seeded, and the last norm takes an amplification away again."""
    run, settings = copied
    few = {"baselines": ["amplify", "noise"], "site": "resid_post.3", "positions": "all"}
    few |= {"strengths": [0.0, 0.5, 1.0], "pairs": 2, "prompts": 2, "bootstrap": 2}
    few |= {"random_directions": 2, "random_generations": 0}

    def measured(seed: int) -> Json:
        return sweep(run, {**settings, "seed": seed}, "interpolation", few)

    one, same, other = (measured(seed) for seed in (0, 0, 1))
    noise = [values(result, "kl_recovered", "noise") for result in (one, same, other)]
    assert noise[0] == noise[1]
    assert noise[0][1:] != noise[2][1:]
    # but for the norm's epsilon, 1e-6 beside states of mean square about 1
    assert values(one, "kl_recovered", "amplify") == pytest.approx([0, 0, 0], abs=1e-5)
    assert any("takes an amplification away again" in note for note in one["notes"])


def test_positions_alone_can_be_chosen(copied: tuple[Path, Any]) -> None:
    run, settings = copied
    result = sweep(run, settings, "inversion", {"site": SITE, "random_generations": 0})
    assert list(result["sites"]) == [SITE]
    assert result["positions"] == "all"
    assert result["site_chosen_on"] == "tune"
    assert result["random"]["generated"] == 0
    assert result["metrics"]["length"]["random"] is None
    assert result["metrics"]["kl_recovered"]["random"]["draws"] == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"site": "resid_post.9"}, "resid_post.9"),
        ({"site": "resid_post.0", "positions": "all"}, "zero"),
        ({"site": "resid_post.0"}, "nothing to recover"),
    ],
)
def test_a_site_without_a_vector_is_refused(
    copied: tuple[Path, Any], given: Any, words: str
) -> None:
    run, settings = copied
    with pytest.raises(DsteerError, match=words):
        sweep(run, settings, "interpolation", given)


@BOTH
def test_a_model_against_itself_is_refused(copied: tuple[Path, Any], stage: str) -> None:
    run, settings = copied
    base = settings["models"]["base"]
    same = {**settings, "models": {"base": base, "tuned": base, "device": "cpu"}}
    with pytest.raises(MeasurementError, match="nothing to recover"):
        sweep(run, same, stage)


def test_prompts_without_answers(tmp_path: Path) -> None:
    run, settings = prepared(tmp_path, answers=False)
    for stage in ("interpolation", "inversion"):
        result = sweep(run, settings, stage)
        json.dumps(result, allow_nan=False)
        assert (result["site"], result["positions"]) == (SITE, "all")
        assert values(result, "kl_recovered")[ONE] == pytest.approx(1, abs=1e-6)
        absent = {row["metric"]: row["reason"] for row in result["absent"]}
        for key in ("reward_margin", "preference_match", "bleu_reference", "rouge_l_reference"):
            assert key not in result["metrics"]
            assert "answers" in absent[key]
        assert any("no answers" in note for note in result["notes"])
        explorer = read_json(run / stage / "explorer.json")
        assert all(prompt["reference"] is None for prompt in explorer["prompts"])


def test_an_automatic_grid(copied: tuple[Path, Any]) -> None:
    run, settings = copied
    asked = {"strengths": "auto", "points": 9, "max_strength": 8.0}
    result = sweep(run, settings, "interpolation", asked)
    grid, strengths = result["grid"], result["strengths"]
    assert grid["chosen_on"] == "tune"
    assert len(strengths) == 9
    assert strengths == sorted(strengths)
    assert {0.0, 1.0} <= set(strengths)
    probes = [probe["strength"] for probe in grid["probes"]]
    assert probes == sorted(probes)
    assert probes[0] == -8
    assert probes[-1] == 8
    for end, edge, word in (
        (strengths[-1], grid["collapse"], "above"),
        (-strengths[0], grid["collapse_negative"], "below"),
    ):
        said = any(f"{word} λ = 0" in note for note in result["notes"])
        assert end > abs(edge) if edge is not None else end == 8 and said
    assert len(result["metrics"]["length"]["curves"]["v"]) == 9
    assert values(result, "kl_recovered")[strengths.index(1.0)] == pytest.approx(1, abs=1e-6)


PREFERENCES: dict[str, Any] = {"data": {"sources": [{"format": "hh-rlhf"}]}}


def test_samples(copied: tuple[Path, Any], tmp_path: Path) -> None:
    run, settings = copied
    lines = ["How do magnets work?", "Name a colour."]
    (tmp_path / "asked.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def explored(samples: str, **sections: Any) -> Json:
        few = {"samples": samples, "strengths": [0.0, 0.5, 1.0], "random_generations": 0}
        result = sweep(run, settings, "inversion", few, **sections)
        oracles = [name for name in result["metrics"] if name.startswith("oracle")]
        assert bool(oracles) != bool(sections)
        return read_json(run / "inversion" / "explorer.json")

    def asked(explorer: Json) -> list[str]:
        for prompt in explorer["prompts"]:
            assert prompt["steered"][2] == prompt["base"]
            assert prompt["steered"][0] == prompt["tuned"]
        return [prompt["prompt"] for prompt in explorer["prompts"]]

    from_file = explored(str(tmp_path / "asked.txt"))
    assert asked(from_file) == lines
    assert from_file["source"] == "asked.txt"
    real = explored("auto", **PREFERENCES)  # people's prompts are not shown unasked
    assert "benign" in real["source"]
    assert len(asked(real)) == 3
    assert all("Human: " in prompt for prompt in asked(real))
    assert real == explored("benign")
    assert "words about" in asked(explored("test", **PREFERENCES))[0]
    none = {"samples": "none", "strengths": [0.0, 1.0, 2.0], "random_generations": 0}
    sweep(run, settings, "inversion", none)
    assert not (run / "inversion" / "explorer.json").exists(), "an older one goes too"


def test_metrics_from_outside(copied: tuple[Path, Any], tmp_path: Path) -> None:
    run, settings = copied
    reward = reward_model.saved(tmp_path / "reward", byte_tokenizer())
    toxicity = toxicity_model.saved(tmp_path / "toxicity", **toxicity_model.NAMES)
    table = tmp_path / "questions.csv"
    table.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        "A,B,Why is the sky blue?,Scattering,Scattering; Light,The sea; Paint,C\n"
        "A,B,Do cows lie down for rain?,No,No,Yes; Always,C\n"
        "A,B,What is two and two?,Four,Four; 4,Five,C\n",
        encoding="utf-8",
    )
    behaviour = {
        "reward_model": str(reward),
        "toxicity": {"classifier": str(toxicity), "label": "toxic"},
        "truthfulqa": {"path": str(table)},
    }
    few = {"random_directions": 2}
    result = sweep(run, settings, "interpolation", few, behaviour=behaviour)
    json.dumps(result, allow_nan=False)
    absent = {row["metric"] for row in result["absent"]}
    assert absent & OUTSIDE == {"judge", "refusal_judge"}
    for key in ("external_reward", "toxicity"):
        metric = result["metrics"][key]
        known = [value for value in values(result, key) if value is not None]
        assert len(known) >= 2
        assert set(metric["curves"]) == {"v", "final_norm"}
        assert metric["curves"]["v"][ONE] == metric["target"]
    for key in ("truthfulqa_mc1", "truthfulqa_mc2"):
        metric = result["metrics"][key]
        assert metric["n"] == 3
        assert 0 <= metric["start"]["value"] <= 1
        aim, one = metric["target"]["value"], values(result, key)[ONE]
        assert one == pytest.approx(aim, abs=1e-5)
    assert values(result, "truthfulqa_mc2")[ZERO] != pytest.approx(aim, abs=1e-4)


@BOTH
def test_the_mean_preference_direction_is_an_arm(
    planted: tuple[Path, Any], copied: tuple[Path, Any], stage: str
) -> None:
    run, settings = copied
    vectors = SteeringVectorSet.load(run / "vector" / "vectors.safetensors")
    (run / "geometry").mkdir()
    direction = SteeringVector(7 * vectors[SITE].tensor, "final_norm")
    SteeringVectorSet([direction]).save(run / "geometry" / "preference.safetensors")
    write_json(run / "geometry" / "result.json", {})
    result = sweep(run, settings, stage, geometry={})
    if stage == "inversion":
        assert "preference" not in result["arms"]
        return
    arm = result["arms"]["preference"]
    assert arm["site"] == "final_norm"
    assert arm["positions"] == "all"
    assert arm["norm"] == pytest.approx(vectors["final_norm"].norm)
    assert "preference" in result["metrics"]["reward_margin"]["curves"]
    assert values(result, "kl_recovered", "preference")[ZERO] == 0
    assert any("e_w − e_l" in note for note in result["notes"])
    without = read_json(planted[0] / stage / "result.json")
    assert values(result, "kl_recovered") == values(without, "kl_recovered")
