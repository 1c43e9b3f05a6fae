"""Find the parts of a language model that states are read from and written to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dsteer.errors import ModelError
from dsteer.models.families import refuse_kind
from dsteer.models.load import Model
from dsteer.models.placement import execution_device
from dsteer.models.seq2seq import is_encoder_decoder, is_post_norm, refuse_family, start_ids

# What some families call the norm behind their last block, though it is none of an embedding.
_FINAL_NORMS = frozenset({"embedding_norm"})
# What families call the parts of a block.
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention", "linear_attn"),
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe"),
}
# Families whose parts add the residual stream themselves, so that what they return is no component.
_ADDING = {"bloom": ("attention", "mlp"), "mpt": ("mlp",)}
_OTHER_NORMS = ("embed", "per_layer")  # of the embeddings, Gemma 4's in each block among them


@dataclass(frozen=True)
class Anatomy:
    """The parts of a language model. Every number comes from the model itself.

    Of an encoder-decoder model, decoder, blocks and final norm are the decoder's.

    Attributes:
        decoder: the model without its head; called with ids it returns the final_norm states first.
        blocks: its blocks, in order; block k writes resid_post.k.
        final_norm: the norm after the last block, whose output the unembedding reads; of a
            post-norm model, which has none, the last block.
        width: d, the width of the residual stream.
        n_blocks: L.
        input_embedding: the token embedding.
        output_embedding: the unembedding; None if the model has none.
        tied: whether both embeddings are one tensor.
        max_positions: the longest sequence that the model was made for; None if it has no limit.
        device: where the token ids must be.
        dtype: what the model computes in, that of its token embedding.
        encoder: the encoder; None of a decoder-only model.
        start: the tokens that the decoder begins with; None of a decoder-only model.
    """

    decoder: nn.Module
    blocks: nn.ModuleList
    final_norm: nn.Module
    width: int
    n_blocks: int
    input_embedding: nn.Module
    output_embedding: nn.Module | None
    tied: bool
    max_positions: int | None
    device: torch.device
    dtype: torch.dtype
    encoder: nn.Module | None = None
    start: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: Model) -> Anatomy:
        """Find the parts of a model (of a PEFT model, those of the model inside it).

        Raises:
            ModelError: the model is compiled, is no transformers language model of a family that is
                read, steers through learned prompts, or keeps its residual stream in another form
                than (B, T, d).
        """
        name = model_name(model)
        _refuse(model, name)
        text = text_config(model.config)
        decoder = model.get_decoder()
        n_blocks, width = count_blocks(model.config), int(text.hidden_size)
        if getattr(text, "altup_num_inputs", 1) > 1:
            raise ModelError(
                f"{name}: {text.model_type} carries {text.altup_num_inputs} residual streams at "
                "once; expected one state a token"
            )
        holder, blocks = _find_blocks(decoder, n_blocks, name)
        if len(set(map(id, blocks))) < n_blocks:
            raise ModelError(
                f"{name}: some of its {n_blocks} blocks are one module, which runs several times a "
                "pass; expected a module a block"
            )
        input_embedding = model.get_input_embeddings()
        output_embedding = model.get_output_embeddings()
        return cls(
            decoder=decoder,
            blocks=blocks,
            final_norm=blocks[-1] if is_post_norm(model.config) else _find_final_norm(holder, name),
            width=width,
            n_blocks=n_blocks,
            input_embedding=input_embedding,
            output_embedding=output_embedding,
            tied=_tied(input_embedding, output_embedding, text),
            max_positions=max_positions(model.config),
            device=execution_device(input_embedding),
            dtype=input_embedding.weight.dtype,
            encoder=model.get_encoder() if is_encoder_decoder(model.config) else None,
            start=start_ids(model),
        )

    def component(self, block: int, part: Literal["attention", "mlp"]) -> nn.Module:
        """The attention or the MLP of a block: the module that returns what it adds to the stream.

        Where a block has norms behind its parts (Gemma 2 and 3, OLMo 2), it is what enters them.

        Raises:
            ModelError: the block has no such module, or one that adds the stream by itself.
        """
        module = self.blocks[block]
        kind = str(getattr(getattr(self.decoder, "config", None), "model_type", ""))
        found = [child for name, child in module.named_children() if name in PARTS[part]]
        if len(found) != 1 or part in _ADDING.get(kind, ()):
            why = (
                f"the {part} of {kind} adds the residual stream by itself"
                if len(found) == 1
                else f"{type(module).__name__} has {len(found)} parts that could be its {part}"
            )
            raise ModelError(
                f"block {block}: {why}; expected one module that returns what it adds; use "
                f"resid_post.{block}"
            )
        return found[0]

    @staticmethod
    def read(output: object) -> Tensor:
        """The state in what a module returned: the output itself, or the first of several parts.

        Raises:
            ModelError: it is no state of shape (B, T, d).
        """
        state = output[0] if isinstance(output, tuple | list | ModelOutput) else output
        if not isinstance(state, Tensor) or state.ndim != 3:
            shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ModelError(
                f"a block returned {shape}; expected a state of shape (batch, tokens, width)"
            )
        return state

    @staticmethod
    def write(output: Any, state: Tensor) -> Any:
        """What a module returned, with its state replaced."""
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, next(iter(output)): state})
        if isinstance(output, tuple | list):
            return type(output)((state, *output[1:]))
        return state


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and without gradients; training flags return afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def text_config(config: Any) -> Any:
    """The part of a config that describes the text decoder; all of it, unless multimodal."""
    return config.get_text_config(decoder=True)


def count_blocks(config: Any) -> int:
    """L, the blocks of a model; of an encoder-decoder model, those of its decoder."""
    text = text_config(config)
    own = getattr(text, "num_decoder_layers", None) if is_encoder_decoder(config) else None
    return int(text.num_hidden_layers if own is None else own)


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model was made for; None if its config says nothing.

    Of a model with dynamic RoPE it is the length of pre-training: what such a model computes for
    longer sequences depends on those that it has seen before.
    """
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic" and rope.get("original_max_position_embeddings"):
        return int(rope["original_max_position_embeddings"])
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def model_name(model: Model) -> str:
    """How messages name a model: its hub id or folder, else its class."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)


def _refuse(model: Model, name: str) -> None:
    compiled = [
        module
        for module in model.modules()
        if hasattr(module, "_orig_mod")  # what torch.compile(model) wraps
        or getattr(module, "_compiled_call_impl", None) is not None  # model.compile()
    ]
    if compiled:
        raise ModelError(
            f"{name}: the model is compiled, and compiled code may skip hooks; pass the model as "
            "it was before torch.compile"
        )
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise ModelError(
            f"{name} is no transformers language model (it has no get_decoder); expected what "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM loads"
        )
    refuse_family(model.config, name)
    refuse_kind(model.config, name)
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ModelError(
            f"{name}: its adapter ({adapter.peft_type}) works by learned prompts, not by weights, "
            "so it has no states on the same ids; expected a LoRA-like adapter"
        )


def _tied(input_embedding: nn.Module, output_embedding: nn.Module | None, text: Any) -> bool:
    if output_embedding is None:
        return False
    weights: list[Any] = [input_embedding.weight, output_embedding.weight]
    if any(weight.device.type == "meta" for weight in weights):  # not in memory: no address
        return bool(getattr(text, "tie_word_embeddings", False))
    return bool(weights[0].data_ptr() == weights[1].data_ptr())


def _find_blocks(decoder: nn.Module, n_blocks: int, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """The shallowest list of ``n_blocks`` modules, and the module that holds it."""
    found: list[tuple[int, nn.Module, nn.ModuleList]] = []
    for path, holder in decoder.named_modules():
        for child in holder.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_blocks:
                found.append((path.count(".") + bool(path), holder, child))
    nearest = [item for item in found if item[0] == min(depth for depth, _, _ in found)]
    if len(nearest) != 1:
        raise ModelError(
            f"{name}: {len(nearest)} lists of {n_blocks} modules could be its blocks; expected "
            f"exactly one in {type(decoder).__name__}"
        )
    _, holder, blocks = nearest[0]
    return holder, blocks


def _find_final_norm(holder: nn.Module, name: str) -> nn.Module:
    """The one norm beside the blocks that belongs neither to the embedding nor into blocks.

    Where an adapter trained it whole, that is PEFT's module around the norm and its copy: the
    output is of the one in use.
    """
    norms = [
        child
        for attribute, child in holder.named_children()
        if "norm" in type(getattr(child, "original_module", child)).__name__.lower()
        and (attribute in _FINAL_NORMS or not any(word in attribute for word in _OTHER_NORMS))
    ]
    if len(norms) != 1:
        raise ModelError(
            f"{name}: {len(norms)} norms stand beside the blocks of {type(holder).__name__}; "
            "expected exactly one, after the last block"
        )
    return norms[0]
