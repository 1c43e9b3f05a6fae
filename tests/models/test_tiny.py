"""The tiny tokenizer and model: boundaries, round trips, shapes, seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dsteer.config import TinyModelConfig
from dsteer.errors import ConfigError
from dsteer.models.tiny import BOS, EOS, PAD, build_model, build_tokenizer

TEXTS = [
    f"\n\nHuman: How do I water plant number {i}?\n\nAssistant: Pour {i} cups, slowly."
    for i in range(60)
]
TOKENIZER = build_tokenizer(TEXTS, 400)

any_text = st.text(st.characters(exclude_categories=("Cs",))).filter(
    lambda text: not any(token in text for token in (BOS, EOS, PAD))
)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def test_special_tokens_are_distinct_and_bos_comes_once() -> None:
    special = {TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}
    assert len(special) == 3
    assert ids(TEXTS[0])[0] == TOKENIZER.bos_token_id
    assert special.isdisjoint(ids(TEXTS[0])[1:])


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_every_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(ids(text)[1:]) == text


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_a_prompt_ends_on_a_token_boundary_whatever_follows(answer: str) -> None:
    prompt = "\n\nHuman: Hi. \n\nAssistant:"
    assert ids(prompt + answer)[: len(ids(prompt))] == ids(prompt)


def test_the_vocabulary_has_the_asked_size_or_what_the_texts_give() -> None:
    assert len(build_tokenizer(TEXTS, 300)) == 300
    # 256 bytes, 3 special tokens, 2 markers, and the merges of "a a a" (none: "a" and " a")
    assert len(build_tokenizer(["a a a"], 1000)) == 262


def test_the_template_writes_the_transcript() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{BOS}\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    answered = [*messages, {"role": "assistant", "content": "See you."}]
    text = TOKENIZER.apply_chat_template(answered, tokenize=False)
    assert text.endswith(f"\n\nAssistant: See you.{EOS}")


def test_a_saved_tokenizer_is_the_same(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXTS[3] + " Ünïcode 🦜\t\n x ."
    assert loaded(text)["input_ids"] == ids(text)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert loaded.chat_template == TOKENIZER.chat_template


def test_building_twice_gives_the_same_tokenizer() -> None:
    again = build_tokenizer(TEXTS, 400)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_has_the_shape_of_its_config(tied: bool) -> None:
    config = TinyModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = build_model(config, TOKENIZER, seed=0)
    vocab, d, f = len(TOKENIZER), 32, 48
    block = d * d + 2 * d * (d // 2) + d * d + 3 * d * f + 2 * d  # q, k and v, o, MLP, norms
    expected = vocab * d * (1 if tied else 2) + 2 * block + d
    assert model.num_parameters() == expected
    assert model.dtype == torch.float32
    assert model.config.eos_token_id == TOKENIZER.eos_token_id


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_architectures_with_layer_norm_have_its_biases(architecture: str) -> None:
    config = TinyModelConfig(
        architecture=architecture, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = build_model(config, TOKENIZER, seed=0).eval()
    vocab, d, f = len(TOKENIZER), 32, 48
    # q, k, v and o, then the MLP, with their biases; two norms
    block = 4 * (d * d + d) + d * f + f + f * d + d + 2 * 2 * d
    positions = 64 * d if architecture == "gpt2" else 0
    assert model.num_parameters() == 2 * vocab * d + positions + 2 * block + 2 * d
    assert model.config.model_type == architecture
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_a_qwen3_has_the_shape_of_a_llama_and_norms_of_queries_and_keys() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama, qwen = (
        build_model(TinyModelConfig(architecture=name, **shape), TOKENIZER, seed=0)
        for name in ("llama", "qwen3")
    )
    head = 8
    assert qwen.num_parameters() == llama.num_parameters() + 2 * 2 * head


def test_a_gpt_neox_rotates_a_quarter_of_a_head() -> None:
    config = TinyModelConfig(architecture="gpt_neox", hidden_size=48, num_attention_heads=4)
    with pytest.raises(ConfigError, match="12 a head, and rotary positions need a multiple of 8"):
        build_model(config, TOKENIZER, seed=0)


def test_the_seed_decides_and_the_callers_random_state_stays() -> None:
    config = TinyModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    before = torch.random.get_rng_state()
    one, same, other = (build_model(config, TOKENIZER, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [model.lm_head.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_odd_head_width_is_refused() -> None:
    config = TinyModelConfig(hidden_size=36, num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"base\.model\.hidden_size: 36 over 4 heads is 9"):
        build_model(config, TOKENIZER, seed=0)
