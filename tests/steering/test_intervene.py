"""Steering changes the states that it should by what it should, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from planted import PROMPTS, planted_pair
from torch import Tensor, nn

import dsteer
from dsteer.activations.capture import Capture
from dsteer.activations.sites import all_sites
from dsteer.errors import ConfigError, MeasurementError, ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.steering.intervene import (
    Hooks,
    Intervention,
    Placement,
    Schedule,
    normals,
    operate,
    steer,
)
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

SITE = "resid_post.1"
WIDTH = 32


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, columns: int, seed: int = 5) -> Tensor:
    return torch.randint(3, 120, (rows, columns), generator=torch.Generator().manual_seed(seed))


V = normal(WIDTH, seed=1, size=0.7)


@pytest.fixture
def llama() -> Any:
    return build("llama")


def copy_rows(state: Tensor) -> Tensor:
    return state.flatten(0, 1).clone()


def states(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """(B·T, d) of every site, by a capture that is registered now."""
    anatomy = Anatomy.of(model)
    with Capture(anatomy, all_sites(anatomy.n_blocks)) as capture:
        return capture.read(ids, copy_rows)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# The formulas


def by_hand(operation: str, h: np.ndarray, v: np.ndarray, s: float, relative: bool) -> np.ndarray:
    """One state (d,), in float64."""
    if operation == "scale":
        return h + s * h
    length = math.sqrt(sum(x * x for x in v))
    along = sum(a * b for a, b in zip(h, v, strict=True)) / length
    if operation == "add":
        return h + s * v * (math.sqrt(sum(x * x for x in h)) / length if relative else 1)
    if operation == "ablate":
        return h - s * along * v / length
    return h + s * (length - along) * v / length


FORMULAS = [("add", False), ("add", True), ("ablate", False), ("scale", False), ("project", False)]


@pytest.mark.parametrize(("operation", "relative"), FORMULAS)
@pytest.mark.parametrize("a_row", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_operations_equal_their_formulas(
    operation: Any, relative: bool, a_row: bool, dtype: torch.dtype, bound: float
) -> None:
    """Within the dtype's rounding of a float64 reference; bfloat16 is rounded once, at the end."""
    state = normal(3, 4, 8, seed=2, size=3).to(dtype)
    vector = normal(3 if a_row else 1, 8, seed=3).double()
    strength = normal(3, 4, seed=4).double() if a_row else torch.tensor([[0.7]]).double()
    got = operate(
        state,
        operation,
        None if operation == "scale" else vector,
        strength,
        torch.ones(3, 4, dtype=torch.bool),
        relative=relative,
    )
    assert got.dtype == dtype
    for row in range(3):
        for column in range(4):
            v = vector[row if a_row else 0].numpy()
            s = float(strength[row, column] if a_row else strength[0, 0])
            expected = by_hand(operation, state[row, column].double().numpy(), v, s, relative)
            error = np.abs(got[row, column].double().numpy() - expected)
            assert (error <= bound * np.maximum(np.abs(expected), bound < 1e-3)).all()


def test_what_full_strength_means() -> None:
    """Ablation leaves no component along v, projection leaves ‖v‖, and both keep the rest."""
    state, v = normal(1, 5, 8).double(), normal(1, 8, seed=1).double()
    unit = v[0] / v[0].norm()
    one, everywhere = torch.ones(1, 1), torch.ones(1, 5, dtype=torch.bool)
    ablated = operate(state, "ablate", v, one, everywhere)
    projected = operate(state, "project", v, one, everywhere)
    assert (ablated @ unit).abs().max() < 1e-14
    assert (projected @ unit - v.norm()).abs().max() < 1e-14
    rest = state - (state @ unit)[..., None] * unit
    assert torch.allclose(ablated, rest, rtol=0, atol=1e-14)
    assert torch.allclose(projected - v.norm() * unit, rest, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("operation", "relative"), [*FORMULAS, ("noise", False)])
def test_what_is_not_selected_or_has_strength_0_keeps_every_bit(
    operation: Any, relative: bool, dtype: torch.dtype
) -> None:
    state = normal(2, 4, 8, size=3).to(dtype)
    state[:, :, 0] = -0.0
    state[:, 1, 1] = math.inf
    state[:, 2, 2] = math.nan
    got = operate(
        state,
        operation,
        None if operation == "scale" else normal(1, 8, seed=1),
        torch.tensor([[0.0], [1.0]]),
        torch.tensor([[True] * 4, [False, False, False, True]]),
        relative=relative,
        noise=normal(2, 4, 8, seed=2) if operation == "noise" else None,
    )
    raw = torch.int32 if dtype == torch.float32 else torch.int16
    same = (got.view(raw) == state.view(raw)).all(-1)
    assert same.tolist() == [[True] * 4, [True, True, True, False]]


