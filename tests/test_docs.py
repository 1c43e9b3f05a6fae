"""Every code block of the README and of docs/ works: Python is run, YAML validated, shell tried."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsteer.config import TinyModelConfig, read_pipeline
from dsteer.data.synthetic import World

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[Path, str]]:
    found = [(page, *match) for page in PAGES for match in BLOCK.findall(page.read_text("utf-8"))]
    return [(page, text) for page, kind, text in found if kind == language]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a runs/demo that holds two small models."""
    from dsteer.models.tiny import build_model, build_tokenizer

    texts = [str(pair.prompt) + str(pair.chosen) for pair in World(0).pairs(100)]
    tokenizer = build_tokenizer(texts, 400)
    shape = TinyModelConfig(vocab_size=400, hidden_size=32, intermediate_size=48)
    model = build_model(shape, tokenizer, seed=0)
    for stage in ("base", "dpo"):
        folder = tmp_path / "runs" / "demo" / stage / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.add_(0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, study: Path) -> None:
    if page.name == "mlx.md":
        pytest.importorskip("mlx_lm", reason="no wheels of mlx here")
    names: dict[str, object] = {}
    for other, text in blocks("python"):
        if other == page:
            exec(compile(text, str(page.name), "exec"), names)


def test_there_are_blocks() -> None:
    assert len(blocks("python")) >= 4
    assert len(blocks("yaml")) >= 1
    assert len(blocks("sh")) >= 2


def test_yaml_blocks_are_valid() -> None:
    for page, text in blocks("yaml"):
        assert read_pipeline(text, origin=page.name).name


def test_shell_blocks_name_real_commands(study: Path) -> None:
    """make targets exist; dsteer lines are run, `run` as a plan and `report` not at all."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    tried = 0
    for _, text in blocks("sh"):
        for line in text.splitlines():
            command = line.partition("#")[0].strip()
            # what a launcher would start several of
            command = re.sub(r"^(accelerate launch|torchrun) .*-m dsteer ", "dsteer ", command)
            if command.startswith("make "):
                assert command.split()[1] in targets
            elif command.startswith("dsteer report"):
                continue
            elif command.startswith("dsteer "):
                words = command.replace("dsteer run", "dsteer plan").removeprefix("dsteer")
                subprocess.run(
                    f"{sys.executable} -m dsteer{words}",
                    shell=True,
                    check=True,
                    capture_output=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
                tried += 1
            else:
                assert not command, f"an untried command: {command}"
    assert tried >= 4
