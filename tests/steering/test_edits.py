"""Changes of states token by token, against hooks written by hand and the tuned model itself."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, build, prompts_of
from planted import PROMPTS, byte_tokenizer, planted_pair

from dsteer.activations.extract import extract
from dsteer.behaviour.teacher_forced import predictions, score_states
from dsteer.data.tokens import Encoded
from dsteer.errors import MeasurementError
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.steering.arms import Steering, steered_states
from dsteer.steering.edits import Edit, adding, edited_states, patched

SITES = ("resid_post.0", "resid_post.1", "resid_post.2", "resid_post.3", "final_norm")


def texts(count: int = 5) -> list[Encoded]:
    tokenizer = byte_tokenizer()
    found = []
    for number, prompt in enumerate(PROMPTS[:count]):
        start = tokenizer(prompt)["input_ids"]
        answer = tokenizer(" Yes, that is so" + "!" * number, add_special_tokens=False)["input_ids"]
        found.append(Encoded(tuple(start + answer), len(start)))
    return found


def gathered(batches, count):
    found = {}
    for numbers, states in batches:
        lengths = [len(texts(count)[n].ids) - texts(count)[n].prompt_length for n in numbers]
        found |= dict(zip(numbers, torch.split(states, lengths, dim=1), strict=True))
    return torch.cat([found[n] for n in range(count)], dim=1)


@pytest.mark.parametrize("tokens", ["all", "prompt_last", "generated"])
def test_equals_one_hook_at_a_time(tokens: str) -> None:
    planted = planted_pair(block=1)
    acts = extract(planted.pair, texts(), sites="all", position="all")
    edits = [Edit(site, change) for site in SITES for change in (patched, adding(planted.b, 0.5))]
    edits = [edits[i] for i in (3, 0, 9, 1, 2, 8, 4, 5, 6, 7)]  # any order
    got = gathered(edited_states(planted.base, acts, edits, tokens=tokens), 5)
    modules = [*planted.base.model.layers, planted.base.model.norm]
    for number, edit in enumerate(edits):
        rows = []
        for i, item in enumerate(texts()):
            start, p, n = acts.offsets[i], item.prompt_length, len(item.ids) - 1
            aim = acts.tuned[edit.site][start : start + n]
            changed = {"all": range(n), "prompt_last": [p - 1], "generated": range(p - 1, n)}

            def hook(_m, _i, state, aim=aim, edit=edit, where=changed[tokens]):
                state = state.clone()
                for column in where:
                    state[0, column] = edit.change(state[0, column], aim[column])
                return state

            handle = modules[SITES.index(edit.site)].register_forward_hook(hook)
            with torch.no_grad():
                out = planted.base.model(torch.tensor([item.ids[:-1]])).last_hidden_state
            handle.remove()
            rows.append(out[0, p - 1 :])
        want = torch.cat(rows)
        # float32: other batch shapes round otherwise
        assert float((got[number] - want).norm() / want.norm()) < 1e-5, edit.site


def test_planted_constant_is_all_of_the_change_from_its_block_on() -> None:
    planted = planted_pair(block=1)
    acts = extract(planted.pair, texts(), sites="all", position="all")
    edits = [Edit(site, patched) for site in SITES]
    edits += [Edit(site, adding(planted.b)) for site in SITES]
    target = predictions(planted.tuned, texts(), Readout.of(planted.tuned))
    scores = score_states(
        edited_states(planted.base, acts, edits),
        len(edits), texts(), Readout.of(planted.base), target,
    )  # fmt: skip
    kl = scores.kl.sum(dim=1)
    plain = score_states(
        steered_states(planted.base, texts(), Steering.none(32)),
        1, texts(), Readout.of(planted.base), target,
    ).kl.sum()  # fmt: skip
    assert float(plain) > 0.1
    recovered = 1 - kl / plain
    # float32 rounding of the states: KL is second order in it
    assert recovered[0].abs() < 1e-6
    assert torch.allclose(recovered[1:5], torch.ones(4, dtype=torch.float64), atol=1e-6)
    assert abs(float(recovered[6]) - 1) < 1e-6  # b added at its own block
    assert all(float(recovered[number]) < 0.999 for number in (5, 7, 8, 9))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_patching_each_site_of_each_architecture_leads_to_the_tuned_states(name: str) -> None:
    """A model patched with its own states is itself, at every site and in any batch."""
    model = build(name)
    items = [Encoded(item.ids, len(item.ids) - 2) for item in prompts_of((5, 8, 13))]
    acts = extract(ModelPair.load(model, model), items, sites="all", position="all")
    sites = [site for site in acts.sites if site != "encoder"]
    states = dict.fromkeys(range(3), torch.empty(0))
    none = Steering.none(acts.tuned[sites[0]].shape[1])
    for numbers, rows in steered_states(model, items, none):
        states |= dict(zip(numbers, torch.split(rows[0], 2), strict=True))
    for numbers, rows in edited_states(model, acts, [Edit(site, patched) for site in sites]):
        want = torch.cat([states[number] for number in numbers])
        for number, site in enumerate(sites):
            error = float((rows[number] - want).norm() / want.norm())
            assert error < 1e-4, site  # float32: batches of another shape round otherwise


def test_refusals() -> None:
    planted = planted_pair(block=1)
    acts = extract(planted.pair, texts(2), sites=["resid_post.1"], position="all")
    with pytest.raises(MeasurementError, match="no edits"):
        next(edited_states(planted.base, acts, []))
    with pytest.raises(MeasurementError, match=r"resid_post\.2: its states were not read"):
        next(edited_states(planted.base, acts, [Edit("resid_post.2", patched)]))
    last = extract(planted.pair, texts(2), sites=["resid_post.1"])
    with pytest.raises(MeasurementError, match="position all"):
        next(edited_states(planted.base, last, [Edit("resid_post.1", patched)]))
