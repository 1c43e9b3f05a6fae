"""Extraction equals one-prompt-at-a-time ``output_hidden_states``, whatever the architecture.

The bound is the project's: 1e-5 of the state's norm in float32. Float32 rounding through a few tiny
blocks is near 1e-6; a real token that saw padding, or a wrong row, is off by 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from dsteer.activations.extract import extract
from dsteer.activations.reading import Reading
from dsteer.data.tokens import Encoded
from dsteer.models.anatomy import Anatomy
from dsteer.models.pair import ModelPair

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

BOUND = 1e-5
VOCAB = 128
LENGTHS = (1, 2, 3, 5, 8, 8, 13, 21, 34, 34, 40, 7)


def small(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def old(**changes: object) -> dict[str, object]:
    """GPT-2's names for the same things."""
    return {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, **changes}  # fmt: skip


FALCON = {"alibi": False, "new_decoder_architecture": False, "multi_query": True,
          "parallel_attn": True, "bias": False}  # fmt: skip

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small())),
    "llama-eager": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**small(attn_implementation="eager"))
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**old())),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small())),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**small(head_dim=8))),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**small(head_dim=8, sliding_window=6, query_pre_attn_scalar=8))
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **small(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, num_hidden_layers=6)
        )
    ),
    "mistral-window": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**small(sliding_window=6, head_dim=8))
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**small(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2))
    ),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**small(**FALCON))),
    "falcon-alibi": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**small(**{**FALCON, "alibi": True, "parallel_attn": False}))
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2)
    ),
    "mpt": lambda: tf.MptForCausalLM(
        tf.MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=VOCAB, max_seq_len=64,
                     initializer_range=0.2)
    ),
    "gpt-j": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**old(rotary_dim=4))),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**small())),
    "phi3-longrope": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(
            **small(
                original_max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                    "long_factor": [4.0] * 4, "short_factor": [1.0] * 4,
                    "original_max_position_embeddings": 16,
                },
            )
        )
    ),
    "llama-dynamic-rope": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **small(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            )
        )
    ),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**small())),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**small(num_local_experts=4, num_experts_per_tok=2, head_dim=8))
    ),
    "qwen2-moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**small(num_experts=4, num_experts_per_tok=2,
                                  moe_intermediate_size=24, shared_expert_intermediate_size=24))
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**small(num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                                sliding_window=6))
    ),
}  # fmt: skip


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return ARCHITECTURES[name]().float().eval()


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [Encoded(tuple(row), len(row)) for row in rows]


def reference(model: Any, prompts: list[Encoded]) -> list[tuple[Tensor, ...]]:
    """The model's own hidden_states, one prompt at a time: L + 1 tensors (T, d) a prompt."""
    with torch.no_grad():
        return [
            tuple(
                state[0]
                for state in model(
                    torch.tensor([item.ids]), output_hidden_states=True, use_cache=False
                ).hidden_states
            )
            for item in prompts
        ]


def worst_error(states: Any, expected: list[tuple[Tensor, ...]], rows: str) -> float:
    """Largest ‖h − h_ref‖ / ‖h_ref‖ over sites and prompts."""
    worst = 0.0
    n_blocks = len(expected[0]) - 1
    for site in states.base:
        index = n_blocks if site == "final_norm" else int(site.split(".")[1]) + 1
        if site == f"resid_post.{n_blocks - 1}":
            continue  # hidden_states does not hold it: its last entry is final_norm
        pick = {"last": lambda h: h[-1:], "mean": lambda h: h.mean(0, keepdim=True)}[rows]
        wanted = torch.cat([pick(prompt[index]) for prompt in expected])
        error = (states.base[site] - wanted).norm(dim=1) / wanted.norm(dim=1)
        worst = max(worst, float(error.max()))
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_one_prompt_at_a_time(name: str, record_property: Any) -> None:
    model = build(name)
    prompts = prompts_of()
    pair = ModelPair.load(model, model)
    anatomy = Anatomy.of(model)
    assert anatomy.n_blocks == len(anatomy.blocks)
    found = {budget: extract(pair, prompts, batch_tokens=budget) for budget in (1, 24, 80, 100_000)}
    mean = extract(pair, prompts, position="prompt_mean")
    expected = reference(model, prompts)
    errors = {budget: worst_error(states, expected, "last") for budget, states in found.items()}
    errors["mean"] = worst_error(mean, expected, "mean")
    record_property("worst", max(errors.values()))
    print(name, {key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "opt"])
def test_last_block_is_raw_and_final_norm_is_normed(name: str) -> None:
    """resid_post.{L-1} passed through the final norm is final_norm: neither is the other."""
    model = build(name)
    acts = extract(ModelPair.load(model, model), prompts_of())
    anatomy = Anatomy.of(model)
    last = acts.base[f"resid_post.{anatomy.n_blocks - 1}"]
    with torch.no_grad():
        normed = anatomy.final_norm(last)
    assert torch.allclose(normed, acts.base["final_norm"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(last, acts.base["final_norm"], atol=0.1)


def test_a_model_that_sees_padding_is_read_without_padding() -> None:
    """With attention in both directions padding would change every state."""
    model = build("llama")
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    prompts = prompts_of()
    pair = ModelPair.load(model, model)
    reading = Reading.of(pair, prompts, batch_tokens=100)
    needed = reading.needed
    batches = reading._plan(model, Anatomy.of(model))
    assert all(len({len(needed[p]) for p in batch.prompts}) == 1 for batch in batches)
    states = extract(pair, prompts, batch_tokens=100)
    assert worst_error(states, reference(model, prompts), "last") <= BOUND
