"""Gradients of the margin against the DPO loss itself, differentiated another way."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from planted import planted_pair, tiny_llama

from dsteer.activations.sites import FINAL_NORM, block_of
from dsteer.errors import ConfigError, DataError
from dsteer.geometry.preference import loss_weights, paired_cosines, preference_vectors
from dsteer.models.anatomy import Anatomy
from dsteer.models.readout import Readout
from dsteer.training.divergence import first_divergence
from dsteer.training.examples import Example
from dsteer.training.gradients import margin_gradients

SITES = ("resid_post.1", "resid_post.3", FINAL_NORM)
PAIRS = (
    Example((0, 40, 41, 42), (50, 51, 1), (50, 60, 61, 62, 1), False, "a"),
    Example((0, 70), (80, 1), (90, 91, 1), False, "b"),
    Example((0, 33, 34, 35, 36, 37), (44, 45, 46, 47), (44, 45, 46, 99), False, "c"),
)


def log_likelihood(model, prompt, answer) -> torch.Tensor:
    ids = torch.tensor([prompt + answer])
    log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    where = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return log_p[where, torch.tensor(answer)].sum()


def descent(policy, reference, example, site, beta, *, token=None) -> torch.Tensor:
    """−∇_v of the DPO loss, v a vector added to the site at every token, or at one; in floats."""
    v = torch.zeros(policy.config.hidden_size, requires_grad=True)
    anatomy = Anatomy.of(policy)
    block = block_of(site)
    module = anatomy.final_norm if block is None else anatomy.blocks[block]

    def add(_module, _inputs, output):
        state = Anatomy.read(output)
        where = torch.ones(state.shape[1], 1) if token is None else torch.zeros(state.shape[1], 1)
        if token is not None:
            where[token] = 1
        return Anatomy.write(output, state + where * v)

    handle = module.register_forward_hook(add)
    ratios = [log_likelihood(policy, example.prompt, a) for a in (example.chosen, example.rejected)]
    handle.remove()
    with torch.no_grad():
        of = [log_likelihood(reference, example.prompt, a)
              for a in (example.chosen, example.rejected)]  # fmt: skip
    loss = -torch.nn.functional.logsigmoid(beta * ((ratios[0] - ratios[1]) - (of[0] - of[1])))
    return -torch.autograd.grad(loss, v)[0].double()


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_the_dpo_losses_own_gradient(which: str) -> None:
    planted = planted_pair(2)
    policy, base = getattr(planted, which), planted.base
    beta = 0.3
    found = margin_gradients(policy, PAIRS, SITES)
    reference = margin_gradients(base, PAIRS, SITES).margins
    push = loss_weights(found.margins, reference, beta)
    for row, example in enumerate(PAIRS):
        index = first_divergence(example.chosen, example.rejected)
        assert index is not None
        last = len(example.prompt) + index - 1
        for site in SITES:
            for token, mine in ((None, found.sequence), (last, found.context)):
                expected = descent(policy, base, example, site, beta, token=token)
                got = push[row] * mine[site][row]
                assert float((got - expected).norm()) < 1e-5 * float(expected.norm())
    if which == "base":
        assert push.tolist() == [beta / 2] * 3
    else:
        assert float((push - beta / 2).abs().min()) > 1e-4


SMALL = {"vocab_size": 128, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere"])
def test_other_architectures(name: str) -> None:
    """Blocks that return tuples, a soft cap on the logits, a scale on the logits."""
    torch.manual_seed(0)
    if name == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_embd=32, n_layer=4, n_head=4))
    else:
        shape = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
        model = (
            tf.CohereForCausalLM(tf.CohereConfig(**shape))
            if name == "cohere"
            else tf.Gemma2ForCausalLM(tf.Gemma2Config(**shape, head_dim=8))
        )
    model.eval()
    found = margin_gradients(model, PAIRS, SITES)
    for row, example in enumerate(PAIRS):
        for site in SITES:
            expected = 2 * descent(model, model, example, site, 1.0)  # a pair weighs β/2
            got = found.sequence[site][row]
            assert float((got - expected).norm()) < 2e-5 * float(expected.norm())
    head = Readout.of(model)
    e = preference_vectors(head.weight, [51, 80, 47], [60, 90, 99], head.scale)
    error = float((found.context[FINAL_NORM] - e).norm() / e.norm())
    if name == "gemma2":
        assert head.softcap is not None
        assert error > 1e-5
    else:
        assert error < 1e-6
    assert (head.scale != 1) == (name == "cohere")


def test_at_final_norm_the_context_pushes_along_the_pairs_own_tokens() -> None:
    model = tiny_llama(3)
    found = margin_gradients(model, PAIRS, SITES)
    e = preference_vectors(model.lm_head.weight, [51, 80, 47], [60, 90, 99])
    assert float((found.context[FINAL_NORM] - e).norm() / e.norm()) < 1e-6
    # the third pair's answers end where they part: nothing but the context has a say
    cosines = paired_cosines(found.sequence[FINAL_NORM], e)
    assert float(cosines[2]) == pytest.approx(1, abs=1e-9)
    assert float(cosines[:2].max()) < 0.99
    swapped = [Example(p.prompt, p.rejected, p.chosen, False, p.conversation) for p in PAIRS]
    other = margin_gradients(model, swapped, SITES)
    assert float(paired_cosines(other.sequence[FINAL_NORM], e)[2]) == pytest.approx(-1, abs=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama(4)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    margin_gradients(model, PAIRS, SITES)
    with pytest.raises(DataError, match="pair 1: its answers do not diverge"):
        margin_gradients(model, [PAIRS[0], Example((0,), (5, 1), (5, 1), False, "")], SITES)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_refused() -> None:
    model = tiny_llama(5)
    with pytest.raises(DataError, match="at least one"):
        margin_gradients(model, [], SITES)
    with pytest.raises(ConfigError, match="no such site"):
        margin_gradients(model, PAIRS, ["embedding"])
