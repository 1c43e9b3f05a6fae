"""How dsteer sees one model: its parts, and whether reading and steering it pass a self-test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsteer.activations.extract import extract
from dsteer.activations.inputs import Inputs
from dsteer.activations.reading import padding_is_unseen, rows_read_alike
from dsteer.activations.sites import ENCODER, FINAL_NORM, resid_post
from dsteer.activations.storage import States
from dsteer.config import DType
from dsteer.data.tokens import Encoded, Tokenizer, encode
from dsteer.errors import DataError, ModelError
from dsteer.models.anatomy import Anatomy, evaluating, text_config
from dsteer.models.load import Model, load_model, load_tokenizer, quiet
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.steering.arms import FAILURES, Arm, Steering
from dsteer.steering.decode import Decoding, decode
from dsteer.steering.intervene import steer
from dsteer.store import Json

TEXTS = (
    "The river rises in the hills.",
    "Bread needs flour, water, salt and time; most of all it needs time.",
    "Name three birds that stay for the winter, and say where each of them finds its food.",
)
"""What is read and continued: benign, and of different lengths, so that a batch is padded."""

_LENGTHS = (5, 12, 20)  # of random ids, where there is no tokenizer
_NEW = 6  # tokens of each continuation
_BATCH = 100_000  # tokens of a batch: so many that all prompts share one, padded
_STRENGTH = -1.5  # of a vector half as long as the states

# Relative errors. Batched and alone differ by float32's rounding through the blocks, about 1e-6; a
# wrong row or token is off by 1e-2 and more. The sum h + λv is rounded once.
_READ, _ADDED, _CHOSEN = 1e-5, 1e-6, 1e-3
# Half precision rounds each state by up to 2^-9 (bfloat16), again and again through the blocks.
_READ_HALF, _ADDED_HALF, _CHOSEN_HALF = 5e-2, 1e-2, 1e-1


@dataclass(frozen=True)
class Check:
    """One part of the self-test.

    Attributes:
        name: a word.
        what: what is claimed, as a clause.
        error: what was measured; None where nothing could be.
        bound: the largest error that passes.
        passed: whether the claim holds.
        trouble: why nothing could be measured, or None.
        at_least: the error must be above the bound instead.
    """

    name: str
    what: str
    error: float | None
    bound: float
    passed: bool
    trouble: str | None = None
    at_least: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`examine` found.

    Attributes:
        facts: the model's parts and properties, as JSON.
        checks: the self-test.
    """

    facts: Json
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> Json:
        """All of it as JSON."""
        checks = [asdict(check) for check in self.checks]
        return {**self.facts, "checks": checks, "passed": self.passed}


