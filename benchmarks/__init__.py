"""Every speed and memory claim, measured: ``python -m benchmarks``.

A family of comparisons is a module of this package, named in ``FAMILIES``, with a docstring (its
first line becomes the family's heading, the rest a note below it) and one function::

    def rows() -> Iterable[Row]: ...

A ``Row`` is a title and a list of candidates, ours first; a ``Candidate`` is a name and a function
without arguments that makes what is timed (it imports what it needs, so that a library that is
not installed costs one line, "skipped", and nothing else)::

    def rows():
        yield Row("softmax, 32 examples", [
            Candidate("ours", lambda: (ours, arguments)),
            Candidate("usual: jax.grad", lambda: (theirs, arguments)),
        ])

The first word of a name says what a candidate is: *ours*; *usual*, what most people write;
*strongest*, what an expert would write; or the name of a library.
"""

FAMILIES = (
    *("mlp", "normalisation", "quantities", "traced", "deep", "recurrent", "transformers"),
    *("training", "imports"),
)
