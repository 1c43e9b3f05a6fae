"""Recipes that people write by hand, with what they would import: they give what dsteer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import PROMPTS, byte_tokenizer, tiny_llama
from torch import Tensor

import dsteer
from dsteer import (
    ActivationHook,
    ActivationInjector,
    ContrastPair,
    MultiVectorInjector,
    SteeringVector,
    SteeringVectorSet,
    get_all_hidden_states,
)

PLAIN = [prompt for prompt in PROMPTS if prompt.startswith("\n\nHuman")][:3]
CATEGORIES = {
    "formal": ["Formally: ", "In full sentences: ", "As a letter: ", "Politely: ", "With titles: "],
    "brief": ["In short: ", "One word: ", "Tersely: ", "Few words: ", "Quickly: "],
}
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def ids_of(tokenizer: Any, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


def test_contrastive_activation_addition(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Pairs, a hook, a mean difference a layer, saved, loaded and injected round generate."""
    pairs = [
        ContrastPair(positive="I would be glad to help.", negative="Sure, why not."),
        ContrastPair(positive="May I ask for the salt?", negative="Pass the salt."),
    ]
    vectors = []
    for layer in range(3):
        sums = {}
        for side in ("positive", "negative"):
            states = []
            for pair in pairs:
                hook = ActivationHook(model, [layer], component="residual", token_position="last")
                with hook, torch.no_grad():
                    model(ids_of(tokenizer, getattr(pair, side)))
                states.append(hook.get_activations()[layer][0, -1])
            sums[side] = torch.stack(states).mean(dim=0)
        vectors.append(
            SteeringVector(
                behavior="formality",
                layer_index=layer,
                vector=sums["positive"] - sums["negative"],
                model_name="tiny",
                extraction_method="caa",
            )
        )
    vset = SteeringVectorSet(behavior="formality", vectors=vectors)
    ours = dsteer.contrast(model, tokenizer, pairs)
    for layer in vset.layers:  # means of float32 states against float64 ones
        assert torch.allclose(vset[layer].tensor, ours[layer].tensor, atol=1e-5)

    vset.save(tmp_path / "formality")
    vset[1].save(tmp_path / "layer_1")
    loaded = SteeringVectorSet.load(tmp_path / "formality")
    one = SteeringVector.load(tmp_path / "layer_1")
    assert torch.equal(loaded.get(1).vector, one.vector)
    assert one.behavior == "formality"

    ids = ids_of(tokenizer, PLAIN[0])
    with ActivationInjector(model, [one], strength=2.0, injection_mode="all"):
        steered = model.generate(ids, max_new_tokens=6, **GREEDY)
    with dsteer.steer(model, vset[1], 2.0):
        expected = model.generate(ids, max_new_tokens=6, **GREEDY)
    assert torch.equal(steered, expected)
    assert not torch.equal(steered, model.generate(ids, max_new_tokens=6, **GREEDY))


def test_two_behaviours_with_a_strength_changed_between_answers(model: Any, tokenizer: Any) -> None:
    sets = {
        name: SteeringVectorSet(
            behavior=name,
            vectors=[
                SteeringVector(
                    behavior=name,
                    layer_index=1,
                    vector=torch.randn(32, generator=torch.Generator().manual_seed(seed)),
                )
            ],
        )
        for seed, name in enumerate(("formal", "brief"))
    }
    ids = ids_of(tokenizer, PLAIN[1])
    injector = MultiVectorInjector(model, vector_sets=sets, strengths={"formal": 1.0, "brief": 0.0})
    answers = []
    with injector:
        for strength in (0.0, 2.0):
            injector.set_strength("brief", strength)
            answers.append(model.generate(ids, max_new_tokens=6, **GREEDY).tolist())
    for strength, answer in zip((0.0, 2.0), answers, strict=True):
        total = sets["formal"][1] + strength * sets["brief"][1]
        with dsteer.steer(model, total):
            assert model.generate(ids, max_new_tokens=6, **GREEDY).tolist() == answer
    assert answers[0] != answers[1]


