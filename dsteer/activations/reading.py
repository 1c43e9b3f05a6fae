"""Read one model's hidden states over prompts: every site in one pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dsteer import __version__
from dsteer.activations.batching import Batch, default_budget, pad_right, plan_batches
from dsteer.activations.capture import Select, read_batch, select_means, select_tokens
from dsteer.activations.sites import FINAL_NORM, MEANS, resolve_sites, token_ranges
from dsteer.activations.storage import FileSink, MemorySink, States
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.errors import DataError, MeasurementError, ModelError
from dsteer.models.anatomy import Anatomy, evaluating, text_config
from dsteer.models.load import Model, quiet
from dsteer.models.pair import ModelPair, Which
from dsteer.progress import SILENT, Reporter
from dsteer.store import hash_json

# A padded row must give the states of the row alone, up to rounding. A model in which a real token
# sees padding misses this by orders of magnitude.
_PADDING_ERROR = {torch.float32: 1e-4}
_PADDING_ERROR_LOW_PRECISION = 5e-2
_PROBE_PADDING = 16


@dataclass(frozen=True)
class Reading:
    """What is read of a model: which sites, at which tokens of which ids.

    Attributes:
        encoded: ids of each prompt.
        ranges: the tokens of each prompt whose states are read or averaged.
        sites: in the model's order.
        position: the position that the ranges stand for.
        width: d.
        batch_tokens: tokens a batch; None for what suits the device.
    """

    encoded: Sequence[Encoded]
    ranges: Sequence[range]
    sites: tuple[str, ...]
    position: str
    width: int
    batch_tokens: int | None

    @classmethod
    def of(
        cls,
        pair: ModelPair,
        encoded: Sequence[Encoded],
        *,
        sites: str | Sequence[str] = "all",
        position: str = "prompt_last",
        batch_tokens: int | None = None,
    ) -> Reading:
        """Check what is asked for against what both models of a pair have.

        Raises:
            ConfigError: unknown site or position.
            DataError: the position lies in an answer, and there is none; too many ids.
            ModelError: an id that one of the models does not have.
        """
        for number, item in enumerate(encoded):
            if pair.max_positions is not None and len(item.ids) > pair.max_positions:
                raise DataError(
                    f"prompt {number} has {len(item.ids)} tokens, and the models were made for "
                    f"{pair.max_positions}; cut it, or give text, which is cut and counted"
                )
            if max(item.ids) >= pair.vocabulary or min(item.ids) < 0:
                raise ModelError(
                    f"prompt {number} has the token id {max(item.ids)}, and the models have only "
                    f"{pair.vocabulary} tokens; give the tokenizer that belongs to them"
                )
        return cls(
            encoded,
            token_ranges(encoded, position),
            resolve_sites(sites, pair.n_blocks),
            position,
            pair.width,
            batch_tokens,
        )

    @property
    def offsets(self) -> tuple[int, ...]:
        """Rows of prompt i are offsets[i] … offsets[i+1] − 1."""
        return row_offsets(self.encoded, self.position)

    @property
    def needed(self) -> list[tuple[int, ...]]:
        """The ids that have to be run: nothing behind the last token that is read."""
        return [
            item.ids[: tokens.stop] for item, tokens in zip(self.encoded, self.ranges, strict=True)
        ]

    def run(
        self, model: Model, which: Which, path: Path | None = None, reporter: Reporter = SILENT
    ) -> States:
        """Read one model, into memory or into a file.

        Raises:
            ModelError: the model's states can't be read.
            MeasurementError: a state is not finite.
            StoreError: the file can't be written.
        """
        anatomy = Anatomy.of(model)
        needed = self.needed
        with evaluating(model), quiet():
            batches = self._plan(model, anatomy, needed)
        offsets = self.offsets
        if path is None:
            sink = MemorySink(self.sites, offsets[-1], self.width)
            self._fill(model, anatomy, which, batches, needed, sink, reporter)
            return States.hold(sink.tensors)
        metadata = {
            "dsteer": __version__,
            "dtype": str(anatomy.dtype).removeprefix("torch."),
            "ids_sha256": hash_ids(self.encoded),
            "position": self.position,
            "weights_sample": sample_weights(model),
        }
        metadata["plan"] = hash_json(
            [metadata, self.sites, offsets[-1], self.width, [batch.prompts for batch in batches]]
        )
        # Another one's hooks may change the states, and nothing here could tell.
        hooked = any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        with FileSink(
            path, self.sites, offsets[-1], self.width, metadata, resume=not hooked
        ) as file:
            if not file.complete:
                self._fill(model, anatomy, which, batches, needed, file, reporter)
            file.finish()
        return States.open(path)

    def _plan(self, model: Model, anatomy: Anatomy, needed: Sequence[Sequence[int]]) -> list[Batch]:
        lengths = [len(ids) for ids in needed]
        budget = self.batch_tokens or default_budget(anatomy.device)
        batches = plan_batches(lengths, budget)
        pads = any(lengths[batch.prompts[-1]] < batch.length for batch in batches)
        if pads and not padding_is_unseen(model, anatomy, needed):
            return plan_batches(lengths, budget, pad=False)
        return batches

    def _fill(
        self,
        model: Model,
        anatomy: Anatomy,
        which: Which,
        batches: Sequence[Batch],
        needed: Sequence[Sequence[int]],
        sink: MemorySink | FileSink,
        reporter: Reporter,
    ) -> None:
        offsets = self.offsets
        done = sum(len(batches[number].prompts) for number in sink.done)
        with (
            evaluating(model),
            quiet(),
            reporter.bar(f"states of {which}", len(needed), unit="prompts", done=done) as advance,
        ):
            for number, batch in enumerate(batches):
                if number in sink.done:
                    continue
                ids = pad_right([needed[prompt] for prompt in batch.prompts], batch.length)
                states = read_batch(anatomy, ids, self.sites, self._select(batch))
                _require_finite(states, which, anatomy.dtype)
                spans = [range(offsets[prompt], offsets[prompt + 1]) for prompt in batch.prompts]
                sink.put(number, spans, states)
                advance(len(batch.prompts))

    def _select(self, batch: Batch) -> Select:
        ranges = [self.ranges[prompt] for prompt in batch.prompts]
        if self.position in MEANS:
            return select_means(ranges, batch.length)
        return select_tokens(ranges)


def padding_is_unseen(model: Model, anatomy: Anatomy, needed: Sequence[Sequence[int]]) -> bool:
    """Whether a prompt gives the same states alone and with padding on its right.

    So it is in every causal model, but for long RoPE, which turns all rows of a batch by other
    angles as soon as the longest exceeds the length of pre-training. The claim is tested on the
    shortest prompt at final_norm; two copies of it without padding tell how much is mere rounding.
    """
    if max(map(len, needed)) > _longrope_length(model):
        return False
    row = min(needed, key=len)
    last = select_tokens([range(len(row) - 1, len(row))])

    def read(rows: Sequence[Sequence[int]], length: int) -> Tensor:
        return read_batch(anatomy, pad_right(rows, length), [FINAL_NORM], last)[FINAL_NORM][0]

    alone = read([row], len(row))
    scale = float(alone.norm())
    padded = float((read([row], len(row) + _PROBE_PADDING) - alone).norm())
    if not padded > scale * _PADDING_ERROR.get(anatomy.dtype, _PADDING_ERROR_LOW_PRECISION):
        return True
    rounding = float((read([row, row], len(row)) - alone).norm())
    return padded < 10 * rounding


def _longrope_length(model: Model) -> float:
    """The length from which long RoPE turns by other angles; infinite for other models."""
    rope = getattr(text_config(model.config), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return min(
        (
            float(kind["original_max_position_embeddings"])
            for kind in kinds
            if kind.get("rope_type") == "longrope"
        ),
        default=math.inf,
    )


def sample_weights(model: Model, count: int = 1024) -> str:
    """SHA-256 over some evenly spaced elements of every parameter: tells models apart, cheaply."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type == "meta":
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, len(flat) // count)
        digest.update(flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def row_offsets(encoded: Sequence[Encoded], position: str) -> tuple[int, ...]:
    """Rows of prompt i are offsets[i] … offsets[i+1] − 1."""
    if position in MEANS:
        return tuple(range(len(encoded) + 1))
    return (0, *accumulate(len(tokens) for tokens in token_ranges(encoded, position)))


def _require_finite(states: Mapping[str, Tensor], which: Which, dtype: torch.dtype) -> None:
    for site, tensor in states.items():
        if not bool(torch.isfinite(tensor).all()):
            used = str(dtype).removeprefix("torch.")
            remedy = (
                "load it with dtype float32 or bfloat16"
                if dtype == torch.float16
                else "the weights are broken or overflow; check the model, or try dtype float32"
            )
            raise MeasurementError(
                f"{site} of the {which} model holds states that are not finite ({used}); {remedy}"
            )


# ---------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class NoiseFloor:
    """What rounding alone does to a site: states of one model, alone minus in its batch.

    Attributes:
        rms: √(mean ‖noiseᵢ‖²), in the states' units.
        mean_norm: ‖mean noise‖, likewise: what it adds to v*.
    """

    rms: float
    mean_norm: float


def noise_floor(
    reading: Reading, model: Model, states: States, prompts: int
) -> dict[str, NoiseFloor]:
    """Read some first prompts again, one at a time, and compare.

    Args:
        reading: what was read, in batches.
        model: the model that was read.
        states: what was found.
        prompts: how many prompts to read again.
    """
    count = min(prompts, len(reading.encoded))
    alone = Reading(
        reading.encoded[:count],
        reading.ranges[:count],
        reading.sites,
        reading.position,
        reading.width,
        batch_tokens=1,
    ).run(model, "base")
    found = {}
    for site in reading.sites:
        noise = alone[site].double() - states.rows(site, 0, alone.n).double()
        found[site] = NoiseFloor(
            rms=float(noise.square().sum(1).mean().sqrt()),
            mean_norm=float(noise.mean(0).norm()),
        )
    return found
