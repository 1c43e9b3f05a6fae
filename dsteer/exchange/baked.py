"""A baked checkpoint: a plain model folder in which λv is part of the weights.

Adding λv after block k is a bias λv of the block's last projection. Any program that reads the
checkpoint serves the steered model, without hooks.

The biases lie in a shard of their own, which also says λ; so another λ replaces one small file.
Beside the model, ``steering/`` holds what that needs: the vectors, and the biases without them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dsteer.activations.capture import Capture
from dsteer.activations.sites import block_of, component_of
from dsteer.errors import MeasurementError, ModelError, StoreError
from dsteer.exchange.request import Export, new_folder, refuse_adapter, require_model, together
from dsteer.models.anatomy import Anatomy, evaluating, model_name, text_config
from dsteer.models.load import Model, quantization_of, quiet
from dsteer.models.placement import is_dispatched
from dsteer.models.seq2seq import is_encoder_decoder
from dsteer.steering.intervene import steer
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, atomic_path, read_json, sort_metadata, write_json

STEERING = "steering"
_VECTORS, _BIASES = f"{STEERING}/vectors.safetensors", f"{STEERING}/biases.safetensors"
_INDEX = "model.safetensors.index.json"
_STRENGTH = "dsteer.strength"

_PROJECTIONS = frozenset({"down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out"})
"""What families call the last projection of an MLP."""
_SWITCHES = ("mlp_bias", "use_bias", "bias")
"""What configs call the setting that gives it a bias."""
_KNOWN = (
    "Llama, Mistral and Qwen2 without sliding windows, Granite, SmolLM3, Falcon, GPT-2, GPT-J, "
    "GPT-Neo, GPT-NeoX, BLOOM, OPT, Phi, StarCoder2"
)

_PROBE = 24
_SAME, _SAME_HALF = 1e-5, 5e-2
"""Relative error of logits up to which the folder steers as the hook does; norms and rotary
positions are in float32 in float64 models too."""


def write(wanted: Export, path: Path) -> list[str]:
    """Write the model with λv in it, load it again, and hold its logits against the hook's.

    Where a family's config has no bias there, a Mistral or Qwen2 model without sliding windows is
    written as the Llama model that it equals. The model itself is left as it is.

    Raises:
        ConfigError: no model; final_norm or a site inside a block.
        ModelError: a model that is quantised, an adapter, offloaded or an encoder-decoder one; a
            family that has no bias there, or does something with the projection's output.
        StoreError: something is at ``path``.
    """
    model = require_model(wanted, "which it puts the vectors into")
    _refuse(model)

    def why_not(site: str) -> str | None:
        if block_of(site) is None or component_of(site) is not None:
            return "a bias of a block's last projection changes the block's output"
        return None

    sites, notes = wanted.expressible(why_not)
    blocks = {site: _block(site) for site in sites}
    baked, switched = _with_biases(model, list(blocks.values()))
    names = {site: f"{_projection(baked, block)[0]}.bias" for site, block in blocks.items()}
    state = {name: tensor.detach() for name, tensor in baked.state_dict().items()}
    biases = {name: state.pop(name) for name in names.values()}
    with new_folder(path) as folder:
        with quiet():
            baked.save_pretrained(folder, state_dict=state)
        if wanted.tokenizer is not None:
            wanted.tokenizer.save_pretrained(folder)
        shard = _add_shard(folder, biases)
        (folder / STEERING).mkdir()
        chosen = [wanted.vectors[site] for site in sites]
        SteeringVectorSet(chosen, wanted.vectors.metadata).save(folder / _VECTORS)
        kept = {name: bias.cpu().contiguous() for name, bias in biases.items()}
        scale = json.dumps(_multiplier(model))
        save_file(kept, folder / _BIASES, {"names": json.dumps(names), "multiplier": scale})
        sort_metadata(folder / _BIASES)
        _require_same(model, folder, shard)
        _write_biases(folder, shard, wanted.strength)
    return [
        *notes,
        *switched,
        *together(sites),
        f"It steers by {wanted.strength:g} at {', '.join(sites)}; the folder's logits were held "
        "against those of the hook, at a strength that makes the vector as large as the states.",
    ]


def read(path: Path, _model: Model | None = None) -> SteeringVectorSet:
    """The vectors of a baked folder, without its strength.

    Raises:
        StoreError: it is none.
    """
    _shard(path)
    return SteeringVectorSet.load(path / _VECTORS)


def rebake(path: str | Path, strength: float) -> None:
    """Give a baked folder another strength, in place: one small file is replaced.

    A kill leaves the folder with the old strength or the new one.

    Raises:
        StoreError: it is no folder that was baked.
        MeasurementError: a strength that is not finite, or too large for the weights' dtype.
    """
    if not torch.isfinite(torch.tensor(float(strength))):
        raise MeasurementError(f"strength {strength}: expected a finite number")
    folder = Path(path).expanduser()
    _write_biases(folder, _shard(folder), strength)


def strength_of(path: str | Path) -> float:
    """The strength that a baked folder has.

    Raises:
        StoreError: it is no folder that was baked.
    """
    with safe_open(_shard(Path(path).expanduser()), framework="pt") as file:
        return float((file.metadata() or {})[_STRENGTH])


# ------------------------------------------------------------------------------ the folder


def _write_biases(folder: Path, shard: Path, strength: float) -> None:
    """Write b + λv, in the model's dtype, into the shard of the biases."""
    vectors = SteeringVectorSet.load(folder / _VECTORS)
    biases = load_file(folder / _BIASES)
    with safe_open(folder / _BIASES, framework="pt") as file:
        metadata = file.metadata()
    names, multiplier = json.loads(metadata["names"]), json.loads(metadata["multiplier"])
    new = {}
    for site, name in names.items():
        shift = strength * vectors[site].tensor / multiplier
        new[name] = (biases[name].double() + shift).to(biases[name].dtype)
        if not new[name].isfinite().all():
            raise MeasurementError(
                f"strength {strength:g} makes the bias {name} too large for {new[name].dtype}; "
                "choose a smaller one"
            )
    with atomic_path(shard) as temporary:
        save_file(new, temporary, {"format": "pt", _STRENGTH: repr(float(strength))})
        sort_metadata(temporary)


