"""Finding blocks, norm and embeddings; refusing what has no such parts."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from planted import tiny_llama
from torch import nn

from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy, evaluating, max_positions

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_parts_of_a_llama() -> None:
    model = tiny_llama()
    anatomy = Anatomy.of(model)
    assert anatomy.blocks is model.model.layers
    assert anatomy.final_norm is model.model.norm
    assert anatomy.decoder is model.model
    assert (anatomy.width, anatomy.n_blocks, anatomy.max_positions) == (32, 4, 256)
    assert anatomy.input_embedding is model.model.embed_tokens
    assert anatomy.output_embedding is model.lm_head
    assert not anatomy.tied
    assert (anatomy.device, anatomy.dtype) == (torch.device("cpu"), torch.float32)
    assert Anatomy.of(tiny_llama(tie_word_embeddings=True)).tied


def test_parts_through_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    anatomy = Anatomy.of(wrapped)
    assert anatomy.blocks is model.model.layers
    assert anatomy.final_norm is model.model.norm


def test_final_norm_that_an_adapter_trained() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    wrapped = get_peft_model(model, config)
    anatomy, caught = Anatomy.of(wrapped), []
    assert anatomy.final_norm is model.model.norm
    anatomy.final_norm.modules_to_save["default"].weight.data *= 3  # the copy is in use
    anatomy.final_norm.register_forward_hook(lambda _m, _a, output: caught.append(output))
    ids = torch.tensor([[0, 5, 6]])
    with evaluating(wrapped):
        (state,) = [wrapped(ids, output_hidden_states=True).hidden_states[-1]]
        with wrapped.disable_adapter():
            wrapped(ids)
    assert torch.equal(caught[0], state)
    assert not torch.allclose(caught[1], state, atol=1e-2)
    assert torch.equal(caught[1], tiny_llama().model(ids).last_hidden_state)


def test_embedding_norm_is_not_the_final_norm() -> None:
    model = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2))
    assert Anatomy.of(model).final_norm is model.transformer.ln_f


def test_read_and_write() -> None:
    state, other = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert Anatomy.read(state) is state
    assert Anatomy.read((state, "cache")) is state
    assert Anatomy.write(state, other) is other
    assert Anatomy.write((state, "cache"), other) == (other, "cache")
    with pytest.raises(ModelError, match=r"returned \(1, 2, 3, 4\); expected a state of shape"):
        Anatomy.read(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ModelError, match="returned str"):
        Anatomy.read(("no tensor",))


def test_compiled_models_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ModelError, match=r"is compiled.*before torch\.compile"):
        Anatomy.of(torch.compile(model, backend="eager"))
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(ModelError, match="is compiled"):
        Anatomy.of(model)


def encoder_decoder() -> nn.Module:
    return tf.LEDForConditionalGeneration(
        tf.LEDConfig(
            vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, attention_window=4, max_encoder_position_embeddings=32,
            max_decoder_position_embeddings=32,
        )
    )  # fmt: skip


def post_norm_opt() -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=2,
                     num_attention_heads=2, word_embed_proj_dim=16, do_layer_norm_before=False)
    )  # fmt: skip


def learned_prompt() -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(tiny_llama(), config)


def several_streams() -> nn.Module:
    model = tiny_llama()
    model.config.altup_num_inputs = 4
    return model


def headless_depth() -> nn.Module:
    model = tiny_llama()
    model.config.num_hidden_layers = 7
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is no transformers language model"),
        (encoder_decoder, "led model, an encoder-decoder that is not read: its encoder pads"),
        (post_norm_opt, "0 norms stand beside the blocks"),
        (learned_prompt, "works by learned prompts"),
        (several_streams, "4 residual streams at once"),
        (headless_depth, "0 lists of 7 modules could be its blocks"),
    ],
)
def test_other_models_are_refused_by_name(build, message) -> None:
    with pytest.raises(ModelError, match=message):
        Anatomy.of(build())


def test_context_of_a_model() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = tiny_llama().config
    assert max_positions(config) == 256
    config.rope_parameters = {**dynamic, "original_max_position_embeddings": 64}
    assert max_positions(config) == 64
    assert max_positions(tf.BloomConfig()) is None
    assert max_positions(tf.GPT2Config(n_positions=77)) == 77


def test_evaluating_restores_each_flag_even_after_an_error() -> None:
    model = tiny_llama().train()
    model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    seen = []

    def fail() -> None:
        with evaluating(model):
            seen.append(any(module.training for module in model.modules()))
            seen.append(torch.is_inference_mode_enabled())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == [False, True]
    assert [module.training for module in model.modules()] == flags
