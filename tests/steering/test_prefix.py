"""Prefix contrast: the recipe of means over prompt tokens, samples, and categories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planted import byte_tokenizer, tiny_llama
from reference import builders

from dsteer import DsteerError, steer
from dsteer.data.types import PreferencePair
from dsteer.steering.prefix import prefix_contrast

PROMPTS = ["How do I boil an egg?", "Name a river.", "Tea", "What is far, and what is near to it?"]
KINDS = {"warm": ["Be warm.", "Be kind."], "brief": ["Few words!"], "grand": ["Be grand:", "O,"]}


def means(model: Any, text: str) -> np.ndarray:
    """The mean over a text's tokens of each block's output: hidden_states[k + 1] is block k's."""
    ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    blocks = hidden[1:-1]  # the last entry is behind the final norm
    return np.array([state[0].double().mean(dim=0).numpy() for state in blocks])


def test_the_recipe() -> None:
    """Five samples a prompt, every layer, unit-normalised, mean over categories: by hand."""
    model = tiny_llama()
    ours = prefix_contrast(model, byte_tokenizer(), PROMPTS, KINDS, samples=4)
    categories = []
    for prefixes in KINDS.values():
        per_prompt = [
            means(model, prompt)
            - np.mean([means(model, f"{prefix} {prompt}") for prefix in prefixes], axis=0)
            for prompt in PROMPTS
        ]  # 4 samples of 2 prefixes: each twice
        d = np.mean(per_prompt, axis=0)
        categories.append((d, d / np.linalg.norm(d, axis=1, keepdims=True)))
    expected = np.mean([unit for _, unit in categories], axis=0)
    raw = np.mean([d for d, _ in categories], axis=0)
    sizes = prefix_contrast(model, byte_tokenizer(), PROMPTS, KINDS, samples=4, normalise=None)
    back = prefix_contrast(
        model, byte_tokenizer(), PROMPTS, KINDS, samples=4, direction="to_prefixed"
    )
    for block, v in enumerate(expected):
        site = f"resid_post.{block}"
        # float32 states of size 5 and mean differences of size 0.5
        np.testing.assert_allclose(ours[site].tensor.numpy(), v, atol=1e-5)
        np.testing.assert_allclose(sizes[site].tensor.numpy(), raw[block], atol=1e-5)
        assert torch.equal(back[site].tensor, -ours[site].tensor)
        told = ours[site].metadata
        norms = [np.linalg.norm(d[block]) for d, _ in categories]
        assert list(told["category_norms"].values()) == pytest.approx(norms, rel=1e-4)
        assert told["n"] == 4
    assert ours.metadata["categories"] == {"warm": 2, "brief": 1, "grand": 2}
    assert ours.metadata["direction"] == "from prefixed to plain"
    assert sizes.metadata["units"] == "states"


