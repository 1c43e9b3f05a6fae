"""Which models are loaded as what, and which are refused by name with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import FAMILIES, VISION, WINDOW, build, prompts_of, small
from torch import nn

import dsteer
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.models.families import auto_class
from dsteer.models.load import load_model, quiet
from dsteer.models.pair import ModelPair

IDS = torch.tensor([[5, 9, 3, 7]])


def save(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llava", "gemma3-vision", "qwen2-vl", "qwen3-vl", "idefics3"])
def test_image_text_checkpoints_are_loaded_whole(name: str, tmp_path: Path) -> None:
    """A folder gives the saved model's states on text, through ``ModelPair`` too."""
    model = build(name)
    loaded = load_model(save(model, tmp_path), device="cpu")
    assert type(loaded) is type(model)
    anatomy = Anatomy.of(loaded)
    assert anatomy.n_blocks == 3
    assert "vision" not in type(anatomy.decoder).__name__.lower()
    pair = ModelPair.load(tmp_path, model, device="cpu")
    acts = dsteer.extract(pair, prompts_of((3, 8)))
    assert torch.equal(acts.base["final_norm"], acts.tuned["final_norm"])


def test_a_wrapper_with_a_text_class_is_loaded_as_that(tmp_path: Path) -> None:
    """Of a Qwen3.5 checkpoint with a vision tower the text model is loaded, with its weights."""
    text = tf.Qwen3_5TextConfig(
        **small(head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
                linear_key_head_dim=8, linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention", "linear_attention"])
    )  # fmt: skip
    vision = {"hidden_size": 16, "depth": 1, "out_hidden_size": 32, "num_heads": 2,
              "patch_size": 4, "intermediate_size": 16, "num_position_embeddings": 16}  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(7)
        model = tf.Qwen3_5ForConditionalGeneration(
            tf.Qwen3_5Config(text_config=text.to_dict(), vision_config=vision)
        ).eval()
    loaded = load_model(save(model, tmp_path), device="cpu")
    assert type(loaded) is tf.Qwen3_5ForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_its_class(name: str) -> None:
    """What loads a family's config is the class that it was built from."""
    model = build(name)
    with quiet():
        made = auto_class(model.config, name).from_config(model.config)
    assert type(made) is type(model)


# ---------------------------------------------------------------------------------- refusals


def gemma3n() -> nn.Module:
    return tf.Gemma3nForCausalLM(
        tf.Gemma3nTextConfig(
            **small(head_dim=8, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8,
                    laurel_rank=4, num_kv_shared_layers=0, layer_types=WINDOW,
                    activation_sparsity_pattern=[0.0] * 3, sliding_window=6)
        )
    )  # fmt: skip


def mllama() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_global_layers": 1, "attention_heads": 2, "image_size": 16, "patch_size": 8,
              "vision_output_dim": 32, "intermediate_layers_indices": [0]}  # fmt: skip
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(vision_config=vision, text_config=small(cross_attention_layers=[1]),
                        image_token_index=127)
    )  # fmt: skip


def idefics() -> nn.Module:
    vision = {"embed_dim": 16, "image_size": 16, "intermediate_size": 16, "patch_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    perceiver = {"resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
                 "resampler_n_latents": 2}  # fmt: skip
    return tf.IdeficsForVisionText2Text(
        tf.IdeficsConfig(**small(vision_config=vision, perceiver_config=perceiver,
                                 cross_layer_interval=2, additional_vocab_size=0))
    )  # fmt: skip


def paligemma() -> nn.Module:
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(vision_config=tf.SiglipVisionConfig(**VISION), image_token_index=127,
                           text_config=tf.GemmaConfig(**small(head_dim=8)), projection_dim=32)
    )  # fmt: skip


def rwkv() -> nn.Module:
    return tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=128, hidden_size=32, attention_hidden_size=32,
                      num_hidden_layers=3, context_length=64, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def bert(**changes: object) -> nn.Module:
    shape = {key: value for key, value in small().items() if key != "num_key_value_heads"}
    return tf.BertLMHeadModel(tf.BertConfig(**shape, **changes))


def both_ways() -> nn.Module:
    config = tf.Gemma3TextConfig(**small(head_dim=8, use_bidirectional_attention=True))
    return tf.Gemma3ForCausalLM(config)


def one_block_twice() -> nn.Module:
    model = build("llama")
    model.model.layers[2] = model.model.layers[0]
    return model


def without_a_final_norm() -> nn.Module:
    return tf.OpenAIGPTLMHeadModel(
        tf.OpenAIGPTConfig(vocab_size=128, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    )


REFUSED = [
    (gemma3n, "gemma3n_text carries 4 residual streams at once"),
    (mllama, "is a mllama model, which can't be read: its cross-attention blocks run only with"),
    (idefics, "is a idefics model, which can't be read: it runs only with images"),
    (paligemma, "is a paligemma model with use_bidirectional_attention"),
    (both_ways, "is a gemma3_text model with use_bidirectional_attention"),
    (rwkv, "is a rwkv model, which can't be read: it halves its residual stream"),
    (bert, "is a bert model, an encoder, whose tokens see those behind them"),
    (lambda: bert(is_decoder=True), "0 norms stand beside the blocks of BertEncoder"),
    (one_block_twice, "some of its 3 blocks are one module, which runs several times a pass"),
    (without_a_final_norm, "0 norms stand beside the blocks of OpenAIGPTModel"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_models_that_cannot_be_read_are_refused_by_name(make: Any, message: str) -> None:
    with quiet():
        model = make()
    with pytest.raises(ModelError, match=message):
        Anatomy.of(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "is a bert model, an encoder"),
        (paligemma, "is a paligemma model with use_bidirectional_attention"),
        (
            lambda: tf.ViTModel(tf.ViTConfig(**VISION)),
            "is a vit model, which is no causal language model; expected one, or an image-text",
        ),
    ],
)
def test_folders_of_other_models_are_refused_before_their_weights(
    make: Any, message: str, tmp_path: Path
) -> None:
    with quiet():
        save(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, device="cpu")
