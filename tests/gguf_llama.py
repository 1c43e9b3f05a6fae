"""GGUF files of tiny Llamas, with the tests' byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planted import TEMPLATE, byte_tokenizer
from transformers import LlamaForCausalLM

gguf = pytest.importorskip("gguf")

PLAIN = {"mlp_bias": False}  # the format has no place for biases of a Llama's MLP


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head as the format has them: pairs that turn together stand side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(model: LlamaForCausalLM, path: Path, *, quantize: bool = False) -> Path:
    """A Llama in float32 (its projections in Q8_0 if asked), with the tests' byte tokenizer."""
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary.append("th")  # the reader wants a merge
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        if "k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        own = names.get_name(name, (".weight",))
        if quantize and "proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
