"""Code written for other steering libraries: the same states, texts and order of hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rotalabs_steer
import torch
from architectures import FAMILIES, STREAMLESS, build
from planted import PROMPTS, byte_tokenizer, planted_pair, tiny_llama
from torch import Tensor, nn
from transformers import LogitsProcessor

import dsteer
from dsteer import (
    ActivationHook,
    ActivationInjector,
    MultiVectorInjector,
    SteeringVector,
    SteeringVectorSet,
    get_all_hidden_states,
)
from dsteer.errors import DataError, DsteerError, MeasurementError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

WIDTH, BLOCKS, SITE = 32, 4, "resid_post.1"
EXACT = 1e-6
"""Float32 states and logits of order 1 that were computed by the same operations."""
ROUNDED = 2e-5
"""The same by other kernels: in a batch, with padding, or through a cache."""


def normal(seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


V, W = normal(1), normal(2)


@pytest.fixture
def model() -> Any:
    return tiny_llama()


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of different length as a batch with a mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


ROWS = [tokens(1, 7)[0], tokens(1, 3, 1)[0], tokens(1, 12, 2)[0], tokens(1, 1, 3)[0]]


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


# ---------------------------------------------------------------------------------- hook


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2"])
def test_a_hook_gives_the_models_own_states(name: str) -> None:
    """Blocks that return a tensor or a tuple; states k + 1 of transformers leave block k."""
    model, ids = build(name), tokens(2, 6) % 100 + 3
    with ActivationHook(model, layer_indices=[0, 1, -1], component="residual") as hook:
        states = model(ids, output_hidden_states=True).hidden_states
    found = hook.get_activations()
    assert list(found) == [0, 1, -1]
    assert torch.equal(found[0], states[1])
    assert torch.equal(found[1], states[2])
    assert not torch.allclose(found[-1], states[3], atol=1e-2)  # that one is behind the norm
    assert torch.equal(hook.cache["layer_0"], found[0])


@pytest.mark.parametrize("component", ["residual", "mlp", "attn"])
@pytest.mark.parametrize("token_position", ["last", "first", "all"])
def test_a_hook_is_that_of_rotalabs_steer(model: Any, component: str, token_position: str) -> None:
    """Without padding."""
    ids = tokens(3, 5)
    found = []
    for library in (rotalabs_steer, dsteer):
        hook = library.ActivationHook(model, [0, 2], component, token_position)
        hook.attach()
        with torch.no_grad():
            model(ids)
        hook.detach()
        found.append(hook.get_activations())
        assert hooks_of(model) == 0
    theirs, ours = found
    assert list(ours) == list(theirs) == [0, 2]
    for layer, state in theirs.items():
        assert torch.equal(ours[layer], state)


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_and_first_are_real_tokens(model: Any, side: str) -> None:
    batch = padded(ROWS, side)
    for position in ("last", "first"):
        with ActivationHook(model, [1], token_position=position) as hook, torch.no_grad():
            model(**batch)
        found = hook.get_activations()[1]
        assert found.shape == (4, 1, WIDTH)
        for number, row in enumerate(ROWS):
            with torch.no_grad():
                alone = model(row[None], output_hidden_states=True).hidden_states[2][0]
            wanted = alone[-1 if position == "last" else 0]
            assert torch.allclose(found[number, 0], wanted, atol=ROUNDED)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_hook_round_generate(model: Any, use_cache: bool) -> None:
    """``last`` is the token that the last new one was read from, ``first`` stays token 0."""
    batch = padded(ROWS[:3], "left")
    del batch["position_ids"]
    with (
        ActivationHook(model, [1], token_position="last") as last,
        ActivationHook(model, [1], token_position="first") as first,
    ):
        texts = model.generate(
            **batch, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=None
        )
    for number, row in enumerate(ROWS[:3]):
        whole = torch.cat([row, texts[number, -4:]])[None]
        with torch.no_grad():
            states = model(whole, output_hidden_states=True).hidden_states[2][0]
        assert torch.allclose(last.get_activations()[1][number, 0], states[-2], atol=ROUNDED)
        assert torch.allclose(first.get_activations()[1][number, 0], states[0], atol=ROUNDED)


def test_a_prompt_in_chunks(model: Any) -> None:
    """A row keeps its token where a chunk of the prompt holds only its padding."""
    rows = [tokens(1, 6)[0], tokens(1, 2, 1)[0]]
    expected = {}
    for side in ("left", "right"):
        batch = padded(rows, side)
        with ActivationHook(model, [1], token_position="last") as whole, torch.no_grad():
            model(**batch)
        for position in ("last", "first"):
            with ActivationHook(model, [1], token_position=position) as hook, torch.no_grad():
                cache = None
                for columns in (slice(0, 3), slice(3, 6)):
                    cache = model(
                        input_ids=batch["input_ids"][:, columns],
                        attention_mask=batch["attention_mask"][:, : columns.stop],
                        position_ids=batch["position_ids"][:, columns],
                        past_key_values=cache,
                        use_cache=True,
                    ).past_key_values
            expected[side, position] = hook.get_activations()[1]
        last = whole.get_activations()[1]
        assert torch.allclose(expected[side, "last"], last, atol=ROUNDED)
    assert torch.allclose(expected["left", "first"], expected["right", "first"], atol=ROUNDED)


def test_what_a_hook_keeps_is_a_copy(model: Any) -> None:
    def spoil(_module: object, _inputs: object, output: Tensor) -> None:
        output.mul_(0)

    ids = tokens(1, 4)
    states = {}
    for position in ("all", "last"):
        with ActivationHook(model, [1], token_position=position) as hook, torch.no_grad():
            handle = model.model.layers[1].register_forward_hook(spoil)
            model(ids)
            handle.remove()
        states[position] = hook.get_activations()[1]
        assert not states[position].requires_grad
    assert states["all"].abs().min() > 0
    assert torch.equal(states["last"], states["all"][:, -1:])


# ---------------------------------------------------------------------------------- injector


@pytest.mark.parametrize("mode", ["all", "last", "first"])
def test_an_injector_is_that_of_rotalabs_steer(model: Any, mode: str) -> None:
    """Without padding, in one pass."""
    ids = tokens(2, 6)
    words = {"behavior": "formality", "model_name": "tiny", "extraction_method": "caa"}
    found = []
    for library in (rotalabs_steer, dsteer):
        vectors = [
            library.SteeringVector(layer_index=layer, vector=v, **words)
            for layer, v in ((1, V), (2, W))
        ]
        with library.ActivationInjector(model, vectors, 0.7, injection_mode=mode):
            found.append(logits(model, input_ids=ids))
        assert hooks_of(model) == 0
    assert torch.allclose(found[0], found[1], atol=EXACT * found[0].abs().max())
    assert not torch.allclose(found[0], logits(model, input_ids=ids), atol=1e-2)


@pytest.mark.parametrize(
    "form",
    [
        SteeringVector(V, SITE),
        [SteeringVector(V, SITE)],
        SteeringVectorSet([SteeringVector(V, SITE)]),
        {1: V},
        {SITE: V.tolist()},
        {1: SteeringVector(V, "resid_post.3")},
    ],
    ids=["vector", "list", "set", "layers", "sites", "moved"],
)
def test_forms_of_vectors(model: Any, form: Any) -> None:
    ids = tokens(2, 6)
    with dsteer.steer(model, V, 0.5, site=SITE):
        expected = logits(model, input_ids=ids)
    with ActivationInjector(model, form, strength=0.5):
        assert torch.equal(logits(model, input_ids=ids), expected)


def test_an_injector_makes_the_base_the_tuned_model() -> None:
    """Planted truth: the tuned model is the base plus b behind a block."""
    planted = planted_pair(block=1)
    ids = tokens(2, 8)
    with ActivationInjector(planted.base, {1: planted.b}, strength=1.0):
        assert torch.allclose(
            logits(planted.base, input_ids=ids), logits(planted.tuned, input_ids=ids), atol=ROUNDED
        )


def by_hand(model: Any, ids: Tensor, prompt: int, mode: str, steps: int) -> list[int]:
    """Greedy text of one prompt without cache, steered by a plain torch hook; s = 1.5, V, block 1.

    ``last`` is the last prompt token and all behind it, ``first`` is token 0.
    """

    def add(_module: object, _inputs: object, output: Tensor) -> Tensor:
        steered = output.clone()
        places = {"all": slice(None), "last": slice(prompt - 1, None), "first": slice(0, 1)}
        steered[:, places[mode]] += 1.5 * V
        return steered

    handle = model.model.layers[1].register_forward_hook(add)
    try:
        for _ in range(steps):
            ids = torch.cat(
                [ids, logits(model, input_ids=ids, use_cache=False)[:, -1:].argmax(-1)], 1
            )
    finally:
        handle.remove()
    return ids[0, prompt:].tolist()


@pytest.mark.parametrize("mode", ["all", "last", "first"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_the_hand_written_loop(model: Any, mode: str, use_cache: bool) -> None:
    """Prompts of different length in a batch, padded on the left, with a cache and without."""
    batch = padded(ROWS[:3], "left")
    del batch["position_ids"]
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**batch, **greedy)[:, -6:].tolist()
    with ActivationInjector(model, {1: V}, strength=1.5, injection_mode=mode):
        texts = model.generate(**batch, **greedy, use_cache=use_cache)[:, -6:].tolist()
    assert texts == [by_hand(model, row[None], len(row), mode, 6) for row in ROWS[:3]]
    assert texts != plain


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["all", "last", "first"])
def test_padding_does_not_move_what_is_steered(model: Any, side: str, mode: str) -> None:
    batch = padded(ROWS, side)
    with ActivationInjector(model, {1: V}, strength=2.0, injection_mode=mode):
        found = logits(model, **batch)
        for number, row in enumerate(ROWS):
            alone = logits(model, input_ids=row[None])[0]
            real = found[number][batch["attention_mask"][number] == 1]
            assert torch.allclose(real, alone, atol=ROUNDED * alone.abs().max())


def test_last_on_a_cache_that_was_filled_before(model: Any) -> None:
    """The first pass inside the block ends the prompt: its last token and those behind it are."""
    ids = tokens(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        with ActivationInjector(model, {1: V}, injection_mode="last"):
            found = []
            for stop in (7, 8):
                start = cache.get_seq_length()
                out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
                found.append(out.logits)

    def add(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :6], output[:, 6:] + V], dim=1)

    handle = model.model.layers[1].register_forward_hook(add)
    expected = logits(model, input_ids=ids)[:, 5:]
    handle.remove()
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=ROUNDED * expected.abs().max())


def test_strength_may_change_between_passes_and_back(model: Any) -> None:
    ids = tokens(2, 6)
    plain = logits(model, input_ids=ids)
    with ActivationInjector(model, {1: V}, strength=0.0) as injector:
        assert torch.equal(logits(model, input_ids=ids), plain)  # bit for bit
        for strength in (1.5, -2.0, 1):
            injector.strength = strength
            assert injector.strength == strength
            found = logits(model, input_ids=ids)
            with_steer = tiny_llama()
            with dsteer.steer(with_steer, V, strength, site=SITE):
                assert torch.equal(found, logits(with_steer, input_ids=ids))
        injector.strength = torch.tensor([0.0, 3.0])  # one a row
        found = logits(model, input_ids=ids)
        assert torch.allclose(found[0], plain[0], atol=ROUNDED * plain.abs().max())
        assert not torch.allclose(found[1], plain[1], atol=1e-2)
        with pytest.raises(MeasurementError, match="finite"):
            injector.strength = float("nan")
        assert torch.equal(logits(model, input_ids=ids), found)  # as it was before
        injector.strength = 0
        assert torch.equal(logits(model, input_ids=ids), plain)


class Turn(LogitsProcessor):
    """Calls something before a generated step."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self.left, self.what = step, what

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.left == 0:
            self.what()
        self.left -= 1
        return scores


