"""The notebooks run from their first cell to their last, and say the same in both languages."""

import io
import tokenize
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = ("backpropagation.ipynb", "backpropagation.zh.ipynb")


def read(name):
    return nbformat.read(EXAMPLES / name, as_version=4)


ENGLISH, CHINESE = NOTEBOOKS  # of the same code


@pytest.fixture(
    scope="module", params=[ENGLISH, pytest.param(CHINESE, marks=pytest.mark.exhaustive)]
)
def executed(request, tmp_path_factory):
    notebook = read(request.param)
    folder = str(tmp_path_factory.mktemp("notebook"))
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return notebook


def outputs(notebook):
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def shown(notebook, kind):
    return [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def test_it_shows_what_it_promises(executed):
    """Equations as LaTeX, numbers beside them, arrays, pictures, and a fault that is named."""
    assert any("delta ^{1} x^{" in text for text in shown(executed, "text/markdown"))
    assert len(shown(executed, "image/png")) == 5
    assert any("<treescope" in text for text in shown(executed, "text/html"))
    text = printed(executed)
    assert "δ² = ∂C/∂a² ⊙ a² ⊙ (1 − a²)" in text
    assert "scale: total, leaf ['scale']: relative error" in text
    assert "∂C/∂h¹_t" in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_was_executed(name):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(shown(notebook, "image/png")) == 5


def test_both_languages_have_the_same_code():
    """But for what they say: comments and texts."""
    english, chinese = map(read, NOTEBOOKS)
    assert [c.cell_type for c in english.cells] == [c.cell_type for c in chinese.cells]
    for one, other in zip(english.cells, chinese.cells):
        if one.cell_type == "code":
            assert list(said(one.source)) == list(said(other.source))
        elif "zh" not in one.source:
            assert one.source != other.source


def said(source):
    silent = (tokenize.COMMENT, tokenize.STRING, tokenize.NL)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            yield token.string
