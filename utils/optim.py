"""SGD and its learning rate as a pure function of epoch and step, so that no scheduler state is saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from utils.shared_config import COMPILING

Schedule = Callable[[int, int], float]  # (epoch, step) -> learning rate


def sgd(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD over the parameters that are trained, in one pass over each; what compiles fuses a step anyway."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = trained[0].device.type not in COMPILING
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
    optimizer.register_load_state_dict_post_hook(_lay_out)
    return optimizer


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Loaded momenta in their weights' memory format: the fused step takes both by address, not by index."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def cosine(lr: float, epochs: int) -> Schedule:
    """Half a cosine from `lr` to 0, constant within an epoch, as facebookresearch/moco does it."""
    return lambda epoch, step: lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def constant(lr: float, warmup_steps: int, start_step: int) -> Schedule:
    """`lr`, reached linearly over the first `warmup_steps` after `start_step`."""
    return lambda epoch, step: lr * min(1.0, (step - start_step + 1) / (warmup_steps + 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr`, whatever a loaded state says: the round's learning rate wins."""
    for group in optimizer.param_groups:
        group["lr"] = lr
