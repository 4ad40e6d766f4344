"""Pictures draw what was computed: their lines and images hold its numbers."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_bp as bp
from functional_bp.views import pictures

LOSS = bp.losses.softmax_cross_entropy
X = jax.random.normal(jax.random.key(0), (12, 4))
Y = jnp.arange(12) % 3
MODEL = bp.chain(bp.dense(5), bp.relu, bp.dense(5), bp.relu, bp.dense(3))
PARAMS = MODEL.init(jax.random.key(1), X[0])


def lines(panel):
    return {line.get_label(): line.get_ydata() for line in panel.lines}


@pytest.fixture(scope="module")
def found():
    return bp.inspect(MODEL, LOSS)(PARAMS, X, Y, example=None)


def test_heatmaps_hold_every_delta(found):
    panels = bp.pictures.deltas(found).axes
    for panel, layer in zip(panels, (0, 2, 4), strict=True):
        assert (panel.images[0].get_array() == np.asarray(found[layer].delta).T).all()
        assert panel.get_title().startswith(f"δ{'¹²³'[layer // 2]}, up to ")
        assert panel.get_xlabel() == "example"
    one = bp.inspect(MODEL, LOSS)(PARAMS, X, Y)
    assert [panel.images[0].get_array().shape for panel in bp.pictures.deltas(one).axes] == [
        (5, 1),
        (5, 1),
        (3, 1),
    ]


def test_norms_of_delta_are_means_over_examples(found):
    wanted = [np.linalg.norm(found[i].delta, axis=1).mean() for i in (0, 2, 4)]
    (panel,) = bp.pictures.delta_norms({"before": found, "after": found}).axes
    drawn = lines(panel)
    assert set(drawn) == {"before", "after"}
    assert np.allclose(drawn["after"], wanted)
    assert panel.get_yscale() == "log"
    normed = bp.chain(bp.dense(4), bp.layer_norm(), bp.dense(3))
    params = normed.init(jax.random.key(0), X[0])
    (panel,) = bp.pictures.delta_norms(bp.inspect(normed, LOSS)(params, X, Y)).axes
    panel.figure.draw_without_rendering()
    assert [label.get_text() for label in panel.get_xticklabels()] == ["¹", "³"]


def test_through_time_is_what_reaches_each_step():
    model = bp.chain(bp.lstm(4, output="last"), bp.dense(3))
    x = jax.random.normal(jax.random.key(2), (6, 7, 2))
    params = model.init(jax.random.key(1), x[0])
    found = bp.inspect(model, LOSS)(params, x, Y[:6], example=None)
    (panel,) = bp.pictures.through_time({"lstm": found}).axes
    of_states, _ = bp.deltas(model, LOSS)(params, x, Y[:6])
    assert np.allclose(lines(panel)["lstm"], jnp.linalg.norm(of_states, axis=-1).mean(0))
    assert panel.get_title() == "How much of the final error reaches step t"
    heat = bp.pictures.deltas(found).axes[0]
    assert np.allclose(heat.images[0].get_array(), found[0].delta.mean(0).T)
    assert heat.get_xlabel() == "step t" and list(heat.images[0].get_extent()[:2]) == [0.5, 7.5]
    one = bp.inspect(model, LOSS)(params, x, Y[:6])
    assert "[0] lstm(4, output=last)" in lines(bp.pictures.through_time(one).axes[0])


def test_dead_units_are_counted():
    params = jax.tree.map(lambda p: p, PARAMS)
    params[0]["bias"] = params[0]["bias"].at[:2].set(-100.0)
    found = bp.inspect(MODEL, LOSS)(params, X, Y, example=None)
    first, second = bp.pictures.activations(found).axes
    assert first.get_title() == "[1] relu: 2 of 5 units dead"
    assert second.get_xlabel() == "a²"
    assert sum(patch.get_height() for patch in first.patches) == X.shape[0] * 5
    one = bp.pictures.activations(bp.inspect(MODEL, LOSS)(params, X, Y)).axes[0]
    assert one.get_title().endswith(" of 5 units are 0")


def test_a_history_is_drawn_with_its_metrics_and_rate():
    schedule = optax.cosine_decay_schedule(0.1, 9)
    accuracy = {"accuracy": lambda a, y: a.argmax(-1) == y}
    run = bp.fit(
        *(MODEL, LOSS, PARAMS, bp.minibatches(X, Y, 4, seed=0), optax.sgd(schedule)),
        **{"epochs": 3, "evaluation": [(X, Y)], "metrics": accuracy},
    )
    cost, metric, rate = bp.pictures.history(run.history, rate=schedule).axes
    drawn = lines(cost)
    assert (drawn["each step's batch"] == run.history.loss).all()
    assert (drawn["training, mean of an epoch"] == run.history.epoch_loss).all()
    assert (drawn["evaluation"] == run.history.evaluation["loss"]).all()
    assert (metric.lines[0].get_ydata() == run.history.evaluation["accuracy"]).all()
    assert np.allclose(rate.lines[0].get_ydata(), [schedule(step) for step in range(9)])
    assert len(bp.pictures.history(run).axes) == 2


def test_norms_say_how_many_are_clipped():
    norms = bp.per_example_grad_norms(MODEL, LOSS)(PARAMS, X, Y)
    limit = float(jnp.sort(norms)[8])
    (panel,) = bp.pictures.norms(norms, max_norm=limit).axes
    assert sum(patch.get_height() for patch in panel.patches) == len(norms)
    assert "25% are above" in panel.get_legend().get_texts()[0].get_text()
    assert panel.get_xscale() == "linear"
    (panel,) = bp.pictures.norms(10.0 ** np.arange(-3, 3)).axes
    assert panel.get_xscale() == "log" and sum(p.get_height() for p in panel.patches) == 6
    with pytest.raises(bp.ModelError, match="takes one number per example"):
        bp.pictures.norms({"weight": norms})


def test_panels_of_ones_own_are_drawn_into(found):
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert bp.pictures.delta_norms(found, axes=left) is figure
    assert bp.pictures.norms(np.ones(3), axes=right) is figure
    assert left.lines and right.patches


def test_what_does_not_fit_is_said(found):
    with pytest.raises(bp.ModelError, match=r"takes a bp\.Inspection, got 3"):
        bp.pictures.deltas(3)
    with pytest.raises(bp.ModelError, match="takes a model with a recurrent layer"):
        bp.pictures.through_time(found)
    params = bp.layer_norm().init(jax.random.key(0), X[0])
    plain = bp.inspect(bp.layer_norm(), LOSS)(params, X, Y)
    with pytest.raises(bp.ModelError, match="takes a model that has δ"):
        bp.pictures.deltas(plain)


def test_without_matplotlib_the_extra_is_named(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pictures._shown_figure.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'functional_bp\[plot\]'"):
        bp.pictures.deltas(found)


def test_a_notebook_shows_a_figure(found):
    assert bp.pictures.delta_norms(found)._repr_png_().startswith(b"\x89PNG")
