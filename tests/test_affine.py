"""The algebra of affines, as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.affine import Affine

numbers = st.floats(-1e3, 1e3, allow_subnormal=False)


@st.composite
def affines(draw, channels=3):
    return Affine(
        draw(hnp.arrays(np.float64, channels, elements=numbers)),
        draw(hnp.arrays(np.float64, channels, elements=numbers)),
    )


@given(affines(), affines(), hnp.arrays(np.float64, (2, 3), elements=numbers))
def test_then_is_composition(first, second, x):
    np.testing.assert_allclose(first.then(second)(x), second(first(x)), rtol=1e-12, atol=1e-6)


@given(affines(), affines(), affines())
def test_then_is_associative(a, b, c):
    left, right = a.then(b).then(c), a.then(b.then(c))
    np.testing.assert_allclose(left.scale, right.scale, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(left.shift, right.shift, rtol=1e-9, atol=1e-3)


@given(affines(), st.integers(0, 2))
def test_spread_and_gathered_are_inverse(affine, axis):
    sizes = [2, 4, 5]
    sizes[axis] = 3
    flat = affine.spread(tuple(sizes), axis)
    x = np.random.default_rng(0).normal(size=sizes)
    np.testing.assert_array_equal(flat(x.ravel()), affine(x, axis).ravel())
    back = flat.gathered(tuple(sizes), axis)
    np.testing.assert_array_equal(back.scale, affine.scale)
    np.testing.assert_array_equal(back.shift, affine.shift)


def test_gathered_refuses_what_differs_by_position():
    assert Affine(np.arange(6.0), np.zeros(6)).gathered((2, 3), 1) is None


def test_predicates():
    assert Affine([1.0, 2.0], [0.0, 0.0]).is_scaling
    assert not Affine([1.0, 2.0], [0.0, 1e-300]).is_scaling
    assert Affine([1.0, 0.0], [0.0, 0.0]).keeps_order
    assert not Affine([1.0, -1e-9], [0.0, 0.0]).keeps_order
    assert Affine([1.0, 1.0], [0.0, 0.0]).is_identity
    assert Affine([2.0, 2.0], [1.0, 1.0]).is_uniform
    assert not Affine([2.0, 2.0], [1.0, 1.5]).is_uniform


def test_the_inverse_undoes_what_can_be_undone():
    affine = Affine([2.0, -0.5], [1.0, 3.0])
    assert affine.then(affine.inverse()).is_close(Affine([1.0, 1.0], [0.0, 0.0]))
    for collapsed in (0.0, 1e-310):
        found = Affine([2.0, collapsed], [1.0, 3.0])
        assert found.inverse() is None
        assert found.inverse_is_missing.tolist() == [False, True]
    assert not Affine([1.0, np.nan], [0.0, 0.0]).is_finite
    assert Affine([1.0], [-3.0]).largest_shift == 3.0


@pytest.mark.parametrize(("scale", "shift"), [([[1.0]], [[1.0]]), ([1.0, 2.0], [1.0])])
def test_shapes_are_checked(scale, shift):
    with pytest.raises(ValueError, match="vectors"):
        Affine(scale, shift)
