"""Tiny models of the families that mlx-lm and transformers share, with the same weights in both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from planted import byte_tokenizer, tiny_llama

from dsteer.models.load import quiet


def small(**changes: object) -> dict[str, Any]:
    return {
        "vocab_size": 260,
        "hidden_size": 64,  # its root, by which Gemma 3 scales, is the same in bfloat16
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **changes,
    }


def exact_gelu(model: Any) -> Any:
    """mlx-lm's Gemma has the exact GELU, transformers' the tanh approximation (7e-5 apart here)."""
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama-wide": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(head_dim=32))),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(tie_word_embeddings=True))),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**small())),
    "gemma": lambda: exact_gelu(
        tf.GemmaForCausalLM(tf.GemmaConfig(**small(initializer_range=0.2)))
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**small(query_pre_attn_scalar=16, sliding_window=256))
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **small(num_hidden_layers=6, query_pre_attn_scalar=16, sliding_window=16)
        )
    ),
}


@dataclass(frozen=True)
class Both:
    """One model as transformers and as mlx-lm hold it."""

    torch: Any
    tokenizer: Any
    mlx: Any
    mlx_tokenizer: Any
    folder: Path


def both(name: str, folder: Path, seed: int = 0) -> Both:
    """A model of a family, saved by transformers and loaded by dsteer.mlx."""
    import dsteer.mlx

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[name]().float().eval()
    tokenizer = byte_tokenizer()
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Both(model, tokenizer, *dsteer.mlx.load(folder), folder)
