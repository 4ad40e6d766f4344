"""What is installed, and what a package page shows of it, from wheels that the suite builds."""

import email
import email.policy
import json
import pathlib
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

import functional_bp as bp

ROOT = pathlib.Path(bp.__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
HOME = "https://github.com/functional-bp/functional_bp"
CODE = re.compile(r"```.*?```", re.DOTALL)
SCRIPT = """
import functional_bp as bp

bp.lstm(3, output="last")
bp.lstm(3, ouput="last")
"""


def built(kind, folder):
    """The wheel that the build backend makes, as pip asks for it."""
    backend = PYPROJECT["build-system"]["build-backend"]
    pytest.importorskip(backend)
    pytest.importorskip("hatch_fancy_pypi_readme")
    code = f"import {backend} as backend; print(backend.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return email.message_from_bytes(wheel.read(name), policy=email.policy.compat32)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment in which the package is installed with ``pip install -e .``."""
    folder = tmp_path_factory.mktemp("editable")
    with built("editable", folder) as wheel:
        venv.create(folder / "venv", symlinks=True)
        [packages] = (folder / "venv").glob("lib/python*/site-packages")
        wheel.extractall(packages)
    return folder / "venv" / "bin" / "python"


def test_an_editable_install_is_a_path(tmp_path):
    """No import hook, which only a running Python follows."""
    with built("editable", tmp_path) as wheel:
        outside = [name for name in wheel.namelist() if ".dist-info/" not in name]
        [path] = outside
        assert path.endswith(".pth")
        assert wheel.read(path).decode().splitlines() == [str(ROOT)]


@pytest.mark.skipif(sys.platform == "win32", reason="where an environment has its Python")
def test_type_checkers_find_an_editable_install_from_another_folder(installed, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--config-file=", f"--python-executable={installed}"]
    said = run([*command, f"--cache-dir={tmp_path}", "script.py"], tmp_path)
    assert re.findall(r"script.py:(\d+): error: Unexpected keyword argument", said) == ["5"], said
    assert said.count("error:") == 1, said


@pytest.mark.skipif(sys.platform == "win32", reason="where an environment has its Python")
def test_an_editor_finds_an_editable_install_from_another_folder(installed, tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(installed)]
    [found] = json.loads(run([*command, "script.py"], tmp_path))["generalDiagnostics"]
    assert found["message"] == 'No parameter named "ouput"'


def run(command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = [path.relative_to(ROOT) for path in (ROOT / "functional_bp").rglob("*")]
    wanted = {str(path) for path in files if path.suffix == ".py" or path.name == "py.typed"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


def test_the_metadata_say_whose_it_is_and_where(metadata):
    assert metadata["Author"] == "The functional_bp authors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Keywords"].count(",") >= 4
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert urls.keys() >= {"Homepage", "Repository", "Issues", "Changelog"}
    assert all(url.startswith(HOME) for url in urls.values())
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert "Programming Language :: Python :: 3.11" in classifiers


def test_every_link_of_the_package_page_resolves(metadata):
    """To a file that is in the repository, or a heading of the README."""
    page = CODE.sub("", metadata.get_payload(decode=True).decode())
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(", CODE.sub("", README))) > 4
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for image, link in links:
        if not link.startswith((HOME, "https://raw.githubusercontent.com/functional-bp/")):
            assert link.startswith("https://")
        elif "#" in link:
            assert link.partition("#")[2] in anchors
        else:
            assert link.startswith("https://raw.") == bool(image)
            assert (ROOT / link.partition("/HEAD/")[2]).is_file()


def test_the_package_page_shows_the_readmes_code_as_it_is(metadata):
    page = metadata.get_payload(decode=True).decode()
    assert CODE.findall(page) == CODE.findall(README)
