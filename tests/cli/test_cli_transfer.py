"""``dsteer transfer``: the pipeline that it writes, a run of it, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from planted import planted_pair
from typer.testing import CliRunner

from dsteer import cli
from dsteer.compare import Prompts, find_prompts, transfer_between
from dsteer.config import SPLITS, PreferenceSource, SyntheticSource, read_pipeline
from dsteer.data.synthetic import World
from dsteer.errors import DataError
from dsteer.store import read_json

SMALL = (
    "data.sources=[{format: synthetic, conversations: 60}]",
    "data.splits={fit: 6, tune: 4, test: 6}",
    "activations={noise_floor_prompts: 2, response_tokens: 2, max_tokens: 64}",
    "vector={bootstrap: 50, convergence_draws: 2}",
    "cosine={bootstrap: 50, null_draws: 10}",
    "models.device=cpu",
    "transfer.text_tokens=1500",
    "transfer.text_length=60",
    "transfer.maps=[ridge]",
    "transfer.strengths=[0.5, 1]",
    "transfer.response_tokens=4",
    "transfer.max_tokens=40",
    "transfer.bootstrap=50",
)


def ask(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    pair = planted_pair(1, hidden_size=16, num_hidden_layers=2, intermediate_size=24)
    base, tuned = pair.save(tmp_path_factory.mktemp("models"))
    return str(base), str(tuned)


def test_a_run_from_two_pairs(models: tuple[str, str], tmp_path: Path) -> None:
    """The pair against itself: all of the native effect."""
    out = tmp_path / "out"
    code, said, err = ask(
        "transfer", *models, *models, *SMALL, "--data", "synthetic", "--out", str(out), "-q"
    )
    assert code == 0, err
    assert "transfer-tuned-to-tuned" in said
    assert "share 1" in said
    result = read_json(out / "transfer" / "result.json")
    assert result["metrics"]["kl_recovered"]["one"]["share"]["value"] == pytest.approx(1, abs=1e-6)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "transfer/figures/share_of_native.pdf" in html
    assert "The vector of tuned (base base), carried from its resid_post.1 to resid_post.1" in html
    assert str(tmp_path) not in (out / "transfer" / "result.json").read_text(encoding="utf-8")
    # the YAML that was written repeats the run: nothing is left to do
    code, plan, _ = ask("plan", str(out / "pipeline.yaml"), "--out", str(out))
    assert code == 0
    assert plan.count(" skip ") == 6


def test_the_pipeline(tmp_path: Path) -> None:
    prompts = find_prompts("synthetic", use=SPLITS)
    text = transfer_between(("a/base", "a/tuned"), ("b/base", "./runs/b model/"), prompts)
    config = read_pipeline(text)
    assert config.name == "transfer-tuned-to-b-model"
    assert config.transfer is not None
    assert (config.transfer.base, config.transfer.tuned) == ("a/base", "a/tuned")
    assert (config.models.base, config.models.tuned) == ("b/base", "./runs/b model/")
    assert yaml.safe_load(text)["transfer"] == {"base": "a/base", "tuned": "a/tuned"}

    trained = transfer_between(("r/a/base/model", "r/a/dpo/model"), ("c", "model"), prompts)
    assert read_pipeline(trained).name == "transfer-dpo-to-model"

    saved = read_pipeline(transfer_between(("a/base", "v/a.safetensors"), ("b", "c"), prompts))
    assert saved.transfer is not None
    assert (saved.transfer.tuned, saved.transfer.vectors) == (None, "v/a.safetensors")
    assert saved.name == "transfer-a-to-c"
    assert isinstance(saved.data.sources[0], SyntheticSource)

    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in World(0).pairs(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = find_prompts(str(path), use=SPLITS)
    half = read_pipeline(transfer_between(("a", "b"), ("c", "d"), found)).data
    assert isinstance(half.sources[0], PreferenceSource)
    assert half.sources[0].path == str(path)
    measuring = half.splits.fit + half.splits.tune + half.splits.test
    assert measuring <= found.conversations / 2, "the rest is the neutral text of the map"
    with pytest.raises(DataError, match="the prompts have no answers"):
        transfer_between(("a", "b"), ("c", "d"), Prompts({}, 60, answered=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "c", "d", "--data", "./gone.jsonl"], "./gone.jsonl: no such file or folder"),
        (
            ["a", "b", "c", "d", "--data", "synthetic", "transfer.mops=[cca]"],
            "transfer.mops: unknown key; did you mean 'maps'?",
        ),
        (
            ["a", "gone.safetensors", "c", "d", "--data", "synthetic"],
            "transfer.vectors: gone.safetensors: no such file or folder",
        ),
        (["./a", "b", "c", "d", "--data", "synthetic"], "transfer.base: ./a: no such file"),
    ],
)  # fmt: skip
def test_mistakes(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = ask("transfer", *arguments)
    assert code == 2
    assert err.startswith("dsteer: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists(), "nothing half-written"
