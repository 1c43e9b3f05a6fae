"""Planning and running with stand-in stages: skip, redo, resume, force, only, until, errors."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dsteer import pipeline
from dsteer.config import PipelineConfig, read_pipeline
from dsteer.errors import ConfigError, DataError, DsteerError, StoreError
from dsteer.pipeline import make_plan, run_pipeline
from dsteer.progress import SILENT
from dsteer.stages import STAGES, StageContext
from dsteer.store import Json, Run, read_json

YAML = (
    "name: demo\ndata: {sources: [{format: synthetic}]}\n"
    "base:\ndpo:\nactivations:\nvector:\ncosine:\nspectrum:\ntemplate:\ngeometry:\nlearned:\n"
    "profile:\nrank:\nmaps:\nstrength:\ninterpolation:\ninversion:\n"
    "transfer: {base: a/b, tuned: a/c}\ncontrol:\ngroups:\nreversal:\nclaims:\nreport:\n"
)
ALL = [stage.name for stage in STAGES]
EDITING = ["profile", "rank", "maps", "strength"]


def from_states(name: str) -> list[str]:
    """A stage and those behind it that read the stored states; two read their own."""
    return [stage for stage in from_pair(name) if stage != "template"]


def from_pair(name: str) -> list[str]:
    """A stage and those behind it that have to do with the pair; control reads the base alone."""
    return [stage for stage in ALL[ALL.index(name) :] if stage != "control"]


class Stages:
    """Stand-ins for the stages: each writes one file that tells its inputs."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.before: dict[str, Callable[[StageContext], None]] = {}

    def __call__(self, context: StageContext) -> Json:
        self.ran.append(context.name)
        if context.name in self.before:
            self.before[context.name](context)
        told = {name: (path / "out.txt").read_text() for name, path in context.inputs.items()}
        (context.folder / "out.txt").write_text(f"{context.name}({','.join(sorted(told))})")
        return {"headline": {"inputs": len(told)}, "notes": [f"{context.name} ran"]}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages()
    monkeypatch.setattr(pipeline, "call", fake)
    return fake


def config(*overrides: str) -> PipelineConfig:
    return read_pipeline(YAML, overrides)


def go(out: Path, *overrides: str, **options: str) -> Json:
    settings = config(*overrides)
    return run_pipeline(settings, YAML, out, overrides=overrides, reporter=SILENT, **options)  # type: ignore[arg-type]


def test_runs_all_then_skips_all(tmp_path: Path, stages: Stages) -> None:
    summary = go(tmp_path / "r")
    assert stages.ran == ALL
    assert summary["stages"]["report"] == {"inputs": len(ALL) - 1}
    assert {"stage": "dpo", "text": "dpo ran"} in summary["notes"]
    before = (tmp_path / "r" / "summary.json").read_bytes()
    go(tmp_path / "r")
    assert stages.ran == ALL, "identical and complete stages are skipped"
    assert (tmp_path / "r" / "summary.json").read_bytes() == before
    assert (tmp_path / "r" / "pipeline.yaml").read_text() == YAML


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dpo.beta=0.7", from_pair("dpo")),
        ("activations.position=prompt_mean", from_states("activations")),
        ("vector.bootstrap=7", from_states("vector")),
        ("cosine.bootstrap=7", ["cosine", *EDITING[1:], "groups", "claims", "report"]),
        ("spectrum.top=3", ["spectrum", "claims", "report"]),
        ("template.prompts=7", ["template", "report"]),
        ("geometry.pairs=7", ["geometry", "interpolation", "claims", "report"]),
        ("learned.steps=7", ["learned", "report"]),
        ("interpolation.temperature=0.5", ["interpolation", "claims", "report"]),
        ("profile.pairs=7", [*EDITING, "groups", "claims", "report"]),
        ("rank.most=7", ["rank", "claims", "report"]),
        ("strength.pairs=7", ["strength", "claims", "report"]),
        ("inversion.prompts=7", ["inversion", "reversal", "claims", "report"]),
        ("transfer.pairs=7", ["transfer", "report"]),
        ("control.pairs=7", ["control", "report"]),
        ("claims.suffices=0.7", ["claims", "report"]),
        (
            "behaviour.reward_model=a/b",
            ["interpolation", "inversion", "reversal", "claims", "report"],
        ),
        ("report.title=Hello", ["report"]),
        ("description=Hello", ["report"]),
        ("base.steps=7", ALL[1:]),
        ("data.splits.fit=7", ALL),
        ("models.dtype=bfloat16", ALL[ALL.index("dpo") :]),
    ],
)
def test_one_changed_key_reruns_exactly_what_depends_on_it(
    tmp_path: Path, stages: Stages, override: str, expected: list[str]
) -> None:
    go(tmp_path)
    stages.ran.clear()
    steps = make_plan(config(override), Run(tmp_path))
    assert [s.stage.name for s in steps if s.action != "skip"] == expected
    key = override.partition("=")[0]
    changed = next(s for s in steps if s.action == "redo")
    assert key in changed.why
    go(tmp_path, override)
    assert stages.ran == expected


