"""A pair of tiny models, and the same pair in another basis with other token ids.

RMSNorm with unit gains commutes with orthogonal maps, and queries, keys, values and MLPs only meet
the residual stream through their projections. So with W R^T for each projection that reads the
stream, R W for each that writes it, and embeddings turned by R, model B computes R h wherever model
A computes h; with its vocabulary in another order, its ids differ and its logits are A's, permuted.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from planted import Planted, planted_pair
from scipy.stats import ortho_group
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dsteer.models.load import quiet

READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITES = ("o_proj", "down_proj")


def rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix (width, width), float64."""
    return torch.from_numpy(ortho_group.rvs(width, random_state=seed))


def rotated(model: LlamaForCausalLM, R: Tensor, order: Tensor) -> LlamaForCausalLM:
    """The model in the basis R, with the token i of the old vocabulary as ``order[i]``."""
    turned = copy.deepcopy(model).double()
    with torch.no_grad():
        for layer in turned.model.layers:
            modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
            for name in READS:
                modules[name].weight.copy_(modules[name].weight @ R.T)
            for name in WRITES:
                modules[name].weight.copy_(R @ modules[name].weight)
                if modules[name].bias is not None:
                    modules[name].bias.copy_(R @ modules[name].bias)
        for embedding in (turned.model.embed_tokens, turned.lm_head):
            embedding.weight[order] = (embedding.weight @ R.T).clone()
    turned.config.bos_token_id, turned.config.eos_token_id, turned.config.pad_token_id = (
        int(order[i]) for i in (0, 1, 2)
    )
    turned.generation_config = copy.deepcopy(turned.generation_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(turned.generation_config, name, getattr(turned.config, name))
    return turned.float()


def permuted(tokenizer: PreTrainedTokenizerFast, order: Tensor) -> PreTrainedTokenizerFast:
    """The tokenizer with the token i as ``order[i]``."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    new = [int(i) for i in order]
    state["model"]["vocab"] = {token: new[i] for token, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = new[added["id"]]
    for special in state["post_processor"]["special_tokens"].values():
        special["ids"] = [new[i] for i in special["ids"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )


def rotated_pair(block: int, **changes: object) -> tuple[Planted, Planted, Tensor]:
    """A planted pair A, the pair B = A in another basis and vocabulary, and the rotation R."""
    a = planted_pair(block, **changes)
    width, vocabulary = a.base.config.hidden_size, a.base.config.vocab_size
    R = rotation(width)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(5))
    b = Planted(
        rotated(a.base, R, order),
        rotated(a.tuned, R, order),
        permuted(a.tokenizer, order),
        block,
        (R @ a.b.double()).float(),
    )
    return a, b, R


def save(pair: Planted, folder: Path) -> tuple[Path, Path]:
    """Write both models and the tokenizer."""
    with quiet():
        return pair.save(folder)
