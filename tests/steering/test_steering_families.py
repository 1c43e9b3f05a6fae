"""Steering a model of any family: the site moves by λv, texts need no cache to be the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import FAMILIES, MORE, VOCAB, build, prompts_of, small
from planted import byte_tokenizer
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM

import dsteer
from dsteer.activations.extract import extract
from dsteer.data.tokens import Encoded
from dsteer.errors import ModelError
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.steering.intervene import Schedule, steer
from dsteer.steering.vector import SteeringVector

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

SITE = "resid_post.1"
V = torch.randn(32, generator=torch.Generator().manual_seed(1))
STRENGTH = -3.0
NEW = 5
ENDS = (1, 2)
PLAIN = {
    "gemma4", "gemma4-shared-keys", "deepseek-v3", "gpt-bigcode", "gpt-neo", "codegen", "mamba",
    "mamba2", "falcon-mamba", "bamba", "falcon-h1", "jamba", "zamba", "zamba2", "recurrent-gemma",
    "granite-moe-hybrid", "nemotron-h", "lfm2", "qwen3-next", "qwen3.5",
}  # fmt: skip
"""Of the families that no other test decodes, those whose sweeps go through ``generate``."""


def generated(
    model: Any,
    prompts: Sequence[Encoded],
    cache: bool,
    strength: float = STRENGTH,
    **settings: Any,
) -> list[tuple[int, ...]]:
    """Greedy texts of left-padded prompts, up to EOS."""
    width = max(len(item.ids) for item in prompts)
    ids = torch.tensor([[0] * (width - len(item.ids)) + list(item.ids) for item in prompts])
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    with torch.no_grad(), steer(model, V, strength, site=SITE, **settings):
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=cache,
            eos_token_id=list(ENDS), pad_token_id=0,
        )[:, width:].tolist()  # fmt: skip
    return [
        tuple(row[: next((i for i, token in enumerate(row) if token in ENDS), len(row))])
        for row in made
    ]


def loss_of_choice(model: Any, prompt: Encoded, tokens: Sequence[int], **settings: Any) -> float:
    """How far below the best a chosen token's logit lies at most, in one plain steered pass."""
    ids, p = torch.tensor([[*prompt.ids, *tokens]]), len(prompt.ids)
    with torch.no_grad(), steer(model, V, STRENGTH, site=SITE, prompt_lengths=[p], **settings):
        logits = model(ids, use_cache=False).logits[0, p - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max()) if tokens else 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_site_moves_by_the_vector(name: str) -> None:
    """Block 1's output by λv, block 0's by nothing, later ones by something else."""
    model, prompts = build(name), prompts_of((3, 8, 8))
    pair = ModelPair.load(model, model)
    clean = extract(pair, prompts, position="all").base
    with steer(model, V, STRENGTH, site=SITE):
        steered = extract(pair, prompts, position="all").base
    assert torch.equal(steered["resid_post.0"], clean["resid_post.0"])
    error = (steered[SITE] - clean[SITE] - STRENGTH * V).norm(dim=1)
    # one rounding of the sum, 6e-8 of it, where a wrong row or token is off by the vector's size
    assert float((error / steered[SITE].norm(dim=1)).max()) < 1e-6
    moved = (steered["resid_post.2"] - clean["resid_post.2"] - STRENGTH * V).norm(dim=1)
    assert float(moved.min()) > 1e-4 * float(V.norm())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", MORE)
def test_texts_are_the_same_without_a_cache_and_in_a_sweep(name: str) -> None:
    """Padded together with a cache, one by one without, and by ``sweep``: one text."""
    model, prompts = build(name), prompts_of((3, 8, 8))
    texts = set()
    for positions in ("all", "prompt_last"):
        alone = [generated(model, [p], False, positions=positions)[0] for p in prompts]
        together = generated(model, prompts, True, positions=positions)
        found = dsteer.sweep(
            model, byte_tokenizer(), prompts, SteeringVector(V, SITE), [0.0, STRENGTH], NEW,
            positions=positions,
        )  # fmt: skip
        if positions == "all":
            assert found.fast == (name not in PLAIN), found.note
        for prompt, wanted, *others in zip(prompts, alone, together, found.tokens[1], strict=True):
            for other in others:  # a difference must be a tie, up to rounding
                tied = loss_of_choice(model, prompt, other, positions=positions) < 1e-4
                assert other == wanted or tied
        assert found.tokens[0] != found.tokens[1]
        texts.add(found.tokens[1])
    assert len(texts) > 1


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "bamba", "gemma3-vision"])
def test_places_of_tokens_behind_padding(name: str) -> None:
    """Windows and schedules count a row's own tokens, where no mask comes with a state too."""
    model, prompts = build(name), prompts_of((2, 9))
    for settings in (
        {"positions": (3, 5)},
        {"positions": "generated", "schedule": Schedule("linear", steps=3)},
    ):
        settings["strength"] = -1.5
        alone = [generated(model, [p], False, **settings)[0] for p in prompts]
        assert generated(model, prompts, True, **settings) == alone
        assert alone != [
            generated(model, [p], False, positions="all", strength=-1.5)[0] for p in prompts
        ]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_head_gives_the_models_own_logits(name: str) -> None:
    """``Readout.of`` compares them, and refuses a head that it does not know."""
    assert Readout.of(build(name)).weight.shape == (VOCAB, 32)


def test_a_state_whose_prompt_was_not_seen_is_refused() -> None:
    model, ids = build("mamba"), torch.tensor([[5, 6, 7, 8]])
    cache = model(ids, use_cache=True).cache_params
    with (
        steer(model, V, site=SITE),
        pytest.raises(ModelError, match="recurrent state whose prompt was not seen"),
    ):
        model(ids[:, :1], cache_params=cache, use_cache=True)


def minimax() -> Any:
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    return MiniMaxForCausalLM(
        MiniMaxConfig(**small(num_local_experts=2, num_experts_per_tok=1, layer_types=kinds))
    ).eval()


def test_a_cache_without_a_length_is_refused() -> None:
    """Without it the model is steered; its cache would lose the place of tokens silently."""
    model, prompts = minimax(), prompts_of((4,))
    with pytest.raises(ModelError, match=r"a cache of its own \(MiniMaxCache\).*use_cache=False"):
        generated(model, prompts, True)
    assert len(generated(model, prompts, False)[0]) > 0


def test_the_mask_of_a_wrapper_is_not_kept_for_a_later_pass() -> None:
    """A pass through the decoder itself goes by its own mask."""
    model, ids = build("gemma3-vision"), torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    decoder, mask = model.get_decoder(), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    seen: list[Tensor] = []

    with torch.no_grad(), steer(model, V, site=SITE) as hooks:
        model(ids, attention_mask=mask, use_cache=False)
        handle = decoder.layers[1].register_forward_hook(
            lambda *_: seen.append(hooks.placement.index)
        )
        model(ids, attention_mask=mask, use_cache=False)
        decoder(ids, use_cache=False)
        handle.remove()
    assert [index.tolist()[0] for index in seen] == [[-1, -1, 0, 1], [0, 1, 2, 3]]
