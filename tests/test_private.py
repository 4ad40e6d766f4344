"""Clipping honours its bound, batches are Poisson samples, no key is drawn from twice, and ε is
what others say it is."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import case
from jax.flatten_util import ravel_pytree
from scipy.stats import binom, norm

import functional_bp as bp

ROOT = Path(__file__).parents[1]
MECHANISMS = json.loads((ROOT / "tests" / "reference" / "epsilons.json").read_text())


@pytest.fixture
def dp_sgd(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    sys.modules.pop("dp_sgd", None)
    import dp_sgd

    return dp_sgd


@pytest.mark.parametrize("per", ["model", "layer", "parameter"])
@pytest.mark.parametrize("name", ["mixed", "tied stacks"])
def test_removing_any_one_example_moves_the_clipped_gradient_by_its_bound_at_most(name, per):
    with jax.enable_x64(True):
        model, loss, params, x, y = case(name)
        bound, divisor, n = 0.3, 7.0, len(x)

        def gradients(params, x, y):
            fn = bp.clipped_grad(model, loss, bound, normalize_by=divisor, per=per)
            without = 1 - jnp.eye(n)
            masks = jnp.concatenate([jnp.ones((1, n)), without])
            return jax.vmap(lambda w: ravel_pytree(fn(params, x, y, weights=w))[0])(masks)

        whole, *removed = jax.jit(gradients)(params, x, y)
        moved = [float(jnp.linalg.norm(whole - g)) for g in removed]
        assert max(moved) <= bound / divisor * (1 + 1e-12)
        if per == "model":  # every example's norm is above the bound, so each moves it all the way
            np.testing.assert_allclose(moved, bound / divisor)


def test_a_batch_is_a_poisson_sample_truncated_to_its_rows(dp_sgd):
    n, rate, rows = 50, 0.3, 17

    def draw(key):
        index, weights = dp_sgd.poisson_batch(key, n, rate, rows)
        return jnp.zeros(n).at[index].add(weights), weights.sum()

    drawn, sizes = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20_000))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    size = np.random.default_rng(0).binomial(n, rate, 200_000).clip(max=rows)
    np.testing.assert_allclose(sizes.mean(), size.mean(), rtol=0.01)
    np.testing.assert_allclose(sizes.var(), size.var(), rtol=0.05)
    np.testing.assert_allclose(drawn.mean(0), size.mean() / n, atol=0.015)


def test_an_image_more_moves_the_sum_by_twice_the_norm_at_most_and_does(dp_sgd):
    """Images of opposite gradients: the last one, of gradient C, is in the set or is not."""
    n, rate, rows, bound = 9, 0.5, 3, 0.25
    model = bp.dense(1)
    x, y = jnp.ones((n, 2)), jnp.where(jnp.arange(n) < n - 1, 1.0, -1.0)[:, None]
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x[0]))
    clipped = bp.clipped_grad(model, bp.losses.squared_error, bound, normalize_by=1.0)

    def moved(key):
        u = jax.random.uniform(key, (n,))

        def total(u):
            index, weights = dp_sgd.first_rows(u, rate, rows)
            return ravel_pytree(clipped(params, x[index], y[index], weights=weights))[0]

        taken = (u[-1] < rate) & ((u < u[-1]).sum() < rows)
        full = (u[:-1] < rate).sum() >= rows
        return jnp.linalg.norm(total(u) - total(u.at[-1].set(1.0))), taken, full

    distance, taken, full = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(1), 500))
    np.testing.assert_allclose(distance, bound * taken * (1 + full), atol=1e-6)
    assert (taken & full).any() and (taken & ~full).any()


@pytest.fixture
def private(dp_sgd):
    """A small model, its data, and ``noise -> gradient`` for it."""
    n, rate, rows, bound = 40, 0.25, 14, 0.3

    class Private:
        model = bp.chain(bp.dense(6), bp.tanh, bp.dense(6), bp.tanh, bp.dense(dp_sgd.CLASSES))
        x = jax.random.normal(jax.random.key(0), (n, 6))
        y = jnp.arange(n) % dp_sgd.CLASSES
        params = model.init(jax.random.key(1), x[0])
        deviation = bound / (rate * n)  # of a noise multiplier of 1

        def gradient(self, noise):
            return dp_sgd.private_gradient(self.model, n, rate, rows, bound, noise)

    Private.rate, Private.rows, Private.bound, Private.n = rate, rows, bound, n
    return Private()


@pytest.mark.parametrize("seed", range(4))
def test_a_step_descends_the_sum_of_clipped_gradients_over_the_expected_number(
    private, dp_sgd, monkeypatch, seed
):
    """Whatever the number drawn, which the divisor must not tell."""
    batches, draw = [], dp_sgd.poisson_batch

    def recorded(*args):
        batches.append(draw(*args))
        return batches[-1]

    monkeypatch.setattr(dp_sgd, "poisson_batch", recorded)
    optimizer = optax.sgd(1.0)
    step = dp_sgd.descent(optimizer, private.gradient(0.0))
    state = optimizer.init(private.params)
    after, _ = step(private.params, state, jax.random.key(seed), private.x, private.y)

    ((index, weights),) = batches
    drawn = np.asarray(index)[np.asarray(weights) == 1]
    assert 0 < len(drawn) <= private.rows

    def cost(params, x, y):
        return dp_sgd.LOSS.costs(private.model.apply(params, x[None]), y[None])[0]

    total = 0.0
    for i in drawn:
        g = ravel_pytree(jax.grad(cost)(private.params, private.x[i], private.y[i]))[0]
        total += g * min(1.0, private.bound / float(jnp.linalg.norm(g)))
    went = ravel_pytree(jax.tree.map(jnp.subtract, private.params, after))[0]
    np.testing.assert_allclose(went, total / (private.rate * private.n), rtol=1e-4, atol=1e-7)


def test_every_parameters_noise_is_its_own_and_as_large_as_the_clipping_norm_asks(private):
    """σC / qN, for a batch that is the same with and without; independent from step to step."""
    keys = jax.random.split(jax.random.key(2), 2000)

    def noise(key):
        noisy, exact = (
            ravel_pytree(private.gradient(sigma)(private.params, key, private.x, private.y))[0]
            for sigma in (4.0, 0.0)
        )
        return noisy - exact

    z = jax.jit(jax.vmap(noise))(keys) / (4.0 * private.deviation)  # (steps, parameters)
    start = 0
    for leaf in jax.tree.leaves(private.params):
        own = z[:, start : start + leaf.size]
        np.testing.assert_allclose(own.std(), 1, rtol=5 / np.sqrt(2 * own.size))
        np.testing.assert_allclose(own.std(0), 1, rtol=5 / np.sqrt(2 * len(keys)))
        assert abs(own.mean()) < 5 / np.sqrt(own.size)
        start += leaf.size
    between_parameters = np.corrcoef(z.T) - np.eye(z.shape[1])
    assert np.abs(between_parameters).max() < 6 / np.sqrt(len(keys))
    between_steps = np.corrcoef(z[:300]) - np.eye(300)
    assert np.abs(between_steps).max() < 6 / np.sqrt(z.shape[1])


def test_no_key_is_drawn_from_twice(private, dp_sgd):
    """Not by the sample and the noise, not by two parameters, not by two steps."""
    data, ends = (private.x, private.y), [2, 3]
    with jax.debug_key_reuse(True):
        dp_sgd.train(
            *(private.model, private.params, optax.adam(0.1), private.gradient(2.0)),
            *(jax.random.key(3), data, data, ends),
        )


@pytest.fixture
def runs(dp_sgd, monkeypatch, tmp_path):
    """Runs the example and gives what it hands to ``train``, which is not done."""

    def run(*options):
        seen = []

        def train(model, params, optimizer, gradient, key, data, held_out, ends):
            seen.append((params, gradient, key, data))
            return [0.5] * len(ends)

        monkeypatch.setattr(dp_sgd, "train", train)
        monkeypatch.setattr(dp_sgd, "epsilons", lambda *args: [1.0] * len(args[-1]))
        monkeypatch.setattr(dp_sgd, "draw", lambda *args: None)
        monkeypatch.setattr(sys, "argv", ["dp_sgd.py", "--out", str(tmp_path), *options])
        dp_sgd.main()
        return seen

    return run


def key_of(run):
    return tuple(jax.random.key_data(run[2]).tolist())


def test_runs_share_no_key_and_none_comes_from_a_seed_that_was_not_given(runs):
    first, second = runs("--noise", "2", "4"), runs("--noise", "2", "4")
    keys = {key_of(run) for run in first + second}
    assert len(keys) == 6
    assert len({high for high, _ in keys}) == 6 and len({low for _, low in keys}) == 6  # 64 bits


def test_a_seed_repeats_a_demonstration_and_says_that_it_is_not_private(runs, capsys):
    first, second = runs("--seed", "7"), runs("--seed", "7")
    assert [key_of(run) for run in first] == [key_of(run) for run in second]
    assert len({key_of(run) for run in first}) == 4  # without privacy, and three σ
    assert "nothing below is private" in capsys.readouterr().out
    runs()
    assert "nothing below is private" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--seed", "0")])
def test_two_noise_multipliers_do_not_give_the_gradient_away(runs, dp_sgd, options):
    """With the same batch and the same unit noise, 2 g(σ) − g(2σ) is the clipped gradient."""
    _, *private = runs("--noise", "2", "4", "--rate", "1", *options)
    (params, _, key, (x, y)), _ = private
    two, four = (
        ravel_pytree(gradient(params, key, x, y))[0] for params, gradient, key, _ in private
    )
    (params, exact, key, _) = runs("--noise", "0.21", "--rate", "1", *options)[1]
    exact = ravel_pytree(exact(params, key, x, y))[0]  # next to no noise
    left = float(jnp.std(2 * two - four - exact)) * len(x)
    np.testing.assert_allclose(left, np.sqrt(4 * 2**2 + 4**2 + 0.21**2), rtol=0.1)


def test_a_private_run_tells_of_held_out_images_alone(dp_sgd, monkeypatch, tmp_path, capsys):
    options = ("--steps", "14", "--noise", "8", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dp_sgd.py", *options])
    dp_sgd.main()
    lines = capsys.readouterr().out.splitlines()
    images, none, *plain, sigma = lines[:15]
    assert images.startswith("1437 images") and none == "without privacy"
    assert sigma == "noise multiplier 8"
    *private, epsilon, wrote = lines[15:]
    for line in plain + private:
        assert re.fullmatch(r"  step +\d+   held out +[\d.]+%", line)
    assert [int(line.split()[1]) for line in private][-1] == 14 and len(private) == 12
    assert re.fullmatch(r"  \(0\.\d+, 0\.0001\)-differentially private", epsilon)
    assert wrote == f"wrote {tmp_path / 'dp_sgd.png'}"
    assert (tmp_path / "dp_sgd.png").read_bytes().startswith(b"\x89PNG")


def test_help_says_what_the_guarantee_takes_for_granted(dp_sgd):
    said = " ".join(dp_sgd.parser().format_help().split())
    for sentence in (
        "N itself is taken as public",
        "held-out images, which are not protected",
        "changes the sum by up to 2C",
        "whoever knows the seed can take the noise away",
        "a JAX key holds 64 bits",
    ):
        assert sentence in said


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: f"sigma {m['noise']}")
def test_epsilon_agrees_with_opacus(mechanism):
    """Its Rényi bound to rounding, and its PRV accountant within the latter's stated error."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    gaussian = dp_accounting.GaussianDpEvent(mechanism["noise"])
    sampled = dp_accounting.PoissonSampledDpEvent(mechanism["rate"], gaussian)

    def epsilon(accountant):
        return accountant.compose(sampled, mechanism["steps"]).get_epsilon(mechanism["delta"])

    np.testing.assert_allclose(epsilon(RdpAccountant()), mechanism["rdp"], rtol=1e-3)
    assert 0 <= mechanism["prv"] - epsilon(PLDAccountant()) <= 0.02


