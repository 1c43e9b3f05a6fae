"""Artifacts: atomic writes, hashes, stage states, claims and locks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsteer.errors import StoreError
from dsteer.store import (
    Run,
    atomic_folder,
    atomic_path,
    hash_folder,
    hash_json,
    identify,
    read_json,
    read_metadata,
    read_tensors,
    to_json,
    write_json,
    write_tensors,
)


def test_json_is_canonical_and_undefined_is_null(tmp_path: Path) -> None:
    value = {"b": float("nan"), "a": [np.float64(1.5), np.int64(2), float("inf")], "p": Path("x")}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"a": [1.5, 2, None], "b": None, "p": "x"}
    assert list(json.loads(to_json({"b": 1, "a": 2}))) == ["b", "a"]
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    assert hash_json({"a": 1, "b": (2,)}) == hash_json({"b": [2], "a": 1})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, 1)

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read_json(target) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")

    def fail() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "a").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "a").read_text() == "1"


def test_malformed_files_are_user_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        read_json(bad)
    with pytest.raises(StoreError, match="not a safetensors file"):
        read_tensors(bad)
    with pytest.raises(StoreError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(StoreError, match="no such file"):
        read_tensors(tmp_path / "none")


def test_tensors_round_trip(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "b": np.zeros(0)}
    write_tensors(tmp_path / "t", arrays, {"n": 2, "who": "me"})
    back = read_tensors(tmp_path / "t")
    assert back["a"].tolist() == arrays["a"].tolist()
    assert back["b"].shape == (0,)
    assert read_metadata(tmp_path / "t") == {"n": 2, "who": "me"}


def test_identity_follows_content(tmp_path: Path) -> None:
    file = tmp_path / "d" / "x.txt"
    file.parent.mkdir()
    file.write_text("one")
    before = identify(str(file.parent))
    assert before is not None
    assert before == f"sha256:{hash_folder(file.parent)}"
    file.write_text("two")
    assert identify(str(file.parent)) != before
    assert identify("nobody/knows-this") is None  # offline and not in the cache
    assert identify("../no/such/place") is None


def test_stage_states(tmp_path: Path) -> None:
    stage = Run(tmp_path / "run").stage("data")
    assert stage.state("f") == "absent"
    stage.begin("f")
    (stage.path / "rows").write_text("half")
    assert stage.state("f") == "partial"
    assert stage.state("g") == "stale"
    stage.begin("f")
    assert (stage.path / "rows").is_file(), "partial work of the same fingerprint is kept"
    stage.begin("g")
    assert not (stage.path / "rows").exists(), "partial work of another fingerprint is cleared"
    (stage.path / "rows").write_text("whole")
    (stage.path / "checkpoints" / "step-1").mkdir(parents=True)
    (stage.path / "figures").mkdir()
    (stage.path / "figures" / "a.png").write_text("drawing")
    stage.finish("g", {"n": 1}, {"seconds": 2.0})
    assert stage.state("g") == "complete"
    assert stage.state("f") == "stale"
    assert not (stage.path / "checkpoints").exists(), "scaffolding goes with the last mark"
    record = stage.record()
    assert record is not None
    assert set(record["outputs"]) == {"rows", "result.json"}, "figures can be redrawn"
    (stage.path / "rows").unlink()
    assert stage.state("g") == "stale", "a lost output is never taken for complete"


def test_a_foreign_or_strange_folder_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.claim("one", "name: one")
    run.claim("one", "name: one")
    with pytest.raises(StoreError, match="holds the run 'one', not 'two'"):
        run.claim("two", "name: two")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="not empty and holds no run"):
        Run(tmp_path / "other").claim("one", "")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a file, not a folder"):
        Run(tmp_path / "file").claim("one", "")


def test_two_runs_at_once(tmp_path: Path) -> None:
    holder = (
        "import sys, pathlib\nfrom dsteer.store import Run\n"
        "with Run(pathlib.Path(sys.argv[1])).lock():\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match="another dsteer is working"), Run(tmp_path).lock():
        pass
    process.kill()  # a killed holder leaves no lock behind
    process.communicate()
    with Run(tmp_path).lock():
        pass


def test_metadata_of_other_programs_is_readable(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1)}, tmp_path / "x", metadata={"format": "pt"})
    assert read_metadata(tmp_path / "x") == {"format": "pt"}
    assert json.dumps(read_metadata(tmp_path / "x"))
