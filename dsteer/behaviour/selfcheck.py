"""The measurement held against planted truth, in the run's own architecture.

A tiny random model of the same family gets a constant b behind one of its blocks, so all that the
tuned model differs by is known: nothing before that block, b at it, and adding b is the tuned
model. The code that measured the run must say so. Whatever reads or changes another state than it
says (a family whose blocks are found wrongly, a hook that misses) fails here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.extract import extract
from dsteer.activations.sites import FINAL_NORM, all_sites, resid_post
from dsteer.behaviour.answers import Answers
from dsteer.behaviour.edited import Bench, Split
from dsteer.behaviour.profile import (
    Effects,
    edits_of,
    efficiency,
    first_largest,
    measure,
    recovered,
)
from dsteer.behaviour.teacher_forced import predictions, score
from dsteer.config import ProfileConfig
from dsteer.data.tokens import Encoded
from dsteer.geometry.alignment import cosine_to_mean
from dsteer.geometry.displacement import StreamingMean
from dsteer.geometry.spectrum import spectra
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model, load_config, quiet
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.models.seq2seq import is_encoder_decoder
from dsteer.models.tiny import SHRUNK_VOCABULARY, shrunk
from dsteer.progress import SILENT
from dsteer.steering.arms import Arm, Steering, same_without_hooks
from dsteer.store import Json

BLOCK = 1
"""The block behind which b is planted."""

GROUPS = 3
"""Groups of prompts, each with a direction of its own."""

TEXTS = 9

ROUNDING = 1e-5
"""Relative error of float32 states, and of the KL that they give (which is of second order)."""

VISIBLE = 1e-6
"""What is known to differ must differ by more than this."""


def self_check(
    base_path: str, *, revision: str | None = None, trust_remote_code: bool = False, seed: int
) -> Json:
    """Measure planted truth in a tiny random model of a base's own architecture, on the CPU.

    Args:
        base_path: hub id or folder of the base (or of an adapter, whose base is meant).
        revision: hub commit, tag or branch.
        trust_remote_code: run code that the model's repository holds.
        seed: of weights, texts and directions.

    Returns:
        ``passed``, ``architecture`` and ``checks``, each with ``what``, ``expected``, ``found`` and
        ``passed``. A model that can't be built so small has ``passed`` None, and ``why``.
    """
    kind: str | None = None
    try:
        config = load_config(base_path, revision=revision, trust_remote_code=trust_remote_code)
        kind = str(config.model_type)
        with quiet():
            small = shrunk(config)
        kind = str(small.model_type)
        model = _built(small, trust_remote_code, seed)
        anatomy = Anatomy.of(model)
        pairs = [_planted(model, b) for b in _directions(anatomy, seed)]
    except Exception as error:  # noqa: BLE001 - families refuse configs in any way
        first = str(error).strip().splitlines()
        return {
            "passed": None,
            "architecture": kind,
            "checks": [],
            "why": f"no tiny model of this architecture could be built: {type(error).__name__}"
            + (f": {first[0][:200]}" if first else ""),
        }
    try:
        checks = _checks(model, pairs, _directions(anatomy, seed), seed)
    except Exception as error:  # noqa: BLE001 - a measurement that breaks is one that fails
        found = f"{type(error).__name__}: {str(error).strip()[:200]}"
        checks = [_check("the measurement runs", "no error", found, False)]
    return {
        "passed": all(check["passed"] for check in checks),
        "architecture": kind,
        "checks": checks,
    }


# ---------------------------------------------------------------------------------- models


def _built(config: Any, trust_remote_code: bool, seed: int) -> Model:
    """A random model in float32, on the CPU; the caller's random state is left as it was."""
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if is_encoder_decoder(config)
        else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model: Model = auto.from_config(config, trust_remote_code=trust_remote_code)
    return model.float().eval()


def _directions(anatomy: Anatomy, seed: int) -> list[Float[Tensor, " d"]]:
    """Orthogonal directions of norm √d: as long as a state of unit coordinates."""
    generator = torch.Generator().manual_seed(seed)
    rows, _ = torch.linalg.qr(torch.randn(anatomy.width, GROUPS, generator=generator))
    return [row * anatomy.width**0.5 for row in rows.T]


def _planted(model: Model, b: Float[Tensor, " d"]) -> ModelPair:
    """The model, and a copy whose block writes b more."""
    tuned = copy.deepcopy(model)
    block = Anatomy.of(tuned).blocks[BLOCK]
    block.forward = _writing(block.forward, b)  # type: ignore[method-assign]
    return ModelPair.load(model, tuned, device="cpu")


