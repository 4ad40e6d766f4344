"""Layers and costs from JAX functions: every quantity equals its definition by ``vmap(jax.grad)``,
and what is not known of a program costs time alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import check_equal, direction, first_order, first_order_by_vmap
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import functional_bp as bp
from functional_bp.traced import jaxprs
from functional_bp.traced.routes import InConvolution

KEY = jax.random.key(0)
LOSS = bp.losses.squared_error
N, T, D = 4, 5, 6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(**shapes):
    return {name: 0.4 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items(), 7)}


def rnn(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
        return h, h

    return lax.scan(step, params["h"], x, reverse=True)[1]


def lstm(params, x):
    """Its kernels are joined at every step, as Flax's ``OptimizedLSTMCell`` joins them."""

    def step(state, x):
        h, c = state
        kernels = (jnp.concatenate([params[k + g] for g in "ifgo"], 1) for k in "xh")
        z = sum(a @ kernel for a, kernel in zip((x, h), kernels)) + params["b"]
        i, f, g, o = jnp.split(z, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), x)[1]


def stack(wrap):
    def apply(params, x):
        layer = wrap(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None))
        return lax.scan(layer, x, {"w": params["w"], "b": params["b"]})[0] @ params["o"]

    return apply


def counted(params, x):
    """A parameter of each turn, found by the turn's number."""
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"][i]), x) @ params["o"]


def not_followed(params, x):
    """A loop in which the gradient for every turn would be kept."""

    def step(h, x):
        h = h @ params["u"]  # which is, and is forgotten
        rows = lax.dynamic_slice(params["w"], (jnp.argmax(x[:4]), 0), (2, 3))
        return jnp.tanh(jnp.sort(rows * x[:3], axis=0)[0] + jnp.cumsum(params["w"])[0] * h)

    return lax.scan(lambda h, x: (step(h, x), None), params["h"], x)[0]


def nested(params, x):
    """A loop in a loop; the inner one's parameter is of the outer one's turn."""

    def outer(h, w):
        return lax.scan(lambda h, u: (jnp.tanh(h @ w + h @ u), None), h, params["u"])[0], None

    return lax.scan(outer, x, params["w"])[0] @ params["o"]


def chosen(params, x):
    branches = (lambda x: x @ params["w"], lambda x: jnp.log(x**2) @ params["v"], lambda x: x[:3])
    return lax.switch((x[0] > 0).astype(int) + (x[1] > 0), branches, x)


@jax.custom_vjp
def doubled_back(w, x):
    return jnp.sin(x @ w)


doubled_back.defvjp(
    lambda w, x: (doubled_back(w, x), (w, x)),
    lambda kept, dy: (
        jnp.outer(kept[1], 2 * dy * jnp.cos(kept[1] @ kept[0])),
        kept[0] @ (dy * jnp.cos(kept[1] @ kept[0])),
    ),
)


@jax.custom_jvp
def tripled(w, x):
    return x @ w


@tripled.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 3 * (x @ dw) + dx @ w


def experts(params, x):
    gates = jax.nn.softmax(x @ params["gate"])
    hidden = jnp.tanh(jnp.einsum("i,eih->eh", x, params["w"]))
    return jnp.einsum("eh,eho,e->o", hidden, params["v"], gates)


def attention(params, x):
    q, k, v = jnp.split(x @ params["w"], 3, axis=1)
    return jax.nn.softmax(q @ k.T) @ v


