"""Convolution and pooling: PyTorch's numbers, drawn windows against autodiff, and bad input."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import check_equal

import functional_bp as bp

WITHIN = 1e-11
ARRAYS = np.load(pathlib.Path(__file__).parent / "reference" / "convolution.npz")
LAYERS = {
    "conv of sequences": bp.conv(4, 3),
    "conv": bp.conv(4, 3),
    "conv of volumes": bp.conv(2, 2, padding="VALID", bias=False),
    "conv, strides and dilation": bp.conv(
        4, (3, 2), strides=(2, 1), dilation=(1, 2), padding=(2, 1)
    ),
    "conv, groups": bp.conv(6, 3, groups=2, padding="VALID"),
    "conv, depthwise": bp.conv(6, 3, groups=3),
    "conv, circular": bp.conv(3, 3, padding="CIRCULAR"),
    "conv_transpose": bp.conv_transpose(4, 3, strides=2, padding="VALID"),
    "conv_transpose, padding and dilation": bp.conv_transpose(
        4, (3, 2), strides=(2, 1), padding=(1, 0), dilation=(1, 2)
    ),
    "conv_transpose, groups": bp.conv_transpose(6, 3, strides=2, groups=2, padding="VALID"),
    "max_pool": bp.max_pool(2),
    "max_pool, overlapping": bp.max_pool(3, strides=2, padding=1),
    "max_pool, dilated": bp.max_pool(2, strides=1, dilation=2),
    "avg_pool": bp.avg_pool(2),
    "avg_pool, padding": bp.avg_pool(3, strides=2, padding=1),
    "global_avg_pool": bp.global_avg_pool,
    "global_max_pool": bp.global_max_pool,
    "upsample": bp.upsample(2),
    "upsample, linear": bp.upsample((3, 2), method="linear"),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_equal_pytorchs(name):
    arrays = {k.split("/")[1]: v for k, v in ARRAYS.items() if k.split("/")[0] == name}
    params = {k: arrays[k] for k in ("weight", "bias") if k in arrays} or ()

    def ours(params, x, dy):
        y, residuals = LAYERS[name].forward(params, x)
        dx, gradients = LAYERS[name].backward(params, residuals, dy, bp.contractions.total)
        return {"y": y, "dx": dx} | {f"d_{k}": gradients[k] for k in params}

    found = jax.jit(ours)(params, arrays["x"], arrays["dy"])
    check_equal(found, {k: arrays[k] for k in found}, WITHIN)


# ---- any windows, against autodiff of the definition


def drawn_windows(draw, rank):
    def each(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    size, strides, dilation = each(1, 4), each(1, 3), each(1, 2)
    padding = draw(st.sampled_from(["SAME", "CIRCULAR", "VALID", "numbers"]))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size)]
    if padding == "numbers":
        padding = tuple((draw(st.integers(0, r)), draw(st.integers(0, 2))) for r in reach)
    least = {"VALID": reach, "CIRCULAR": [-(-r // 2) for r in reach]}.get(padding, [1] * rank)
    if isinstance(padding, tuple):
        least = [max(1, r - sum(p)) for r, p in zip(reach, padding)]
    space = tuple(draw(st.integers(n, n + 4)) for n in least)
    return space, size, {"strides": strides, "dilation": dilation, "padding": padding}


@st.composite
def convolutions(draw):
    """Kernels even and odd, larger than the image too."""
    space, size, options = drawn_windows(draw, draw(st.integers(1, 2)))
    groups = draw(st.integers(1, 2))
    channels, features = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return space, channels, features, size, options | {"groups": groups}


def places(x, size, strides, dilation, padding, fill=0.0):
    """For each place in a window, what lies there in all of them."""
    space = x.shape[1:-1]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size)]
    mode = {"constant_values": fill}
    if padding == "CIRCULAR":
        mode = {"mode": "wrap"}
    if padding in ("SAME", "CIRCULAR"):
        missing = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(space, strides, reach)]
        padding = [(m // 2, m - m // 2) for m in missing]
    padding = [(0, 0)] * len(size) if padding == "VALID" else padding
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), **mode)
    for place in np.ndindex(*size):
        at = tuple(
            slice(k * d, n - r + k * d + 1, s)
            for k, d, n, r, s in zip(place, dilation, x.shape[1:-1], reach, strides)
        )
        yield place, x[(slice(None), *at)]


def by_definition(x, W, b, *, groups, **options):
    """Σ over the window, place by place, of padded inputs."""
    z = 0
    for place, a in places(x, W.shape[:-2], **options):
        a = a.reshape(*a.shape[:-1], groups, -1)
        w = W[place].reshape(W.shape[-2], groups, -1)
        z = z + jnp.einsum("...gi,igo->...go", a, w)
    return z.reshape(*z.shape[:-2], -1) + b


@hypothesis.settings(max_examples=25)
@hypothesis.given(convolutions())
def test_every_convolution_is_autodiff_of_its_definition(drawn):
    space, channels, features, size, options = drawn
    layer = bp.conv(features, size, **options)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *space, channels))
    params = layer.init(keys[1], x[0])
    params["bias"] = jnp.arange(1.0, 1 + features)

    def both(params, x):
        z, pull = jax.vjp(
            lambda p, x: by_definition(x, p["weight"], p["bias"], **options), params, x
        )
        dz = jnp.cos(jnp.arange(z.size)).reshape(z.shape)
        y, residuals = layer.forward(params, x)
        dx, gradients = layer.backward(params, residuals, dz, bp.contractions.total)
        _, norms = layer.backward(params, residuals, dz, bp.contractions.squared_norm)
        _, each = layer.backward(params, residuals, dz, bp.contractions.each)
        squares = jax.tree.map(lambda g: (g.reshape(2, -1) ** 2).sum(1), each)
        wanted, dx_wanted = pull(dz)
        found = {"z": y, "dx": dx, "gradients": gradients, "norms": norms}
        return found, {"z": z, "dx": dx_wanted, "gradients": wanted, "norms": squares}

    check_equal(*jax.jit(both)(params, x), WITHIN)


@hypothesis.settings(max_examples=10)
@hypothesis.given(convolutions())
def test_a_transposed_convolution_takes_a_convolutions_delta_back(drawn):
    """With the convolution's weight, its in and out swapped in each group."""
    space, channels, features, size, options = drawn
    forth = bp.conv(features, size, **options, bias=False)
    x = jax.random.normal(jax.random.key(0), (2, *space, channels))
    params = forth.init(jax.random.key(1), x[0])
    z, residuals = forth.forward(params, x)
    back = bp.conv_transpose(channels, size, **options, bias=False)
    groups, W = options["groups"], params["weight"]
    parts = jnp.split(W, groups, -1)
    turned = {"weight": jnp.concatenate([jnp.swapaxes(p, -1, -2) for p in parts], -1)}
    dz = jnp.cos(jnp.arange(z.size)).reshape(z.shape)
    dx, _ = forth.backward(params, residuals, dz, bp.contractions.total)
    try:
        found, _ = back.forward(turned, dz)
    except bp.ModelError as error:
        assert "leaves outputs" in str(error)
        return
    hypothesis.assume(found.shape == dx.shape)  # strides may leave inputs over
    np.testing.assert_allclose(found, dx, rtol=0, atol=WITHIN)
    bp.testing.check_layer(back, dz[0])


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.data())
def test_every_pool_is_autodiff_of_its_definition(data):
    space, size, options = drawn_windows(data.draw, data.draw(st.integers(1, 2)))
    try:
        highest, mean = bp.max_pool(size, **options), bp.avg_pool(size, **options)
        x = jax.random.normal(jax.random.key(0), (2, *space, 3))
        highest.init(jax.random.key(1), x[0])
    except bp.ModelError as error:
        assert "every window has an input" in str(error)
        return

    def of_each(x, fill=0.0):
        return jnp.stack([part for _, part in places(x, size, **options, fill=fill)])

    formulas = {
        highest: lambda x: of_each(x, -jnp.inf).max(0),
        mean: lambda x: of_each(x).sum(0) / of_each(jnp.ones_like(x)).sum(0),
    }
    for layer, formula in formulas.items():
        y, pull = jax.vjp(formula, x)
        dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        found, residuals = layer.forward((), x)
        dx, _ = layer.backward((), residuals, dy, bp.contractions.total)
        check_equal({"y": found, "dx": dx}, {"y": y, "dx": pull(dy)[0]}, WITHIN)


