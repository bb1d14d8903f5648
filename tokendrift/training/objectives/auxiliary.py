"""An auxiliary model: a network beside the one that is refined, with an optimiser of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed, nn

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError
from tokendrift.references import add_over_ranks
from tokendrift.training.objectives.objective import grouped

MOMENTS = {"step": True, "exp_avg": False, "exp_avg_sq": False}  # of AdamW, and whether each is a single number
OWN_CALL = -1  # distinguishes its meetings of the ranks from those of the objective


class AuxiliaryModel:
    """A network that is trained beside the student, with AdamW at a constant rate and without dropout.

    Several processes hold it whole and average its gradients: do not wrap it in DDP.

    Args:
        network: Denoiser. The parameters that require gradients are trained.
        rate: Learning rate.
        betas: AdamW's decay rates.
        clip: Largest gradient norm.
        ranks: How many processes train together, each calling in step. Default: 1.

    Attributes:
        network: The denoiser, in evaluation mode.
        trained: Its parameters that are trained, by name.
        optimizer: AdamW.

    Raises:
        TokenDriftError: If no parameter requires gradients.
    """

    def __init__(
        self, network: nn.Module, *, rate: float, betas: tuple[float, float], clip: float, ranks: int = 1
    ) -> None:
        self.network, self.clip, self.ranks = network.eval(), clip, ranks
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.trained:
            raise fail(
                "auxiliary has no parameter that requires gradients.",
                "Pass copy.deepcopy(teacher).requires_grad_(True), or low_rank_copy(teacher, rank).",
                auxiliary=type(network).__name__,
            )
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=rate, betas=betas, weight_decay=0.0)

    def step(self, losses: Iterable[Tensor]) -> Tensor:
        """Take an optimiser step on the sum of losses, each computed when it is its turn; return the detached sum.

        Raises:
            TokenDriftError: On all processes, if a loss or a gradient is not finite, or if a loss raises an error on
                one of them. The weights are unchanged then.
        """
        device = next(iter(self.trained.values())).device
        total, error = torch.zeros((), device=device), None
        try:
            for loss in losses:
                loss.backward()
                total = total + loss.detach()
            if not total.isfinite():
                raise _diverged()
        except Exception as found:
            error = found
        try:
            add_over_ranks(0, ranks=self.ranks, device=device, call=OWN_CALL, error=error)
            for parameter in self.trained.values():
                if self.ranks > 1 and parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad.div_(self.ranks)
            if not nn.utils.clip_grad_norm_(self.trained.values(), self.clip).isfinite():
                raise _diverged()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained parameters, ``weights/NAME``, and the moments of the optimiser, ``KIND/NAME``."""
        found: dict[str, Tensor] = {f"weights/{name}": parameter for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{kind}/{name}": value for kind, value in moments.items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            TokenDriftError: If it is the state of another model.
        """
        kinds = grouped(state)
        weights = kinds.pop("weights", {})
        shapes = {name: parameter.shape for name, parameter in self.trained.items()}
        moments = [kinds.get(kind, {}) for kind in MOMENTS]
        fits = {name: value.shape for name, value in weights.items()} == shapes and not kinds.keys() - MOMENTS.keys()
        for values, scalar in zip(moments, MOMENTS.values(), strict=True):
            fits = fits and values.keys() == moments[0].keys() <= shapes.keys()
            fits = fits and all(
                value.numel() == 1 if scalar else value.shape == shapes[n] for n, value in values.items()
            )
        if not fits:
            raise fail("the state is that of another auxiliary model.", "Build it with the same rank of adapters.")
        if not all(value.isfinite().all() for value in state.values()):
            raise fail("the state of the auxiliary model is not finite.", "Take an earlier checkpoint.")
        self.optimizer.state.clear()
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
            for kind, values in kinds.items():
                if name in values:
                    value = values[name].clone()  # the count of steps stays on the CPU, where AdamW keeps it
                    self.optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter)


def _diverged() -> TokenDriftError:
    return fail(
        "the loss of the auxiliary model or its gradient is not finite; its weights were not changed.",
        "Lower auxiliary_rate and begin a new run: a run to be resumed keeps its settings.",
    )
