"""Studies with stand-in stages: variants run, share what is identical, fail alone, resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsteer import pipeline, sharing, study
from dsteer.config import PipelineConfig, read_pipeline, variants_of
from dsteer.errors import ConfigError, DataError, StoreError, StudyError
from dsteer.parallel import Ranks
from dsteer.progress import SILENT
from dsteer.report import comparison_html
from dsteer.stages import StageContext, comparison
from dsteer.store import Json, Run, read_json, write_json

YAML = (
    "name: demo\ndata: {sources: [{format: synthetic}]}\nmodels: {base: a/b}\n"
    "activations:\nvector:\nreport:\n"
    "variants:\n  one: {models.tuned: c/one}\n  two: {models.tuned: c/two}\n"
    "  three: {models.tuned: c/three, seed: 5}\n"
)
LARGE = sharing.LINKED_FROM


class Stages:
    """Stand-ins for the stages and the comparison."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.offered: dict[str, int] = {}
        self.before: Callable[[StageContext], None] = lambda _context: None
        self.compared: list[list[str]] = []

    def __call__(self, context: StageContext) -> Json:
        variant = context.run.name
        self.ran.append(f"{variant}.{context.name}")
        self.before(context)
        if context.name == "activations":
            states = context.folder / "base.safetensors"
            self.offered[variant] = states.stat().st_size if states.is_file() else 0
            states.unlink(missing_ok=True)
            states.write_bytes(b"s" * LARGE)
        return {"headline": {"variant": variant}, "notes": []}

    def compare(
        self,
        runs: Mapping[str, Path],
        folder: Path,
        config: Any,
        seed: Any,
        reporter: Any,
        failed: Mapping[str, str],
        complete: Mapping[str, Any],
    ) -> Json:
        done = [name for name in runs if name not in failed]
        assert all({"activations", "vector"} <= complete[name].keys() for name in done)
        self.compared.append(done)
        assert seed("x") == seed("x") != seed("y")
        return {"headline": {"variants": len(done)}, "notes": ["compared"]}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages()
    monkeypatch.setattr(pipeline, "call", fake)
    monkeypatch.setattr(comparison, "compare_runs", fake.compare)
    monkeypatch.setattr(
        comparison_html, "write_comparison_report", lambda run, title: run / "report.html"
    )
    return fake


def config(*overrides: str) -> PipelineConfig:
    return read_pipeline(YAML, overrides)


def go(out: Path, *overrides: str, **options: str) -> Json:
    return study.run_study(
        config(*overrides), YAML, out, overrides=overrides, reporter=SILENT, **options
    )


