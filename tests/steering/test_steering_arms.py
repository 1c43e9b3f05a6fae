"""States under many arms in one pass are those of one text at a time under plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import build, prompts_of
from planted import PROMPTS, byte_tokenizer, planted_pair
from torch import Tensor

from dsteer.activations.capture import Capture
from dsteer.data.tokens import Encoded, encode
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.models.readout import Readout
from dsteer.steering import arms as module
from dsteer.steering.arms import Arm, Steering, same_without_hooks, steered_states
from dsteer.steering.intervene import Schedule, steer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

SITES = ("resid_post.0", "resid_post.1", "resid_post.2", "final_norm")
ANSWERS = ((1, 4), (3, 1), (9, 8), (9, 2), (20, 6), (2, 11))
"""Tokens of prompts and answers."""


def answered(lengths: Sequence[tuple[int, int]] = ANSWERS) -> list[Encoded]:
    whole = prompts_of(tuple(prompt + answer for prompt, answer in lengths))
    return [Encoded(w.ids, prompt) for w, (prompt, _) in zip(whole, lengths, strict=True)]


def vectors(count: int) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(1))


def steering(site: str, **kwargs: Any) -> Steering:
    """Two directions, three strengths."""
    first, second = vectors(2)
    arms = (Arm(first, 0.0), Arm(first, 1.0), Arm(first, -2.0), Arm(second, 1.0))
    return Steering(site, arms, **kwargs)


def gathered(model: Any, texts: Sequence[Encoded], what: Steering, **kwargs: Any) -> list[Tensor]:
    """(arms, answer tokens, d) of each text."""
    found: dict[int, Tensor] = {}
    for numbers, states in steered_states(model, texts, what, **kwargs):
        lengths = [len(texts[n].ids) - texts[n].prompt_length for n in numbers]
        found |= dict(zip(numbers, states.split(lengths, dim=1), strict=True))
    assert sorted(found) == list(range(len(texts)))
    return [found[number] for number in range(len(texts))]


def one_by_one(model: Any, texts: Sequence[Encoded], what: Steering) -> list[Tensor]:
    anatomy = Anatomy.of(model)
    settings = {"operation": what.operation, "positions": what.positions, "seed": what.seed,
                "schedule": what.schedule, "site": what.site}  # fmt: skip
    found = []
    for text in texts:
        ids, start = torch.tensor([text.ids[:-1]]), text.prompt_length
        states = []
        for arm in what.arms:
            vector = None if what.operation == "scale" else arm.vector
            with (
                steer(model, vector, arm.strength, prompt_lengths=[start], **settings),
                Capture(anatomy, ["final_norm"]) as capture,
            ):
                read = capture.read(ids, lambda state: state[0].clone())
            states.append(read["final_norm"][start - 1 :])
        found.append(torch.stack(states))
    return found


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest ‖h − h_ref‖ / ‖h_ref‖ of any token."""
    return max(
        float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral-window", "gpt-oss", "falcon"])
def test_equals_one_text_at_a_time(name: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts, shared = build(name), answered(), []
    shares = module._shares
    monkeypatch.setattr(module, "_shares", lambda *args: shared.append(shares(*args)) or shared[-1])
    for positions in ("all", "generated", "prompt", (2, 5)):
        what = steering(site, positions=positions)
        wanted = one_by_one(model, texts, what)
        for batch_tokens in (None, 60, 1):  # the last: one text and arm at a time
            found = gathered(model, texts, what, batch_tokens=batch_tokens)
            assert worst(found, wanted) < 1e-5
        assert worst([w[1:2] for w in wanted], [w[:1] for w in wanted]) > 1e-2
    assert set(shared) == {name != "falcon"}


@pytest.mark.parametrize("operation", ["ablate", "scale", "noise", "project"])
def test_operations_and_schedules(operation: Any) -> None:
    model, texts = build("llama"), answered()
    for schedule in (None, Schedule("linear", steps=5)):
        what = steering("resid_post.1", operation=operation, schedule=schedule, seed=3)
        wanted = one_by_one(model, texts, what)
        for batch_tokens in (None, 60):
            assert worst(gathered(model, texts, what, batch_tokens=batch_tokens), wanted) < 1e-5


def test_a_model_that_attends_both_ways_is_read_without_padding() -> None:
    model, texts = build("llama"), answered()
    model.config.is_causal = False
    for part in model.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = False
    what = steering("resid_post.1")
    assert worst(gathered(model, texts, what), one_by_one(model, texts, what)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "falcon"])
@pytest.mark.parametrize("site", ["resid_post.0", "final_norm"])
def test_same_without_hooks(name: str, site: str) -> None:
    model, texts = build(name), answered()
    zero, one = Arm(vectors(1)[0], 0.0), Arm(vectors(1)[0], 1e-3)
    assert same_without_hooks(model, texts, Steering(site, (zero, zero)))
    assert not same_without_hooks(model, texts, Steering(site, (zero, one)))
    bare = gathered(model, texts, Steering.none(32))
    assert worst(gathered(model, texts, Steering(site, (zero,))), bare) < 1e-5


@pytest.mark.parametrize("block", range(4))
def test_planted_truth(block: int) -> None:
    """KL(tuned‖base + b) of every token of the tuned model's own texts is 0."""
    planted = planted_pair(block)
    prompts = encode(byte_tokenizer(), PROMPTS)
    texts = []
    for item in prompts:
        made = planted.tuned.generate(
            torch.tensor([item.ids]), max_new_tokens=9, do_sample=False, min_new_tokens=9
        )
        texts.append(Encoded(tuple(made[0].tolist()), item.prompt_length))
    readout = Readout.of(planted.base)
    site = f"resid_post.{block}"
    tuned = gathered(planted.tuned, texts, Steering.none(32))
    arms = (Arm(planted.b, 1.0), Arm(planted.b, 0.0), Arm(planted.b, 0.5))
    for batch_tokens in (None, 100):
        base = gathered(planted.base, texts, Steering(site, arms), batch_tokens=batch_tokens)
        kl = torch.stack([divergence(readout, t[0], b) for t, b in zip(tuned, base, strict=True)])
        assert float(kl[:, 0].max()) < 1e-6
        assert float(kl[:, 2].max()) > 1e-4
        assert float(kl[:, 1].max()) > 1e-2


def divergence(readout: Readout, tuned: Tensor, steered: Tensor) -> Tensor:
    """The largest KL(tuned‖steered) of any token, in nats, by arm."""
    p = readout(tuned).double().log_softmax(-1)
    largest = []
    for states in steered:
        q = readout(states).double().log_softmax(-1)
        largest.append((p.exp() * (p - q)).sum(-1).max())
    return torch.stack(largest)


def test_the_caller_stays_in_its_own_mode() -> None:
    model, texts, what = build("llama"), answered(), steering("resid_post.1")
    assert same_without_hooks(model, texts, Steering("resid_post.1", (Arm(vectors(1)[0], 0.0),)))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model.train()
    states = steered_states(model, texts, what, batch_tokens=8)
    next(states)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()  # between two batches


def test_a_model_whose_code_passes_hooks_by_is_refused() -> None:
    model = build("llama")
    block = model.model.layers[1]
    block.__class__ = type(
        "Fused", (type(block),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    )
    with pytest.raises(ModelError, match=r"resid_post\.1: its module was not called as one"):
        list(steered_states(model, answered(), steering("resid_post.1")))