def _stacked(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


VECTORS, SEQUENCES = normal(1, N, D), normal(2, N, T, D)
IMAGES = normal(3, N, 7, 6, 2)
IDS = np.random.default_rng(4).integers(0, 7, (N, T))
Y, YS = normal(5, N, 3), normal(6, N, T, 3)


def convolved(params, x, strides=(2, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(
        x[None], params["w"], strides, padding, dimension_numbers=numbers, **options
    )
    return jnp.tanh(z[0]).mean((0, 1))


FUNCTIONS = {
    "rows": (
        lambda p, x: p["v"] @ jnp.tanh(p["w"] @ x + p["b"]),
        drawn(w=(4, D), b=(4,), v=(3, 4)),
        *(VECTORS, Y),
    ),
    "columns at positions": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"],
        drawn(w=(D, 4), b=(4,), v=(4, 3)),
        *(SEQUENCES, YS),
    ),
    "no meeting": (lambda p, x: x @ p["w"], drawn(w=(D, 3), u=(5, 3), s=()), SEQUENCES, YS),
    "alone in the output": (
        lambda p, x: p["w"] @ p["w"].T + 0 * x[:3, :3],
        *(drawn(w=(3, 2)), SEQUENCES, normal(8, N, 3, 3)),
    ),
    "heads": (
        lambda p, x: jnp.einsum("thk,hko->to", jnp.einsum("ti,ihk->thk", x, p["q"]), p["o"]),
        drawn(q=(D, 2, 4), o=(2, 4, 3)),
        *(SEQUENCES, YS),
    ),
    "experts": (experts, drawn(gate=(D, 5), w=(5, D, 4), v=(5, 4, 3)), VECTORS, Y),
    "split": (attention, drawn(w=(D, 9)), SEQUENCES, YS),
    "slices that overlap": (
        lambda p, x: jnp.tanh(x @ p["w"][:, :3]) * (x @ p["w"][:, 3:6]) + x @ p["w"][:, 2:5],
        *(drawn(w=(D, 9)), SEQUENCES, YS),
    ),
    "tied, both ways": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T) @ p["c"],
        *(drawn(w=(D, 4), c=(D, 3)), SEQUENCES, YS),
    ),
    "layer norm": (
        lambda p, x: ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * p["s"]) @ p["w"],
        *(drawn(s=(D,), w=(D, 3)), SEQUENCES, YS),
    ),
    "low rank": (
        lambda p, x: x @ (p["w"] + 0.5 * p["b"] @ p["a"]),
        *(drawn(w=(D, 3), a=(2, 3), b=(D, 2)), SEQUENCES, YS),
    ),
    "difference": (
        lambda p, x: x @ (2 * p["w"] - p["u"]) - x[:, :3] @ -p["v"],
        *(drawn(w=(D, 3), u=(D, 3), v=(3, 3)), SEQUENCES, YS),
    ),
    "low rank, transposed": (
        lambda p, x: (
            (x @ jnp.einsum("ri,or->io", p["a"], p["b"]) + x @ (p["b"] @ p["a"]).T)
            @ (p["c"].T @ p["c"])
        ),
        *(drawn(a=(2, D), b=(3, 2), c=(4, 3)), SEQUENCES, YS),
    ),
    "times numbers": (
        lambda p, x: x @ (p["s"] * p["w"] / p["t"] - 0.5 * p["w"]) + x @ (p["w"] * p["r"]),
        *(drawn(s=(), w=(D, 3), t=(1,), r=()), SEQUENCES, YS),
    ),
    "decayed": (
        lambda p, x: x @ p["w"] + (0.1 * (p["w"] ** 2).sum() + jnp.linalg.norm(p["b"])) + p["b"],
        *(drawn(w=(D, 3), b=(3,)), SEQUENCES, YS),
    ),
    "look-up, decayed": (
        lambda p, ids: p["e"][ids] * (1 + p["s"]) + jnp.exp(p["e"]).mean() / p["s"],
        *(drawn(e=(7, 3), s=()), IDS, YS),
    ),
    "stack, used whole": (
        lambda p, x: _stacked(p, x) + 0.1 * (p["w"] ** 2).sum() + x @ p["w"].mean(0),
        *(drawn(w=(2, D, D)), VECTORS, VECTORS),
    ),
    "stack, used whole before": (
        lambda p, x: _stacked({"w": -2 * p["w"]}, x @ p["w"].mean(0)),
        *(drawn(w=(2, D, D)), VECTORS, VECTORS),
    ),
    "weight norm": (
        lambda p, x: x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)),
        *(drawn(g=(3,), v=(D, 3)), SEQUENCES, YS),
    ),
    "exponential": (
        lambda p, x: jax.scipy.linalg.expm(p["w"]) @ x,
        *(drawn(w=(D, D)), VECTORS, VECTORS),
    ),
    "look-up, tied": (
        lambda p, ids: jnp.tanh(p["e"][ids] @ p["w"]) @ p["e"].T,
        *(drawn(e=(7, 4), w=(4, 4)), IDS, np.eye(7)[IDS]),
    ),
    "look-up, clipped": (
        lambda p, ids: jnp.take(p["e"], 2 * ids, axis=1, mode="clip").T @ p["w"],
        *(drawn(e=(4, 7), w=(4, 3)), IDS, YS),
    ),
    "one-hot": (
        lambda p, ids: jax.nn.one_hot(ids, 7) @ p["e"],
        *(drawn(e=(7, 3)), IDS, YS),
    ),
    "one row": (lambda p, x: p["w"][jnp.argmax(x)] * x[:3], drawn(w=(D, 3)), VECTORS, Y),
    "rnn": (rnn, drawn(w=(D, 3), u=(3, 3), b=(3,), h=(3,)), SEQUENCES, YS),
    "lstm": (
        lstm,
        drawn(**{"x" + g: (D, 3) for g in "ifgo"}, **{"h" + g: (3, 3) for g in "ifgo"}, b=(12,)),
        *(SEQUENCES, YS),
    ),
    "stack": (stack(lambda layer: layer), drawn(w=(3, D, D), b=(3, D), o=(D, 3)), SEQUENCES, YS),
    "checkpoints": (stack(jax.checkpoint), drawn(w=(3, D, D), b=(3, D), o=(D, 3)), VECTORS, Y),
    "counted": (counted, drawn(w=(3, D, D), o=(D, 3)), VECTORS, Y),
    "nested": (nested, drawn(w=(2, D, D), u=(3, D, D), o=(D, 3)), VECTORS, Y),
    "not followed": (not_followed, drawn(w=(D, 3), u=(3, 3), h=(3,)), SEQUENCES, Y),
    "carried": (
        lambda p, x: lax.scan(
            lambda c, x: ((c[0], jnp.tanh(x @ c[0] + c[1])), c[1]), (p["w"], jnp.zeros(3)), x
        )[1],
        *(drawn(w=(D, 3)), SEQUENCES, YS),
    ),
    "chosen": (chosen, drawn(w=(D, 3), v=(D, 3)), VECTORS, Y),
    "custom_vjp": (lambda p, x: doubled_back(p["w"], x), drawn(w=(D, 3)), VECTORS, Y),
    "custom_jvp": (lambda p, x: tripled(p["w"], x), drawn(w=(D, 3)), VECTORS, Y),
    "shard_map": (
        jax.shard_map(
            lambda p, x: jnp.tanh(x @ p["w"]),
            mesh=jax.make_mesh((1,), ("i",)),
            in_specs=jax.sharding.PartitionSpec(),
            out_specs=jax.sharding.PartitionSpec(),
        ),
        *(drawn(w=(D, 3)), VECTORS, Y),
    ),
    "while": (
        lambda p, x: (
            lax.stop_gradient(
                lax.while_loop(lambda h: (h**2).sum() > p["t"] ** 2, lambda h: h / 2, x)
            )
            @ p["w"]
        ),
        *(drawn(w=(D, 3), t=()), VECTORS, Y),
    ),
    "convolution": (convolved, drawn(w=(3, 3, 2, 3)), IMAGES, Y),
    "convolution, few positions": (
        functools.partial(convolved, strides=(4, 4), padding=[(1, 2), (0, 1)]),
        *(drawn(w=(3, 3, 2, 20)), IMAGES, normal(9, N, 20)),
    ),
    "convolution, dilated": (
        functools.partial(
            convolved, padding=[(1, 1), (0, 2)], lhs_dilation=(1, 2), rhs_dilation=(2, 1)
        ),
        *(drawn(w=(3, 2, 2, 3)), IMAGES, Y),
    ),
    "convolution, in groups": (
        functools.partial(convolved, feature_group_count=2),
        *(drawn(w=(3, 3, 1, 4)), IMAGES, normal(9, N, 4)),
    ),
    "convolution, in a loop": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(_same(_same(h, w), p["u"])), None), x, p["w"])[
            0
        ].mean((0, 1)),
        *(drawn(w=(2, 3, 3, 2, 2), u=(1, 3, 2, 2)), IMAGES, normal(9, N, 2)),
    ),
}
OFTEN = (
    *("low rank, transposed", "times numbers", "decayed", "stack, used whole"),
    *("heads", "split", "tied, both ways", "weight norm", "look-up, tied", "lstm", "nested"),
    *(
        "difference",
        "slices that overlap",
        "not followed",
        "chosen",
        "custom_vjp",
        "convolution, few positions",
        "no meeting",
    ),
)