def _writing(forward: Callable[..., Any], b: Float[Tensor, " d"]) -> Callable[..., Any]:
    def more(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return Anatomy.write(output, Anatomy.read(output) + b)

    return more


def _texts(seed: int) -> Answers:
    """Random prompts of many lengths, each with an answer."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number in range(TEXTS):
        prompt, answer = 3 + (5 * number) % 11, 2 + number % 4
        ids = torch.randint(3, SHRUNK_VOCABULARY, (prompt + answer,), generator=generator)
        items.append(Encoded(tuple(ids.tolist()), prompt))
    return Answers(items, TEXTS, [str(number) for number in range(TEXTS)])


# ---------------------------------------------------------------------------------- checks


def _check(what: str, expected: str, found: Json, passed: bool) -> Json:
    return {"what": what, "expected": expected, "found": found, "passed": bool(passed)}


def _checks(
    model: Model, pairs: list[ModelPair], directions: list[Float[Tensor, " d"]], seed: int
) -> list[Json]:
    """Everything that must come out."""
    answers, b, pair = _texts(seed), directions[0], pairs[0]
    sites = [site for site in all_sites(pair.n_blocks) if not pair.post_norm or site != FINAL_NORM]
    at, after = resid_post(BLOCK), resid_post(BLOCK + 1)
    bench = Bench(pair, ProfileConfig(bootstrap=100), Path(), "none", sites, seed, SILENT)
    split = bench.read("planted", answers)
    own = extract(pair, answers.texts, sites=sites)
    moved = {site: own.displacement(site) for site in sites}
    means: dict[str, Tensor] = {}
    for site in sites:
        mean = StreamingMean()
        mean.update(moved[site])
        means[site] = mean.mean
    before = max(float(split.acts.displacement(resid_post(k)).abs().max()) for k in range(BLOCK))
    error = float((means[at] - b.double()).norm() / b.norm())
    cosines = cosine_to_mean(moved[at], "leave_one_out")
    ratio = spectra(moved[at])[0].sigma_ratio
    later = float(cosine_to_mean(moved[after], "leave_one_out").min())
    checks = [
        _check(f"largest displacement before {at}", "0", before, before == 0),
        _check(f"distance of v* at {at} from b, over ‖b‖", "0, rounded", error, error < ROUNDING),
        _check(
            f"least leave-one-out cosine at {at}", "1, rounded", float(cosines.min()),
            float(cosines.min()) > 1 - ROUNDING,
        ),
        _check(
            f"σ₂/σ₁ at {at}", "0, rounded", ratio, ratio is not None and ratio < ROUNDING
        ),
        _check(f"least leave-one-out cosine at {after}", "below 1", later, later < 1 - VISIBLE),
    ]  # fmt: skip
    with pair.using("base") as base:
        vectors = {site: v for site, v in means.items() if bool(v.any())}
        effects = measure(bench, base, split, "all", edits_of(sites, vectors, {}), 1.0)
    checks += _effects(bench, split, effects, sites)
    checks += [
        _inverted(pair, answers, b),
        _sham(pair, answers, b),
        _against_itself(model, answers),
    ]
    return [*checks, *_groups(pairs, answers, at)]


def _effects(bench: Bench, split: Split, effects: Effects, sites: list[str]) -> list[Json]:
    """What adding v* and patching do to the base, by site."""
    at, after = resid_post(BLOCK), resid_post(BLOCK + 1)

    def share(site: str, kind: str) -> float | None:
        found = recovered(bench, split, effects, site, kind)
        return None if found is None else found.value

    added, later = share(at, "v"), share(after, "v")
    peak = first_largest([(site, share(site, "patched")) for site in sites])
    ratio = efficiency(bench, split, effects, at)[0]
    value = None if ratio is None else ratio.value
    total = float(effects.kl_base.sum())
    return [
        _check("KL(tuned‖base)", "above 0", total, total > VISIBLE),
        _check(
            f"share of KL that is left after adding v* at {at}", "0, rounded",
            None if added is None else 1 - added,
            added is not None and abs(1 - added) < ROUNDING,
        ),
        _check(
            f"share of KL that is left after adding v* at {after}", "above 0",
            None if later is None else 1 - later, later is not None and 1 - later > VISIBLE,
        ),
        _check("where patching first recovers most", at, peak, peak == at),
        _check(
            f"efficiency of v* at {at}", "1, rounded", value,
            value is not None and abs(value - 1) < ROUNDING,
        ),
    ]  # fmt: skip


def _inverted(pair: ModelPair, answers: Answers, b: Float[Tensor, " d"]) -> Json:
    """−b in the tuned model is the base."""
    with pair.using("base") as base:
        target = predictions(base, answers.texts, Readout.of(base))
    steering = Steering(resid_post(BLOCK), (Arm(b, -1.0), Arm(b, 0.0)))
    with pair.using("tuned") as tuned:
        kl = score(tuned, answers.texts, steering, Readout.of(tuned), target).kl.sum(dim=1)
    left = float(kl[0] / kl[1])
    return _check(
        "share of KL to the base that is left after taking v* from the tuned model",
        "0, rounded", left, left < ROUNDING,
    )  # fmt: skip


def _sham(pair: ModelPair, answers: Answers, b: Float[Tensor, " d"]) -> Json:
    """Hooks with λ = 0 change no bit."""
    steering = Steering(resid_post(BLOCK), (Arm(b, 0.0),))
    with pair.using("base") as base:
        same = same_without_hooks(base, answers.texts, steering)
    return _check("hooks with λ = 0", "the same bits", "the same" if same else "others", same)


def _against_itself(model: Model, answers: Answers) -> Json:
    """A model differs from itself by nothing."""
    acts = extract(ModelPair.load(model, model, device="cpu"), answers.texts, position="all")
    most = max(float(acts.displacement(site).abs().max()) for site in acts.sites)
    return _check("largest displacement of the base from itself", "0", most, most == 0)


def _groups(pairs: list[ModelPair], answers: Answers, at: str) -> list[Json]:
    """Groups of prompts that are shifted along one direction each."""
    each = TEXTS // GROUPS
    rows = [
        extract(pair, answers.texts[number * each : (number + 1) * each], sites=[at]).displacement(
            at
        )
        for number, pair in enumerate(pairs)
    ]
    whole, centred = spectra(torch.cat(rows))
    participation, sigma = whole.participation_ratio, centred.singular_values
    rank = int((sigma > ROUNDING * sigma[0]).sum())
    return [
        _check(
            f"participation ratio of {GROUPS} groups", f"{GROUPS}, rounded", participation,
            participation is not None and abs(participation - GROUPS) < GROUPS * ROUNDING,
        ),
        _check(f"centred rank of {GROUPS} groups", str(GROUPS - 1), rank, rank == GROUPS - 1),
    ]  # fmt: skip
