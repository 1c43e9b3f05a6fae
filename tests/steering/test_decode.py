"""The sweep's texts are those of ``generate``, one strength at a time, whatever shares a batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, build, prompts_of, small
from planted import PROMPTS, byte_tokenizer, planted_pair, tiny_llama
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AttentionInterface

import dsteer
from dsteer.data.tokens import Encoded, encode
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError, StoreError
from dsteer.models.anatomy import Anatomy, evaluating
from dsteer.steering import decode as module
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.decode import Decoded, Decoding, decode
from dsteer.steering.intervene import Schedule, steer
from dsteer.steering.rows import Rows
from dsteer.steering.vector import SteeringVector

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

SITE = "resid_post.1"
SITES = ("resid_post.0", "resid_post.1", "resid_post.2", "final_norm")
STRENGTHS = (0.0, 1.0, -2.0)
LENGTHS = (1, 3, 8, 8, 13)
NEW = 12
TOKENIZER = byte_tokenizer()
SLOW = {"falcon", "falcon-alibi", "bloom", "mpt", "gpt-j", "phi3-longrope", "llama-dynamic-rope"}
ONE_BY_ONE = {"phi3-longrope", "llama-dynamic-rope"}
"""Their own ``generate`` depends on the longest text of a batch."""

V = torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama() -> Any:
    return build("llama")


def steering(
    site: str = SITE, strengths: Sequence[float] = STRENGTHS, vector: Tensor = V, **kwargs: Any
) -> Steering:
    return Steering(site, tuple(Arm(vector, float(s)) for s in strengths), **kwargs)


def run(model: Any, what: Steering | None = None, new: int = NEW, **kwargs: Any) -> Decoded:
    """Decode prompts of several lengths; what belongs to the decoding goes there."""
    names = ("temperature", "top_p", "seed", "stop")
    decoding = Decoding(new, **{name: kwargs.pop(name) for name in names if name in kwargs})
    prompts = kwargs.pop("prompts", None) or prompts_of(LENGTHS)
    tokenizer = kwargs.pop("tokenizer", TOKENIZER)
    return decode(model, tokenizer, prompts, what or steering(), decoding, **kwargs)


def generated(
    model: Any, prompts: Sequence[Encoded], new: int, ends: Sequence[int], vector: Tensor = V,
    strength: float = 1.0, **kwargs: Any,
) -> list[tuple[int, ...]]:  # fmt: skip
    """What ``generate`` makes of left-padded prompts at one strength, cut at the EOS."""
    width = max(len(item.ids) for item in prompts)
    ids = torch.tensor([[0] * (width - len(item.ids)) + list(item.ids) for item in prompts])
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    kwargs.setdefault("site", SITE)
    with steer(model, vector, strength, **kwargs):
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False,
            eos_token_id=list(ends), pad_token_id=0,
        )[:, width:].tolist()  # fmt: skip
    return [tuple(cut(row, ends)) for row in made]


def cut(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def loss_of_choice(
    model: Any, prompt: Encoded, tokens: Sequence[int], strength: float, **kwargs: Any
) -> float:
    """How far below the best a chosen token's logit lies at most, in one plain steered pass."""
    ids = torch.tensor([[*prompt.ids, *tokens]])
    kwargs.setdefault("site", SITE)
    with torch.no_grad(), steer(model, V, strength, prompt_lengths=[len(prompt.ids)], **kwargs):
        logits = model(ids, use_cache=False).logits[0, len(prompt.ids) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max()) if tokens else 0.0


def state_of(model: Any) -> tuple[Any, ...]:
    """All that decoding changes while it runs."""
    return (
        model.config._attn_implementation,
        "dsteer" in AttentionInterface._global_mapping,
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        [m.training for m in model.modules()],
        [id(vars(m).get("generation_config")) for m in model.modules()],
        model.generation_config.disable_compile,
    )  # fmt: skip


