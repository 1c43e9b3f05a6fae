"""The self-check passes where the measurement is right, and fails where it is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import seq2seq_models
import torch

import dsteer.activations.capture as capture
import dsteer.behaviour.selfcheck as selfcheck
import dsteer.steering.edits as edits
import dsteer.steering.intervene as intervene
from dsteer.models.load import quiet
from dsteer.models.tiny import shrunk
from dsteer.store import Json, read_json

FAMILIES = {**architectures.FAMILIES, **seq2seq_models.FAMILIES}


def written(folder: Path, family: str) -> str:
    """The config of a family's model, as a folder of a base."""
    FAMILIES[family]().config.save_pretrained(folder)
    return str(folder)


def checked(folder: Path, family: str) -> Json:
    return selfcheck.self_check(written(folder, family), seed=3)


def failed(result: Json) -> list[str]:
    return [check["what"] for check in result["checks"] if not check["passed"]]


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "mixtral", "deepseek-v3", "mamba2", "t5", "bart"]
)
def test_planted_truth_is_found(tmp_path: Path, family: str) -> None:
    path = written(tmp_path, family)
    before = torch.random.get_rng_state()
    result = selfcheck.self_check(path, seed=3)
    assert result["passed"] is True, failed(result)
    assert len(result["checks"]) == 15
    assert torch.equal(torch.random.get_rng_state(), before)
    assert result["architecture"] == read_json(tmp_path / "config.json")["model_type"]
    assert selfcheck.self_check(path, seed=3) == result


def test_a_shrunk_config_keeps_what_is_odd_of_a_large_one() -> None:
    import transformers as tf

    large = tf.Gemma2Config(num_key_value_heads=4)  # 26 blocks of width 2304
    with quiet():
        small = shrunk(large)
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (32, 4, 128)
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "hidden_activation"):
        assert getattr(small, name) == getattr(large, name)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)
    assert large.hidden_size == 2304


def later(module: Any) -> Any:
    """``site_module`` one block off."""
    right = module.site_module

    def wrong(anatomy: Any, site: str) -> Any:
        kind, _, block = site.partition(".")
        shifted = int(block or 0) + 1
        if kind == "resid_post" and shifted < anatomy.n_blocks:
            site = f"{kind}.{shifted}"
        return right(anatomy, site)

    return wrong


@pytest.mark.parametrize("module", [capture, edits, intervene])
def test_a_measurement_one_block_off_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.setattr(module, "site_module", later(module))
    result = checked(tmp_path, "llama")
    assert result["passed"] is False
    assert failed(result)


def test_a_wrong_token_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits that leave out the first token."""
    right = edits._Run._chosen

    def wrong(self: Any, *args: Any) -> Any:
        mask = right(self, *args)
        mask[:, 0] = False
        return mask

    monkeypatch.setattr(edits._Run, "_chosen", wrong)
    result = checked(tmp_path, "llama")
    assert "share of KL that is left after adding v* at resid_post.1" in failed(result)


def test_a_measurement_that_raises_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_options: Any) -> None:
        raise ValueError("no states")

    monkeypatch.setattr(selfcheck, "extract", broken)
    result = checked(tmp_path, "llama")
    assert (result["passed"], failed(result)) == (False, ["the measurement runs"])
    assert result["checks"][0]["found"] == "ValueError: no states"


def test_a_family_that_can_not_be_shrunk_is_not_checked(tmp_path: Path) -> None:
    result = checked(tmp_path, "qwen3-vl")  # its text decoder is no model of its own
    assert result["passed"] is None
    assert result["checks"] == []
    assert "no tiny model" in result["why"]
    assert "\n" not in result["why"]
    nothing = selfcheck.self_check(str(tmp_path / "nothing"), seed=0)
    assert nothing["passed"] is None
