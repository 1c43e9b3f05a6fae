"""States of one model over whole texts, from which vectors are built."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dsteer.activations.reading import Reading
from dsteer.activations.sites import COMPONENTS, component_of
from dsteer.activations.storage import States
from dsteer.data.tokens import Encoded, Tokenizer, encode, has_template
from dsteer.data.transcript import render_transcript
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, did_you_mean
from dsteer.models.anatomy import Anatomy, model_name
from dsteer.models.load import Model
from dsteer.names import telling_parts
from dsteer.progress import SILENT, Reporter
from dsteer.store import Json

Component = Literal["residual", "attn", "mlp"]
"""Where in a block: the stream after it, or what its attention or its MLP returns."""

TokenPosition = Literal["last", "first", "all", "mean"]
"""The tokens of a whole text, special tokens before it included, that are read.

``last``: its last token; ``first``: its first, which is BOS where the tokenizer has one, and then
the same in every text; ``mean``: the mean over its tokens; ``all``: each token is a sample.
"""

_KINDS = dict(zip(get_args(Component), ("resid_post", *COMPONENTS), strict=True))
PART_OF: dict[str | None, str] = {None: "residual", **{_KINDS[w]: w for w in ("attn", "mlp")}}
"""What :data:`Component` calls what :func:`dsteer.activations.sites.component_of` does."""
_POSITIONS = {"last": "prompt_last", "first": "prompt_last", "all": "all", "mean": "prompt_mean"}
_IN_MEMORY = 2**30
"""Bytes of states that are held in memory; more lie in a temporary file."""


@dataclass(frozen=True)
class Shape:
    """What is known of one model that reads; see :class:`dsteer.activations.reading.Shape`."""

    width: int
    n_blocks: int
    vocabulary: int
    max_positions: int | None
    encoder_decoder: bool

    @classmethod
    def of(cls, model: Model) -> Shape:
        """The shape of a loaded model."""
        anatomy = Anatomy.of(model)
        return cls(
            anatomy.width,
            anatomy.n_blocks,
            int(model.get_input_embeddings().num_embeddings),
            anatomy.max_positions,
            anatomy.encoder is not None,
        )


def sites_of(
    component: str, layers: Sequence[int] | None, sites: str | Sequence[str]
) -> str | list[str]:
    """The sites that are meant: a component's at all layers, at some, or named ones.

    Args:
        component: ``residual``, ``attn`` or ``mlp``.
        layers: blocks, from 0; None: all, and of the residual stream ``final_norm`` too.
        sites: ``all``, or names, which must be of the component.

    Raises:
        ConfigError: no such component, layers and sites both, or a site of another component.
    """
    if component not in _KINDS:
        raise ConfigError(
            f"component {component!r}: no such component{did_you_mean(component, _KINDS)}"
        )
    kind = _KINDS[component]
    if layers is not None:
        if sites != "all":
            raise ConfigError(f"layers {list(layers)} and sites {sites}: give one of both")
        negative = [layer for layer in layers if layer < 0]
        if negative:
            raise ConfigError(f"layer {negative[0]}: expected blocks counted from 0")
        return [f"{kind}.{layer}" for layer in layers]
    if sites == "all":
        return "all" if component == "residual" else kind
    named = [sites] if isinstance(sites, str) else list(sites)
    for site in named:
        own = component_of(site) or "resid_post"
        if own != kind:
            fitting = next(word for word, one in _KINDS.items() if one == own)
            raise ConfigError(
                f"site {site!r} is none of component {component!r}; give component {fitting!r}"
            )
    return named


def encode_texts(
    model: Model | Shape,
    tokenizer: Tokenizer,
    texts: Sequence[Prompt],
    *,
    template: str = "none",
    max_tokens: int | None = None,
    room: int = 0,
    what: str = "texts",
) -> list[Encoded]:
    """Token ids of whole texts: all of a text is its prompt.

    Texts are tokenised as they stand, message lists go through the chat template. One that ends
    with an answer ends with its last token, without the template's words behind it; a tokenizer
    without a template reads it as a transcript ``"\\n\\nHuman: …\\n\\nAssistant: …"``.

    Args:
        model: the model, or its shape; longer texts than it was made for are cut on the left.
        tokenizer: its tokenizer.
        texts: texts or message lists.
        template: ``chat`` puts texts through the chat template too, each as a prompt.
        max_tokens: a lower limit.
        room: tokens that must fit behind each text.
        what: how messages name the texts.

    Raises:
        ConfigError: no such template.
        ModelError: ``template="chat"`` and there is none.
        DataError: a text without tokens, or one that the template refuses.
    """
    shape = model if isinstance(model, Shape) else Shape.of(model)
    reach = None if shape.max_positions is None else shape.max_positions - room
    limits = [limit for limit in (max_tokens, reach) if limit is not None]
    prompts: list[tuple[int, Prompt]] = []
    answered: list[tuple[int, PreferencePair]] = []
    for number, text in enumerate(texts):
        answer = None if isinstance(text, str) or not text else text[-1]
        if answer is None or answer["role"] != "assistant" or not answer["content"]:
            prompts.append((number, text))
        elif has_template(tokenizer) and not shape.encoder_decoder:
            answered.append((number, PreferencePair(text[:-1], chosen=answer["content"])))
        else:
            prompts.append((number, render_transcript(list(text))))  # type: ignore[arg-type]
    found: dict[int, Encoded] = {}
    try:
        for numbered, response in ((prompts, None), (answered, "chosen")):
            if numbered:
                encoded = encode(
                    tokenizer,
                    [text for _, text in numbered],
                    template=template,
                    max_tokens=min(limits) if limits else None,
                    response=response,  # type: ignore[arg-type]
                    encoder_decoder=shape.encoder_decoder,
                )
                found |= zip((number for number, _ in numbered), encoded, strict=True)
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    return [replace(found[i], prompt_length=len(found[i].ids)) for i in range(len(texts))]


def as_ids(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    new_tokens: int,
    template: str = "none",
) -> list[Encoded]:
    """The ids of prompts, cut on the left so that so many new tokens fit; ids stay as they are.

    Raises:
        DataError: one text instead of a list, or prompts that can't be encoded.
    """
    if isinstance(prompts, str):
        raise DataError("prompts is one text; expected a list of prompts")
    ready = [item for item in prompts if isinstance(item, Encoded)]
    if len(ready) == len(prompts):
        return ready
    shape = Shape.of(model)
    limit = shape.max_positions
    return encode(
        tokenizer,
        prompts,  # type: ignore[arg-type]  # no Encoded among them
        template=template,
        max_tokens=None if limit is None else limit - new_tokens,
        encoder_decoder=shape.encoder_decoder,
    )


@contextlib.contextmanager
def states_of(
    model: Model,
    encoded: Sequence[Encoded],
    *,
    sites: str | Sequence[str] = "all",
    position: str = "last",
    batch_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[tuple[States, tuple[int, ...]]]:
    """Read a model's states over ids, all sites in one pass; they last as long as the block.

    Many are held in a temporary file, and read site by site from there.

    Args:
        model: the model.
        encoded: whole texts, as :func:`encode_texts` gives them.
        sites: see :func:`dsteer.activations.sites.resolve_sites`.
        position: ``last``, ``first``, ``all`` or ``mean``, see :data:`TokenPosition`.
        batch_tokens: tokens a batch, padding included; default: what suits the device.
        reporter: shows progress.

    Yields:
        The states, float32 (rows, d) a site, and offsets: rows of text i are offsets[i] …
        offsets[i+1] − 1.

    Raises:
        ConfigError: unknown site or position, or one that the model has not.
        ModelError: ids outside the vocabulary, or a model whose states can't be read.
        MeasurementError: a state is not finite.
    """
    require_position(position)
    shape = Shape.of(model)
    if position == "first":
        if shape.encoder_decoder:
            raise ConfigError(
                "position 'first': the tokens of an encoder see all others, so the first can't be "
                "read alone; expected last, or mean or all at the encoder"
            )
        encoded = [Encoded(item.ids[:1], 1, item.truncated) for item in encoded]
    reading = Reading.of(
        shape, encoded, sites=sites, position=_POSITIONS[position], batch_tokens=batch_tokens
    )
    label = telling_parts(model_name(model))[-1]
    rows = reading.offsets[-1]
    if rows * reading.width * len(reading.sites) * 4 <= _IN_MEMORY:
        yield reading.run(model, label, reporter=reporter), reading.offsets
        return
    with tempfile.TemporaryDirectory(prefix="dsteer-") as folder:
        path = Path(folder) / "states.safetensors"
        yield reading.run(model, label, path, reporter), reading.offsets


def require_position(position: str) -> None:
    """Check the name of a position.

    Raises:
        ConfigError: there is no such position.
    """
    if position not in _POSITIONS:
        raise ConfigError(
            f"position {position!r}: no such position{did_you_mean(position, _POSITIONS)}"
        )


def as_json(text: Prompt) -> Json:
    """A text or message list as JSON, to be hashed."""
    return text if isinstance(text, str) else [dict(message) for message in text]