def _same(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers)[0]


def quantities(model, loss, params, x, y, hessian=True, **options):
    """What is asked of a model and its loss, or of a cost and None."""
    v = direction(params)
    hvp, two = bp.hvp(model, loss, **options), {"max_norm": 0.5, "recursions": 2}
    return first_order(model, loss, v, params, x, y, **options) | {
        "clipped, two recursions": bp.clipped_grad(model, loss, **two, **options)(params, x, y),
        "Hessian": hvp(params, x, y, v) if hessian else (),
    }


def definitions(cost, params, x, y, hessian=True):
    v = direction(params)
    found = first_order_by_vmap(cost, v, params, x, y)
    mean = jax.grad(lambda p: jax.vmap(cost, (None, 0, 0))(p, x, y).mean())
    return found | {
        "clipped, two recursions": found["clipped"],
        "Hessian": jax.grad(lambda p: optax.tree.vdot(mean(p), v))(params) if hessian else (),
    }


def cost_of(apply):
    return lambda params, x, y: LOSS.value(apply(params, x), y)


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in FUNCTIONS]
)
def test_quantities_equal_their_definitions(name):
    apply, *given = FUNCTIONS[name]
    hessian = name != "custom_vjp"  # which has no forward-mode derivative
    ours = functools.partial(quantities, bp.from_function(apply), LOSS, hessian=hessian)
    wanted = functools.partial(definitions, cost_of(apply), hessian=hessian)
    check_equal(jax.jit(ours)(*given), jax.jit(wanted)(*given), within=1e-12)


