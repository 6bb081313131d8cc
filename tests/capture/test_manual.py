"""Taps by hand say what does not fit, and do nothing outside an estimator."""

import jax
import jax.numpy as jnp
import pytest

import kfac_optax as ko
from tests.layers.gradients import assert_gradients

X, W = jnp.ones((2, 6, 3)), jnp.ones((3, 3, 4))


def conv(x, kernel, strides=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


WRONG = [
    (
        lambda: ko.tap_conv(conv(X, W), X, W, strides=2),
        r"tap_conv: s is \(2, 6, 4\), but this geometry makes \(2, 3, 4\)",
    ),
    (
        lambda: ko.tap_conv(conv(X, W), X, W[:, :1], name="c"),
        r"tap_conv 'c': got s .* kernel \(3, 1, 4\), groups=1",
    ),
    (
        lambda: ko.tap_conv(conv(X, W), X, W, jnp.ones(3)),
        r"tap_conv: got bias \(3,\); expected \(4,\)",
    ),
    (
        lambda: ko.tap_conv(conv(X, W), X, W, strides=(1, 1)),
        r"tap_conv: got \(1, 1\) for 1 spatial axes",
    ),
    (
        lambda: ko.tap_scale_shift(X, X, None),
        r"tap_scale_shift: got s .* parameters \[\]; expected .* a shift or both",
    ),
    (lambda: ko.tap_scale_shift(X, X, jnp.ones(4)), r"parameters \[\(4,\)\]"),
    (lambda: ko.tap_embedding(X, jnp.ones((2, 6)), jnp.ones((5, 3))), r"tokens float32\[2, 6\]"),
    (
        lambda: ko.tap_embedding(X, jnp.ones((2, 5), int), jnp.ones((5, 3))),
        r"expected s \[\*batch, q\], integer tokens",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_outside_an_estimator_a_tap_is_its_first_argument():
    table, tokens = jnp.ones((5, 3)), jnp.ones((2, 6), int)
    s = conv(X, W)
    assert ko.tap_conv(s, X, W) is s
    assert ko.tap_scale_shift(X, X, jnp.ones(3)) is X
    assert ko.tap_embedding(X, tokens, table) is X


def test_stored_in_another_order():
    """A kernel stored `[out, in, window]` is followed through its transposition, groups and all."""
    kernel = jax.random.normal(jax.random.key(0), (4, 1, 3))
    x = jax.random.normal(jax.random.key(1), (2, 6, 2))

    def losses(params, x):
        used = params["kernel"].transpose(2, 1, 0)
        s = jax.lax.conv_general_dilated(
            x, used, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )
        return jnp.sum(jnp.sin(ko.tap_conv(s, x, used, groups=2)), (1, 2))

    layers = assert_gradients(losses, {"kernel": kernel}, x, rtol=1e-5, dtype=jnp.float32)
    assert layers.layers[0].layout.shape == (4, 1, 3) and layers.layers[0].groups == 2