# Noise


def test_normals_are_normal_and_unrelated() -> None:
    index = torch.arange(64).expand(8, -1)
    drawn = normals(torch.full((8,), 3), torch.arange(8), index, 128).double()
    n = drawn.numel()
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((drawn**4).mean() - 3) < 4 * math.sqrt(96 / n)
    other = normals(torch.full((8,), 4), torch.arange(8), index, 128).double()
    for name, a, b in (
        ("seed", drawn, other),
        ("row", drawn[1:], drawn[:-1]),
        ("token", drawn[:, 1:], drawn[:, :-1]),
        ("coordinate", drawn[..., 1:], drawn[..., :-1]),
    ):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel()), name


def test_noise_has_the_vectors_norm_and_ignores_the_batch(llama: Any) -> None:
    """‖steered − clean‖ = s‖v‖ at each token; with a seed a row it does not see its batch-mates."""
    ids = tokens(3, 7)
    clean = states(llama, ids)[SITE].view(3, 7, WIDTH)

    def added(rows: list[int], columns: int = 7) -> Tensor:
        noise = Intervention(SITE, V, "noise", strength=2.0, seed=[10 + r for r in rows])
        with steer(llama, noise):
            found = states(llama, ids[rows, :columns])[SITE].view(len(rows), columns, WIDTH)
        return found - clean[rows, :columns]

    together = added([0, 1, 2])
    assert torch.allclose(together.norm(dim=-1), 2 * V.norm().expand(3, 7), rtol=1e-5)
    cosines = nn.functional.cosine_similarity(together[:, None], together[None], dim=-1)
    assert cosines[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.9
    for rows in ([1], [2, 0], [1, 1]):
        assert torch.allclose(added(rows), together[rows], atol=2e-5)
    assert torch.allclose(added([2, 0], 4), together[[2, 0], :4], atol=2e-5)
    with steer(llama, V, site=SITE, operation="noise", strength=2.0, seed=10):
        one_seed = states(llama, ids)[SITE].view(3, 7, WIDTH) - clean
    assert torch.allclose(one_seed[0], together[0], atol=2e-5)
    assert (one_seed[1] - one_seed[0]).norm() > 1


def test_noise_under_cache_and_padding(llama: Any) -> None:
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    noise = Intervention(SITE, V, "noise", strength=3.0, seed=4)
    with steer(llama, noise):
        texts = [
            llama.generate(i, attention_mask=m, max_new_tokens=8, do_sample=False, use_cache=cache)
            for i, m in ((ids, torch.ones_like(ids)), (padded, mask))
            for cache in (True, False)
        ]
    new = [text[0, -8:].tolist() for text in texts]
    assert new == [new[0]] * 4
    clean = llama.generate(ids, max_new_tokens=8, do_sample=False)
    assert clean[0, -8:].tolist() != new[0]


# Positions


def test_masks_by_hand() -> None:
    """Row 0 is padded on the left, row 1 on the right; 3 and 4 real tokens, of which 2 prompt."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    placement = Placement.of_mask(mask)
    assert placement.index.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, -1]]
    assert Placement.of_mask(mask, 2, 2).index.tolist() == [[0, 1], [2, 3]]
    placement = Placement(placement.index, torch.tensor([2, 2]))
    expected = {
        "all": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]],
        "prompt": [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]],
        "prompt_last": [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]],
        "generated": [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]],
        (0, 1): [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]],
        (1, 3): [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]],
        (3, 9): [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0]],
    }
    for positions, wanted in expected.items():
        assert placement.mask(positions).int().tolist() == wanted, positions
    empty = Placement(torch.full((1, 3), -1), torch.tensor([0]))
    assert not any(empty.mask(positions).any() for positions in expected)
    real = placement.index >= 0
    assert placement.steps[real].tolist() == [-1, 0, 1, -1, 0, 1, 2]


class Changes:
    """Two hooks at a site, one on each side of a steering hook: which columns did it change?"""

    def __init__(self, model: Any, site: str = SITE) -> None:
        anatomy = Anatomy.of(model)
        self.module = anatomy.blocks[int(site.split(".")[1])]
        self.before: list[Tensor] = []
        self.found: list[list[list[int]]] = []

    def __enter__(self) -> Changes:
        self.first = self.module.register_forward_hook(
            lambda _m, _i, out: self.before.append(Anatomy.read(out).clone())
        )
        return self

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        def after(_m: nn.Module, _i: object, out: object) -> None:
            changed = (Anatomy.read(out) != self.before.pop()).any(-1)
            self.found.append(changed.int().tolist())

        handle = self.module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def __exit__(self, *_error: object) -> None:
        self.first.remove()


LEFT = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
NEW = 3

# Row 0 has p = 2, row 1 has p = 5. The prompt's pass, then three passes of one new token each.
CACHED: dict[Any, tuple[list[list[int]], list[list[int]], list[list[int]]]] = {
    "all": (
        [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 1, 1]] * 2
    ),
    "prompt": (
        [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], [[0, 0, 0]] * 2
    ),
    "prompt_last": (
        [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]], [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], [[0, 0, 0]] * 2
    ),
    "generated": (
        [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]], [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], [[1, 1, 1]] * 2
    ),
    (1, 4): (
        [[0, 0, 0, 0, 1], [0, 1, 1, 1, 0]],
        [[0, 1, 0, 0, 0], [0, 1, 1, 1, 0]],
        [[1, 1, 0], [0, 0, 0]],
    ),
    (4, 7): (
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
        [[0, 0, 1], [1, 1, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("positions", CACHED, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_the_columns_that_are_steered(positions: Any, side: str, given: bool, name: str) -> None:
    """Under a cache and without one, against expectations written by hand."""
    model, ids, new = build(name), tokens(2, 5), tokens(2, NEW, seed=9)
    mask = LEFT if side == "left" else RIGHT
    left, right, later = CACHED[positions]
    prompt = left if side == "left" else right
    lengths = [2, 5] if given else None
    with (
        torch.no_grad(),
        Changes(model) as cached,
        steer(model, V, 1.0, positions, site=SITE, prompt_lengths=lengths),
        cached.watch(),
    ):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for step in range(NEW):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            model(new[:, step : step + 1], attention_mask=mask, past_key_values=cache)
    assert cached.found[0] == prompt
    assert [[found[row][0] for found in cached.found[1:]] for row in range(2)] == later
    mask = mask[:, :5]
    with (
        torch.no_grad(),
        Changes(model) as uncached,
        steer(model, V, 1.0, positions, site=SITE, prompt_lengths=lengths),
        uncached.watch(),
    ):
        for step in range(NEW + 1):
            grown = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], dim=1)
            model(torch.cat([ids, new[:, :step]], 1), attention_mask=grown, use_cache=False)
    for step, found in enumerate(uncached.found):
        assert found == [prompt[row] + later[row][:step] for row in range(2)]


def test_a_longer_prompt_after_the_first_is_a_prompt(llama: Any) -> None:
    """A second turn begins with the first one's ids; its own length counts."""
    ids = tokens(1, 9)
    for use_cache in (True, False):
        with (
            torch.no_grad(),
            Changes(llama) as changes,
            steer(llama, V, 1.0, "prompt_last", site=SITE),
            changes.watch(),
        ):
            llama(ids[:, :6], use_cache=use_cache)
            llama(ids, use_cache=use_cache)
        assert changes.found == [[[0] * 5 + [1]], [[0] * 8 + [1]]]
    with (
        torch.no_grad(),
        Changes(llama) as changes,
        steer(llama, V, 1.0, "prompt_last", site=SITE),
        changes.watch(),
    ):
        llama(ids[:, :6], use_cache=True)
        llama(ids[:, :7], use_cache=True)  # one token more, and its cache is empty too
    assert changes.found == [[[0] * 5 + [1]], [[0] * 6 + [1]]]


def test_a_cache_that_was_filled_unseen_needs_lengths(llama: Any) -> None:
    ids = tokens(2, 6)
    with torch.no_grad():

        def filled() -> Any:
            return llama(ids[:, :4], use_cache=True).past_key_values

        for positions, schedule in (("generated", None), ("all", Schedule("linear", steps=3))):
            kwargs: dict[str, Any] = {"positions": positions, "schedule": schedule, "site": SITE}
            cache = filled()
            with steer(llama, V, **kwargs):
                llama(ids[:, :2])  # the length of another prompt is not taken
                with pytest.raises(ModelError, match="prompt_lengths"):
                    llama(ids[:, 4:], past_key_values=cache)
            cache = filled()
            with (
                Changes(llama) as changes,
                steer(llama, V, **kwargs, prompt_lengths=[6, 5]),
                changes.watch(),
            ):
                llama(ids[:, 4:], past_key_values=cache)
            wanted = [[[0, 1], [1, 1]]] if positions == "generated" else [[[1, 1], [1, 1]]]
            assert changes.found == wanted
        cache = filled()
        with Changes(llama) as changes, steer(llama, V, site=SITE), changes.watch():
            llama(ids[:, 4:], past_key_values=cache)
        assert changes.found == [[[1, 1], [1, 1]]]


# In a model


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "gemma2", "mpt", "gpt-j", "opt"])
def test_steered_minus_clean_is_the_vector_at_its_site(name: str) -> None:
    """Blocks that return tensors and tuples; earlier sites keep every bit, later ones move."""
    model, ids = build(name), tokens(2, 6)
    n_blocks = Anatomy.of(model).n_blocks
    clean = states(model, ids)
    for number, site in enumerate(all_sites(n_blocks)):
        with steer(model, SteeringVector(V, site), strength=-1.5):
            steered = states(model, ids)
        for earlier in all_sites(n_blocks)[:number]:
            assert torch.equal(steered[earlier], clean[earlier]), (site, earlier)
        error = (steered[site] - clean[site] + 1.5 * V).abs()
        assert (error <= 2**-22 * clean[site].abs().clamp(min=1)).all(), site
        for later in all_sites(n_blocks)[number + 1 :]:
            assert (steered[later] - clean[later]).abs().amax(1).min() > 1e-3, (site, later)