def test_a_hook_on_the_block_before_the_states_index_undoes_the_prefix() -> None:
    """The vector of block k, added to its output, moves prefixed states to the plain ones."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    v = prefix_contrast(model, tokenizer, PROMPTS, KINDS["warm"], samples=2, normalise=None)
    prefixed = [f"{prefix} {prompt}" for prompt in PROMPTS for prefix in KINDS["warm"]]
    plain = np.mean([means(model, text) for text in PROMPTS], axis=0)
    before = np.mean([means(model, text) for text in prefixed], axis=0)
    k = 2
    after: list[torch.Tensor] = []
    with steer(model, v[f"resid_post.{k}"]):
        # hidden_states are caught by older hooks, so this one reads what the next block gets
        handle = model.model.layers[k + 1].register_forward_pre_hook(
            lambda _module, args: after.append(args[0][0].double().mean(dim=0))
        )
        for text in prefixed:
            with torch.no_grad():
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        handle.remove()
    assert np.linalg.norm(before[k] - plain[k]) > 0.1
    # float32
    np.testing.assert_allclose(torch.stack(after).mean(dim=0).numpy(), plain[k], atol=1e-5)


def test_samples_are_different_prefixes_by_seed() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    prefixes = ["A", "Be", "Cat", "Done", "Eggs"]

    def build(samples: int, seed: int) -> np.ndarray:
        found = prefix_contrast(
            model, tokenizer, ["Tea?"], prefixes, samples=samples, seed=seed, normalise=None
        )
        return found["resid_post.0"].tensor.numpy()

    single = {p: means(model, "Tea?")[0] - means(model, f"{p} Tea?")[0] for p in prefixes}
    pairs = [(single[a] + single[b]) / 2 for a in prefixes for b in prefixes if a < b]
    drawn = [build(2, seed) for seed in range(6)]
    for v in drawn:  # each is the mean of two different ones
        assert min(np.abs(v - pair).max() for pair in pairs) < 1e-5
    assert len({tuple(v.round(4)) for v in drawn}) > 1
    np.testing.assert_array_equal(build(2, 3), drawn[3])
    np.testing.assert_allclose(build(5, 0), np.mean(list(single.values()), axis=0), atol=1e-5)


def test_answers_are_read_with_their_prompts() -> None:
    """Greedy answers, so that the model's own generate gives the same texts."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    settings = {"new_tokens": 5, "normalise": None}
    ours = prefix_contrast(
        model, tokenizer, PROMPTS[:2], "Be warm.", temperature=0.0, samples=2, **settings
    )

    def mean_of_answered(text: str) -> np.ndarray:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=5, do_sample=False)
            assert whole.shape[1] == ids.shape[1] + 5
            hidden = model(input_ids=whole, output_hidden_states=True).hidden_states
        return hidden[1][0].double().mean(dim=0).numpy()

    expected = builders.difference(
        np.array([mean_of_answered(text) for text in PROMPTS[:2]]),
        np.array([mean_of_answered(f"Be warm. {text}") for text in PROMPTS[:2]]),
    )
    np.testing.assert_allclose(ours["resid_post.0"].tensor.numpy(), expected, atol=1e-5)
    drawn = [
        prefix_contrast(model, tokenizer, PROMPTS[:2], "Be warm.", seed=seed, **settings)
        for seed in (0, 0, 1)
    ]
    first, again, other = (found["resid_post.0"].tensor for found in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_where_a_prefix_stands() -> None:
    """Before the user's first words, in messages, transcripts and plain texts alike."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    message = [{"role": "system", "content": "S"}, {"role": "user", "content": "Tea?"}]
    same = {
        "messages": (message, "<s><system>S\n<user>Be warm. Tea?\n<assistant>"),
        "transcript": ("\n\nHuman: Tea?\n\nAssistant:", "\n\nHuman: Be warm. Tea?\n\nAssistant:"),
        "pair": (PreferencePair("Tea?", "Yes", "No"), "Be warm. Tea?"),
    }
    for prompt, text in same.values():
        ours = prefix_contrast(
            model, tokenizer, [prompt], "Be warm.", position="last", normalise=None
        )
        ids = tokenizer(text.removeprefix("<s>"), return_tensors="pt")["input_ids"]
        plain = tokenizer(text.removeprefix("<s>").replace("Be warm. ", ""), return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            states = [
                model(input_ids=one, output_hidden_states=True).hidden_states[2][0, -1].double()
                for one in (plain, ids)
            ]
        torch.testing.assert_close(
            ours["resid_post.1"].tensor, states[0] - states[1], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples 0: expected 1 or more"),
        ({"new_tokens": -1}, "new_tokens -1: expected 0 or more"),
        ({"direction": "to_plane"}, "direction 'to_plane': no such direction; did you mean"),
        ({"position": "all"}, "position 'all': no such position"),
        ({"prefixes": []}, r"category 'prefix' has the prefixes \[\]"),
        ({"prefixes": {}}, "there are no prefixes"),
        ({"prefixes": {"a": [""]}}, "category 'a' has the prefixes"),
        ({"prompts": []}, "category 'prefix': expected a list of prompts"),
        ({"prompts": {"b": PROMPTS}, "prefixes": {"a": "A"}}, "expected the same categories"),
        ({"prompts": [[{"role": "system", "content": "x"}]]}, "without a message of the user"),
        ({"prompts": ["Hi.", "x" * 300]}, "prompt 1 with its prefix is longer than the model"),
        ({"max_tokens": 8}, "prompt 0 with its prefix is longer than the model"),
        ({"component": "head"}, "component 'head': no such component"),
    ],
)
def test_mistakes_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "prefixes": "Be warm.", **changes}
    with pytest.raises(DsteerError, match=message) as caught:
        prefix_contrast(tiny_llama(), byte_tokenizer(), **arguments)
    assert "\n" not in str(caught.value)
