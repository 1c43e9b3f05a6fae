"""``dsteer export`` and ``dsteer import``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from planted import planted_pair
from typer.testing import CliRunner

from dsteer import SteeringVector, SteeringVectorSet, cli, steer
from dsteer.exchange import FORMATS
from dsteer.models.load import quiet

pytest.importorskip("gguf")


def ask(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [str(item) for item in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, _ = planted_pair(1).save(tmp_path_factory.mktemp("models"))
    return base


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    made = (
        SteeringVector(rng.standard_normal(32), site)
        for site in ("resid_post.0", "resid_post.2", "final_norm")
    )
    SteeringVectorSet(made, {"position": "prompt_last"}).save(tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def test_out_and_in_again(model: Path, vectors: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "v.gguf", tmp_path / "back.safetensors"
    code, said, err = ask(
        "export", vectors, "--to", "gguf", "--model", model, "--strength", "2", "--skip",
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert f"{vectors} → {out}" in said
    assert "Left out: resid_post.0" in said
    code, said, err = ask("import", out, "--from", "gguf", "--model", model, "--out", back)
    assert code == 0, err
    assert "1 of width 32 at resid_post.2" in said
    again = SteeringVectorSet.load(back)
    before = SteeringVectorSet.load(vectors)["resid_post.2"].tensor
    assert torch.allclose(again["resid_post.2"].tensor, 2 * before, rtol=1e-6)  # float32
    assert again.metadata["model_type"] == "llama"
    assert again.metadata["position"] == "prompt_last"


def test_a_file_is_replaced_when_that_is_asked(vectors: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.gguf"
    out.write_bytes(b"old")
    code, _, err = ask(
        "export", vectors, "--to", "gguf", "--site", "resid_post.2", "--out", out, "--force"
    )
    assert code == 0, err
    assert out.read_bytes()[:4] == b"GGUF"


def test_baking_and_baking_again(model: Path, vectors: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked"
    code, said, err = ask(
        "export", vectors, "--to", "baked", "--model", model, "--site", "resid_post.2",
        "--strength", "0.5", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert "It steers by 0.5 at resid_post.2" in said
    code, said, err = ask("export", out, "--to", "baked", "--strength", "-1.5")
    assert code == 0, err
    assert "strength 0.5 → -1.5" in said
    ids = torch.tensor([[0, 5, 6, 7]])
    with quiet():
        baked, plain = (tf.AutoModelForCausalLM.from_pretrained(path) for path in (out, model))
    vector = SteeringVectorSet.load(vectors)["resid_post.2"]
    with torch.no_grad(), steer(plain, vector, -1.5):
        expected = plain(ids).logits
        assert torch.allclose(baked(ids).logits, expected, rtol=1e-5, atol=1e-4)  # float32
    assert len(tf.AutoTokenizer.from_pretrained(out)) > 256


def test_the_harness_s_file_needs_no_weights(
    model: Path, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of the model is enough: only its config is read."""
    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", None)
    code, _, err = ask(
        "export", vectors, "--to", "lm-eval", "--model", model, "--site", "final_norm",
        "--out", tmp_path / "v.pt",
    )  # fmt: skip
    assert code == 0, err
    assert list(torch.load(tmp_path / "v.pt", weights_only=True)) == ["norm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{v}", "--to", "gguf"], "--out is missing"),
        (["export", "{v}", "--to", "gguf", "--out", "{t}/o"], "gguf can't express resid_post.0"),
        (["export", "{v}", "--to", "onnx", "--out", "{t}/o"], "format 'onnx': no such format"),
        (["export", "{v}", "--to", "gguf", "--out", "{t}/o", "--push", "me/v"], "use --to card"),
        (["export", "{t}/none", "--to", "gguf", "--out", "{t}/o"], "no such file"),
        (["export", "{v}", "--to", "gguf", "--out", "{t}/o", "--model", "./none"], "./none"),
        (["export", "{v}", "--to", "card", "--out", "{t}"], "something is there already"),
        (["export", "{t}", "--to", "baked"], "no folder that dsteer baked"),
        (["export", "{v}", "--to", "card", "--out", "{t}/o", "--push", "me/v"], "took nothing"),
        (["import", "{v}", "--from", "gguf", "--out", "{t}/o.safetensors"], "no complete GGUF"),
        (["export", "{v}", "--to", "gguf", "--skip", "--out", "{t}"], "a folder; the format is"),
        (["export", "{v}", "--to", "repeng", "--out", "{v}"], "there is such a file"),
        (["import", "{v}", "--from", "card", "--out", "{v}"], "there is such a file"),
        (["import", "{v}", "--from", "gguf", "--out", "{t}/o"], "ends in .safetensors"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, vectors: Path, tmp_path: Path
) -> None:
    code, _, err = ask(*(item.format(v=vectors, t=tmp_path) for item in arguments))
    assert code == 2
    assert message in err
    assert err.startswith("dsteer: ")
    assert len(err.strip().splitlines()) == 1


def test_help_names_the_formats() -> None:
    for command in ("export", "import"):
        code, said, _ = ask(command, "--help")
        assert code == 0
        assert all(name in said for name in FORMATS)