@pytest.mark.parametrize("name", ["split", pytest.param("rnn", marks=pytest.mark.exhaustive)])
def test_quantities_of_a_cost_equal_their_definitions(name):
    apply, *given = FUNCTIONS[name]
    cost = cost_of(apply)
    ours = functools.partial(quantities, cost, None, microbatch=3)
    check_equal(jax.jit(ours)(*given), jax.jit(functools.partial(definitions, cost))(*given), 1e-12)


@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_a_convolutions_patches_make_its_gradient(layout):
    kernel = {"HWIO": (3, 2, 2, 4), "OIHW": (4, 2, 3, 2)}[layout]
    numbers = lax.conv_dimension_numbers((1, 7, 6, 2), kernel, ("NHWC", layout, "NHWC"))
    options = {
        **{"window_strides": (2, 1), "padding": ((1, 0), (0, 1)), "lhs_dilation": (1, 1)},
        **{"rhs_dilation": (1, 2), "feature_group_count": 1, "dimension_numbers": numbers},
    }

    def convolution(a, kernel):
        return lax.conv_general_dilated(a, kernel, **options)

    a, W = jnp.asarray(normal(1, N, 1, 7, 6, 2)), jnp.asarray(normal(3, *kernel))
    delta = jnp.asarray(normal(2, N, *jax.eval_shape(convolution, a[0], W).shape))

    def gradient(a, delta):
        return jax.vjp(functools.partial(convolution, a), W)[1](delta)[0]

    each = jax.vmap(gradient)(a, delta)
    factor = InConvolution.of(kernel, options).factor(a, delta, ())
    check_equal({"each": factor.each()}, {"each": each})
    check_equal({"total": factor.total()}, {"total": each.sum(0)})
    outer = factor.as_outer().each().reshape(each.shape)
    check_equal({"outer": outer}, {"outer": each})


# ---- in models, and in every other quantity


def mlp(params, x):
    return params["v"] @ jnp.tanh(params["w"] @ x + params["b"])


MLP = bp.chain(bp.dense(4), bp.tanh, bp.dense(3, bias=False))


def same_model():
    """The same network as a function and as layers."""
    params = drawn(w=(4, D), b=(4,), v=(3, 4))
    first = {"weight": params["w"], "bias": params["b"]}
    return bp.from_function(mlp), params, (first, (), {"weight": params["v"]})


def as_function(params):
    first, _, last = params
    return {"w": first["weight"], "b": first["bias"], "v": last["weight"]}


def test_it_is_the_same_as_layers_written_by_hand():
    model, params, of_layers = same_model()
    x, y = VECTORS, Y

    def others(model, params):
        def norms(per):
            return bp.per_example_grad_norms(model, LOSS, per=per)(params, x, y)

        w = jnp.arange(1.0, 5)
        of = {
            "variance": bp.grad_variance(model, LOSS)(params, x, y, weights=w),
            "GGN": bp.ggnvp(model, LOSS)(params, x, y, params),
            "diagonal": bp.ggn_diagonal(model, LOSS)(params, x, y),
            "by parameter": norms("parameter"),
        }
        scalars = {
            "noise": bp.grad_noise_scale(model, LOSS)(params, x, y),
            "diversity": bp.grad_diversity(model, LOSS)(params, x, y),
            "NTK": bp.empirical_ntk(model)(params, x),
            "outputs": model.apply(params, x),
        }
        return of, scalars

    ours, scalars = jax.jit(functools.partial(others, model))(params)
    wanted, of_layers = jax.jit(functools.partial(others, MLP))(of_layers)
    check_equal(ours, {name: as_function(tree) for name, tree in wanted.items()})
    check_equal(scalars, of_layers)


def test_what_holds_its_deltas_is_clipped_in_one_recursion():
    model, params, of_layers = same_model()
    cases = ((model, params, 1), (bp.chain(model), (params,), 2), (MLP, of_layers, 2))
    for layer, theirs, recursions in cases:

        def program(theirs=theirs, layer=layer, **how):
            clipped = bp.clipped_grad(layer, LOSS, max_norm=0.5, **how)
            return str(jax.make_jaxpr(clipped)(theirs, VECTORS, Y))

        both = {n: program(recursions=n) for n in (1, 2)}
        assert both[1] != both[2] and program() == both[recursions]


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_kronecker_factors_lie_as_the_parameter_does(fisher):
    """A kernel of (in, out) has its inputs in G and its δ in A, and K-FAC takes it so."""
    _, params, of_layers = same_model()

    def of_columns(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]

    def factors(model, params):
        return bp.kronecker_factors(model, LOSS, fisher=fisher)(params, VECTORS, Y)

    flipped = {"w": params["w"].T, "b": params["b"], "v": params["v"].T}
    rows = as_function(factors(MLP, of_layers))
    check_equal({"rows": factors(bp.from_function(mlp), params)}, {"rows": rows})
    columns = factors(bp.from_function(of_columns), flipped)
    wanted = {k: (pair.G, pair.A) if k != "b" else tuple(pair) for k, pair in rows.items()}
    check_equal({k: tuple(pair) for k, pair in columns.items()}, wanted)


