"""``dsteer build learned``: what it writes and says, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import planted_pair
from typer.testing import CliRunner

from dsteer import cli
from dsteer.steering.vector import SteeringVectorSet

SMALL = ("--data", "synthetic", "--limit", "40", "--steps", "2", "--batch-size", "4", "-q",
         "--device", "cpu")  # fmt: skip


def ask(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["build", "learned", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    pair = planted_pair(0, hidden_size=16, num_hidden_layers=2, intermediate_size=24,
                        max_position_embeddings=512)  # fmt: skip
    base, tuned = pair.save(tmp_path_factory.mktemp("models"))
    return str(base), str(tuned)


def test_two_sites_from_v_star_beside_the_tuned_model(models, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    sites = ("--site", "resid_post.0", "--site", "final_norm")
    code, said, err = ask(
        models[0], *SMALL, *sites, "--start", "vector", "--tuned", models[1], "--out", str(out)
    )
    assert code == 0, err
    found = SteeringVectorSet.load(out)
    assert list(found) == ["resid_post.0", "final_norm"]
    assert (found.metadata["start"], found.metadata["steps"]) == ("v*", 2)
    assert str(tmp_path.parent) not in str(dict(found.metadata))
    for name in ("learned", "start", "tuned"):
        assert f"  {name:8} reward margin " in said
    again = tmp_path / "w.safetensors"
    code, said, err = ask(
        models[0], *SMALL, "--site", "resid_post.0", "--start", str(out), "--out", str(again)
    )
    assert code == 0, err
    assert SteeringVectorSet.load(again).metadata["start"] == "learned under the DPO loss"
    before = again.read_bytes()
    code, _, err = ask(models[0], *SMALL, "--site", "resid_post.0", "--out", str(again))
    assert (code, again.read_bytes()) == (2, before)
    assert "exists already" in err
    code, said, err = ask(
        models[0], *SMALL, "--site", "resid_post.0", "--out", str(again), "--force"
    )
    assert code == 0, err
    assert "start    reward margin 0" in said
    assert again.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--start", "vector"), "give --tuned MODEL too"),
        (("--start", "nothing.safetensors"), "no such file"),
        (("--site", "resid_post.9"), "the model has 2 blocks"),
        (("--out", "v.pt"), "expected the name of a .safetensors file"),
        (("--positions", "first"), "no such positions"),
        (("--tuned", "./nowhere"), "nowhere"),
        (("--beta", "0"), "beta 0.0: expected a finite number above 0"),
    ],
)
def test_mistakes(models, tmp_path: Path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--site": "resid_post.0", "--out": "v.safetensors"}
    given |= {arguments[0]: arguments[1]}
    code, _, err = ask(models[0], *SMALL, *(word for pair in given.items() for word in pair))
    assert code == 2, err
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_prompts_without_answers_are_refused(models, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"What is {n}?" for n in range(20)), encoding="utf-8")
    code, _, err = ask(
        models[0], "--data", str(file), "--site", "resid_post.0", "-q",
        "--out", str(tmp_path / "v.safetensors"),
    )  # fmt: skip
    assert code == 2
    assert "no pair with two answers" in err