def prefix_recipe(model: Any, tokenizer: Any) -> Tensor:
    """(states, d): five samples a prompt, every state, a unit vector a category, and their mean.

    Each points from the prefixed to the plain prompt; both are averaged over their tokens.
    """
    by_category = []
    for prefixes in CATEGORIES.values():
        differences = []
        for prompt in PLAIN:
            plain = get_all_hidden_states(model, tokenizer, prompt).mean(dim=1)
            for prefix in prefixes:  # five samples a prompt
                asked = prompt.replace("Human: ", f"Human: {prefix}", 1)
                differences.append(plain - get_all_hidden_states(model, tokenizer, asked).mean(1))
        mean = torch.stack(differences).mean(dim=0)
        by_category.append(mean / mean.norm(dim=-1, keepdim=True))
    return torch.stack(by_category).mean(dim=0)


def test_the_prefix_recipe(model: Any, tokenizer: Any) -> None:
    """Its state k + 1 is dsteer's vector at block k, and its last the one at final_norm."""
    steering = prefix_recipe(model, tokenizer)
    assert steering.shape == (5, 32)
    ours = dsteer.prefix_contrast(
        model,
        tokenizer,
        PLAIN,
        {name: [prefix.strip() for prefix in own] for name, own in CATEGORIES.items()},
        samples=5,
    )
    for state, site in enumerate((*(f"resid_post.{k}" for k in range(3)), "final_norm"), start=1):
        theirs = SteeringVector(steering[state], site)
        assert theirs.cosine(ours[site]) > 0.99999  # float32 sums against float64 ones
        assert theirs.norm == pytest.approx(ours[site].norm, rel=1e-4)


def test_the_recipes_hook_is_on_the_block_before_the_states_index(
    model: Any, tokenizer: Any
) -> None:
    """A plain torch hook at every block but the last, as people write it."""
    steering = prefix_recipe(model, tokenizer)
    ids = ids_of(tokenizer, PLAIN[2])

    def make_hook(state: int) -> Any:
        def hook(_module: object, _inputs: object, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            steered = first + 1.5 * steering[state].to(first)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return hook

    handles = [
        model.model.layers[state - 1].register_forward_hook(make_hook(state))
        for state in range(1, 4)
    ]
    by_hand = model.generate(ids, max_new_tokens=8, **GREEDY)
    for handle in handles:
        handle.remove()
    vectors = {state - 1: steering[state] for state in range(1, 4)}
    with ActivationInjector(model, vectors, strength=1.5):
        injected = model.generate(ids, max_new_tokens=8, **GREEDY)
    vset = SteeringVectorSet(SteeringVector(v, layer_index=k) for k, v in vectors.items())
    with dsteer.steer(model, vset, 1.5):
        steered = model.generate(ids, max_new_tokens=8, **GREEDY)
    assert by_hand.tolist() == injected.tolist() == steered.tolist()
    assert not torch.equal(by_hand, model.generate(ids, max_new_tokens=8, **GREEDY))


@torch.no_grad()
def hand_written_guidance(
    model: Any, ids: Tensor, vector: Tensor, strength: float, weight: float, steps: int
) -> list[int]:
    """Two forwards a token, each with a cache; base + w (steered − base), greedy."""
    caches: list[Any] = [None, None]
    column, written = ids, []
    injector = ActivationInjector(model, {1: vector}, strength=strength)
    for _ in range(steps):
        base = model(column, past_key_values=caches[0], use_cache=True)
        with injector:
            steered = model(column, past_key_values=caches[1], use_cache=True)
        caches = [base.past_key_values, steered.past_key_values]
        z, other = base.logits[:, -1], steered.logits[:, -1]
        column = (z + weight * (other - z)).argmax(dim=-1, keepdim=True)
        written.append(int(column))
    return written


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0, -1.5])
def test_a_hand_written_guidance_loop(model: Any, tokenizer: Any, weight: float) -> None:
    model.generation_config.eos_token_id = None
    vector = torch.randn(32, generator=torch.Generator().manual_seed(7))
    ids = ids_of(tokenizer, PLAIN[0])
    by_hand = hand_written_guidance(model, ids, vector, 1.5, weight, steps=8)
    ours = dsteer.guided(
        model,
        tokenizer,
        [PLAIN[0]],
        SteeringVector(vector, "resid_post.1"),
        1.5,
        weight=weight,
        max_new_tokens=8,
    )
    written = list(ours.tokens[0])
    assert written == by_hand[: len(written)]
    assert len(written) == 8 or by_hand[len(written)] == tokenizer.eos_token_id
    if weight in (0.0, 1.0):  # the model as it is, and plain steering
        with ActivationInjector(model, {1: vector}, strength=1.5 * weight):
            alone = model.generate(ids, max_new_tokens=8, **GREEDY)[0, ids.shape[1] :]
        assert alone.tolist() == by_hand
