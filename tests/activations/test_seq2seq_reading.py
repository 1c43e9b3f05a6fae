"""States of encoder-decoder models: those that transformers reports, one prompt at a time.

The bound is the project's, 1e-5 of the state's norm in float32: rounding is near 1e-6, a token
that saw padding or a wrong row is off by 1e-2 and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seq2seq_models import FAMILIES, planted_seq2seq, random_rows, seq2seq
from torch import Tensor

from dsteer.activations.extract import PairedActivations, extract
from dsteer.activations.reading import Reading
from dsteer.errors import ConfigError
from dsteer.models.anatomy import Anatomy
from dsteer.models.pair import ModelPair
from dsteer.models.seq2seq import POST_NORM

BOUND = 1e-5
ROWS = random_rows()


def own_states(model: Any, row: Any, start: tuple[int, ...]) -> dict[str, Tensor]:
    """All states of one prompt by transformers' own account: (tokens, d) a site."""
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([row.ids[: row.prompt_length]]),
            decoder_input_ids=torch.tensor([[*start, *row.ids[row.prompt_length :]]]),
            output_hidden_states=True,
            use_cache=False,
        )
    states = {"encoder": output.encoder_last_hidden_state[0]}
    blocks = output.decoder_hidden_states[1:]
    # the last entry is after the final norm, where there is one: there it is no block's output
    inner = blocks if POST_NORM[model.config.model_type] else blocks[:-1]
    states |= {f"resid_post.{k}": state[0] for k, state in enumerate(inner)}
    return states | {"final_norm": blocks[-1][0]}


def wanted(states: Tensor, position: str, site: str, start: int, answer: int) -> Tensor:
    """What a position means, by hand: columns of the encoder, or of start and answer."""
    first = start - 1
    if site == "encoder":
        return {
            "prompt_last": states[-1:],
            "prompt_mean": states.mean(0, keepdim=True),
            "all": states,
        }[position]
    return {
        "prompt_last": states[first : first + 1],
        "response_last": states[-1:],
        "response_mean": states[start:].mean(0, keepdim=True),
        "response_predictors": states[first : first + answer],
        "context_last": states[-1:],
        "all": states[first:],
    }[position]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 90])
def test_states_are_the_models_own(family: str, batch_tokens: int) -> None:
    model = seq2seq(family)
    start = Anatomy.of(model).start
    pair = ModelPair.load(model, model)
    asked = [("prompt_last", "all"), ("response_mean", "all"), ("prompt_mean", "encoder")]
    if family in {"t5", "bart-forced-bos"}:
        asked += [("all", "all"), ("all", "encoder")]
        asked += [(p, "all") for p in ("response_last", "response_predictors", "context_last")]
    own = [own_states(model, row, start) for row in ROWS]
    for position, sites in asked:
        read = extract(pair, ROWS, sites=sites, position=position, batch_tokens=batch_tokens)
        expected_sites = ["encoder"] if sites == "encoder" else [
            *(["encoder"] if position == "prompt_last" else []),
            *(f"resid_post.{k}" for k in range(3)),
            "final_norm",
        ]  # fmt: skip
        assert list(read.sites) == expected_sites
        for site in read.sites:
            if site not in own[0]:
                continue  # the last block of a pre-norm model: see the planted pair
            expected = torch.cat([
                wanted(states[site], position, site, len(start), len(row.ids) - row.prompt_length)
                for states, row in zip(own, ROWS, strict=True)
            ])  # fmt: skip
            gap = (read.base[site] - expected).norm(dim=1) / expected.norm(dim=1)
            assert float(gap.max()) < BOUND, (site, position)
            assert read.offsets[-1] == len(expected)


@pytest.mark.parametrize("family", ["bart", "mbart", "t5", "t5-gated-untied"])
@pytest.mark.parametrize("block", [0, 2])
def test_planted_displacement(family: str, block: int) -> None:
    base, tuned, b = planted_seq2seq(family, block)
    read = extract(ModelPair.load(base, tuned), ROWS, position="all", batch_tokens=60)
    for k in range(block):
        assert not read.displacement(f"resid_post.{k}").any()
    delta = read.displacement(f"resid_post.{block}")
    # float32 rounding of states of norm 6 to 60
    assert torch.allclose(delta, b.double().expand_as(delta), atol=3e-5)
    assert float((read.displacement("final_norm")).norm(dim=1).min()) > 0.05
    encoder = extract(ModelPair.load(base, tuned), ROWS, sites="encoder")
    assert not encoder.displacement("encoder").any()


def test_final_norm_of_a_post_norm_model_is_its_last_block() -> None:
    pair = ModelPair.load(seq2seq("bart"), seq2seq("bart", 1))
    read = extract(pair, ROWS)
    assert torch.equal(read.base["final_norm"], read.base["resid_post.2"])
    assert any("final_norm is the last block's output" in note for note in pair.notes)
    assert not any("post-norm" in n for n in ModelPair.load(*[seq2seq("mbart")] * 2).notes)


@pytest.mark.parametrize(
    ("sites", "position", "message"),
    [
        ("all", "prompt_mean", "the decoder of an encoder-decoder model reads no prompt"),
        (("encoder", "final_norm"), "all", "the decoder's rows are other tokens"),
        ("encoder", "response_last", "the encoder reads the prompt alone"),
        ("resid_post.3", "prompt_last", "the model has 3 blocks"),
    ],
)
def test_positions_that_a_stack_lacks(sites, position: str, message: str) -> None:
    model = seq2seq("t5")
    with pytest.raises(ConfigError, match=message):
        Reading.of(ModelPair.load(model, model), ROWS, sites=sites, position=position)


def test_stored_states_know_whose_tokens_all_means(tmp_path) -> None:
    base, tuned, _ = planted_seq2seq("t5", 1)
    pair = ModelPair.load(base, tuned)
    for sites in ("all", "encoder"):
        read = extract(pair, ROWS, sites=sites, position="all", folder=tmp_path / sites)
        again = PairedActivations.open(tmp_path / sites)
        assert again.offsets == read.offsets
        few = again.select(slice(2, 5))
        rows = slice(read.offsets[2], read.offsets[5])
        assert torch.equal(few.base[read.sites[0]], read.base[read.sites[0]][rows])
