"""Numbers that are not finite: refused in weights, never trained on, never saved, never ranked."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esolm_jax import config as config_lib
from esolm_jax import results
from esolm_jax.errors import UserError
from esolm_jax.evaluation import bounds
from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.evaluation.metric import check_finite
from esolm_jax.model import finite
from esolm_jax.training import metrics
from esolm_jax.training.checkpoint import OnDisk

# The check of a tree of arrays.


def on_one_device(array):
    return jnp.asarray(array)


def on_eight_devices(array):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec("fsdp")))


def as_bfloat16(array):
    return array.astype(ml_dtypes.bfloat16)


def transposed(array):
    return np.asfortranarray(array)[:, ::2]


@pytest.fixture
def on_disk(tmp_path):
    def write(array):
        name = tmp_path / str(len(list(tmp_path.iterdir())))
        file = OnDisk(name, np.float32, "w+", shape=array.shape)
        file[:] = array
        return file

    return write


PLACES = [np.asarray, on_one_device, on_eight_devices, as_bfloat16, transposed, "on_disk"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_the_first_tensor_that_is_not_finite_is_named(place, bad, request, monkeypatch):
    monkeypatch.setattr(finite, "_PIECE", 16)  # several pieces an array
    place = request.getfixturevalue(place) if isinstance(place, str) else place
    arrays = [np.ones((8, 6), np.float32) for _ in range(4)]
    arrays[1][-1, -2] = arrays[2][0, 0] = bad
    a, b, c, d = (place(array) for array in arrays)
    finite.check_finite({"a": a, "d": [d], "n": np.array(3)}, "FILE")
    with pytest.raises(UserError, match=r"^FILE: tensor b/in holds NaN.* \(2 of its 5 tensors"):
        finite.check_finite({"a": a, "b": {"in": b}, "c": (c,), "d": [d], "n": np.array(3)}, "FILE")


def test_a_float64_beyond_float32_is_not_finite():
    with pytest.raises(UserError, match="tensor wide"):
        finite.check_finite({"wide": np.array([1.0, 1e39])}, "FILE")


def test_empty_arrays_and_trees_are_finite():
    finite.check_finite({"none": np.zeros((0, 3), np.float32), "here": jnp.zeros((0,))}, "FILE")
    finite.check_finite({}, "FILE")


# Files of results.


def test_json_is_strict():
    value = {
        "nan": math.nan,
        "rows": [(1, math.inf), {"low": -math.inf, "text": "NaN", "yes": True, "none": None}],
        "numpy": [np.float32("nan"), np.float64(0.5), np.int64(3), np.bool_(True)],
        "jax": jnp.array(jnp.inf),
        "array": np.array([[1.0, np.nan]]),
        "bfloat16": ml_dtypes.bfloat16("inf"),
    }

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(results.dumps(value, indent=2), parse_constant=refuse) == {
        "nan": None,
        "rows": [[1, None], {"low": None, "text": "NaN", "yes": True, "none": None}],
        "numpy": [None, 0.5, 3, True],
        "jax": None,
        "array": [[1.0, None]],
        "bfloat16": None,
    }


# Configs saved before there was such a field.


def test_a_config_saved_by_an_older_version_is_still_valid():
    saved = config_lib.default_config().to_dict()
    del saved["train"]["on_non_finite"]
    config = config_lib.from_saved(saved)
    config_lib.validate(config)
    assert config == config_lib.default_config()
    del saved["train"]["keep_best"]  # of all versions: no default takes its place
    with pytest.raises(UserError, match="keep_best: missing"):
        config_lib.validate(config_lib.from_saved(saved))


# Figures.


def estimate(nll):
    return Estimate(nll, 0.0, 1, 1, np.array([nll]), np.array([1]))


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert estimate(1e6).perplexity == math.inf
    assert math.isnan(estimate(math.nan).perplexity)
    assert estimate(2.0).perplexity == math.exp(2)


@pytest.mark.parametrize("bound", ["nelbo", "exact", "importance_weighted"])
@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_a_bound_that_is_not_finite_is_no_result(nll, bound):
    with pytest.raises(UserError, match=f"^{bound}: is {nll}, although all weights are finite"):
        check_finite(bounds.result(bound, estimate(nll), {}))


@pytest.mark.filterwarnings("error")
def test_the_learning_curve_leaves_out_what_is_not_finite(tmp_path):
    losses = ["3.0", "null", "NaN", "Infinity", "6e9", "2.0"]
    lines = [f'{{"step": {i}, "loss": {loss}}}' for i, loss in enumerate(losses)]
    lines += [f'{{"step": {i}, "validation_nelbo": {loss}}}' for i, loss in enumerate(losses)]
    (tmp_path / metrics.FILE).write_text("\n".join(lines) + "\n")
    assert metrics.plot_learning_curve(tmp_path).stat().st_size > 0
