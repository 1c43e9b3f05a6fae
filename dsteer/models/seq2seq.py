"""Encoder-decoder models: which families are read, and the tokens that their decoder begins with.

Such a model reads a prompt with its encoder and writes the answer with its decoder, which begins
with a start token. The first answer token is predicted from the last start token.
"""

from __future__ import annotations

from typing import Any

from dsteer.errors import ModelError

POST_NORM = {
    "bart": True,
    "blenderbot": False,
    "blenderbot-small": True,
    "marian": True,
    "mbart": False,
    "mt5": False,
    "pegasus": False,
    "t5": False,
    "umt5": False,
}
"""The families that are read, and whether their blocks end with a norm, so that none follows."""

_REASONS = {
    "encoder-decoder": "it joins two models, whose tokens and widths may differ",
    "led": "its encoder pads texts to a window",
    "longt5": "its encoder attends by blocks of a padded text",
    "prophetnet": "its decoder carries several streams a token",
    "speech-encoder-decoder": "its encoder reads sound",
    "speech_to_text": "its encoder reads sound",
    "switch_transformers": "its experts drop tokens by what else is in the batch",
    "vision-encoder-decoder": "its encoder reads images",
    "whisper": "its encoder reads sound",
}


def is_encoder_decoder(config: Any) -> bool:
    """Whether a config is of a model that reads with an encoder and writes with a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def refuse_family(config: Any, name: object) -> None:
    """Refuse encoder-decoder models whose states are not known to be read right.

    Raises:
        ModelError: with the reason.
    """
    kind = str(getattr(config, "model_type", ""))
    if not is_encoder_decoder(config) or kind in POST_NORM:
        return
    why = _REASONS.get(kind, "no test vouches for what its blocks carry")
    raise ModelError(
        f"{name} is a {kind} model, an encoder-decoder that is not read: {why}; expected a "
        f"decoder-only model, or one of {', '.join(POST_NORM)}"
    )


def is_post_norm(config: Any) -> bool:
    """Whether each block's output has been normalised, and the head reads the last one's."""
    kind = str(getattr(config, "model_type", ""))
    return is_encoder_decoder(config) and POST_NORM.get(kind, False)


def start_ids(model: Any) -> tuple[int, ...] | None:
    """The tokens that the decoder of a model begins with; None of a decoder-only model.

    These are the start token and, where ``generate`` is made to write one first (BART's BOS,
    mBART-50's language), that token.

    Raises:
        ModelError: its configs name no start token.
    """
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return start_of(model.config, getattr(model, "generation_config", None), name)


def start_of(config: Any, generation: Any | None, name: object) -> tuple[int, ...] | None:
    """:func:`start_ids` from a model's config and, where it has one, its generation config."""
    if not is_encoder_decoder(config):
        return None
    found: dict[str, Any] = {}
    for key in ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id"):
        own = getattr(generation, key, None)
        found[key] = getattr(config, key, None) if own is None else own
    start = found["decoder_start_token_id"]
    start = found["bos_token_id"] if start is None else start
    if start is None:
        raise ModelError(
            f"{name}: its config names no decoder_start_token_id, so it is not known what its "
            "decoder begins with; set it"
        )
    forced = found["forced_bos_token_id"]
    return (int(start),) if forced is None else (int(start), int(forced))


def decoder_notes(config: Any) -> list[str]:
    """What a person should know of the sites of an encoder-decoder model."""
    if not is_encoder_decoder(config):
        return []
    notes = [
        "An encoder-decoder model: the encoder reads the prompt, the decoder its start token and "
        "the answer. resid_post and final_norm are the decoder's, and prompt_last is its first "
        "position, from which the answer's first token is predicted; encoder is the encoder's last "
        "state, which cross-attention reads, at the prompt's tokens."
    ]
    if is_post_norm(config):
        notes.append(
            f"{config.model_type} is post-norm: a block's output is already normalised and no norm "
            "follows the last, so final_norm is the last block's output, the same state as its "
            "resid_post."
        )
    return notes
