"""Baked checkpoints: what AutoModelForCausalLM computes from the folder, hooks apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers as tf
from architectures import VOCAB, build, small
from planted import byte_tokenizer, planted_pair, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file
from seq2seq_models import seq2seq

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import ConfigError, MeasurementError, ModelError, StoreError
from dsteer.exchange import baked, export, read
from dsteer.models.load import quiet
from dsteer.store import read_json

IDS = torch.arange(3, 43).remainder(VOCAB)[None]


def vectors_at(*sites: str, width: int = 32) -> SteeringVectorSet:
    rng = np.random.default_rng(8)
    return SteeringVectorSet([SteeringVector(rng.standard_normal(width), site) for site in sites])


def logits(source: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a model, or of what transformers alone loads from a folder."""
    if isinstance(source, Path):
        with quiet():
            source = tf.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    with torch.no_grad():
        return source(input_ids=IDS).logits


def hooked(model: Any, vectors: SteeringVectorSet, strength: float) -> torch.Tensor:
    with steer(model, vectors, strength):
        return logits(model)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; 1e-5 is what float32 leaves of sums in another order."""
    return float((found - expected).norm() / expected.norm())


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: build(name) for name in (
        "llama", "gpt2", "gpt-neox", "gpt-j", "opt", "phi", "falcon", "bloom", "starcoder2", "qwen2"
    )},
    "llama-with-biases": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(mlp_bias=True))),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(tie_word_embeddings=True))),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**small(sliding_window=None, head_dim=8))
    ),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**small(residual_multiplier=0.3))),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_computes_what_the_hook_does(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    vectors = vectors_at("resid_post.1")
    folder = tmp_path / "baked"
    export(vectors, folder, "baked", model=model, strength=1.5)
    expected = hooked(model, vectors, 1.5)
    assert off(logits(folder), expected) < 1e-5
    assert off(logits(model), expected) > 1e-2
    # the model that was baked is as it was
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in before)
    for strength in (-0.5, 0.0):
        baked.rebake(folder, strength)
        assert baked.strength_of(folder) == strength
        assert off(logits(folder), hooked(model, vectors, strength)) < 1e-5
    with quiet():
        again = tf.AutoModelForCausalLM.from_pretrained(folder)
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)
    assert again.config.model_type == (
        "llama" if name in {"mistral", "qwen2"} else model.config.model_type
    )


def test_several_sites_a_tokenizer_and_other_biases(tmp_path: Path) -> None:
    """A model that has biases there keeps them: they are those of a planted pair."""
    planted = planted_pair(1)
    vectors = vectors_at("resid_post.0", "resid_post.1", "resid_post.3")
    folder = tmp_path / "baked"
    tokenizer = byte_tokenizer()
    export(vectors, folder, "baked", model=planted.tuned, tokenizer=tokenizer, strength=0.8)
    assert off(logits(folder), hooked(planted.tuned, vectors, 0.8)) < 1e-5
    baked.rebake(folder, 0)
    assert torch.equal(logits(folder), logits(planted.tuned))
    own = tf.AutoTokenizer.from_pretrained(folder)
    assert own("bees").input_ids == tokenizer("bees").input_ids
    again = read(folder, "baked", model=planted.base)
    assert list(again) == list(vectors)
    assert torch.equal(
        again["resid_post.3"].tensor, vectors["resid_post.3"].tensor.float().double()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.05).to(dtype)
    vectors = vectors_at("resid_post.2")
    export(vectors, tmp_path / "baked", "baked", model=model)
    for file in (tmp_path / "baked").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    found = logits(tmp_path / "baked", dtype)
    # both round to 8 bits after each operation, at other places
    limit = 1e-6 if dtype == torch.float64 else 5e-2  # vectors are kept as float32
    assert off(found.double(), hooked(model, vectors, 1.0).double()) < limit


def test_a_sharded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index names every weight once, in files that are numbered as transformers does."""
    whole = tf.PreTrainedModel.save_pretrained

    def sharded(model: Any, folder: Path, **settings: Any) -> None:
        whole(model, folder, **settings, max_shard_size="40KB")

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", sharded)
    model, vectors = tiny_llama(), vectors_at("resid_post.2")
    export(vectors, tmp_path / "baked", "baked", model=model)
    files = sorted(file.name for file in (tmp_path / "baked").glob("*.safetensors"))
    assert len(files) > 3
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = read_json(tmp_path / "baked" / "model.safetensors.index.json")
    held = {}
    for name in files:
        with safe_open(tmp_path / "baked" / name, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), name)
    assert held == index["weight_map"]
    assert off(logits(tmp_path / "baked"), hooked(model, vectors, 1.0)) < 1e-5


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(vectors_at("resid_post.2"), tmp_path / name, "baked", model=tiny_llama())
    export(vectors_at("resid_post.2"), tmp_path / "c", "baked", model=tiny_llama(), strength=3)
    baked.rebake(tmp_path / "c", 1.0)
    contents = [
        {
            str(f.relative_to(tmp_path / name)): f.read_bytes()
            for f in (tmp_path / name).rglob("*.*")
        }
        for name in ("a", "b", "c")
    ]
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3", "a qwen3 model has no bias at the end of its blocks, so hooks alone"),
        ("gemma2", "a gemma2 model has no bias"),
        ("olmo2", "a olmo2 model has no bias"),
        ("mistral-window", "a mistral model has no bias at the end of its blocks, and a sliding"),
        ("mixtral", "0 modules of block 1 could be its last projection"),
    ],
)
def test_families_without_a_bias_there_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        export(vectors_at("resid_post.1"), tmp_path / "baked", "baked", model=build(name))
    assert "known to work: Llama" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [1.0, 1e-3, 0.0])
