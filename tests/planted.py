"""Pairs of tiny models whose answer is known.

The base is a random Llama whose MLPs have biases (zeros); the tuned model is the base with a
constant vector b added to the bias of one block's last projection. So block ℓ writes b more into
the residual stream at every position: the displacement is 0 before ℓ and b at ℓ.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsteer.models.load import quiet
from dsteer.models.pair import ModelPair

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, with BOS in front: no file and no training needed."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((BOS, EOS, PAD, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD if pad else None,
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        made.chat_template = template
    return made


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama in float32, whose states are of ordinary size."""
    shape = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "mlp_bias": True,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).float().eval()


@dataclass(frozen=True)
class Planted:
    """A pair with a known answer: b after block ``block``."""

    base: LlamaForCausalLM
    tuned: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    block: int
    b: Tensor

    @property
    def pair(self) -> ModelPair:
        return ModelPair.load(self.base, self.tuned, tokenizer=self.tokenizer)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write both models, each with the tokenizer; returns the folders of base and tuned."""
        for name, model in (("base", self.base), ("tuned", self.tuned)):
            with quiet():
                model.save_pretrained(folder / name)
            self.tokenizer.save_pretrained(folder / name)
        return folder / "base", folder / "tuned"


def planted_pair(block: int, seed: int = 0, size: float = 2.0, **changes: object) -> Planted:
    """A base, and the base plus a constant b of norm ``size`` after a block."""
    base = tiny_llama(seed, **changes)
    generator = torch.Generator().manual_seed(seed + 1)
    b = torch.randn(base.config.hidden_size, generator=generator)
    b *= size / b.norm()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[block].mlp.down_proj.bias += b
    return Planted(base, tuned, byte_tokenizer(), block, b)


PROMPTS = (
    "\n\nHuman: How do I boil an egg?\n\nAssistant:",
    "\n\nHuman: Hi\n\nAssistant:",
    "\n\nHuman: Name three rivers.\n\nAssistant: The Nile.\n\nHuman: Two more?\n\nAssistant:",
    "\n\nHuman: What is a lemma?\n\nAssistant:",
    "\n\nHuman: Tell me about bees and how they find their way home.\n\nAssistant:",
    "a",
    "\n\nHuman: Which bread keeps longest?\n\nAssistant:",
    "\n\nHuman: Sum 2 and 3.\n\nAssistant:",
)
"""Benign prompts of different lengths, hh-style but for one."""