def test_rare_truncation_costs_next_to_nothing(dp_sgd):
    mechanism = MECHANISMS[0]
    n, rate, steps = 1437, mechanism["rate"], mechanism["steps"]
    rows = dp_sgd.rows_for(n, rate)
    (epsilon,) = dp_sgd.epsilons(n, rate, rows, mechanism["noise"], mechanism["delta"], [steps])
    assert abs(epsilon - mechanism["prv"]) < 0.03


def test_epsilon_covers_an_image_removed_and_an_image_added(dp_sgd):
    """The accountant's event, for the larger of two neighbours of N and N − 1, and N + 1 and N."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    n, rate, rows, noise, delta, steps = 200, 0.2, 50, 4.0, 1e-4, (3, 7)
    for done, epsilon in zip(steps, dp_sgd.epsilons(n, rate, rows, noise, delta, steps)):
        removed, added = (
            PLDAccountant()
            .compose(
                dp_accounting.TruncatedSubsampledGaussianDpEvent(larger, rate, rows, noise), done
            )
            .get_epsilon(delta)
            for larger in (n, n + 1)
        )
        assert removed < added
        np.testing.assert_allclose(epsilon, added, rtol=1e-6)


def test_truncation_costs_and_costs_the_more_the_fewer_the_rows(dp_sgd):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    n, rate, noise, delta, steps = 1437, 0.25, 8.0, 1e-4, 10
    gaussian = dp_accounting.GaussianDpEvent(noise)
    poisson = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    spent = [PLDAccountant().compose(poisson, steps).get_epsilon(delta)]
    for rows in (n + 1, dp_sgd.rows_for(n, rate), 393, 376, 360):
        spent += dp_sgd.epsilons(n, rate, rows, noise, delta, [steps])
    np.testing.assert_allclose(spent[0], spent[1], rtol=1e-6)  # enough rows: nothing is truncated
    assert np.all(np.diff(spent[1:]) > 0)


def test_at_a_rate_of_1_an_image_more_would_find_a_row(dp_sgd):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    gaussian = PLDAccountant().compose(dp_accounting.GaussianDpEvent(4.0), 5).get_epsilon(1e-4)
    (epsilon,) = dp_sgd.epsilons(100, 1.0, dp_sgd.rows_for(100, 1.0), 4.0, 1e-4, [5])
    np.testing.assert_allclose(epsilon, gaussian, rtol=1e-6)


@pytest.mark.parametrize(
    "epsilon", [0.5, *(pytest.param(e, marks=pytest.mark.exhaustive) for e in (0.1, 1.0, 2.0))]
)
def test_the_accountant_covers_an_image_that_takes_anothers_place(epsilon):
    """One step, exactly: 19 images of gradient −C, and a 20th of gradient C or none. Where the
    others fill the rows the 20th moves the sum by 2C, which Poisson sampling does not know of."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    n, rate, rows, noise = 20, 0.5, 8, 1.0
    z = np.linspace(-rows - 12, 12, 100_001)
    without = with_it = 0.0
    for drawn in range(n):
        probability = binom.pmf(drawn, n - 1, rate)
        others = norm.pdf(z, -min(drawn, rows), noise)
        instead = norm.pdf(z, 1 - min(drawn, rows - 1), noise)
        taken = rate * min(1, rows / (drawn + 1))  # drawn, and one of the rows
        without += probability * others
        with_it += probability * ((1 - taken) * others + taken * instead)

    def delta(p, q):
        return np.trapezoid(np.maximum(p - np.exp(epsilon) * q, 0), z)

    exact = max(delta(without, with_it), delta(with_it, without))
    truncated = pld.from_truncated_subsampled_gaussian_mechanism(n, rate, rows, noise)
    assert exact <= truncated.get_delta_for_epsilon(epsilon)
    if epsilon <= 1:
        poisson = pld.from_gaussian_mechanism(
            noise, sampling_prob=rate, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
        )
        assert exact > poisson.get_delta_for_epsilon(epsilon)
