"""``dsteer serve``: the command itself, asked by the real client and ended by Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from planted import planted_pair
from typer.testing import CliRunner

import dsteer
from dsteer import cli
from dsteer.cli import serve as serve_module
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

PLANTED = planted_pair(1, size=4.0, hidden_size=16, num_hidden_layers=3, intermediate_size=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serve")
    PLANTED.save(made)
    SteeringVectorSet([SteeringVector(PLANTED.b, "resid_post.1")]).save(made / "b.safetensors")
    return made


def ask(folder: Path, *arguments: str) -> tuple[int, str]:
    command = ["serve", str(folder / "base"), "--vector", str(folder / "b.safetensors")]
    result = CliRunner().invoke(cli.app, [*command, "--device", "cpu", *arguments])
    return result.exit_code, result.stderr


def test_a_server_from_start_to_end(folder: Path) -> None:
    """The base steered by b is the tuned model; all interfaces are warned of; Ctrl-C ends it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "dsteer", "serve", str(folder / "base"), "--vector",
         str(folder / "b.safetensors"), "--strength", "1", "--host", "0.0.0.0", "--port", "0",
         "--device", "cpu", "--name", "planted"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        first = server.stdout.readline()
        found = re.fullmatch(r"planted at http://0\.0\.0\.0:(\d+)/v1 \(Ctrl-C ends it\)\n", first)
        assert found, first + (server.stderr.read() if server.stderr else "")
        assert server.stdout.readline() == "  b at resid_post.1, strength 1 by default\n"
        url = f"http://127.0.0.1:{found[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", timeout=60) as client:
            made = client.completions.create(
                model="planted", prompt="a", max_tokens=8, temperature=0
            )
        vector = SteeringVector(PLANTED.b, "resid_post.1")
        tuned = dsteer.sweep(PLANTED.tuned, PLANTED.tokenizer, ["a"], vector, [0.0], 8)
        assert made.choices[0].text == tuned.texts[0][0]
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0
    assert out.endswith("stopped\n")
    assert err == (
        "dsteer: --host 0.0.0.0: other machines can reach this server, and there is no --api-key\n"
    )


def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, err = ask(folder, "--strength", "0,1")
    assert code == 2
    assert "--strength gives 2 combinations; expected one value a vector" in err
    code, err = ask(folder, "--api-key", "")
    assert code == 2
    assert "--api-key (or DSTEER_API_KEY) is empty; expected a key" in err
    code, err = ask(folder, "--top-p", "0")
    assert code == 2
    assert "top_p 0.0: expected a probability above 0" in err
    code, err = ask(folder, "--host", "no.such.host.invalid")
    assert code == 2
    assert "no.such.host.invalid:8000 can't be served on" in err
    monkeypatch.setattr(serve_module, "find_spec", lambda name: None if name == "uvicorn" else 1)
    code, err = ask(folder)
    assert code == 2
    assert "dsteer serve needs an extra: pip install 'dsteer[serve]'" in err
