"""A planted refusal direction is found, and chosen on prompts that it was not fitted on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from planted import byte_tokenizer, tiny_llama

from dsteer import DsteerError
from dsteer.steering.refusal import refusal_direction

WORDS = ("apple", "river", "stone", "cloud", "bread", "lemon", "chair", "music", "paper", "table")
MARKED = [f"Tell me of {word}s!" for word in WORDS]
PLAIN = [f"Tell me of {word}s?" for word in WORDS]
SIZE = 6.0


def refusing_model() -> tuple[Any, torch.Tensor]:
    """A Llama that begins its answer with "I" where the prompt ends with "!", through one axis.

    The embedding of "!" is that of "?" plus SIZE r, nothing else in embeddings or head lies along
    r but the row of "I" in the head, and blocks add little.
    """
    model, tokenizer = tiny_llama(initializer_range=0.05), byte_tokenizer()
    bang, ask, word = (tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "!?I")
    generator = torch.Generator().manual_seed(5)
    r = torch.randn(32, generator=generator)
    r /= r.norm()
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.randn(embedding.shape, generator=generator) / 2)
        for matrix in (embedding, head):
            matrix -= (matrix @ r)[:, None] * r
        embedding[bang] = embedding[ask] + SIZE * r
        head[word] = 3 * r
    return model, r.double()


def log_p(model: Any, text: str) -> np.ndarray:
    ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].double().log_softmax(-1).numpy()


def odds(model: Any, texts: list[str], token: int) -> float:
    scores = []
    for text in texts:
        p = math.exp(log_p(model, text)[token])
        scores.append(math.log(p) - math.log1p(-p))
    return sum(scores) / len(scores)


def test_the_planted_direction_is_found_and_its_scores_are_those_of_plain_hooks() -> None:
    model, r = refusing_model()
    token = byte_tokenizer()("I", add_special_tokens=False)["input_ids"][0]
    marked, plain = MARKED[:6], PLAIN[:6]
    found = refusal_direction(
        model, byte_tokenizer(), marked, plain, validation=(MARKED[6:], PLAIN[6:]), positions=2
    )
    told = found.metadata
    assert told["chosen"] in found
    assert told["chosen_token"] == -1  # "s", the token before, stands in both
    assert told["refusal_tokens"] == [token]  # the other words are no single bytes
    v = found["resid_post.0"]
    assert float(v.tensor @ r) / v.norm > 0.999
    assert v.norm == pytest.approx(SIZE, rel=0.02)  # what a block adds: 1%
    assert told["plain"]["harmful"] > 5
    assert told["plain"]["harmless"] < -3
    assert told["plain"]["harmful"] == pytest.approx(odds(model, MARKED[6:], token), rel=1e-4)
    chosen = min((c for c in told["candidates"] if c["eligible"]), key=lambda c: c["bypass"])
    assert chosen["site"] == told["chosen"]
    assert not any(c["eligible"] for c in told["candidates"] if c["token"] == -2)

    unit = (v.tensor / v.norm).float()
    before = [log_p(model, text) for text in PLAIN[6:]]
    ablate = [
        block.register_forward_hook(lambda _m, _i, out: out - (out @ unit)[..., None] * unit)
        for block in model.model.layers
    ]
    bypass = odds(model, MARKED[6:], token)
    after = [log_p(model, text) for text in PLAIN[6:]]
    for handle in ablate:
        handle.remove()
    kl = np.mean([(np.exp(p) * (p - q)).sum() for p, q in zip(before, after, strict=True)])
    add = model.model.layers[0].register_forward_hook(lambda _m, _i, out: out + v.tensor.float())
    induce = odds(model, PLAIN[6:], token)
    add.remove()
    # float32 logits
    assert v.metadata["bypass"] == pytest.approx(bypass, rel=1e-3)
    assert v.metadata["induce"] == pytest.approx(induce, rel=1e-3)
    assert v.metadata["kl"] == pytest.approx(kl, rel=1e-2, abs=1e-7)
    assert v.metadata["eligible"]
    assert bypass < 0 < induce


def test_the_split_leaves_prompts_out() -> None:
    model, _ = refusing_model()
    found = refusal_direction(model, byte_tokenizer(), [*MARKED, MARKED[0]], PLAIN, layers=[1])
    assert list(found) == ["resid_post.1"]
    assert found.metadata["prompts"] == {
        "harmful prompts": 8, "harmless prompts": 8,
        "harmful validation prompts": 2, "harmless validation prompts": 2,
    }  # fmt: skip
    assert found["resid_post.1"].metadata["n_harmful"] == 8
    other = refusal_direction(model, byte_tokenizer(), MARKED, PLAIN, layers=[1], seed=1)
    assert other.metadata["data_sha256"] != found.metadata["data_sha256"]


def test_nothing_is_chosen_where_nothing_is_eligible() -> None:
    model, _ = refusing_model()
    none = refusal_direction(model, byte_tokenizer(), PLAIN, [f"{p} " for p in PLAIN], layers=[0])
    assert none.metadata["chosen"] is None
    assert "makes refusal likelier than not" in none.metadata["chosen_note"]
    strict = refusal_direction(model, byte_tokenizer(), MARKED, PLAIN, layers=[3], depth=0.5)
    assert strict.metadata["chosen"] is None
    assert "in the first 0.5 of 4 layers" in strict.metadata["chosen_note"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harmful": MARKED[:1]}, "there are no harmful prompts"),
        ({"harmless": []}, "there are no harmless prompts"),
        ({"harmless": MARKED}, "stands in the harmful"),
        ({"validation": (MARKED[:2], PLAIN[:2])}, "not chosen on what it is fitted on"),
        ({"validation": 1.0}, "validation 1.0: expected a share between 0 and 1"),
        ({"refusal_tokens": ["Sorry"]}, "is one token of this tokenizer"),
        ({"refusal_tokens": [999]}, "refusal token 999: the model has the ids 0 to 259"),
        ({"positions": 0}, "positions 0: expected at least 1"),
        ({"positions": 99}, "the shortest prompt has"),
        ({"depth": 0.0}, "depth 0.0: expected a share"),
        ({"max_kl": 0.0}, "max_kl 0.0: expected nats above 0"),
        ({"layers": [7]}, "the model has 4 blocks"),
        ({"template": "jinja"}, "template 'jinja'"),
    ],
)
def test_mistakes_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"harmful": MARKED, "harmless": PLAIN, **changes}
    with pytest.raises(DsteerError, match=message) as caught:
        refusal_direction(refusing_model()[0], byte_tokenizer(), **arguments)
    assert "\n" not in str(caught.value)
