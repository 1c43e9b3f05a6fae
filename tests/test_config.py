"""Pipelines: strict keys, all mistakes at once, overrides, shipped files, schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsteer.config import (
    ModelsConfig,
    PipelineConfig,
    as_yaml,
    find_pipeline,
    json_schema,
    nulls_of,
    read_pipeline,
    resolved,
    select,
    shipped_folder,
    shipped_pipelines,
    variants_of,
)
from dsteer.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "pipelines"

MINIMAL = "name: x\ndata: {sources: [{format: synthetic}]}\n"
TRAINED = MINIMAL + "base: {}\ndpo: {}\nactivations: {}\n"


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_that_measure_a_pair_grade_its_claims(name: str) -> None:
    config = read_pipeline((SHIPPED / f"{name}.yaml").read_text("utf-8"))
    assert (config.claims is None) == (config.cosine is None)


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_are_valid(name: str) -> None:
    path = find_pipeline(name)
    text = path.read_text(encoding="utf-8")
    config = read_pipeline(text, origin=path.name)
    assert config.name == name
    assert config.description
    assert f"dsteer run {name}" in text, "a shipped pipeline opens with the command that runs it"


def test_shipped_set() -> None:
    expected = {"tiny", "hh-tiny", "smollm2-135m-hh", "llama2-7b-paper", "tulu3-8b"}
    expected |= {"study-losses", "study-sizes", "study-beta"}
    assert expected <= set(shipped_pipelines())


def test_schema_in_step() -> None:
    committed = json.loads((shipped_folder() / "schema.json").read_text(encoding="utf-8"))
    assert committed == json_schema(), "run `make schema`"


def test_all_mistakes_at_once_with_paths() -> None:
    text = """
