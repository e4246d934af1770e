"""The mesh, its errors, and where parameters and batches lie on it."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from esolm_jax import config as config_lib
from esolm_jax.config import default_config
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.model import build
from esolm_jax.model import transformer as model
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding

pytestmark = pytest.mark.fast_compile

MODELS = {
    "dit": dict(cond_width=8),
    "ar": dict(cond_width=0),
    "llama": dict(cond_width=0, style="llama", kv_heads=2),
    "llama_with_time": dict(cond_width=8, style="llama"),
    "gpt2": dict(cond_width=0, style="gpt2", qkv_bias=True, max_positions=8),
    "qwen3": dict(cond_width=0, style="llama", qk_norm=True, attention_width=32),
}


def mesh_config(**axes):
    """config.mesh with these axes (others 1)."""
    mesh = default_config().mesh
    mesh.update({"data": 1} | axes)
    return mesh


def make_mesh(**axes):
    return sharding.make_mesh(mesh_config(**axes))


def shapes(name):
    config = ModelConfig(vocab_size=32, width=16, blocks=2, heads=4, **MODELS[name])
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def names(tree):
    return {
        "/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


# The mesh.


@pytest.mark.parametrize(
    ("axes", "devices", "sizes"),
    [
        (dict(data=-1), 8, (8, 1, 1, 1)),
        (dict(data=1), 1, (1, 1, 1, 1)),
        (dict(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2, 1)),
        (dict(data=4, sequence=-1), 4, (4, 1, 1, 1)),
        (dict(data=2, fsdp=2, tensor=3, sequence=2), 24, (2, 2, 3, 2)),
    ],
)
def test_mesh_shape(axes, devices, sizes):
    found = sharding.mesh_shape(mesh_config(**axes), devices)
    assert tuple(found) == sharding.AXES and tuple(found.values()) == sizes


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        (dict(data=3, tensor=2), "must multiply to the 8 devices, not to 6"),
        (dict(data=16), "must multiply to the 8 devices, not to 16"),
        (dict(data=-1, fsdp=3), "must multiply to a divisor of the 8 devices, not to 3"),
        (dict(data=-1, fsdp=2, sequence=-1), "must have at most one axis of -1"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_told(axes, told):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | axes
    said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    with pytest.raises(UserError) as error:
        make_mesh(**axes)
    assert str(error.value) == f"config.mesh ({said}): {told}"


def test_mesh_of_all_devices_or_of_the_first():
    mesh = make_mesh(data=2, fsdp=2, tensor=-1)
    assert mesh.axis_names == sharding.AXES and dict(mesh.shape)["tensor"] == 2
    assert list(mesh.devices.flat) == jax.devices()
    assert list(make_mesh(data=-1, devices=3).devices.flat) == jax.devices()[:3]
    given = sharding.make_mesh(mesh_config(data=-1), jax.devices()[4:6])
    assert list(given.devices.flat) == jax.devices()[4:6]
    with pytest.raises(UserError, match=r"config\.mesh\.devices=9: must be at most 8"):
        make_mesh(data=-1, devices=9)


class Chip:
    """As much of a TPU as make_mesh looks at before it places anything."""

    platform = "tpu"

    def __init__(self, slice_index):
        self.slice_index = slice_index


def test_data_goes_over_the_slices():
    chips = [Chip(i // 4) for i in range(12)]
    with pytest.raises(UserError, match=r"config\.mesh\.data=4: .* multiple of the 3 slices"):
        sharding.make_mesh(mesh_config(data=4, fsdp=3), chips)


def test_every_process_has_a_device_of_the_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # the devices are of one
    with pytest.raises(UserError, match="config.mesh.devices=3: .* 1 of the 2 processes"):
        make_mesh(data=-1, devices=3)
    assert sharding.make_mesh(mesh_config(data=-1), jax.devices()).size == 8


def test_mesh_is_described():
    assert sharding.describe(make_mesh(data=1, devices=1)) == "1 cpu device"
    said = "8 cpu devices (data=4, tensor=2)"
    assert sharding.describe(make_mesh(data=4, tensor=2)) == said


def test_row_shards():
    assert sharding.num_row_shards(make_mesh(data=2, fsdp=2, tensor=2)) == 4


# Parameters.


def test_table_and_models_name_the_same_parameters():
    assert set().union(*(names(shapes(name)) for name in MODELS)) == set(sharding.PARAMETERS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_lie_as_the_table_says(name):
    mesh = make_mesh(fsdp=2, tensor=2, devices=4)
    params = shapes(name)
    found = names(sharding.parameters(mesh, params))
    assert found.keys() == names(params).keys()
    for path, leaf in names(params).items():
        axes = sharding.PARAMETERS[path]
        assert len(axes) == leaf.ndim
        over = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
        assert found[path].spec == P(*(over.get(axis) for axis in axes))
        parts = [2 if axis else 1 for axis in axes]
        part = tuple(size // n for size, n in zip(leaf.shape, parts, strict=True))
        assert found[path].shard_shape(leaf.shape) == part


def test_large_parameters_are_split_and_all_alike():
    """Per device no more than 1/8 of what is large, over fsdp and tensor together."""
    mesh = make_mesh(fsdp=4, tensor=2)
    params = names(shapes("llama"))
    for path, where in names(sharding.parameters(mesh, shapes("llama"))).items():
        size = np.prod(params[path].shape)
        part = np.prod(where.shard_shape(params[path].shape))
        assert part == (size if "norm" in path else size / 8)


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        (dict(fsdp=3, devices=3), "config.mesh.fsdp=3: must divide 16, the `embed` dimension of "),
        (
            dict(tensor=8),
            r"config.mesh.tensor=8: .* 2, the `heads` .* blocks/qkv/kernel \(2, 16, 2, 4, 4\)",
        ),
    ],
)
def test_dimension_that_does_not_divide_is_told(axes, told):
    with pytest.raises(UserError, match=told):
        sharding.parameters(make_mesh(**axes), shapes("llama"))


def test_abstract_arrays_are_placed():
    mesh = make_mesh(fsdp=2, devices=2)
    config = ModelConfig(vocab_size=32, width=16, blocks=2, heads=4, cond_width=0)
    where = sharding.parameters(mesh, shapes("ar"))
    found = sharding.abstract(lambda: model.init(config, jax.random.key(0)), where)
    for a, s, place in zip(*map(jax.tree.leaves, (found, shapes("ar"), where)), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (s.shape, s.dtype, place)


# What the mesh splits, in the config.


@pytest.mark.parametrize(
    ("fields", "mesh", "told"),
    [
        ({}, dict(tensor=3), "config.model.heads=8: must be a multiple of config.mesh.tensor=3"),
        (
            {"model.kv_heads": 2},
            dict(tensor=4),
            "config.model.kv_heads=2: must be a multiple of config.mesh.tensor=4",
        ),
        (
            {"data.seq_len": 12},
            dict(sequence=8),
            "config.data.seq_len=12: must be a multiple of config.mesh.sequence=8",
        ),
    ],
)
def test_config_that_does_not_divide_by_the_mesh_is_told(fields, mesh, told):
    config = default_config()
    config.update_from_flattened_dict(fields)
    sizes = dict.fromkeys(sharding.AXES, 1)
    config_lib.validate_mesh(config, sizes)
    with pytest.raises(UserError, match=re.escape(told)):
        config_lib.validate_mesh(config, sizes | mesh)


@pytest.mark.parametrize(("kind", "home"), [("flash", "GPU"), ("cudnn", "GPU"), ("splash", "TPU")])
def test_a_kernel_for_other_devices_is_told(kind, home):
    config = default_config()
    config.model.attention = kind
    told = f"config.model.attention='{kind}': must be an implementation for CPUs, not {home}s"
    with pytest.raises(UserError, match=told):
        build.build_model(config, planned_tokenizer(config), make_mesh(data=-1))


def test_what_cudnn_does_not_take_is_told(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    config = default_config()
    config.model.attention = "cudnn"
    told = "config.model.dtype='float32': must be bfloat16, because config.model.attention='cudnn'"
    with pytest.raises(UserError, match=told):
        build.build_model(config, planned_tokenizer(config), make_mesh(data=-1))
    config.model.update({"dtype": "bfloat16", "width": 512, "heads": 2})
    with pytest.raises(UserError, match="must be another for heads of width 256, because cuDNN's"):
        build.build_model(config, planned_tokenizer(config), make_mesh(data=-1))


# Batches.


def test_batch_is_put_where_its_rows_belong():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.integers(0, 9, (8, 5)).astype(np.int32),
        "valid": rng.random((8, 5)) < 0.5,
    }
    assert sharding.local_rows(mesh, 8) == list(range(8))
    put = sharding.put_batch(batch, mesh, 8)
    assert put.keys() == batch.keys()
    for name, array in put.items():
        assert array.dtype == batch[name].dtype
        assert array.sharding.is_equivalent_to(sharding.rows(mesh), 2)
        np.testing.assert_array_equal(array, batch[name])
        for shard in array.addressable_shards:
            assert shard.data.shape == (2, 5)  # two rows, whole, on each of the tensor axis
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])


def test_constrain_needs_a_mesh():
    mesh = make_mesh(data=4, tensor=2)
    array = np.zeros((8, 6), np.float32)
    assert sharding.constrain(None, array, "rows", None) is array
    out = jax.jit(lambda a: sharding.constrain(mesh, a, "rows", "mlp"))(array)
    assert out.sharding.shard_shape(out.shape) == (2, 3)
