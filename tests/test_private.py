"""Clipping honours its bound, batches are Poisson samples, and ε is what others say it is."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import case, compiled
from jax.flatten_util import ravel_pytree

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

        whole, *removed = compiled(gradients, params, x, y)
        moved = [float(jnp.linalg.norm(whole - g)) for g in removed]
        assert max(moved) <= bound / divisor * (1 + 1e-12)
        if per == "model":  # every example's norm is above the bound, so each moves it all the way
            np.testing.assert_allclose(moved, bound / divisor)


def test_a_batch_is_a_poisson_sample_truncated_to_its_rows(dp_sgd):
    n, rate, rows = 50, 0.3, 17

    def draw(key):
        index, weights = dp_sgd.poisson_batch(key, n, rate, rows)
        return jnp.zeros(n).at[index].add(weights), weights.sum()

    drawn, sizes = compiled(jax.vmap(draw), jax.random.split(jax.random.key(0), 20_000))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    size = np.random.default_rng(0).binomial(n, rate, 200_000).clip(max=rows)
    np.testing.assert_allclose(sizes.mean(), size.mean(), rtol=0.01)
    np.testing.assert_allclose(sizes.var(), size.var(), rtol=0.05)
    np.testing.assert_allclose(drawn.mean(0), size.mean() / n, atol=0.015)


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


@pytest.mark.parametrize(
    "argument", ["--noise=0", "--noise=nan", "--rate=1.5", "--rate=0", "--max-norm=-1"]
)
def test_arguments_out_of_range_are_named(dp_sgd, argument, capsys):
    with pytest.raises(SystemExit):
        dp_sgd.arguments([argument])
    assert f"argument {argument.split('=')[0]}: takes a number above 0" in capsys.readouterr().err
