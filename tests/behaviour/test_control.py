"""Dialling planted axes: by a model whose punctuation follows planted directions, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import byte_tokenizer, tiny_llama
from seq2seq_models import eos_tokenizer, seq2seq
from transformers import LlamaForCausalLM

from dsteer.behaviour.control import NAMES, dialled, leakage
from dsteer.config import read_pipeline
from dsteer.data.tokens import encode
from dsteer.errors import DsteerError
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.decode import Decoding, decode
from dsteer.steering.intervene import steer
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import read_json

YAML = """
name: planted
data:
  sources: [{{format: synthetic, conversations: 90}}]
  splits: {{fit: 48, tune: 12, test: 24}}
models: {{base: {base}, device: cpu}}
control:
  axes: [enthusiastic, asking]
  pairs: 24
  read: [mean]
  positions: all
  sites: [resid_post.0]
  strengths: [0.4, 0.8]
  tune_prompts: 12
  prompts: 24
  max_new_tokens: 32
  bootstrap: 200
report:
"""
MARKS = {"!": (1, 1.0), ".": (1, -1.0), "?": (2, 1.0)}
"""Each mark's planted direction, and its sign along it."""


def punctuating() -> LlamaForCausalLM:
    """A model whose blocks do nothing: its state is the last token's embedding, and what is added.

    All embeddings share direction 0, from which letters and spaces are drawn. Marks lie along two
    more, and the head reads each mark off its own direction.
    """
    model = tiny_llama(max_position_embeddings=2048, num_hidden_layers=2)
    ids = {text: byte_tokenizer().convert_tokens_to_ids(text) for text in (*MARKS, "Ġ", "Ċ")}
    letters = byte_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words, head = model.model.embed_tokens.weight, model.lm_head.weight
        words.mul_(0.01 / words.std())
        words[:, 0] = 1.0
        head.zero_()
        head[:, 0] = -4.0
        head[letters, 0] = 0.0
        head[ids["Ġ"], 0] = 0.35
        for mark, (direction, sign) in MARKS.items():
            words[ids[mark], direction] = sign
            head[ids[mark], 0] = -0.1
            head[ids[mark], direction] = 0.5 * sign
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the planted model."""
    folder = tmp_path_factory.mktemp("control")
    punctuating().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    yaml = YAML.format(base=folder / "model")
    run_pipeline(read_pipeline(yaml), yaml, folder / "run", reporter=SILENT)
    return folder / "run"


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    return read_json(run / "control" / "result.json")


def test_a_planted_axis_moves_its_own_oracle(result: dict[str, Any]) -> None:
    for axis in ("enthusiastic", "asking"):
        own = result["measured"][axis]["oracles"][axis]
        assert own["stands_out"]
        # Half of the way between the poles, or more: the head reads the planted direction.
        assert own["move"]["value"] > 0.5
        assert own["at"]["+"]["value"] > result["base"]["scores"][axis]["value"]
        assert own["at"]["-"]["value"] < result["base"]["scores"][axis]["value"]


def test_axes_that_the_model_cannot_express_stay(result: dict[str, Any]) -> None:
    for found in result["measured"].values():
        # Words of these axes are longer than letters drawn at random are ever right in a row.
        for name in ("polite", "hedged", "declines", "personal"):
            assert abs(found["oracles"][name]["move"]["value"]) < 0.05
            assert not found["oracles"][name]["stands_out"]
        assert set(found["oracles"]) == set(NAMES)


def test_the_vectors_are_the_planted_directions(run: Path) -> None:
    for axis, direction in (("enthusiastic", 1), ("asking", 2)):
        vectors = SteeringVectorSet.load(run / "control" / f"{axis}-mean.safetensors")
        vector = vectors["resid_post.0"]
        unit = vector.tensor / vector.norm
        # Not 1: a question mark stands where another mark would, and words differ a little too.
        assert float(unit[direction]) > 0.8


def test_two_axes_at_once_are_dialled_independently(result: dict[str, Any]) -> None:
    grid = result["grid"]
    assert grid["settings"]["enthusiastic"]["site"] == grid["settings"]["asking"]["site"]
    for row in grid["oracles"].values():
        assert all(cell["low"] > 0 for cell in row["own_at"])
        # Not 0: a question mark stands where a full stop or an exclamation mark would.
        assert abs(row["cross"]["value"]) < 0.5 * row["own"]["value"]
        assert row["additive_r2"] > 0.9


def test_choices_are_within_the_limit(result: dict[str, Any]) -> None:
    assert result["chosen_on"] == "tune"
    for found in result["measured"].values():
        assert found["setting"]["tune_degenerate"] <= 0.1
        assert found["setting"]["strength"] in {0.4, 0.8}
    assert result["tried"] == {"enthusiastic": 2, "asking": 2}  # one site, two strengths


def test_the_report_shows_it_without_a_tuned_model(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "alone: this pipeline has no tuned model" in page
    assert "The contrast vector of enthusiastic moves its own oracle by" in page
    for name in ("control_matrix", "control_grid"):
        assert f"control/figures/{name}.pdf" in page
        assert (run / "control" / "figures" / f"{name}.json").is_file()


def test_both_vectors_at_one_site_are_two_interventions() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    a, b = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 32)))
    prompt = encode(tokenizer, ["Where do owls sleep?"])
    arms = (Arm(3 * a - 2 * b, 1.0),)
    made = decode(model, tokenizer, prompt, Steering("resid_post.1", arms), Decoding(12))
    site = "resid_post.1"
    with (
        steer(model, SteeringVector(a, site), strength=3.0),
        steer(model, SteeringVector(b, site), strength=-2.0),
    ):
        ids = torch.tensor([prompt[0].ids])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
    assert list(made.tokens[0][0]) == out[0, ids.shape[1] :].tolist()[: len(made.tokens[0][0])]
    assert made.tokens[0][0]


def exact(values: np.ndarray) -> dict[str, Any]:
    return {"value": float(values.mean()), "low": None, "high": None, "n": len(values)}


def test_a_grid_worked_by_hand() -> None:
    # y = 0.5 a + 0.1 b + 0.2 ab over a, b in −1, 0, 1.
    levels = np.array([-1.0, 0.0, 1.0])
    y = 0.5 * levels[:, None] + 0.1 * levels[None] + 0.2 * np.outer(levels, levels)
    row = dialled(np.stack([y - 0.05, y + 0.05], axis=2), exact)
    assert row["own"]["value"] == pytest.approx(0.5)
    assert [cell["value"] for cell in row["own_at"]] == pytest.approx([0.3, 0.5, 0.7])
    assert row["cross"]["value"] == pytest.approx(0.1)
    assert row["interaction"]["value"] == pytest.approx(0.2)
    assert row["dependence"] == pytest.approx(0.6)  # at a = 1: 0.6 b
    # Σ a² = Σ b² = 6 and Σ a²b² = 4 over the nine cells.
    explained = 6 * 0.25 + 6 * 0.01
    assert row["additive_r2"] == pytest.approx(explained / (explained + 4 * 0.04))
    assert [cell["value"] for cell in row["cells"][2]] == pytest.approx([0.2, 0.5, 0.8])


def test_an_oracle_that_never_changes_has_no_additive_share() -> None:
    row = dialled(np.full((3, 3, 4), -1.0), exact)
    assert row["additive_r2"] is None
    assert "the same in all cells" in row["additive_undefined"]


def test_leakage_is_no_ratio_to_noise() -> None:
    assert leakage({"value": 0.5, "low": 0.4, "high": 0.6}, -0.1) == {
        "leakage": 0.2, "leakage_undefined": None
    }  # fmt: skip
    for low in (-0.001, 0.0, None):  # None: one conversation alone
        found = leakage({"value": 0.002, "low": low, "high": 0.1}, 0.3)
        assert found["leakage"] is None
        assert "doesn't clearly raise its own oracle" in str(found["leakage_undefined"])


def test_a_source_of_messages_beside_the_world_is_passed_over(run: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say {i}."}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(90)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = f"{{format: preference, path: {tmp_path / 'p.jsonl'}}}"
    world = "{format: synthetic, conversations: 90}"
    yaml = YAML.format(base=run.parent / "model").replace(world, f"{world}, {messages}")
    changes = ["control.axes=[enthusiastic]", "control.strengths=[0.8]", "control.prompts=4"]
    run_pipeline(read_pipeline(yaml, changes), yaml, tmp_path / "run", reporter=SILENT)
    found = read_json(tmp_path / "run" / "control" / "result.json")
    assert found["grid"] is None
    assert found["prompts"]["tune"] < 12  # those of the world alone


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["control.axes=[enthusiasm]"], "unknown axis 'enthusiasm'.*enthusiastic"),
        # Greedy, this model says one letter for ever.
        (["control.temperature=0", "control.tune_prompts=2"], "none leaves at most 0.1"),
        (["data.sources.0.styled=1"], "none of the 48 fit prompts has one turn alone"),
        (["control.max_new_tokens=2048"], "leave no room for a prompt"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, changes: list[str], what: str) -> None:
    yaml = YAML.format(base=run.parent / "model")
    with pytest.raises(DsteerError, match=what):
        run_pipeline(read_pipeline(yaml, changes), yaml, tmp_path / "run", reporter=SILENT)


def test_an_encoder_decoder_base_is_refused(tmp_path: Path) -> None:
    seq2seq("t5").save_pretrained(tmp_path / "model")
    eos_tokenizer().save_pretrained(tmp_path / "model")
    yaml = YAML.format(base=tmp_path / "model")
    with pytest.raises(DsteerError, match="encoder-decoder model; expected a decoder-only one"):
        run_pipeline(read_pipeline(yaml), yaml, tmp_path / "run", reporter=SILENT)