def test_a_strength_changed_inside_generate(model: Any) -> None:
    """With a cache, what was read under the old strength stays; the loop here keeps one too."""
    ids = tokens(1, 5)
    with MultiVectorInjector(
        model, {"formal": _named("formal", V), "brief": _named("brief", W)}, {"formal": 1.5}
    ) as injector:
        assert (injector.get_strength("formal"), injector.get_strength("brief")) == (1.5, 0.0)
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[Turn(2, lambda: injector.set_strength("brief", -2.0))],
        )
        assert injector.get_strength("brief") == -2.0
    shift = 1.5 * V

    def add(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return output + shift

    handle = model.model.layers[1].register_forward_hook(add)
    cache, column, expected = None, ids, ids
    for step in range(6):
        with torch.no_grad():
            out = model(column, past_key_values=cache, use_cache=True)
        cache, column = out.past_key_values, out.logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, column], dim=1)
        if step == 2:
            shift = 1.5 * V - 2.0 * W
    handle.remove()
    assert text.tolist() == expected.tolist()


def _named(behavior: str, *vectors: Tensor) -> SteeringVectorSet:
    return SteeringVectorSet(
        behavior,
        [
            SteeringVector(behavior=behavior, layer_index=layer, vector=v)
            for layer, v in enumerate(vectors, start=1)
        ],
    )


