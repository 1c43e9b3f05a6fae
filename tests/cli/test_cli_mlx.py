"""``dsteer steer --backend mlx`` beside the same command on transformers, and its mistakes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from mlx_models import both
from planted import PROMPTS
from typer.testing import CliRunner

pytest.importorskip("mlx_lm", reason="needs mlx-lm: no wheels for this platform")

from dsteer import cli
from dsteer.steering.vector import SteeringVector, SteeringVectorSet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, a vector that changes what it writes, and a set of two sites."""
    made = tmp_path_factory.mktemp("mlx")
    both("llama", made / "base")
    generator = torch.Generator().manual_seed(3)
    one, two = (
        SteeringVector(torch.randn(32, generator=generator), site)
        for site in ("resid_post.1", "final_norm")
    )
    about = {"model_type": "llama", "model_blocks": 4, "model_width": 32}
    SteeringVectorSet([one], about).save(made / "v.safetensors")
    SteeringVectorSet([one, two]).save(made / "set.safetensors")
    SteeringVectorSet([one], {**about, "model_type": "gemma"}).save(made / "other.safetensors")
    return made


def steer(
    folder: Path, *arguments: str, vector: str = "v.safetensors", model: str = "base"
) -> tuple[int, str, str]:
    given = ["steer", str(folder / model), "--vector", str(folder / vector)]
    result = CliRunner().invoke(cli.app, [*given, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--strength", "0,2", "--compare"),
        ("--strength", "2", "--positions", "generated", "--schedule", "linear:5"),
        ("--strength", "2", "--guidance", "1.7"),
        ("--strength", "2", "--temperature", "1", "--seed", "4"),
        ("--template", "--system", "Be brief."),
        ("--layer", "1", "--stop", "a"),
    ],
)
def test_both_backends_say_the_same(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Every text and all that is said of it; float32 weights, no near ties."""
    prompts = [option for text in PROMPTS[:2] for option in ("--prompt", text)]
    shared = (*prompts, *arguments, "--max-new-tokens", "8", "--json")
    code, out, err = steer(folder, *shared, "--backend", "mlx")
    assert code == 0, err
    code, expected, err = steer(folder, *shared, "--device", "cpu")
    assert code == 0, err
    assert json.loads(out) == json.loads(expected)
    assert str(folder) not in out


def test_several_vectors_and_plain_text(folder: Path) -> None:
    """Two sets at their own sites write as on transformers, and one text is printed alone."""
    extra = ("--vector", f"s={folder / 'set.safetensors'}", "--site", "s=final_norm")
    shared = (*extra, "--prompt", PROMPTS[1], "--strength", "2", "--strength", "s=-1")
    code, out, err = steer(folder, *shared, "--backend", "mlx", "--max-new-tokens", "8")
    assert code == 0, err
    expected = steer(folder, *shared, "--device", "cpu", "--max-new-tokens", "8")
    assert out == expected[1]
    plain = steer(folder, "--prompt", PROMPTS[1], "--strength", "0", "--max-new-tokens", "8")
    assert out != plain[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--chat",), "--chat: not with --backend mlx"),
        (("--prompt", "a", "--units", "kl"), "--units: not with --backend mlx"),
        (("--prompt", "a", "--measure", "x"), "--measure: not with --backend mlx"),
        (("--prompt", "a", "--dtype", "float32"), "--dtype: not with --backend mlx"),
        (("--prompt", "a", "--device", "cpu"), "--device: not with --backend mlx"),
        (("--prompt", "a", "--trust-remote-code"), "--trust-remote-code: not with --backend"),
        (("--prompt", "a", "--layer", "2"), "v: no vector at site 'resid_post.2'"),
        (("--prompt", "a", "--guidance", "nan"), "weight nan: expected a finite number"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens 0: expected at least 1"),
        (("--prompt", "a", "--max-new-tokens", "9999"), "9999 new ones exceed the"),
        (("--prompt", "a", "--positions", "promt"), "no such positions"),
    ],
)
def test_mistakes(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = steer(folder, *arguments, "--backend", "mlx")
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_an_unknown_backend(folder: Path) -> None:
    code, _, err = steer(folder, "--prompt", "a", "--backend", "mlxx")
    assert code == 2
    assert "--backend mlxx: no such backend; did you mean 'mlx'?" in err


def test_models_and_vectors_that_do_not_suit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--prompt", "a", "--backend", "mlx")
    (folder / "empty").mkdir(exist_ok=True)
    for told, settings in {
        "mlx-lm can't load the model": {"model": "empty"},
        "no such file or folder": {"model": "none"},
        "its type is llama, and the vectors are of gemma": {"vector": "other.safetensors"},
        "2 sites (resid_post.1, final_norm); choose one by --site": {"vector": "set.safetensors"},
    }.items():
        code, out, err = steer(folder, *asked, **settings)
        assert (code, out) == (2, "")
        assert told in err
        assert err.count("\n") == 1
    for name in [name for name in sys.modules if name.split(".")[:2] == ["dsteer", "mlx"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = steer(folder, *asked)
    assert code == 2
    assert err == "dsteer: dsteer.mlx needs an extra: pip install 'dsteer[mlx]'\n"
