"""The command line: one clear line and exit 2 for a user's mistake, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsteer import cli, pipeline
from dsteer.stages import StageContext
from dsteer.store import Json

YAML = "name: demo\ndata: {sources: [{format: synthetic}]}\nbase:\ndpo:\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(YAML, encoding="utf-8")
    return tmp_path


def fake(context: StageContext) -> Json:
    return {"headline": {"value": 0.123456, "nothing": None}, "notes": [f"{context.name}: noted"]}


def ask(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_run_prints_headlines_and_notes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "call", fake)
    code, out, err = ask("run", "demo.yaml")
    assert code == 0
    assert "value 0.1235, nothing undefined" in out
    assert "data: data: noted" in out
    assert "dpo: train the tuned model with DPO (not run yet)" in err
    code, out, err = ask("run", "demo.yaml", "--quiet")
    assert (code, err) == (0, "")
    assert "value" in out
    code, out, _ = ask("ls")
    assert "demo" in out
    assert "last: dpo" in out


def test_plan_and_validate(folder: Path) -> None:
    code, out, _ = ask("plan", "demo.yaml", "seed=3")
    assert code == 0
    assert "dpo          run     not run yet" in out
    assert not (folder / "results").exists(), "a plan writes nothing"
    code, out, _ = ask("validate", "demo.yaml")
    assert (code, out) == (0, "demo: valid; stages: data → base → dpo\n")


NO_FILE = "data.sources=[{format: hh-rlhf, path: ./no.jsonl}]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tinny"], "'tinny' is neither a file nor a shipped pipeline; did you mean"),
        (["run", "gone.yaml"], "gone.yaml: no such file"),
        (["run", "demo.yaml", "dpo.betta=1"], "dpo.betta: unknown key; did you mean 'beta'?"),
        (["run", "demo.yaml", "--until", "dop"], "--until dop: no such stage; did you mean 'dpo'?"),
        (["validate", "demo.yaml", NO_FILE], "data.sources.0.path: ./no.jsonl: no such file"),
        (["report", "nowhere"], "nowhere: no run there"),
        (["pipelines", "tinny"], "did you mean 'tiny'?"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_exit_2(
    folder: Path, arguments: list[str], message: str
) -> None:
    code, _, err = ask(*arguments)
    assert code == 2
    assert err.startswith("dsteer: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_pipeline_that_is_no_text(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    code, _, err = ask("validate", "bad.yaml")
    assert code == 2
    assert "not UTF-8 text" in err


def test_debug_shows_the_traceback(folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["validate", "gone.yaml", "--debug"])
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ConfigError"


def test_ctrl_c_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(context: StageContext) -> Json:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "call", interrupt)
    code, _, err = ask("run", "demo.yaml")
    assert code == 130
    assert "the same command goes on from here" in err


def test_read_only_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /proc can't be written by anyone, so this holds for root too.
    monkeypatch.setattr(pipeline, "call", fake)
    code, _, err = ask("run", "demo.yaml", "--out", "/proc/dsteer")
    assert code == 2
    assert err.count("\n") == 1


def test_pipelines_prints_yaml_to_start_from() -> None:
    code, out, _ = ask("pipelines")
    assert code == 0
    assert "tiny" in out
    code, out, _ = ask("pipelines", "tiny")
    assert "name: tiny" in out


def test_module_entry_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsteer", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dsteer ")
