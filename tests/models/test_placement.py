"""Models larger than a device: parts of the weights in memory and on disk, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted import PROMPTS, planted_pair, tiny_llama

from dsteer.activations.extract import extract
from dsteer.activations.reading import Reading, sample_weights, workers_for
from dsteer.data.tokens import Encoded
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import load_model, quiet
from dsteer.models.pair import ModelPair
from dsteer.models.placement import execution_device, is_dispatched
from dsteer.models.readout import Readout
from dsteer.steering.decode import sweep
from dsteer.steering.intervene import steer
from dsteer.steering.vector import SteeringVector
from dsteer.training.examples import Example
from dsteer.training.gradients import margin_gradients

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
SIZE = sum(p.numel() * p.element_size() for p in tiny_llama().parameters())
HALF = {"cpu": SIZE // 2}
LITTLE = {"cpu": 1000}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return planted_pair(1).save(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def spread(folders: tuple[Path, Path], tmp_path: Path) -> Callable[..., ModelPair]:
    def load(max_memory: dict[str, int], **options: object) -> ModelPair:
        return ModelPair.load(
            *folders, device_map="auto", max_memory=max_memory,
            offload_folder=tmp_path / "offload", **options,
        )  # fmt: skip

    return load


def on_disk(model: torch.nn.Module) -> float:
    """Share of the weights that are not in memory."""
    missing = sum(p.numel() for p in model.parameters() if p.device.type == "meta")
    return missing / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("memory", "least"), [(HALF, 0.3), (LITTLE, 0.99)])
def test_states_are_those_of_the_plain_model(folders, spread, memory, least) -> None:
    plain = extract(ModelPair.load(*folders, device="cpu"), PROMPTS)
    pair = spread(memory)
    with pair.using("base") as model:
        assert on_disk(model) > least
    assert not pair._models  # spread models never share the devices
    found = extract(pair, PROMPTS)
    for site in plain.sites:
        assert torch.equal(found.base[site], plain.base[site])
        assert torch.equal(found.tuned[site], plain.tuned[site])


@pytest.mark.parametrize("memory", [HALF, LITTLE])
def test_anatomy_head_and_fingerprint(folders, spread, memory) -> None:
    plain, pair = load_model(folders[0], device="cpu"), spread(memory)
    with pair.using("base") as model:
        assert is_dispatched(model)
        anatomy = Anatomy.of(model)
        assert anatomy.device == torch.device("cpu") == execution_device(model.lm_head)
        assert not anatomy.tied
        assert workers_for(model, anatomy) == 1
        head = Readout.of(model)  # compares its logits with the model's own
        assert torch.equal(head.weight, plain.lm_head.weight)
        assert sample_weights(model) == sample_weights(plain)
    assert not is_dispatched(plain)


def test_tied_embeddings_on_disk(tmp_path: Path) -> None:
    with quiet():
        tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model = load_model(
        tmp_path / "model", device_map="auto", max_memory=LITTLE, offload_folder=tmp_path
    )
    assert on_disk(model) > 0
    assert Anatomy.of(model).tied


def test_steering_and_sweep(tmp_path: Path) -> None:
    planted = planted_pair(0, num_hidden_layers=2)
    base, _ = planted.save(tmp_path)
    memory = {"cpu": sum(p.numel() * 4 for p in planted.base.parameters()) // 2}
    model = load_model(
        base, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert on_disk(model) > 0.3
    vector = SteeringVector(planted.b, site="resid_post.1")  # a block on disk
    with torch.no_grad():
        with steer(model, vector, 2.0), steer(planted.base, vector, 2.0):
            steered = model(IDS).logits
            assert torch.equal(steered, planted.base(IDS).logits)
        assert not torch.allclose(steered, model(IDS).logits, atol=1e-2)
    settings = (planted.tokenizer, PROMPTS[:2], vector, [0.0, 1.0], 2)
    assert sweep(model, *settings).tokens == sweep(planted.base, *settings).tokens


def test_gradients_after_a_reading(folders, spread) -> None:
    pair, plain = spread(HALF), load_model(folders[0], device="cpu")
    example = Example((0, 5, 6, 7), (8, 9), (10,), split_token=False, conversation="a")
    sites = ("resid_post.1", "final_norm")
    with pair.using("base") as model:
        encoded = [Encoded((0, 5, 6), 3)]
        Reading.of(pair, encoded).run(model, "base")
        found = margin_gradients(model, [example], sites)
    right = margin_gradients(plain, [example], sites)
    for site in sites:
        assert torch.equal(found.sequence[site], right.sequence[site])


def test_each_model_has_its_own_folder(tmp_path: Path) -> None:
    """Weights that can't be read from the checkpoint piece by piece are written to the folder."""
    planted = planted_pair(1)
    folders = tmp_path / "base", tmp_path / "tuned"
    for model, folder in zip((planted.base, planted.tuned), folders, strict=True):
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    options = {"device_map": "sequential", "max_memory": HALF}
    pair = ModelPair.load(*folders, **options, offload_folder=tmp_path / "offload")
    base, tuned = pair.base, pair.tuned  # both at a time
    assert on_disk(base) > 0.3
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, planted.base(IDS).logits)
        assert torch.equal(tuned(IDS).logits, planted.tuned(IDS).logits)
    for which in ("base", "tuned"):
        assert list((tmp_path / "offload" / which).glob("*.safetensors"))
    nowhere = ModelPair.load(*folders, **options)
    with pytest.raises(ModelError, match=r"can't be loaded .*give models\.offload_f") as caught:
        _ = nowhere.base
    assert "\n" not in str(caught.value)


# PEFT asks transformers for a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_on_a_base_on_disk_is_refused(folders, tmp_path: Path, monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model

    with quiet():
        made = get_peft_model(load_model(folders[0], device="cpu"), LoraConfig(r=2))
        made.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    pair = ModelPair.load(
        folders[0], tmp_path / "adapter", device_map="auto", max_memory=HALF,
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    with (
        pytest.raises(ModelError, match=r"partly on disk; merge it into its base first"),
        pair.using("tuned"),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter", "offload"}
    roomy = ModelPair.load(
        folders[0], tmp_path / "adapter", device_map="auto", max_memory={"cpu": 2 * SIZE}
    )
    with roomy.using("tuned") as model:
        assert on_disk(model) == 0


def test_a_device_that_is_not_there(folders) -> None:
    pair = ModelPair.load(*folders, device_map="auto", max_memory={97: "1GiB"})
    with pytest.raises(
        ModelError, match="max_memory names device 97, and this machine has"
    ) as caught:
        _ = pair.base
    assert "\n" not in str(caught.value)