def test_strength_and_vector_a_row(llama: Any) -> None:
    ids, vectors = tokens(3, 5), normal(3, WIDTH, seed=8)
    strengths = [0.0, -2.0, 0.5]
    clean = states(llama, ids)[SITE].view(3, 5, WIDTH)
    for vector, strength in ((V, strengths), (vectors, 1.0), (vectors, torch.tensor(strengths))):
        with steer(llama, vector, strength, site=SITE):
            found = states(llama, ids)[SITE].view(3, 5, WIDTH) - clean
        s = torch.as_tensor(strength).reshape(-1, 1, 1)
        v = vector if vector.ndim == 2 else vector[None]
        assert torch.allclose(found, (s * v[:, None]).expand_as(found), rtol=0, atol=2e-6)
    with steer(llama, V, strengths, site=SITE), pytest.raises(ModelError, match="3 values of str"):
        llama(ids[:2])
    with (
        steer(llama, V, [1.0], site=SITE),
        pytest.raises(ModelError, match="num_return_sequences"),
    ):
        llama.generate(ids[:1], num_return_sequences=2, do_sample=True, max_new_tokens=2)
    with steer(llama, vectors, site=SITE), pytest.raises(ModelError, match="batch of 2 rows"):
        llama(ids[:2])
    with (
        steer(llama, V, site=SITE, prompt_lengths=[1, 2, 3]),
        pytest.raises(ModelError, match="prompt_lengths"),
    ):
        llama(ids[:2])


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "gemma2"])
def test_strength_0_changes_no_bit(name: str) -> None:
    model, ids = build(name), tokens(2, 6)
    with torch.no_grad():
        clean = model(ids).logits
        for operation in ("add", "ablate", "noise", "project", "scale"):
            vector = None if operation == "scale" else V
            with steer(model, vector, 0, operation=operation, site=SITE):
                assert torch.equal(model(ids).logits, clean), operation
            with steer(model, vector, 0.5, operation=operation, site=SITE):
                assert not torch.allclose(model(ids).logits, clean, atol=1e-3), operation