def test_a_cut_off_stage_resumes_with_its_partial_work(tmp_path: Path, stages: Stages) -> None:
    def die(context: StageContext) -> None:
        (context.folder / "half").write_text("half")
        raise KeyboardInterrupt

    stages.before["activations"] = die
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert set(read_json(tmp_path / "summary.json")["stages"]) == {"data", "base", "dpo"}
    seen: list[bool] = []
    stages.before["activations"] = lambda c: seen.append((c.folder / "half").is_file())
    plan = {s.stage.name: s.action for s in make_plan(config(), Run(tmp_path))}
    assert plan["dpo"] == "skip"
    assert plan["activations"] == "resume"
    assert plan["vector"] == "run"
    stages.ran.clear()
    go(tmp_path)
    assert seen == [True]
    assert stages.ran == ALL[3:]


def test_partial_work_of_other_settings_is_not_reused(tmp_path: Path, stages: Stages) -> None:
    def die(context: StageContext) -> None:
        (context.folder / "half").write_text("half")
        raise DataError("x")

    stages.before["data"] = die
    with pytest.raises(DataError):
        go(tmp_path)
    seen: list[bool] = []
    stages.before["data"] = lambda c: seen.append((c.folder / "half").is_file())
    go(tmp_path, "seed=4")
    assert seen == [False]


def test_until_only_force(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path, until="dpo")
    assert stages.ran == ["data", "base", "dpo"]
    stages.ran.clear()
    with pytest.raises(StoreError, match=r"--only vector: its inputs .*\(activations\)"):
        go(tmp_path, only="vector")
    go(tmp_path, only="activations")
    assert stages.ran == ["activations"]
    go(tmp_path)
    stages.ran.clear()
    go(tmp_path, force="cosine")
    assert stages.ran == ["cosine", *EDITING[1:], "groups", "claims", "report"]
    stages.ran.clear()
    go(tmp_path, "seed=1", only="data")
    assert stages.ran == ["data"]
    with pytest.raises(StoreError, match="--only cosine"):
        go(tmp_path, "seed=1", only="cosine")


def test_a_lost_output_reruns_its_stage_and_all_that_read_it(
    tmp_path: Path, stages: Stages
) -> None:
    # As in a fresh clone of committed results, which hold no weights and no states.
    go(tmp_path)
    (tmp_path / "base" / "out.txt").unlink()
    stages.ran.clear()
    plan = {s.stage.name: s for s in make_plan(config(), Run(tmp_path))}
    assert plan["data"].action == "skip"
    assert plan["dpo"].why == "base runs again"
    go(tmp_path)
    assert stages.ran == ALL[1:]


