"""The same nets in PyTorch, and their gradient variance by BackPACK and Opacus."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import BatchL2Grad, SumGradSquared, Variance
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from cabs_jax.statistics import PyTree

NETS = ("mnist_2c2d", "cifar10_2c3d", "mlp")


def contenders(
    name: str, params: PyTree, examples: dict[str, np.ndarray]
) -> dict[str, Callable[[], list[Tensor]]]:
    """Training steps up to the gradient, which each leaves in the parameters of a net of its own.

    Args:
      name: One of `NETS`.
      params: Parameters of the net in JAX, which are copied.
      examples: The batch.

    Returns:
      Functions that return tensors whose entries sum to ξ = (1/m) Σ‖g_i‖² − ‖ḡ‖²: ξ itself, or its
      diagonal; "PyTorch" alone returns nothing but the gradient's.
    """
    images, labels = torch.tensor(examples["input"]), torch.tensor(examples["label"]).long()
    m = len(labels)

    def step(module: nn.Module, *extensions: Any, extended: bool = False) -> list[nn.Parameter]:
        cross_entropy = extend(nn.CrossEntropyLoss()) if extended else nn.CrossEntropyLoss()
        module.zero_grad()
        loss = cross_entropy(module(pixels(name, images)), labels)
        with backpack(*extensions):
            loss.backward()
        return list(module.parameters())

    def backpack_step(extension: type) -> Callable[[], list[nn.Parameter]]:
        module = extend(net(name, params))
        return lambda: step(module, extension(), extended=True)

    plain = net(name, params)
    by_norms = backpack_step(BatchL2Grad)
    by_squares = backpack_step(SumGradSquared)
    by_variance = backpack_step(Variance)
    per_example = GradSampleModule(net(name, params))
    ghost = GradSampleModuleFastGradientClipping(net(name, params))

    # BackPACK sees the gradients of the mean loss's terms: one m-th of the examples' gradients.
    def backpack_norms() -> list[Tensor]:
        found = by_norms()
        squares = sum(p.batch_l2.sum() for p in found)
        return [m * squares - _squared_norm(p.grad for p in found)]

    def backpack_squares() -> list[Tensor]:
        return [m * p.sum_grad_squared - p.grad.square() for p in by_squares()]

    def backpack_variance() -> list[Tensor]:
        return [m**2 * p.variance for p in by_variance()]

    def opacus_per_example() -> list[Tensor]:
        found = step(per_example)
        squares = _squared_norm(p.grad_sample for p in found)
        return [squares / m - _squared_norm(p.grad for p in found)]

    def opacus_ghost() -> list[Tensor]:
        found = step(ghost)
        norms = ghost.get_norm_sample()
        return [norms.square().mean() - _squared_norm(p.grad for p in found)]

    return {
        "PyTorch": lambda: [p.grad for p in step(plain)],
        "BackPACK norms": backpack_norms,
        "BackPACK squares": backpack_squares,
        "BackPACK variance": backpack_variance,
        "Opacus per example": opacus_per_example,
        "Opacus ghost norms": opacus_ghost,
    }


def net(name: str, params: PyTree) -> nn.Sequential:
    """Copies a net of convolutions, each rectified and pooled, and rectified dense layers."""
    modules: list[nn.Module] = []
    channels = 0
    for layer in params.values() if isinstance(params, dict) else params:
        kernel, bias = (torch.tensor(np.asarray(layer[key])) for key in ("kernel", "bias"))
        module: nn.Conv2d | nn.Linear
        if kernel.ndim == 4:
            window, _, inputs, channels = kernel.shape
            module = nn.Conv2d(inputs, channels, window, padding=window // 2)
            weight = kernel.permute(3, 2, 0, 1)
            modules += [module, nn.ReLU(), _pool(name)]
        else:
            if channels:
                size = math.isqrt(len(kernel) // channels)
                kernel = kernel.reshape(size, size, channels, -1).permute(2, 0, 1, 3).flatten(0, 2)
                modules.append(nn.Flatten())
                channels = 0
            module, weight = nn.Linear(*kernel.shape), kernel.T
            modules += [module, nn.ReLU()]
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return nn.Sequential(*modules[:-1])


def pixels(name: str, images: Tensor) -> Tensor:
    """What the net in JAX does to raw images, with channels first.

    Contiguous, since Opacus 1.6 computes wrong gradients where they are not.
    """
    if name == "mlp":
        return images.float() / 127.5 - 1
    images = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format).float()
    if name == "mnist_2c2d":
        return images / 255
    cropped = images[:, :, 4:28, 4:28]
    std, mean = torch.std_mean(cropped, dim=(1, 2, 3), correction=0, keepdim=True)
    return (cropped - mean) / std


def _pool(name: str) -> nn.Module:
    return nn.MaxPool2d(2) if name == "mnist_2c2d" else nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.dot(t.flatten(), t.flatten()) for t in tensors]).sum()