def test_kronecker_factors_of_a_product_of_kernels_are_those_of_two_layers():
    params = drawn(w=(D, 2), v=(2, 3))

    def factors(apply):
        return bp.kronecker_factors(bp.from_function(apply), LOSS)(params, SEQUENCES, YS)

    found = jax.jit(lambda: factors(lambda p, x: x @ (p["w"] @ p["v"])))()
    check_equal(found, jax.jit(lambda: factors(lambda p, x: (x @ p["w"]) @ p["v"]))())


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_kronecker_factors_of_a_kernel_that_is_used_twice(fisher):
    """As of two layers with one weight; A and G change places where the kernel is (in, out)."""
    weight = drawn(w=(D, D))["w"]
    model = bp.tied(
        bp.chain(bp.dense(D, bias=False), bp.tanh, bp.dense(D, bias=False)),
        {(2, "weight"): (0, "weight")},
    )

    def factors(model, params):
        return bp.kronecker_factors(model, LOSS, fisher=fisher)(params, VECTORS, VECTORS[::-1])

    wanted = factors(model, ({"weight": weight}, (), {"weight": None}))[0]["weight"]
    kernel = bp.from_function(lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"])
    found = factors(kernel, {"w": weight.T})["w"]
    check_equal({"A": found.G, "G": found.A}, {"A": wanted.A, "G": wanted.G})


def test_fit_and_kfac_train_it_as_layers_are_trained():
    model, params, of_layers = same_model()

    def trained(model, params, optimizer):
        run = bp.fit(model, LOSS, params, [(VECTORS, Y)], optimizer, epochs=3)
        return run.params, run.history.loss

    ours, losses = trained(model, params, optax.adam(0.1))
    wanted, losses_of_layers = trained(MLP, of_layers, optax.adam(0.1))
    check_equal({"params": ours}, {"params": as_function(wanted)})
    np.testing.assert_allclose(losses, losses_of_layers)
    kfac = functools.partial(bp.kfac, learning_rate=0.1, batch=(VECTORS, Y), fisher="empirical")
    ours, _ = trained(model, params, kfac(model, LOSS))
    wanted, _ = trained(MLP, of_layers, kfac(MLP, LOSS))
    check_equal({"params": ours}, {"params": as_function(wanted)}, within=1e-9)
    run = bp.fit(cost_of(mlp), None, params, [(VECTORS, Y)], kfac(cost_of(mlp), None), epochs=3)
    check_equal({"params": run.params}, {"params": ours}, within=1e-9)


def test_it_goes_wherever_layers_go():
    """Beside hand-written rules, in a stack, tied to another layer; proven as they are."""
    layer = bp.from_function(
        lambda params, x: jnp.tanh(params["weight"] @ x),
        init=lambda key, x: {"weight": 0.5 * jax.random.normal(key, (D, D))},
        name="mix",
    )
    model = bp.tied(
        bp.chain(bp.dense(D), bp.repeat(bp.residual(layer), 3), layer),
        {(2, "weight"): (0, "weight")},
    )
    params = model.init(KEY, VECTORS[0])
    bp.testing.check_model(model, LOSS, params, VECTORS[:3], VECTORS[1:])
    bp.testing.check_layer(layer, VECTORS[0])


def test_noise_is_each_examples_own_and_the_same_in_every_quantity():
    def noisy(params, x, key=None):
        keep = 1.0 if key is None else 2 * jax.random.bernoulli(key, 0.5, x.shape)
        return params["w"] @ (keep * x)

    model, params = bp.from_function(noisy), drawn(w=(3, D))
    keys = jax.random.split(KEY, N)
    noise = {"key": KEY}
    each = bp.per_example_grads(model, LOSS)(params, VECTORS, Y, **noise)
    one = jax.grad(lambda p, x, y, key: LOSS.value(noisy(p, x, key=key), y))
    wanted = jax.vmap(one, (None, 0, 0, 0))(params, VECTORS, Y, keys)
    check_equal({"each": each}, {"each": wanted})
    norms = bp.per_example_grad_norms(model, LOSS)(params, VECTORS, Y, **noise)
    np.testing.assert_allclose(norms, jnp.linalg.norm(each["w"].reshape(N, -1), axis=1))
    still = bp.per_example_grad_norms(model, LOSS)(params, VECTORS, Y)
    assert not jnp.allclose(norms, still)


def test_state_has_no_gradient_and_frozen_parameters_none():
    model = bp.from_function(
        lambda params, x: params["w"] @ (x / params["scale"]),
        is_state=lambda params: {"w": False, "scale": True},
    )
    params = drawn(w=(3, D)) | {"scale": jnp.full(D, 2.0)}
    each = bp.per_example_grads(model, LOSS)(params, VECTORS, Y)
    assert each["scale"] is None
    assert bp.grad(model, LOSS)(params, VECTORS, Y)["scale"] is None
    frozen = bp.grad(model, LOSS, frozen=lambda path: path == ("w",))(params, VECTORS, Y)
    assert frozen == {"w": None, "scale": None}


def test_a_parameter_that_is_used_at_once_by_all_turns_stays_one_array():
    """The kernel of a recurrent cell meets its states in one product over time: for each example
    no array as large as a gradient is kept, though there are more steps than features."""
    model = bp.from_function(rnn)
    params = drawn(w=(64, 64), u=(64, 64), b=(64,), h=(64,))
    x, y = normal(1, 8, 4, 64), normal(2, 8, 4, 64)
    norms = jax.jit(bp.per_example_grad_norms(model, LOSS))
    assert "f64[8,64,64]" not in norms.lower(params, x, y).compile().as_text()


def test_a_model_is_traced_once():
    calls = []

    def counted(params, x):
        calls.append(1)
        return params["w"] @ x

    private = bp.clipped_grad(bp.from_function(counted), LOSS, 1.0)
    for _ in range(2):
        private(drawn(w=(3, D)), VECTORS, Y)
    assert len(calls) == 1


def test_a_function_may_close_over_what_is_traced():
    @jax.jit
    def norms(scale):
        model = bp.from_function(lambda params, x: scale * (params["w"] @ x))
        return bp.per_example_grad_norms(model, LOSS)(drawn(w=(3, D)), VECTORS, Y)

    assert not jnp.allclose(norms(1.0), norms(2.0))


OPERATIONS = {
    "columns": lambda h, w: h @ w,
    "rows": lambda h, w: w @ h,
    "both ways": lambda h, w: w.T @ jnp.tanh(w @ h),
    "sum": lambda h, w: h + w[0],
    "scale": lambda h, w: h * w[:, 1] + h[::-1],
    "part": lambda h, w: jnp.concatenate([w[:2, :] @ h, h[2:]]),
    "joined": lambda h, w: jnp.concatenate([w[2:], w[:2]], 1 - 1) @ h,
    "of itself": lambda h, w: (w @ w.T / 3) @ h,
    "loop": lambda h, w: lax.scan(lambda h, _: (jnp.tanh(w @ h), None), h, None, length=2)[0],
    "rows of a stack": lambda h, w: lax.scan(lambda h, r: (jnp.tanh(h + r), None), h, w)[0],
    "jit": jax.jit(lambda h, w: jnp.sin(h @ (2 * w))),
    "checkpoint": jax.checkpoint(lambda h, w: jnp.sin(h @ w)),
    "chosen": lambda h, w: lax.cond(h[0] > 0, lambda h: w @ h, lambda h: h - w[1], h),
    "look-up": lambda h, w: h + w[jnp.argmax(h)],
    "softmax": lambda h, w: jax.nn.softmax(w @ h),
}


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.booleans()), min_size=1, max_size=4)
)
def test_random_programs(program):
    def apply(params, x):
        for name, first in program:
            x = OPERATIONS[name](x, params["w" if first else "u"])
        return x

    params, x, y = drawn(w=(4, 4), u=(4, 4)), normal(1, N, 4), normal(2, N, 4)
    model = bp.from_function(apply)
    each = jax.vmap(jax.grad(cost_of(apply)), (None, 0, 0))(params, x, y)
    flat = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(each)], 1)
    given = {
        "each": bp.per_example_grads(model, LOSS)(params, x, y),
        "norms": bp.per_example_grad_norms(model, LOSS)(params, x, y),
        "gradient": bp.grad(model, LOSS)(params, x, y),
    }
    wanted = {
        "each": each,
        "norms": jnp.sqrt((flat**2).sum(1)),
        "gradient": jax.tree.map(lambda g: g.mean(0), each),
    }
    check_equal(given, wanted)


