"""What the stages share that change states token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import build, prompts_of
from peft import LoraConfig, get_peft_model
from planted import byte_tokenizer, planted_pair

from dsteer.behaviour.answers import Answers
from dsteer.behaviour.edited import Bench, Place, kl_of, places, token_rows
from dsteer.behaviour.profile import (
    edits_of,
    efficiency,
    first_largest,
    measure,
    readout_share,
    recovered,
    tuned_margins,
)
from dsteer.config import ProfileConfig
from dsteer.data.jsonl import write_pairs
from dsteer.data.synthetic import World
from dsteer.data.tokens import Encoded
from dsteer.errors import DataError
from dsteer.models.pair import ModelPair
from dsteer.progress import SILENT
from dsteer.steering.edits import Edit, adding, patched
from dsteer.training.examples import encode_pairs

SITE = "resid_post.1"


def answers(pairs: int = 3) -> Answers:
    """Chosen answers, then rejected ones, of random ids."""
    rows = prompts_of(tuple(5 + n for n in range(2 * pairs)))
    texts = [Encoded(item.ids, 2 + n % 3) for n, item in enumerate(rows)]
    return Answers(texts, pairs, ["a", "b", "a"][:pairs])


def bench(pair: ModelPair, data: Path = Path(), **config: object) -> Bench:
    given = ProfileConfig(**{"bootstrap": 50, **config})  # type: ignore[arg-type]
    return Bench(pair, given, data, "none", ["resid_post.0", SITE], 0, SILENT)


@pytest.fixture(scope="module")
def planted():
    made = planted_pair(1)
    return made, bench(made.pair), bench(made.pair).read("test", answers())


def test_parts_of_a_split_are_its_texts(planted) -> None:
    made, its, split = planted
    chosen, rejected = split.first_chosen(2), split.first_rejected(2)
    assert chosen.answers.texts == split.answers.texts[:2]
    assert rejected.answers.texts == split.answers.texts[3:5]
    assert chosen.answers.clusters == rejected.answers.clusters == ["a", "b"]
    edits = [Edit(SITE, adding(made.b, 0.5))]
    whole = its.score(made.base, split, edits, "all")
    for part, texts in ((chosen, slice(0, 2)), (rejected, slice(3, 5))):
        alone = its.score(made.base, part, edits, "all")
        for name in ("log_likelihood", "kl", "kl_first"):  # float32: another batch
            torch.testing.assert_close(
                getattr(alone, name), getattr(whole, name)[:, texts], atol=1e-4, rtol=1e-4
            )
        torch.testing.assert_close(part.plain.kl, split.plain.kl[:, texts])
    assert split.first_chosen(99).answers.pairs == 3


def test_rows_are_the_tokens_that_are_changed(planted) -> None:
    _, _, split = planted
    for tokens in ("prompt_last", "all", "generated"):
        base, tuned, keys = token_rows(split, SITE, tokens)
        want, owners = [], []
        for number, item in enumerate(split.answers.texts):
            p, n, start = item.prompt_length, len(item.ids), split.acts.offsets[number]
            rows = {"prompt_last": [p - 1], "all": range(n - 1), "generated": range(p - 1, n - 1)}
            want += [split.acts.base[SITE][start + row] for row in rows[tokens]]
            owners += [split.answers.clusters[number % 3]] * len(rows[tokens])
        assert torch.equal(base, torch.stack(want).double())
        assert base.shape == tuned.shape
        assert keys == owners


def test_shares_are_ratios_of_sums_over_pairs(planted) -> None:
    made, its, split = planted
    scores = its.score(
        made.base, split, [Edit(SITE, patched), Edit(SITE, adding(made.b, 0.5))], "all"
    )
    got = its.recovered(split, scores, "all")
    want = 1 - scores.kl[:, :3].numpy().sum(1) / split.plain.kl[0, :3].numpy().sum()
    assert [row.value for row in got if row] == pytest.approx(list(want), rel=1e-9)
    assert got[0] is not None
    assert got[0].value == pytest.approx(1, abs=1e-6)  # float32, in KL of second order
    assert torch.equal(kl_of(scores, "prompt_last"), scores.kl_first)
    assert torch.equal(kl_of(scores, "generated"), scores.kl)
    assert its.ratio(torch.zeros(3), torch.full((3,), 1e-12), split) is None


def test_splits_are_read_from_the_data(tmp_path: Path) -> None:
    made = planted_pair(1, max_position_embeddings=512)
    pairs = World(0).pairs(4)
    write_pairs(tmp_path / "test.jsonl", pairs)
    its = bench(made.pair, tmp_path, response_tokens=5)
    split = its.split("test", 3)
    want = encode_pairs(pairs[:3], byte_tokenizer())
    assert [item.ids for item in split.answers.texts[:3]] == [
        row.prompt + row.chosen[:5] for row in want
    ]
    assert [item.ids for item in split.answers.texts[3:]] == [
        row.prompt + row.rejected[:5] for row in want
    ]
    assert its.split("test", 3, chosen=True).answers.texts == split.answers.texts[:3]
    # pairs without two answers do not take the places of those that have them
    bare = [replace(pair, chosen=None, rejected=None) for pair in World(1).pairs(3)]
    write_pairs(tmp_path / "test.jsonl", [*bare, *pairs])
    assert its.split("test", 3).answers.texts == split.answers.texts
    write_pairs(tmp_path / "test.jsonl", pairs)
    with pytest.raises(DataError, match="none of which fits"):
        bench(made.pair, tmp_path, max_tokens=2, response_tokens=1).split("test", 3)


def test_places() -> None:
    profile = {"chosen": {"site": SITE, "tokens": "all"}}
    assert places(["auto", "final_norm", SITE], "auto", profile, None, "x") == [
        Place(SITE, "all"), Place("final_norm", "all")
    ]  # fmt: skip
    cosine = {"chosen_site": "resid_post.2"}
    assert places(["auto"], "auto", None, cosine, "x") == [Place("resid_post.2", "prompt_last")]
    assert places(["auto"], "generated", None, None, "x") == [Place("x", "generated")]


# ---------------------------------------------------------------------------------- profile


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_families_have_a_profile(name: str) -> None:
    """b behind a block is its patch and its vector; what the tuned model's own head says."""
    base = build(name)
    tuned = build(name)
    b = 2 * torch.eye(32)[3] + torch.eye(32)[7]
    blocks = tuned.transformer.h if name == "gpt2" else tuned.model.layers
    blocks[1].register_forward_hook(
        lambda _m, _i, out: (out[0] + b, *out[1:]) if isinstance(out, tuple) else out + b
    )
    its = bench(ModelPair.load(base, tuned, device="cpu"))
    split = its.read("test", answers())
    found = measure(its, base, split, "all", edits_of(["resid_post.0", SITE], {SITE: b}, {}), 2.0)
    # float32 rounding, in KL of second order; the margins are sums of float32 log-probabilities
    for kind in ("patched", "v"):
        share = recovered(its, split, found, SITE, kind)
        assert share is not None
        assert share.value == pytest.approx(1, abs=1e-5)
        assert found.margin is not None
        torch.testing.assert_close(
            found.margin[found.keys.index((SITE, kind))], tuned_margins(split, 2.0),
            atol=1e-3, rtol=1e-4,
        )  # fmt: skip

    def likelihood(model, item):
        log_p = model(torch.tensor([item.ids])).logits[0, :-1].double().log_softmax(-1)
        taken = log_p.gather(1, torch.tensor(item.ids[1:])[:, None])
        return float(taken[item.prompt_length - 1 :].sum())

    with torch.no_grad():
        sums = [[likelihood(m, item) for item in split.answers.texts] for m in (base, tuned)]
    gained = np.subtract(sums[1], sums[0])
    np.testing.assert_allclose(
        tuned_margins(split, 2.0).numpy(), 2 * (gained[:3] - gained[3:]), atol=1e-3
    )


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # PEFT asks for it
def test_an_adapter_pair_has_a_profile(tmp_path: Path) -> None:
    """A LoRA of block 1's MLP: nothing before it, all of the change from its block on."""
    planted_pair(1).save(tmp_path)
    base = str(tmp_path / "base")
    tuned = get_peft_model(
        ModelPair.load(base, base, device="cpu").base,
        LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    pair = ModelPair.load(base, tmp_path / "adapter", device="cpu")
    its = bench(pair)
    split = its.read("test", answers())
    with pair.using("base") as model:
        found = measure(its, model, split, "all", edits_of(["resid_post.0", SITE], {}, {}), 1.0)
        left = readout_share(its, model, split)
    shares = [recovered(its, split, found, site, "patched") for site in ("resid_post.0", SITE)]
    # float32 rounding, in KL of second order
    assert [share.value for share in shares if share] == pytest.approx([0, 1], abs=1e-5)
    assert left is not None
    assert left.value == pytest.approx(0, abs=1e-5)


def test_efficiency_is_not_given_where_patching_does_nothing(planted) -> None:
    made, its, split = planted
    edits = {
        (SITE, "v"): Edit(SITE, adding(made.b)),
        (SITE, "patched"): Edit(SITE, adding(made.b, 0.0)),
    }
    effects = measure(its, made.base, split, "all", edits, 1.0)
    ratio, why = efficiency(its, split, effects, SITE)
    assert ratio is None
    assert why is not None
    assert "not told from nothing" in why
    assert efficiency(its, split, effects, "final_norm")[1] == (
        "the run's v* is zero or absent here"
    )


def test_the_first_of_equals_is_named() -> None:
    assert first_largest([("a", None), ("b", 0.5), ("c", 0.5 + 1e-9), ("d", 0.4)]) == "b"
    assert first_largest([("a", 0.1), ("b", 0.2)]) == "b"
    assert first_largest([("a", None)]) is None