name: x
data: {sources: [{format: synthetic, conversatons: 3}], splits: {fitt: 3}}
base: {model: {hiden_size: 64}, steps: 0}
dop: {}
"""
    with pytest.raises(ConfigError) as caught:
        read_pipeline(text, origin="mine.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "mine.yaml: 5 mistakes"
    text = "\n".join(lines)
    assert "data.sources.0.conversatons: unknown key; did you mean 'conversations'?" in text
    assert "data.splits.fitt: unknown key; did you mean 'fit'?" in text
    assert "base.model.hiden_size: unknown key; did you mean 'hidden_size'?" in text
    assert "base.steps: input should be greater than 0 (got 0)" in text
    assert "dop: unknown key; did you mean 'dpo'?" in text


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{base: a/b@c, base_revision: d}", "models: base a/b@c names a revision, and so does"),
        ("{max_memory: {0: 20GiB}}", "max_memory needs device_map: auto, balanced or sequential"),
        ("{offload_folder: x}", "offload_folder needs device_map"),
        ("{device: cpu, device_map: auto}", "device cpu and device_map auto are both given"),
        ("{device_map: auto, max_memory: {0: much}}", "'much' of 0 is no size: expected such as"),
        ("{device_map: auto, max_memory: {0: 0}}", "models.max_memory: 0 of 0 is no size"),
        ("{device_map: auto, max_memory: {gpu: 1GiB}}", "'gpu' is no device: expected 0, 1, …"),
        ("{device_map: somewhere}", "models.device_map: input should be 'auto', 'balanced' or"),
        ("{quantization: 3bit}", "models.quantization: input should be '8bit' or '4bit'"),
    ],
)
def test_mistakes_of_models(models: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_pipeline(f"{MINIMAL}models: {models}\n")
    assert message in str(caught.value)


def test_kept_states_are_for_moments() -> None:
    text = "variants: {few: {activations.keep: 5}, all: {activations.store: states}}\n"
    streamed = ["activations.store=moments"]
    assert read_pipeline(TRAINED, [*streamed, "activations.keep=8"]).activations.keep == 8
    assert read_pipeline(TRAINED, streamed).activations.keep is None
    # a variant is read from the resolved pipeline: a default in it is nobody's wish
    assert read_pipeline(TRAINED + text, streamed).variants
    with pytest.raises(ConfigError, match=r"variants.all: activations.keep: store: states keeps"):
        read_pipeline(TRAINED + text, [*streamed, "activations.keep=8"])
    with pytest.raises(ConfigError, match=r"variants.few: activations.keep: store: states keeps"):
        read_pipeline(TRAINED + text)


def test_placement_of_models() -> None:
    text = "device_map: auto, max_memory: {0: 20GiB, 1: 1000000, cpu: 1.5GB}, offload_folder: x"
    models = read_pipeline(f"{MINIMAL}models: {{{text}}}\n").models
    assert models.max_memory == {0: "20GiB", 1: 1000000, "cpu": "1.5GB"}
    assert models.offload_folder == "x"
    assert ModelsConfig.model_validate(resolved(models)) == models  # JSON's keys are strings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.betta=1", "dpo.betta: unknown key; did you mean 'beta'?"),
        ("dpo.beta=-1", "dpo.beta: input should be greater than 0 (got -1)"),
        ("dpo.beta=much", "dpo.beta: input should be a valid number"),
        ("dpo.freeze=all", "dpo.freeze: input should be 'none', 'input', 'output' or 'both'"),
        ("dpo.beta", "expected key.path=value"),
        (
            "activations.keep=8",
            "activations.keep: store: states keeps every state; drop keep, or set store: moments "
            "(got 8)",
        ),
        ("data.sources.7.path=x", "data.sources is a list of 1"),
        ("seed.x=1", "seed is 0, which has no keys"),
        ("name=a b", "name: string should match pattern"),
        ("base.model.num_attention_heads=3", "not a multiple of num_attention_heads 3"),
        ("vector={strengths: [1, 0, 2]}", "in rising order"),
        ("data.sources=[]", "data.sources: tuple should have at least 1 item"),
        ("data.sources.0.format=csv", "data.sources.0"),
        ("prompts=1", "prompts: unknown key"),
        ("models.base=some/model", "models.base and base are both given"),
        ("models.tuned=some/model", "models.tuned and dpo are both given"),
        ("models.device_map=auto", "models.device_map auto and dpo are both given, and training"),
        ("models.quantization=4bit", "models.quantization 4bit and dpo are both given"),
    ],
)
def test_bad_override(override: str, message: str) -> None:
    text = TRAINED.replace("name: x\n", "name: x\nseed: 0\n")
    with pytest.raises(ConfigError) as caught:
        read_pipeline(text, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "one mistake is one line"


def test_overrides_reach_sections_and_lists() -> None:
    config = read_pipeline(TRAINED, ["dpo.beta=0.5", "data.sources.0.conversations=77", "seed=3"])
    assert config.dpo is not None
    assert config.dpo.beta == 0.5
    assert config.data.sources[0].conversations == 77  # type: ignore[union-attr]
    assert config.seed == 3
    assert read_pipeline(TRAINED, ["activations=null"]).activations is None
    assert read_pipeline(MINIMAL + "base:\ndpo:\n").dpo is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping"),
        ("name: [x\n", "line 2"),
        ("name: x\n", "data: required"),
        (MINIMAL + "activations: {}\n", "activations need a pair"),
        (MINIMAL + "template: {}\n", "template needs a pair"),
        (MINIMAL + "dpo: {}\n", "dpo needs a base"),
        (MINIMAL.replace("synthetic", "prompts, path: a, use: [train]"), "leave 'train' out"),
    ],
)  # fmt: skip
def test_bad_pipeline(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        read_pipeline(text)


def test_unknown_pipeline() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        find_pipeline("tinny")
    with pytest.raises(ConfigError, match="no such file"):
        find_pipeline("nowhere/mine.yaml")


def test_a_local_file_beats_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINIMAL, encoding="utf-8")
    assert find_pipeline("mine.yaml") == Path("mine.yaml")


def test_select_takes_what_a_stage_reads() -> None:
    config = read_pipeline(TRAINED)
    assert select(config, ("seed", "models.device")) == {"seed": 0, "models.device": "auto"}
    assert select(config, ("vector",)) == {"vector": None}


def test_seeds_differ_by_purpose_and_repeat() -> None:
    config = read_pipeline(TRAINED)
    assert config.seed_for("dpo") == config.seed_for("dpo") != config.seed_for("base")
    other = read_pipeline(TRAINED, ["seed=1"])
    assert config.seed_for("dpo") != other.seed_for("dpo")


def test_configs_are_frozen() -> None:
    config: PipelineConfig = read_pipeline(TRAINED)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("site: all", "is no site"),
        ("site: resid_post.x", "is no site"),
        ("strengths: [-1, 0, .nan]", "rising order|finite"),
        ("strengths: [-1, 0, .inf]", "finite"),
        ("strengths: [0.5, 1, 2]", "the sham arm"),
        ("stop: ['']", "an empty string"),
        ("temperature: .inf", "finite number"),
        ("{random_directions: 2, random_generations: 3}", "expected no more"),
        ("{baselines: [noise, noise]}", "expected each baseline once"),
        ("{baselines: [silence]}", "'amplify' or 'noise'"),
        ("points: 5", "greater than or equal to 9"),
    ],
)
def test_mistakes_of_a_sweep(section: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read_pipeline(TRAINED + f"vector: {{}}\ninterpolation: {{{section.strip('{}')}}}\n")
    assert "interpolation" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("sites: []", "learned.sites"),
        ("sites: [auto, block_3]", "'block_3' is no site"),
        ("starts: [one]", "learned.starts"),
        ("max_norm: [2]", "learned.max_norm"),
        ("random_directions: 19", "greater than or equal to 20"),
        ("strengths: [2, 1]", "rising order"),
        ("split: test", "learned.split"),
        ("steps: 0", "greater than 0"),
    ],
)
def test_mistakes_of_learning(section: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read_pipeline(TRAINED + f"vector: {{}}\nlearned: {{{section}}}\n")


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("axes: []", "control.axes"),
        ("axes: [polite, polite]", "'polite' stands there twice"),
        ("read: [first]", "control.read"),
        ("sites: [final_norm]", "'final_norm' is no site after a block"),
        ("sites: []", "name at least one site"),
        ("strengths: [-1]", "greater than 0"),
        ("nulls: 19", "greater than or equal to 20"),
        ("stop: ['']", "an empty string"),
        ("most_degenerate: 2", "less than or equal to 1"),
    ],
)
def test_mistakes_of_a_control(section: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read_pipeline(MINIMAL + f"base: {{}}\ncontrol: {{{section}}}\n")
    assert "control" in str(caught.value)


def test_control_needs_a_base_and_the_synthetic_world() -> None:
    with pytest.raises(ConfigError, match="control needs a model: give"):
        read_pipeline(MINIMAL + "control: {}\n")
    with pytest.raises(ConfigError, match="control needs a source of format synthetic"):
        read_pipeline(
            MINIMAL + "base: {}\ncontrol: {}\n", ["data.sources=[{format: preference, path: x}]"]
        )


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("{}", "transfer.base: required"),
        ("{base: a}", "one of both"),
        ("{base: a, tuned: b, vectors: c}", "one of both"),
        ("{base: a, tuned: b, nulls: 19}", "greater than or equal to 20"),
        ("{base: a, tuned: b, maps: []}", "transfer.maps"),
        ("{base: a, tuned: b, maps: [linear]}", "transfer.maps"),
        ("{base: a, tuned: b, strengths: [0.5, 2]}", "1 among them"),
        ("{base: a, tuned: b, strengths: [2, 1]}", "rising strengths"),
        ("{base: a, tuned: b, sender_sites: [block_3]}", "'block_3' is no site"),
        ("{base: a, tuned: b, receiver_sites: []}", "needs at least one site"),
        ("{base: a, tuned: b, ridge: [-1]}", "greater than 0"),
        ("{base: a, tuned: b, text: {format: prompts, path: x, lines: 3}}", "transfer.text.lines"),
    ],
)
def test_mistakes_of_a_transfer(section: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read_pipeline(TRAINED + f"vector: {{}}\ntransfer: {section}\n")
    assert "transfer" in str(caught.value)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_written_reads_back_as_the_same_pipeline(path: Path) -> None:
    """So that a variant can run in a process of its own, and by its own ``pipeline.yaml``."""
    whole = read_pipeline(path.read_text("utf-8"))
    for variant in (whole, *variants_of(whole).values()):
        for one in (variant, *nulls_of(variant).values()):
            assert read_pipeline(as_yaml(one)) == one
