"""``dsteer doctor``: the parts that it names, the self-test, and what fails it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import VISION, build, small
from planted import byte_tokenizer, tiny_llama
from seq2seq_models import eos_tokenizer, seq2seq
from torch import nn
from typer.testing import CliRunner

from dsteer.cli import app
from dsteer.doctor import Diagnosis, diagnose, examine
from dsteer.errors import ModelError
from dsteer.models.load import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

CHECKS = ["capture", "add", "before", "reach", "cache", "sweep", "hooks"]


def saved(model: Any, folder: Path, tokenizer: bool = True) -> Path:
    with quiet():
        if tokenizer:
            model.resize_token_embeddings(260, mean_resizing=False)
            byte_tokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def ask(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments, "--device", "cpu"])
    return result.exit_code, result.stdout, result.stderr


def failed(found: Diagnosis) -> dict[str, str | None]:
    return {check.name: check.trouble for check in found.checks if not check.passed}


# name: blocks' class and path, final norm's path, what a block returns, fast path, tied
SEEN = {
    "llama": ("LlamaDecoderLayer", "model.layers", "model.norm", "a tensor", True, False),
    "gpt2": ("GPT2Block", "transformer.h", "transformer.ln_f", "a tensor", True, True),
    "falcon": ("FalconDecoderLayer", "transformer.h", "transformer.ln_f", "a tuple of 2", False,
               True),
    "gemma2": ("Gemma2DecoderLayer", "model.layers", "model.norm", "a tensor", True, True),
    "gpt-oss": ("GptOssDecoderLayer", "model.layers", "model.norm", "a tensor", True, False),
    "mamba": ("MambaBlock", "backbone.layers", "backbone.norm_f", "a tensor", False, False),
    "lfm2": ("Lfm2DecoderLayer", "model.layers", "model.embedding_norm", "a tensor", False, True),
    "qwen2-vl": ("Qwen2VLDecoderLayer", "model.language_model.layers",
                 "model.language_model.norm", "a tensor", True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_folder_of_each_family_passes(name: str, tmp_path: Path) -> None:
    """The parts are those that the family's own module tree has."""
    model = build(name)
    kind, path, norm, returns, fast, tied = SEEN[name]
    facts = diagnose(saved(model, tmp_path), device="cpu")
    assert failed(facts) == {}
    assert [check.name for check in facts.checks] == CHECKS
    found = facts.as_json()
    assert (found["class"], found["type"]) == (type(model).__name__, model.config.model_type)
    assert found["blocks"] == {"count": 3, "classes": [kind], "path": path}
    assert found["final_norm"]["path"] == norm
    assert type(model.get_submodule(norm)).__name__ == found["final_norm"]["class"]
    assert (found["width"], found["vocabulary"], found["dtype"]) == (32, 260, "float32")
    assert (found["block_returns"], found["tied_embeddings"]) == (returns, tied)
    assert found["decoding"]["fast"] == fast
    assert (found["decoding"]["note"] is None) == fast
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["tokenizer"]["template"].startswith("{{ bos_token }}")
    assert found["right_padding_unseen"] is True
    assert found["adapter"] is None
    errors = {check.name: check.error for check in facts.checks}
    assert errors["reach"] > 1e-3  # a vector of 3/4 of the states' norm


def test_the_command_prints_it(tmp_path: Path) -> None:
    """As lines and as JSON, with the soft cap and the template."""
    saved(build("gemma2"), tmp_path)
    code, out, err = ask(str(tmp_path))
    assert (code, err) == (0, "")
    assert "blocks       3 × Gemma2DecoderLayer at model.layers" in out
    assert "soft cap 30" in out
    assert "BOS '<s>', EOS '</s>', PAD '<pad>'" in out
    assert "template     {{ bos_token }}{% for m in messages %}" in out
    assert out.count("  pass  ") == len(CHECKS)
    code, out, err = ask(str(tmp_path), "--json", "--dtype", "bfloat16")
    found = json.loads(out)
    assert (code, err, found["dtype"], found["passed"]) == (0, "", "bfloat16", True)
    assert found["head"]["soft_cap"] == 30.0
    assert [check["name"] for check in found["checks"]] == CHECKS


def test_a_folder_without_a_tokenizer_is_read_by_random_ids(tmp_path: Path) -> None:
    """So it is where transformers makes up a tokenizer that knows no word."""
    for name in ("falcon", "gpt2"):
        found = diagnose(saved(build(name), tmp_path / name, tokenizer=False), device="cpu")
        assert failed(found) == {}
        assert found.facts["tokenizer"]["missing"]
    code, out, _ = ask(str(tmp_path / "falcon"))
    assert code == 0
    assert "tokenizer    none, so random ids are read: " in out


