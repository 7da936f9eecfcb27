"""Kernels as blocks: every row of the table against the layer itself."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from deploykit.channels import CHANNELS, from_block, response, scale_inputs, scale_outputs, to_block
from deploykit.graph import numpy

L = keras.layers

ROWS = [
    (L.Dense(6), (4,)),
    (L.Conv1D(6, 3, groups=2), (9, 4)),
    (L.Conv2D(6, (2, 3)), (9, 8, 4)),
    (L.Conv2D(6, 3, groups=2), (9, 8, 4)),
    (L.Conv3D(6, 2), (5, 5, 5, 4)),
    (L.DepthwiseConv1D(3, depth_multiplier=2), (9, 4)),
    (L.DepthwiseConv2D(3, depth_multiplier=3), (9, 8, 4)),
    (L.Conv1DTranspose(6, 3), (9, 4)),
    (L.Conv2DTranspose(6, 3), (9, 8, 4)),
    (L.Conv3DTranspose(6, 2), (5, 5, 5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), ROWS, ids=lambda value: getattr(value, "name", ""))
def test_block_round_trip_and_scaling_match_the_layer(layer, shape):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    layer.build((None, *shape))
    (kernel,) = CHANNELS[type(layer)].kernels
    stored = numpy(layer.kernel)
    block = to_block(stored, kernel.order, getattr(layer, "groups", 1))
    np.testing.assert_array_equal(from_block(block, kernel.order, stored.shape), stored)

    plain = numpy(layer(x))
    s_in, s_out = rng.uniform(0.5, 2, x.shape[-1]), rng.uniform(0.5, 2, plain.shape[-1])
    layer.kernel.assign(from_block(scale_outputs(block, s_out), kernel.order, stored.shape))
    np.testing.assert_allclose(numpy(layer(x)), plain * s_out, rtol=1e-4, atol=1e-5)
    layer.kernel.assign(from_block(scale_inputs(block, s_in), kernel.order, stored.shape))
    scaled = numpy(layer(x / s_in.astype(np.float32)))
    np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), [row for row in ROWS if not CHANNELS[type(row[0])].transposed], ids=str)
def test_response_is_the_answer_to_a_constant(layer, shape):
    t = np.random.default_rng(2).normal(size=shape[-1])
    fresh = type(layer).from_config(layer.get_config())
    fresh.build((None, *shape))
    (kernel,) = CHANNELS[type(fresh)].kernels
    answer = numpy(fresh(np.broadcast_to(t, (1, *shape)).astype(np.float32)))
    block = to_block(numpy(fresh.kernel), kernel.order, getattr(fresh, "groups", 1))
    expected = np.broadcast_to(response(block, t), answer.shape)
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


def test_unknown_orders_are_refused():
    with pytest.raises(ValueError, match="unknown kernel order"):
        to_block(np.zeros((2, 2)), "x y")
