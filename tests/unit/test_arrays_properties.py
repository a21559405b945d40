"""Any array goes in and comes out the same: source, bytes, DeviceArray, and back by each protocol."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.arrays import ARRAY_TYPES, ArrayType, DeviceArray, source
from devmem_tcp.arrays.layout import Order, strides_of

types = st.sampled_from(list(ARRAY_TYPES.values()))
shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
orders: st.SearchStrategy[Order] = st.sampled_from(["C", "F"])


@st.composite
def arrays(draw: st.DrawFn) -> tuple[ArrayType, npt.NDArray[Any]]:
    """A type, and an array of it: any bits, any order of axes, sliced or whole."""
    type_, shape = draw(types), draw(shapes)
    seed = draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).integers(0, 256, type_.itemsize * math.prod(shape), np.uint8)
    if type_.name == "bool":
        bits &= 1
    whole = bits.view(type_.numpy()).reshape(shape)
    axes = draw(st.permutations(range(len(shape))))
    steps = tuple(slice(None, None, draw(st.sampled_from([1, 1, 1, 2, -1]))) for _ in shape)
    return type_, whole.transpose(axes)[steps] if shape else whole


@given(arrays())
def test_round_trip(made: tuple[ArrayType, npt.NDArray[Any]]) -> None:
    type_, values = made
    taken = source(values, copy=True)
    assert (taken.type, taken.shape, taken.data.nbytes) == (type_, values.shape, values.nbytes)

    received = DeviceArray(memoryview(bytearray(taken.data)), taken.type, taken.shape, taken.order)
    for back in (received.numpy(), np.asarray(received)):
        assert back.dtype == values.dtype
        assert back.shape == values.shape
        assert back.tobytes() == values.tobytes()  # both in C order, bit by bit: NaN may be anywhere
    if type_.in_numpy:
        assert np.from_dlpack(received).tobytes() == values.tobytes()

    again = source(received)
    assert (again.type, again.shape, again.order) == (taken.type, taken.shape, taken.order)
    assert again.data == taken.data


@given(arrays())
def test_copied_only_where_it_must_be(made: tuple[ArrayType, npt.NDArray[Any]]) -> None:
    _, values = made
    taken = source(values, copy=True)
    contiguous = values.flags.c_contiguous or values.flags.f_contiguous
    shared = np.shares_memory(np.frombuffer(taken.data, np.uint8), values)
    assert shared is (contiguous and values.size > 0)
    assert taken.order == ("F" if values.flags.f_contiguous and not values.flags.c_contiguous else "C")


@given(shapes, orders)
def test_strides(shape: tuple[int, ...], order: Order) -> None:
    """They number the elements from 0 on, without a gap."""
    strides = strides_of(shape, order)
    places = [sum(map(int.__mul__, index, strides)) for index in np.ndindex(*shape)]
    assert sorted(places) == list(range(math.prod(shape)))
