"""What an extra brings, and what is said where it is missing: before any work, in one sentence."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import functional_bp as bp

ROOT = Path(bp.__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PRIVACY = ("chex", "dp_accounting", "jax_privacy")


def run_without(modules, example, *arguments):
    """An example run where some modules are not installed."""
    code = "import runpy, sys; " + "; ".join(f"sys.modules[{name!r}] = None" for name in modules)
    code += f"; sys.path.insert(0, {str(EXAMPLES)!r}); sys.argv[1:] = {list(arguments)!r}"
    code += f"; runpy.run_path({str(EXAMPLES / example)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("example", ["dp_sgd.py", "flax_private.py"])
def test_help_takes_no_extra_for_privacy(example):
    ran = run_without(PRIVACY, example, "--help")
    assert ran.returncode == 0, ran.stderr
    assert "--noise" in ran.stdout


@pytest.mark.parametrize(
    "example, missing, told, extras",
    [
        ("dp_sgd.py", PRIVACY, "dp_accounting", "privacy"),
        ("flax_private.py", PRIVACY, "chex and dp_accounting and jax_privacy", "privacy"),
        ("dp_sgd.py", ("sklearn", *PRIVACY), "sklearn and dp_accounting", "examples,privacy"),
        ("mislabelled.py", ("matplotlib",), "matplotlib", "examples"),
        ("char_lm.py", ("orbax", "orbax.checkpoint"), "orbax.checkpoint", "examples"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(example, missing, told, extras, tmp_path):
    folder = tmp_path / "out"
    ran = run_without(missing, example, "--out", str(folder))
    sentence = f"takes {told}, not installed here; pip install -e '.[{extras}]'\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", sentence)
    assert not folder.exists()


def normal(name):
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    """The distributions of requirements, those of this project's own extras in their places."""
    for requirement in requirements:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == "functional_bp":
            for extra in extras.split(","):
                yield from names(PROJECT["optional-dependencies"][extra])
        else:
            yield normal(name)


def imported(file):
    """The first names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [alias.name for alias in getattr(node, "names", ())]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (module.partition(".")[0] for module in modules)


def test_extras_bring_all_that_the_examples_use():
    brought = {*names(PROJECT["dependencies"]), *names(["functional_bp[examples,privacy]"])}
    brought.add("numpy")  # jax's own
    ours = {file.stem for file in EXAMPLES.glob("*.py")} | {"functional_bp", "__future__"}
    of_module = packages_distributions()
    for file in EXAMPLES.glob("*.py"):
        for module in set(imported(file)) - ours - sys.stdlib_module_names:
            assert {normal(name) for name in of_module[module]} & brought, f"{file.name}: {module}"


@pytest.mark.parametrize("extra", ["examples", "test", "peers"])
def test_who_may_train_may_save_what_was_trained(extra):
    """Checkpoints and files of parameters come with whatever one trains with."""
    brought = set(names(PROJECT["optional-dependencies"][extra]))
    assert {"orbax-checkpoint", "safetensors"} <= brought
