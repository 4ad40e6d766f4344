"""What the README shows is what the code does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EQUATIONS = re.findall(
    r"^\|[^|\n]+\| `(.+)` \| `(functional_bp/[\w/]+\.py)` \|$", README, re.MULTILINE
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


def test_every_example_and_equation_is_found():
    assert len(EXAMPLES) >= 2
    assert len(EQUATIONS) >= 9


@pytest.mark.parametrize("line, file", EQUATIONS)
def test_equation_is_that_line_of_code(line, file):
    assert line in (ROOT / file).read_text()
