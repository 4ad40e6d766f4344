"""Makes norms.npz: PyTorch's norms, and networks with its BatchNorm in training, in float64.

pip install torch==2.13.0 numpy  &&  python tests/reference/make_norms.py

PyTorch has the channels second, the library last: arrays are saved as the library has them.
"""

import pathlib

import numpy as np
import torch
from torch import nn

N, C, STEPS, RATE = 5, 4, 5, 0.1


class ChannelsLast(nn.Module):
    """A norm of PyTorch's whose channels are second, over inputs that have them last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.movedim(-1, 1)).movedim(1, -1)


# The norm, and the shape of an example.
NORMS = {
    "layer_norm": (nn.LayerNorm(C), (3, C)),
    "layer_norm of vectors, without bias": (nn.LayerNorm(C, eps=1e-2, bias=False), (C,)),
    "rms_norm": (nn.RMSNorm(C, eps=1e-5), (3, C)),
    "group_norm": (ChannelsLast(nn.GroupNorm(2, C)), (3, C)),
    "group_norm of images": (ChannelsLast(nn.GroupNorm(3, 6)), (2, 2, 6)),
    "instance_norm": (ChannelsLast(nn.InstanceNorm1d(C, affine=True)), (3, C)),
    "instance_norm of images": (ChannelsLast(nn.InstanceNorm2d(C, affine=True)), (2, 3, C)),
    "batch_norm": (ChannelsLast(nn.BatchNorm1d(C)), (C,)),
    "batch_norm at positions": (ChannelsLast(nn.BatchNorm1d(C)), (3, C)),
}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def arrays_of(norm: nn.Module, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Everything that goes into one forward and backward pass, and that comes out; C = Σ y ⊙ dy."""
    norm = norm.to(torch.float64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = (2 * normal(N, *shape) + normal(shape[-1])).requires_grad_()
    y = norm(x)
    dy = normal(*y.shape)
    y.backward(dy)
    tensors = {"x": x, "y": y, "dy": dy, "dx": x.grad}
    for name, parameter in norm.named_parameters():
        name = {"weight": "scale", "bias": "bias"}[name.split(".")[-1]]
        tensors[name], tensors[f"d_{name}"] = parameter, parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def training(*positions: int) -> dict[str, np.ndarray]:
    """Steps of SGD on the mean over a batch of ½ ‖a − y‖²; the last batch is a smaller one.

    "0.weight" and the like are the network's numbers in front of step 0, behind it, and so on.
    """
    norm = ChannelsLast(nn.BatchNorm1d(C))
    network = nn.Sequential(nn.Linear(3, C), norm, nn.Tanh(), nn.Linear(C, 2)).to(torch.float64)
    nn.init.normal_(norm.norm.weight)
    nn.init.normal_(norm.norm.bias)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    arrays, states = {}, [state_of(network)]
    for step in range(STEPS):
        n = N if step < STEPS - 1 else N - 2
        x, y = 2 * normal(n, *positions, 3) + 1, normal(n, *positions, 2)
        optimizer.zero_grad()
        (0.5 * (network(x) - y).square().sum() / n).backward()
        optimizer.step()
        arrays |= {f"x{step}": x.numpy(), f"y{step}": y.numpy()}
        states.append(state_of(network))
    x = 2 * normal(N, *positions, 3) + 1
    arrays |= {"more x": x.numpy(), "outputs": network.eval()(x).detach().numpy()}
    return arrays | {name: np.stack([state[name] for state in states]) for name in states[0]}


def state_of(network: nn.Module) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    return {name.replace("norm.", ""): a for name, a in state.items() if a.ndim}


if __name__ == "__main__":
    torch.manual_seed(0)
    made = {name: arrays_of(*norm) for name, norm in NORMS.items()}
    made |= {"training": training(), "training at positions": training(3)}
    arrays = {f"{of}/{name}": a for of, found in made.items() for name, a in found.items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("norms.npz"), **arrays)