POSITIONS: tuple[Any, ...] = ("all", "prompt", "prompt_last", "generated", (2, 9))


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "gemma2", "bloom"])
def test_cached_and_uncached_texts_are_equal(name: str) -> None:
    """Greedy, left-padded, for each position and schedule; and they are not all one text."""
    model, ids = build(name), tokens(2, 5)
    schedules = (None, Schedule("linear", steps=4), Schedule("exponential", half_life=1.5))
    seen = set()
    for positions in POSITIONS:
        for schedule in schedules if positions in ("all", "generated") else (None,):
            kwargs: dict[str, Any] = {"positions": positions, "schedule": schedule}
            with steer(model, 5 * V, [1.0, -1.0], site=SITE, **kwargs):
                texts = [
                    model.generate(
                        ids, attention_mask=LEFT, use_cache=use_cache, do_sample=False,
                        max_new_tokens=8, min_new_tokens=8,
                    )
                    for use_cache in (True, False)
                ]  # fmt: skip
            assert torch.equal(*texts), kwargs
            seen.add(tuple(texts[0].flatten().tolist()))
    assert len(seen) >= 4


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2"])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_a_padded_batch_equals_one_at_a_time(name: str, positions: Any) -> None:
    model, lengths, strengths = build(name), (3, 7, 5), (2.0, -3.0, 4.0)
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.cat([nn.functional.pad(row, (7 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    settings: Any = {
        "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with steer(model, 2 * V, strengths, positions, site=SITE):
        batch = model.generate(ids, attention_mask=mask, **settings)
    for number, row in enumerate(rows):
        with steer(model, 2 * V, strengths[number], positions, site=SITE):
            alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)
        assert torch.equal(alone.sequences[0, -6:], batch.sequences[number, -6:])
        for a, b in zip(alone.logits, batch.logits, strict=True):
            assert (a[0] - b[number]).abs().max() < 1e-4


def test_schedules_scale_what_is_added(llama: Any) -> None:
    """Over p = 3 prompt tokens and 5 more: step 0 is at the last prompt token."""
    steps = torch.tensor([[-2, -1, 0, 1, 2, 3, 4, 5]])
    factors = {
        Schedule(): [1] * 8,
        Schedule("linear", steps=4): [1, 1, 1, 0.75, 0.5, 0.25, 0, 0],
        Schedule("exponential", half_life=2): [
            1, 1, 1, 0.5**0.5, 0.5, 0.5**1.5, 0.25, 0.5**2.5,
        ],
    }  # fmt: skip
    ids = tokens(1, 8)
    clean = states(llama, ids)[SITE]
    for schedule, wanted in factors.items():
        assert torch.allclose(schedule.at(steps), torch.tensor([wanted]).float(), atol=1e-6)
        with steer(llama, V, 2.0, site=SITE, schedule=schedule, prompt_lengths=[3]):
            found = states(llama, ids)[SITE] - clean
        assert torch.allclose(found, 2 * torch.tensor(wanted)[:, None] * V, atol=2e-6)


def test_nested_steers_add_up(llama: Any) -> None:
    ids, other = tokens(2, 5), normal(WIDTH, seed=6)
    clean = states(llama, ids)[SITE]
    with steer(llama, V, site=SITE):
        with steer(llama, other, -2.0, site=SITE):
            both = states(llama, ids)[SITE]
        one = states(llama, ids)[SITE]
    assert torch.allclose(both - clean, (V - 2 * other).expand(10, -1), atol=2e-6)
    assert torch.allclose(one - clean, V.expand(10, -1), atol=2e-6)
    listed = [Intervention(SITE, V), Intervention(SITE, other, strength=-2.0)]
    with steer(llama, listed):
        assert torch.equal(states(llama, ids)[SITE], both)
    # in their order: what is added first is taken out, what is added later is not
    with steer(llama, [Intervention(SITE, V), Intervention(SITE, V, "ablate")]):
        gone = states(llama, ids)[SITE]
    with steer(llama, [Intervention(SITE, V, "ablate"), Intervention(SITE, V)]):
        kept = states(llama, ids)[SITE]
    unit = V / V.norm()
    assert (gone @ unit).abs().max() < 1e-5
    assert (kept @ unit - V.norm()).abs().max() < 1e-5


def test_a_set_steers_its_sites(llama: Any) -> None:
    ids = tokens(2, 4)
    vset = SteeringVectorSet(
        SteeringVector(normal(WIDTH, seed=k), f"resid_post.{k}") for k in range(3)
    )

    def logits(what: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), steer(llama, what, **kwargs):
            return llama(ids).logits

    def listed(strengths: dict[int, float]) -> Tensor:
        return logits(
            [
                Intervention(f"resid_post.{k}", vset[f"resid_post.{k}"], strength=s)
                for k, s in strengths.items()
            ]
        )

    assert torch.equal(logits(vset, strength=0.5), listed({0: 0.5, 1: 0.5, 2: 0.5}))
    by_site = {"resid_post.2": -1.0, "resid_post.0": 2.0}
    assert torch.equal(logits(vset, strength=by_site), listed({0: 2.0, 2: -1.0}))
    assert torch.equal(logits(vset, site="resid_post.1"), logits(vset["resid_post.1"]))
    elsewhere = logits(vset["resid_post.1"], site="resid_post.2")
    assert torch.equal(elsewhere, logits(vset["resid_post.1"].tensor, site="resid_post.2"))
    with pytest.raises(ConfigError, match="holds no vector there"):
        logits(vset, strength={"resid_post.7": 1.0})
    with pytest.raises(ConfigError, match="needs a SteeringVectorSet"):
        logits(V, site=SITE, strength={SITE: 1.0})


def test_a_capture_sees_what_was_hooked_before_it(llama: Any) -> None:
    """Trap 20. Registered before the steering it sees the clean state, after it the steered one."""
    ids, anatomy = tokens(2, 5), Anatomy.of(llama)
    later = "resid_post.2"
    clean = states(llama, ids)
    with Capture(anatomy, [SITE, later]) as first, steer(llama, V, site=SITE):
        before = first.read(ids, copy_rows)
    with steer(llama, V, site=SITE), Capture(anatomy, [SITE, later]) as second:
        after = second.read(ids, copy_rows)
    assert torch.equal(before[SITE], clean[SITE])
    assert torch.allclose(after[SITE] - clean[SITE], V.expand(10, -1), atol=2e-6)
    assert torch.equal(before[later], after[later])  # downstream of the site both see steering
    assert not torch.allclose(before[later], clean[later], atol=1e-2)


# Hooks always go


def test_hooks_are_gone_afterwards(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, count = tokens(1, 4), hooks_of(llama)
    vset = SteeringVectorSet(SteeringVector(V, f"resid_post.{k}") for k in range(3))
    with torch.no_grad():
        clean = llama(ids).logits
    assert llama.generation_config.disable_compile is None
    with steer(llama, vset):
        assert hooks_of(llama) == count + 6  # three sites, two at the decoder, one around it
        assert llama.generation_config.disable_compile is True
    assert hooks_of(llama) == count
    assert llama.generation_config.disable_compile is None
    with pytest.raises(KeyboardInterrupt), steer(llama, vset), steer(llama, V, site=SITE):
        raise KeyboardInterrupt
    assert hooks_of(llama) == count

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of paper")

    with steer(llama, vset):  # a pass that fails half way leaves nothing behind for the next
        with monkeypatch.context() as patch:
            patch.setattr(llama.model.layers[1].mlp, "forward", broken)
            with pytest.raises(RuntimeError, match="out of paper"):
                llama(ids)
        llama(ids)
    with monkeypatch.context() as patch:  # only some hooks can be installed
        patch.setattr(llama.model.layers[2], "register_forward_hook", broken)
        with pytest.raises(RuntimeError, match="out of paper"), steer(llama, vset):
            pass
        assert hooks_of(llama) == count
    with monkeypatch.context() as patch:
        patch.setattr(llama.model, "register_forward_hook", broken)
        with pytest.raises(RuntimeError, match="out of paper"), steer(llama, vset):
            pass
    assert hooks_of(llama) == count
    assert llama.generation_config.disable_compile is None
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, clean)


def test_hooks_with_placements_of_the_caller(llama: Any) -> None:
    """Rows of a pass choose their values: a row that finished leaves, the others keep theirs."""
    ids, strengths = tokens(3, 4), [1.0, -1.0, 2.0]
    intervention = Intervention(SITE, V, strength=strengths, positions="generated")
    hooks = Hooks(llama, [intervention])
    assert hooks.sites == (SITE,)
    clean = states(llama, ids)[SITE].view(3, 4, WIDTH)
    index = torch.arange(4).expand(3, -1)
    with hooks:
        hooks.placement = Placement(index[:2], torch.tensor([3, 4]), rows=torch.tensor([2, 1]))
        assert hooks.silent == (SITE,)
        found = states(llama, ids[[2, 1]])[SITE].view(2, 4, WIDTH) - clean[[2, 1]]
        assert hooks.silent == ()
        wanted = torch.tensor([[0, 0, 2, 2], [0, 0, 0, -1.0]])[..., None] * V
        assert torch.allclose(found, wanted, atol=2e-6)
        hooks.placement = Placement(index, torch.tensor([3, 4, 2]))
        applied = hooks.apply(SITE, clean)
        assert torch.equal(states(llama, ids)[SITE].view(3, 4, WIDTH), applied)
        assert hooks.apply("resid_post.0", clean) is clean
        with pytest.raises(ModelError, match="ran twice"):
            llama(ids)
        hooks.placement = Placement(index, torch.tensor([3, 4, 2]))
        with pytest.raises(ModelError, match="rows and tokens"):
            llama(ids[:, :2])
        hooks.placement = None
        with pytest.raises(ModelError, match="outside a pass"):
            llama(ids)
    noise = Intervention(SITE, V, "noise", seed=3)
    with Hooks(llama, [noise]) as hooks:
        hooks.placement = Placement(index)
        together = hooks.apply(SITE, clean)
        hooks.placement = Placement(index[:1], rows=torch.tensor([2]))
        assert torch.equal(hooks.apply(SITE, clean[2:]), together[2:])
        assert not torch.equal(together[0] - clean[0], together[2] - clean[2])


# Other kinds of model


def test_bfloat16_states() -> None:
    """The vector meets the state in float32, and the sum is rounded once."""
    model, ids = build("llama").bfloat16(), tokens(2, 5)
    clean = states(model, ids)[SITE]
    with steer(model, V.double(), 0.3, site=SITE):
        steered = states(model, ids)[SITE]
        text = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(steered, (clean + 0.3 * V).bfloat16().float())
    assert text.shape == (2, 8)


def test_a_block_that_returns_another_dtype_than_its_weights() -> None:
    """As quantised blocks do: weights of one dtype, states of another."""
    model, ids = build("llama"), tokens(2, 5)
    block = model.model.layers[1]
    block.register_forward_hook(lambda _m, _i, out: out.bfloat16())
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0].float(), *args[1:]))
    clean = states(model, ids)[SITE]
    with steer(model, V, 0.3, site=SITE):
        steered = states(model, ids)[SITE]
    assert torch.equal(steered, (clean + 0.3 * V).bfloat16().float())


def test_an_offloaded_model(llama: Any) -> None:
    """Its weights come to the device for one block at a time; its states are steered the same."""
    from accelerate import cpu_offload

    ids = tokens(2, 5)
    offloaded = cpu_offload(copy.deepcopy(llama), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    texts = []
    for model in (llama, offloaded):
        with steer(model, 4 * V, site=SITE, positions="generated"):
            texts.append(model.generate(ids, max_new_tokens=5, do_sample=False))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], llama.generate(ids, max_new_tokens=5, do_sample=False))


