"""Gradients of a pair's log-likelihood margin with respect to hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsteer.activations.capture import site_module
from dsteer.activations.inputs import Inputs, decoder_shift
from dsteer.data.tokens import Encoded
from dsteer.errors import DataError, MeasurementError, ModelError
from dsteer.models.anatomy import Anatomy
from dsteer.progress import SILENT, Reporter
from dsteer.training.divergence import first_divergence
from dsteer.training.examples import Example


@dataclass(frozen=True)
class MarginGradients:
    """∇m at some sites, m = ln π(y_w|x) − ln π(y_l|x), one row a pair.

    By the chain rule the DPO loss has the gradient −β σ(−β (m − m_ref)) ∇m, and descends along ∇m.

    Attributes:
        margins: m in nats, float64.
        sequence: site → the gradient summed over all tokens of both texts: ∇_v m where v is added
            to the site's state at every token (of an encoder-decoder model, of the decoder), at
            v = 0. float64.
        context: site → the gradient at the last token that both texts share, whose state predicts
            the first diverging token (the sum of its two copies, which are equal states). float64.
    """

    margins: Float[Tensor, " n"]
    sequence: dict[str, Float[Tensor, "n d"]]
    context: dict[str, Float[Tensor, "n d"]]


def margin_gradients(
    model: PreTrainedModel,
    examples: Sequence[Example],
    sites: Sequence[str],
    reporter: Reporter = SILENT,
) -> MarginGradients:
    """Differentiate each pair's margin by automatic differentiation, one pair at a time.

    No graph is kept below the earliest site, no weight gets a gradient, and hooks and flags are
    put back in any case.

    Args:
        model: the policy π, as it is loaded.
        examples: pairs whose answers diverge.
        sites: ``resid_post.{k}`` and ``final_norm``, in the model's order.
        reporter: shows progress.

    Raises:
        ConfigError: a name is no site.
        DataError: no pairs, or one whose answers do not diverge.
        ModelError: a site's module did not run.
        MeasurementError: a gradient is not finite.
    """
    if not examples:
        raise DataError("there are no pairs to differentiate; give at least one")
    anatomy = Anatomy.of(model)
    found: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]] = []
    with (
        frozen(model),
        _States(anatomy, sites) as states,
        torch.enable_grad(),
        reporter.bar("gradients", len(examples), unit="pair") as advance,
    ):
        for number, example in enumerate(examples):
            found.append(_one(model, anatomy, example, states, number))
            advance(1)
    return MarginGradients(
        torch.tensor([margin for margin, _, _ in found], dtype=torch.float64),
        {site: torch.stack([sequence[site] for _, sequence, _ in found]) for site in sites},
        {site: torch.stack([context[site] for _, _, context in found]) for site in sites},
    )


def _one(
    model: PreTrainedModel, anatomy: Anatomy, example: Example, states: _States, number: int
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    index = first_divergence(example.chosen, example.rejected)
    if index is None:
        raise DataError(f"pair {number}: its answers do not diverge; leave it out")
    answers = (example.chosen, example.rejected)
    rows = [Encoded(example.prompt + answer, len(example.prompt)) for answer in answers]
    start = len(example.prompt) + decoder_shift(rows[0], anatomy.start)
    states.clear()
    inputs = Inputs.of(rows, anatomy.start).arguments(anatomy.device)
    logits = model(**inputs, use_cache=False).logits
    likelihoods = []
    for row, answer in enumerate(answers):
        predicting = logits[row, start - 1 : start + len(answer) - 1]
        predicting = predicting.cpu() if predicting.device.type == "mps" else predicting
        log_p = predicting.double().log_softmax(1)
        targets = torch.tensor(answer, device=log_p.device)
        likelihoods.append(log_p.gather(1, targets[:, None]).sum())
    margin = likelihoods[0] - likelihoods[1]
    read = states.read()
    gradients = torch.autograd.grad(margin, list(read.values()))
    sequence, context = {}, {}
    for site, gradient in zip(read, gradients, strict=True):
        taken = gradient.cpu().double()
        if not bool(torch.isfinite(taken).all()):
            raise MeasurementError(
                f"pair {number}: its gradient at {site} is not finite; read the models in float32"
            )
        sequence[site] = taken.sum(dim=(0, 1))
        context[site] = taken[:, start + index - 1].sum(dim=0)
    return float(margin.detach()), sequence, context


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient and no module trains; both flags return afterwards."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


class _States:
    """Hooks that keep the states of a pass in its graph, which begins at the earliest site."""

    def __init__(self, anatomy: Anatomy, sites: Sequence[str]) -> None:
        self._sites = tuple(sites)
        self._modules = [site_module(anatomy, site) for site in sites]
        self._handles: list[RemovableHandle] = []
        self._caught: dict[str, Tensor] = {}

    def __enter__(self) -> _States:
        for site, module in zip(self._sites, self._modules, strict=True):
            self._handles.append(module.register_forward_hook(self._catch(site)))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget the pass before."""
        self._caught.clear()

    def read(self) -> dict[str, Tensor]:
        """The states of the last pass, by site."""
        silent = [site for site in self._sites if site not in self._caught]
        if silent:
            raise ModelError(
                f"{silent[0]}: its module did not run; expected every block to run once"
            )
        return {site: self._caught[site] for site in self._sites}

    def _catch(self, site: str) -> Callable[[nn.Module, object, object], object]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> object:
            state = Anatomy.read(output)
            if not state.requires_grad:
                state = state.detach().requires_grad_()
            self._caught[site] = state
            return Anatomy.write(output, state)

        return hook
