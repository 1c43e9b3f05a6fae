"""Hooks: what they see, that they copy, and that they always go."""

from __future__ import annotations

import pytest
import torch
from planted import tiny_llama

from dsteer.activations.capture import Capture, select_means, select_tokens
from dsteer.activations.sites import all_sites
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy, evaluating

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 5, 5]])


@pytest.fixture
def model():
    return tiny_llama()


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def read(model, sites=("resid_post.1",), ranges=(range(3, 4), range(1, 2))):
    with evaluating(model), Capture(Anatomy.of(model), sites) as capture:
        return capture.read(IDS, select_tokens(ranges))


def test_selected_tokens_and_means(model) -> None:
    with evaluating(model), Capture(Anatomy.of(model), ["final_norm"]) as capture:
        every = capture.read(IDS, select_tokens([range(4), range(4)]))
        states = every["final_norm"].view(2, 4, -1)
        mean = capture.read(IDS, select_means([range(4), range(2)], 4))
    last = read(model, ["final_norm"])["final_norm"]
    assert torch.equal(last, torch.stack([states[0, 3], states[1, 1]]))
    expected = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
    # float32 sums of four numbers of size 1: a few units in the last place
    assert torch.allclose(mean["final_norm"], expected, atol=1e-6)


def test_capture_equals_hidden_states(model) -> None:
    n = len(model.model.layers)
    ranges = [range(4), range(4)]
    found = read(model, all_sites(n), ranges)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    for k in range(n - 1):
        assert torch.equal(found[f"resid_post.{k}"].view(2, 4, -1), states[k + 1])
    assert torch.equal(found["final_norm"].view(2, 4, -1), states[-1])


def test_hooks_go_after_success_and_after_failure(model) -> None:
    before = hooks_of(model)
    read(model)
    assert hooks_of(model) == before

    def fail(*_args: object) -> None:
        raise RuntimeError("stop")

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        read(model)
    handle.remove()
    assert hooks_of(model) == before


def test_no_hook_stays_where_entering_fails(model, monkeypatch) -> None:
    with pytest.raises(IndexError), Capture(Anatomy.of(model), ["resid_post.0", "resid_post.9"]):
        pass
    assert hooks_of(model) == 0

    def refuse(*_args: object) -> None:
        raise RuntimeError("no hooks on this module")

    monkeypatch.setattr(model.model.layers[2], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks"):
        read(model, ["resid_post.0", "resid_post.2"])
    assert hooks_of(model) == 0


def test_training_flags_return(model) -> None:
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    read(model)
    assert [module.training for module in model.modules()] == flags


def test_captured_states_are_copies(model) -> None:
    """Trap 21: what runs later may change a state in place."""
    expected = read(model)["resid_post.1"]

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.zero_()

    select = select_tokens([range(3, 4), range(1, 2)])
    with evaluating(model), Capture(Anatomy.of(model), ["resid_post.1"]) as capture:
        handle = model.model.layers[1].register_forward_hook(spoil)  # runs after the capture
        states = capture.read(IDS, select)
        handle.remove()
    assert torch.equal(states["resid_post.1"], expected)


def test_capture_sees_earlier_hooks_and_not_later_ones(model) -> None:
    """Trap 20: hooks run in the order of registration."""
    shift = torch.full((32,), 0.5)
    plain = read(model)["resid_post.1"]

    def steer(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + shift

    block = model.model.layers[1]
    handle = block.register_forward_hook(steer)
    assert torch.equal(read(model)["resid_post.1"], plain + shift)
    handle.remove()

    select = select_tokens([range(3, 4), range(1, 2)])
    with evaluating(model), Capture(Anatomy.of(model), ["resid_post.1"]) as capture:
        handle = block.register_forward_hook(steer)
        assert torch.equal(capture.read(IDS, select)["resid_post.1"], plain)
        handle.remove()
        handle = block.register_forward_hook(steer, prepend=True)  # first in the queue after all
        assert torch.equal(capture.read(IDS, select)["resid_post.1"], plain + shift)
        handle.remove()


def test_a_module_that_runs_twice_is_refused(model) -> None:
    anatomy = Anatomy.of(model)
    model.model.layers[2] = model.model.layers[1]
    with (
        evaluating(model),
        Capture(anatomy, ["resid_post.1"]) as capture,
        pytest.raises(ModelError, match=r"resid_post\.1: its module ran twice"),
    ):
        capture.read(IDS, select_tokens([range(3, 4), range(1, 2)]))


def test_a_block_that_is_skipped_is_noticed(model) -> None:
    anatomy = Anatomy.of(model)
    model.config.num_hidden_layers = 3  # the decoder now stops before block 3
    with (
        Capture(anatomy, ["resid_post.3"]) as capture,
        pytest.raises(ModelError, match=r"resid_post\.3: its module did not run"),
    ):
        capture.read(IDS, select_tokens([range(1), range(1)]))


def test_a_pass_of_somebody_else_is_not_captured(model) -> None:
    anatomy = Anatomy.of(model)
    with evaluating(model), Capture(anatomy, ["resid_post.0"]) as capture:
        anatomy.decoder(IDS, use_cache=False)
        anatomy.decoder(IDS, use_cache=False)
        states = capture.read(IDS, select_tokens([range(1), range(1)]))
    assert torch.equal(
        states["resid_post.0"], read(model, ["resid_post.0"], [range(1)] * 2)["resid_post.0"]
    )


def test_the_head_is_not_run(model) -> None:
    def fail(*_args: object) -> None:
        raise AssertionError("the head ran")

    model.lm_head.register_forward_hook(fail)
    read(model)


def test_low_precision_states_become_float32(model) -> None:
    states = read(model.to(torch.bfloat16), ["resid_post.0", "final_norm"])
    assert {state.dtype for state in states.values()} == {torch.float32}
