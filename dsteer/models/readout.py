"""The unembedding as a function of its own: final_norm states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy, evaluating, model_name, text_config
from dsteer.models.load import Model

# Relative error of the model's own logits, by its dtype: one rounding of the head's product.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Readout:
    """logits = cap(scale · (W_U h + b)), with cap(z) = c · tanh(z / c) where the model soft-caps.

    Attributes:
        weight: W_U (V, d), float32, a copy.
        bias: b (V,), or None.
        scale: the factor that some models put on their logits.
        softcap: c, or None.
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Model, *, vocabulary: int | None = None) -> Readout:
        """Copy a model's head, and check on real states that it gives the model's own logits.

        Args:
            model: a causal language model.
            vocabulary: keep only so many of the first tokens (where a pair's sizes differ).

        Raises:
            ModelError: the model has no head, or its logits are no such function of the states.
        """
        anatomy = Anatomy.of(model)
        head = anatomy.output_embedding
        if head is None:
            raise ModelError(f"{model_name(model)} has no unembedding; expected a language model")
        config = text_config(model.config)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        readout = cls(
            weight=_copy(head.weight),
            bias=None if getattr(head, "bias", None) is None else _copy(head.bias),
            scale=scale,
            softcap=None if softcap is None else float(softcap),
        )
        readout._check(model, anatomy)
        if vocabulary is None:
            return readout
        kept = None if readout.bias is None else readout.bias[:vocabulary]
        return cls(readout.weight[:vocabulary], kept, readout.scale, readout.softcap)

    @property
    def linear(self) -> bool:
        """Whether λv on the state adds λ · scale · W_U v to the logits (not so with a soft cap)."""
        return self.softcap is None

    def __call__(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits of final_norm states (n, d), in float32, on the head's device."""
        states = states.to(self.weight)
        logits = nn.functional.linear(states, self.weight, self.bias) * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _check(self, model: Model, anatomy: Anatomy) -> None:
        caught: list[Tensor] = []
        handle = anatomy.final_norm.register_forward_hook(
            lambda _module, _args, output: caught.append(Anatomy.read(output).clone())
        )
        ids = torch.arange(min(8, len(self.weight)), device=anatomy.device)
        try:
            with evaluating(model):
                own = model(input_ids=ids[None], use_cache=False).logits[0].float()
        finally:
            handle.remove()
        logits = self(caught[0][0]).to(own.device)
        worst = float((logits - own).abs().max() / own.abs().max().clamp_min(1e-30))
        if not worst <= _TOLERANCE.get(anatomy.dtype, 2e-2):
            raise ModelError(
                f"{model_name(model)}: its logits differ from its unembedding of the final_norm "
                f"state by {worst:.1e} of the largest; expected scale · (W h + b), or its soft cap"
            )


def _copy(parameter: Any) -> Tensor:
    copied: Tensor = parameter.detach().to(torch.float32, copy=True)
    return copied
