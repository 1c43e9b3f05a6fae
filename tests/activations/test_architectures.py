"""Extraction equals one-prompt-at-a-time ``output_hidden_states``, whatever the architecture.

The bound is the project's: 1e-5 of the state's norm in float32. Float32 rounding through a few tiny
blocks is near 1e-6; a real token that saw padding, or a wrong row, is off by 1e-2 and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, FAMILIES, STREAMLESS, build, prompts_of
from torch import Tensor

from dsteer.activations.extract import extract
from dsteer.activations.reading import Reading
from dsteer.data.tokens import Encoded
from dsteer.models.anatomy import Anatomy
from dsteer.models.pair import ModelPair
from dsteer.parallel import ALONE

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

BOUND = 1e-5


def reference(model: Any, prompts: list[Encoded], name: str) -> dict[str, list[Tensor]]:
    """The model's own hidden_states (T, d) by site, one prompt at a time.

    The output of the last block is not among them where the embedding is.
    """
    found: dict[str, list[Tensor]] = {}
    for item in prompts:
        with torch.no_grad():
            states = model(
                torch.tensor([item.ids]), output_hidden_states=True, use_cache=False
            ).hidden_states
        first = 0 if name in STREAMLESS else 1
        for block, state in enumerate(states[first:-1]):
            found.setdefault(f"resid_post.{block}", []).append(state[0])
        found.setdefault("final_norm", []).append(states[-1][0])
    return found


def worst_error(states: Any, expected: dict[str, list[Tensor]], rows: str) -> float:
    """Largest ‖h − h_ref‖ / ‖h_ref‖ over sites and prompts."""
    worst = 0.0
    assert len(states.base) - len(expected) in {0, 1}
    for site, prompts in expected.items():
        pick = {"last": lambda h: h[-1:], "mean": lambda h: h.mean(0, keepdim=True)}[rows]
        wanted = torch.cat([pick(prompt) for prompt in prompts])
        error = (states.base[site] - wanted).norm(dim=1) / wanted.norm(dim=1)
        worst = max(worst, float(error.max()))
    return worst


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_one_prompt_at_a_time(name: str, record_property: Any) -> None:
    model = build(name)
    prompts = prompts_of()
    pair = ModelPair.load(model, model)
    anatomy = Anatomy.of(model)
    assert anatomy.n_blocks == len(anatomy.blocks)
    budgets = (1, 24, 80, 100_000) if name in ARCHITECTURES else (24, 100_000)
    found = {budget: extract(pair, prompts, batch_tokens=budget) for budget in budgets}
    mean = extract(pair, prompts, position="prompt_mean")
    expected = reference(model, prompts, name)
    errors = {budget: worst_error(states, expected, "last") for budget, states in found.items()}
    errors["mean"] = worst_error(mean, expected, "mean")
    record_property("worst", max(errors.values()))
    print(name, {key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "opt"])
def test_last_block_is_raw_and_final_norm_is_normed(name: str) -> None:
    """resid_post.{L-1} passed through the final norm is final_norm: neither is the other."""
    model = build(name)
    acts = extract(ModelPair.load(model, model), prompts_of())
    anatomy = Anatomy.of(model)
    last = acts.base[f"resid_post.{anatomy.n_blocks - 1}"]
    with torch.no_grad():
        normed = anatomy.final_norm(last)
    assert torch.allclose(normed, acts.base["final_norm"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(last, acts.base["final_norm"], atol=0.1)


def test_a_model_that_sees_padding_is_read_without_padding() -> None:
    """With attention in both directions padding would change every state."""
    model = build("llama")
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    prompts = prompts_of()
    pair = ModelPair.load(model, model)
    reading = Reading.of(pair, prompts, batch_tokens=100)
    needed = reading.needed
    batches = reading._plan(model, Anatomy.of(model), ALONE)
    assert all(len({len(needed[p]) for p in batch.prompts}) == 1 for batch in batches)
    states = extract(pair, prompts, batch_tokens=100)
    assert worst_error(states, reference(model, prompts, "llama"), "last") <= BOUND
