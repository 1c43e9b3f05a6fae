"""``dsteer compare``: the pipeline that it writes, its numbers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import byte_tokenizer, planted_pair, tiny_llama
from safetensors.numpy import load_file
from scipy.linalg import subspace_angles
from typer.testing import CliRunner

from dsteer import cli
from dsteer.compare import comparison, find_prompts, is_override, split_sizes
from dsteer.config import read_pipeline, variants_of
from dsteer.errors import ConfigError, DataError
from dsteer.models.load import quiet
from dsteer.names import labels
from dsteer.store import read_json

QUICK = (
    "data.splits={fit: 24, tune: 8, test: 12}", "activations.noise_floor_prompts=4",
    "vector.bootstrap=60", "vector.convergence_draws=4", "cosine.bootstrap=60",
    "cosine.null_draws=20", "geometry=null", "profile=null", "rank=null", "interpolation=null",
    "inversion=null", "claims=null",
    "comparison={draws: 20, null_draws: 20}",
)  # fmt: skip


def ask(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["compare", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


# ---------------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["org/base", "org/tuned"], ["base", "tuned"]),
        (["runs/a/base/model", "runs/a/dpo/model"], ["base", "dpo"]),
        (["runs/a/dpo/model", "runs/b/dpo/model"], ["a-dpo", "b-dpo"]),
        (["org/m", "org/m"], ["org-m", "org-m-2"]),
        (["org/m@main", "/data/my model/"], ["m-main", "my-model"]),
        (["./model"], ["model"]),
        (["b", "a", "a", "a-2", "A"], ["b", "a", "a-2", "a-2-2", "A-3"]),
    ],
)
def test_labels_tell_models_apart(models: list[str], expected: list[str]) -> None:
    assert labels(models) == expected


def test_split_sizes_are_the_defaults_or_the_same_shares() -> None:
    assert split_sizes(10_000) == split_sizes(896) == {"fit": 512, "tune": 128, "test": 256}
    assert split_sizes(448) == {"fit": 256, "tune": 64, "test": 128}
    for n in range(12, 896):
        assert sum(split_sizes(n).values()) <= n
        assert min(split_sizes(n).values()) >= 1


def test_overrides_are_told_from_models() -> None:
    assert is_override("data.sources.0.limit=3")
    assert is_override("geometry=null")
    assert not any(map(is_override, ("org/model", "./a=b", "C:/x=y", "org/m@rev")))


def test_one_tuned_model_is_a_pipeline_and_several_are_a_study() -> None:
    prompts = find_prompts("synthetic")
    one = read_pipeline(comparison("o/base", ["o/tuned"], prompts, template="four-way"))
    assert (one.models.base, one.models.tuned) == ("o/base", "o/tuned")
    assert one.name == "compare-base-tuned"
    assert one.activations is not None
    assert one.activations.template == "none"
    assert one.template is not None
    assert None not in (one.geometry, one.profile, one.rank, one.claims)
    several = read_pipeline(comparison("o/base", ["o/a", "o/b"], prompts, template="chat"))
    assert [v.models.tuned for v in variants_of(several).values()] == ["o/a", "o/b"]
    assert several.activations is not None
    assert several.activations.template == "chat"
    given = read_pipeline(comparison("o/base", ["o/a"], prompts, template="o/instruct"))
    assert given.models.chat_template == "o/instruct"


def test_prompts_without_answers_are_measured_by_their_states_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"What is {n} plus one?\n" for n in range(30)), encoding="utf-8")
    prompts = find_prompts(str(path))
    assert (prompts.source["format"], prompts.conversations, prompts.answered) == (
        "prompts", 30, False,
    )  # fmt: skip
    found = read_pipeline(comparison("o/base", ["o/a"], prompts))
    assert (found.geometry, found.profile, found.rank) == (None, None, None)
    assert found.claims is not None, "what can't be tested is said, and the self-check runs"


def test_formats_are_told_by_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert find_prompts(str(path)).source["format"] == "preference"
    assert find_prompts(str(path), limit=15).conversations == 15
    with pytest.raises(DataError, match="9 conversations; a comparison needs 12 or more"):
        find_prompts(str(path), limit=9)
    with pytest.raises(ConfigError, match="--format 'hh': no such format; known: hh-rlhf"):
        find_prompts(str(path), "hh")
    with pytest.raises(DataError, match="no such file or folder"):
        find_prompts(str(tmp_path / "gone.jsonl"))


# ---------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three models that add a known vector after block 1, and one that is no tuned model.

    The vectors u, (u + w)/√2 and w are orthogonal at the ends: cosines 1/√2, 1/√2 and 0.
    """
    folder = tmp_path_factory.mktemp("models")
    first, second = planted_pair(1, seed=3), planted_pair(1, seed=3)
    u = first.b
    w = torch.randn(len(u), generator=torch.Generator().manual_seed(9))
    w -= (w @ u) / (u @ u) * u
    w *= u.norm() / w.norm()
    first.save(folder)
    (folder / "tuned").rename(folder / "u")
    for name, vector in (("mixed", (u + w) / 2**0.5), ("w", w)):
        with torch.no_grad():
            bias = second.tuned.model.layers[1].mlp.down_proj.bias
            bias.copy_(first.base.model.layers[1].mlp.down_proj.bias + vector)
        with quiet():
            second.tuned.save_pretrained(folder / name)
        second.tokenizer.save_pretrained(folder / name)
    with quiet():
        tiny_llama(hidden_size=16).save_pretrained(folder / "narrow")
    byte_tokenizer().save_pretrained(folder / "narrow")
    return folder


