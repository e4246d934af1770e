"""The registry of families, schedules, sources and metrics."""

import types

import pytest

from esolm_jax.registry import Registry

pytestmark = pytest.mark.fast_compile


def test_entries_can_be_added_and_removed():
    names = ["red"]
    colours = Registry("colour", {"red": 1}, names)
    green = types.SimpleNamespace(name="green")
    assert colours.register(green) is green and colours.register(3, "blue") == 3
    assert colours == {"red": 1, "green": green, "blue": 3} and names == list(colours)
    colours.unregister("green")
    assert colours == {"red": 1, "blue": 3} and names == list(colours)
    with pytest.raises(KeyError):
        colours.unregister("green")


def test_a_name_is_registered_once():
    names = ["red"]
    colours = Registry("colour", {"red": 1}, names)
    with pytest.raises(ValueError, match="^colour 'red': must have a new name"):
        colours.register(2, "red")
    assert colours == {"red": 1} and names == ["red"]


def test_without_a_list_of_names():
    colours = Registry("colour", {"red": 1})
    colours.register(2, "blue")
    colours.unregister("blue")
    assert colours == {"red": 1}
    colours.unregister("red")
    assert not colours
