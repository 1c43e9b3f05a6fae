"""Read hidden states of mlx-lm models: every site in one pass, right-padded, without a mask."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from dsteer.activations.batching import Batch, default_budget, pad_right, plan_batches
from dsteer.activations.extract import PairedActivations
from dsteer.activations.reading import row_offsets
from dsteer.activations.sites import FINAL_NORM, MEANS, RESPONSES, resolve_sites, token_ranges
from dsteer.activations.storage import MemorySink, States
from dsteer.data.tokens import Encoded
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import MeasurementError, ModelError
from dsteer.mlx.anatomy import Anatomy, Module, around, state_in
from dsteer.mlx.load import Tokenizer, encode_prompts, load
from dsteer.progress import SILENT, Reporter

# A row must give the same states alone and with tokens behind it, up to rounding: float32's where
# weights are kept in it, else half precision's. A model that sees padding misses it by far.
_PADDING_ERROR = {mx.float32: 1e-4}
_PADDING_ERROR_LOW_PRECISION = 5e-2
_PROBE_TOKENS = 16


def read(
    model: Module,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    *,
    tokenizer: Tokenizer | None = None,
    sites: str | Sequence[str] = "all",
    position: str = "prompt_last",
    template: str = "none",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> States:
    """Read one model's states: site → float32 (N, d), on the CPU, rows in prompt order.

    Args:
        model: what :func:`dsteer.mlx.load` returns.
        prompts: texts, message lists, pairs, or ids, as of :func:`dsteer.extract`.
        tokenizer: not needed for ids.
        sites: ``all``, or names.
        position: which tokens, see :func:`dsteer.activations.sites.token_ranges`.
        template: ``chat`` puts texts through the chat template too.
        batch_tokens: tokens a batch, padding included; default: what suits the device.
        max_tokens: longer prompts are cut on the left.
        reporter: shows progress.

    Raises:
        ConfigError: unknown site or position.
        DataError: no prompts, or one that can't be encoded.
        ModelError: the model's states can't be read, or it lacks one of the ids.
        MeasurementError: a state is not finite.
    """
    encoded = _encode(model, prompts, tokenizer, position, template, max_tokens)
    return _read(model, encoded, sites, position, batch_tokens, "model", reporter)


def extract(
    base: Module | str | Path,
    tuned: Module | str | Path,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    *,
    tokenizer: Tokenizer | None = None,
    sites: str | Sequence[str] = "all",
    position: str = "prompt_last",
    template: str = "none",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> PairedActivations:
    """Read both models' states on identical token ids, as :func:`dsteer.extract` does.

    Args:
        base: a model that :func:`dsteer.mlx.load` returned, or a path or hub id. What is named is
            loaded when its turn comes and then released, so one model at a time is in memory.
        tuned: likewise.
        prompts: texts, message lists, pairs, or ids.
        tokenizer: default: that of a base that is given by name.
        sites, position, template, batch_tokens, max_tokens, reporter: see :func:`read`.

    Raises:
        ModelError: models of different blocks or widths; else as :func:`read`.
    """
    one, found = _open(base)
    encoded = _encode(one, prompts, tokenizer or found, position, template, max_tokens)
    shape = _shape(one)
    of_base = _read(one, encoded, sites, position, batch_tokens, "base", reporter)
    del one
    other, _ = _open(tuned)
    if _shape(other) != shape:
        raise ModelError(
            "base and tuned have {} and {} blocks, and widths {} and {}; expected a pair of one "
            "shape".format(*(n for pair in zip(shape, _shape(other), strict=True) for n in pair))
        )
    of_tuned = _read(other, encoded, sites, position, batch_tokens, "tuned", reporter)
    return PairedActivations(
        of_base,
        of_tuned,
        tuple(of_base),
        position,
        tuple(encoded),
        row_offsets(encoded, position),
    )


def _open(model: Module | str | Path) -> tuple[Module, Tokenizer | None]:
    return load(model) if isinstance(model, str | Path) else (model, None)


def _shape(model: Module) -> tuple[int, int]:
    anatomy = Anatomy.of(model)
    return anatomy.n_blocks, anatomy.width


def _encode(
    model: Module,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    tokenizer: Tokenizer | None,
    position: str,
    template: str,
    max_tokens: int | None,
) -> list[Encoded]:
    return encode_prompts(
        tokenizer,
        prompts,
        Anatomy.of(model),
        template=template,
        max_tokens=max_tokens,
        response="chosen" if position in RESPONSES else None,
    )


def _read(
    model: Module,
    encoded: Sequence[Encoded],
    sites: str | Sequence[str],
    position: str,
    batch_tokens: int | None,
    which: str,
    reporter: Reporter,
) -> States:
    anatomy = Anatomy.of(model)
    for number, item in enumerate(encoded):
        if max(item.ids) >= anatomy.vocabulary or min(item.ids) < 0:
            raise ModelError(
                f"prompt {number} has the token id {max(item.ids)}, and the {which} has only "
                f"{anatomy.vocabulary} tokens; give the tokenizer that belongs to it"
            )
    names = resolve_sites(sites, anatomy.n_blocks)
    ranges = token_ranges(encoded, position)
    offsets = row_offsets(encoded, position)
    needed = [item.ids[: span.stop] for item, span in zip(encoded, ranges, strict=True)]
    sink = MemorySink(names, offsets[-1], anatomy.width)
    with reporter.bar(f"states of {which}", len(encoded), unit="prompts") as advance:
        for number, batch in enumerate(_plan(anatomy, needed, batch_tokens)):
            rows = pad_right([needed[prompt] for prompt in batch.prompts], batch.length)
            states = capture(anatomy, mx.array(rows.numpy()), names)
            spans = [ranges[prompt] for prompt in batch.prompts]
            found = {site: _select(state, spans, position) for site, state in states.items()}
            _require_finite(found, which)
            sink.put(number, [range(*offsets[p : p + 2]) for p in batch.prompts], found)
            advance(len(batch.prompts))
    return States.hold(sink.tensors)


def capture(anatomy: Anatomy, ids: mx.array, sites: Sequence[str]) -> dict[str, mx.array]:
    """States (B, T, d) of each site from one pass over ids (B, T), in the model's dtype."""
    states: dict[str, mx.array] = {}

    def catch(site: str) -> Any:
        def do(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if site in states:
                raise ModelError(f"{site}: its module ran twice in one pass; expected once")
            states[site] = state_in(output)
            return output

        return do

    with contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(around(anatomy.site(site), catch(site)))
        anatomy.decoder(ids)
    silent = [site for site in sites if site not in states]
    if silent:
        raise ModelError(f"{silent[0]}: its module did not run; expected every block to run once")
    return {site: states[site] for site in sites}


def to_torch(array: mx.array) -> torch.Tensor:
    """A float32 tensor on the CPU. numpy has no bfloat16."""
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def _select(state: mx.array, spans: Sequence[range], position: str) -> torch.Tensor:
    """The wanted rows, or means over tokens, in float32."""
    if position not in MEANS:
        rows = mx.array([row for row, span in enumerate(spans) for _ in span])
        columns = mx.array([token for span in spans for token in span])
        return to_torch(state[rows, columns])
    weights = np.zeros((len(spans), 1, state.shape[1]), dtype=np.float32)
    for row, span in enumerate(spans):
        weights[row, 0, span.start : span.stop] = 1 / len(span)
    return to_torch((mx.array(weights) @ state.astype(mx.float32))[:, 0])


def _plan(
    anatomy: Anatomy, needed: Sequence[Sequence[int]], batch_tokens: int | None
) -> list[Batch]:
    """Batches; padded ones only where the model can't see padding."""
    device = torch.device("cpu" if mx.default_device() == mx.cpu else "mps")
    budget = batch_tokens or default_budget(device)
    lengths = [len(ids) for ids in needed]
    batches = plan_batches(lengths, budget)
    pads = any(lengths[batch.prompts[-1]] < batch.length for batch in batches)
    if pads and not _padding_is_unseen(anatomy, max(needed, key=len)):
        return plan_batches(lengths, budget, pad=False)
    return batches


def _padding_is_unseen(anatomy: Anatomy, longest: Sequence[int]) -> bool:
    """Whether tokens on the right of a prompt leave its final_norm states as they are."""
    length = min(_PROBE_TOKENS, (len(longest) + 1) // 2)

    def last(ids: Sequence[int]) -> tuple[mx.array, mx.Dtype]:
        state = capture(anatomy, mx.array([list(ids)]), [FINAL_NORM])[FINAL_NORM]
        return state[0, length - 1].astype(mx.float32), state.dtype

    alone, dtype = last(longest[:length])
    followed, _ = last(longest[: 2 * length])
    bound = _PADDING_ERROR.get(dtype, _PADDING_ERROR_LOW_PRECISION)
    return float(mx.linalg.norm(followed - alone)) <= bound * float(mx.linalg.norm(alone))


def _require_finite(states: Mapping[str, torch.Tensor], which: str) -> None:
    for site, tensor in states.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MeasurementError(
                f"{site} of the {which} holds states that are not finite; the weights are broken "
                "or overflow; check the model, or convert it in bfloat16 or float32"
            )