def test_what_is_forced_is_forced_downstream_though_killed_in_between(
    tmp_path: Path, stages: Stages
) -> None:
    go(tmp_path)

    def die(context: StageContext) -> None:
        raise KeyboardInterrupt

    stages.before["dpo"] = die
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, force="dpo")
    del stages.before["dpo"]
    stages.ran.clear()
    go(tmp_path)
    assert stages.ran == from_pair("dpo"), "what read the old output is not taken for complete"


def test_the_manifest_accounts_for_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(context: StageContext) -> Json:
        return {"headline": {}, "notes": [], "sources": [{"dropped": {"empty_answer": 3}}]}

    monkeypatch.setattr(pipeline, "call", data)
    go(tmp_path, until="data")
    assert read_json(tmp_path / "manifest.json")["data"]["sources"][0]["dropped"] == {
        "empty_answer": 3
    }


def test_stage_names_are_checked(tmp_path: Path, stages: Stages) -> None:
    with pytest.raises(ConfigError, match=r"--until cosin: no such stage; did you mean 'cosine'"):
        go(tmp_path, until="cosin")
    with pytest.raises(ConfigError, match="does not configure that stage"):
        go(tmp_path, "cosine=null", only="cosine")
    assert stages.ran == []


def test_a_missing_local_input_is_told_before_any_work(tmp_path: Path, stages: Stages) -> None:
    source = "data.sources=[{format: hh-rlhf, path: ./nothing.jsonl.gz}]"
    with pytest.raises(
        ConfigError, match=r"data\.sources\.0\.path: \./nothing\.jsonl\.gz: no such"
    ):
        go(tmp_path, source, "control=null")
    with pytest.raises(ConfigError, match=r"models\.tuned: \.\./gone: no such file"):
        go(tmp_path, "dpo=null", "models.tuned=../gone")
    assert stages.ran == []
    assert list(tmp_path.iterdir()) == [], "nothing is half-written"


def test_changed_content_of_an_input_reruns(tmp_path: Path, stages: Stages) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("one")
    source = f"data.sources=[{{format: preference, path: {data}}}]"
    go(tmp_path / "r", source, "control=null")
    data.write_text("two")
    steps = make_plan(config(source, "control=null"), Run(tmp_path / "r"))
    assert [s.action for s in steps] == ["redo"] * (len(ALL) - 1)
    assert "other content" in steps[0].why


def test_changed_content_of_what_a_sweep_reads_reruns_it(tmp_path: Path, stages: Stages) -> None:
    questions, samples = tmp_path / "questions.csv", tmp_path / "samples.txt"
    for path in (questions, samples):
        path.write_text("one")
    settings = (f"behaviour.truthfulqa.path={questions}", f"inversion.samples={samples}")
    go(tmp_path / "r", *settings)
    for path, expected in (
        (samples, ["inversion", "reversal", "claims", "report"]),
        (questions, ["interpolation", "inversion", "reversal", "claims", "report"]),
    ):
        path.write_text("two")
        steps = make_plan(config(*settings), Run(tmp_path / "r"))
        assert [s.stage.name for s in steps if s.action != "skip"] == expected
        path.write_text("one")
    with pytest.raises(ConfigError, match=r"inversion\.samples: .*no such file"):
        make_plan(config("inversion.samples=./nowhere.txt"), Run(tmp_path / "r"))


def test_changed_vectors_of_a_sender_rerun_the_transfer(tmp_path: Path, stages: Stages) -> None:
    vectors, text = tmp_path / "v.safetensors", tmp_path / "text.txt"
    for path in (vectors, text):
        path.write_text("one")
    settings = (
        f"transfer={{base: a/b, vectors: {vectors}, text: {{format: prompts, path: {text}}}}}",
    )
    go(tmp_path / "r", *settings)
    for path in (vectors, text):
        path.write_text("two")
        steps = make_plan(config(*settings), Run(tmp_path / "r"))
        assert [s.stage.name for s in steps if s.action != "skip"] == ["transfer", "report"]
        path.write_text("one")
    with pytest.raises(ConfigError, match=r"transfer\.text\.path: .*no such file"):
        make_plan(config(*settings, "transfer.text.path=./gone.txt"), Run(tmp_path / "r"))


