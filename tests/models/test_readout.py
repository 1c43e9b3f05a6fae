"""The unembedding on its own gives the model's own logits, or says that it can't."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from planted import tiny_llama

from dsteer.errors import ModelError
from dsteer.models.readout import Readout

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[5, 9, 3, 7, 1]])


def small(**changes: object) -> dict[str, object]:
    return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            **changes}  # fmt: skip


MODELS = {
    "llama": lambda: tiny_llama(),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt-j (bias)": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    ),
    "gemma2 (soft cap)": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**small(head_dim=8, final_logit_softcapping=3.0))
    ),
    "cohere (scale)": lambda: tf.CohereForCausalLM(tf.CohereConfig(**small(logit_scale=0.25))),
    "granite (divisor)": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**small(logits_scaling=4))),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_logits(name: str) -> None:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    if name.startswith("gpt-j"):
        torch.nn.init.normal_(model.lm_head.bias)
    readout = Readout.of(model)
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
    logits = readout(out.hidden_states[-1][0])
    # two float32 products of the same numbers: 1e-6 of the largest logit, with room
    assert (logits - out.logits[0]).abs().max() < 1e-5 * out.logits.abs().max()
    assert readout.linear == (name != "gemma2 (soft cap)")


@pytest.mark.parametrize("kind", ["lora", "dora", "with a bias"])
def test_head_with_an_adapter(kind: str) -> None:
    """What such a head computes, not the weight under it; with the adapter off, that weight."""
    model, biased = tiny_llama(), kind == "with a bias"
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(260))
    plain = model.lm_head.weight.detach().clone()
    config = LoraConfig(
        r=2,
        target_modules=["lm_head"],
        init_lora_weights=False,
        lora_dropout=0.5,
        use_dora=kind == "dora",
    )
    wrapped = get_peft_model(model, config)
    wrapped.train()
    readout = Readout.of(wrapped)
    assert model.lm_head.lora_dropout["default"].training
    assert (readout.bias is not None) == biased
    wrapped.eval()
    with torch.no_grad():
        states = model.model(IDS).last_hidden_state[0]
        merged = copy.deepcopy(model.lm_head)
        merged.merge()  # PEFT's own effective weight
        logits = wrapped(IDS).logits[0]
    # float32 rounding of W + BA, or of it less a bias of size 1
    assert torch.allclose(readout.weight, merged.get_base_layer().weight, atol=2e-6)
    assert (readout(states) - logits).abs().max() < 1e-5 * logits.abs().max()
    with wrapped.disable_adapter():
        assert torch.equal(Readout.of(wrapped).weight, plain)


def test_adding_a_vector_adds_one_bias_where_linear() -> None:
    readout = Readout.of(tiny_llama())
    states, vector = torch.randn(3, 32), torch.randn(32)
    bias = readout(vector[None]) - readout(torch.zeros(1, 32))
    assert torch.allclose(readout(states + 2 * vector), readout(states) + 2 * bias, atol=1e-4)


def test_it_is_a_copy_and_can_be_shortened() -> None:
    model = tiny_llama()
    readout, short = Readout.of(model), Readout.of(model, vocabulary=100)
    states = torch.randn(2, 32)
    before = readout(states)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(readout(states), before)
    assert torch.allclose(short(states), before[:, :100], atol=1e-6)
    assert short(states.double()).dtype == torch.float32


def test_low_precision_models_are_read_in_float32() -> None:
    readout = Readout.of(tiny_llama().to(torch.bfloat16))
    assert readout.weight.dtype == torch.float32


def test_other_heads_are_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _m, _i, logits: logits * 2)
    with pytest.raises(ModelError, match="its logits differ from its unembedding"):
        Readout.of(model)
    with pytest.raises(ModelError, match="has no unembedding"):
        Readout.of(tf.LlamaModel(tiny_llama().config))


def test_no_hook_stays() -> None:
    model = tiny_llama()
    Readout.of(model)
    assert not any(module._forward_hooks for module in model.modules())