def test_several_vectors_are_those_of_rotalabs_steer(model: Any) -> None:
    ids = tokens(2, 6)
    found = []
    for library in (rotalabs_steer, dsteer):
        sets = {}
        for behavior, vectors in (("formal", (V, 3 * W)), ("brief", (4 * V, W))):
            sets[behavior] = library.SteeringVectorSet(
                behavior,
                [
                    library.SteeringVector(
                        behavior=behavior, layer_index=layer, vector=v, model_name="tiny"
                    )
                    for layer, v in enumerate(vectors, start=1)
                ],
            )
        with library.MultiVectorInjector(
            model, vector_sets=sets, strengths={"formal": 0.5, "brief": -0.25}
        ) as injector:
            for name, strength in (("formal", 0.5), ("formal", -1.0), ("brief", 0.0)):
                injector.set_strength(name, strength)
                found.append(logits(model, input_ids=ids))
        with library.MultiVectorInjector(model, vector_sets=sets, default_layer=2):
            found.append(logits(model, input_ids=ids))
    for theirs, ours in zip(found[:4], found[4:], strict=True):
        assert torch.allclose(theirs, ours, atol=EXACT * theirs.abs().max())
        assert not torch.allclose(theirs, found[0] if theirs is not found[0] else found[1])


# ---------------------------------------------------------------------------------- order, errors


