"""Read one model's hidden states over prompts: every site in one pass."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dsteer import __version__
from dsteer.activations.batching import Batch, default_budget, pad_right, plan_batches
from dsteer.activations.capture import Capture, Select, select_means, select_tokens
from dsteer.activations.inputs import Inputs, decoder_shift, plan_rows
from dsteer.activations.sites import (
    ENCODER,
    FINAL_NORM,
    MEANS,
    Stack,
    resolve_sites,
    sites_of_stacks,
    token_ranges,
)
from dsteer.activations.storage import FileSink, MemorySink, States
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.errors import DataError, MeasurementError, ModelError
from dsteer.models.adapters import weights_in_use
from dsteer.models.anatomy import Anatomy, evaluating, text_config
from dsteer.models.load import Model, quiet
from dsteer.models.placement import is_dispatched, present
from dsteer.parallel import ALONE, Ranks
from dsteer.progress import SILENT, Advance, Reporter
from dsteer.store import Json, hash_json

# A row must give the same states alone and with tokens behind it, up to rounding. A model in which
# a real token sees padding misses this by orders of magnitude.
_PADDING_ERROR = {torch.float32: 1e-4}
_PADDING_ERROR_LOW_PRECISION = 5e-2
_PROBE_TOKENS = 16

_MOST_WORKERS = 8  # more would wait for Python's lock


@runtime_checkable
class Shape(Protocol):
    """What is known of the models that read: a :class:`dsteer.ModelPair`, or one model's."""

    @property
    def width(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
    @property
    def encoder_decoder(self) -> bool: ...


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
        stack: of an encoder-decoder model, whose tokens the position ``all`` means.
    """

    encoded: Sequence[Encoded]
    ranges: Sequence[range]
    sites: tuple[str, ...]
    position: str
    width: int
    batch_tokens: int | None
    stack: Stack | None = None

    @classmethod
    def of(
        cls,
        pair: Shape,
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
        stack: Stack | None = None
        resolved = resolve_sites(sites, pair.n_blocks, encoder=pair.encoder_decoder)
        if pair.encoder_decoder:
            resolved, stack = sites_of_stacks(resolved, position, named=sites != "all")
        return cls(
            encoded,
            token_ranges(encoded, position, stack),
            resolved,
            position,
            pair.width,
            batch_tokens,
            stack,
        )

    @property
    def offsets(self) -> tuple[int, ...]:
        """Rows of prompt i are offsets[i] … offsets[i+1] − 1."""
        return row_offsets(self.encoded, self.position, self.stack)

    @property
    def needed(self) -> list[tuple[int, ...]]:
        """The ids that have to be run: nothing behind the last token that is read."""
        return [
            item.ids[: tokens.stop] for item, tokens in zip(self.encoded, self.ranges, strict=True)
        ]

    @property
    def rows(self) -> list[Encoded]:
        """The same with the lengths of the prompts, all of which are needed by an encoder."""
        return [
            Encoded(ids, min(item.prompt_length, len(ids)))
            for item, ids in zip(self.encoded, self.needed, strict=True)
        ]

    def run(
        self,
        model: Model,
        which: str,
        path: Path | None = None,
        reporter: Reporter = SILENT,
        ranks: Ranks = ALONE,
    ) -> States:
        """Read one model, into memory or into a file.

        Several processes read into one file: each the same batches as one alone would, but only its
        share of them, so the file is the same to the byte.

        Raises:
            ModelError: the model's states can't be read, or processes don't read the same model.
            MeasurementError: a state is not finite.
            StoreError: the file can't be written.
        """
        anatomy = Anatomy.of(model)
        with evaluating(model), quiet():
            batches = self._plan(model, anatomy, ranks)
        offsets = self.offsets
        label, total = f"states of {which}", len(self.encoded)
        if path is None:
            assert ranks.world == 1, "only a file can be shared"
            with reporter.bar(label, total, unit="prompts") as advance:
                return self.read(model, which, batches, advance)
        metadata: dict[str, Json] = {
            "dsteer": __version__,
            "dtype": str(anatomy.dtype).removeprefix("torch."),
            "ids_sha256": hash_ids(self.encoded),
            "position": self.position,
            "weights_sample": sample_weights(model),
        }
        if anatomy.start is not None:
            metadata |= {"stack": self.stack, "decoder_start": list(anatomy.start)}
        metadata["plan"] = hash_json(
            [metadata, self.sites, offsets[-1], self.width, [batch.prompts for batch in batches]]
        )
        # Somebody's hooks may change the states, and what is on disk does not tell by how much.
        resume = not has_foreign_hooks(model)
        require_agreement(metadata["plan"], f"{which} model", ranks)
        with FileSink(
            path, self.sites, offsets[-1], self.width, metadata, resume=resume, ranks=ranks
        ) as file:
            if not file.complete:
                left = [number for number in range(len(batches)) if number not in file.done]
                own = ranks.share(left)
                done = total - sum(len(batches[number].prompts) for number in left)
                if ranks.world > 1:
                    label += f", this process's share of {ranks.world}"
                    total = done + sum(len(batches[number].prompts) for number in own)
                with reporter.bar(label, total, unit="prompts", done=done) as advance:
                    self._fill(model, anatomy, which, batches, own, file, advance, ranks)
            file.finish()
        return States.open(path)

    def read(
        self,
        model: Model,
        which: str,
        batches: Sequence[Batch],
        advance: Advance,
        *,
        ranks: Ranks = ALONE,
        of: int | None = None,
    ) -> States:
        """Read given batches into memory.

        Args:
            model: the model.
            which: its name.
            batches: all prompts of this reading, each once.
            advance: called with the number of prompts just read.
            ranks: the processes that do other parts of the work.
            of: how many batches the whole work has that these are a part of; default: these.

        Raises:
            ModelError, MeasurementError: as :meth:`run`.
        """
        sink = MemorySink(self.sites, self.offsets[-1], self.width)
        numbers = range(len(batches))
        self._fill(model, Anatomy.of(model), which, batches, numbers, sink, advance, ranks, of)
        return States.hold(sink.tensors)

    def _plan(self, model: Model, anatomy: Anatomy, ranks: Ranks) -> list[Batch]:
        needed = self.needed
        lengths = [len(ids) for ids in needed]
        if anatomy.encoder is not None:
            budget = self.batch_tokens or default_budget(anatomy.device)
            pad = ranks.broadcast(rows_read_alike(anatomy, self.rows))
            return plan_rows(self.rows, budget, pad=pad)
        longest = max(needed, key=len)
        return plan_reading(model, anatomy, lengths, longest, self.batch_tokens, ranks)

    def _fill(
        self,
        model: Model,
        anatomy: Anatomy,
        which: str,
        batches: Sequence[Batch],
        numbers: Sequence[int],
        sink: MemorySink | FileSink,
        advance: Advance,
        ranks: Ranks,
        of: int | None = None,
    ) -> None:
        """Read the batches of these numbers."""
        needed, offsets = self.rows, self.offsets
        workers = workers_for(model, anatomy)
        keeping = threading.Lock()

        def read(number: int) -> None:
            ranks.check()
            batch = batches[number]
            inputs = Inputs.of([needed[prompt] for prompt in batch.prompts], anatomy.start)
            states = capture.read(inputs, *self._selects(batch, inputs, anatomy))
            _require_finite(states, which, anatomy.dtype)
            with keeping:
                sink.put(number, [range(*offsets[p : p + 2]) for p in batch.prompts], states)
                advance(len(batch.prompts))

        with (
            evaluating(model),
            quiet(),
            Capture(anatomy, self.sites) as capture,
        ):
            # Workers by all batches, not by those left: a resumed reading runs on as it began.
            _each(read, numbers, min(workers, of or len(batches)))

    def _selects(
        self, batch: Batch, inputs: Inputs, anatomy: Anatomy
    ) -> tuple[Select, Select | None]:
        """What is copied of the decoder's states, and of the encoder's where that is a site."""
        ranges = [self.ranges[prompt] for prompt in batch.prompts]
        encoder = None
        if ENCODER in self.sites and inputs.encoder_ids is not None:
            encoder = self._select(ranges, inputs.encoder_ids.shape[1])
            if len(self.sites) == 1:
                return encoder, encoder
        shifts = [decoder_shift(self.encoded[p], anatomy.start) for p in batch.prompts]
        shifted = [
            range(tokens.start + shift, tokens.stop + shift)
            for tokens, shift in zip(ranges, shifts, strict=True)
        ]
        return self._select(shifted, inputs.ids.shape[1]), encoder

    def _select(self, ranges: Sequence[range], length: int) -> Select:
        return select_means(ranges, length) if self.position in MEANS else select_tokens(ranges)


def plan_reading(
    model: Model,
    anatomy: Anatomy,
    lengths: Sequence[int],
    longest: Sequence[int],
    batch_tokens: int | None,
    ranks: Ranks = ALONE,
) -> list[Batch]:
    """The batches in which a model reads prompts; padded ones only where it can't see padding.

    Args:
        model: the model.
        anatomy: its parts.
        lengths: tokens of each prompt.
        longest: ids of the longest prompt.
        batch_tokens: tokens a batch; None for what suits the device.
        ranks: the processes that plan this together.
    """
    budget = batch_tokens or default_budget(anatomy.device)
    batches = plan_batches(lengths, budget)
    pads = any(lengths[batch.prompts[-1]] < batch.length for batch in batches)
    if pads and not ranks.broadcast(padding_is_unseen(model, anatomy, [longest])):
        return plan_batches(lengths, budget, pad=False)
    return batches


def padding_is_unseen(model: Model, anatomy: Anatomy, needed: Sequence[Sequence[int]]) -> bool:
    """Whether tokens on the right of a prompt leave its states as they are.

    So it is in every causal model, but for long RoPE, which turns all rows of a batch by other
    angles as soon as the longest exceeds the length of pre-training. The claim is tested at
    final_norm on the beginning of the longest prompt, alone and with its next tokens behind it; two
    copies of it side by side tell how much is mere rounding.
    """
    longest = max(needed, key=len)
    if len(longest) > _longrope_length(model):
        return False
    length = min(_PROBE_TOKENS, (len(longest) + 1) // 2)
    one = range(length - 1, length)

    def read(*rows: Sequence[int]) -> Tensor:
        ids = pad_right(rows, len(rows[0]))
        return capture.read(ids, select_tokens([one] * len(rows)))[FINAL_NORM][0]

    with Capture(anatomy, [FINAL_NORM]) as capture:
        row = longest[:length]
        alone, followed = read(row), read(longest[: 2 * length])
        bound = _PADDING_ERROR.get(anatomy.dtype, _PADDING_ERROR_LOW_PRECISION)
        change = float((followed - alone).norm())
        if change <= bound * float(alone.norm()):
            return True
        return change < 10 * float((read(row, row) - alone).norm())


def rows_read_alike(anatomy: Anatomy, rows: Sequence[Encoded]) -> bool:
    """Whether an encoder-decoder model reads a row alike alone and beside a longer one.

    The mask hides an encoder's padding. The claim is tested at final_norm on the shortest row
    beside the longest.
    """
    short, long = min(rows, key=lambda row: len(row.ids)), max(rows, key=lambda row: len(row.ids))
    column = len(short.ids) - 1 + decoder_shift(short, anatomy.start)
    one = range(column, column + 1)

    def read(*beside: Encoded) -> Tensor:
        inputs = Inputs.of([short, *beside], anatomy.start)
        return capture.read(inputs, select_tokens([one] * (1 + len(beside))))[FINAL_NORM][0]

    with Capture(anatomy, [FINAL_NORM]) as capture:
        alone, beside = read(), read(long)
        bound = _PADDING_ERROR.get(anatomy.dtype, _PADDING_ERROR_LOW_PRECISION)
        return float((beside - alone).norm()) <= bound * float(alone.norm())


def workers_for(model: Model, anatomy: Anatomy) -> int:
    """How many batches are read at a time, each by a thread of its own.

    On a CPU one batch a core is faster than all cores on one batch: nothing waits for the slowest
    core after each operation. It needs a forward pass that changes nothing in the model, as those
    of transformers are (but for RoPE that adapts to the length); a model with code or hooks of its
    own is read by one thread.
    """
    module = type(getattr(model, "get_base_model", lambda: model)()).__module__
    own_code = not module.startswith("transformers.")
    adapts = math.isfinite(_longrope_length(model))
    if anatomy.device.type != "cpu" or own_code or adapts or has_foreign_hooks(model):
        return 1
    if is_dispatched(model) or not all(p.is_floating_point() for p in model.parameters()):
        return 1  # weights come and go, or a quantised layer keeps notes of its inputs
    return min(torch.get_num_threads(), _MOST_WORKERS)


def has_foreign_hooks(model: Model) -> bool:
    """Whether anybody but transformers itself has hooks on a model (a steering vector, say)."""
    hooks = (
        hook
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registered.values()
    )
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks
    )


def _each(work: Callable[[int], None], items: Sequence[int], workers: int) -> None:
    """Do the work for each item, in order, several at a time; the first error stops the rest."""
    if workers <= 1:
        for item in items:
            work(item)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


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
    """SHA-256 over the sum and some evenly spaced elements of every tensor: a cheap fingerprint.

    It tells models apart that differ in more than a few elements which happen to cancel. Of an
    adapter that is off nothing counts: the fingerprint is that of the base.
    """
    digest = hashlib.sha256()
    for name, (holder, own, tensor) in sorted(weights_in_use(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        with present(holder):
            value = getattr(holder, own).detach().reshape(-1)
            if value.device.type == "meta":
                continue
            if value.is_floating_point():
                digest.update(f"{float(value.sum(dtype=torch.float32))!r}".encode())
            step = max(1, len(value) // count)
            digest.update(value[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def row_offsets(
    encoded: Sequence[Encoded], position: str, stack: Stack | None = None
) -> tuple[int, ...]:
    """Rows of prompt i are offsets[i] … offsets[i+1] − 1."""
    if position in MEANS:
        return tuple(range(len(encoded) + 1))
    return (0, *accumulate(len(tokens) for tokens in token_ranges(encoded, position, stack)))


def require_agreement(plan: str, what: str, ranks: Ranks) -> None:
    """See that all processes are about to read the same.

    Raises:
        ModelError: one has another plan.
    """
    plans = ranks.exchange(plan)
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise ModelError(
                f"process {rank} has another {what} or other token ids than process 0; give all "
                "the same files and revisions, and machines of one kind"
            )


def _require_finite(states: Mapping[str, Tensor], which: str, dtype: torch.dtype) -> None:
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
        stack=reading.stack,
    ).run(model, "base")
    found = {}
    for site in reading.sites:
        noise = alone[site].double() - states.rows(site, 0, alone.n).double()
        found[site] = NoiseFloor(
            rms=float(noise.square().sum(1).mean().sqrt()),
            mean_norm=float(noise.mean(0).norm()),
        )
    return found
