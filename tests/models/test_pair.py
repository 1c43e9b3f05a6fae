"""A pair: compared before its weights are loaded, one model in memory unless both fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from planted import PROMPTS, byte_tokenizer, planted_pair, tiny_llama

from dsteer.activations.extract import extract
from dsteer.errors import ModelError
from dsteer.models import pair as pair_module
from dsteer.models.load import quiet
from dsteer.models.pair import ModelPair

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return planted_pair(1).save(tmp_path_factory.mktemp("pair"))


def loaded(pair: ModelPair) -> set[str]:
    return set(pair._models)


def test_shape_is_known_before_any_weight_is_loaded(folders, monkeypatch) -> None:
    monkeypatch.setattr(pair_module, "load_model", lambda *_a, **_k: pytest.fail("weights loaded"))
    pair = ModelPair.load(*folders, device="cpu")
    assert (pair.width, pair.n_blocks, pair.vocabulary, pair.max_positions) == (32, 4, 260, 256)
    assert pair.tokenizer("a")["input_ids"][0] == 0


def test_folders_give_the_same_states_as_objects(folders) -> None:
    planted = planted_pair(1)
    stored = extract(ModelPair.load(*map(str, folders), device="cpu"), PROMPTS)
    held = extract(planted.pair, PROMPTS)
    assert all(torch.equal(stored.tuned[site], held.tuned[site]) for site in held.sites)


@pytest.mark.parametrize(("free", "kept"), [(0, set()), (10**12, {"base", "tuned"})])
def test_one_model_at_a_time_unless_both_fit(folders, monkeypatch, free, kept) -> None:
    monkeypatch.setattr(pair_module, "_free_memory", lambda _model: free)
    pair = ModelPair.load(*folders, device="cpu")
    most = 0
    for which in ("base", "tuned"):
        with pair.using(which):
            most = max(most, len(loaded(pair)))
    assert loaded(pair) == kept
    assert most == (2 if kept else 1)
    pair.release()
    assert loaded(pair) == set()


def test_a_model_that_was_loaded_before_stays(folders, monkeypatch) -> None:
    monkeypatch.setattr(pair_module, "_free_memory", lambda _model: 0)
    pair = ModelPair.load(*folders, device="cpu")
    base = pair.base
    with pair.using("base") as model:
        assert model is base
    assert loaded(pair) == {"base"}


def test_objects_are_never_dropped() -> None:
    pair = planted_pair(1).pair
    pair.release()
    assert loaded(pair) == {"base", "tuned"}


def test_adapter_is_put_on_its_own_copy_of_the_base(tmp_path: Path, folders) -> None:
    """Trap 14: an adapter changes the model under it in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with quiet():
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tokenizer = byte_tokenizer()
    acts = extract(ModelPair.load(base, tmp_path, tokenizer=tokenizer, device="cpu"), PROMPTS)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(acts.displacement(site).any() for site in acts.sites)
    from_folder = extract(ModelPair.load(folders[0], tmp_path, device="cpu"), PROMPTS)
    assert all(torch.equal(from_folder.tuned[site], acts.tuned[site]) for site in acts.sites)

    shared = tiny_llama()
    wrapped = get_peft_model(shared, config)
    with pytest.raises(ModelError, match="adapter sits on the base object itself"):
        ModelPair.load(shared, wrapped, tokenizer=tokenizer)
    ModelPair.load(base, wrapped, tokenizer=tokenizer)  # a base of its own is fine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "has blocks 4, tuned LlamaForCausalLM has blocks 3"),
        ({"hidden_size": 64}, "has width 32, tuned LlamaForCausalLM has width 64"),
        ({"vocab_size": 400}, "has 260 tokens.*has 400; expected one vocabulary"),
    ],
)
def test_two_that_are_no_pair(changes, message) -> None:
    with pytest.raises(ModelError, match=message):
        ModelPair.load(tiny_llama(), tiny_llama(**changes))


def test_a_few_added_tokens_are_said() -> None:
    pair = ModelPair.load(tiny_llama(), tiny_llama(vocab_size=264))
    assert pair.vocabulary == 260
    assert "vocabularies differ (260 and 264 tokens)" in pair.notes[0]


def test_notes_tell_of_the_tokenizer(tmp_path: Path) -> None:
    base, tuned = planted_pair(1).save(tmp_path)
    byte_tokenizer(template=None, pad=False).save_pretrained(tmp_path / "bare")
    pair = ModelPair.load(base, tuned, tokenizer=tmp_path / "bare", device="cpu")
    assert pair.notes == []
    assert pair.tokenizer.pad_token == "</s>"
    assert any("no pad token" in note for note in pair.notes)
    assert len(extract(pair, PROMPTS).encoded) == len(PROMPTS)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="int is no model"):
        ModelPair.load(3, tiny_llama())
    with pytest.raises(ModelError, match="Linear is no transformers language model"):
        ModelPair.load(torch.nn.Linear(2, 2), tiny_llama())
    with pytest.raises(ModelError, match="the pair has no tokenizer"):
        _ = ModelPair.load(tiny_llama(), tiny_llama()).tokenizer
    gemma = tf.Gemma2ForCausalLM(
        tf.Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    ).half()  # fmt: skip
    with pytest.raises(ModelError, match="float16 overflows in gemma2"):
        ModelPair.load(gemma, gemma)