# The same as generate


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_generate_one_strength_at_a_time(name: str) -> None:
    model, prompts = build(name), prompts_of(LENGTHS)
    groups = [[p] for p in prompts] if name in ONE_BY_ONE else [prompts]
    rows = [r for s in STRENGTHS for g in groups for r in generated(model, g, NEW, [1], strength=s)]
    middle = next(row[i] for row in rows for i in range(3, len(row)) if row[i] not in row[:i])
    model.generation_config.eos_token_id = [middle, 1]
    differences, ties, ended = 0, 0, set()
    for positions in ("all", "generated"):
        result = dsteer.sweep(
            model, TOKENIZER, prompts, SteeringVector(V, SITE), STRENGTHS, NEW, positions=positions
        )
        assert result.fast == (name not in SLOW), result.note
        assert (result.note is None) == result.fast
        for arm, strength in enumerate(STRENGTHS):
            options = {"strength": strength, "positions": positions}
            wanted = [
                row for g in groups for row in generated(model, g, NEW, [middle, 1], **options)
            ]
            differences += strength != 0 and result.tokens[arm] != result.tokens[0]
            for number, (row, found) in enumerate(zip(wanted, result.tokens[arm], strict=True)):
                ended.add(result.finished[arm][number])
                assert result.finished[arm][number] == (len(found) < NEW)
                if found != row:
                    assert loss_of_choice(model, prompts[number], found, **options) < 1e-4
                    ties += 1
    print(name, "fast" if result.fast else result.note, "ties:", ties)
    assert differences == 4
    assert ended == {True, False}


def test_a_window_that_only_the_mask_knows_is_found() -> None:
    """Prompts lie within the first chunk and texts go beyond it: only there attention differs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(
                **small(num_local_experts=2, num_experts_per_tok=1, head_dim=8,
                        intermediate_size_mlp=48, attention_chunk_size=20)
            )
        ).eval()  # fmt: skip
    found = run(model)
    assert not found.fast
    assert "logits differ" in str(found.note)
    assert run(model, new=3).fast


def test_logits_that_are_no_numbers_fail_the_probe(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Rows.step
    monkeypatch.setattr(Rows, "step", lambda self, ids: step(self, ids) * float("nan"))
    assert "differ by nan" in str(run(llama).note)


# Fast and plain


POSITIONS = ("all", "prompt", "prompt_last", "generated", (0, 2), (5, 9), (7, 10), (12, 16))


@pytest.mark.parametrize("site", SITES)
def test_positions_and_sites(llama: Any, site: str) -> None:
    """Under both ways the same, and each steers differently from the others."""
    texts = {}
    for positions in POSITIONS:
        what = steering(site, positions=positions)
        fast, plain = run(llama, what, fast=True), run(llama, what, fast=False)
        assert (fast.fast, plain.fast) == (True, False)
        assert plain.note == "Decoded by generate, not by the fast path: it was asked for."
        assert (fast.tokens, fast.texts, fast.finished) == (
            plain.tokens, plain.texts, plain.finished
        )  # fmt: skip
        texts[positions] = fast.tokens[1:]
    inner = site in SITES[:2]
    assert len(set(texts.values())) >= (len(POSITIONS) - 1 if inner else 3)


@pytest.mark.parametrize("operation", ["add", "ablate", "scale", "noise", "project"])
def test_operations_and_schedules(llama: Any, operation: Any) -> None:
    texts = set()
    for schedule in (None, Schedule("linear", steps=4), Schedule("exponential", half_life=1.5)):
        for positions in ("all", "generated"):
            what = steering(
                strengths=(0, 1, -3), operation=operation, schedule=schedule, positions=positions,
                seed=4,
            )  # fmt: skip
            fast, plain = run(llama, what, fast=True), run(llama, what, fast=False)
            assert fast.tokens == plain.tokens
            texts.add(fast.tokens)
    assert len(texts) >= (1 if operation == "ablate" else 4)


def test_baselines_of_a_sweep(llama: Any) -> None:
    """Amplification needs a site alone; noise has the norm of a vector, whatever its direction."""
    prompts = prompts_of(LENGTHS)
    amplified = dsteer.sweep(
        llama, TOKENIZER, prompts, None, (0, 1.5), NEW, operation="scale", site=SITE
    )
    for number, prompt in enumerate(prompts):
        with steer(llama, None, 1.5, operation="scale", site=SITE):
            made = llama.generate(
                torch.tensor([prompt.ids]), max_new_tokens=NEW, do_sample=False,
                eos_token_id=[1, 2], pad_token_id=0,
            )  # fmt: skip
        wanted = cut(made[0, len(prompt.ids) :].tolist(), (1, 2))
        assert amplified.tokens[1][number] == tuple(wanted)
    noisy, turned = (
        dsteer.sweep(llama, TOKENIZER, prompts, SteeringVector(v, "resid_post.0"), (0, 1.5), NEW,
                     operation="noise", site=SITE, seed=3)
        for v in (V, V.flip(0))
    )  # fmt: skip
    assert noisy.tokens == turned.tokens
    assert (
        noisy.tokens == run(llama, steering(strengths=(0, 1.5), operation="noise", seed=3)).tokens
    )
    assert amplified.tokens[0] == noisy.tokens[0]
    assert len({amplified.tokens[1], noisy.tokens[1], noisy.tokens[0]}) == 3
    with pytest.raises(ConfigError, match="operation 'add' without a vector"):
        dsteer.sweep(llama, TOKENIZER, prompts, None, (1,), site=SITE)
    with pytest.raises(ConfigError, match="neither a vector nor a site"):
        dsteer.sweep(llama, TOKENIZER, prompts, None, (1,), operation="scale")


def test_noise_is_that_of_a_single_run(llama: Any) -> None:
    """Whatever the batch, a row's noise is that of ``steer`` around its text alone."""
    prompts = prompts_of(LENGTHS)
    settings = {"operation": "noise", "seed": 4}
    found = run(llama, steering(strengths=(0, 2, -3), **settings))
    for arm, strength in enumerate((0, 2, -3)):
        for number, prompt in enumerate(prompts):
            alone = generated(llama, [prompt], NEW, [1, 2], strength=strength, **settings)
            assert list(alone) == [found.tokens[arm][number]]
    assert found.tokens[0] != found.tokens[1] != found.tokens[2]


