"""Encoder-decoder models: their parts, their tokens, and those that are refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from planted import byte_tokenizer, tiny_llama
from seq2seq_models import FAMILIES, T5, eos_tokenizer, seq2seq
from tokenizers import normalizers, processors

from dsteer.data.tokens import encode
from dsteer.data.types import PreferencePair
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import load_model, quiet
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.models.seq2seq import refuse_family


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_decoders(family: str) -> None:
    model = seq2seq(family)
    anatomy = Anatomy.of(model)
    assert (anatomy.width, anatomy.n_blocks) == (32, 3)
    assert anatomy.encoder is model.get_encoder()
    decoder = model.get_decoder()
    assert anatomy.blocks is (decoder.block if "t5" in family else decoder.layers)
    if family in {"bart", "bart-forced-bos", "marian", "blenderbot-small"}:
        assert anatomy.final_norm is decoder.layers[2]
    else:
        assert anatomy.final_norm is (
            decoder.final_layer_norm if "t5" in family else decoder.layer_norm
        )
    assert anatomy.tied == (family != "t5-gated-untied")
    assert anatomy.start == {"bart-forced-bos": (1, 0)}.get(
        family, (2,) if "t5" in family else (1,)
    )


def test_more_blocks_in_the_decoder_than_in_the_encoder() -> None:
    model = tf.T5ForConditionalGeneration(tf.T5Config(**{**T5, "num_layers": 2}))
    assert Anatomy.of(model).n_blocks == 3
    assert ModelPair.load(model, model).n_blocks == 3


def test_a_saved_model_loads_whole(tmp_path) -> None:
    for family in ("t5-gated-untied", "bart-forced-bos"):
        model = seq2seq(family)
        with quiet():
            model.save_pretrained(tmp_path / family)
        loaded = load_model(tmp_path / family, device="cpu")
        assert Anatomy.of(loaded).start == Anatomy.of(model).start
        ours, theirs = Readout.of(loaded), Readout.of(model)
        assert torch.equal(ours.weight, theirs.weight)
        assert ours.scale == theirs.scale == 1.0
    assert Readout.of(seq2seq("t5")).scale == pytest.approx(32**-0.5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.ProphetNetConfig(), "prophetnet.*several streams a token"),
        (tf.WhisperConfig(), "whisper.*its encoder reads sound"),
        (tf.M2M100Config(), "m2m_100.*no test vouches.*one of bart, blenderbot"),
    ],
)
def test_other_families_are_refused_by_name(config, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        refuse_family(config, "some/model")


def test_a_refused_folder_is_refused_before_its_weights(tmp_path) -> None:
    tf.ProphetNetConfig().save_pretrained(tmp_path)
    for load in (lambda: load_model(tmp_path), lambda: ModelPair.load(tmp_path, tmp_path)):
        with pytest.raises(ModelError, match="several streams a token"):
            load()


def test_pairs_of_two_kinds_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"base .* is an encoder-decoder model, tuned .* a decoder-only"
    ):
        ModelPair.load(seq2seq("t5"), tiny_llama())
    with pytest.raises(ModelError, match=r"tuned .* an encoder-decoder model"):
        ModelPair.load(tiny_llama(), seq2seq("bart"))


@pytest.mark.parametrize("key", ["decoder_start_token_id", "forced_bos_token_id"])
def test_decoders_that_begin_differently_are_refused(tmp_path, key: str) -> None:
    """Equal weights would be given a displacement: their decoders read other ids."""
    folders = {}
    for name in ("base", "tuned"):
        model = seq2seq("bart")
        if name == "tuned":
            setattr(model.generation_config, key, 0)
        folders[name] = tmp_path / name, model
        with quiet():
            model.save_pretrained(tmp_path / name)
    refusal = r"decoder of base .* starts with tokens \(1,\), that of tuned .* with \((1, )?0,?\); "
    for side in (0, 1):  # folders, and objects
        with pytest.raises(ModelError, match=refusal) as caught:
            ModelPair.load(folders["base"][side], folders["tuned"][side])
        assert "\n" not in str(caught.value)
    for folder, model in folders.values():
        pair = ModelPair.load(folder, model)
        with pair.using("base") as loaded:  # what was compared is what will be read
            assert Anatomy.of(loaded).start == Anatomy.of(model).start


def test_a_model_without_a_start_token_is_refused() -> None:
    model = seq2seq("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="names no decoder_start_token_id"):
        Anatomy.of(model)


def test_prompt_and_answer_are_texts_of_their_own() -> None:
    tokenizer = eos_tokenizer()
    pair = PreferencePair("Hi", " Yes", " No")
    (item,) = encode(tokenizer, [pair], response="chosen", encoder_decoder=True)
    assert list(item.ids[: item.prompt_length]) == tokenizer("Hi")["input_ids"]  # EOS at the end
    assert tokenizer.decode(item.ids[item.prompt_length :]) == "Yes"
    # exactly one EOS, and the end of the prompt stays under a cut
    assert encode(tokenizer, ["Hi</s>"], encoder_decoder=True) == encode(
        tokenizer, ["Hi"], encoder_decoder=True
    )
    (cut,) = encode(tokenizer, ["a long prompt"], max_tokens=4, encoder_decoder=True)
    assert tokenizer.decode(cut.ids) == "mpt</s>"
    assert cut.truncated
    # Marian's write answers with other pieces than they read prompts with
    writing = eos_tokenizer()
    writing._switch_to_target_mode = lambda: setattr(
        writing.backend_tokenizer, "normalizer", normalizers.Lowercase()
    )
    writing._switch_to_input_mode = lambda: setattr(
        writing.backend_tokenizer, "normalizer", normalizers.Sequence([])
    )
    (item,) = encode(writing, [pair], response="chosen", encoder_decoder=True)
    assert writing.decode(item.ids) == "Hi</s>yes"
    # BART's tokenizers write on both sides
    both = byte_tokenizer(template=None)
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (item,) = encode(both, ["Hi"], encoder_decoder=True)
    assert list(item.ids) == both("Hi")["input_ids"]
    (plain,) = encode(both, ["Hi"])
    assert list(plain.ids) == both("Hi")["input_ids"][:-1]
