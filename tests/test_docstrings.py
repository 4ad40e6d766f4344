"""What ``help`` shows: equations, words, and examples that run."""

import doctest
import inspect
import operator
import pathlib
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_bp as bp

MODULES = (bp.losses, bp.testing)


def public_items():
    for name in bp.__all__:
        item = getattr(bp, name)
        if not inspect.ismodule(item):
            yield name, item
    for module in MODULES:
        for name in module.__all__:
            yield f"{module.__name__.split('.')[1]}.{name}", getattr(module, name)


ITEMS = dict(public_items())
VALUES = {n: v for n, v in ITEMS.items() if isinstance(v, (bp.Layer, bp.losses.Loss))}
MAKERS = {
    name: item
    for name, item in ITEMS.items()
    if inspect.isfunction(item)
    and inspect.signature(item).return_annotation in ("Layer", "Loss", "Any")
}
NOT_BY_EQUATIONS = {"rule", "activation", "losses.loss"}  # which make what the caller says
NO_EXAMPLE = {
    "Inspected",
    "Inspection",
    "ModelError",
    "Run",
    "losses.Loss",
}  # which nobody makes by hand


@pytest.mark.parametrize("name", [n for n, i in ITEMS.items() if inspect.isroutine(i)])
def test_every_public_function_has_an_example(name):
    assert doctest.DocTestFinder().find(ITEMS[name], name)[0].examples


@pytest.mark.parametrize("name", [n for n in ITEMS if n not in VALUES])
def test_examples_run(name):
    """With what a reader of the README has imported."""
    given = {"bp": bp, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    failures = []
    for test in doctest.DocTestFinder(recurse=False).find(ITEMS[name], name, globs=given):
        doctest.DocTestRunner(optionflags=options).run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", VALUES)
def test_a_layer_or_loss_says_its_equations(name):
    """As ``help`` shows them, with more words than a name."""
    item = VALUES[name]
    for text in item.equations[:2]:
        assert all(line.strip() in item.__doc__ for line in text.splitlines())
    assert len(item.doc.split()) >= 4


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - NOT_BY_EQUATIONS))
def test_what_makes_a_layer_or_loss_says_its_equations(name):
    doc = MAKERS[name].__doc__
    assert "Forward:" in doc
    assert "Backward:" in doc


def test_what_is_made_has_the_equations_of_its_maker():
    assert "∂C/∂W   = Σ_t δ_t a_tᵀ" in bp.dense(3).__doc__
    assert bp.losses.huber(0.5).equations.backward in bp.losses.huber.__doc__
    mine = bp.activation(jnp.sin, jnp.cos, name="mine", doc="A wave.")
    assert mine.__doc__.startswith("A wave.")
    assert "∂C/∂z = ∂C/∂a ⊙ mine′(z)" in mine.__doc__


def test_the_version_is_the_installed_ones():
    assert bp.__version__ == version("functional_bp")


ROOT = pathlib.Path(bp.__file__).parent.parent


def mentioned():
    """Every name that a docstring, an error or a page tells a reader to use, and where."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *(ROOT / "functional_bp").rglob("*.py")]
    for page in pages:
        for name in re.findall(r"\bbp\.([A-Za-z]\w*(?:\.[A-Za-z]\w*)*)", page.read_text()):
            yield name, page.name
    listed = (ROOT / "README.md").read_text().partition("## What else is there")[2]
    for name in re.findall(r"`([a-z]\w+)`", listed.partition("Examples, each")[0]):
        yield name, "README.md"


def exists(name):
    try:
        operator.attrgetter(name)(bp)
    except AttributeError:
        return False
    return True


def test_every_name_that_is_mentioned_exists():
    names = dict(mentioned())
    assert {"lstm", "losses.loss", "batch_norm", "testing.check_layer"} < names.keys()
    assert not {name: page for name, page in names.items() if not exists(name)}
    assert not exists("no_such_layer")
