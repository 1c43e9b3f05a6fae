"""Nulls: runs beside the pair that differ from it in one thing; with stand-in stages, and real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_study import Stages

from dsteer import pipeline
from dsteer.config import NULLS, PipelineConfig, nulls_of, read_pipeline, resolved, variants_of
from dsteer.data.synthetic import World
from dsteer.errors import ConfigError, DataError, StudyError
from dsteer.nulls import plan_nulls, run_with_nulls
from dsteer.progress import SILENT
from dsteer.stages import StageContext
from dsteer.stages.dpo import relabelled
from dsteer.store import Json, Run, read_json

YAML = (
    "name: demo\ndata: {sources: [{format: synthetic}]}\nbase: {steps: 2}\ndpo: {max_steps: 1}\n"
    "activations:\nvector:\nlearned:\nclaims:\nreport:\nnulls: [coin_flip, self]\n"
)


def config(*overrides: str) -> PipelineConfig:
    return read_pipeline(YAML, overrides)


def go(out: Path, *overrides: str, **options: str) -> Json:
    return run_with_nulls(
        config(*overrides), YAML, out, overrides=overrides, reporter=SILENT, **options
    )


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages()
    monkeypatch.setattr(pipeline, "call", fake)
    return fake


# ---------------------------------------------------------------------------------- config


def test_a_null_shares_all_but_what_it_changes() -> None:
    pair, null = config(), nulls_of(config())["coin_flip"]
    assert null.name == "demo.coin_flip"
    assert null.dpo is not None
    assert null.dpo.labels == "coin_flip"
    different = {
        key for key in resolved(pair) if resolved(pair)[key] != resolved(null)[key]
    }  # what asks about the pair itself is left out
    assert different == {"name", "dpo", "learned", "claims", "nulls"}


def test_the_base_against_itself_trains_nothing() -> None:
    null = nulls_of(config())["self"]
    assert null.dpo is None
    assert null.models.tuned_is_base
    context = StageContext("activations", null, Path("run"), SILENT)
    assert context.tuned_path == context.base_path == "run/base/model"


@pytest.mark.parametrize("name", sorted(NULLS))
def test_each_known_null_is_a_pipeline_that_runs(name: str) -> None:
    assert list(nulls_of(config(f"nulls=[{name}]"))) == [name]


def test_own_changes_come_on_top_and_other_names_say_what_they_change() -> None:
    text = "nulls={lora: {dpo.lora.rank: 1}, third_seed: {dpo.seed: 2}}"
    found = nulls_of(config(text))
    assert found["lora"].dpo is not None
    assert found["lora"].dpo.lora is not None
    assert found["lora"].dpo.lora.rank == 1
    assert found["third_seed"].dpo is not None
    assert found["third_seed"].dpo.seed == 2


@pytest.mark.parametrize(
    ("nulls", "message"),
    [
        ("[coinflip]", r"nulls: 'coinflip' changes nothing and is no known null.*did you mean"),
        ("{a/b: {seed: 1}}", "'a/b' is no name of a null"),
        ("{x: {seed: 1}}", r"nulls\.x: seed: a null can't change it"),
        ("{x: {data.sources: []}}", r"nulls\.x: data\.sources: a null can't change it"),
        ("{x: {dpo.bta: 1}}", r"nulls\.x: dpo\.bta: unknown key"),
        (
            "{coin_flip: {dpo.labels: given}}",
            r"nulls\.coin_flip: it changes nothing: .* dpo\.labels",
        ),
        ("{x: {vector: null}}", r"nulls\.x: it changes nothing"),
        ("{coin_flip: {dpo.labels: swapped}}", r"dpo\.labels is swapped, expected coin_flip"),
    ],
)
def test_mistakes_name_their_null(nulls: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(f"nulls={nulls}")


def test_sft_is_a_null_of_every_method() -> None:
    for method in ("dpo.method=simpo", "dpo.label_smoothing=0.1"):
        null = nulls_of(config(method, "nulls=[sft]"))["sft"].dpo
        assert null is not None
        assert (null.method, null.loss_type, null.label_smoothing) == ("dpo", "sft", 0)


def test_nulls_of_training_need_a_training() -> None:
    with pytest.raises(ConfigError, match=r"nulls\.coin_flip: dpo\.labels: the pipeline trains no"):
        config("dpo=null", "models.tuned=a/b")
    found = nulls_of(config("dpo=null", "models.tuned=a/b", "nulls=[self]"))
    assert found["self"].models.tuned is None


def test_the_base_itself_goes_with_no_other_tuned_model() -> None:
    with pytest.raises(ConfigError, match="tuned_is_base goes with neither"):
        config("models.tuned_is_base=true")


def test_each_variant_of_a_study_has_the_nulls() -> None:
    study = config("variants={a: {dpo.beta: 1.0}, b: {dpo.beta: 2.0}}")
    found = {name: nulls_of(one) for name, one in variants_of(study).items()}
    assert found["b"]["coin_flip"].dpo is not None
    assert found["b"]["coin_flip"].dpo.beta == 2.0
    with pytest.raises(ConfigError, match=r"nulls\.coin_flip: dpo\.labels"):
        config("variants={a: {dpo: null, models.tuned: x/y}}")


# ---------------------------------------------------------------------------------- running


def test_the_pair_goes_first_then_its_nulls_then_what_reads_them(
    tmp_path: Path, stages: Stages
) -> None:
    go(tmp_path / "demo")
    assert stages.ran == [
        *(f"demo.{name}" for name in ("data", "base", "dpo", "activations", "vector", "learned")),
        *(f"coin_flip.{name}" for name in ("dpo", "activations", "vector", "report")),
        *(f"self.{name}" for name in ("activations", "vector", "report")),
        "demo.claims",
        "demo.report",
    ]  # data and base of the nulls are the pair's
    stages.ran.clear()
    go(tmp_path / "demo")
    assert stages.ran == []


def test_a_null_that_fails_is_told_and_graded_again_when_it_is_there(
    tmp_path: Path, stages: Stages
) -> None:
    def fail(context: StageContext) -> None:
        if context.run.name == "coin_flip" and context.name == "dpo":
            raise DataError("no coin")

    stages.before = fail
    with pytest.raises(StudyError, match=r"1 of 2 nulls failed \(coin_flip: no coin\)"):
        go(tmp_path / "demo")
    assert {"demo.claims", "demo.report", "self.vector"} <= set(stages.ran)
    stages.ran.clear()
    stages.before = lambda _context: None
    go(tmp_path / "demo")
    assert stages.ran == [
        *(f"coin_flip.{name}" for name in ("dpo", "activations", "vector", "report")),
        "demo.claims",
        "demo.report",
    ]


def test_a_change_of_a_null_leaves_the_pair_but_for_its_claims(
    tmp_path: Path, stages: Stages
) -> None:
    go(tmp_path / "demo")
    stages.ran.clear()
    go(tmp_path / "demo", "nulls={coin_flip: {dpo.beta: 3.0}, self: {}}")
    assert stages.ran == [
        *(f"coin_flip.{name}" for name in ("dpo", "activations", "vector", "report")),
        "demo.claims",
        "demo.report",
    ]


def test_only_what_reads_nulls_needs_them(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "demo", until="vector")
    assert {name.partition(".")[0] for name in stages.ran} == {"demo"}
    stages.ran.clear()
    go(tmp_path / "demo", force="vector")
    assert stages.ran.count("demo.vector") == 1
    assert "coin_flip.vector" in stages.ran


@pytest.mark.parametrize("option", ["until", "force", "only"])
def test_a_stage_that_is_not_there_is_told_before_anything_runs(
    tmp_path: Path, stages: Stages, option: str
) -> None:
    with pytest.raises(ConfigError, match=r"clains.*did you mean 'claims'"):
        go(tmp_path / "demo", **{option: "clains"})
    assert stages.ran == []


def test_without_a_reader_the_nulls_come_at_the_end(tmp_path: Path, stages: Stages) -> None:
    text = YAML.replace("claims:\nreport:\n", "")
    for until in ("vector", None):
        run_with_nulls(read_pipeline(text), text, tmp_path / "demo", until=until, reporter=SILENT)
        assert ("coin_flip.vector" in stages.ran) == (until is None)


def test_what_the_pair_did_again_its_nulls_take_again(tmp_path: Path, stages: Stages) -> None:
    """One family has one base: the same settings can give other bytes, on another machine say."""

    def write(context: StageContext) -> None:
        if context.name == "base":
            (context.folder / "weights").write_text(f"{len(stages.ran)}")

    stages.before = write
    go(tmp_path / "demo")
    before = (tmp_path / "demo" / "base" / "weights").read_text()
    stages.ran.clear()
    go(tmp_path / "demo", force="base")
    weights = {
        (tmp_path / "demo" / place / "base" / "weights").read_text()
        for place in (".", "nulls/coin_flip", "nulls/self")
    }
    assert len(weights) == 1
    assert weights != {before}
    again = [name for name in stages.ran if name.startswith("coin_flip")]
    assert again == [f"coin_flip.{name}" for name in ("dpo", "activations", "vector", "report")]
    stages.ran.clear()
    go(tmp_path / "demo")
    assert stages.ran == []


def test_the_plan_has_every_null(tmp_path: Path) -> None:
    plans = plan_nulls(config(), tmp_path)
    assert [step.stage.name for step in plans["self"]] == [
        "data", "base", "activations", "vector", "report",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- labels


def test_swapped_labels_swap_and_coins_are_fair_and_seeded() -> None:
    pairs = World(0).pairs(400)
    assert relabelled(pairs, "given", 0) == pairs
    swapped = relabelled(pairs, "swapped", 0)
    assert all(
        (a.chosen, a.rejected) == (b.rejected, b.chosen)
        for a, b in zip(pairs, swapped, strict=True)
    )
    tossed = relabelled(pairs, "coin_flip", 0)
    kept = sum(a == b for a, b in zip(pairs, tossed, strict=True))
    assert abs(kept - 200) < 4 * 10  # four standard deviations of a fair coin
    assert tossed == relabelled(pairs, "coin_flip", 0) != relabelled(pairs, "coin_flip", 1)
    assert {frozenset((p.chosen, p.rejected)) for p in tossed} == {
        frozenset((p.chosen, p.rejected)) for p in pairs
    }


# ---------------------------------------------------------------------------------- for real

REAL = """
name: small
data:
  sources: [{format: synthetic, conversations: 160}]
  splits: {fit: 24, tune: 8, test: 16}