def test_variants_are_whole_pipelines() -> None:
    found = variants_of(config())
    assert list(found) == ["one", "two", "three"]
    assert found["two"].models.tuned == "c/two"
    assert found["two"].name == "demo.two"
    assert (found["two"].seed, found["three"].seed) == (0, 5)
    assert found["one"].variants == {}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a b: {}}", "variants: 'a b' is no name of a variant"),
        ("{one: {models.tuned: x, dpo.beta: 1}}", "variants.one: models.tuned and dpo are both"),
        ("{one: {models.tunde: x}}", "variants.one: models.tunde: unknown key; did you mean"),
        ("{one: {data.sources.3.path: x}}", "variants.one: override 'data.sources.3.path=x'"),
        ("{one: {models.dtype: int8}, two: {}}", "2 mistakes\n  variants.one: models.dtype"),
        ("{one: 3}", "variants.one: input should be a valid dictionary"),
        ("{one: {name: x}}", "variants.one: name: a variant can't change it"),
        ("{one: {variants.a: {}}}", "variants.one: variants.a: a variant can't change it"),
        ("{one: {comparison.draws: 3}}", "variants.one: comparison.draws: a variant can't change"),
    ],
)
def test_mistakes_name_their_variant(variants: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(f"variants={variants}")
    assert message in str(caught.value)


def test_every_variant_is_a_run_and_they_are_compared(tmp_path: Path, stages: Stages) -> None:
    summary = go(tmp_path / "run")
    assert stages.compared == [["one", "two", "three"]]
    assert summary["variants"]["two"]["vector"] == {"variant": "two"}
    assert summary["stages"]["comparison"] == {"variants": 3}
    for name in ("one", "two", "three"):
        folder = tmp_path / "run" / "variants" / name
        assert read_json(folder / "manifest.json")["config"]["models"]["tuned"] == f"c/{name}"
        alone = read_pipeline((folder / "pipeline.yaml").read_text(encoding="utf-8"))
        assert alone == variants_of(config())[name], "the variant's own YAML is that variant"
    manifest = read_json(tmp_path / "run" / "manifest.json")
    assert manifest["variants"]["three"]["changes"] == {"models.tuned": "c/three", "seed": 5}


def test_what_is_identical_is_done_once(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "run")
    data = [item for item in stages.ran if item.endswith(".data")]
    assert data == ["one.data", "three.data"], "two reads what one read; three has another seed"
    assert stages.offered == {"one": 0, "two": LARGE, "three": 0}
    stages.ran.clear()
    go(tmp_path / "run")
    assert stages.ran == []
    assert len(stages.compared) == 1, "an identical comparison is not made again"


def test_states_are_offered_by_the_variant_with_this_base_alone(
    tmp_path: Path, stages: Stages
) -> None:
    """Bases A, B, A: the third reads what the first has read; another dtype shares nothing."""
    changes = (
        "variants={one: {models.tuned: c/one}, other: {models.base: a/c, models.tuned: c/two}, "
        "again: {models.tuned: c/three}, half: {models.tuned: c/one, models.dtype: bfloat16}}"
    )
    go(tmp_path / "run", changes)
    assert stages.offered == {"one": 0, "other": 0, "again": LARGE, "half": 0}
    partial = tmp_path / "run" / "variants" / "again" / "activations" / "stage.json"
    assert read_json(partial)["resumed"] is True


def test_a_revision_belongs_to_its_own_model() -> None:
    found = variants_of(
        config(
            "models.base=org/X@step1000",
            "variants={one: {models.base: org/Y, models.tuned: org/T@r2}, "
            "two: {models.tuned: o/U}}",
        )
    )
    assert (found["one"].models.base, found["one"].models.base_revision) == ("org/Y", None)
    assert (found["one"].models.tuned, found["one"].models.tuned_revision) == ("org/T", "r2")
    assert found["two"].models.base_revision == "step1000"


def test_a_shared_file_is_linked_and_a_rewrite_leaves_the_other_alone(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"x" * LARGE)
    sharing._place(source, tmp_path / "b" / "a")
    assert (tmp_path / "b" / "a").stat().st_ino == source.stat().st_ino
    small = tmp_path / "small.json"
    write_json(small, 1)
    sharing._place(small, tmp_path / "b" / "small.json")
    write_json(tmp_path / "b" / "small.json", 2)
    assert read_json(small) == 1


def test_a_change_of_one_variant_redoes_it_alone(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "run")
    stages.ran.clear()
    go(tmp_path / "run", "variants.two={models.tuned: c/other}")
    assert stages.ran == ["two.activations", "two.vector", "two.report"]
    assert len(stages.compared) == 2


def test_one_failure_does_not_lose_the_others(tmp_path: Path, stages: Stages) -> None:
    def fail(context: StageContext) -> None:
        if context.run.name == "two" and context.name == "vector":
            raise DataError("two is broken; mend it")

    stages.before = fail
    with pytest.raises(StudyError, match=r"1 of 3 variants failed \(two: two is broken; mend it\)"):
        go(tmp_path / "run")
    assert stages.compared == [["one", "three"]]
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["variants"]["two"] == {"failed": "two is broken; mend it"}
    stages.before = lambda _context: None
    stages.ran.clear()
    go(tmp_path / "run")
    assert stages.ran == ["two.vector", "two.report"], "what was complete stays"
    assert stages.compared[-1] == ["one", "two", "three"]


def test_a_null_that_fails_does_not_lose_its_variant(tmp_path: Path, stages: Stages) -> None:
    def fail(context: StageContext) -> None:
        if context.run.name == "plain" and context.name == "vector":
            raise DataError("no null")

    stages.before = fail
    with pytest.raises(StudyError, match=r"nulls failed \(plain: no null\)"):
        go(tmp_path / "run", "nulls={plain: {models.tuned: c/null}}")
    assert stages.compared == [["one", "two", "three"]]
    summary = read_json(tmp_path / "run" / "summary.json")
    assert all("failed" not in told for told in summary["variants"].values())


def test_the_other_processes_run_so_far_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(study, "run_with_nulls", lambda *_args, **given: asked.append(given))
    monkeypatch.setattr(study, "join", lambda: Ranks(rank=1, world=2))
    study.run_study(config(), YAML, tmp_path, until="vector", reporter=SILENT)
    assert [(one["until"], one["only"], one["force"]) for one in asked] == [
        ("vector", None, None)
    ] * 3


def test_a_bug_keeps_its_traceback_and_the_others_their_results(
    tmp_path: Path, stages: Stages
) -> None:
    def fail(context: StageContext) -> None:
        if context.run.name == "one":
            raise ZeroDivisionError("a bug")

    stages.before = fail
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "run")
    assert stages.compared == [["two", "three"]]