def test_memory_splits_prompts_and_arms(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = counted(monkeypatch)
    whole = run(llama)
    assert len(batches) == 1
    row = 2 * 3 * 2 * 8 * 4 * (13 + NEW + 1)  # of the longest prompt: keys, values and logits
    for memory, rows in ((1, 1), (2 * row, 2), (7 * row, 7)):
        batches.clear()
        assert run(llama, memory=memory).tokens == whole.tokens
        sizes = [len(batch.prompts) * len(batch.arms) for batch in batches]
        assert sum(sizes) == 15
        assert sizes[0] <= rows < 15
        assert len(batches) > 2
        assert run(llama, memory=memory, fast=False).tokens == whole.tokens
    assert run(llama, prompts=prompts_of((1, 1, 1))).fast


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that are run from now on."""
    batches: list[Any] = []
    for engine in (module.Shared, module.Plain):

        def counting(self: Any, prompts: Any, batch: Any, run: Any = engine.run) -> Any:
            batches.append(batch)
            return run(self, prompts, batch)

        monkeypatch.setattr(engine, "run", counting)
    return batches


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (9,), (1, 9)])
@pytest.mark.parametrize("strengths", [(1.5,), (0.0, 1.5)])
def test_small_cases(llama: Any, lengths: Any, strengths: Any) -> None:
    """One prompt, one token, one arm, one new token."""
    prompts = prompts_of(lengths)
    for new in (1, 2, 7):
        found = run(llama, steering(strengths=strengths), new, prompts=prompts, fast=True)
        wanted = generated(llama, prompts, new, [1, 2], strength=1.5)
        assert list(found.tokens[-1]) == wanted


def test_texts_up_to_the_last_position() -> None:
    """A prompt and its continuation may fill the model, and the probe stays within."""
    model = build("gpt2")
    for length, new in ((63, 1), (62, 2), (50, 14)):
        prompts = prompts_of((length, 4))
        assert list(run(model, None, new, prompts=prompts, fast=True).tokens[1]) == generated(
            model, prompts, new, [1, 2]
        )
    with pytest.raises(DataError, match="64 that the model was made for"):
        run(model, None, 2, prompts=prompts_of((63,)))


def test_bfloat16() -> None:
    """Each token is within rounding of the best of a plain pass."""
    model = build("llama").bfloat16()
    prompts, found = prompts_of(LENGTHS), run(model)
    assert found.fast
    for arm, strength in enumerate(STRENGTHS):
        pairs = list(zip(prompts, found.tokens[arm], strict=True))
        assert max(loss_of_choice(model, *pair, strength) for pair in pairs) < 0.1
        assert max(loss_of_choice(model, *pair, strength + 1) for pair in pairs) > 0.3


def test_rows_that_have_ended_go(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {t for row in run(llama, new=3).tokens[1] for t in row[1:]}
    llama.generation_config.eos_token_id = sorted(ends)[:4]
    kept: list[int] = []
    keep = Rows.keep

    def keeping(self: Rows, prompts: Tensor, rows: Tensor) -> None:
        kept.append(len(rows))
        keep(self, prompts, rows)

    monkeypatch.setattr(Rows, "keep", keeping)
    for site in SITES:
        found = {}
        for share in (0.0, 0.8, 1.0):  # never, as it is, at every chance
            kept.clear()
            monkeypatch.setattr(module, "_SHRINK", share)
            found[share] = run(llama, steering(site), new=20)
            assert bool(kept) == (share > 0)
        assert found[0.0] == found[0.8] == found[1.0]
        assert found[0.0].tokens == run(llama, steering(site), new=20, fast=False).tokens


# Sampling


def test_choice_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()

    def chosen(u: float, **kwargs: float) -> int:
        return int(Decoding(**kwargs).choose(logits, torch.tensor([u]).double()))

    assert Decoding().choose(torch.tensor([[1.0, 2.0, 2.0]]), None).tolist() == [1]
    plain = {"temperature": 1.0}
    edges = (0.0, 0.499, 0.501, 0.799, 0.801, 1 - 1e-12)
    assert [chosen(u, **plain) for u in edges] == [0, 0, 1, 1, 2, 2]
    # square roots of the probabilities: 0.4155, 0.3218, 0.2627
    edges = (0.415, 0.416, 0.737, 0.738)
    assert [chosen(u, temperature=2.0) for u in edges] == [0, 1, 1, 2]
    # squares: 0.25, 0.09, 0.04 of 0.38
    edges = (0.657, 0.659, 0.894, 0.896)
    assert [chosen(u, temperature=0.5) for u in edges] == [0, 1, 1, 2]
    # the smallest sets that hold top_p: one token, two (0.625, 0.375), three
    assert [chosen(u, top_p=0.49, **plain) for u in (0.0, 0.99)] == [0, 0]
    assert [chosen(u, top_p=0.6, **plain) for u in (0.624, 0.626, 0.999)] == [0, 1, 1]
    assert chosen(0.999, top_p=0.81, **plain) == 2
    # tokens that can't be: never drawn at the edges
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert int(Decoding(temperature=1.0).choose(impossible, torch.tensor([u]).double())) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_frequencies(temperature: float, top_p: float) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(2)).double()
    p = np.exp(logits.numpy() / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    inside = order[: int(np.searchsorted(p[order].cumsum(), top_p)) + 1] if top_p < 1 else order
    expected = np.zeros(9)
    expected[inside] = p[inside] / p[inside].sum()
    decoding = Decoding(20_000, temperature=temperature, top_p=top_p, seed=3)
    draws = torch.from_numpy(decoding.draws(0))
    counts = np.bincount(decoding.choose(logits.expand(20_000, -1), draws).numpy(), minlength=9)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(counts[kept], 20_000 * expected[kept]).pvalue > 0.01


def test_draws_depend_on_seed_and_prompt_alone(llama: Any) -> None:
    drawing = {"temperature": 1.2, "top_p": 0.95, "seed": 5}
    what = steering(strengths=(0, 0, 1, -2))
    whole = run(llama, what, **drawing)
    assert whole.fast
    assert whole.tokens[0] == whole.tokens[1] != whole.tokens[2]
    assert run(llama, what, fast=False, **drawing).tokens == whole.tokens
    assert run(llama, what, memory=30_000, **drawing).tokens == whole.tokens
    assert run(llama, what, memory=30_000, fast=False, **drawing).tokens == whole.tokens
    some = run(llama, steering(strengths=(-2, 0)), **drawing)
    assert some.tokens == (whole.tokens[3], whole.tokens[0])
    first = run(llama, what, prompts=prompts_of(LENGTHS)[:2], **drawing)
    assert first.tokens == tuple(arm[:2] for arm in whole.tokens)
    shorter = run(llama, what, new=5, **drawing)
    assert shorter.tokens == tuple(tuple(row[:5] for row in arm) for arm in whole.tokens)
    assert run(llama, what, **{**drawing, "seed": 6}).tokens != whole.tokens
    twins = run(llama, what, prompts=[prompts_of((8,))[0]] * 2, **drawing)
    assert twins.tokens[0][0] != twins.tokens[0][1]
    assert run(llama, what, **{**drawing, "temperature": 1e-6}).tokens == run(llama, what).tokens


# Texts


def of_text(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "stop", "kept", "n_tokens"),
    [
        ("one\n\nHuman: two", ("\n\nHuman:",), "one", 11),
        ("one two three", ("three", "two"), "one ", 7),
        ("ab", ("b", "ab"), "", 2),
        ("one", ("two",), "one", None),
        ("one", (), "one", None),
        ("ab日本cd", ("日本",), "ab", 8),
        ("日本日cd本", ("日c",), "日本", 10),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], kept: str, n_tokens: int | None) -> None:
    """A text ends before the stop string, its tokens where that is complete."""
    stops, tokens = module._StopStrings(TOKENIZER, stop), of_text(text)
    prompt = Encoded(tuple(of_text("Why?")), 4)
    assert stops.text(prompt, tokens) == kept
    assert stops.end(tokens, 0) == n_tokens
    for start in range(n_tokens or len(tokens)):  # what was searched before need not be again
        assert stops.end(tokens, start) == n_tokens


def test_stop_strings_end_rows(llama: Any) -> None:
    """Both ways stop alike, though one looks only every few tokens."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    prompts = encode(TOKENIZER, PROMPTS[:4])
    free = run(model, prompts=prompts, new=40)
    letters = [c for texts in free.texts for text in texts for c in text[3:30] if c != "\ufffd"]
    stop = (max(set(letters), key=letters.count), "never met")
    fast = run(model, prompts=prompts, new=40, stop=stop, fast=True)
    assert fast.tokens == run(model, prompts=prompts, new=40, stop=stop, fast=False).tokens
    ended = 0
    for arm in range(3):
        for number in range(4):
            text, tokens = fast.texts[arm][number], fast.tokens[arm][number]
            whole = free.tokens[arm][number]
            assert fast.finished[arm][number] == (stop[0] in free.texts[arm][number])
            assert tokens == whole[: len(tokens)]
            assert text == free.texts[arm][number].split(stop[0])[0]
            if fast.finished[arm][number]:
                ended += 1
                assert stop[0] in TOKENIZER.decode(tokens)
                assert stop[0] not in TOKENIZER.decode(tokens[:-1])
            else:
                assert tokens == whole
    assert ended > 0


def test_texts_are_the_continuation_alone() -> None:
    """The space between prompt and continuation stays, of a decoder that strips it too."""
    vocabulary = {"<s>": 0, "▁a": 1, "▁b": 2, "c": 3}
    inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<s>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", clean_up_tokenization_spaces=False
    )
    assert tokenizer.decode([2, 3]) == "bc"
    stops = module._StopStrings(tokenizer, ())
    assert stops.text(Encoded((0, 1), 2), [2, 3, 1]) == " bc a"
    assert stops.text(Encoded((0, 1), 2), [3]) == "c"
    assert stops.text(Encoded((0, 1), 2), []) == ""
    stops = module._StopStrings(TOKENIZER, ())
    assert stops.text(Encoded(tuple(of_text("Hi")), 2), of_text(" you")) == " you"
    euro = of_text("€")  # its bytes are parted: the text is what decodes by itself
    assert stops.text(Encoded(tuple(euro[:1]), 1), [*euro[1:], *of_text("x")]).endswith("x")


