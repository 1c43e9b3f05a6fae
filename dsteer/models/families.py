"""Kinds of models: which Auto class of transformers loads one, and which can't be read."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from dsteer.errors import ModelError
from dsteer.models.seq2seq import is_encoder_decoder

_REFUSED = {
    "idefics": "it runs only with images",
    "mllama": "its cross-attention blocks run only with images, so on text they have no states",
    "rwkv": "it halves its residual stream every few blocks, and its decoding with a state mixes "
    "the rows of a batch",
}
"""Families whose states on text are none, or not those of a causal language model."""


def refuse_kind(config: Any, name: object) -> None:
    """Refuse models whose states on text can't be read or steered as a causal model's.

    Raises:
        ModelError: such a family, or one whose tokens see those behind them.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind in _REFUSED:
        raise ModelError(
            f"{name} is a {kind} model, which can't be read: {_REFUSED[kind]}; expected a causal "
            "language model of another family"
        )
    text = config.get_text_config(decoder=True)
    if _is_encoder(config):
        raise ModelError(
            f"{name} is a {kind} model, an encoder, whose tokens see those behind them; expected a "
            "causal language model"
        )
    if getattr(text, "use_bidirectional_attention", None) in {True, "all"}:
        raise ModelError(
            f"{name} is a {kind} model with use_bidirectional_attention, so its tokens see those "
            "behind them; expected a causal language model"
        )


def auto_class(config: Any, name: object) -> Any:
    """The Auto class of transformers that loads a language model of a config.

    Image-text wrappers that transformers does not list as causal language models are loaded whole;
    their text decoder is what is read. A config of the model's own code names its classes itself.

    Raises:
        ModelError: the config is of no such model.
    """
    if is_encoder_decoder(config):
        return transformers.AutoModelForSeq2SeqLM
    own_code = not type(config).__module__.startswith("transformers.")
    if own_code or type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    kind = getattr(config, "model_type", type(config).__name__)
    raise ModelError(
        f"{name} is a {kind} model, which is no causal language model; expected one, or an "
        "image-text model around one"
    )


def _is_encoder(config: Any) -> bool:
    """Whether a config is of a masked language model that was not turned into a decoder."""
    masked = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    return masked and not (getattr(config, "is_decoder", False) or is_encoder_decoder(config))