# ---- what is known of jaxprs


def equations(function, *args):
    return jaxprs.program_of(jax.make_jaxpr(function)(*args)).equations


def test_a_product_is_known():
    (equation,) = equations(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *[jnp.ones((2, 3, 3))] * 2
    )
    assert jaxprs.product(equation) == jaxprs.Product(((0,), (0,)), ((2,), (1,)))


def test_a_look_up_is_known_and_what_is_none_is_not():
    table, ids = jnp.ones((7, 4)), jnp.zeros(3, int)
    mode = "clip"
    (of_rows,) = (
        jaxprs.look_up(e)
        for e in equations(
            lambda t, i: t.at[i].get(mode=mode, wrap_negative_indices=False), table, ids
        )
        if e.primitive.name == "gather"
    )
    assert of_rows == jaxprs.LookUp(axis=0, offsets=(1,), clips=True)
    pairs = equations(lambda t, i: t.at[i, i].get(mode=mode), table, ids)
    assert not any(map(jaxprs.look_up, pairs))


def test_a_convolution_is_known():
    equation = equations(functools.partial(_same), jnp.ones((5, 5, 2)), jnp.ones((3, 3, 2, 4)))[1]
    options = jaxprs.convolution(equation)
    assert options["window_strides"] == (1, 1) and options["feature_group_count"] == 1
    assert options["dimension_numbers"].rhs_spec == (3, 2, 0, 1)