def test_absent_sections_are_absent_from_the_plan(tmp_path: Path) -> None:
    left_out = (
        "base", "dpo", "template", "geometry", "learned", *EDITING, "inversion", "transfer",
        "control", "groups", "reversal", "claims", "report",
    )  # fmt: skip
    absent = [f"{name}=null" for name in left_out]
    pair = config(*absent, "models.base=a/b", "models.tuned=a/c")
    found = [step.stage.name for step in make_plan(pair, Run(tmp_path))]
    assert found == ["data", "activations", "vector", "cosine", "spectrum", "interpolation"]
    alone = ("dpo", "activations", "vector", "cosine", "spectrum", "interpolation", *left_out[2:])
    alone = tuple(name for name in alone if name not in {"control", "report"})
    base = config(*(f"{name}=null" for name in alone))
    found = [step.stage.name for step in make_plan(base, Run(tmp_path / "alone"))]
    assert found == ["data", "base", "control", "report"], "what needs no pair needs no tuned model"


def test_template_alone_vouches_for_both_models(tmp_path: Path, stages: Stages) -> None:
    yaml = "name: demo\ndata: {sources: [{format: synthetic}]}\ntemplate:\n"
    files = {key: tmp_path / key for key in ("base", "tuned", "tokenizer")}
    for path in files.values():
        path.mkdir()
        (path / "config.json").write_text("one")
    settings = read_pipeline(yaml, [f"models.{key}={path}" for key, path in files.items()])
    run_pipeline(settings, yaml, tmp_path / "r", reporter=SILENT)
    for path in files.values():
        (path / "config.json").write_text("two")
        steps = make_plan(settings, Run(tmp_path / "r"))
        assert [s.stage.name for s in steps if s.action != "skip"] == ["template"]
        (path / "config.json").write_text("one")


def test_another_pipelines_folder_is_refused(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path)
    with pytest.raises(StoreError, match="holds the run 'demo', not 'other'"):
        go(tmp_path, "name=other")


def test_disk_trouble_is_one_line(tmp_path: Path, stages: Stages) -> None:
    def full(context: StageContext) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def wrapped(context: StageContext) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    def read_only(context: StageContext) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "out.txt")

    for trouble, message in (
        (full, "disk is full"),
        (wrapped, "disk is full"),
        (read_only, "can't be written"),
    ):
        stages.before["dpo"] = trouble
        with pytest.raises(StoreError, match=message):
            go(tmp_path)
    del stages.before["dpo"]
    go(tmp_path)


def test_a_bug_is_not_dressed_up_as_a_users_mistake(tmp_path: Path, stages: Stages) -> None:
    def bug(context: StageContext) -> None:
        raise ZeroDivisionError

    stages.before["data"] = bug
    with pytest.raises(ZeroDivisionError):
        go(tmp_path)


def test_two_runs_on_one_folder(tmp_path: Path, stages: Stages) -> None:
    inside, release = threading.Event(), threading.Event()

    def hold(context: StageContext) -> None:
        inside.set()
        assert release.wait(30)

    stages.before["base"] = hold
    first = threading.Thread(target=go, args=(tmp_path,))
    first.start()
    assert inside.wait(30)
    with pytest.raises(StoreError, match="another dsteer is working"):
        go(tmp_path)
    release.set()
    first.join()
    assert stages.ran == ALL


def test_manifest_says_what_ran(tmp_path: Path, stages: Stages) -> None:
    go(tmp_path, "dpo.beta=0.3")
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["config"]["dpo"]["beta"] == 0.3
    assert manifest["overrides"] == ["dpo.beta=0.3"]
    assert manifest["versions"]["torch"]
    for name in ALL:
        record = manifest["stages"][name]
        assert record["seconds"] >= 0
        assert record["peak_memory_bytes"]["host"] > 0
        assert "out.txt" in record["outputs"]
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()


def test_errors_are_dsteer_errors() -> None:
    assert issubclass(StoreError, DsteerError)
