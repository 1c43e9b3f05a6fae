"""Steering vectors learned under the DPO loss: the model is frozen, the vectors are its parameters.

With π_v the model that has v added to its states and π_ref the model as it is, a pair's loss is
−ln σ(β[(ln π_v(y_w|x) − ln π_v(y_l|x)) − (ln π_ref(y_w|x) − ln π_ref(y_l|x))]), ln 2 at v = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsteer.activations.capture import site_module
from dsteer.activations.inputs import Inputs, decoder_shift
from dsteer.activations.sites import ENCODER, component_of, resolve_sites
from dsteer.behaviour.teacher_forced import preference_match
from dsteer.data.tokens import Encoded, Tokenizer, hash_ids
from dsteer.data.types import PreferencePair
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError
from dsteer.geometry.intervals import Interval, bootstrap_mean, wilson
from dsteer.models.anatomy import Anatomy, model_name, text_config
from dsteer.models.load import Model, refuse_overflow
from dsteer.progress import SILENT, Reporter
from dsteer.steering.intervene import Intervention, Placement, Positions, operate
from dsteer.steering.provenance import of_model, require_fit
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_json, read_metadata, read_tensors, write_tensors
from dsteer.training.evaluate import (
    Continuation,
    batches,
    pair_likelihoods,
    reward_margins,
)
from dsteer.training.examples import Example, answered, encode_pairs, fitting
from dsteer.training.gradients import frozen

METHOD = "learned under the DPO loss"
"""What a learned set's metadata calls its method."""