def test_a_family_that_changes_the_projection_is_found_out(
    dtype: torch.dtype, strength: float, tmp_path: Path
) -> None:
    """A dense Falcon-H1 multiplies its MLP's output, which its config alone tells; a strength that
    would be lost in rounding does not hide it."""
    config = tf.FalconH1Config(
        **small(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                mamba_chunk_size=8, mlp_multipliers=[1.0, 0.5])
    )  # fmt: skip
    with quiet():
        model = tf.FalconH1ForCausalLM(config).to(dtype).eval()
    with pytest.raises(ModelError, match="computes something else than with λv added"):
        export(vectors_at("resid_post.1"), tmp_path / "v", "baked", model=model, strength=strength)
    assert not list(tmp_path.iterdir())


def test_what_it_can_not_express_is_refused(tmp_path: Path) -> None:
    folder, model = tmp_path / "baked", tiny_llama()
    for site in ("final_norm", "attn_out.1", "mlp_out.1"):
        with pytest.raises(ConfigError, match=f"baked can't express {site}"):
            export(vectors_at(site), folder, "baked", model=model)
    with pytest.raises(ConfigError, match="baked needs the model"):
        export(vectors_at("resid_post.1"), folder, "baked")
    with pytest.raises(ModelError, match="its width is 32"):
        export(vectors_at("resid_post.1", width=8), folder, "baked", model=model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match=r"its weights are quantised \(gptq\)"):
        export(vectors_at("resid_post.1"), folder, "baked", model=model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("to", ["baked", "lm-eval"])
def test_an_adapter_is_refused(to: str, tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"not merged.*merge_and_unload"):
        export(vectors_at("resid_post.1"), tmp_path / "v.pt", to, model=model)


def test_models_that_are_spread_or_have_an_encoder_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(ModelError, match="spread over devices; load it without a device map"):
        export(vectors_at("resid_post.1"), tmp_path / "baked", "baked", model=model)
    with pytest.raises(ModelError, match="an encoder-decoder model can't be baked"):
        export(vectors_at("resid_post.1"), tmp_path / "baked", "baked", model=seq2seq("t5"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(StoreError, match="something is there already"):
        export(vectors_at("resid_post.1"), tmp_path / "work", "baked", model=tiny_llama())
    assert [file.name for file in tmp_path.rglob("*.*")] == ["thesis.txt"]


def test_rebaking_what_was_not_baked(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    with quiet():
        tiny_llama().save_pretrained(folder)
    for path in (folder, tmp_path / "absent"):
        with pytest.raises(StoreError, match="no folder that dsteer baked"):
            baked.rebake(path, 1.0)
    export(vectors_at("resid_post.1"), tmp_path / "baked", "baked", model=tiny_llama())
    with pytest.raises(MeasurementError, match="expected a finite number"):
        baked.rebake(tmp_path / "baked", float("nan"))
    shard = tmp_path / "baked" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(StoreError, match="no folder that dsteer baked"):
        baked.strength_of(tmp_path / "baked")


@pytest.mark.parametrize("step", ["save_file", "sort_metadata"])
def test_an_interruption_leaves_the_old_strength(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written by then is not in the folder."""
    folder, vectors = tmp_path / "baked", vectors_at("resid_post.1")
    export(vectors, folder, "baked", model=tiny_llama(), strength=1.0)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    own = getattr(baked, step)

    def cut(*arguments: Any) -> None:
        own(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(baked, step, cut)
    with pytest.raises(KeyboardInterrupt):
        baked.rebake(folder, -1.0)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    with pytest.raises(KeyboardInterrupt):
        export(vectors, tmp_path / "other", "baked", model=tiny_llama())
    assert list(tmp_path.iterdir()) == [folder]


def test_a_strength_too_large_for_the_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_llama().half()
    vector = SteeringVector(torch.ones(32), "resid_post.1")
    with pytest.raises(MeasurementError, match=r"1e\+06 makes the bias .* too large for .*float16"):
        export(vector, tmp_path / "never", "baked", model=model, strength=1e6)
    assert not (tmp_path / "never").exists()
    export(vector, tmp_path / "baked", "baked", model=model)
    with pytest.raises(MeasurementError, match="too large"):
        baked.rebake(tmp_path / "baked", 1e6)
    assert baked.strength_of(tmp_path / "baked") == 1.0
