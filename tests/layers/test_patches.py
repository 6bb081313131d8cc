"""Unfolded convolutions: any geometry, parts of the batch, positions left out, pooled positions."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Use
from kfac_optax.capture import patches
from kfac_optax.capture.geometry import Conv, Dense, to_rows
from kfac_optax.capture.layouts import layout
from kfac_optax.capture.positions import channel_sums, reduced
from kfac_optax.estimators import block_measure
from kfac_optax.testing import dense_layer
from tests import oracles

LETTERS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@st.composite
def geometries(draw):
    n = draw(st.integers(1, 3))
    small = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(n))
    size, strides, spread, dilation = small(1, 3), small(1, 3), small(1, 2), small(1, 2)
    padding = tuple(zip(small(-1, 2), small(-1, 2)))
    window = patches.Window(size, strides, padding, dilation, spread)
    spatial = small(3, 6)
    hypothesis.assume(all(m > 0 for m in window.outputs((1, *spatial, 1))))
    return Conv(window, groups=draw(st.integers(1, 2))), spatial


def kernel_matrices(geometry, kernel):
    """`[groups, inputs, outputs]` by the layout that the parameter tree uses."""
    how = layout(geometry, kernel.shape)
    moved = kernel.reshape(how.split).transpose(how.order)
    groups = geometry.groups
    return moved.reshape(groups, -1, kernel.shape[-1] // groups)


@hypothesis.given(geometries())
@hypothesis.settings(max_examples=12, deadline=None)
def test_rows_times_matrix_is_the_convolution(case):
    geometry, spatial = case
    window, n = geometry.window, len(case[1])
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(2, *spatial, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*window.size, 4 // geometry.groups, 6)), jnp.float32)

    @jax.jit
    def compute(a, kernel):
        # padded apart: XLA's convolution is wrong on CPU where padding of both signs adds up to zero
        spread = [(*ends, d - 1) for ends, d in zip(window.padding, window.input_dilation)]
        padded = jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
        expected = jax.lax.conv_general_dilated(
            padded,
            kernel,
            window.strides,
            "VALID",
            rhs_dilation=window.kernel_dilation,
            dimension_numbers=LETTERS[n],
            feature_group_count=geometry.groups,
        )
        rows, out = to_rows(geometry, a, expected)
        got = jnp.einsum("g...p,gpq->g...q", rows, kernel_matrices(geometry, kernel))
        mean, _, _ = reduced(geometry, a, None, None)
        return rows, out, got, mean, channel_sums(geometry, a, expected, True, jnp.float32)

    rows, out, got, mean, (alpha, gamma) = jax.device_get(compute(a, kernel))
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        mean[:, :, 0], rows.mean(tuple(range(2, rows.ndim - 1))), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(alpha, rows.sum(-1) + 1, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gamma, out.sum(-1), rtol=1e-4, atol=1e-4)


WINDOW = patches.Window((3, 2), (1, 2), ((1, 1), (0, 1)), (1, 1), (1, 1))
GEOMETRY = Conv(WINDOW)


def conv_rows(x64):
    a = oracles.normal(0, (6, 4, 5, 3))
    return a, oracles.normal(1, (6, *WINDOW.outputs(a.shape), 2))


def use_of(g, inputs=18, **changes):
    layer = dense_layer(inputs, 2, bias=True)
    return Use(layer, len(g), g[..., 0].size, jnp.float64)._replace(**changes)


def dense(a, g, use, block=None):
    """The same layer written as a dense one on its patches, extracted by JAX's own function."""
    made = jax.lax.conv_general_dilated_patches(
        a, WINDOW.size, WINDOW.strides, WINDOW.padding, dimension_numbers=LETTERS[2]
    )
    offset_major = made.reshape(*made.shape[:-1], a.shape[-1], -1).swapaxes(-1, -2)
    rows = offset_major.reshape(*made.shape[:-1], -1)
    return block_measure.measure_use(Dense(), block or ko.kronecker(), rows, g, use)


def assert_factors(got, expected):
    np.testing.assert_allclose(got.inputs, expected.inputs, rtol=1e-12)
    np.testing.assert_allclose(got.outputs, expected.outputs, rtol=1e-12)