def diagnose(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: DType = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Load a model with its tokenizer, if it has one, and :func:`examine` it.

    Args:
        path: hub id or folder, of a model or of a PEFT adapter.
        revision: hub commit, tag or branch.
        dtype: of the weights.
        device: ``auto`` or torch's name of a device.
        trust_remote_code: run code that the model's repository holds.

    Raises:
        ModelError: there is no such model, or it is one that can't be read, with the reason.
    """
    model = load_model(
        path, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    Anatomy.of(model)  # refused before its tokenizer is asked for
    tokenizer, why = None, ""
    for place, at in ((path, revision), (model.config.name_or_path, None)):  # of an adapter: base
        try:
            tokenizer = load_tokenizer(place, revision=at, trust_remote_code=trust_remote_code)
            why = _why_useless(tokenizer)
            if not why:
                break
        except ModelError as error:
            why = why or str(error).split("; ")[0]
    found = examine(model, None if why else tokenizer)
    if why:
        found.facts["tokenizer"] = {"missing": why}
    return replace(found, facts={"model": str(path), "revision": revision, **found.facts})


def _why_useless(tokenizer: Tokenizer) -> str:
    """Why a tokenizer can't encode text, or an empty string.

    Of a folder without a vocabulary transformers makes some tokenizers that know no word.
    """
    try:
        rows = encode(tokenizer, TEXTS)
    except DataError as error:
        return f"its vocabulary is missing ({error})"
    words = {i for row in rows for i in row.ids} - set(tokenizer.all_special_ids)
    return "" if words else "its vocabulary is missing (texts become special tokens alone)"


def examine(model: Model, tokenizer: Tokenizer | None = None) -> Diagnosis:
    """Look at a model in memory, read it, steer it and continue texts with it.

    Args:
        model: a language model.
        tokenizer: its tokenizer; None: random ids are read.

    Raises:
        ModelError: the model can't be read at all, with the reason.
    """
    anatomy = Anatomy.of(model)
    with quiet():
        test = _SelfTest(model, anatomy, tokenizer)
        checks = test.run()
        facts = _facts(model, anatomy, tokenizer) | {
            "block_returns": test.block_returns,
            "right_padding_unseen": test.right_padding_unseen,
            "decoding": test.decoding,
        }
    return Diagnosis(facts, checks)


def _facts(model: Model, anatomy: Anatomy, tokenizer: Tokenizer | None) -> Json:
    config, inner = model.config, getattr(model, "get_base_model", lambda: model)()
    adapter = getattr(model, "active_peft_config", None)
    kinds = list(dict.fromkeys(type(block).__name__ for block in anatomy.blocks))
    return {
        "class": type(inner).__name__,
        "type": str(config.model_type),
        "adapter": None if adapter is None else str(getattr(adapter.peft_type, "value", "PEFT")),
        "blocks": {
            "count": anatomy.n_blocks,
            "classes": kinds,
            "path": _path(model, anatomy.blocks),
        },
        "width": anatomy.width,
        "vocabulary": int(text_config(config).vocab_size),
        "final_norm": _module(model, anatomy.final_norm),
        "tied_embeddings": anatomy.tied,
        "head": _head(model, anatomy),
        "max_positions": anatomy.max_positions,
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        "dtype": str(anatomy.dtype).removeprefix("torch."),
        "device": anatomy.device.type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _head(model: Model, anatomy: Anatomy) -> Json:
    head = anatomy.output_embedding
    if head is None:
        return {"trouble": "the model has no unembedding, so it gives no logits"}
    found = dict(_module(model, head))
    try:
        readout = Readout.of(model)
    except ModelError as error:
        return {**found, "trouble": str(error)}
    return {
        **found,
        "bias": readout.bias is not None,
        "logit_scale": readout.scale,
        "soft_cap": readout.softcap,
    }


def _tokenizer(tokenizer: Tokenizer) -> Json:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("default") or next(iter(template.values()), None)
    lines = [line for line in str(template or "").splitlines() if line.strip()]
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "template": lines[0].strip() if lines else None,
    }


def _module(model: nn.Module, module: nn.Module) -> Json:
    return {"class": type(module).__name__, "path": _path(model, module)}


def _path(model: nn.Module, wanted: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


# ---------------------------------------------------------------------------------- self-test


class _Numbers:
    """Stands in for a tokenizer: ids become their numbers."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **_settings: Any) -> str:
        return " ".join(map(str, ids))


class _SelfTest:
    """Reads a model, steers it at its middle block, and continues texts with it.

    Attributes:
        block_returns: what the steered block returns, in words; None if it did not run.
        right_padding_unseen: whether tokens on the right leave states as they are; None if the
            model can't be read.
        decoding: which way a sweep goes, and why not the fast one.
    """

    def __init__(self, model: Model, anatomy: Anatomy, tokenizer: Tokenizer | None) -> None:
        self.model, self.anatomy = model, anatomy
        self.tokenizer = tokenizer or _Numbers()
        self.prompts = _prompts(model, anatomy, tokenizer)
        self.rows = self.prompts if anatomy.encoder is None else [*map(_halved, self.prompts)]
        self.pair = ModelPair.load(model, model)
        self.block = (anatomy.n_blocks - 1) // 2
        self.site = resid_post(self.block)
        self.block_returns: str | None = None
        self.right_padding_unseen: bool | None = None
        self.decoding: Json = {"fast": None, "note": "not tried"}
        wide = anatomy.dtype.itemsize >= 4
        self._bounds = (_READ, _ADDED, _CHOSEN) if wide else (_READ_HALF, _ADDED_HALF, _CHOSEN_HALF)

    def run(self) -> tuple[Check, ...]:
        before = _count_hooks(self.model)
        read, added, chosen = self._bounds
        checks = [
            self._check(
                "capture", "states of a padded batch are the model's own hidden_states", read,
                self._capture,
            )
        ]  # fmt: skip
        if checks[0].error is not None:
            checks += [
                self._check("add", f"steered minus clean is λv at {self.site}", added, self._add),
                self._check("before", "states before the site keep every bit", 0.0, self._before),
                self._reach(),
                self._check(
                    "cache", "steered greedy text is the best choice of passes without a cache",
                    chosen, self._cached,
                ),
                self._check(
                    "sweep", "so is the text of a sweep, and that of strength 0 unsteered", chosen,
                    self._swept,
                ),
            ]  # fmt: skip
        left = float(abs(_count_hooks(self.model) - before))
        return (*checks, Check("hooks", "no hook is left on the model", left, 0.0, left == 0))

    def _check(self, name: str, what: str, bound: float, measure: Callable[[], float]) -> Check:
        """Measure an error; what the model's code raises is a check that failed."""
        try:
            error = measure()
        except (ModelError, *FAILURES) as trouble:
            lines = str(trouble).strip().splitlines() or [type(trouble).__name__]
            return Check(name, what, None, bound, False, lines[0])
        if error != error or error == float("inf"):
            return Check(name, what, None, bound, False, "what was measured is not finite")
        return Check(name, what, error, bound, error <= bound)

    # ------------------------------------------------------------------ states

    def _capture(self) -> float:
        """Largest ‖h − h_own‖ / ‖h_own‖ over sites and tokens."""
        self.clean = self._read()
        with evaluating(self.model):
            self.right_padding_unseen = self._padding_is_unseen()
            own = [self._own(item) for item in self.rows]
        norms = self.clean[self.site].norm(dim=1)
        direction = torch.randn(self.anatomy.width, generator=torch.Generator().manual_seed(0))
        self.vector = float(norms.mean()) / 2 * direction / direction.norm()
        found = {site: self.clean[site] for site in self.clean}
        if self.anatomy.encoder is not None:
            found[ENCODER] = self._read(ENCODER)[ENCODER]
        return max(
            _worst(found[site], torch.cat([states[site] for states in own]).float().cpu())
            for site in own[0]
        )

    def _padding_is_unseen(self) -> bool:
        if self.anatomy.encoder is not None:
            return rows_read_alike(self.anatomy, self.rows)
        return padding_is_unseen(self.model, self.anatomy, [item.ids for item in self.rows])

    def _own(self, item: Encoded) -> dict[str, Tensor]:
        """The model's own hidden_states (T, d) of one prompt, by site.

        Most models give the embedding first, and then not the raw output of the last block.
        """
        first: list[Tensor] = []

        def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first.append(args[0] if args else kwargs["hidden_states"])

        def leave(_block: nn.Module, _inputs: object, output: object) -> None:
            parts = len(output) if isinstance(output, tuple | list) else None
            self.block_returns = "a tensor" if parts is None else f"a tuple of {parts}"

        handles = [
            self.anatomy.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            self.anatomy.blocks[self.block].register_forward_hook(leave),
        ]
        try:
            inputs = Inputs.of([item], self.anatomy.start).arguments(self.anatomy.device)
            output = self.model(**inputs, output_hidden_states=True, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        whole = self.anatomy.encoder is None
        hidden = output.hidden_states if whole else output.decoder_hidden_states
        if hidden is None:
            raise ModelError("the model gives no hidden_states, so there is nothing to compare")
        blocks = hidden[1:-1] if torch.equal(hidden[0], first[0]) else hidden[:-1]
        first_read = len(self.anatomy.start or (0,)) - 1  # the last of a decoder's start tokens
        named = {resid_post(k): state[0, first_read:] for k, state in enumerate(blocks)}
        if not whole:
            named[ENCODER] = output.encoder_last_hidden_state[0]
        return {**named, FINAL_NORM: hidden[-1][0, first_read:]}

    def _read(self, sites: str = "all") -> States:
        acts = extract(self.pair, self.rows, sites=sites, position="all", batch_tokens=_BATCH)
        return acts.base

    def _add(self) -> float:
        """Largest ‖h_steered − (h + λv)‖ / ‖h_steered‖ at the site."""
        with steer(self.model, self.vector, _STRENGTH, site=self.site):
            self.steered = self._read()
        return _worst(self.clean[self.site] + _STRENGTH * self.vector, self.steered[self.site])

    def _before(self) -> float:
        """Largest ‖h_steered − h‖ before the site."""
        sites = [resid_post(block) for block in range(self.block)]
        gaps = [(self.steered[site] - self.clean[site]).norm(dim=1).max() for site in sites]
        return max(map(float, gaps), default=0.0)

    def _reach(self) -> Check:
        """Whether the smallest ‖h_steered − h‖ / ‖h‖ at final_norm is above 0."""

        def moved() -> float:
            return float(_gaps(self.steered[FINAL_NORM], self.clean[FINAL_NORM]).min())

        found = self._check("reach", "the vector reaches final_norm of every token", 0.0, moved)
        passed = found.error is not None and found.error > 0
        return replace(found, passed=passed, at_least=True)

    # ------------------------------------------------------------------ texts

    def _cached(self) -> float:
        """Largest loss of texts by ``generate``, which keeps a cache."""
        return self._decoded((_STRENGTH,), fast=False)

    def _swept(self) -> float:
        """Largest loss of the texts of a sweep, steered or not."""
        return self._decoded((0.0, _STRENGTH), fast=None)

    def _decoded(self, strengths: tuple[float, ...], fast: bool | None) -> float:
        arms = tuple(Arm(self.vector, strength) for strength in strengths)
        found = decode(
            self.model, self.tokenizer, self.prompts, Steering(self.site, arms), Decoding(_NEW),
            fast=fast,
        )  # fmt: skip
        self.decoding = {"fast": found.fast, "note": found.note}
        return max(
            self._loss(item, tokens, strength)
            for strength, rows in zip(strengths, found.tokens, strict=True)
            for item, tokens in zip(self.prompts, rows, strict=True)
        )

    def _loss(self, item: Encoded, tokens: Sequence[int], strength: float) -> float:
        """How far a token's logit lies below the best of one plain pass, of the largest logit."""
        if not tokens:
            return 0.0
        row = Encoded((*item.ids, *tokens), len(item.ids))
        inputs = Inputs.of([row], self.anatomy.start).arguments(self.anatomy.device)
        with evaluating(self.model), steer(self.model, self.vector, strength, site=self.site):
            logits = self.model(**inputs, use_cache=False).logits[0].float().cpu()
        logits = logits[-len(tokens) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return float((logits.amax(1) - chosen).max() / logits.abs().max())


def _prompts(model: Model, anatomy: Anatomy, tokenizer: Tokenizer | None) -> list[Encoded]:
    """Texts as ids; random ids that mean no image where there is no tokenizer."""
    limit = None if anatomy.max_positions is None else anatomy.max_positions - _NEW
    if tokenizer is not None:
        has_encoder = anatomy.encoder is not None
        return encode(tokenizer, TEXTS, max_tokens=limit, encoder_decoder=has_encoder)
    special = {
        value
        for name, value in {**vars(model.config), **vars(text_config(model.config))}.items()
        if "token" in name and isinstance(value, int)
    }
    plain = torch.tensor(
        [i for i in range(text_config(model.config).vocab_size) if i not in special]
    )
    generator = torch.Generator().manual_seed(0)
    rows = [
        plain[torch.randint(len(plain), (min(length, limit or length),), generator=generator)]
        for length in _LENGTHS
    ]
    return [Encoded(tuple(row.tolist()), len(row)) for row in rows]


def _halved(item: Encoded) -> Encoded:
    """The same ids, the second half as an answer, which a decoder reads."""
    return Encoded(item.ids, (len(item.ids) + 1) // 2)


def _worst(found: Tensor, wanted: Tensor) -> float:
    """Largest ‖found − wanted‖ / ‖wanted‖ over rows."""
    return float(_gaps(found, wanted).max())


def _gaps(found: Tensor, wanted: Tensor) -> Tensor:
    """‖found − wanted‖ / ‖wanted‖ (n,); 0 where both are 0, as states of a padding token may be."""
    tiny = torch.finfo(wanted.dtype).tiny
    gaps: Tensor = (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(tiny)
    return gaps


def _count_hooks(model: nn.Module) -> int:
    """Hooks on a model, but for those by which transformers itself returns hidden_states."""
    return sum(
        not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registered.values()
    )
