"""Tiny random encoder-decoder models, their tokenizer, and planted pairs of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from planted import EOS, byte_tokenizer
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dsteer.data.tokens import Encoded

VOCAB = 260
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3,
    "num_decoder_layers": 3, "num_heads": 4, "pad_token_id": 2, "eos_token_id": 1,
    "decoder_start_token_id": 2, "initializer_factor": 1.0,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 256, "init_std": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip


def _untied() -> Any:
    """T5 1.1: gated, and its head is a matrix of its own, whose logits are not scaled."""
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    )
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 32))
    return model


def _biased(model: Any) -> Any:
    """Biases as trained models have them: those of a new BART are zero, its head's too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
        model.final_logits_bias.normal_()
    return model


def _forced(model: Any) -> Any:
    """``generate`` writes BOS first, as BART was trained."""
    model.generation_config.forced_bos_token_id = 0
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5-gated-untied": _untied,
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**T5)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5)),
    "bart": lambda: _biased(tf.BartForConditionalGeneration(tf.BartConfig(**BART))),
    "bart-forced-bos": lambda: _forced(FAMILIES["bart"]()),
    "mbart": lambda: _biased(tf.MBartForConditionalGeneration(tf.MBartConfig(**BART))),
    "pegasus": lambda: _biased(tf.PegasusForConditionalGeneration(tf.PegasusConfig(**BART))),
    "marian": lambda: _biased(tf.MarianMTModel(tf.MarianConfig(**BART))),
    "blenderbot": lambda: _biased(
        tf.BlenderbotForConditionalGeneration(tf.BlenderbotConfig(**BART))
    ),
    "blenderbot-small": lambda: _biased(
        tf.BlenderbotSmallForConditionalGeneration(tf.BlenderbotSmallConfig(**BART))
    ),
}


def seq2seq(family: str, seed: int = 0) -> Any:
    """A random model of a family, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family]().float().eval()


def eos_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with EOS behind a text, as T5's."""
    tokenizer = byte_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    return tokenizer


def planted_seq2seq(family: str, block: int, seed: int = 0) -> tuple[Any, Any, Tensor]:
    """A base, the base with b added after a block of the decoder at all positions, and b (‖b‖ 2).

    BART's blocks end with a norm, whose bias takes b. mBART's and T5's end with a projection: T5's
    has no bias, so it is given one, in memory.
    """
    base = seq2seq(family, seed)
    b = torch.randn(32, generator=torch.Generator().manual_seed(seed + 1))
    b *= 2 / b.norm()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        if family.startswith("t5"):
            dense = tuned.decoder.block[block].layer[-1].DenseReluDense
            wo = nn.Linear(dense.wo.in_features, dense.wo.out_features)
            wo.weight.copy_(dense.wo.weight)
            wo.bias.copy_(b)
            dense.wo = wo
        else:
            layer = tuned.model.decoder.layers[block]
            (layer.final_layer_norm if family.startswith("bart") else layer.fc2).bias += b
    return base, tuned, b


def random_rows(count: int = 8, seed: int = 0, answers: bool = True) -> list[Encoded]:
    """Prompts with answers of many lengths, random ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        p, n = 1 + (7 * number) % 23, 1 + (5 * number) % 9
        ids = torch.randint(3, VOCAB, (p + n,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids[: p + n if answers else p]), p))
    return rows