def learn_vector(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Sequence[PreferencePair],
    *,
    sites: str | Sequence[str],
    heldout: Sequence[PreferencePair] = (),
    start: Literal["zero"] | SteeringVectorSet = "zero",
    beta: float = 0.1,
    steps: int = 100,
    batch_size: int = 16,
    learning_rate: float = 0.1,
    max_norm: float | Mapping[str, float] | None = None,
    positions: Positions = "all",
    eval_every: int = 10,
    max_length: int = 512,
    seed: int = 0,
    checkpoint: Path | None = None,
    reporter: Reporter = SILENT,
    label: str = "learning a vector",
) -> SteeringVectorSet:
    """Learn one vector a site, all of them together, that make the preferred answers likelier.

    Adam descends along the vectors alone; its step size falls to 0 as half a cosine. With held-out
    pairs the vectors are those of the step with the least loss on them (step 0, the start,
    included; of equals the earliest), else those of the last step. The model's weights and flags
    are left as they were.

    Args:
        model: the policy, as it is loaded; it is the reference too.
        tokenizer: its own, with EOS.
        pairs: what is learned from; pairs without two answers are passed over.
        sites: where vectors are added: ``resid_post.{k}``, ``final_norm``, ``attn_out.{k}`` …
        heldout: pairs on which the step is chosen.
        start: ``zero``, or a set with a vector at each of the sites.
        beta: β of the loss.
        steps: updates.
        batch_size: pairs an update.
        learning_rate: how far an update can move a vector, as a share of the root mean square norm
            of the model's own states at its site, so that one value suits any model.
        max_norm: the largest ‖v‖, of all sites or by site: after each update a longer vector is
            scaled back to it. None: no bound.
        positions: the tokens that are steered.
        eval_every: updates between two readings of the held-out loss.
        max_length: tokens of a text: longer prompts are left out, answers lose their end.
        seed: of the order of pairs.
        checkpoint: a file in which the state is kept at each reading; learning that was cut off
            goes on from it and ends with the same bytes.
        reporter: shows progress.
        label: what progress is called.

    Returns:
        One vector a site. Metadata: ``method``, the model's, ``position`` (the steered tokens), all
        settings, ``data_sha256``, ``chosen_step``, and ``curve``: at each reading ``step``,
        ``loss`` (mean since the reading before), ``heldout`` (loss, accuracy with ties as ½,
        margin) and ``norm`` by site.

    Raises:
        ConfigError: a setting out of range, an unknown site, a start without a vector at a site.
        DataError: no pair to learn from.
        ModelError: a model that can't be steered, or a start of another one.
        MeasurementError: the loss is no longer finite.
    """
    anatomy = Anatomy.of(model)
    refuse_overflow(model.config, anatomy.dtype, model_name(model))
    named = resolve_sites(sites, anatomy.n_blocks, encoder=anatomy.encoder is not None)
    _check(beta=beta, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
           eval_every=eval_every, max_length=max_length)  # fmt: skip
    for site in named:
        Intervention(site, torch.zeros(anatomy.width), positions=positions)  # checks these
    bounds = _bounds(max_norm, named)
    limit = _limit(max_length, anatomy)
    split = {
        name: fitting(
            encode_pairs(answered(some), tokenizer, encoder_decoder=anatomy.encoder is not None),
            limit,
        )
        for name, some in (("pairs", pairs), ("heldout", heldout))
    }
    examples, held = split["pairs"], split["heldout"]
    if not any(example.chosen != example.rejected for example in examples):
        raise DataError(
            f"{len(pairs)} pairs, of which none has two different answers within {limit} tokens: "
            "there is nothing to learn from; give pairs with answers, or a larger max_length"
        )
    if heldout and not held:
        raise DataError(
            f"{len(heldout)} held-out pairs, of which none has two answers and fits into {limit} "
            "tokens; give others, or none at all"
        )
    begin = _start(start, named, model, anatomy)
    settings: dict[str, Json] = {
        "method": METHOD,
        **of_model(model),
        "position": list(positions) if isinstance(positions, tuple) else positions,
        "component": {site: component_of(site) or "residual" for site in named},
        "start": "zero" if isinstance(start, str) else start.metadata.get("method", "a set"),
        "loss": "sigmoid",
        "beta": beta,
        "steps": steps,
        "batch_size": min(batch_size, len(examples)),
        "learning_rate": learning_rate,
        "max_norm": bounds or None,
        "eval_every": eval_every,
        "max_length": limit,
        "seed": seed,
        "pairs": len(examples),
        "heldout_pairs": len(held),
        "data_sha256": _hash(examples),
        "heldout_sha256": _hash(held) if held else None,
        "units": "the model's own states; added as they are (strength 1)",
    }
    with (
        frozen(model),
        torch.enable_grad(),  # a caller may have switched it off
        _Policy(model, anatomy, begin, positions) as policy,
    ):
        learner = _Learner(policy, examples, held, bounds, settings, checkpoint)
        found = learner.run(reporter, label)
    return SteeringVectorSet(
        [
            SteeringVector(
                found.best[site].double(),
                site,
                n=len(examples),
                norm=float(found.best[site].double().norm()),
                start_norm=float(begin[site].double().norm()),
            )
            for site in named
        ],
        {**settings, "chosen_step": found.best_step, "curve": found.curve},
    )


@dataclass(frozen=True)
class Reward:
    """The implicit reward of held-out pairs.

    Attributes:
        margin: mean r(chosen) − r(rejected); bootstrap over conversations.
        accuracy: share of margins above 0, a tie ½; Wilson's, one trial a conversation.
    """

    margin: Interval
    accuracy: Interval


