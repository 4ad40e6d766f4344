"""The likeliest ids after a prompt, by GPT-2 from a safetensors file with Hugging Face's names."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generating
import jax
import jax.numpy as jnp
import numpy as np
import options
from decoder import Sizes

HEAD = 64  # features of a head of every GPT-2
# A mask of the positions before each, which files of older versions hold.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")

Tree = Any
Arrays = dict[str, np.ndarray]


class WeightsError(ValueError):
    """A file that is not GPT-2's weights; the message says all of why."""


def main() -> None:
    given = parser().parse_args()
    sizes, params = load(given.file, given.head_size)
    ids = given.prompt_ids
    if max(ids) >= sizes.vocabulary:
        raise WeightsError(
            f"--prompt-ids: takes ids from 0 to {sizes.vocabulary - 1}, got {max(ids)}"
        )
    key = jax.random.key(0)  # one id to draw from: nothing is random
    print(*generating.write(sizes, params, np.array([ids]), given.count, key, top_k=1)[0])


def load(path: str | Path, head_size: int = HEAD) -> tuple[Sizes, Tree]:
    """GPT-2's sizes, read off a file, and its parameters for ``decoder.decoder``.

    With ``decoder.model_and_loss`` the parameters are ``(these, {"weight": None})``. Names may
    begin with ``transformer.``. What the file has in half precision becomes float32. A
    ``lm_head.weight`` is the embedding once more.

    Raises:
      WeightsError: for a file that is not safetensors, or not whole; else with all tensors that
        are missing, unknown or of another shape. Nothing is loaded then.
    """
    arrays = _read(path)
    sizes = _sizes(path, arrays, head_size)
    wanted = _wanted(sizes)
    given = {name: _told(array) for name, array in arrays.items()}
    problems = [
        f"  {name}: the file has {given.get(name, 'none')}, GPT-2 of these sizes takes "
        f"{wanted.get(name, 'none')}"
        for name in {**wanted, **given}
        if given.get(name) != wanted.get(name)
    ]
    if problems:
        raise WeightsError(f"{path}: does not hold GPT-2's weights:\n" + "\n".join(problems))
    return sizes, _params(sizes, arrays)


def _read(path: str | Path) -> Arrays:
    """The tensors of a file by name, without the prefix and what is no weight."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: takes a whole safetensors file: {error}") from None
    arrays = {name.removeprefix("transformer."): _wide(array) for name, array in arrays.items()}
    head, embedding = arrays.get("lm_head.weight"), arrays.get("wte.weight")
    if head is not None and embedding is not None and np.array_equal(head, embedding):
        del arrays["lm_head.weight"]
    return {name: array for name, array in arrays.items() if not BUFFER.fullmatch(name)}


def _wide(array: np.ndarray) -> np.ndarray:
    half = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(np.float32) if half else array


def _told(array: np.ndarray) -> Any:
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.shape if floating else f"{array.dtype}{array.shape}"


def _sizes(path: str | Path, arrays: Arrays, head_size: int) -> Sizes:
    tables = [arrays.get(name, np.empty(())) for name in ("wte.weight", "wpe.weight")]
    layers = {int(name.split(".")[1]) for name in arrays if re.match(r"h\.\d+\.", name)}
    if not layers or any(table.ndim != 2 for table in tables):
        raise WeightsError(
            f"{path}: takes GPT-2's weights, with wte.weight, wpe.weight and h.0.ln_1.weight, got "
            f"{len(arrays)} tensors: {', '.join([*arrays][:5])}{', …' * (len(arrays) > 5)}"
        )
    (vocabulary, features), (positions, _) = (table.shape for table in tables)
    if features % head_size:
        raise WeightsError(
            f"{path}: takes features that heads of {head_size} divide, got {features}"
        )
    return Sizes(vocabulary, len(layers), features // head_size, features, positions)


def _wanted(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors by name; a matrix is ``(in, out)``."""
    d = sizes.features
    matrices = {
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (d, 4 * d),
        "mlp.c_proj": (4 * d, d),
    }
    shapes = {"wte.weight": (sizes.vocabulary, d), "wpe.weight": (sizes.positions, d)}
    for i in range(sizes.layers):
        for name, shape in ({"ln_1": (d,), "ln_2": (d,)} | matrices).items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def _params(sizes: Sizes, arrays: Arrays) -> Tree:
    """The decoder's parameters: matrices ``(out, in)``, those of all layers one behind another."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([arrays[f"h.{i}.{name}"] for i in range(sizes.layers)])

    def norm(name: str, of: Callable[[str], np.ndarray]) -> Tree:
        return {"scale": of(f"{name}.weight"), "bias": of(f"{name}.bias")}

    def dense(name: str) -> Tree:
        return {
            "weight": stacked(f"{name}.weight").swapaxes(1, 2),
            "bias": stacked(f"{name}.bias"),
        }

    together = dense("attn.c_attn")
    parts = {name: np.split(array, 3, axis=1) for name, array in together.items()}
    heads = {
        name: {"weight": weight, "bias": bias}
        for name, weight, bias in zip(("query", "key", "value"), parts["weight"], parts["bias"])
    }
    heads["output"] = dense("attn.c_proj")
    attention = norm("ln_1", stacked), heads, ()
    mlp = norm("ln_2", stacked), dense("mlp.c_fc"), (), dense("mlp.c_proj"), ()
    tables = {"weight": arrays["wte.weight"]}, {"weight": arrays["wpe.weight"]}
    blocks = (attention, ()), (mlp, ())
    return jax.tree.map(jnp.asarray, (*tables, (), blocks, norm("ln_f", arrays.__getitem__)))


def parser() -> argparse.ArgumentParser:
    it = options.Parser(__doc__, needs=("safetensors",))
    it.add_argument("file", type=Path, metavar="FILE", help="such as model.safetensors")
    identity = options.whole(0, up_to=10**9)
    it.add_argument(
        "--prompt-ids", type=identity, nargs="+", metavar="N", required=True, help="what is read"
    )
    it.takes("--count", options.whole(up_to=10**6), 20, "how many ids to print")
    it.takes("--head-size", options.whole(up_to=10**6), HEAD, "features of a head")
    return it


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
