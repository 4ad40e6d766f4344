"""What a layer is: always over a batch, whatever it is made of.

``rules`` makes layers of rules for one example; combinators make layers of layers. ``backward``
takes a contraction for every parameter and returns what they make of the factors:

    init(key, x)                                   -> params           x: ONE example
    forward(params, x, key=None)                   -> (y, residuals)   x, y: batches
    backward(params, residuals, dy, contract=keep) -> (dx, results)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from .checks import ModelError, Text, abstract, described, flag, function, random_key, text, told
from .docstrings import Equations, composed, stated
from .meshes import by_examples, on_mesh
from .values import Value

Tree = Any
_SHOWN = 300  # characters of a model's name that repr shows


@contextlib.contextmanager
def place(where: str) -> Iterator[None]:
    """Puts a layer's place in the model in front of what is raised inside."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where} {error}") from None
    except Exception as error:
        error.add_note(f"in {where}")
        raise


def renews(layer: Layer) -> bool:
    """Whether any of a model's layers renews its state."""
    return any(map(renews, layer.parts)) if layer.parts else layer.renew is not not_renewed


def placed(where: str, layer: Layer) -> Layer:
    """The layer, with its place in the model in front of what its functions raise."""

    def within(function: Callable[..., Tree] | None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tree:
            with place(where):
                return function(*args, **kwargs)  # type: ignore[misc]

        return function if function in (None, not_renewed, none_is_state) else call

    names = ("init", "forward", "backward", "reference", "renew", "is_state")
    return dataclasses.replace(layer, **{name: within(getattr(layer, name)) for name in names})


def no_parameters(key: Array, x: Tree) -> Tree:
    """``init`` of a rule without parameters."""
    return ()


def none_is_state(params: Tree) -> Tree:
    """``is_state`` of a layer without state."""
    return jax.tree.map(lambda _: False, params)


def not_renewed(params: Tree, residuals: Tree) -> Tree:
    """``renew`` of a layer without state."""
    return params


@dataclass(frozen=True, eq=False)
class Layer(Value):
    """A layer or a model, over a batch: inputs, outputs and residuals have the examples first.

    ``dataclasses.replace(layer, backward=…)`` is a layer with another backward. If you replace
    ``forward``, also replace ``reference`` and ``in_inference``, where the layer has them.

    Attributes:
      name: how errors and summaries call it, such as ``dense(256)``.
      init: ``(key, x) -> params``; ``x`` is ONE example's input or its ``ShapeDtypeStruct``.
      forward: ``(params, x, key=None) -> (y, residuals)``.
      backward: ``(params, residuals, dy, contract=keep) -> (dx, results)``; without a contraction
        the results are the factored gradients.
      reference: ``(params, x, key=None) -> y``, the textbook formula, where ``forward`` is not
        what one would write for autodiff; what autodiff and the proofs differentiate.
      renew: ``(params, residuals) -> params``, with the state as it is after this batch.
      is_state: ``params -> tree of bools``, split as the parameters are: which leaves are state,
        such as running averages. They have no gradient; ``bp.trainable`` leaves them out.
      in_inference: the layer as it is at inference, where that is another.
      mirrored: for a recurrent layer, ``() -> `` the same one from the sequence's other end.
      parts, rebuild: for a combinator, its layers and the function that makes it from others.
      unrolled: for a stack that is a scan, ``() -> `` the same one with a part for each layer.
      mixes_examples: the output of one example depends on the others of its batch.
      elementwise: each number of its output depends on that of its input at its place alone.
      holds_deltas: its backward holds all its δ at once, whatever is asked of it.
      random: it draws from its key; with none it does something else. Not so its inference form.
      equations, doc: what ``help`` shows.

    Example:
      >>> layer = bp.dense(2)
      >>> params = layer.init(jax.random.key(0), jnp.ones(3))
      >>> layer.apply(params, jnp.ones((5, 3))).shape
      (5, 2)
    """

    name: str
    init: Callable[..., Tree]
    forward: Callable[..., tuple[Tree, Tree]]
    backward: Callable[..., tuple[Tree, Tree]]
    reference: Callable[..., Tree] | None = None
    renew: Callable[[Tree, Tree], Tree] = not_renewed
    is_state: Callable[[Tree], Tree] = none_is_state
    in_inference: Layer | None = None
    mirrored: Callable[[], Layer] | None = None
    parts: tuple[Layer, ...] = ()
    rebuild: Callable[..., Layer] | None = None
    unrolled: Callable[[], Layer] | None = None
    mixes_examples: bool = False
    elementwise: bool = False
    holds_deltas: bool = False
    random: bool = False
    equations: Equations | tuple[str, str] | None = None
    doc: str = ""

    def __post_init__(self) -> None:
        text("layer: name", self.name)
        for what in ("init", "forward", "backward", "renew", "is_state"):
            function(f"{self.name}: {what}", getattr(self, what))
        for what in ("reference", "mirrored", "rebuild", "unrolled"):
            function(f"{self.name}: {what}", getattr(self, what), or_none=True)
        if self.in_inference is not None:
            a_layer(f"{self.name}: in_inference", self.in_inference)
        for what in ("mixes_examples", "elementwise", "holds_deltas", "random"):
            flag(f"{self.name}: {what}", getattr(self, what))
        text(f"{self.name}: doc", self.doc)
        object.__setattr__(self, "equations", stated(f"{self.name}: equations", self.equations))
        words = composed(self.doc or f"The layer {self.name}.", self.equations)
        object.__setattr__(self, "__doc__", words)

    def apply(self, params: Tree, x: Tree, key: Array | None = None) -> Tree:
        """Outputs for a batch, of the layer in its inference form.

        Without ``key`` nothing is random: dropout is the identity.

        Raises:
          ModelError: where parameters, inputs or key do not fit the model.
        """
        random_key("key", key)
        model = self.inference()

        def outputs(params: Tree, x: Tree, key: Array | None) -> Tree:
            return model.forward(params, x, key)[0]

        try:
            with place("x:"):
                batch_size(x)
            return on_mesh(outputs, params, x, key, results=lambda _: by_examples(x))
        except Exception as error:
            if _is_one_example(model, params, x):
                raise _one_for_a_batch(x, error) from error
            raise

    def inference(self) -> Layer:
        """The model with every layer as it is at inference: running averages for a batch's.

        It mixes no examples, and renews no state. Inside a ``chain`` it stays in this form during
        training, too; its parameters are trained unless they are frozen.
        """
        return self._inference

    @functools.cached_property
    def _inference(self) -> Layer:
        def of_layer(layer: Layer, place: str) -> Layer:
            layer = layer.in_inference or layer
            return dataclasses.replace(layer, random=False) if layer.random else layer

        return self.on_layers(of_layer)

    def on_layers(self, change: Callable[[Layer, str], Layer], place: str = "") -> Layer:
        """The model rebuilt bottom up, with ``change(layer, place)`` for each of its layers.

        Combinators come after their parts. Places are those of the parameters in a chain:
        ``[2][0]`` is the first part of the model's third.
        """
        parts = tuple(part.on_layers(change, f"{place}[{i}]") for i, part in enumerate(self.parts))
        same = self.rebuild is None or all(map(operator.is_, parts, self.parts))
        return change(self if same else self.rebuild(*parts), place)  # type: ignore[misc]

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ModelError(
            f"{self.name}: is a layer, not a function; model.apply(params, x) gives outputs"
        )

    def __repr__(self) -> str:
        """The name; of a deep model, its beginning and end."""
        if len(self.name) <= _SHOWN:
            return self.name
        begin, end = self.name[: _SHOWN - 60], self.name[-50:]
        return f"{begin.rpartition(', ')[0] or begin}, …, {end.partition(', ')[2] or end}"


def a_layer(what: str, value: Any) -> Layer:
    """A layer or model."""
    if not isinstance(value, Layer):
        name = getattr(value, "__name__", "")
        makes = f"; bp.{name}(…) makes a layer" if hasattr(value, "__wrapped__") else ""
        raise ModelError(f"{what}: takes a bp.Layer, got {told(value)}{makes}")
    return value


def textbook(model: Layer) -> Layer:
    """The model with each layer's ``reference`` in place of its ``forward``: for autodiff."""

    def of_layer(layer: Layer, place: str) -> Layer:
        reference = layer.reference
        if reference is None:
            return layer

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            # The residuals are there for ``renew``; what it does not read, the compiler drops.
            residuals = () if layer.renew is not_renewed else layer.forward(params, x, key)[1]
            return reference(params, x, key), residuals

        return dataclasses.replace(layer, forward=forward, reference=None)

    return model.on_layers(of_layer)


def unrolled(model: Layer) -> Layer:
    """The model with a part for each layer of its stacks, and no scan over them."""

    def of_layer(layer: Layer, place: str) -> Layer:
        if layer.unrolled is None:
            return layer
        flat = layer.unrolled()
        return dataclasses.replace(flat, equations=layer.equations, doc=layer.doc)

    return model.on_layers(of_layer)


def shapes_of(x: Tree) -> Tree:
    """Shapes and dtypes as JAX takes them: without x64, float64 numbers are float32."""
    try:
        if x is None:
            raise TypeError
        return jax.eval_shape(lambda x: x, x)
    except TypeError:
        raise ModelError(f"takes arrays of numbers, got {described(x)}") from None


def check_array(x: Tree) -> None:
    """Raises unless x is one array."""
    if not hasattr(x, "shape"):
        raise ModelError(f"takes one array, got {described(x)}{way_to_one_array(x)}")


def way_to_one_array(x: Tree) -> str:
    """How a model gets one array of a dict or a tuple, as the end of an error."""
    if isinstance(x, dict) and x:
        entry = "x" if "x" in x else next(iter(x))
        return (
            f'; bp.entry("{entry}") before it goes on with that entry alone, bp.at("{entry}", …) '
            "around it works on that entry and leaves the others as they are"
        )
    if isinstance(x, tuple) and x:
        return "; bp.concatenate(), bp.add or bp.multiply before it makes one of a tuple"
    return ""


def _is_one_example(model: Layer, params: Tree, x: Tree) -> bool:
    """Whether a model takes what has the shapes of x as one example, and not as a batch."""

    def fits(batch_of: Callable[[Tree], Tree]) -> bool:
        try:
            batch = batch_of(x)
            batch_size(batch)
            jax.eval_shape(model.forward, params, batch)
        except Exception:
            return False
        return True

    return fits(functools.partial(batch_of, 1)) and not fits(shapes_of)


def _one_for_a_batch(x: Tree, error: Exception) -> ModelError:
    def of_batch(leaf: Any) -> str:
        return f"{leaf.dtype}({', '.join(['n', *map(str, leaf.shape)])})"

    batch = jax.tree.map(lambda leaf: Text(of_batch(leaf)), shapes_of(x))
    one = "x[None]" if hasattr(x, "shape") else "jax.tree.map(lambda a: jnp.asarray(a)[None], x)"
    first = error if isinstance(error, ModelError) else f"x: takes a batch, got {described(x)}"
    return ModelError(
        f"{first}; as one example x fits: apply takes a batch, {batch}, and {one} is a batch of one"
    )


def batch_size(x: Tree) -> int:
    """The number of examples in a batch: the length of every leaf's first axis."""
    sizes = {leaf.shape[0] if getattr(leaf, "shape", ()) else -1 for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or -1 in sizes:
        raise ModelError(
            f"takes a batch with the examples on the first axis of every array, got {described(x)}"
        )
    return int(sizes.pop())


def one_of(x: Tree) -> Tree:
    """The shapes and dtypes of one example of a batch."""
    batch_size(x)
    return jax.tree.map(lambda leaf: abstract(leaf.shape[1:], leaf.dtype), x)


def batch_of(n: int, x: Tree) -> Tree:
    """The shapes and dtypes of a batch of n examples like x."""
    return jax.tree.map(lambda leaf: abstract((n, *leaf.shape), leaf.dtype), shapes_of(x))


def output_shape(layer: Layer, params: Tree, x: Tree) -> Tree:
    """The shapes and dtypes of the output for one example, found on a batch of two: what mixes
    the examples of its batch takes more than one."""
    x = batch_of(2, x)
    return one_of(jax.eval_shape(lambda p, x: layer.forward(p, x)[0], params, x))


def combined(
    name: str,
    parts: tuple[Layer, ...],
    rebuild: Callable[..., Layer],
    *,
    init: Callable[..., Tree],
    forward: Callable[..., tuple[Tree, Tree]],
    backward: Callable[..., tuple[Tree, Tree]],
    renew: Callable[[Tree, Tree], Tree] | None = None,
    is_state: Callable[[Tree], Tree] | None = None,
    holds_deltas: bool = False,
) -> Layer:
    """A layer made of others; its parameters and residuals are those of its only part where
    ``renew`` and ``is_state`` are not given."""
    return Layer(
        name=name,
        init=init,
        forward=forward,
        backward=backward,
        renew=renew or parts[0].renew,
        is_state=is_state or parts[0].is_state,
        parts=parts,
        rebuild=rebuild,
        mixes_examples=any(part.mixes_examples for part in parts),
        holds_deltas=holds_deltas,
    )
