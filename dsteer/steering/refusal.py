"""The direction along which a model decides to refuse, chosen on prompts that it was not fitted on.

The recipe of Arditi et al., "Refusal in language models is mediated by a single direction"
(arXiv:2406.11717): a candidate at each layer and each of the last tokens of the prompt, and of
these the one whose removal lowers refusal most, if adding it brings refusal about and removing it
leaves harmless prompts as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.sites import block_of, resid_post
from dsteer.data.tokens import Encoded, Tokenizer, hash_ids
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, ModelError
from dsteer.geometry.displacement import as_matrix
from dsteer.geometry.logits import float64
from dsteer.models.anatomy import evaluating
from dsteer.models.load import Model
from dsteer.models.readout import Readout
from dsteer.progress import SILENT, Reporter
from dsteer.steering.intervene import Intervention, steer
from dsteer.steering.provenance import of_model
from dsteer.steering.states import Shape, as_json, encode_texts, states_of
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_json

REFUSAL_WORDS = ("I", " I", "As", " As", "Sorry", " Sorry", "Unfortunately", " Unfortunately")
"""Words that a refusal begins with, where they are one token ("I can't …", "As an AI …")."""

_CHUNK = 64
"""Rows of logits that are in memory at once."""

Prompts = Sequence[Prompt | PreferencePair]


def refusal_direction(
    model: Model,
    tokenizer: Tokenizer,
    harmful: Prompts,
    harmless: Prompts,
    *,
    validation: float | tuple[Prompts, Prompts] = 0.25,
    refusal_tokens: Sequence[str | int] = REFUSAL_WORDS,
    layers: Sequence[int] | None = None,
    positions: int = 1,
    depth: float = 0.8,
    max_kl: float = 0.1,
    template: str = "none",
    seed: int = 0,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> SteeringVectorSet:
    """Find the refusal direction: mean state of harmful minus of harmless prompts, one layer's.

    The candidates r are the differences at each layer and each of the last ``positions`` tokens of
    the prompts, fitted on one part of them. On the other part, with the refusal score of a prompt
    the log-odds that its answer begins with a refusal token::

        s(x) = log P(R | x) − log(1 − P(R | x))

    each is measured by

    - ``bypass``: mean s of harmful prompts with r̂ ablated from every block's output;
    - ``induce``: mean s of harmless prompts with r added at its own layer;
    - ``kl``: mean KL(p ‖ p_ablated) of the first answer token of harmless prompts, in nats.

    Chosen is the candidate of lowest ``bypass`` among those with ``induce`` above 0, ``kl`` at most
    ``max_kl``, and a layer in the first ``depth`` of the model: later ones act on the words alone.

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer.
        harmful: prompts that it refuses; none come with dsteer.
        harmless: prompts that it answers. A prompt that stands twice in a list counts once.
        validation: the share of both lists that is left out to choose on, or two lists of their own
            for it, (harmful, harmless), which share no prompt with the others.
        refusal_tokens: what a refusal begins with: ids, or texts, of which those that are one token
            each are used.
        layers: blocks that a candidate may come from, from 0; default: all.
        positions: how many last tokens of the prompt give candidates. Several only make sense where
            all prompts end with the same tokens, as those of a chat template.
        depth: the share of layers from the first that may be chosen.
        max_kl: in nats.
        template: ``chat`` puts texts through the chat template, as a chat model expects.
        seed: of the split.
        batch_tokens: tokens a batch, padding included; default: what suits the device.
        max_tokens: longer prompts are cut on the left; at most what the model was made for.
        reporter: shows progress.

    Returns:
        The candidates of the chosen position, one a layer, in the units of the states; ``r̂`` is to
        be ablated, or r added at its site. In the metadata of each ``n_harmful``, ``n_harmless``
        (fitted on), ``norm``, ``mean_state_norm``, ``bypass``, ``induce``, ``kl`` and ``eligible``;
        in that of the set ``chosen`` (the site; None where no candidate is eligible, and then
        ``chosen_note`` says how near the nearest is), ``chosen_token`` (−1: the last of the
        prompt), ``plain`` (both mean scores without steering) and ``candidates`` (those of all
        positions). All scores are those of the prompts on which the choice was made: report others.

    Raises:
        ConfigError: a setting that is out of range, or an encoder-decoder model.
        DataError: too few prompts to fit and to choose on, or one prompt on both sides.
        ModelError: no refusal token, or a model whose states can't be read.
        MeasurementError: states that are not finite.
    """
    _check(positions, depth, max_kl)
    shape = Shape.of(model)
    if shape.encoder_decoder:
        raise ConfigError("an encoder-decoder model has no refusal direction at the prompt's end")
    tokens = _refusal_ids(tokenizer, refusal_tokens, shape.vocabulary)
    lists = _split(harmful, harmless, validation, seed)
    encoded = {
        name: encode_texts(
            model, tokenizer, prompts, template=template, max_tokens=max_tokens, what=name
        )
        for name, prompts in lists.items()
    }
    shortest = min(len(item.ids) for some in encoded.values() for item in some)
    if shortest < positions:
        raise DataError(
            f"positions {positions}: the shortest prompt has {shortest} tokens; expected as many"
        )
    blocks = range(shape.n_blocks) if layers is None else layers
    candidates = [
        candidate
        for back in range(positions)
        for candidate in _candidates(
            model,
            encoded["harmful prompts"],
            encoded["harmless prompts"],
            back,
            [resid_post(block) for block in blocks],
            batch_tokens,
            reporter,
        )
    ]
    scorer = _Scorer(
        model,
        encoded["harmful validation prompts"],
        encoded["harmless validation prompts"],
        tokens,
        batch_tokens,
    )
    measured: list[dict[str, Json]] = []
    with reporter.bar("candidates", len(candidates), unit="directions") as advance:
        for candidate in candidates:
            scores = scorer.measure(candidate)
            layer = block_of(candidate.site)
            assert layer is not None
            eligible = (
                scores["induce"] is not None
                and scores["induce"] > 0
                and scores["kl"] is not None
                and scores["kl"] <= max_kl
                and layer < depth * shape.n_blocks
            )
            measured.append(
                {"site": candidate.site, "token": candidate.token, **scores, "eligible": eligible}
            )
            advance(1)
    best = min(
        (found for found in measured if found["eligible"]),
        key=lambda found: float(found["bypass"]),  # type: ignore[arg-type]
        default=None,
    )
    token = best["token"] if best is not None else -1
    vectors = [
        SteeringVector(
            candidate.vector,
            candidate.site,
            n_harmful=len(lists["harmful prompts"]),
            n_harmless=len(lists["harmless prompts"]),
            norm=float(np.linalg.norm(candidate.vector)),
            mean_state_norm=candidate.mean_state_norm,
            **{key: found[key] for key in ("bypass", "induce", "kl", "eligible")},
        )
        for candidate, found in zip(candidates, measured, strict=True)
        if candidate.token == token
    ]
    return SteeringVectorSet(
        vectors,
        {
            "method": "refusal direction",
            **of_model(model),
            "position": f"prompt token {token} from its end",
            "component": "residual",
            "template": template,
            "chosen": None if best is None else best["site"],
            "chosen_token": None if best is None else token,
            "chosen_note": _note(best, measured, max_kl, depth, shape.n_blocks),
            "plain": {"harmful": scorer.plain_harmful, "harmless": scorer.plain_harmless},
            "candidates": measured,  # type: ignore[dict-item]
            "prompts": {name: len(prompts) for name, prompts in lists.items()},
            "refusal_tokens": tokens,  # type: ignore[dict-item]
            "max_kl": max_kl,
            "depth": depth,
            "seed": None if isinstance(validation, tuple) else seed,
            "truncated": sum(item.truncated for some in encoded.values() for item in some),
            "data_sha256": hash_json(
                {name: [as_json(one) for one in prompts] for name, prompts in lists.items()}
            ),
            "ids_sha256": hash_ids([item for some in encoded.values() for item in some]),
            "units": "states",
            "direction": "from harmless to harmful",
        },
    )


# ---------------------------------------------------------------------------------- prompts


def _check(positions: int, depth: float, max_kl: float) -> None:
    if positions < 1:
        raise ConfigError(f"positions {positions}: expected at least 1")
    if not 0 < depth <= 1:
        raise ConfigError(f"depth {depth}: expected a share of the layers above 0, at most 1")
    if not max_kl > 0:
        raise ConfigError(f"max_kl {max_kl}: expected nats above 0")


def _refusal_ids(tokenizer: Tokenizer, given: Sequence[str | int], vocabulary: int) -> list[int]:
    found: set[int] = set()
    for one in given:
        ids = (
            [one] if isinstance(one, int) else tokenizer(one, add_special_tokens=False)["input_ids"]
        )
        if len(ids) == 1 and 0 <= ids[0] < vocabulary:
            found.add(int(ids[0]))
        elif isinstance(one, int):
            raise ModelError(f"refusal token {one}: the model has the ids 0 to {vocabulary - 1}")
    if not found:
        raise ModelError(
            f"none of the refusal tokens {list(given)} is one token of this tokenizer; give the "
            "ids, or texts of one token, that its refusals begin with"
        )
    return sorted(found)


def _split(
    harmful: Prompts,
    harmless: Prompts,
    validation: float | tuple[Prompts, Prompts],
    seed: int,
) -> dict[str, list[Prompt]]:
    """The prompts to fit and to choose on, no prompt in two lists."""
    lists = {"harmful prompts": _once(harmful), "harmless prompts": _once(harmless)}
    if isinstance(validation, tuple):
        own = dict(zip(lists, map(_once, validation), strict=True))
    else:
        if not 0 < validation < 1:
            raise ConfigError(f"validation {validation}: expected a share between 0 and 1")
        own = {}
        for number, (name, prompts) in enumerate(list(lists.items())):
            order = np.random.default_rng([seed, number]).permutation(len(prompts))
            cut = max(1, round(validation * len(prompts)))
            keys = list(prompts)
            own[name] = {keys[i]: prompts[keys[i]] for i in sorted(order[:cut])}
            lists[name] = {keys[i]: prompts[keys[i]] for i in sorted(order[cut:])}
    lists |= {name.replace("prompts", "validation prompts"): part for name, part in own.items()}
    owner: dict[str, str] = {}
    for name, prompts in lists.items():
        if not prompts:
            raise DataError(
                f"there are no {name}; expected at least 2 different prompts of each kind, to fit "
                "and to choose on different ones"
            )
        for key, prompt in prompts.items():
            if owner.setdefault(key, name) != name:
                raise DataError(
                    f"a prompt stands in the {owner[key]} and the {name} ({str(prompt)[:40]!r}); a "
                    "direction is not chosen on what it is fitted on"
                )
    return {name: list(prompts.values()) for name, prompts in lists.items()}


def _once(prompts: Prompts) -> dict[str, Prompt]:
    if isinstance(prompts, str):
        raise DataError(f"expected a list of prompts, got one text {prompts[:40]!r}")
    bare = [one.prompt if isinstance(one, PreferencePair) else one for one in prompts]
    return {hash_json(as_json(one)): one for one in bare}


# ---------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class _Candidate:
    """A difference of means at a site, and at which token of the prompt, −1 being the last."""

    site: str
    token: int
    vector: Float[np.ndarray, " d"]
    mean_state_norm: float


def _candidates(
    model: Model,
    harmful: Sequence[Encoded],
    harmless: Sequence[Encoded],
    back: int,
    sites: Sequence[str],
    batch_tokens: int | None,
    reporter: Reporter,
) -> list[_Candidate]:
    """Those at the token that has ``back`` more behind it, which in a causal model it can't see."""
    ends = [
        Encoded(item.ids[: len(item.ids) - back], len(item.ids) - back)
        for item in (*harmful, *harmless)
    ]
    found = []
    with states_of(model, ends, sites=sites, batch_tokens=batch_tokens, reporter=reporter) as (
        states,
        _,
    ):
        for site in states:
            rows = as_matrix(states[site], site)
            gap = rows[: len(harmful)].mean(axis=0) - rows[len(harmful) :].mean(axis=0)
            norm = float(np.linalg.norm(rows, axis=1).mean())
            found.append(_Candidate(site, -1 - back, gap, norm))
    return found