def test_of_several_highest_the_first_has_all():
    x = jnp.ones((1, 3, 3, 1))
    for layer, size in ((bp.max_pool(2, strides=1), 2), (bp.global_max_pool, 3)):
        y, residuals = layer.forward((), x)
        dx, _ = layer.backward((), residuals, jnp.ones_like(y), bp.contractions.total)
        wanted = np.zeros((3, 3))
        wanted[: 4 - size, : 4 - size] = 1
        np.testing.assert_array_equal(dx[0, ..., 0], wanted)


def test_a_nan_is_the_highest_of_its_window():
    x = jnp.arange(4.0).reshape(1, 4, 1).at[0, 0].set(jnp.nan)
    assert jnp.isnan(bp.max_pool(2).apply((), x)[0, :, 0]).tolist() == [True, False]
    assert jnp.isnan(bp.global_max_pool.apply((), x)).all()


# ---- what does not fit

IMAGE = jnp.ones((5, 4, 2))
WRONG = {
    "conv: groups: takes a divisor of 4": lambda: bp.conv(4, 3, groups=3),
    "channels that 4 groups divide": lambda: bp.conv(4, 3, groups=4),
    "takes windows that fit": lambda: bp.conv(4, 6, padding="VALID"),
    "takes one number of axes": lambda: bp.conv(4, (3, 3), strides=(1,)),
    "2 spatial axes, got": lambda: (bp.conv(4, (3, 3)), jnp.ones((4, 2))),
    "one spatial axis or more": lambda: (bp.conv(4, 3), jnp.ones(4)),
    "floating-point": lambda: (bp.conv(4, 3), jnp.ones((4, 2), int)),
    "padding: takes one of": lambda: bp.conv(4, 3, padding="same"),
    "padding: takes a whole": lambda: bp.conv(4, 3, padding=-1),
    "circular padding up to": lambda: (bp.conv(4, 9, padding="CIRCULAR"), jnp.ones((2, 2))),
    "padding that leaves outputs": lambda: bp.conv_transpose(4, 2, padding=9),
    "every window has an input": lambda: bp.max_pool(2, padding=3),
    "something is left": lambda: bp.crop(2),
    "upsample: method": lambda: bp.upsample(2, method="cubic"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_is_named(words):
    with pytest.raises(bp.ModelError, match=words):
        made = WRONG[words]()
        layer, x = made if isinstance(made, tuple) else (made, IMAGE)
        layer.apply(layer.init(jax.random.key(0), x), x[None])


def test_another_layers_parameters_are_named():
    layer = bp.conv(4, 3)
    with pytest.raises(bp.ModelError, match=r"conv\(4, 3\): takes parameters"):
        layer.apply({"weight": jnp.ones((3, 3, 4, 2)), "bias": jnp.ones(4)}, IMAGE[None])