@pytest.fixture(scope="module")
def three(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("three") / "run"
    code, stdout, stderr = ask(
        str(models / "base"), *(str(models / name) for name in ("u", "mixed", "w")),
        "--data", "synthetic", "--limit", "60", "--out", str(out), "--quiet", *QUICK,
    )  # fmt: skip
    assert code == 0, stderr
    assert "mixed" in stdout
    return out


def test_three_tuned_models_make_one_table_and_known_angles(three: Path) -> None:
    result = read_json(three / "comparison" / "result.json")
    assert list(result["variants"]) == ["u", "mixed", "w"]
    site, degrees = "resid_post.1", {("u", "mixed"): 45, ("u", "w"): 90, ("mixed", "w"): 45}
    assert [(pair["a"], pair["b"]) for pair in result["pairs"]] == list(degrees)
    for pair in result["pairs"]:
        names = pair["a"], pair["b"]
        runs = [three / "variants" / name for name in names]
        v, w = (
            load_file(run / "vector" / "vectors.safetensors")[site].astype(np.float64)
            for run in runs
        )
        cosine = v @ w / np.linalg.norm(v) / np.linalg.norm(w)
        # v* is stored in float32: one rounding of each of its numbers
        assert abs(pair["sites"][site]["cosine"]["value"] - cosine) < 1e-6
        assert abs(cosine - np.cos(np.deg2rad(degrees[names]))) < 1e-4
        spans = []
        for run in runs:
            states = (load_file(run / "activations" / f"{which}.safetensors")[site][:24]
                      for which in ("base", "tuned"))  # fmt: skip
            base, tuned = (rows.astype(np.float64) for rows in states)
            spans.append(np.linalg.svd(tuned - base)[2][:1].T)  # one constant vector: one dimension
        angles = pair["angles"][site]["uncentred"]["angles"]
        assert len(angles) == 1
        assert abs(angles[0] - np.rad2deg(subspace_angles(*spans))[0]) < 1e-3
        assert abs(angles[0] - degrees[names]) < 0.01
    assert (three / "report.html").is_file()
    for name in result["variants"]:
        assert (three / "variants" / name / "report.html").is_file()


def test_the_base_is_read_once(three: Path) -> None:
    first, *others = (three / "variants" / name / "activations" for name in ("u", "mixed", "w"))
    for other in others:
        for file in ("base.safetensors", "response_base.safetensors"):
            assert (other / file).read_bytes() == (first / file).read_bytes()
        assert (other / "tuned.safetensors").read_bytes() != (
            first / "tuned.safetensors"
        ).read_bytes()


def test_a_single_comparison_gives_a_variant_s_numbers(
    models: Path, three: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = ask(
        str(models / "base"), str(models / "mixed"), "--data", "synthetic", "--limit", "60",
        "--out", str(out), "--quiet", *QUICK[:-1],
    )  # fmt: skip
    assert code == 0, stderr
    assert "Pipeline:" in stdout
    for stage in ("activations", "vector", "cosine", "spectrum"):
        alone = read_json(out / stage / "result.json")
        assert alone == read_json(three / "variants" / "mixed" / stage / "result.json")
    text = (out / "pipeline.yaml").read_text(encoding="utf-8")
    written = read_pipeline(text)
    assert written.data.splits.fit == 24, "the written YAML holds the overrides"
    assert (written.geometry, written.interpolation, written.inversion) == (None, None, None)
    assert sorted(path.parent.name for path in out.glob("*/stage.json")) == [
        "activations", "cosine", "data", "report", "spectrum", "vector",
    ]  # fmt: skip


def test_a_comparison_ends_with_its_claims(models: Path, tmp_path: Path) -> None:
    """A planted constant: a shared shift, along one direction, and that constant suffices."""
    out = tmp_path / "run"
    code, stdout, stderr = ask(
        str(models / "base"), str(models / "u"), "--data", "synthetic", "--limit", "200",
        "--out", str(out), *QUICK[1:5], "geometry=null", "interpolation=null", "inversion=null",
        "data.splits={fit: 100, tune: 20, test: 48}",
        "profile={pairs: 24, random_pairs: 4, bootstrap: 200}",
        "rank={pairs: 24, random_pairs: 4, bootstrap: 200}",
    )  # fmt: skip
    assert code == 0, stderr
    told = {claim["name"]: claim for claim in read_json(out / "claims" / "result.json")["claims"]}
    assert {name: claim["verdict"] for name, claim in told.items()} == {
        "shared_shift": "supported", "low_dimensional": "supported",
        "constant_suffices": "supported", "preference_specific": "not tested",
        "reversible": "not tested",
    }  # fmt: skip
    assert told["constant_suffices"]["number"]["value"] == pytest.approx(1, abs=1e-4)
    assert "one constant vector suffices: supported" in stdout + stderr
    assert "claims" in (out / "report.html").read_text("utf-8")


def test_yaml_is_printed_and_nothing_run(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, stdout, _ = ask(
        str(models / "base"), str(models / "u"), "--data", "synthetic", "--out", str(out), "--yaml"
    )
    assert code == 0
    assert read_pipeline(stdout).models.tuned == str(models / "u")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}", "seed=1"], "no tuned model given; expected BASE TUNED"),
        (["{base}", "./gone"], "models.tuned: ./gone: no such file or folder"),
        (["./gone", "{base}"], "models.base: ./gone: no such file or folder"),
        (["{base}", "{narrow}"], "has width 32, tuned"),
        (["{base}", "{u}", "{narrow}"], "has width 32, tuned"),
        (["{base}", "{u}", "cosine.bootstrap=many"], "cosine.bootstrap: input should be"),
        (["{base}", "{u}", "--dtype", "int3"], "models.dtype: input should be"),
        (["{base}", "{u}", "--device", "tpu"], "'tpu'"),
        (["{base}", "{u}", "--template", "./gone.jinja"], "./gone.jinja"),
        (["{base}", "{u}", "--data", "./gone.jsonl"], "./gone.jsonl: no such file or folder"),
        (["{base}", "{u}", "--format", "preferences"], "no such format; did you mean"),
        (["{base}", "{u}", "--until", "dop"], "--until dop: no such stage"),
        (["{base}", ""], "'' is no model"),
        (["{base}", "{u}", "models.base_revision=v1"], "a local path has no revisions"),
        (["{base}", "{u}", "{w}", "comparison.sites=[block.3]"], "'block.3' is no site"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    models: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {path.name: str(path) for path in models.iterdir()}
    filled = [argument.format(**places) for argument in arguments]
    data = [] if "--data" in filled else ["--data", "synthetic"]
    out = tmp_path / "run"
    code, _, err = ask(*filled, *data, "--limit", "40", "--out", str(out))
    assert code == 2
    assert err.startswith("dsteer: ")
    assert message in err
    assert err.count("\n") == 1, "one line"
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(models: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = ask(
        str(models / "base"), str(models / "u"), "--data", "synthetic", "--out", str(tmp_path)
    )
    assert code == 2
    assert "holds no run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_template_that_nobody_has_is_told_before_anything_is_written(
    models: Path, tmp_path: Path
) -> None:
    for name in ("base", "u"):
        shutil.copytree(models / name, tmp_path / name)
        byte_tokenizer(template=None).save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
    for template in ("chat", "four-way"):
        code, _, err = ask(
            str(tmp_path / "base"), str(tmp_path / "u"), "--data", "synthetic", "--limit", "40",
            "--template", template, "--out", str(tmp_path / "run"),
        )  # fmt: skip
        assert code == 2
        assert "has a chat template; name one (--template FILE-OR-MODEL" in err
        assert not (tmp_path / "run").exists()


def test_a_name_made_up_twice_does_not_take_another_run_s_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, tuned in (("x", "u"), ("y", "w")):
        for stage, name in (("base", "base"), ("dpo", tuned)):
            (tmp_path / run / stage).mkdir(parents=True)
            (tmp_path / run / stage / "model").symlink_to(models / name)
    quick = ["--data", "synthetic", "--limit", "40", "--until", "data", "-q"]
    assert ask("x/base/model", "x/dpo/model", *quick)[0] == 0
    code, _, err = ask("y/base/model", "y/dpo/model", *quick)
    assert code == 2
    assert "results/compare-base-dpo holds a run of other models" in err
    assert ask("y/base/model", "y/dpo/model", *quick, "--name", "second")[0] == 0
    assert ask("x/base/model", "x/dpo/model", *quick)[0] == 0, "the same models go on"


def test_a_report_is_drawn_again_without_a_variant_that_never_ran(
    three: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(three, again)
    shutil.rmtree(again / "variants" / "w")
    (again / "report.html").unlink()
    result = CliRunner().invoke(cli.app, ["report", str(again)])
    assert result.exit_code == 0, result.stderr
    assert (again / "report.html").is_file()
    assert not (again / "variants" / "w").exists()