def test_a_lora_model(llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    ids = tokens(2, 5)
    with torch.no_grad(), steer(llama, V, site=SITE):
        expected = llama(ids).logits
    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj"])).eval()
    with torch.no_grad(), steer(wrapped, V, site=SITE):  # a fresh adapter is the identity
        assert torch.allclose(wrapped(ids).logits, expected, atol=1e-5)


def test_inputs_embeds(llama: Any) -> None:
    ids = tokens(1, 5)
    embeds = llama.get_input_embeddings()(ids)
    with steer(llama, 4 * V, site=SITE, positions="generated"):
        from_ids = llama.generate(ids, max_new_tokens=6, do_sample=False)
        from_embeds = llama.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(from_ids[:, 5:], from_embeds)


# Refusals


def test_models_that_would_ignore_hooks_are_refused(llama: Any) -> None:
    ids = tokens(1, 4)
    fused = copy.deepcopy(llama)
    block = fused.model.layers[1]
    kind = type(block)
    block.__class__ = type("Fused", (kind,), {"__call__": kind.forward})
    with steer(fused, V, site=SITE), pytest.raises(ModelError, match="fused kernels"):
        fused(ids)
    with steer(fused, V, site="resid_post.0"):
        fused(ids)
    scripted = copy.deepcopy(llama)
    scripted.model.layers[1] = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ModelError, match="TorchScript"), steer(scripted, V, site=SITE):
        pass
    compiled = copy.deepcopy(llama)
    compiled.model.layers[1].compile()
    with pytest.raises(ModelError, match="compiled"), steer(compiled, V, site=SITE):
        pass
    with steer(llama, V, site=SITE), pytest.raises(ModelError, match="traced"):
        torch.jit.trace(llama, ids, check_trace=False)
    with steer(llama, V, site=SITE), pytest.raises(ModelError, match="not a static one"):
        llama.generate(ids, max_new_tokens=3, cache_implementation="static", do_sample=False)
    with steer(llama, V, site="final_norm"), pytest.raises(ModelError, match="outside a pass"):
        llama.model.norm(normal(1, 4, WIDTH))