@pytest.mark.parametrize(("bytes_", "weighted"), [(1 << 27, False), (20_000, True), (1, False)])
def test_factors_are_those_of_a_dense_layer_on_the_patches(x64, monkeypatch, bytes_, weighted):
    """Also where the patches of the whole batch do not fit and are formed in parts."""
    monkeypatch.setattr(block_measure, "PATCH_BYTES", bytes_)
    a, g = conv_rows(x64)
    weights = jnp.abs(oracles.normal(2, g.shape[:-1])) if weighted else None
    use = use_of(g, weights=weights)
    got = block_measure.measure_use(GEOMETRY, ko.kronecker(), a, g, use)
    assert_factors(got, dense(a, g, use))
    positions = g[0, ..., 0].size
    if not weighted:
        # the bias counts every position
        np.testing.assert_allclose(got.inputs[0, -1, -1], positions)


def test_patches_of_the_whole_batch_are_not_formed_where_they_do_not_fit(monkeypatch):
    a = jnp.zeros((32, 16, 16, 8))
    g = jnp.zeros((32, 16, 16, 4))
    geometry = Conv(patches.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)))

    def largest(limit):
        monkeypatch.setattr(block_measure, "PATCH_BYTES", limit)
        f = lambda a, g: block_measure.measure_use(
            geometry, ko.kronecker(), a, g, use_of(g, dtype=jnp.float32)
        )
        return jax.jit(f).lower(a, g).compile().memory_analysis().temp_size_in_bytes

    whole = 32 * 16 * 16 * 9 * 8 * 4
    assert largest(1 << 30) >= whole
    assert largest(whole // 16) < whole / 2


def test_left_out_positions_are_counted_by_those_kept(x64):
    """Equal positions: leaving some out changes nothing; otherwise the kept ones are every second
    along each axis.
    """
    a, g = conv_rows(x64)
    thin = ko.kronecker(positions=4)
    got = block_measure.measure_use(GEOMETRY, thin, a, g, use_of(g))
    rows, out = to_rows(GEOMETRY, a, g, (2, 2))
    share = g[0, ..., 0].size / out[0, 0, ..., 0].size
    kept = block_measure.over_groups(ko.kronecker(), rows, out, use_of(g))
    np.testing.assert_allclose(got.inputs, share * kept.inputs, rtol=1e-12)
    np.testing.assert_allclose(got.outputs, share * kept.outputs, rtol=1e-12)
    sequence, ones = (
        oracles.normal(3, (4, 1, 3)) * jnp.ones((4, 6, 1)),
        oracles.normal(4, (4, 1, 2)) * jnp.ones((4, 6, 1)),
    )
    use = use_of(ones, inputs=3)
    all_of_them = block_measure.measure_use(Dense(), ko.kronecker(), sequence, ones, use)
    assert_factors(
        block_measure.measure_use(Dense(), ko.kronecker(positions=3), sequence, ones, use),
        all_of_them,
    )


def test_pooled_positions_count_once(x64):
    a, g = conv_rows(x64)
    use = use_of(g, rows=len(g))
    got = block_measure.measure_use(GEOMETRY, ko.kronecker(sharing="reduce"), a, g, use)
    rows, out = (x[0] for x in to_rows(GEOMETRY, a, g))
    pooled = np.concatenate([rows.mean((1, 2)), np.ones((len(a), 1))], 1)
    summed = np.asarray(out.sum((1, 2)))
    np.testing.assert_allclose(got.inputs[0], pooled.T @ pooled / len(a), rtol=1e-12)
    np.testing.assert_allclose(got.outputs[0], summed.T @ summed / len(a), rtol=1e-12)


def test_repeated_positions_double_the_input_factor_only(x64):
    a, g = oracles.normal(0, (5, 3, 4)), oracles.normal(1, (5, 3, 2))
    once = block_measure.measure_use(Dense(), ko.kronecker(), a, g, use_of(g, inputs=4))
    a2, g2 = (jnp.concatenate([x, x], 1) for x in (a, g))
    twice = block_measure.measure_use(Dense(), ko.kronecker(), a2, g2, use_of(g2, inputs=4))
    np.testing.assert_allclose(twice.inputs, 2 * once.inputs, rtol=1e-12)
    np.testing.assert_allclose(twice.outputs, once.outputs, rtol=1e-12)
