"""Muon for the matrices, AdamW for the embedding and the norms.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon): the momentum of a matrix is
replaced by the nearest semi-orthogonal matrix, so that all its directions learn at one speed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of matrix = U S V^T, by Newton-Schulz iterations of a quintic polynomial.

    The coefficients are Muon's: they bring every singular value into about 0.7..1.2 in 5 steps.
    """
    a, b, c = _QUINTIC
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update of every matrix [out, in] is orthogonalized.

    An update is scaled by sqrt(max(1, out / in)), which keeps the change of the outputs alike
    for all shapes; weight decay is decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(weight.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers, AdamW on everything else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        inside = weight.ndim == 2 and "embed_tokens" not in name
        (matrices if inside else others).append(weight)
    return [
        Muon(matrices, lr=muon_lr, decay=decay),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