def reward(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Sequence[PreferencePair],
    policy: SteeringVectorSet | Model,
    *,
    beta: float = 0.1,
    positions: Positions = "all",
    max_length: int = 512,
    seed: int = 0,
) -> Reward:
    """Measure r = β [ln π(y|x) − ln π_ref(y|x)] of pairs, π_ref being the model as it is.

    Args:
        model: the reference.
        tokenizer: its own, with EOS.
        pairs: those without two answers are passed over.
        policy: vectors, all added to the model at strength 1, or another model, such as the tuned.
        beta: β.
        positions: the tokens that vectors steer.
        max_length: as :func:`learn_vector`.
        seed: of the bootstrap.

    Raises:
        DataError: no pair with two answers fits.
        ModelError: vectors of another model.
    """
    anatomy = Anatomy.of(model)
    limit = _limit(max_length, anatomy)
    whole = answered(pairs)
    encoder_decoder = anatomy.encoder is not None
    examples = fitting(encode_pairs(whole, tokenizer, encoder_decoder=encoder_decoder), limit)
    if not examples:
        raise DataError(
            f"{len(pairs)} pairs, of which none has two answers and fits into {limit} tokens; give "
            "others, or a larger max_length"
        )
    rows = range(len(examples))
    if isinstance(policy, SteeringVectorSet):
        require_fit(policy, model)
        added = {site: vector.tensor for site, vector in policy.items()}
        margins = torch.zeros(len(examples), dtype=torch.float64)
        with frozen(model), _Policy(model, anatomy, added, positions) as steered, torch.no_grad():
            reference = steered.reference(examples)
            for part, some in steered.margins(examples, rows, reference):
                margins[some] = part.cpu()
    else:
        with frozen(model), frozen(policy):
            ours, theirs = (pair_likelihoods(one, examples) for one in (model, policy))
        margins = reward_margins(theirs, ours, 1.0)
    margins = beta * margins
    keys = [example.conversation or str(row) for row, example in enumerate(examples)]
    margin = bootstrap_mean(margins, keys, seed=seed)
    assert margin is not None
    right = float(preference_match(margins).sum())
    return Reward(margin, wilson(right, len(examples), len(set(keys))))


@dataclass
class _Found:
    """How far learning is.

    Attributes:
        step: updates made.
        best: the vectors of least held-out loss so far.
        best_step: their step.
        curve: the readings.
    """

    step: int
    best: dict[str, Tensor]
    best_step: int
    curve: list[dict[str, Json]]

    @property
    def best_loss(self) -> float:
        """The held-out loss of the best vectors."""
        row = next(row for row in self.curve if row["step"] == self.best_step)
        return float(row["heldout"]["loss"])


