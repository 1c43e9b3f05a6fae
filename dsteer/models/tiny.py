"""A tiny Llama and its tokenizer, built from a config: nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsteer.config import TinyModelConfig
from dsteer.errors import ConfigError

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
) -> LlamaForCausalLM:
    """Build a float32 Llama with random weights; the caller's random state is left as it was.

    Raises:
        ConfigError: the head width is odd, which rotary positions can't use.
    """
    head = config.hidden_size // config.num_attention_heads
    if head % 2:
        raise ConfigError(
            f"base.model.hidden_size: {config.hidden_size} over {config.num_attention_heads} heads "
            f"is {head} a head, and rotary positions need an even number; choose a multiple of "
            f"{2 * config.num_attention_heads}"
        )
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape).float()