def _add_shard(folder: Path, biases: dict[str, Tensor]) -> Path:
    """Name a shard for the biases behind those of the weights; return its path."""
    index: dict[str, Json] = {"metadata": {}, "weight_map": {}}
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
    old = sorted(folder.glob("model*.safetensors"))
    count = len(old) + 1
    shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    renamed = dict(zip([file.name for file in old], shards, strict=False))
    placed = index["weight_map"]
    if not placed:  # one file, and no index
        with safe_open(old[0], framework="pt") as file:
            placed = dict.fromkeys(file.keys(), old[0].name)
    for file in reversed(old):
        file.rename(folder / renamed[file.name])
    weights = {name: renamed[place] for name, place in placed.items()}
    weights |= dict.fromkeys(biases, shards[-1])
    if "total_size" not in index["metadata"]:
        index["metadata"]["total_size"] = sum(
            (folder / shard).stat().st_size for shard in renamed.values()
        )
    index["metadata"]["total_size"] += sum(bias.nbytes for bias in biases.values())
    write_json(folder / _INDEX, {**index, "weight_map": dict(sorted(weights.items()))})
    return folder / shards[-1]


def _shard(folder: Path) -> Path:
    """The shard of the biases in a baked folder.

    Raises:
        StoreError: it is none.
    """
    try:
        weights = read_json(folder / _INDEX)["weight_map"]
        with safe_open(folder / _BIASES, framework="pt") as file:
            names = sorted(file.keys())
        (shard,) = {weights[name] for name in names}
        with safe_open(folder / shard, framework="pt") as file:
            if sorted(file.keys()) != names or _STRENGTH not in (file.metadata() or {}):
                raise KeyError(shard)
    except (StoreError, SafetensorError, OSError, KeyError, ValueError, TypeError):
        raise StoreError(
            f"{folder}: no folder that dsteer baked; expected one that `dsteer export --to baked` "
            "wrote"
        ) from None
    return folder / str(shard)


# ------------------------------------------------------------------------------ the model


def _refuse(model: Model) -> None:
    name = model_name(model)
    refuse_adapter(model, "baked")
    method = quantization_of(model.config)
    if method is not None or getattr(model, "is_quantized", False):
        raise ModelError(
            f"{name}: its weights are quantised ({method}), and a bias beside them is none of "
            "theirs; give the model that it was made from"
        )
    if is_dispatched(model):
        raise ModelError(
            f"{name}: its weights are spread over devices; load it without a device map to bake it"
        )
    if is_encoder_decoder(model.config):
        raise ModelError(f"{name}: an encoder-decoder model can't be baked; expected a causal one")


def _block(site: str) -> int:
    block = block_of(site)
    assert block is not None
    return block


def _multiplier(model: Model) -> float:
    """What a block's projections are multiplied by before they are added (Granite)."""
    return float(getattr(text_config(model.config), "residual_multiplier", 1.0))


def _projection(model: Model, block: int) -> tuple[str, nn.Module]:
    """The last projection of a block's MLP, and its name in the model.

    Raises:
        ModelError: none or several could be it.
    """
    anatomy = Anatomy.of(model)
    found = [
        module
        for name, module in anatomy.blocks[block].named_modules()
        if name.rpartition(".")[2] in _PROJECTIONS
        and "attn" not in name
        and "attention" not in name
        if _width(module) == anatomy.width
    ]
    if len(found) != 1:
        raise ModelError(
            f"{model_name(model)}: {len(found)} modules of block {block} could be its last "
            f"projection, so λv can't be one's bias; known to work: {_KNOWN}"
        )
    (name,) = (name for name, module in model.named_modules() if module is found[0])
    return name, found[0]


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if isinstance(module, Conv1D) else None


