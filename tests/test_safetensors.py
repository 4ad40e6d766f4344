"""Parameters to and from safetensors files."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_bp as bp

safetensors = pytest.importorskip("safetensors.numpy")

MODELS = {
    "chain": bp.chain(bp.dense(4), bp.relu, bp.dense(2, bias=False)),
    "repeat": bp.chain(bp.repeat(bp.residual(bp.chain(bp.dense(3), bp.tanh)), 2), bp.dense(1)),
    "tied": bp.tied(bp.chain(bp.dense(3), bp.dense(3)), {(1, "weight"): (0, "weight")}),
    "no parameters": bp.tanh,
}


def start(model, dtype=jnp.float32):
    return model.init(jax.random.key(0), jax.ShapeDtypeStruct((3,), dtype))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda leaf: leaf.dtype, a) == jax.tree.map(lambda leaf: leaf.dtype, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("model", MODELS)
def test_parameters_come_back_as_they_were(model, dtype, tmp_path):
    params = start(MODELS[model], dtype)
    bp.save_params(tmp_path / "model.safetensors", params)
    assert_same(bp.load_params(tmp_path / "model.safetensors", like=params), params)


def test_shapes_suffice_to_load(tmp_path):
    model = MODELS["chain"]
    bp.save_params(tmp_path / "file", start(model))
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(1), x)
    assert_same(bp.load_params(tmp_path / "file", like=like), start(model))


def test_names_are_paths(tmp_path):
    bp.save_params(tmp_path / "file", start(MODELS["chain"]))
    held = safetensors.load_file(tmp_path / "file")
    assert {name: array.shape for name, array in held.items()} == {
        "0.weight": (4, 3),
        "0.bias": (4,),
        "2.weight": (2, 4),
    }


def test_arrays_of_any_memory_layout_are_written_as_they_read(tmp_path):
    grid = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    arrays = {
        "transposed": grid.T,
        "fortran": np.asfortranarray(grid),
        "strided": grid[::2, ::3],
        "reversed": grid[::-1],
        "broadcast": np.broadcast_to(grid[0], (3, 6)),
        "big-endian": grid.astype(">f4"),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 2), np.float32),
    }
    bp.save_params(tmp_path / "file", arrays)
    read = bp.load_params(
        tmp_path / "file", like=jax.tree.map(lambda a: jnp.zeros(a.shape), arrays)
    )
    jax.tree.map(np.testing.assert_array_equal, read, arrays)


def test_a_file_of_another_model_is_refused_with_every_difference(tmp_path):
    path = tmp_path / "model.safetensors"
    bp.save_params(path, start(MODELS["chain"]))
    before = path.read_bytes()
    like = {
        "0": {"weight": jnp.zeros((4, 5)), "bias": jnp.zeros(4, jnp.bfloat16)},
        "1": {"scale": jnp.zeros(2)},
    }
    with pytest.raises(bp.ModelError) as error:
        bp.load_params(path, like=like)
    assert str(error.value).splitlines() == [
        f"{path}: does not hold this model's parameters:",
        "  0.bias: the file has float32(4,), the model takes bfloat16(4,)",
        "  0.weight: the file has float32(4, 3), the model takes float32(4, 5)",
        "  1.scale: the file has none, the model takes float32(2,)",
        "  2.weight: the file has float32(2, 4), the model takes none",
    ]
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_a_file_that_is_not_whole_is_named_and_left_alone(kept, tmp_path):
    path = tmp_path / "model.safetensors"
    params = start(MODELS["chain"])
    bp.save_params(path, params)
    path.write_bytes(path.read_bytes()[:kept])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path}: expected a safetensors file with 3 tensors"):
        bp.load_params(path, like=params)
    assert path.read_bytes() == before


def test_a_file_of_another_kind_or_none_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("These are notes, and not tensors at all.")
    with pytest.raises(ValueError, match=r"notes.txt: expected .* got 40 bytes"):
        bp.load_params(path, like={})
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        bp.load_params(tmp_path / "nowhere", like={})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    bp.save_params(path, start(MODELS["chain"]))
    before = path.read_bytes()

    def fails(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        bp.save_params(path, start(MODELS["repeat"]))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX systems")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_of_any_new_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        bp.save_params(tmp_path / "file", start(MODELS["chain"]))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX systems")
def test_a_file_written_again_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    bp.save_params(path, start(MODELS["chain"]))
    path.chmod(0o640)
    bp.save_params(path, start(MODELS["repeat"]))
    assert path.stat().st_mode & 0o777 == 0o640


def test_two_parameters_of_one_name_are_refused(tmp_path):
    with pytest.raises(bp.ModelError, match=r"got 'a\.b' twice"):
        bp.save_params(tmp_path / "file", {"a": {"b": jnp.zeros(1)}, "a.b": jnp.zeros(1)})
    assert not (tmp_path / "file").exists()