models: {device: cpu}
base:
  model: {vocab_size: 400, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
          num_attention_heads: 2, num_key_value_heads: 2}
  steps: 4
  batch_size: 4
  context_length: 64
dpo: {max_steps: 2, batch_size: 4, learning_rate: 1.0e-3, max_length: 160, eval_pairs: 4}
activations: {batch_tokens: 2048}
vector: {bootstrap: 20, convergence_draws: 2}
cosine: {bootstrap: 20, null_draws: 20}
spectrum: {}
report: {}
nulls: {coin_flip: {}, self: {}, second_seed: {}, lora: {dpo.lora: {rank: 1}}, sft: {}}
"""


def test_real_nulls_share_the_base_and_its_states(tmp_path: Path) -> None:
    run = tmp_path / "small"
    run_with_nulls(read_pipeline(REAL), REAL, run, reporter=SILENT)
    weights = {
        name: (run / place / "base" / "model" / "model.safetensors").read_bytes()
        for name, place in (("pair", "."), ("coin_flip", "nulls/coin_flip"))
    }
    assert weights["pair"] == weights["coin_flip"]
    vectors = {
        name: read_json(run / place / "vector" / "result.json")["sites"]["final_norm"]
        for name, place in (
            ("pair", "."),
            *((null, f"nulls/{null}") for null in ("coin_flip", "self", "second_seed", "sft")),
        )
    }
    assert vectors["self"]["undefined"]
    norms = {name: vector["norm"] for name, vector in vectors.items() if name != "self"}
    assert len(set(norms.values())) == 4  # each trained otherwise
    states = read_json(run / "nulls/self/spectrum/result.json")["sites"]["final_norm"]
    assert states["undefined"]
    acts = Run(run / "nulls" / "self").stage("activations")
    from dsteer.activations.extract import PairedActivations

    opened = PairedActivations.open(acts.path)
    for site in opened.sites:
        assert torch.equal(opened.base[site], opened.tuned[site])  # exactly 0
