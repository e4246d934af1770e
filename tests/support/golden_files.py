"""The committed vectors of the published implementation, and models with their weights."""

import functools
import pathlib

import numpy as np

from esolm_jax.interop.published import names as published_names

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"
TOLERANCE = 2e-5  # absolute, float32
HEADS = 4


@functools.cache
def vectors(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def model(weights: str) -> published_names.PublishedModel:
    return published_names.load(vectors(weights), HEADS)


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)
