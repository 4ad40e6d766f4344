"""A batch that is split among eight devices: the same numbers, and nothing is gathered.

On meshes of both kinds: those whose axes the compiler splits by, and those of explicit axes, which
``jax.make_mesh`` makes by default. The devices are the host's, so this runs in a process of its
own, which ``python test_meshes.py PART`` is.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = 8


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_quantity_of_a_split_batch(part):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    run = subprocess.run(
        [sys.executable, Path(__file__).name, str(part)],
        cwd=Path(__file__).parent,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def model():
    """Look-ups, recurrence in three blocks of time, positions."""
    import functional_bp as bp

    return bp.chain(
        bp.embedding(20, 8, dtype="float64"),
        bp.lstm(8, checkpoint=8),
        bp.dense(5),
    )


def quantities(model, loss):
    import jax
    import jax.numpy as jnp

    import functional_bp as bp

    def along(quantity):
        return lambda params, x, y: quantity(params, x, y, params)

    normalised = bp.chain(model, bp.tanh, bp.batch_norm())

    def renewed(params, x, y):
        running = bp.batch_norm().init(jax.random.key(0), jax.ShapeDtypeStruct((5,), float))
        return bp.value_and_grad(normalised, loss, renew=True)((params, (), running), x, y)

    def traced(params, x):
        """The same by itself, as a user may have written it."""

        def step(state, x):
            h, c = state
            z = cell["weight_x"] @ x + cell["weight_h"] @ h + cell["bias"]
            i, f, g, o = jnp.split(z, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        table, cell, last = params
        zeros = jnp.zeros(8)
        _, h = jax.lax.scan(step, (zeros, zeros), table["weight"][x])
        return h @ last["weight"].T + last["bias"]

    function = bp.from_function(traced)
    some = {"microbatch": 2 * DEVICES}
    first = {
        "value_and_grad": bp.value_and_grad(model, loss),
        "value_and_grad, batch norm": renewed,
        "norms": bp.per_example_grad_norms(model, loss),
        "norms, traced": bp.per_example_grad_norms(function, loss),
        "clipped, traced": bp.clipped_grad(function, loss, 0.1),
        "clipped, microbatches": bp.clipped_grad(model, loss, 0.1, **some),
    }
    second = {
        "value_and_grad, microbatches": bp.value_and_grad(model, loss, **some),
        "deltas": bp.deltas(model, loss),
        "clipped": bp.clipped_grad(model, loss, 0.1, has_aux=True),
        "second moment": bp.grad_second_moment(model, loss),
        "Gram": bp.grad_gram(model, loss),
        "Hessian": along(bp.hvp(model, loss)),
        "Kronecker": bp.kronecker_factors(model, loss),
        "outputs": lambda params, x, y: model.apply(params, x),
        "autodiff": bp.value_and_grad(model, loss, method="autodiff"),
        "each": bp.per_example_grads(model, loss),
        "norms, microbatches": bp.per_example_grad_norms(model, loss, **some),
        "clipped, one recursion": bp.clipped_grad(model, loss, 0.1, recursions=1, per="layer"),
        "variance": bp.grad_variance(model, loss, **some),
        "noise scale": bp.grad_noise_scale(model, loss),
        "diversity": bp.grad_diversity(model, loss),
        "dots": along(bp.grad_dots(model, loss)),
        "Gauss–Newton": along(bp.ggnvp(model, loss)),
        "diagonal": lambda params, x, y: bp.ggn_diagonal(model, loss, samples=1)(
            params, x, y, key=jax.random.key(0)
        ),
    }
    return first, second


GATHERS = {"Gram"}  # every pair of examples meets


def main(part):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import functional_bp as bp

    def splits(kind):
        mesh = jax.make_mesh((DEVICES,), ("examples",), axis_types=(kind,))
        return (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))

    def check_equal(what, found, wanted):
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
            assert error <= 1e-11 * np.abs(np.asarray(theirs)).max(), f"{what}: {error}"

    net, loss = model(), bp.losses.softmax_cross_entropy
    n, steps = 4 * DEVICES, 24
    x = jnp.arange(n * steps).reshape(n, steps) ** 2 % 19
    y = x % 5
    params = jax.jit(net.init)(jax.random.key(0), x[0])
    for name, quantity in quantities(net, loss)[part].items():
        wanted = jax.jit(quantity)(params, x, y)
        for kind in (AxisType.Auto, AxisType.Explicit):
            whole, split = splits(kind)
            there = jax.device_put(params, whole), *jax.device_put((x, y), split)
            compiled = jax.jit(quantity).lower(*there).compile()
            gathered = re.findall(r"= (\S+) all-(?:gather|to-all)", compiled.as_text())
            assert not gathered or name in GATHERS, f"{name} on {kind} gathers {gathered}"
            found = compiled(*there)
            check_equal(f"{name} on {kind}", found, wanted)
            if name in ("value_and_grad", "value_and_grad, batch norm"):
                assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))
            if name == "norms":
                assert found.sharding.is_equivalent_to(split, 1)

    if part:
        return
    net = bp.chain(bp.repeat(bp.residual(bp.chain(bp.dense(6), bp.tanh)), 2), bp.dense(5))
    x, y = jnp.sin(jnp.arange(n * 6.0)).reshape(n, 6), y[:, 0]
    params = net.init(jax.random.key(0), x[0])
    whole, split = splits(AxisType.Explicit)
    start, batch = jax.device_put(params, whole), jax.device_put((x, y), split)
    for quantity in (
        bp.grad(net, loss),
        bp.clipped_grad(net, loss, 0.1, per="layer"),
        bp.grad_second_moment(net, loss),
    ):
        check_equal("outside jit", quantity(start, *batch), quantity(params, x, y))
    how = {"optimizer": optax.adam(0.1), "epochs": 5}
    run = bp.fit(net, loss, start, [batch], **how, evaluation=[batch])
    alone = bp.fit(net, loss, params, [(x, y)], **how, evaluation=[(x, y)])
    check_equal("fit", vars(run.history), vars(alone.history))


if __name__ == "__main__":
    main(int(sys.argv[1]))
