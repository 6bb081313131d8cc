"""The name of a mapped axis is checked before anything is traced."""

import jax.numpy as jnp
import optax
import pytest

import kfac_optax as ko

ESTIMATOR = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
LAYERS = ESTIMATOR.layers(jnp.zeros((2, 1)), jnp.eye(2))
IDENTITY = optax.identity()

# everything that averages over a mapped axis by itself
TAKES = {
    "scale_by_curvature": lambda **a: ko.scale_by_curvature(LAYERS, block=ko.kronecker(), **a),
    "quadratic_step": lambda **a: ko.quadratic_step(**a),
    "bound_step": lambda **a: ko.bound_step(IDENTITY, learning_rate=0.1, **a),
    "bound_movement": lambda **a: ko.bound_movement(IDENTITY, learning_rate=0.1, **a),
    "balance_parts": lambda **a: ko.balance_parts(IDENTITY, **a),
    "adapt_damping": lambda **a: ko.adapt_damping(IDENTITY, **a),
    "clip_by_trust_region": lambda **a: ko.clip_by_trust_region(IDENTITY, learning_rate=0.1, **a),
    "add_weight_decay": lambda **a: ko.add_weight_decay(IDENTITY, 0.1, **a),
    "until_stalled": lambda **a: ko.until_stalled(IDENTITY, **a),
    "smw": lambda **a: ko.smw(**a),
    "spring": lambda **a: ko.spring(learning_rate=0.1, **a),
    "gnb_estimator": lambda **a: ko.gnb_estimator(**a),
    "vogn": lambda **a: ko.vogn(**a),
    "k_bfgs": lambda **a: ko.k_bfgs(LAYERS, learning_rate=0.1, **a),
    "kfac": lambda **a: ko.kfac(LAYERS, kl_clip=None, **a),
    "kfac_adaptive": lambda **a: ko.kfac_adaptive(LAYERS, **a),
}


# JAX would read a number as an axis of the array, and average over examples
@pytest.mark.parametrize("bad", [0, ("data", 1), (), b"data"], ids=str)
@pytest.mark.parametrize("make", TAKES.values(), ids=TAKES.keys())
def test_what_is_no_name_raises(make, bad):
    with pytest.raises(TypeError, match=r"^\w+: axis_name=.*; expected the name of a mapped axis"):
        make(axis_name=bad)


@pytest.mark.parametrize("make", TAKES.values(), ids=TAKES.keys())
def test_names_are_taken(make):
    for good in (None, "data", ("data", "model"), ["data"]):
        assert callable(make(axis_name=good).update)
