"""Makes recurrent.npz: PyTorch's LSTM and GRU, outputs and all gradients, in float64.

pip install torch==2.13.0  &&  python tests/reference/make_recurrent.py
"""

import pathlib

import numpy as np
import torch

N, T, D, H = 3, 7, 4, 5


def arrays_of(kind: str, bidirectional: bool) -> dict[str, np.ndarray]:
    """Everything that goes into one forward and backward pass, and that comes out of it.

    C = Σ y ⊙ dy + Σ final state ⊙ its δ; the two biases of PyTorch are both there.
    """
    torch.manual_seed(0)
    layer = getattr(torch.nn, kind)(D, H, batch_first=True, bidirectional=bidirectional)
    layer = layer.to(torch.float64)
    directions = 2 if bidirectional else 1
    x = torch.randn(N, T, D, dtype=torch.float64, requires_grad=True)
    parts = ("h", "c") if kind == "LSTM" else ("h",)
    state = {
        part: torch.randn(directions, N, H, dtype=torch.float64, requires_grad=True)
        for part in parts
    }
    given = tuple(state.values()) if kind == "LSTM" else state["h"]
    y, final = layer(x, given)
    final = dict(zip(parts, final if kind == "LSTM" else (final,)))
    dy = torch.randn_like(y)
    dfinal = {part: torch.randn_like(final[part]) for part in parts}
    cost = (y * dy).sum() + sum((final[part] * dfinal[part]).sum() for part in parts)
    cost.backward()
    tensors = {"x": x, "y": y, "dy": dy, "dx": x.grad}
    for part in parts:
        tensors[f"state_{part}"], tensors[f"dstate_{part}"] = state[part], state[part].grad
        tensors[f"final_{part}"], tensors[f"dfinal_{part}"] = final[part], dfinal[part]
    for name, parameter in layer.named_parameters():
        tensors[name], tensors[f"d_{name}"] = parameter, parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


if __name__ == "__main__":
    arrays = {
        f"{kind.lower()}{'_both' if bidirectional else ''}/{name}": array
        for kind in ("LSTM", "GRU")
        for bidirectional in (False, True)
        for name, array in arrays_of(kind, bidirectional).items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("recurrent.npz"), **arrays)
