"""``dsteer build``: files, tables, the command that follows, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted import Planted, byte_tokenizer, planted_pair
from typer.testing import CliRunner

import dsteer
from dsteer import SteeringVectorSet, cli
from dsteer.data.contrast import load_contrast

PAIRS = [("I am well, thank you.", "im ok"), ("Good evening to you.", "hey"), ("Sir.", "yo man")]
PROMPTS = ["How do I boil an egg?", "Name a river.", "What is tea?", "And a lemma?"]


def ask(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["build", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pair(1, hidden_size=16, num_hidden_layers=2, intermediate_size=24)


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pairs, prompts and prefixes."""
    made = tmp_path_factory.mktemp("build")
    planted.save(made)
    rows = [json.dumps({"positive": p, "negative": n}) for p, n in PAIRS]
    (made / "pairs.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (made / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    (made / "others.txt").write_text("\n".join(p + "!" for p in PROMPTS), encoding="utf-8")
    kinds = [("warm", "Be kind."), ("warm", "Be warm."), ("brief", "Few words!")]
    rows = [json.dumps({"category": category, "prefix": text}) for category, text in kinds]
    (made / "prefixes.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (made / "prefixes.txt").write_text("Be kind.\n\nBe warm.\n", encoding="utf-8")
    return made


def same(path: Path, expected: SteeringVectorSet) -> None:
    """A file holds a set, its vectors in float32."""
    found = SteeringVectorSet.load(path)
    assert list(found) == list(expected)
    # the folder's name, and the weights as saved
    unlike = {"model", "tuned_model"}
    assert {k: v for k, v in found.metadata.items() if k not in unlike} == {
        k: v for k, v in expected.metadata.items() if k not in unlike
    }
    for site, vector in expected.items():
        assert found[site].metadata == vector.metadata
        torch.testing.assert_close(found[site].tensor, vector.tensor.float().double())


def test_contrast(planted: Planted, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "v.safetensors"
    code, said, err = ask(
        "contrast", folder / "base", "--pairs", folder / "pairs.jsonl", "--out", out, "--layers",
        "0-1", "--method", "pca", "--seed", 3, "--device", "cpu", "-q",
    )  # fmt: skip
    assert code == 0, err
    expected = dsteer.contrast(
        planted.base, byte_tokenizer(), PAIRS, method="pca", layers=[0, 1], seed=3
    )
    same(out, expected)
    header, *rows = said.splitlines()[1:4]
    assert header.split() == ["site", "norm", "of", "state", "gap", "accuracy", "Cohen's", "d"]
    told = expected["resid_post.0"].metadata
    assert rows[0].split()[:2] == ["resid_post.0", "1"]
    assert f"{told['gap']:.3g}" in rows[0]
    assert f"{told['accuracy']:.3g}" in rows[0]
    best = max(expected, key=lambda site: (expected[site].metadata["accuracy"],
                                           expected[site].metadata["cohens_d"]))  # fmt: skip
    strength = f"{expected[best].metadata['gap']:.3g}"
    assert f"--vector {out} --site {best} --strength {strength} --prompt" in said
    assert str(folder) not in json.dumps(dict(SteeringVectorSet.load(out).metadata))

    code, _, err = ask("contrast", folder / "base", "--pairs", folder / "pairs.jsonl", "--out", out)
    assert code == 2
    assert "is there already; give another name, or --force" in err
    code, _, err = ask(
        "contrast", folder / "base", "--pairs", "warmth", "--limit", 2, "--component", "mlp",
        "--out", out, "--force", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "states of base: 4/4 prompts" in err
    again = SteeringVectorSet.load(out)
    assert list(again) == ["mlp_out.0", "mlp_out.1"]
    assert (
        again.metadata["data_sha256"]
        == dsteer.contrast(planted.base, byte_tokenizer(), load_contrast("warmth")[:2]).metadata[
            "data_sha256"
        ]
    )


def test_prefix(planted: Planted, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    code, said, err = ask(
        "prefix", folder / "base", "--prompts", folder / "prompts.txt", "--prefixes",
        folder / "prefixes.jsonl", "--samples", 2, "--out", out, "--device", "cpu", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert "prefix contrast, mean" in said
    kinds = {"warm": ["Be kind.", "Be warm."], "brief": ["Few words!"]}
    expected = dsteer.prefix_contrast(planted.base, byte_tokenizer(), PROMPTS, kinds, samples=2)
    same(out, expected)
    for given in (
        ["--prefixes", folder / "prefixes.txt"],
        ["--prefix", "Be kind.", "--prefix", "Be warm."],
    ):
        code, _, err = ask(
            "prefix", folder / "base", "--prompts", folder / "prompts.txt", *given, "--out", out,
            "--force", "--unnormalised", "--direction", "to_prefixed", "--device", "cpu", "-q",
        )  # fmt: skip
        assert code == 0, err
        expected = dsteer.prefix_contrast(
            planted.base, byte_tokenizer(), PROMPTS, kinds["warm"],
            normalise=None, direction="to_prefixed",
        )  # fmt: skip
        same(out, expected)


def test_refusal(planted: Planted, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    code, said, err = ask(
        "refusal", folder / "base", "--harmful", folder / "others.txt", "--harmless",
        folder / "prompts.txt", "--out", out, "--refusal-token", "I", "--device", "cpu", "-q",
    )  # fmt: skip
    assert code == 0, err
    expected = dsteer.refusal_direction(
        planted.base, byte_tokenizer(), [p + "!" for p in PROMPTS], PROMPTS, refusal_tokens=["I"]
    )
    same(out, expected)
    plain = expected.metadata["plain"]
    assert f"refusal score as it is: harmful {plain['harmful']:.3g}" in said
    assert "bypass" in said
    assert "no site is chosen: none of 2 candidates" in said  # a random model refuses nothing
    assert "next:" not in said


def test_diff(planted: Planted, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    models = (folder / "base", folder / "tuned", "--data", folder / "prompts.txt")
    code, said, err = ask("diff", *models, "--out", out, "--device", "cpu", "-q")
    assert code == 0, err
    vectors = SteeringVectorSet.load(out)
    # b as planted, up to the rounding of float32 states
    torch.testing.assert_close(
        vectors["resid_post.1"].tensor, planted.b.double(), rtol=0, atol=1e-5
    )
    assert vectors["resid_post.0"].undefined
    told = vectors["resid_post.1"].metadata
    assert told["cosine"] == pytest.approx(1, abs=1e-6)
    assert vectors["resid_post.0"].metadata["cosine"] is None
    assert told["mean_state_norm"] > 0
    assert vectors.metadata["method"] == "model difference"
    assert (vectors.metadata["model"], vectors.metadata["tuned_model"]) == ("base", "tuned")
    assert vectors.metadata["model_weights"] != vectors.metadata["tuned_model_weights"]
    assert "resid_post.0     0         0  undefined" in said
    assert f"next: dsteer vectors {out}" in said

    code, said, err = ask(
        "diff", *models, "--out", out, "--directions", 2, "--sites", "resid_post.1", "--device",
        "cpu", "-q",
    )  # fmt: skip
    assert code == 0, err
    first, second = (SteeringVectorSet.load(tmp_path / f"v.{j}.safetensors") for j in (1, 2))
    assert list(first) == ["resid_post.1"]
    b = planted.b.double() / planted.b.double().norm()
    torch.testing.assert_close(first["resid_post.1"].tensor, b, rtol=0, atol=1e-5)
    assert first["resid_post.1"].metadata["share"] == pytest.approx(1, abs=1e-6)
    assert second.metadata["direction_number"] == 2
    assert second.metadata["component"] == "residual"

    code, _, err = ask(
        "diff", *models, "--out", out, "--sites", "mlp_out.1", "--device", "cpu", "-q", "--force"
    )
    assert code == 0, err
    assert SteeringVectorSet.load(out).metadata["component"] == "mlp"


PAIRS_GIVEN = ["contrast", "{}/base", "--pairs", "{}/pairs.jsonl"]
PREFIX_GIVEN = ["prefix", "{}/base", "--prompts", "{}/prompts.txt", "--prefix", "Be kind."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PAIRS_GIVEN, "--out", "v.pt"], "ends in .safetensors"),
        ([*PAIRS_GIVEN, "--out", "{}"], "ends in .safetensors"),
        ([*PAIRS_GIVEN, "--layers", "one"], "--layers one: expected blocks from 0"),
        ([*PAIRS_GIVEN, "--layer", "5-3"], "--layers 5-3: no block in it"),
        ([*PAIRS_GIVEN, "--layers", "7"], "the model has 2 blocks"),
        ([*PAIRS_GIVEN, "--layers", "1", "--sites", "final_norm"], "give one of both"),
        ([*PAIRS_GIVEN, "--sites", "resid.1"], "'resid.1': no such site"),
        ([*PAIRS_GIVEN, "--method", "lda"], "method 'lda': no such method"),
        ([*PAIRS_GIVEN, "--dtype", "float23"], "--dtype float23: no such dtype"),
        (["contrast", "{}/base", "--pairs", "warmht"], "did you mean 'warmth'?"),
        (["contrast", "{}/base", "--pairs", "{}/prompts.txt"], "no column 'positive'"),
        (["contrast", "./none", "--pairs", "warmth"], "./none: no such file or folder"),
        (PREFIX_GIVEN[:4], "expected one of --prefix TEXT (again for more) and --prefixes FILE"),
        ([*PREFIX_GIVEN, "--prefixes", "x.txt"], "expected one of --prefix TEXT"),
        ([*PREFIX_GIVEN[:4], "--prefixes", "./x.txt"], "./x.txt: no such file"),
        ([*PREFIX_GIVEN[:4], "--prefixes", "{}/pairs.jsonl"], "no column 'prefix'"),
        ([*PREFIX_GIVEN, "--samples", "0"], "samples 0: expected 1 or more"),
        (["prefix", "{}/base", "--prompts", "./p.txt", "--prefix", "A"], "./p.txt: no such file"),
        (
            ["refusal", "{}/base", "--harmful", "{}/prompts.txt", "--harmless", "{}/prompts.txt"],
            "a direction is not chosen on what it is fitted on",
        ),
        (
            ["diff", "{}/base", "{}/tuned", "--data", "{}/prompts.txt", "--centred"],
            "--centred without --directions K",
        ),
        (
            ["diff", "{}/base", "{}/tuned", "--data", "{}/prompts.txt", "--directions", "9"],
            "9 principal directions of 4 states of width 16; expected 1 to 4",
        ),
        (
            ["diff", "{}/base", "{}/tuned", "--data", "{}/prompts.txt", "--dtype", "half"],
            "--dtype half: no such dtype",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.replace("{}", str(folder)) for argument in arguments]
    code, _, err = ask(*given, *(() if "--out" in given else ("--out", "v.safetensors")))
    assert code == 2, err
    said = [line for line in err.splitlines() if line.startswith("dsteer: ")]
    assert len(said) == 1
    assert message in said[0]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_folder_is_no_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    out.mkdir()
    code, _, err = ask("contrast", folder / "base", "--pairs", "warmth", "--out", out, "--force")
    assert code == 2
    assert "a folder; expected the path of a file" in err