class _Scorer:
    """First-token scores of validation prompts, plain and steered.

    Attributes:
        plain_harmful: mean refusal score of the harmful prompts as the model is.
        plain_harmless: of the harmless ones.
    """

    def __init__(
        self,
        model: Model,
        harmful: Sequence[Encoded],
        harmless: Sequence[Encoded],
        tokens: Sequence[int],
        batch_tokens: int | None,
    ) -> None:
        self._model, self._harmful, self._harmless = model, harmful, harmless
        self._tokens, self._batch_tokens = list(tokens), batch_tokens
        self._readout = Readout.of(model)
        self._plain_states = self._read(harmless)
        self.plain_harmful = self._score(self._read(harmful))
        self.plain_harmless = self._score(self._plain_states)

    def measure(self, candidate: _Candidate) -> dict[str, float | None]:
        """``bypass``, ``induce`` and ``kl`` of a candidate; None of a zero one."""
        if not candidate.vector.any():
            return {"bypass": None, "induce": None, "kl": None}
        vector = torch.from_numpy(candidate.vector)
        everywhere = [
            Intervention(resid_post(block), vector, "ablate")
            for block in range(Shape.of(self._model).n_blocks)
        ]
        with steer(self._model, everywhere):
            bypass = self._score(self._read(self._harmful))
            kl = self._kl(self._read(self._harmless))
        with steer(self._model, Intervention(candidate.site, vector)):
            induce = self._score(self._read(self._harmless))
        return {"bypass": bypass, "induce": induce, "kl": kl}

    def _read(self, encoded: Sequence[Encoded]) -> Float[Tensor, "n d"]:
        with states_of(
            self._model, encoded, sites=["final_norm"], batch_tokens=self._batch_tokens
        ) as (states, _):
            return states["final_norm"]

    def _log_p(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        with evaluating(self._model):
            return float64(self._readout(states)).log_softmax(-1).cpu()

    def _score(self, states: Float[Tensor, "n d"]) -> float:
        total = 0.0
        for part in torch.split(states, _CHUNK):
            log_p = self._log_p(part)
            refusing = torch.zeros(log_p.shape[1], dtype=torch.bool)
            refusing[self._tokens] = True
            odds = log_p[:, refusing].logsumexp(-1) - log_p[:, ~refusing].logsumexp(-1)
            total += float(odds.sum())
        return total / len(states)

    def _kl(self, states: Float[Tensor, "n d"]) -> float:
        total = 0.0
        for plain, steered in zip(
            torch.split(self._plain_states, _CHUNK), torch.split(states, _CHUNK), strict=True
        ):
            p, q = self._log_p(plain), self._log_p(steered)
            total += float((p.exp() * (p - q)).sum())
        return total / len(states)


def _note(
    best: dict[str, Json] | None,
    measured: Sequence[dict[str, Json]],
    max_kl: float,
    depth: float,
    n_blocks: int,
) -> str:
    if best is not None:
        return (
            "lowest refusal score on harmful validation prompts once ablated, of "
            f"{sum(bool(found['eligible']) for found in measured)} eligible candidates"
        )
    inducing = [found for found in measured if (found["induce"] or 0) > 0]  # type: ignore[operator]
    if not inducing:
        return (
            f"none of {len(measured)} candidates makes refusal likelier than not on harmless "
            "prompts when it is added; does the model refuse the harmful ones?"
        )
    near = min(inducing, key=lambda found: float(found["kl"]))  # type: ignore[arg-type]
    return (
        f"of {len(inducing)} candidates that bring refusal about none has a KL of at most {max_kl} "
        f"in the first {depth:g} of {n_blocks} layers; the least is {near['kl']:.3g} at "
        f"{near['site']}"
    )
