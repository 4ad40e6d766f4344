"""What a newcomer is shown of the package: what is public, and nothing else."""

import re
import rlcompleter
import types

import pytest

import functional_bp as bp

MODULES = {"bp": bp} | {
    name: item for name in bp.__all__ if isinstance(item := getattr(bp, name), types.ModuleType)
}
TABLE, _, ORDER = bp.__doc__.partition("\n\nTo read the package")
ENTRIES = re.findall(r"^    (\w+) {2,}(.*)$", TABLE, re.MULTILINE)


def test_help_begins_with_a_table_of_all_that_is_public():
    names = [name for name, _ in ENTRIES]
    assert len(names) == len(set(names))
    assert set(names) == set(bp.__all__)


def test_the_table_says_of_each_what_it_is_under_what_it_is_for():
    title, *groups = TABLE.split("\n\n")
    assert "\n" not in title
    assert ORDER
    for group in groups:
        heading, *entries = group.split("\n")
        assert re.match(r"[A-Z]", heading)
        assert all(re.fullmatch(r"    \w+ {2,}\S.*", entry) for entry in entries), heading


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_exists_and_is_all_that_is_shown(module):
    module = MODULES[module]
    assert [name for name in dir(module) if not name.startswith("__")] == sorted(module.__all__)
    assert all(hasattr(module, name) for name in dir(module))
    assert {"__all__", "__doc__", "__file__", "__name__"} <= set(dir(module))


def test_every_module_that_is_public_is_looked_at():
    assert MODULES.keys() >= {"bp", "losses", "factors", "contractions", "testing"}


def test_tab_shows_what_is_public():
    completer, shown = rlcompleter.Completer({"bp": bp}), []
    while found := completer.complete("bp.", len(shown)):
        shown.append(found.removeprefix("bp.").rstrip("()"))
    assert {name for name in shown if not name.startswith("_")} == set(bp.__all__)