def test_an_adapter_is_named_and_takes_its_bases_tokenizer(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved(tiny_llama(), tmp_path / "base")
    with quiet():
        model = tf.AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter", device="cpu")
    assert failed(found) == {}
    assert (found.facts["adapter"], found.facts["class"]) == ("LORA", "LlamaForCausalLM")
    assert found.facts["tokenizer"]["size"] == 259


# ---------------------------------------------------------------------------------- failures


def test_a_model_that_sees_padding_fails_on_its_cache() -> None:
    """Attention both ways: read right, in batches of one length, but no cache holds its states."""
    model = build("llama")
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    found = examine(model)
    assert found.facts["right_padding_unseen"] is False
    assert "capture" not in failed(found)
    assert "cache" in failed(found)


def test_a_model_whose_code_passes_hooks_by_fails() -> None:
    model = build("llama")
    block = model.model.layers[1]
    fused = {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    block.__class__ = type("Fused", (type(block),), fused)
    found = examine(model)
    assert failed(found) == {
        "capture": "resid_post.1: its module did not run; expected every block to run once"
    }
    assert [check.name for check in found.checks] == ["capture", "hooks"]
    assert found.facts["block_returns"] is None


def test_states_that_are_not_the_models_own_fail() -> None:
    """A model that reports other states than those that it computes with."""
    model = build("gpt2")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if output.hidden_states is not None:
            first, *rest = output.hidden_states
            output.hidden_states = (first, *(state * 1.01 for state in rest))
        return output

    model.forward = forward
    checks = {check.name: check for check in examine(model).checks}
    assert not checks["capture"].passed
    assert checks["capture"].error == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert checks["add"].passed


def test_a_vector_that_is_dropped_behind_its_site_fails() -> None:
    """A last block that starts afresh: the steered state never reaches the final norm."""
    model = build("llama")
    model.model.layers[2].register_forward_hook(lambda _m, _i, state: torch.ones_like(state))
    checks = {check.name: check for check in examine(model).checks}
    assert checks["add"].passed
    assert (checks["reach"].passed, checks["reach"].error) == (False, 0.0)


def test_a_wrong_head_is_told() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda _m, _i, logits: logits * 2)
    assert "its logits differ from its unembedding" in examine(model).facts["head"]["trouble"]


def test_a_tokenizer_of_another_model_fails() -> None:
    found = examine(build("llama"), byte_tokenizer())  # 259 tokens, and the model has 128
    assert "the models have only 128 tokens" in str(failed(found)["capture"])


def test_failed_checks_end_in_exit_2(tmp_path: Path) -> None:
    folder = saved(build("llama"), tmp_path, tokenizer=False)
    byte_tokenizer().save_pretrained(folder)
    code, out, err = ask(str(folder))
    assert code == 2
    assert "  FAIL  capture        –" in out
    assert err == (
        f"dsteer: {folder}: 1 of 2 checks failed (capture); expected all to pass, so don't trust "
        "what dsteer measures on this model\n"
    )


def test_nothing_is_left_on_the_model() -> None:
    model = build("gpt2").train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examine(model)
    assert model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    assert all(hook.__module__.startswith("transformers.") for hook in hooks)


# ---------------------------------------------------------------------------------- refusals


def no_config(folder: Path) -> list[str]:
    (folder / "readme.txt").write_text("nothing")
    return [str(folder)]


def broken_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{not json")
    return [str(folder)]


def encoder(folder: Path) -> list[str]:
    shape = {key: value for key, value in small().items() if key != "num_key_value_heads"}
    return [str(saved(tf.BertForMaskedLM(tf.BertConfig(**shape)), folder, tokenizer=False))]


def vision(folder: Path) -> list[str]:
    return [str(saved(tf.ViTModel(tf.ViTConfig(**VISION)), folder, tokenizer=False))]


def fine(folder: Path, *options: str) -> list[str]:
    return [str(saved(build("gemma2"), folder, tokenizer=False)), *options]


def rwkv(folder: Path) -> list[str]:
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    return [str(saved(tf.RwkvForCausalLM(tf.RwkvConfig(**shape)), folder, tokenizer=False))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [str(folder / "gone")], "gone: no such file or folder"),
        (no_config, "is a folder without config.json, so it holds no model"),
        (broken_config, "the model can't be loaded"),
        (encoder, "is a bert model, an encoder, whose tokens see those behind them"),
        (vision, "is a vit model, which is no causal language model"),
        (rwkv, "is a rwkv model, which can't be read: it halves its residual stream"),
        (lambda folder: fine(folder, "--dtype", "float61"), "--dtype float61: no such dtype; did"),
        (lambda folder: fine(folder, "--dtype", "float16"), "float16 overflows in gemma2 models"),
    ],
)
def test_what_cannot_be_examined_ends_in_one_line_and_exit_2(
    make: Any, message: str, tmp_path: Path
) -> None:
    code, out, err = ask(*make(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith("dsteer: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="device 'cuda:99' can't be used here"):
        diagnose(fine(tmp_path)[0], device="cuda:99")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear is no transformers language model"):
        examine(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["t5", "t5-gated-untied", "bart-forced-bos"])
def test_encoder_decoder_models_pass(name: str, tmp_path: Path) -> None:
    model = seq2seq(name)
    with quiet():
        model.save_pretrained(tmp_path)
        eos_tokenizer().save_pretrained(tmp_path)
    found = diagnose(tmp_path, device="cpu")
    assert failed(found) == {}
    assert [check.name for check in found.checks] == CHECKS
    assert found.facts["blocks"]["path"].endswith("decoder.layers" if "bart" in name else ".block")
    assert found.facts["decoding"]["fast"] is False