def test_the_order_of_hooks_decides_what_a_hook_sees(model: Any) -> None:
    ids = tokens(2, 6)
    with ActivationHook(model, [1, 2]) as alone, torch.no_grad():
        model(ids)
    plain = alone.get_activations()
    for position in ("all", "last"):
        with (
            ActivationHook(model, [1, 2], token_position=position) as before,
            ActivationInjector(model, {1: V}, strength=2.0),
            ActivationHook(model, [1, 2], token_position=position) as after,
            torch.no_grad(),
        ):
            model(ids)
        place = slice(None) if position == "all" else slice(-1, None)
        early, late = before.get_activations(), after.get_activations()
        assert torch.equal(early[1], plain[1][:, place])
        assert torch.allclose(late[1], plain[1][:, place] + 2 * V, atol=EXACT * 10)
        assert torch.equal(early[2], late[2])  # behind the steered layer both see its effect
        assert not torch.allclose(early[2], plain[2][:, place], atol=1e-2)


def test_hooks_go_in_any_case(model: Any) -> None:
    ids = tokens(1, 4)
    plain, before = logits(model, input_ids=ids), model.generation_config.disable_compile
    made = [
        ActivationHook(model, [0], token_position="last"),
        ActivationInjector(model, {1: V}),
        MultiVectorInjector(model, {"v": {1: V}}),
    ]
    for one in made:
        with pytest.raises(IndexError), one:
            logits(model, input_ids=ids + 1000)  # no such embedding
        assert hooks_of(model) == 0
        assert one.attach() is one
        count = hooks_of(model)
        one.attach()  # nothing more
        assert hooks_of(model) == count
        one.detach()
        one.detach()
        assert hooks_of(model) == 0
    for one in made:
        one.attach()
    for one in made:  # the first goes first
        assert model.generation_config.disable_compile is True
        one.detach()
    assert model.generation_config.disable_compile is before
    assert hooks_of(model) == 0
    assert torch.equal(logits(model, input_ids=ids), plain)


