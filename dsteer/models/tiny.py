"""A tiny model and its tokenizer, built from a config: nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dsteer.config import TinyModelConfig
from dsteer.errors import ConfigError
from dsteer.models.anatomy import text_config
from dsteer.models.seq2seq import is_encoder_decoder

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
MARKERS = ("\n\nHuman:", "\n\nAssistant:")

# hh-rlhf's transcript form, with the end of text after a final answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer.

    Every text round-trips, whatever its bytes. Encoding puts one BOS in front. The hh-rlhf markers
    ``\\n\\nHuman:`` and ``\\n\\nAssistant:`` are one token each, so a prompt that ends with one
    always ends on a token boundary.

    Args:
        texts: what the merges are learned from.
        vocab_size: size with the 256 bytes, the markers, BOS, EOS and PAD; smaller if the texts run
            out of merges.
        max_length: tokens that the model can read.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    between = re.compile("|".join(MARKERS))
    tokenizer.train_from_iterator((between.split(text) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    """Build a float32 model with random weights; the caller's random state is left as it was.

    Raises:
        ConfigError: the head width does not fit rotary positions.
    """
    head, multiple = config.hidden_size // config.num_attention_heads, _ROTARY[config.architecture]
    if head % multiple:
        needed = "an even number" if multiple == 2 else f"a multiple of {multiple}"
        raise ConfigError(
            f"base.model.hidden_size: {config.hidden_size} over {config.num_attention_heads} heads "
            f"is {head} a head, and rotary positions need {needed}; choose a multiple of "
            f"{multiple * config.num_attention_heads}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(_shape(config, tokenizer)).float()


_ROTARY = {"llama": 2, "qwen3": 2, "gpt_neox": 8, "gpt2": 1}
"""What a head's width is a multiple of: positions rotate pairs, of a quarter in a gpt_neox."""


def _shape(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    common = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.architecture == "gpt2":
        return GPT2Config(
            n_embd=config.hidden_size,
            n_inner=config.intermediate_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_positions=config.max_position_embeddings,
            resid_pdrop=0.0,  # the other architectures have no dropout
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    common |= {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.architecture == "gpt_neox":
        return GPTNeoXConfig(**common)
    common["num_key_value_heads"] = config.num_key_value_heads
    if config.architecture == "qwen3":
        head = config.hidden_size // config.num_attention_heads
        return Qwen3Config(head_dim=head, **common)
    return LlamaConfig(**common)


# ---------------------------------------------------------------------------------- shrunk

SHRUNK_BLOCKS, SHRUNK_VOCABULARY = 4, 128

_SIZES = {
    32: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"),
    48: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
         "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"),
    24: ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    16: ("q_lora_rank",),
    8: ("head_dim", "d_kv", "global_head_dim", "query_pre_attn_scalar", "kv_lora_rank",
        "v_head_dim", "hidden_size_per_layer_input", "state_size", "ssm_state_size",
        "mamba_d_state", "linear_key_head_dim", "linear_value_head_dim", "mamba_chunk_size",
        "chunk_size", "num_buckets"),
    4: ("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "linear_num_value_heads"),
    2: ("linear_num_key_heads", "encoder_layers", "num_nextn_predict_layers"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
         "original_max_position_embeddings"),
    6: ("sliding_window", "attention_window_size", "window_size"),
    SHRUNK_VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
}  # fmt: skip
"""What sizes are called by families, and what they become where a config gives them."""

_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "num_decoder_layers")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
          "decoder_attention_heads")  # fmt: skip

_MOST = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0, "max_window_layers": 2,
}  # fmt: skip
"""Counts that shrink to these, but never grow."""

_DEVIATIONS = {"initializer_range": 0.2, "init_std": 0.2}


def shrunk(config: Any) -> Any:
    """A config of the same family, a few thousand times smaller: what makes it odd is kept.

    Widths, depth, vocabulary and experts shrink; the kinds of blocks, norms, attention, positions
    and activations stay. Of a model that reads images too it is the text decoder alone.

    Raises:
        Exception: whatever the family says to a config that it can't have.
    """
    text = config if is_encoder_decoder(config) else text_config(config)
    given = text.to_dict()
    sizes: dict[str, float] = {name: size for size, names in _SIZES.items() for name in names}
    sizes |= dict.fromkeys(_BLOCKS, SHRUNK_BLOCKS) | dict.fromkeys(_HEADS, 4) | _DEVIATIONS
    changed: dict[str, Any] = {
        name: value
        for name, value in sizes.items()
        if given.get(name) is not None and not isinstance(given[name], list)
    }
    changed |= {
        name: min(most, given[name])
        for name, most in _MOST.items()
        if isinstance(given.get(name), int)
    }
    most_heads = next((given[name] for name in _HEADS if given.get(name)), None)
    for name in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"):
        own = given.get(name)
        if isinstance(own, int):
            changed[name] = 4 if own == most_heads else 1 if own == 1 else 2
    kinds = given.get("layer_types")
    if isinstance(kinds, list):
        changed["layer_types"] = _each_kind(kinds, SHRUNK_BLOCKS)
    for name, number in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2),
                         ("decoder_start_token_id", 0), ("forced_eos_token_id", 2)):  # fmt: skip
        if given.get(name) is not None:
            changed[name] = number
    if given.get("attention_types"):  # GPT-Neo's kinds of blocks
        changed["attention_types"] = [[["global", "local"], SHRUNK_BLOCKS // 2]]
        del given["attention_layers"]
    if given.get("qk_rope_head_dim") is not None:
        changed["head_dim"] = changed["qk_rope_head_dim"]
    for heads, width, expand in (("num_heads", "head_dim", "expand"),
                                 ("mamba_n_heads", "mamba_d_head", "mamba_expand")):  # fmt: skip
        if all(given.get(name) is not None for name in (heads, width, expand)):
            changed |= {width: 8, heads: 32 * int(given[expand]) // 8}
    rope = given.get("rope_parameters")
    if isinstance(rope, dict):
        changed["rope_parameters"] = _shrunk_rope(rope)
    drop = {"quantization_config", "transformers_version", "architectures", "dtype", "auto_map"}
    kept = {name: value for name, value in given.items() if name not in drop}
    return type(text)(**{**kept, **changed})


def _each_kind(kinds: list[str], count: int) -> list[str]:
    """The first blocks, with one of each kind among them."""
    found = [*kinds, *kinds[-1:] * count][:count]
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in found]
    return [*found[: count - len(missing)], *missing]


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Frequencies of heads of width 8."""
    found: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            found[name] = _shrunk_rope(value)
        elif name in {"long_factor", "short_factor"}:
            found[name] = value[:4]
        elif name == "mrope_section":
            found[name] = [1, 1, 2]
        elif name == "original_max_position_embeddings":
            found[name] = 64
        else:
            found[name] = value
    return found