def test_a_scans_inputs_are_told_apart():
    def looped(w, h, xs):
        return lax.scan(lambda h, x: (jnp.tanh(w * h + x), h), h, xs, reverse=True)

    (equation,) = equations(looped, jnp.ones(3), jnp.ones(3), jnp.ones((3, 3)))
    scan = jaxprs.scanned(equation)
    assert (scan.constants, scan.carried, scan.length, scan.reverse) == (1, 1, 3, True)


def test_calls_checkpoints_and_branches_are_known():
    x = jnp.ones(3)
    (call,) = equations(jax.jit(lambda x: x + 1), x)
    assert [e.primitive.name for e in jaxprs.called(call).equations] == ["add"]
    (remat,) = equations(jax.checkpoint(lambda x: jnp.sin(x)), x)
    program, again = jaxprs.checkpointed(remat)
    assert [e.primitive.name for e in program.equations] == ["sin"]
    assert again(lambda x: 2 * x)(3.0) == 6
    *_, cond = equations(lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), x)
    assert [p.equations[0].primitive.name for p in jaxprs.branches(cond)] == ["cos", "sin"]
    for other in (jaxprs.called, jaxprs.checkpointed, jaxprs.scanned, jaxprs.branches):
        assert other(equations(jnp.sin, x)[0]) is None


def test_what_is_broadcast_beside_an_axis_of_one_entry_is_without_it():
    """So that sums on the way back are not over arrays with such an axis, which are slow."""
    a, b = jnp.arange(6.0).reshape(1, 3, 2), jnp.arange(2.0).reshape(1, 1, 2)
    (equation,) = equations(lax.mul, a, b)
    (z,) = jaxprs.evaluated(equation, (a, b))
    assert (z == a * b).all() and z.shape == (1, 3, 2)
    pull = jax.make_jaxpr(
        lambda b: jax.vjp(lambda b: jaxprs.evaluated(equation, (a, b))[0], b)[1](z)
    )
    sums = [e for e in pull(b).eqns if e.primitive.name == "reduce_sum"]
    shapes = [(e.invars[0].aval.shape, e.outvars[0].aval.shape) for e in sums]
    assert [(x, y) for x, y in shapes if x[0] != 1 or x[1:] != y] == [((3, 2), (2,))]


def test_a_move_is_known():
    def moved(w):
        left, right = jnp.split(w.T, [1])
        return jnp.concatenate([right, left])[1:2]

    names = [jaxprs.move(e) for e in equations(moved, jnp.ones((3, 2)))]
    assert names == [
        ("transpose", {"permutation": (1, 0)}),
        ("split", {"sizes": (1, 1), "axis": 0}),
        ("concatenate", {"dimension": 0}),
        ("slice", {"start_indices": (1, 0), "strides": None}),
    ]
    assert jaxprs.move(equations(jnp.sin, jnp.ones(3))[0]) is None


def test_a_side_effect_is_known():
    def printing(x):
        return lax.scan(lambda h, x: (jax.debug.print("{}", h), (h, x))[1], 0.0, x)[1]

    program = jaxprs.program_of(jax.make_jaxpr(printing)(jnp.ones(3)))
    assert jaxprs.with_effects(program).primitive.name.startswith("debug")
    assert jaxprs.with_effects(jaxprs.program_of(jax.make_jaxpr(jnp.sin)(1.0))) is None


