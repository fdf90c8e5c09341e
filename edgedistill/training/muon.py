"""Muon whose orthogonalization is computed in float32: torch's is bfloat16, which most CPUs only emulate.

Shapes: R rows, C columns of a matrix. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253


class FloatMuon(torch.optim.Muon):
    """`torch.optim.Muon`, state and options included, but for the precision of its Newton-Schulz iteration.

    On a CPU with AVX2 alone bfloat16 products take six times as long as float32 ones, and were two thirds of a step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step. The learning rate of a matrix is scaled by sqrt(max(1, R / C)), torch's "original"."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, momentum = float(group["lr"]), group["momentum"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
                buffer = state["momentum_buffer"]
                buffer.lerp_(gradient, 1 - momentum)
                update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
        return loss


def orthogonalized(matrix_RC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The matrix with its singular values driven towards 1, by `steps` of the quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if tall else matrix_RC
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
