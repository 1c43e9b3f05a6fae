"""Encoder-decoder models through the stages: planted truth, and a whole small run of a tiny T5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from measured import measure
from planted import tiny_llama
from seq2seq_models import eos_tokenizer, planted_seq2seq, seq2seq
from test_planted_measurement import SIZES, write_data

from dsteer.errors import ConfigError, ModelError
from dsteer.models.load import quiet
from dsteer.store import read_json, read_tensors

STAGES = ("activations", "vector", "cosine", "spectrum")
SWEEP = {
    "strengths": [-1.0, 0.0, 1.0], "pairs": 6, "prompts": 3, "response_tokens": 6,
    "max_new_tokens": 5, "random_directions": 2, "random_generations": 1, "bootstrap": 40,
    "samples": "none",
}  # fmt: skip


def save(model, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    eos_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "block"), [("bart", 1), ("mbart", 2)])
def test_the_program_names_the_planted_block(tmp_path: Path, family: str, block: int) -> None:
    base, tuned, b = planted_seq2seq(family, block)
    paths = [str(save(m, tmp_path / n)) for n, m in (("base", base), ("tuned", tuned))]
    run, settings = tmp_path / "run", {
        "models": {"base": paths[0], "tuned": paths[1], "device": "cpu"},
        "activations": {"noise_floor_prompts": 4, "response_tokens": 4},
    }  # fmt: skip
    write_data(run)
    for stage in STAGES:
        measure(run, stage, **settings)
    activations, vector, cosine, spectrum = (read_json(run / s / "result.json") for s in STAGES)
    site, blocks = f"resid_post.{block}", [f"resid_post.{k}" for k in range(3)]
    assert activations["sites"] == ["encoder", *blocks, "final_norm"]
    v = read_tensors(run / "vector" / "vectors.safetensors")
    np.testing.assert_allclose(v[site], b.numpy(), atol=1e-5)  # float32 states of norm 6 to 20
    for before in ("encoder", *blocks[:block]):
        assert (v[before] == 0).all()
        assert all(r["sites"][before]["undefined"] for r in (vector, cosine, spectrum))
    assert cosine["chosen_site"] == site
    assert spectrum["sites"][site]["delta"]["uncentred"]["sigma_ratio"]["value"] < 1e-5
    # behind a post-norm block, an encoder and the final norm no norm takes a radial shift away
    known = [s for s in vector["sites"].values() if s["inert"] is not None]
    assert len(known) == (0 if family == "bart" else 3 - block)
    assert vector["kl_recovery"]["response"]["n"] == 4 * SIZES["test"]

    result = measure(run, "interpolation", **settings, interpolation=SWEEP)
    assert (result["site"], result["positions"]) == (site, "all")
    assert result["sites"][site]["kl_recovered"]["all"] == pytest.approx(1, abs=1e-6)
    assert result["sites"]["encoder"]["kl_recovered"] == dict.fromkeys(
        ("all", "prompt_last", "generated")
    )
    curve = result["metrics"]["kl_recovered"]["curves"]["v"]
    assert curve[2]["value"] == pytest.approx(1, abs=1e-6)
    assert "an encoder-decoder model" in result["texts"]["decoder_note"]


def test_an_encoder_that_moved_is_steered_at_the_encoder(tmp_path: Path) -> None:
    """b at the encoder's end, at all tokens: it is found there, and recovers all KL."""
    base, tuned = seq2seq("mbart"), seq2seq("mbart")
    b = 2 * torch.eye(32)[3]
    tuned.model.encoder.layer_norm.bias.data += b
    paths = [str(save(m, tmp_path / n)) for n, m in (("base", base), ("tuned", tuned))]
    run, settings = tmp_path / "run", {
        "models": {"base": paths[0], "tuned": paths[1], "device": "cpu"},
        "activations": {"noise_floor_prompts": 2, "response_tokens": 2, "sites": ["encoder"],
                        "position": "prompt_mean"},
    }  # fmt: skip
    write_data(run)
    measure(run, "activations", "vector", **settings)
    v = read_tensors(run / "vector" / "vectors.safetensors")
    np.testing.assert_allclose(v["encoder"], b.numpy(), atol=1e-5)
    sweep = {**SWEEP, "site": "encoder", "positions": "all"}
    result = measure(run, "inversion", **settings, inversion=sweep)
    assert result["metrics"]["kl_recovered"]["curves"]["v"][2]["value"] == pytest.approx(
        1, abs=1e-6
    )
    with pytest.raises(ConfigError, match="generates nothing"):
        measure(run, "inversion", **settings, inversion={**sweep, "positions": "generated"})


def test_a_decoder_alone_is_no_pair(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_data(run)
    base, tuned = save(seq2seq("t5"), tmp_path / "a"), save(tiny_llama(), tmp_path / "b")
    with pytest.raises(ModelError, match="is an encoder-decoder model, tuned"):
        measure(
            run, "activations", models={"base": str(base), "tuned": str(tuned), "device": "cpu"}
        )
    assert not list((run / "activations").glob("*.safetensors"))


@pytest.mark.slow
def test_a_whole_run_of_a_tiny_t5(tmp_path: Path) -> None:
    pipeline = {
        "name": "tiny-t5",
        "data": {
            "sources": [{"format": "synthetic", "conversations": 120, "differ": "preferred"}],
            "splits": {"train": 40, "fit": 16, "tune": 8, "test": 10},
        },
        "models": {"base": str(save(seq2seq("t5"), tmp_path / "t5")), "device": "cpu"},
        "dpo": {"max_steps": 6, "batch_size": 8, "learning_rate": 2e-3, "eval_every": 3,
                "checkpoint_every": 3, "eval_pairs": 8},
        "activations": {"noise_floor_prompts": 2, "response_tokens": 4},
        "vector": {"bootstrap": 40, "convergence_draws": 3},
        "cosine": {"bootstrap": 40, "null_draws": 20},
        "spectrum": {},
        "geometry": {"pairs": 6, "gradient_pairs": 2, "bootstrap": 40},
        "interpolation": SWEEP,
        "inversion": SWEEP,
        "report": {},
    }  # fmt: skip
    file, out = tmp_path / "pipeline.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "dsteer", "run", str(file), "--out", str(out)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    dpo, activations, geometry = (
        read_json(out / stage / "result.json") for stage in ("dpo", "activations", "geometry")
    )
    assert dpo["first_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert dpo["freeze"]["tied"]
    assert dpo["freeze"]["input"]["unchanged"]
    assert activations["sites"][0] == "encoder"
    for policy in geometry["gradients"]["policies"].values():
        # for one shared context the gradient at final_norm is exact; float32
        assert policy["formula_error"] < 1e-5
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "An encoder-decoder model" in report
    assert "encoder" in read_json(out / "cosine" / "figures" / "fig3_cosine.json")["sites"]