# The journal


def test_a_killed_run_goes_on(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, batches = tmp_path / "deep" / "journal.jsonl", counted(monkeypatch)
    options: dict[str, Any] = {"memory": 70_000, "path": path}
    whole = run(llama, memory=70_000)
    total = len(batches)
    assert total >= 3
    batches.clear()
    assert run(llama, **options) == whole
    complete = path.read_bytes()
    lines = complete.splitlines(keepends=True)
    assert len(lines) == total + 1
    for held, left in (
        (b"", total),
        (lines[0][:20], total),
        (lines[0], total),
        (lines[0] + lines[1][:15], total),
        (lines[0] + lines[1][:-1], total),  # all but its end: not known to be whole
        (b"".join(lines[:3]), total - 2),
        (b"".join(lines[:3]) + lines[3][:15], total - 2),
        (complete, 0),
    ):
        path.write_bytes(held)
        batches.clear()
        assert run(llama, **options) == whole
        assert len(batches) == left
        assert path.read_bytes() == complete


@pytest.mark.parametrize("change", [
    "strength", "vector", "weights", "prompts", "new", "seed", "eos", "positions", "site", "fast",
    "stop", "schedule",
])  # fmt: skip
def test_a_journal_of_something_else_is_not_read(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path, batches = tmp_path / "journal.jsonl", counted(monkeypatch)
    prompts = prompts_of((8, 8))  # of one length, so that both ways make the same batches
    options: dict[str, Any] = {"path": path, "new": 4, "prompts": prompts}
    what = steering()
    run(llama, **options)
    batches.clear()
    run(llama, **options)
    assert batches == []
    if change == "strength":
        what = steering(strengths=(0.0, 1.0, -2.5))
    elif change == "vector":
        what = steering(vector=V + 1e-6)
    elif change == "positions":
        what = steering(positions="generated")
    elif change == "site":
        what = steering("resid_post.0")
    elif change == "schedule":
        what = steering(schedule=Schedule("linear", steps=9))
    elif change == "weights":
        with torch.no_grad():
            llama.model.layers[0].mlp.up_proj.weight *= 1.01
    elif change == "eos":
        llama.generation_config.eos_token_id = 7
    else:
        other = {"prompts": prompts[::-1], "new": 5, "seed": 3, "fast": False,
                 "stop": ("x",)}  # fmt: skip
        options[change] = other[change]
    found = run(llama, what, **options)
    assert batches
    del options["path"]
    assert found == run(llama, what, **options)


def test_files_that_are_no_journal_are_kept(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nof years\n")
    with pytest.raises(StoreError, match="no journal"):
        run(llama, path=path)
    assert path.read_text() == "my notes\nof years\n"
    with pytest.raises(StoreError, match="can't read"):
        run(llama, path=tmp_path)
    with pytest.raises(StoreError, match="can't write"):
        run(llama, path=path / "below")


# Planted truth


@pytest.mark.parametrize("block", [0, 2, 3])
def test_planted_truth(block: int) -> None:
    """b on the base gives the tuned model's texts, and −b on the tuned model the base's."""
    planted = planted_pair(block)
    prompts = encode(TOKENIZER, PROMPTS)
    vector = SteeringVector(planted.b, f"resid_post.{block}")

    def own(model: Any) -> list[tuple[int, ...]]:
        return generated(model, prompts, 16, [1], strength=0.0)

    base, tuned = own(planted.base), own(planted.tuned)
    assert base != tuned
    forth = dsteer.sweep(planted.base, planted.tokenizer, PROMPTS, vector, [0, 1], 16)
    back = dsteer.sweep(planted.tuned, planted.tokenizer, PROMPTS, vector, [-1, 0], 16)
    assert forth.fast
    assert back.fast
    assert [list(rows) for rows in forth.tokens] == [base, tuned]
    assert [list(rows) for rows in back.tokens] == [base, tuned]
    assert forth.texts == back.texts
    assert forth.texts[1] == tuple(
        planted.tokenizer.decode(row, skip_special_tokens=True) for row in tuned
    )
    assert (forth.strengths, forth.prompts) == ((0.0, 1.0), PROMPTS)


# Strength 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.1", "final_norm"])
def test_strength_0_is_no_hooks(name: str, site: str) -> None:
    """Bit for bit: hooks that add nothing change nothing."""
    model, prompts = build(name), [item.ids for item in prompts_of(LENGTHS)]
    logits: dict[bool, list[Tensor]] = {}
    for hooked in (True, False):
        what = steering(site, strengths=(0, 0), hooked=hooked)
        with evaluating(model), Rows(model, Anatomy.of(model), what, 5, prompts, [0, 1]) as rows:
            logits[hooked] = [rows.step(rows.last_ids)]
            for _ in range(4):
                logits[hooked].append(rows.step(logits[hooked][-1].argmax(-1)))
    for with_hooks, without in zip(logits[True], logits[False], strict=True):
        assert torch.equal(with_hooks, without)
    found = run(model, steering(site))
    assert found.tokens[0] == run(model, Steering.none(32)).tokens[0]
    assert found.tokens[0] != found.tokens[1]


# What models may bring along


def test_other_settings_of_generation_are_left_out(llama: Any) -> None:
    """A model's own penalties, beams and minimal lengths belong to neither way."""
    wanted = run(llama)
    llama.generation_config.update(
        repetition_penalty=8.0, no_repeat_ngram_size=2, num_beams=3, do_sample=True, top_k=3,
        temperature=0.3, min_new_tokens=12, suppress_tokens=[5, 6, 7],
        cache_implementation="static",
    )  # fmt: skip
    before = state_of(llama)
    for fast in (True, False):
        assert run(llama, fast=fast).tokens == wanted.tokens
        assert state_of(llama) == before


def test_a_lora_model(llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj"])).eval()
    wrapped.generation_config.repetition_penalty = 8.0
    before = state_of(wrapped)
    for fast in (True, False):
        assert run(wrapped, fast=fast).tokens == run(llama, fast=fast).tokens
        assert state_of(wrapped) == before


def test_a_model_in_training() -> None:
    model = build("gpt2")  # with dropout
    wanted = run(model)
    model.train()
    model.transformer.h[0].eval()
    before = state_of(model)
    for fast in (True, False):
        assert run(model, fast=fast).tokens == wanted.tokens
        assert state_of(model) == before


def test_tied_weights_and_ids_beyond_the_tokenizer() -> None:
    model = tiny_llama(tie_word_embeddings=True, vocab_size=400)
    prompts = encode(TOKENIZER, PROMPTS[:3])
    fast, plain = (run(model, prompts=prompts, fast=fast) for fast in (True, False))
    assert (fast.tokens, fast.texts) == (plain.tokens, plain.texts)
    assert list(fast.tokens[1]) == generated(model, prompts, NEW, [1])
    assert max(t for arm in fast.tokens for row in arm for t in row) >= len(TOKENIZER)


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"prompts": []}, DataError, "no prompts"),
        ({"prompts": "one text"}, DataError, "one text"),
        ({"strengths": []}, MeasurementError, "at least one strength"),
        ({"strengths": [float("nan")]}, MeasurementError, "finite"),
        ({"vector": SteeringVector(torch.ones(16), SITE)}, ModelError, "width 16.* 32"),
        ({"vector": SteeringVector(V, "resid_post.9")}, ConfigError, "has 3 blocks"),
        ({"max_new_tokens": 60}, DataError, "64 that the model was made for"),
        ({"max_new_tokens": 0}, MeasurementError, "max_new_tokens 0"),
        ({"temperature": -1.0}, MeasurementError, "temperature -1"),
        ({"temperature": float("nan")}, MeasurementError, "temperature nan"),
        ({"temperature": float("inf")}, MeasurementError, "temperature inf"),
        ({"temperature": 1.0, "top_p": 0.0}, MeasurementError, "top_p 0"),
        ({"temperature": 1.0, "top_p": 1.1}, MeasurementError, "top_p 1.1"),
        ({"temperature": 1.0, "seed": -1}, MeasurementError, "seed -1"),
        ({"stop": ("",)}, MeasurementError, "empty string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fast", [None, True])
def test_mistakes(
    llama: Any, kwargs: dict[str, Any], kind: type[Exception], message: str, fast: bool | None
) -> None:
    before = state_of(llama)
    given = {"prompts": prompts_of(LENGTHS), "vector": SteeringVector(V, SITE),
             "strengths": [1.0], "max_new_tokens": 4, "fast": fast, **kwargs}  # fmt: skip
    with pytest.raises(kind, match=message):
        dsteer.sweep(llama, TOKENIZER, **given)
    assert state_of(llama) == before


def test_a_model_that_has_only_the_slow_way() -> None:
    with pytest.raises(ModelError, match="the fast path can't decode this model: its attention"):
        run(build("falcon"), fast=True)


@contextlib.contextmanager
def failing(model: Any, calls: int, error: type[BaseException]) -> Iterator[None]:
    """Let a block's MLP fail at its nth call."""
    mlp, seen = model.model.layers[2].mlp, 0
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen >= calls:
            raise error("out of paper")
        return own(x)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
    assert seen >= calls


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 9, 13])
@pytest.mark.parametrize("fast", [True, False])
def test_all_returns_after_a_failure(llama: Any, calls: int, fast: bool) -> None:
    """In the probe, while prompts are read, and while tokens are decoded."""
    wanted = run(llama)
    assert "dsteer" not in AttentionInterface._global_mapping
    llama.train()
    before = state_of(llama)
    with failing(llama, calls, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(llama, new=20, fast=fast or None)
    assert state_of(llama) == before
    assert run(llama).tokens == wanted.tokens


def test_a_model_whose_code_passes_hooks_by_is_refused() -> None:
    model = build("llama")
    block = model.model.layers[1]
    fused = {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    block.__class__ = type("Fused", (type(block),), fused)
    vector = SteeringVector(torch.ones(32), "resid_post.1")
    for fast in (None, False):
        with pytest.raises(ModelError, match="was not called as one"):
            dsteer.sweep(
                model, byte_tokenizer(), prompts_of((3, 5)), vector, [0.0, 1.0], 4, fast=fast
            )


def test_a_damaged_journal_is_decoded_again(tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "journal.jsonl"
    vector = SteeringVector(torch.ones(32), "resid_post.1")

    def go() -> Any:
        prompts = prompts_of((3, 5))
        return dsteer.sweep(model, byte_tokenizer(), prompts, vector, [0.0, 1.0], 4, path=path)

    first = go()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "[0, [[broken\n")
    assert go().tokens == first.tokens