def test_a_pass_through_twice_the_same_block_is_refused(llama: Any) -> None:
    with steer(llama, V, site=SITE):
        llama.model.layers[2] = llama.model.layers[1]
        with pytest.raises(ModelError, match="ran twice"):
            llama(tokens(1, 4), use_cache=False)


def test_float16_gemma_is_refused() -> None:
    model = build("gemma2").half()
    with pytest.raises(ModelError, match="float16 overflows"), steer(model, V, site=SITE):
        pass


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda m: steer(m, normal(16), site=SITE), ModelError, "width 16.* 32"),
        (lambda m: steer(m, normal(2, 16), site=SITE), ModelError, "width 16"),
        (lambda m: steer(m, V, site="resid_post.3"), ConfigError, "has 3 blocks"),
        (lambda m: steer(m, V, site="mlp.1"), ConfigError, "no such site"),
        (lambda m: steer(m, V), ConfigError, "site='resid_post.K'"),
        (lambda m: steer(m, None, operation="scale"), ConfigError, "site='resid_post.K'"),
        (lambda m: steer(m, None, site=SITE), ConfigError, "without a vector"),
        (lambda m: steer(m, V, operation="scale", site=SITE), ConfigError, "with a vector"),
        (
            lambda m: steer(m, V, operation="ablate", relative=True, site=SITE),
            ConfigError, "relative",
        ),
        (lambda m: steer(m, V, positions=(4, 4), site=SITE), ConfigError, "window"),
        (lambda m: steer(m, V, positions=(-1, 4), site=SITE), ConfigError, "window"),
        (lambda m: steer(m, V, math.nan, site=SITE), MeasurementError, "finite"),
        (lambda m: steer(m, V, [1.0, math.inf], site=SITE), MeasurementError, "finite"),
        (lambda m: steer(m, V * math.inf, site=SITE), MeasurementError, "finite"),
        (lambda m: steer(m, normal(1, 1, 32), site=SITE), MeasurementError, "shape"),
        (
            lambda m: steer(m, 0 * V, operation="ablate", site=SITE),
            MeasurementError, "no direction",
        ),
        (lambda m: steer(m, 0 * V, relative=True, site=SITE), MeasurementError, "no direction"),
        (lambda m: steer(m, V, seed=-1, site=SITE), ConfigError, "seed"),
        (lambda m: steer(m, Intervention(SITE, V), 2.0), ConfigError, "strength beside"),
        (lambda m: steer(m, [Intervention(SITE, V)], positions="prompt"), ConfigError, "positions"),
        (lambda m: steer(object(), V, site=SITE), Exception, "modules|transformers"),
    ],
)  # fmt: skip
def test_mistakes(
    llama: Any, make: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    count = hooks_of(llama)
    with pytest.raises(kind, match=message), make(llama):
        pass
    assert hooks_of(llama) == count


@pytest.mark.parametrize(
    "arguments",
    [
        ("linear",), ("exponential",), ("linear", 0), ("linear", -3), ("linear", math.inf),
        ("linear", math.nan), ("exponential", None, -1.0), ("exponential", None, math.nan),
        ("exponential", None, math.inf), ("exponential", 3), ("constant", 3), ("linear", 3, 3),
    ],
)  # fmt: skip
def test_schedules_that_are_none(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        Schedule(*arguments)


# Planted truth


def log_probabilities(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.double()
    return logits.log_softmax(-1)[mask.bool()]


def divergence(p: Tensor, q: Tensor) -> float:
    """The largest KL(p‖q) of any token, in nats."""
    return float((p.exp() * (p - q)).sum(-1).max())


@pytest.mark.parametrize("block", range(4))
def test_planted_truth(block: int) -> None:
    """Adding b to the base gives the tuned model; taking it from the tuned gives the base."""
    planted = planted_pair(block)
    planted.tokenizer.padding_side = "left"
    batch = planted.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def texts(model: Any) -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist()

    base, tuned = (log_probabilities(m, ids, mask) for m in (planted.base, planted.tuned))
    text_base, text_tuned = texts(planted.base), texts(planted.tuned)
    assert divergence(tuned, base) > 0.01
    assert text_base != text_tuned
    vector = SteeringVector(planted.b, f"resid_post.{block}")
    with dsteer.steer(planted.base, vector, strength=1.0, positions="all"):
        assert divergence(tuned, log_probabilities(planted.base, ids, mask)) < 1e-6
        assert texts(planted.base) == text_tuned
    with dsteer.steer(planted.tuned, vector, strength=-1.0):
        assert divergence(base, log_probabilities(planted.tuned, ids, mask)) < 1e-6
        assert texts(planted.tuned) == text_base
    with dsteer.steer(planted.base, vector, strength=0.5):
        assert divergence(tuned, log_probabilities(planted.base, ids, mask)) > 1e-4
