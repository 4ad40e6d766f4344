"""Makes convolution.npz: PyTorch's convolutions, pools and up-sampling, in float64.

pip install torch==2.13.0 numpy  &&  python tests/reference/make_convolution.py

PyTorch has channels second and kernels as (out, in, *window), or transposed (in, out, *window); the
library has both last: arrays are saved as the library has them.
"""

import pathlib

import numpy as np
import torch
from torch import nn

N = 3


# The layer, and the shape of an example with its channels last.
LAYERS = {
    "conv of sequences": (nn.Conv1d(2, 4, 3, padding=1), (6, 2)),
    "conv": (nn.Conv2d(2, 4, 3, padding=1), (5, 4, 2)),
    "conv of volumes": (nn.Conv3d(2, 2, 2, bias=False), (3, 4, 3, 2)),
    "conv, strides and dilation": (
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
        (6, 5, 2),
    ),
    "conv, groups": (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 4)),
    "conv, depthwise": (nn.Conv2d(3, 6, 3, groups=3, padding=1), (4, 4, 3)),
    "conv, circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 5, 2)),
    "conv_transpose": (nn.ConvTranspose2d(2, 4, 3, stride=2), (3, 4, 2)),
    "conv_transpose, padding and dilation": (
        nn.ConvTranspose2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (4, 3, 2),
    ),
    "conv_transpose, groups": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (5, 4)),
    "max_pool": (nn.MaxPool2d(2), (4, 6, 2)),
    "max_pool, overlapping": (nn.MaxPool2d(3, stride=2, padding=1), (5, 6, 2)),
    "max_pool, dilated": (nn.MaxPool1d(2, stride=1, dilation=2), (6, 2)),
    "avg_pool": (nn.AvgPool2d(2), (4, 6, 2)),
    "avg_pool, padding": (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (5, 6, 2)),
    "global_avg_pool": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (4, 3, 2)),
    "global_max_pool": (nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()), (4, 3, 2)),
    "upsample": (nn.Upsample(scale_factor=2), (3, 2, 2)),
    "upsample, linear": (nn.Upsample(scale_factor=(3, 2), mode="bilinear"), (3, 4, 2)),
}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def kernel(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """``(*window, in / groups, out)``."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return weight.movedim((0, 1), (-1, -2))
    parts = weight.chunk(layer.groups, 0)  # (in / groups, out / groups, *window) of each group
    return torch.cat([part.movedim((0, 1), (-2, -1)) for part in parts], -1)


def arrays_of(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Everything that goes into one forward and backward pass, and that comes out; C = Σ y ⊙ dy."""
    layer = layer.to(torch.float64)
    x = normal(N, *shape)
    if isinstance(layer, nn.MaxPool2d):
        x = x.round()  # so that there are ties
    x.requires_grad_()
    y = layer(x.movedim(-1, 1))
    y = y.movedim(1, -1) if y.ndim > 2 else y
    dy = normal(*y.shape)
    y.backward(dy)
    tensors = {"x": x, "y": y, "dy": dy, "dx": x.grad}
    if getattr(layer, "bias", None) is not None:
        tensors |= {"bias": layer.bias, "d_bias": layer.bias.grad}
    if hasattr(layer, "weight"):
        tensors["weight"] = kernel(layer, layer.weight)
        tensors["d_weight"] = kernel(layer, layer.weight.grad)
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    arrays = {
        f"{of}/{name}": a for of, made in LAYERS.items() for name, a in arrays_of(*made).items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("convolution.npz"), **arrays)
