"""Control vectors: what the file holds, llama.cpp steering by it, and files that are none."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_llama import PLAIN, write
from planted import tiny_llama

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import ConfigError, MissingExtraError, ModelError, StoreError
from dsteer.exchange import export, read

gguf = pytest.importorskip("gguf")

IDS = [0, 5, 6, 7, 8, 9, 40]


def vectors_at(*sites: str, width: int = 32, **metadata: object) -> SteeringVectorSet:
    rng = np.random.default_rng(3)
    made = (SteeringVector(rng.standard_normal(width), site, n=5) for site in sites)
    return SteeringVectorSet(made, metadata)


def test_what_the_file_holds(tmp_path: Path) -> None:
    vectors = vectors_at("resid_post.1", "resid_post.3", model_type="llama", position="prompt_last")
    notes = export(vectors, tmp_path / "v.gguf", "gguf", strength=-0.5)
    assert any("-0.5" in note for note in notes)
    assert any("added at once" in note for note in notes)
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["direction.1", "direction.3"]
    for name, tensor in found.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        expected = -0.5 * vectors[f"resid_post.{name[-1]}"].tensor.numpy()
        assert np.array_equal(tensor.data, expected.astype(np.float32))
    fields = {
        key: bytes(reader.get_field(key).parts[-1]).decode()
        for key in ("general.architecture", "controlvector.model_hint")
    }
    assert fields == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert reader.get_field("controlvector.layer_count").parts[-1][0] == 2


def test_round_trip_with_provenance(tmp_path: Path) -> None:
    vectors = vectors_at("resid_post.2", position="prompt_last", model_type="llama")
    export(vectors, tmp_path / "v.gguf", "gguf", strength=2)
    again = read(tmp_path / "v.gguf", "gguf")
    expected = (2 * vectors["resid_post.2"].tensor).float().double()
    assert torch.equal(again["resid_post.2"].tensor, expected)
    assert again["resid_post.2"].metadata["n"] == 5
    assert again.metadata["position"] == "prompt_last"
    assert again.metadata["strength_baked_in"] == 2
    assert again.metadata["imported_from"] == "gguf"
    again.save(tmp_path / "v.safetensors")
    assert SteeringVectorSet.load(tmp_path / "v.safetensors").metadata == again.metadata


@pytest.mark.parametrize(
    "provenance",
    [
        "no JSON",
        '{"vectors": [1]}',
        '{"vectors": {"resid_post.12": 1}}',
        '{"vectors": {"resid_post.12": {"site": "x", "path": 1}}, "path": 1, "source": "y"}',
    ],
)
def test_a_file_of_another_program(provenance: str, tmp_path: Path) -> None:
    """In half precision, with a hint that is not what transformers calls the type, and with odd
    words under our own key."""
    writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_string("dsteer.provenance", provenance)
    writer.add_tensor("direction.12", np.array([1, -2, 0.5], dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vectors = read(tmp_path / "v.gguf", "gguf")
    assert vectors["resid_post.12"].tensor.tolist() == [1, -2, 0.5]
    assert vectors.metadata["model_hint"] == "llama"
    assert "model_type" not in vectors.metadata


def test_what_it_can_not_express_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    cannot = ("encoder", "resid_post.0", "attn_out.2", "mlp_out.2", "final_norm")
    every = vectors_at("resid_post.1", *cannot)
    with pytest.raises(ConfigError) as caught:
        export(every, path, "gguf")
    said = str(caught.value)
    assert "\n" not in said
    assert all(site in said for site in cannot)
    assert "resid_post.1" not in said
    assert "llama.cpp rejects a file with a direction for block 0" in said
    assert not list(tmp_path.iterdir())
    notes = export(every, path, "gguf", skip=True)
    assert notes[0].startswith("Left out: encoder")
    assert list(read(path, "gguf")) == ["resid_post.1"]
    with pytest.raises(ConfigError, match=r"name others \(--site\)$"):  # nothing would be left
        export(vectors_at("resid_post.0"), tmp_path / "w.gguf", "gguf", skip=True)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    export(vectors_at("resid_post.1", "resid_post.2"), path, "gguf")
    whole = path.read_bytes()
    for cut in (*range(0, len(whole), 37), len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match="no complete GGUF file") as caught:
            read(path, "gguf")
        assert "\n" not in str(caught.value)
    write(tiny_llama(**PLAIN), tmp_path / "model.gguf")
    with pytest.raises(StoreError, match=r"'token_embd.weight' is no direction"):
        read(tmp_path / "model.gguf", "gguf")
    with pytest.raises(StoreError, match="no such file"):
        read(tmp_path / "absent.gguf", "gguf")


def test_vectors_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    wrong = vectors_at("resid_post.1", width=16)
    with pytest.raises(ModelError, match="its width is 32, and the vectors are of 16"):
        export(wrong, tmp_path / "v.gguf", "gguf", model=model)
    export(wrong, tmp_path / "v.gguf", "gguf")
    with pytest.raises(ModelError, match="its width is 32"):
        read(tmp_path / "v.gguf", "gguf", model=model)
    beyond = vectors_at("resid_post.4")
    with pytest.raises(ConfigError, match="the model has 4 blocks"):
        export(beyond, tmp_path / "w.gguf", "gguf", model=model)
    export(beyond, tmp_path / "w.gguf", "gguf")
    with pytest.raises(ConfigError, match="the model has 4 blocks"):
        read(tmp_path / "w.gguf", "gguf", model=model)


def test_the_package_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(vectors_at("resid_post.1"), tmp_path / "v.gguf", "gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"dsteer\[gguf\]"):
        export(vectors_at("resid_post.1"), tmp_path / "w.gguf", "gguf")
    with pytest.raises(MissingExtraError, match=r"dsteer\[gguf\]"):
        read(tmp_path / "v.gguf", "gguf")


# ------------------------------------------------------------------------------ llama.cpp


class LlamaCpp:
    """A GGUF model in llama.cpp, in float32 throughout."""

    def __init__(self, path: Path) -> None:
        self.lib = pytest.importorskip("llama_cpp.llama_cpp", reason="needs llama-cpp-python")
        self._silent = self.lib.llama_log_callback(lambda level, text, data: None)
        self.lib.llama_log_set(self._silent, ctypes.c_void_p(0))
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model

    def logits(self, ids: list[int], control: Path | None = None) -> np.ndarray:
        lib = self.lib
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch = 64, 64
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = 0  # it would compute in float16
        context = lib.llama_init_from_model(self.model, params)
        if control is not None:
            # As llama.cpp's own loader: a buffer that begins at layer 1, by the tensors' numbers.
            width, blocks = lib.llama_model_n_embd(self.model), lib.llama_model_n_layer(self.model)
            buffer = np.zeros((blocks - 1, width), np.float32)
            for tensor in gguf.GGUFReader(str(control)).tensors:
                buffer[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
            data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            assert lib.llama_set_adapter_cvec(context, data, buffer.size, width, 1, blocks - 1) == 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert lib.llama_decode(context, batch) == 0
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), (size,)).copy()
            for place in range(len(ids))
        ]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return np.stack(rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    model = LlamaCpp(write(tiny_llama(**PLAIN), tmp_path_factory.mktemp("llama") / "tiny.gguf"))
    yield model
    model.lib.llama_model_free(model.model)


@pytest.mark.parametrize("blocks", [(), (1,), (2,), (3,), (1, 3)])
def test_llama_cpp_steers_as_the_hook_does(
    llama: LlamaCpp, blocks: tuple[int, ...], tmp_path: Path
) -> None:
    model, strength = tiny_llama(**PLAIN), 0.7
    with torch.no_grad():
        expected = plain = model(torch.tensor([IDS])).logits[0].numpy()
    path = None
    if blocks:
        path = tmp_path / "v.gguf"
        vectors = vectors_at(*(f"resid_post.{block}" for block in blocks))
        export(vectors, path, "gguf", strength=strength)
        with torch.no_grad(), steer(model, vectors, strength):
            expected = model(torch.tensor([IDS])).logits[0].numpy()
        assert np.abs(expected - plain).max() > 0.1
    # Both compute in float32, with other orders of summation; logits are of size 4.
    assert np.abs(llama.logits(IDS, path) - expected).max() < 5e-5
