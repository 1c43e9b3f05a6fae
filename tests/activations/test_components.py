"""The sites inside a block: what attention and MLP add to the residual stream."""

from __future__ import annotations

import architectures
import pytest
import torch
from planted import byte_tokenizer, tiny_llama

from dsteer.activations.capture import Capture, select_tokens
from dsteer.activations.sites import resolve_sites, site_order
from dsteer.errors import ConfigError, ModelError
from dsteer.models.anatomy import Anatomy, evaluating
from dsteer.steering.decode import sweep
from dsteer.steering.intervene import Intervention, steer
from dsteer.steering.vector import SteeringVector

NORMS_BEHIND = {"gemma2", "gemma3", "olmo2"}
ADD_THE_STREAM = {"bloom", "mpt"}
NO_MODULE = {"opt"}  # its MLP's layers stand in the block themselves
PLAIN = sorted(set(architectures.ARCHITECTURES) - NORMS_BEHIND - ADD_THE_STREAM - NO_MODULE)
IDS = torch.tensor([[5, 9, 2, 7, 11]])


def states_of(model: torch.nn.Module, sites: tuple[str, ...]) -> dict[str, torch.Tensor]:
    with evaluating(model), Capture(Anatomy.of(model), sites) as capture:
        return capture.read(IDS, select_tokens([range(5)]))


@pytest.mark.parametrize("name", PLAIN)
def test_parts_sum_to_what_a_block_adds(name: str) -> None:
    model = architectures.build(name)
    sites = resolve_sites(["resid_post.0", "resid_post.1", "attn_out.1", "mlp_out.1"], 2)
    assert sites == ("resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1")
    states = states_of(model, sites)
    added = states["resid_post.1"] - states["resid_post.0"]
    # float32: the sum of three numbers, rounded in another order
    torch.testing.assert_close(
        states["attn_out.1"] + states["mlp_out.1"], added, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", sorted(ADD_THE_STREAM))
def test_parts_that_add_the_stream_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="adds the residual stream by itself"):
        states_of(architectures.build(name), ("mlp_out.1",))


def test_a_block_without_the_part_is_refused() -> None:
    with pytest.raises(ModelError, match=r"OPTDecoderLayer has 0 parts that could be its mlp"):
        states_of(architectures.build("opt"), ("mlp_out.0",))


def test_steering_a_part_shifts_the_stream_by_as_much() -> None:
    model = architectures.build("llama")
    v = SteeringVector(torch.linspace(-1, 1, Anatomy.of(model).width), "mlp_out.1")
    plain = states_of(model, ("resid_post.0", "mlp_out.1", "resid_post.1"))
    with steer(model, v, 2.0):
        steered = states_of(model, ("resid_post.0", "mlp_out.1", "resid_post.1"))
    assert torch.equal(plain["resid_post.0"], steered["resid_post.0"])
    for site in ("mlp_out.1", "resid_post.1"):
        expected = plain[site] + 2 * v.tensor.float()
        torch.testing.assert_close(steered[site], expected, rtol=1e-6, atol=1e-6)


def test_a_sweep_at_a_part_equals_generate_under_a_hook() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    v = SteeringVector(torch.linspace(-3, 3, Anatomy.of(model).width), "attn_out.0")
    result = sweep(model, tokenizer, ["ab", "abcd"], v, [0.0, 1.5], 6)
    assert not result.fast
    assert "inside a block" in (result.note or "")
    with steer(model, Intervention("attn_out.0", v, strength=1.5)):
        ids = tokenizer("ab", return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tuple(out[0, ids.shape[1] :].tolist()) == result.tokens[1][0]


def test_groups_and_order() -> None:
    assert resolve_sites("attn_out", 2) == ("attn_out.0", "attn_out.1")
    assert resolve_sites("all", 2) == ("resid_post.0", "resid_post.1", "final_norm")
    mixed = ["final_norm", "mlp_out.1", "resid_post.0", "attn_out.1", "encoder"]
    assert sorted(mixed, key=site_order) == [
        "encoder", "resid_post.0", "attn_out.1", "mlp_out.1", "final_norm",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"the model has 2 blocks"):
        resolve_sites("mlp_out.2", 2)
    with pytest.raises(ConfigError, match="no such site"):
        resolve_sites("mlp.1", 2)
