"""An editor sees a mistake before anything runs: a misspelt name, a word that is none of a few."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import functional_bp as bp

ROOT = pathlib.Path(bp.__file__).parent.parent
SETTING = """
import jax.numpy as jnp
import optax

import functional_bp as bp

model, loss = bp.chain(bp.dense(3), bp.relu), bp.losses.squared_error
x = y = w = jnp.ones(3)
key = params = v = None
"""
WRONG = """
bp.lstm(3, ouput="last")
bp.gru(3, dropout=0.1)
bp.rnn(3, activation="relo")
bp.lstm(3, output="final")
bp.bidirectional(bp.lstm(3, revers=True))
bp.through_time(3, output="last")
bp.dense(3, bais=True)
bp.dense("3")
bp.value_and_grad(model, loss, method="autodif")
bp.grad(model, loss, method="hand")
bp.per_example_grad_norms(model, loss, per="layr")
bp.clipped_grad(model, loss, max_norm=1.0, per="layers")
bp.clipped_grad(model, loss, maxnorm=1.0)
bp.clipped_grad(model, loss, 1.0, recursions=3)
bp.kronecker_factors(model, loss, fisher="emprical")
bp.kronecker_factors(model, loss, shared="extend")
bp.kfac(model, loss, 0.1, batch=(x, y), fisher="sample")
bp.kfac(model, loss, 0.1, batch=(x, y), shared="reduced")
bp.fit(model, loss, params, [(x, y)], optax.sgd(0.1), epochs=1, method="Manual")
bp.fit(model, loss, params, [(x, y)], optax.sgd(0.1), epoch=1)
bp.value_and_grad(model, loss)(params, x, y, weigths=w)
bp.clipped_grad(model, loss, max_norm=1.0)(params, x, y, weight=w)
bp.per_example_grads(model, loss)(params, x, y, weights=w)
bp.grad_dots(model, loss)(params, x, y)
bp.hvp(model, loss)(params, x, y)
model.apply(params, x, kye=key)
bp.huber
"""
RIGHT = """
bp.lstm(3, output="last", reverse=True, trained_state=True, truncate=4, checkpoint=2)
bp.gru(3, output="sequence", checkpoint=True)
bp.rnn(3, activation="relu", output="last")
bp.bidirectional(bp.lstm(3), bp.lstm(3, reverse=True))
bp.value_and_grad(model, loss, method="autodiff")(params, x, y, weights=w, key=key)
bp.per_example_grad_norms(model, loss, per="parameter")(params, x, y, key=key)
bp.clipped_grad(model, loss, max_norm=1.0, per="layer", recursions=1)(params, x, y, weights=w)
bp.clipped_grad(model, loss, 1.0, has_aux=True)(params, x, y)
bp.kronecker_factors(model, loss, fisher="exact", shared="reduce")(params, x, y, weights=w)
bp.kfac(model, loss, 0.1, batch=(x, y), fisher="empirical", shared="reduce")
bp.grad_dots(model, loss)(params, x, y, v)
bp.hvp(model, loss)(params, x, y, v, weights=w)
bp.fit(model, loss, params, [(x, y)], optax.sgd(0.1), epochs=1, method="manual")
model.apply(params, x, key=key)
"""


def lines_of_mypy(folder, files):
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
    said = checked("mypy", [*options, f"--cache-dir={folder}", *files], folder)
    return re.findall(r"^(\w+)\.py:(\d+): error: (.*)$", said, re.MULTILINE)


def lines_of_pyright(folder, files):
    pytest.importorskip("pyright")
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    said = checked("pyright", ["--outputjson", "--pythonpath", sys.executable, *files], folder)
    return [
        (pathlib.Path(of["file"]).stem, of["range"]["start"]["line"] + 1, of["message"])
        for of in json.loads(said)["generalDiagnostics"]
    ]


def checked(checker, arguments, folder):
    """What a type checker says of files in a folder that is not this package's."""
    env = os.environ | {"MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", checker, *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", params=[lines_of_mypy, lines_of_pyright])
def errors(request, tmp_path_factory):
    """What a type checker finds wrong with each line of each file."""
    folder = tmp_path_factory.mktemp("typed")
    files = {"wrong": SETTING + WRONG, "right": SETTING + RIGHT}
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    files |= {f"readme_{i}": example for i, example in enumerate(readme)}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    found = request.param(folder, [f"{name}.py" for name in files])
    assert found
    return {name: {int(line): told for of, line, told in found if of == name} for name in files}


def test_a_type_checker_sees_each_mistake(errors):
    lines = (SETTING + WRONG).split("\n")
    mistakes = range(SETTING.count("\n") + 2, len(lines))
    assert {lines[n - 1] for n in errors["wrong"]} == {lines[n - 1] for n in mistakes}


def test_it_sees_nothing_where_there_is_no_mistake(errors):
    assert not any(found for name, found in errors.items() if name != "wrong"), errors
