"""Read a pair's hidden states over prompts: identical ids, every site in one pass a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.reading import Reading, row_offsets
from dsteer.activations.sites import RESPONSES
from dsteer.activations.storage import States
from dsteer.data.tokens import Encoded, encode, given_ids
from dsteer.data.types import PreferencePair, Prompt
from dsteer.models.pair import ModelPair, Which
from dsteer.progress import SILENT, Reporter
from dsteer.store import read_metadata, read_tensors, write_tensors

# ---------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class PairedActivations:
    """States of both models on the same token ids.

    Attributes:
        base: site → float32 (N, d), rows in prompt order; ``.rows(site, start, stop)`` slices.
        tuned: likewise.
        sites: the sites, in the model's order.
        position: which tokens the rows are.
        encoded: the ids that both models read.
        offsets: rows of prompt i are offsets[i] … offsets[i+1] − 1. One row a prompt, but for the
            positions ``all`` and ``response_predictors``.
    """

    base: States
    tuned: States
    sites: tuple[str, ...]
    position: str
    encoded: tuple[Encoded, ...]
    offsets: tuple[int, ...]

    @property
    def truncated(self) -> int:
        """How many prompts lost their left part."""
        return sum(item.truncated for item in self.encoded)

    def displacement(self, site: str) -> Float[Tensor, "n d"]:
        """Δ = h_tuned − h_base at a site, float64 (N, d)."""
        return self.tuned[site].double() - self.base[site].double()

    def select(self, rows: slice) -> PairedActivations:
        """The same states for some consecutive prompts."""
        first, last, step = rows.indices(len(self.encoded))
        if step != 1:
            raise ValueError(f"{rows}: expected consecutive prompts")
        last = max(first, last)
        start, stop = self.offsets[first], self.offsets[last]
        return PairedActivations(
            self.base.window(start, stop),
            self.tuned.window(start, stop),
            self.sites,
            self.position,
            self.encoded[first:last],
            tuple(offset - start for offset in self.offsets[first : last + 1]),
        )

    @classmethod
    def open(cls, folder: Path) -> PairedActivations:
        """Open what :func:`extract` stored in a folder.

        Raises:
            StoreError: a file is missing or malformed.
        """
        base = States.open(folder / "base.safetensors")
        tuned = States.open(folder / "tuned.safetensors")
        metadata = read_metadata(folder / "base.safetensors")
        position: str = metadata["position"]
        encoded = read_ids(folder / "ids.safetensors")
        offsets = row_offsets(encoded, position, metadata.get("stack"))
        return cls(base, tuned, tuple(base), position, tuple(encoded), offsets)


def write_ids(path: Path, encoded: Sequence[Encoded]) -> None:
    """Write token ids as safetensors, atomically."""
    write_tensors(
        path,
        {
            "ids": np.array([i for item in encoded for i in item.ids], dtype=np.int32),
            "lengths": np.array([len(item.ids) for item in encoded], dtype=np.int32),
            "prompt_lengths": np.array([item.prompt_length for item in encoded], dtype=np.int32),
            "truncated": np.array([item.truncated for item in encoded], dtype=np.bool_),
        },
    )


def read_ids(path: Path) -> list[Encoded]:
    """Read what :func:`write_ids` wrote."""
    tensors = read_tensors(path)
    ends = tensors["lengths"].cumsum().tolist()
    ids = tensors["ids"].tolist()
    return [
        Encoded(tuple(ids[start:end]), prompt_length, truncated)
        for start, end, prompt_length, truncated in zip(
            [0, *ends[:-1]],
            ends,
            tensors["prompt_lengths"].tolist(),
            tensors["truncated"].tolist(),
            strict=True,
        )
    ]


# ---------------------------------------------------------------------------------- a pair


def extract(
    pair: ModelPair,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    *,
    sites: str | Sequence[str] = "all",
    position: str = "prompt_last",
    template: str = "none",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> PairedActivations:
    """Read both models' states on identical token ids.

    Args:
        pair: the models; one is in memory at a time unless both fit.
        prompts: texts (tokenised as they stand), message lists (through the chat template), pairs
            (their prompt, and their chosen answer where the position lies in it), or ids.
        sites: ``all``, or names such as ``resid_post.3`` and ``final_norm``.
        position: which tokens, see :func:`dsteer.activations.sites.token_ranges`.
        template: ``chat`` puts texts through the chat template too.
        batch_tokens: tokens a batch, padding included; default: what suits the device.
        max_tokens: longer prompts are cut on the left; at most what the models were made for.
        folder: keep the states there, in ``base.safetensors`` and ``tuned.safetensors``, instead of
            in memory. A reading that was killed goes on where it stopped, if ids, sites, position,
            batches and weights are the same; else it begins anew.
        reporter: shows progress.

    Raises:
        ConfigError: unknown site or position.
        DataError: no prompts, ids and texts in one list, or one that can't be encoded.
        ModelError: ids outside the vocabulary, or a model whose states can't be read.
        MeasurementError: a state is not finite.
        StoreError: the folder can't be written.
    """
    encoded = encode_for(pair, prompts, position=position, template=template, max_tokens=max_tokens)
    reading = Reading.of(pair, encoded, sites=sites, position=position, batch_tokens=batch_tokens)
    found: dict[Which, States] = {}
    for which in ("base", "tuned"):
        path = None if folder is None else folder / f"{which}.safetensors"
        with pair.using(which) as model:
            found[which] = reading.run(model, which, path, reporter)
    if folder is not None:
        write_ids(folder / "ids.safetensors", encoded)
    return PairedActivations(
        found["base"],
        found["tuned"],
        reading.sites,
        position,
        tuple(encoded),
        reading.offsets,
    )


def encode_for(
    pair: ModelPair,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    *,
    position: str = "prompt_last",
    template: str = "none",
    max_tokens: int | None = None,
    response_tokens: int | None = None,
) -> list[Encoded]:
    """Token ids of prompts for both models of a pair, no longer than both were made for.

    Answers are encoded only where the position lies in them. Ids are taken as they are.

    Raises:
        DataError: no prompts, ids and texts in one list, or one that can't be encoded.
    """
    if (ready := given_ids(prompts)) is not None:
        return ready
    limits = [limit for limit in (max_tokens, pair.max_positions) if limit is not None]
    return encode(
        pair.tokenizer_for(template),
        prompts,  # type: ignore[arg-type]  # no Encoded among them
        template=template,
        max_tokens=min(limits) if limits else None,
        response="chosen" if position in RESPONSES else None,
        response_tokens=response_tokens,
        encoder_decoder=pair.encoder_decoder,
    )
