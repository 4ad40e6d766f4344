"""A small GPT in Flax, and the same with two lines changed to the functions of ``bp.ops``.

The model is written as any Flax network is, its loss in optax. The two lines: the attention's
``attention_fn``, and the loss, which takes the table of the embedding and the last hidden vectors
in place of the logits. Both have their backward passes by hand.

Prints of the gradient of one batch, before and after: the time of one call (median of calls that
alternate), the temporary memory of the compiled function, and the largest difference of the two
gradients, as a share of the largest number in each parameter's.

    python examples/flax_gpt.py
    python examples/flax_gpt.py --length 1024 --batch 2 --vocabulary 32000
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import options

from functional_bp import ops


def attention(query, key, value, **_):
    """``bp.ops.attention`` in the place of Flax's ``dot_product_attention``."""
    return ops.attention(query, key, value, causal=True)


class Block(nn.Module):
    """Attention and a perceptron, each on a normed copy that is added."""

    heads: int
    by_ops: bool

    @nn.compact
    def __call__(self, x):  # (batch, t, features)
        how = {"attention_fn": attention} if self.by_ops else {}  # the first line
        mask = None if self.by_ops else nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(self.heads, **how)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class GPT(nn.Module):
    """Ids to their mean cost as the next ones; the embedding's table is also the last layer's."""

    vocabulary: int
    features: int
    layers: int
    heads: int
    by_ops: bool = False

    @nn.compact
    def __call__(self, ids):  # (batch, t + 1) -> ()
        table = nn.Embed(self.vocabulary, self.features)
        given, wanted = ids[:, :-1], ids[:, 1:]
        positions = nn.Embed(given.shape[1], self.features, name="positions")
        x = table(given) + positions(jnp.arange(given.shape[1]))
        for _ in range(self.layers):
            x = Block(self.heads, self.by_ops)(x)
        x = nn.LayerNorm()(x)
        if self.by_ops:
            share = 1 / wanted.size  # of a position in the mean
            return ops.linear_softmax_cross_entropy(x, table.embedding, wanted, share)  # the second
        logits = table.attend(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def parser():
    it = options.Parser(__doc__, needs=())
    it.takes("--vocabulary", options.whole(2), 8192, "words")
    it.takes("--length", options.whole(), 512, "words of a sequence")
    it.takes("--batch", options.whole(), 4, "sequences")
    it.takes("--features", options.whole(), 128, "of a position, a multiple of the heads")
    it.takes("--heads", options.whole(), 4, "of attention")
    it.takes("--layers", options.whole(), 2, "of attention and perceptron")
    it.takes("--calls", options.whole(), 7, "timed calls of each")
    it.takes("--seed", options.seed, 0, "of the parameters and the words")
    return it


def compare(functions, params, ids, calls):
    """``{name: (seconds of one call, bytes of temporary memory, gradient)}``."""
    compiled = {name: jax.jit(f).lower(params, ids).compile() for name, f in functions.items()}
    gradients = {name: function(params, ids) for name, function in compiled.items()}
    seconds = {name: [] for name in compiled}
    for _ in range(calls):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(params, ids))
            seconds[name].append(time.perf_counter() - start)
    return {
        name: (
            statistics.median(seconds[name]),
            function.memory_analysis().temp_size_in_bytes,
            gradients[name],
        )
        for name, function in compiled.items()
    }


def largest_difference(gradients, others):
    """Of every parameter's, as a share of its largest number, the largest."""

    def share(a, b):
        return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-30)

    # A key's bias moves all scores of a query alike: its gradient is 0, and here rounding alone.
    shares = jax.tree_util.tree_map_with_path(
        lambda path, a, b: 0.0 if "'key']['bias" in jax.tree_util.keystr(path) else share(a, b),
        *(gradients, others),
    )
    return max(map(float, jax.tree.leaves(shares)))


def main():
    args = parser().parse_args()
    if args.features % args.heads:
        parser().error(f"--features: takes a multiple of {args.heads} heads, got {args.features}")
    key_of_params, key = jax.random.split(jax.random.key(args.seed))
    ids = jax.random.randint(key, (args.batch, args.length + 1), 0, args.vocabulary)
    sizes = (args.vocabulary, args.features, args.layers, args.heads)
    models = {"Flax alone": GPT(*sizes), "with bp.ops": GPT(*sizes, by_ops=True)}
    params = jax.jit(models["Flax alone"].init)(key_of_params, ids)
    gradients = {name: jax.grad(model.apply) for name, model in models.items()}
    found = compare(gradients, params, ids, args.calls)
    print(f"gradient of {args.batch} sequences of {args.length} words of {args.vocabulary:,}")
    for name, (seconds, size, _) in found.items():
        print(f"  {name:<12} {1e3 * seconds:9.1f} ms  {size / 2**20:9.1f} MiB")
    (before, size_before, gradient), (after, size_after, other) = found.values()
    print(
        f"  after / before {after / before:.2f} in time, {size_after / size_before:.2f} in memory; "
        f"largest difference {largest_difference(gradient, other):.1e}"
    )


if __name__ == "__main__":
    main()
