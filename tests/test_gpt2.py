"""GPT-2's weights from files, beside the logits of transformers."""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_bp as bp

EXAMPLES = Path(__file__).parent.parent / "examples"
REFERENCE = Path(__file__).parent / "reference" / "gpt2.npz"


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@functools.cache
def reference():
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


def weights(prefix="", dtype=np.float64):
    names = {name: name.removeprefix("weights/") for name in reference() if "/" in name}
    return {prefix + short: reference()[name].astype(dtype) for name, short in names.items()}


@pytest.fixture
def file(tmp_path):
    """Writes tensors to a safetensors file."""
    save = pytest.importorskip("safetensors.numpy").save_file

    def write(arrays):
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save(contiguous, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2s_weights_give_the_logits_that_transformers_gives(prefix, file):
    import generating
    import gpt2
    from decoder import model_and_loss

    buffers = {f"{prefix}h.{i}.attn.bias": np.ones((1, 1, 12, 12), bool) for i in range(2)}
    buffers |= {f"{prefix}h.1.attn.masked_bias": np.array(-1e4)}
    path = file(weights(prefix) | buffers | {"lm_head.weight": weights()["wte.weight"]})
    with jax.enable_x64(True):
        sizes, params = gpt2.load(path, head_size=4)
        assert (sizes.layers, sizes.heads, sizes.vocabulary, sizes.positions) == (2, 4, 50, 12)
        model, loss = model_and_loss(sizes)
        ids, pair = jnp.asarray(reference()["ids"]), (params, {"weight": None})
        found = model.apply(params, ids) @ params[0]["weight"].T
        np.testing.assert_allclose(found, reference()["logits"], rtol=0, atol=1e-10)
        read = generating.read(sizes, params, ids, generating.empty(sizes, params, 2)).logits
        np.testing.assert_allclose(read, reference()["logits"], rtol=0, atol=1e-10)
        if prefix:
            grads = (
                jax.jit(bp.grad(model, loss, method=method))(pair, ids, jnp.roll(ids, 1, axis=1))
                for method in ("manual", "autodiff")
            )
            near = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
            jax.tree.map(near, *grads)


def test_half_precision_is_read_as_float32(file):
    import gpt2

    exact = weights(dtype=np.float16)  # of which the reference's weights are
    _, params = gpt2.load(file(exact), head_size=4)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(params[0]["weight"], exact["wte.weight"])
    _, params = gpt2.load(file(weights(dtype=jnp.bfloat16)), head_size=4)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_all_that_a_file_lacks_and_has_too_much_is_named_at_once(file):
    import gpt2

    arrays = weights()
    del arrays["h.0.attn.c_attn.bias"]
    arrays["h.1.mlp.c_fc.weight"] = arrays["h.1.mlp.c_fc.weight"].T
    arrays["h.1.ln_1.bias"] = np.arange(16)
    arrays["score.weight"] = np.ones((2, 16))
    arrays["lm_head.weight"] = arrays["wte.weight"] + 1
    with pytest.raises(gpt2.WeightsError) as told:
        gpt2.load(file(arrays), head_size=4)
    first, *lines = str(told.value).splitlines()
    assert first.endswith("model.safetensors: does not hold GPT-2's weights:")
    takes = "GPT-2 of these sizes takes"
    assert sorted(lines) == [
        f"  h.0.attn.c_attn.bias: the file has none, {takes} (48,)",
        f"  h.1.ln_1.bias: the file has int64(16,), {takes} (16,)",
        f"  h.1.mlp.c_fc.weight: the file has (64, 16), {takes} (16, 64)",
        f"  lm_head.weight: the file has (50, 16), {takes} none",
        f"  score.weight: the file has (2, 16), {takes} none",
    ]


def test_files_that_are_no_gpt2_are_told(file, tmp_path):
    import gpt2

    def refused(message, path, **given):
        with pytest.raises(gpt2.WeightsError, match=f"^{re.escape(str(path))}: {message}"):
            gpt2.load(path, **given)

    refused("takes features that heads of 64 divide, got 16", file(weights()))
    refused("takes GPT-2's weights, .* got 1 tensors: weight$", file({"weight": np.ones(2)}))
    path = file(weights())
    path.write_bytes(path.read_bytes()[:-10])
    refused("takes a whole safetensors file: ", path, head_size=4)
    path.write_bytes(b"no safetensors")
    refused("takes a whole safetensors file: ", path)
    with pytest.raises(FileNotFoundError):
        gpt2.load(tmp_path / "none.safetensors")


def test_gpt2_prints_the_likeliest_ids(file, monkeypatch, capsys):
    import gpt2

    path, prompt = file(weights()), reference()["ids"][0, :5].tolist()
    given = ["gpt2.py", str(path), "--head-size=4", "--count=1", "--prompt-ids", *map(str, prompt)]
    monkeypatch.setattr(sys, "argv", given)
    gpt2.main()
    assert int(capsys.readouterr().out) == reference()["logits"][0, 4].argmax()
    monkeypatch.setattr(sys, "argv", [*given, "50"])
    with pytest.raises(gpt2.WeightsError, match="takes ids from 0 to 49, got 50"):
        gpt2.main()


def test_gpt2s_size_is_gpt2s():
    import gpt
    from decoder import shapes_of

    sizes, _ = gpt.SIZES["gpt2"]
    shapes = shapes_of(gpt.dataclasses.replace(sizes, vocabulary=50_257))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808
