"""The benchmarks measure what they say."""

import time

import jax.numpy as jnp
import pytest

from benchmarks import FAMILIES, __main__
from benchmarks.compare import Candidate, Row, compare, lines_of


def candidate(name, function, *arguments, **options):
    return Candidate(name, lambda: (function, arguments or (jnp.arange(1000.0),)), **options)


def measured(*candidates, **options):
    return compare(Row("a row", candidates, **options), budget=0.1, turns=(3, 5))


def test_every_candidate_is_measured_against_ours():
    results, skipped = measured(candidate("ours", jnp.sin), candidate("theirs", jnp.sin))
    assert skipped == []
    assert [r.name for r in results] == ["ours", "theirs"]
    for r in results:
        assert r.seconds > 0 and r.turns >= 3
        assert r.trace_seconds > 0 and r.compile_seconds > 0 and r.temp_bytes >= 0
        assert r.ratio[0] <= r.ratio[1] <= r.ratio[2]


def test_a_ratio_is_our_time_over_theirs():
    def slow(x):
        time.sleep(0.01)
        return x

    (_, theirs), _ = measured(
        candidate("ours", lambda x: x, jit=False), candidate("theirs", slow, jit=False)
    )
    assert theirs.ratio[1] < 0.5


def test_candidates_that_differ_are_not_compared():
    with pytest.raises(AssertionError, match="theirs differs from ours"):
        measured(candidate("ours", jnp.sin), candidate("theirs", jnp.cos))
    measured(candidate("ours", jnp.sin), candidate("another quantity", jnp.cos, same=False))


def test_a_missing_library_costs_a_line():
    def make():
        import no_such_library  # noqa: F401

    results, skipped = measured(candidate("ours", jnp.sin), Candidate("theirs", make))
    assert [r.name for r in results] == ["ours"]
    assert skipped == ["a row: theirs skipped, No module named 'no_such_library'"]


def test_what_is_not_run_is_compiled():
    (ours,), _ = measured(candidate("ours", jnp.sin), run=False)
    assert ours.seconds is None and ours.compile_seconds > 0
    assert lines_of("a row", [ours])[0].startswith("| a row | ours |  |  |")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_rows(family):
    ((_, rows),) = __main__._chosen([family])
    assert len({row.title for row in rows}) == len(rows)
    assert all(row.candidates[0].name.startswith(("ours", "import")) for row in rows)


def test_what_is_unknown_is_named():
    with pytest.raises(SystemExit, match="quick brown fox"):
        __main__._chosen(["quick brown fox"])