def _with_biases(model: Model, blocks: list[int]) -> tuple[Model, list[str]]:
    """A model of the same weights, not copied, whose projections have biases, and notes.

    Raises:
        ModelError: its family has none there.
    """
    config, kind, notes = copy.deepcopy(model.config), type(model), []
    text = text_config(config)
    if any(_projection(model, block)[1].bias is None for block in blocks):
        switch = next((key for key in _SWITCHES if getattr(text, key, None) is False), None)
        if switch is not None:
            setattr(text, switch, True)
            notes.append(f"The config has {switch} true; the biases that this adds are zeros.")
        elif _is_llama(text):
            config, kind = _as_llama(config), LlamaForCausalLM
            notes.append(
                f"A {text.model_type} model has no bias there; the folder is the Llama model of "
                "the same weights, which has."
            )
        else:
            window = (
                ", and a sliding window, which no Llama has"
                if _is_llama(text, any_window=True)
                else ""
            )
            raise ModelError(
                f"{model_name(model)}: a {text.model_type} model has no bias at the end of its "
                f"blocks{window}, so hooks alone steer it there; known to work: {_KNOWN}"
            )
    with torch.device("meta"), quiet():
        made = kind(config)
    own = model.state_dict()
    missing, unexpected = made.load_state_dict(own, strict=False, assign=True)
    others = [name for name in missing if not name.endswith(".bias")]
    if others or unexpected:
        raise ModelError(
            f"{model_name(model)}: with biases there its weights would be others (such as "
            f"{[*others, *unexpected][0]}); known to work: {_KNOWN}"
        )
    like = next(iter(own.values()))
    for name in missing:
        holder = made.get_submodule(name.rpartition(".")[0])
        zeros = torch.zeros(holder.bias.shape, dtype=model.dtype, device=like.device)
        holder.bias = nn.Parameter(zeros)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    return made, notes


def _is_llama(text: Any, *, any_window: bool = False) -> bool:
    """Whether a model computes what a Llama with biases of its attention's inputs does."""
    if text.model_type not in {"mistral", "qwen2"}:
        return False
    fits = text.hidden_size % text.num_attention_heads == 0
    return any_window or (fits and text.sliding_window is None)


def _as_llama(config: Any) -> LlamaConfig:
    given = config.to_dict()
    fields = {key: given[key] for key in LlamaConfig().to_dict() if key in given}
    for key in ("model_type", "architectures", "transformers_version"):
        fields.pop(key, None)
    qkv_bias = config.model_type == "qwen2"
    return LlamaConfig(**{**fields, "attention_bias": qkv_bias, "mlp_bias": True})


def _require_same(model: Model, folder: Path, shard: Path) -> None:
    """Load the folder and compare its logits with those under the hook, on some random tokens.

    The strength is one at which the first vector is as large as the states that it is added to: in
    half precision a weak one would be lost in rounding, right or wrong. It stays in the folder.

    Raises:
        ModelError: they are others.
    """
    anatomy, vectors = Anatomy.of(model), SteeringVectorSet.load(folder / _VECTORS)
    first = next(iter(vectors.values()))
    generator = torch.Generator().manual_seed(0)
    weight: Any = anatomy.input_embedding.weight
    ids = torch.randint(len(weight), (1, _PROBE), generator=generator).to(anatomy.device)
    with evaluating(model), Capture(anatomy, [first.site]) as capture:
        states = capture.read(ids, lambda state: state[0])[first.site]
    size = float(states.norm(dim=-1).mean())
    strength = size / first.norm if first.norm else 1.0
    _write_biases(folder, shard, strength)
    with quiet():
        loaded = _load(folder, model.dtype, anatomy.device)
    with evaluating(model), evaluating(loaded):
        with steer(model, vectors, strength):
            hooked = model(input_ids=ids).logits.double()
        found = loaded(input_ids=ids).logits.double()
    error = float((found - hooked).norm() / hooked.norm())
    if not error <= (_SAME_HALF if model.dtype.itemsize < 4 else _SAME):
        kind = text_config(model.config).model_type
        raise ModelError(
            f"{model_name(model)}: a {kind} model with λv as a bias computes something else than "
            f"with λv added (logits off by {error:.2g}), as it does something with its MLP's "
            f"output; known to work: {_KNOWN}"
        )


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    from dsteer.models.load import load_model

    name: Any = str(dtype).removeprefix("torch.")
    return load_model(folder, dtype=name, device=str(device))