OTHER = SteeringVector(V, SITE, model_type="gpt2", model="other/model")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda m: ActivationHook(m, [0], component="mpl"), "component 'mpl'.*did you mean 'mlp'"),
        (lambda m: ActivationHook(m, [0], token_position="mean"), "token_position 'mean'.*known"),
        (lambda m: ActivationHook(m, [4]), "layer 4: .* 4 blocks, 0 to 3"),
        (lambda m: ActivationHook(m, [-5]), "layer -5: "),
        (lambda m: ActivationInjector(m, {1: V}, injection_mode="lst"), "did you mean 'last'"),
        (lambda m: ActivationInjector(m, V), "a tensor does not say where it acts"),
        (lambda m: ActivationInjector(m, {4: V}), "the last is 'resid_post.3'"),
        (lambda m: ActivationInjector(m, {1: V[:5]}), "its width is 32, and the vectors are of 5"),
        (lambda m: ActivationInjector(m, OTHER), "type is llama, .* gpt2 .other/model"),
        (lambda m: ActivationInjector(m, []), "no steering vectors"),
        (lambda m: ActivationInjector(m, SteeringVectorSet(behavior="a")), "no vector yet"),
        (lambda m: ActivationInjector(m, {1: V}, float("inf")), "strength inf"),
        (lambda m: MultiVectorInjector(m, {}), "vector_sets is empty"),
        (lambda m: MultiVectorInjector(m, {"a": {1: V}}, {"b": 1.0}), "no vectors named 'b'"),
        (
            lambda m: MultiVectorInjector(m, {"a": {1: V}}, default_layer=2),
            r"layer 2; it has \[1\]",
        ),
        (lambda m: MultiVectorInjector(m, {"a": {1: V}}).set_strength("b", 1), "named 'b'"),
        (lambda m: MultiVectorInjector(m, {"a": {1: V}}).get_strength("b"), "named 'b'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    model: Any, attempt: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(DsteerError, match=message) as caught:
        attempt(model)
    assert "\n" not in str(caught.value)
    assert hooks_of(model) == 0


def test_a_block_called_by_itself_is_refused(model: Any) -> None:
    """No pass, so nothing tells which of its tokens are real."""
    state = torch.zeros(1, 3, WIDTH)
    rotary = model.model.rotary_emb(state, torch.arange(3)[None])
    for one in (
        ActivationHook(model, [0], token_position="last"),
        ActivationInjector(model, {0: V}),
    ):
        with one, pytest.raises(ModelError, match="outside a pass through the decoder"):
            model.model.layers[0](state, position_embeddings=rotary)


# ---------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", FAMILIES)
def test_all_hidden_states_are_the_models_own(name: str) -> None:
    model, tokenizer = build(name), byte_tokenizer()
    if model.config.get_text_config().vocab_size < 260:
        model.resize_token_embeddings(260)
    model.eval()
    found = get_all_hidden_states(model, tokenizer, "Bees find home.")
    ids = tokenizer("Bees find home.", return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert found.dtype == torch.float32
    if name in STREAMLESS:  # theirs have no embedding, and the last block's own output
        found, states = found[1:], (*states[:-2], states[-1])
    for ours, theirs in zip(found, states, strict=True):
        # capture's bound: other kernels without a mask
        assert (ours - theirs[0]).norm() <= 1e-5 * theirs.norm()


def test_the_simplest_recipe_finds_the_planted_vector() -> None:
    """The difference of two models' states, by its index: b from state block + 1 on."""
    planted = planted_pair(block=1)
    tuned, base = (
        get_all_hidden_states(model, planted.tokenizer, PROMPTS[0])
        for model in (planted.tuned, planted.base)
    )
    shift = tuned - base
    assert shift.shape == (BLOCKS + 1, len(planted.tokenizer(PROMPTS[0]).input_ids), WIDTH)
    assert not shift[:2].any()
    assert torch.allclose(shift[2], planted.b.expand_as(shift[2]), atol=EXACT * 10)
    assert shift[3:].abs().min(dim=0).values.max() > 0
    with ActivationInjector(planted.base, {1: shift[2].mean(dim=0)}):
        steered = get_all_hidden_states(planted.base, planted.tokenizer, PROMPTS[0])
    assert torch.allclose(steered, tuned, atol=ROUNDED * tuned.abs().max())
    logits(planted.base, input_ids=tokens(1, 3), output_hidden_states=True)
    count = hooks_of(planted.base)  # transformers' own stay, and would see plain states
    with ActivationInjector(planted.base, {1: shift[2].mean(dim=0)}):
        again = get_all_hidden_states(planted.base, planted.tokenizer, PROMPTS[0])
    assert torch.equal(again, steered)
    assert hooks_of(planted.base) == count


def test_conversations(model: Any) -> None:
    """A text, and messages by the template, with nothing behind the last turn; one BOS each."""
    tokenizer = byte_tokenizer()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = "<user>Hi\n<assistant>Hello\n"
    assert torch.equal(
        get_all_hidden_states(model, tokenizer, turns),
        get_all_hidden_states(model, tokenizer, text),
    )
    bare = byte_tokenizer(template=None)
    assert torch.equal(
        get_all_hidden_states(model, bare, turns),
        get_all_hidden_states(model, bare, "\n\nHuman: Hi\n\nAssistant: Hello"),
    )
    assert not get_all_hidden_states(model, tokenizer, text).is_inference()
    for broken in ([], "x" * 300):
        with pytest.raises(DataError):
            get_all_hidden_states(model, tokenizer, broken)
    refusing = byte_tokenizer(template="{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match=r"refuses the conversation .no system turn"):
        get_all_hidden_states(model, refusing, turns)


def test_two_stacks_have_no_common_tokens() -> None:
    from seq2seq_models import FAMILIES as TWO_STACKS

    with pytest.raises(ModelError, match=r"encoder .* dsteer.extract"):
        get_all_hidden_states(TWO_STACKS["t5"](), byte_tokenizer(), "Hi")


def test_numpys_numbers_name_layers_and_strengths(model: Any) -> None:
    """As argmax and linspace give them; and (1, d), as a mean over a batch of last tokens is."""
    v = torch.linspace(-1, 1, model.config.hidden_size)
    ids = torch.tensor([[0, 5, 6]])
    with torch.no_grad(), ActivationInjector(model, {1: v}, strength=2.0):
        expected = model(ids).logits
    for one in (np.int64(1), np.int32(1), torch.tensor(1)):
        vector = SteeringVector(behavior="a", layer_index=one, vector=v[None], model_name="m")
        vset = SteeringVectorSet("a", [vector])
        assert vset[one] is vset.get(one) is vset["resid_post.1"]
        with torch.no_grad(), ActivationInjector(model, {one: v[None]}, strength=np.float32(2)):
            assert torch.equal(model(ids).logits, expected)
        both = MultiVectorInjector(model, {"a": vset}, {"a": np.int64(1)}, default_layer=one)
        with torch.no_grad(), both:
            both.set_strength("a", np.float32(2))
            assert torch.equal(model(ids).logits, expected)