class _Learner:
    """Adam on the policy's vectors, the readings, and the file to go on from."""

    def __init__(
        self,
        policy: _Policy,
        examples: Sequence[Example],
        held: Sequence[Example],
        bounds: Mapping[str, float],
        settings: Mapping[str, Json],
        checkpoint: Path | None,
    ) -> None:
        self._policy, self._examples, self._held = policy, examples, held
        self._bounds, self._settings, self._checkpoint = bounds, settings, checkpoint
        # Start and settings: a file of other ones is passed over.
        begin = {site: vector.tolist() for site, vector in policy.vectors.items()}
        self._fingerprint = hash_json([dict(settings), begin])
        size, rng = settings["batch_size"], np.random.default_rng(settings["seed"])
        rounds = -(-settings["steps"] * size // len(examples))
        self._order = np.concatenate([rng.permutation(len(examples)) for _ in range(rounds)])
        self._size = size
        rates = policy.state_norms(examples[:size])
        width = next(iter(policy.vectors.values())).numel()
        self._rates = {
            site: settings["learning_rate"] * norm / math.sqrt(width)
            for site, norm in rates.items()
        }
        self._adam = torch.optim.Adam([{"params": [v]} for v in policy.vectors.values()])
        self._reference = [policy.reference(some) for some in (examples, held)]

    def run(self, reporter: Reporter, label: str) -> _Found:
        """Learn to the end, from where an earlier run was cut off."""
        steps, every = self._settings["steps"], self._settings["eval_every"]
        found = self._resume()
        losses: list[float] = []
        if found is None:
            self._project()
            found = _Found(0, self._policy.copies(), 0, [])
            self._read(found, losses)
        with reporter.bar(label, steps, unit="steps", done=found.step) as advance:
            while found.step < steps:
                losses.append(self._update(found.step))
                found.step += 1
                if found.step % every == 0 or found.step == steps:
                    self._read(found, losses)
                    self._save(found)
                    losses = []
                advance(1)
        return found

    def _update(self, step: int) -> float:
        """One step of Adam; the loss of its batch before it."""
        taken = self._order[step * self._size : (step + 1) * self._size].tolist()
        share = (1 + math.cos(math.pi * step / self._settings["steps"])) / 2
        for group, rate in zip(self._adam.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * share
        self._adam.zero_grad()
        total = 0.0
        for margins, rows in self._policy.margins(self._examples, taken, self._reference[0]):
            part = -nn.functional.logsigmoid(self._settings["beta"] * margins).sum() / len(taken)
            part.backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
            del margins, rows, part
        gradients = [v.grad for v in self._policy.vectors.values() if v.grad is not None]
        if not (math.isfinite(total) and all(bool(g.isfinite().all()) for g in gradients)):
            raise MeasurementError(
                f"step {step}: the loss or its gradient is not finite (loss {total}); lower "
                "learning_rate, or read the model in float32"
            )
        self._adam.step()
        self._project()
        return total

    def _project(self) -> None:
        """Scale vectors that are longer than their bound back to it."""
        with torch.no_grad():
            for site, bound in self._bounds.items():
                vector = self._policy.vectors[site]
                norm = float(vector.norm())
                if norm > bound:
                    vector.mul_(bound / norm)

    def _read(self, found: _Found, losses: Sequence[float]) -> None:
        """Put a point on the curve, and keep the vectors if they are the best."""
        heldout: dict[str, float] | None = None
        if self._held:
            margins = torch.zeros(len(self._held), dtype=torch.float64)
            with torch.no_grad():
                everything = range(len(self._held))
                for part, rows in self._policy.margins(self._held, everything, self._reference[1]):
                    margins[rows] = self._settings["beta"] * part.cpu()
            heldout = {
                "loss": float(-nn.functional.logsigmoid(margins).mean()),
                "accuracy": float(preference_match(margins).mean()),
                "margin": float(margins.mean()),
            }
        vectors = self._policy.copies()
        first = not found.curve
        better = heldout is None or first or heldout["loss"] < found.best_loss
        found.curve.append(
            {
                "step": found.step,
                "loss": sum(losses) / len(losses) if losses else None,
                "heldout": heldout,
                "norm": {site: float(v.double().norm()) for site, v in vectors.items()},
            }
        )
        if better:
            found.best, found.best_step = vectors, found.step

    # ------------------------------------------------------------------ going on

    def _save(self, found: _Found) -> None:
        if self._checkpoint is None:
            return
        tensors: dict[str, np.ndarray] = {}
        for site, vector in self._policy.vectors.items():
            state = self._adam.state[vector]
            kept = {"vector": vector.detach(), "best": found.best[site]}
            kept |= {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            tensors |= {f"{site}/{name}": tensor.numpy() for name, tensor in kept.items()}
        write_tensors(
            self._checkpoint,
            tensors,
            {
                "of": self._fingerprint,
                "step": found.step,
                "best_step": found.best_step,
                "curve": found.curve,
            },
        )

    def _resume(self) -> _Found | None:
        """What the file holds, if it is of the same learning; sets vectors and Adam to it."""
        if self._checkpoint is None or not self._checkpoint.is_file():
            return None
        kept, metadata = read_tensors(self._checkpoint), read_metadata(self._checkpoint)
        if metadata.get("of") != self._fingerprint:
            return None
        best = {}
        for site, vector in self._policy.vectors.items():
            with torch.no_grad():
                vector.copy_(torch.from_numpy(kept[f"{site}/vector"]))
            self._adam.state[vector] = {
                "step": torch.tensor(float(metadata["step"])),
                **{
                    name: torch.from_numpy(kept[f"{site}/{name}"])
                    for name in ("exp_avg", "exp_avg_sq")
                },
            }
            best[site] = torch.from_numpy(kept[f"{site}/best"])
        return _Found(metadata["step"], best, metadata["best_step"], metadata["curve"])


class _Policy:
    """π_v: hooks that add vectors to a model's states, as steering does, and let gradients through.

    Attributes:
        vectors: v a site, in the dtype of the arithmetic on states, on the CPU.
    """

    def __init__(
        self,
        model: Model,
        anatomy: Anatomy,
        begin: Mapping[str, Tensor],
        positions: Positions,
    ) -> None:
        self._model, self._anatomy, self._positions = model, anatomy, positions
        dtype = torch.float64 if anatomy.dtype == torch.float64 else torch.float32
        self.vectors = {
            site: nn.Parameter(vector.to(dtype, copy=True)) for site, vector in begin.items()
        }
        self._modules = {site: site_module(anatomy, site) for site in begin}
        self._handles: list[RemovableHandle] = []
        self._placements: dict[bool, Placement] = {}  # of the encoder: True
        self._ran: set[str] = set()
        self._squares: dict[str, list[float]] | None = None

    def __enter__(self) -> _Policy:
        for site, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(site)))
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def copies(self) -> dict[str, Tensor]:
        """The vectors as they are now."""
        return {site: vector.detach().clone() for site, vector in self.vectors.items()}

    def reference(self, examples: Sequence[Example]) -> Float[Tensor, " n"]:
        """ln π_ref(y_w|x) − ln π_ref(y_l|x) of each pair, float64."""
        self._placements = {}
        both = pair_likelihoods(cast(PreTrainedModel, self._model), examples)
        return both.chosen - both.rejected

    def state_norms(self, examples: Sequence[Example]) -> dict[str, float]:
        """Root mean square norm of the model's own states at each site, of the steered tokens.

        Raises:
            ModelError: no token of these texts is steered.
        """
        self._squares = {site: [0.0, 0.0] for site in self.vectors}
        with torch.no_grad():
            for _ in self.margins(examples, range(len(examples)), torch.zeros(len(examples))):
                pass
        found, self._squares = self._squares, None
        for site, (_, count) in found.items():
            if not count:
                raise ModelError(
                    f"positions {self._positions}: no token of the first {len(examples)} pairs is "
                    f"steered at {site}; choose others"
                )
        return {site: math.sqrt(total / count) for site, (total, count) in found.items()}

    def margins(
        self, examples: Sequence[Example], rows: Sequence[int], reference: Float[Tensor, " n"]
    ) -> Iterable[tuple[Float[Tensor, " m"], list[int]]]:
        """The log-likelihood margins of some pairs less the reference's, some at a time.

        Yields:
            (ln π_v(y_w|x) − ln π_v(y_l|x)) − (ln π_ref(y_w|x) − ln π_ref(y_l|x)), float64, and
            which of the examples they are of.
        """
        longest = [
            Continuation(examples[row].prompt, max(examples[row].chosen, examples[row].rejected,
                                                   key=len))
            for row in rows
        ]  # fmt: skip
        vocabulary = int(text_config(self._model.config).vocab_size)
        for batch in batches(longest, 2 * vocabulary):
            taken = [rows[index] for index in batch]
            gaps = self._gaps([examples[row] for row in taken])
            yield gaps - reference[torch.tensor(taken)].to(gaps.device), taken

    def _gaps(self, examples: Sequence[Example]) -> Float[Tensor, " n"]:
        """ln π_v(y_w|x) − ln π_v(y_l|x) of pairs, in one pass."""
        start = self._anatomy.start
        rows = [
            Encoded(example.prompt + answer, len(example.prompt))
            for example in examples
            for answer in (example.chosen, example.rejected)
        ]
        inputs = Inputs.of(rows, start)
        shifts = [decoder_shift(row, start) for row in rows]
        self._place(rows, shifts, inputs)
        logits = self._model(**inputs.arguments(self._anatomy.device), use_cache=False).logits
        silent = sorted(set(self.vectors) - self._ran)
        if silent:
            raise ModelError(
                f"{silent[0]}: its module was not called as one, so it can't be steered; load the "
                "model without fused kernels"
            )
        logits = logits.cpu() if logits.device.type == "mps" else logits
        row: list[int] = []
        column: list[int] = []
        token: list[int] = []
        for number, (item, shift) in enumerate(zip(rows, shifts, strict=True)):
            answer = item.ids[item.prompt_length :]
            first = item.prompt_length + shift - 1
            row += [number] * len(answer)
            column += range(first, first + len(answer))
            token += answer
        of_row = torch.tensor(row, device=logits.device)
        predicting = logits[of_row, torch.tensor(column, device=logits.device)]
        targets = torch.tensor(token, device=logits.device)
        log_p = predicting.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(len(rows), dtype=torch.float64, device=logits.device)
        both = sums.index_add(0, of_row, log_p).view(-1, 2)
        return both[:, 0] - both[:, 1]

    def _place(self, rows: Sequence[Encoded], shifts: Sequence[int], inputs: Inputs) -> None:
        """Say where the tokens of the coming pass stand."""
        self._ran.clear()
        column = torch.arange(inputs.ids.shape[1])
        ends = torch.tensor([len(row.ids) + shift for row, shift in zip(rows, shifts, strict=True)])
        prompts = torch.tensor(
            [row.prompt_length + shift for row, shift in zip(rows, shifts, strict=True)]
        )
        self._placements[False] = Placement(
            torch.where(column < ends[:, None], column, -1), prompts
        )
        if inputs.encoder_mask is not None:
            read = Placement.of_mask(inputs.encoder_mask)
            self._placements[True] = replace(read, prompt_lengths=read.index.amax(dim=1) + 1)

    def _hook(self, site: str) -> Any:
        vector, one = self.vectors[site], torch.ones(1, 1)

        def hook(_module: nn.Module, _inputs: object, output: object) -> object:
            placement = self._placements.get(site == ENCODER)
            if placement is None:  # the reference, as it is
                return output
            state = Anatomy.read(output)
            selected = placement.mask(self._positions).to(state.device)
            self._ran.add(site)
            if self._squares is not None:
                chosen = state.detach()[selected].double().square().sum()
                self._squares[site][0] += float(chosen)
                self._squares[site][1] += int(selected.sum())
                return output
            return Anatomy.write(output, operate(state, "add", vector[None], one, selected))

        return hook


# ---------------------------------------------------------------------------------- small parts


def _check(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}: expected a finite number above 0")


def _limit(max_length: int, anatomy: Anatomy) -> int:
    """The longest text that is read: no longer than the model was made for."""
    return min(max_length, anatomy.max_positions or max_length)


def _bounds(max_norm: float | Mapping[str, float] | None, sites: Sequence[str]) -> dict[str, float]:
    """The largest norm at each site that has a bound."""
    if max_norm is None:
        return {}
    found = dict(max_norm) if isinstance(max_norm, Mapping) else dict.fromkeys(sites, max_norm)
    strange = sorted(set(found) - set(sites))
    if strange:
        raise ConfigError(
            f"max_norm at {strange[0]}: nothing is learned there; expected {', '.join(sites)}"
        )
    for site, bound in found.items():
        _check(**{f"max_norm at {site}": bound})
    return {site: float(bound) for site, bound in found.items()}


def _start(
    start: Literal["zero"] | SteeringVectorSet,
    sites: Sequence[str],
    model: Model,
    anatomy: Anatomy,
) -> dict[str, Tensor]:
    """The vectors that learning begins with, float64."""
    if isinstance(start, str):
        if start != "zero":
            raise ConfigError(f"start {start!r}: expected 'zero' or a SteeringVectorSet")
        return {site: torch.zeros(anatomy.width, dtype=torch.float64) for site in sites}
    require_fit(start, model)
    missing = [site for site in sites if site not in start]
    if missing:
        raise ConfigError(
            f"start: the set holds no vector at {missing[0]}, where one is learned; it has "
            f"{', '.join(start)}"
        )
    return {site: start[site].tensor for site in sites}


def _hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the ids of all texts."""
    return hash_ids(
        [
            Encoded(example.prompt + answer, len(example.prompt))
            for example in examples
            for answer in (example.chosen, example.rejected)
        ]
    )
