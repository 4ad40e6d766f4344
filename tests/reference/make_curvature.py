"""Makes curvature.npz: BackPACK's and kfac-jax's quantities for one small network.

The two need environments of their own; what is importable is added to what the file has:

    pip install torch==2.13.0 backpack-for-pytorch numpy && python make_curvature.py
    pip install jax==0.8.3 jaxlib==0.8.3 kfac-jax==0.0.8  && python make_curvature.py

BackPACK: weight.kflr is [G, A], bias.kflr [G], of the mean loss; its batch gradients carry 1/N.
kfac-jax: the first factor is A of the input with a 1 appended, the second G.
"""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "curvature.npz"
SIZES, N = (5, 6, 4, 3), 8
LAYERS = (0, 2, 4)


def inputs():
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(N, SIZES[0])), "y": random.integers(0, SIZES[-1], N)}
    for i, (fan_in, fan_out) in zip(LAYERS, pairwise(SIZES)):
        arrays[f"weight{i}"] = random.normal(size=(fan_out, fan_in)) / fan_in**0.5
        arrays[f"bias{i}"] = 0.1 * random.normal(size=fan_out)
    return arrays


def by_backpack(given):
    import torch
    from backpack import backpack, extend, extensions

    def layer(i, fan_in, fan_out):
        linear = torch.nn.Linear(fan_in, fan_out).double()
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(given[f"weight{i}"]))
            linear.bias.copy_(torch.tensor(given[f"bias{i}"]))
        return linear

    linears = [layer(i, a, b) for i, (a, b) in zip(LAYERS, pairwise(SIZES))]
    model = extend(
        torch.nn.Sequential(linears[0], torch.nn.Tanh(), linears[1], torch.nn.Tanh(), linears[2])
    )
    loss = extend(torch.nn.CrossEntropyLoss())
    wanted = (
        extensions.KFLR(),
        extensions.DiagGGNExact(),
        extensions.BatchL2Grad(),
        extensions.SumGradSquared(),
    )
    with backpack(*wanted):
        loss(model(torch.tensor(given["x"])), torch.tensor(given["y"])).backward()
    arrays = {}
    for i, linear in zip(LAYERS, linears):
        arrays[f"kflr_G{i}"], arrays[f"kflr_A{i}"] = linear.weight.kflr
        arrays[f"kflr_bias_G{i}"] = linear.bias.kflr[0]
        for name, p in linear.named_parameters():
            for quantity in ("diag_ggn_exact", "batch_l2", "sum_grad_squared"):
                arrays[f"{quantity}_{name}{i}".replace("_exact", "")] = getattr(p, quantity)
    return {name: a.detach().numpy() for name, a in arrays.items()}


def by_kfac_jax(given):
    import jax
    import jax.numpy as jnp
    import kfac_jax

    jax.config.update("jax_enable_x64", True)
    params = [(jnp.asarray(given[f"weight{i}"].T), jnp.asarray(given[f"bias{i}"])) for i in LAYERS]

    def loss(params, batch):
        a, y = batch
        for number, (W, b) in enumerate(params):
            z = kfac_jax.register_dense(a @ W + b, a, W, b)
            a = jnp.tanh(z) if number < len(params) - 1 else z
        kfac_jax.register_softmax_cross_entropy_loss(a, targets=y)
        return -jnp.take_along_axis(jax.nn.log_softmax(a), y[:, None], 1).mean()

    batch = jnp.asarray(given["x"]), jnp.asarray(given["y"])
    estimator = kfac_jax.BlockDiagonalCurvature(func=loss)
    arrays = {}
    for mode in ("empirical", "exact"):
        state = estimator.init(jax.random.key(0), (params, batch), None, None)
        state = estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 0.0, N, jax.random.key(0), (params, batch), f"fisher_{mode}"
        )
        for i, block in zip(LAYERS, state.blocks_states):
            A, G = (np.asarray(factor.value) for factor in block.factors)
            arrays |= {f"kfac_jax_A{i}": A, f"kfac_jax_{mode}_G{i}": G}
    return arrays


def main():
    arrays = dict(np.load(PATH)) if PATH.exists() else {}
    arrays |= inputs()
    if find_spec("backpack"):
        arrays |= by_backpack(arrays)
    if find_spec("kfac_jax"):
        arrays |= by_kfac_jax(arrays)
    np.savez_compressed(PATH, **arrays)
    print({name: a.shape for name, a in arrays.items()})


if __name__ == "__main__":
    main()
