"""The unembedding as a function of its own: final_norm states to logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsteer.errors import ModelError
from dsteer.models.adapters import is_off
from dsteer.models.anatomy import Anatomy, evaluating, model_name, text_config
from dsteer.models.load import Model
from dsteer.models.placement import present

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
            model: a language model.
            vocabulary: keep only so many of the first tokens (where a pair's sizes differ).

        Raises:
            ModelError: the model has no head, or its logits are no such function of the states.
        """
        anatomy = Anatomy.of(model)
        head, config = anatomy.output_embedding, text_config(model.config)
        if head is None:
            raise ModelError(f"{model_name(model)} has no unembedding; expected a language model")
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        softcap = softcap or getattr(config, "logits_soft_cap", None)  # RecurrentGemma
        with present(head):
            weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                raise ModelError(
                    f"{model_name(model)}: its unembedding is quantised, so it can't be read as "
                    "numbers; expected a quantisation that leaves it out, as bitsandbytes does"
                )
            if type(head).__module__.startswith("peft.") and not is_off(head):
                weight, bias = _effective(head, weight)
            if anatomy.encoder is not None:  # BART's is a buffer beside the head
                bias = getattr(model, "final_logits_bias", bias)
            readout = cls(
                weight=_copy(weight),
                bias=None if bias is None else _copy(bias).reshape(-1),
                scale=scale,
                softcap=None if softcap is None else float(softcap),
            )
        readout = readout._checked(model, anatomy)
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

    def _checked(self, model: Model, anatomy: Anatomy) -> Readout:
        """This, or with the factor 1/√d that some of T5's kin put on the state."""
        inputs, own = self._sample(model, anatomy)
        scales = [self.scale]
        if anatomy.encoder is not None:
            scales.append(self.scale * anatomy.width**-0.5)
        errors = {}
        for scale in scales:
            readout = replace(self, scale=scale)
            gap = (readout(inputs).to(own.device) - own).abs().max()
            errors[scale] = float(gap / own.abs().max().clamp_min(1e-30))
            if errors[scale] <= _TOLERANCE.get(anatomy.dtype, 2e-2):
                return readout
        raise ModelError(
            f"{model_name(model)}: its logits differ from its unembedding of the final_norm "
            f"state by {min(errors.values()):.1e} of the largest; expected scale · (W h + b), or "
            "its soft cap"
        )

    def _sample(
        self, model: Model, anatomy: Anatomy
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n v"]]:
        """Some final_norm states of a model, and its own logits."""
        caught: list[Tensor] = []
        handle = anatomy.final_norm.register_forward_hook(
            lambda _module, _args, output: caught.append(Anatomy.read(output).clone())
        )
        ids = torch.arange(min(8, len(self.weight)), device=anatomy.device)
        try:
            with evaluating(model):
                decoder = {} if anatomy.encoder is None else {"decoder_input_ids": ids[None]}
                own = model(input_ids=ids[None], use_cache=False, **decoder).logits[0].float()
        finally:
            handle.remove()
        return caught[0][0], own


def _effective(head: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """W_U and b of a head with an adapter, whatever its kind: what the head makes of unit states.

    Without a bias each number is the head's own: a product with one 1 and else zeros.
    """
    with evaluating(head):
        units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        bias = head(torch.zeros_like(units[:1]))[0].float()
        rows = head(units).float().T
    return (rows - bias[:, None], bias) if bool(bias.any()) else (rows, None)


def _copy(parameter: Any) -> Tensor:
    copied: Tensor = parameter.detach().to(torch.float32, copy=True)
    return copied