def test_the_users_line_is_known():
    (equation,) = equations(lambda x: jnp.sin(x), jnp.ones(3))
    file, _, line = jaxprs.source_of(equation).rpartition(":")
    assert file == __file__ and int(line) > 0


def test_a_form_that_is_not_known_costs_time_alone(monkeypatch):
    for known in ("product", "look_up", "convolution"):
        monkeypatch.setattr(f"functional_bp.traced.routes.{known}", lambda equation: None)
    for known in ("called", "checkpointed", "scanned", "branches"):
        monkeypatch.setattr(f"functional_bp.traced.planning.{known}", lambda equation: None)
    monkeypatch.setattr("functional_bp.traced.parameters.move", lambda equation: None)
    for name in ("rnn", "look-up, tied", "chosen", "split"):
        apply, params, x, y = FUNCTIONS[name]
        norms = jax.jit(bp.per_example_grad_norms(bp.from_function(apply), LOSS))(params, x, y)
        each = jax.jit(jax.vmap(jax.grad(cost_of(apply)), (None, 0, 0)))(params, x, y)
        flat = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(each)], 1)
        np.testing.assert_allclose(norms, jnp.linalg.norm(flat, axis=1), rtol=1e-12)


# ---- explain


def test_explain_tells_how_each_parameter_meets_an_example():
    def apply(params, x):
        h = lax.scan(lambda h, x: (jnp.tanh(x @ params["w"] + h), None), params["h"], x)[0]
        return (params["v"] / jnp.linalg.norm(params["v"], axis=0)) @ h

    found = bp.explain(apply, drawn(w=(D, 4), h=(4,), v=(3, 4), u=(2,)), SEQUENCES)
    rows = {row.parameter.strip("[']"): row for row in found.rows}
    assert rows["w"].meets == ("matrix product",) and rows["w"].kept == f"Σ δ aᵀ over {T}"
    assert rows["w"].sources[0].startswith(__file__)
    assert rows["u"].meets == ("nothing",) and rows["u"].kept == "zero"
    assert rows["h"].kept == "itself" and not rows["h"].unknown
    assert any(what.startswith("div") for what in rows["v"].unknown)
    assert "multiplied out:" in str(found) and "norms ÷ step" in str(found)
    assert str(bp.explain(bp.from_function(apply), drawn(w=(D, 4), h=(4,), v=(3, 4)), SEQUENCES))


def test_explain_tells_of_a_loop_that_is_not_followed_alone():
    found = bp.explain(not_followed, *FUNCTIONS["not followed"][1:3])
    assert all(row.meets == ("scan",) and row.unknown for row in found.rows)


# ---- what bad input gets


def raises(call, *words):
    with pytest.raises(bp.ModelError) as told:
        call()
    assert all(word in str(told.value) for word in words), told.value


def test_what_does_not_fit_is_said():
    params = drawn(w=(3, D))
    norms = bp.per_example_grad_norms
    raises(
        lambda: norms(lambda p, x, y: p["w"] @ x)(params, VECTORS, Y),
        "cost",
        "a scalar, floating-point",
    )
    raises(lambda: norms(mlp, LOSS), "bp.from_function")
    raises(lambda: norms(None, None), "bp.from_function")
    whole = {"w": jnp.ones((3, D), int)}
    model = bp.from_function(lambda p, x: p["w"] @ x)
    raises(lambda: norms(model, LOSS)(whole, VECTORS, Y), "['w']", "floating-point")
    raises(lambda: norms(model, LOSS)(params, VECTORS, Y[:2]), "as many targets as examples")
    wants = bp.from_function(lambda p, x, key: p["w"] @ x)
    raises(lambda: norms(wants, LOSS)(params, VECTORS, Y), "wants a key")
    for quantity in (bp.ggnvp, bp.ggn_diagonal):
        raises(lambda quantity=quantity: quantity(cost_of(mlp)), "bp.from_function")
    raises(lambda: bp.kronecker_factors(cost_of(mlp), fisher="exact"), "bp.from_function")
    raises(lambda: bp.evaluate(cost_of(mlp), metrics={"a": abs}), "no outputs")
    raises(lambda: bp.explain(MLP, same_model()[2], VECTORS), "bp.from_function")

    def printing(p, x):
        jax.debug.print("{}", x)
        return p["w"] @ x

    model = bp.from_function(printing)
    raises(lambda: norms(model, LOSS)(params, VECTORS, Y), "printing", "side effects", __file__)


def test_a_function_of_a_batch_is_named_as_such():
    model = bp.from_function(lambda params, x: jnp.einsum("ni,oi->no", x, params["w"]))
    with pytest.raises((TypeError, ValueError)) as told:
        bp.per_example_grad_norms(model, LOSS)(drawn(w=(3, D)), VECTORS, Y)
    assert any("ONE example" in note for note in told.value.__notes__)