def test_a_kill_in_the_middle_of_sharing_leaves_no_false_claim(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, copied = sharing._place, []

    def dying(source: Path, target: Path) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(target)
        place(source, target)

    monkeypatch.setattr(sharing, "_place", dying)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    assert Run(tmp_path / "run" / "variants" / "two").stage("data").record() is None
    monkeypatch.setattr(sharing, "_place", place)
    go(tmp_path / "run")
    assert stages.compared == [["one", "two", "three"]]


def test_until_only_and_force_reach_every_variant(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "run", until="activations")
    assert not any(item.endswith(".vector") for item in stages.ran)
    go(tmp_path / "run")
    stages.ran.clear()
    go(tmp_path / "run", force="vector")
    expected = [f"{name}.{stage}" for name in ("one", "two", "three")
                for stage in ("vector", "report")]  # fmt: skip
    assert stages.ran == expected
    with pytest.raises(ConfigError, match="--only cosine: this pipeline does not configure"):
        go(tmp_path / "run", only="cosine")


def test_as_far_as_asked_there_may_be_nothing_to_compare(tmp_path: Path, stages: Stages) -> None:
    summary = go(tmp_path / "run", until="data")
    assert summary["stages"] == {}
    assert stages.compared == []
    assert not (tmp_path / "run" / "comparison").exists()
    go(tmp_path / "run")
    assert stages.compared == [["one", "two", "three"]]


def test_what_is_out_of_date_is_not_compared(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "run")
    changed = (
        "variants={one: {models.tuned: c/one}, two: {models.tuned: c/new}, "
        "three: {models.tuned: c/three, seed: 5}}"
    )
    go(tmp_path / "run", changed, until="activations")
    assert stages.compared[-1] == ["one", "three"], "two has new states and an old vector"


def test_force_reaches_the_comparison_alone(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "run")
    stages.ran.clear()
    go(tmp_path / "run", force="comparison")
    assert stages.ran == []
    assert len(stages.compared) == 2


def test_a_copy_that_was_cut_off_does_not_block_a_variant(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_names: object) -> None:
        raise OSError("no links here")

    def cut(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:7])
        if source.name == "base.safetensors":
            raise KeyboardInterrupt

    copy = sharing.shutil.copy2
    monkeypatch.setattr(sharing.os, "link", no_links)
    monkeypatch.setattr(sharing.shutil, "copy2", cut)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    assert not list((tmp_path / "run" / "variants" / "two").rglob("base.safetensors"))
    monkeypatch.setattr(sharing.shutil, "copy2", copy)
    go(tmp_path / "run")
    assert stages.compared[-1] == ["one", "two", "three"]


def test_only_needs_its_inputs_before_anything_is_written(tmp_path: Path, stages: Stages) -> None:
    with pytest.raises(StoreError, match="--only vector: its inputs are missing"):
        go(tmp_path / "run", only="vector")
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_where_a_variant_can_not_run(tmp_path: Path, stages: Stages) -> None:
    with pytest.raises(ConfigError, match=r"\./gone: no such file or folder"):
        go(tmp_path / "run", "variants.two={models.tuned: ./gone}")
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no run"):
        go(tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_the_plan_has_every_variant(tmp_path: Path, stages: Stages) -> None:
    plans = study.plan_study(config(), tmp_path / "run")
    assert [step.action for step in plans["two"]] == ["run"] * 4
    assert not (tmp_path / "run").exists(), "a plan writes nothing"


def test_the_study_itself_is_yaml_that_runs(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path / "run")
    text = (tmp_path / "run" / "pipeline.yaml").read_text(encoding="utf-8")
    assert text == YAML
    assert yaml.safe_load(text)["variants"]["one"] == {"models.tuned": "c/one"}
