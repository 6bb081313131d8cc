"""The state before it exists (`eval_shape`, abstract parameters) and by name (`optax.tree.get` and
`set`).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h

both = pytest.mark.parametrize("preset", h.PRESETS)


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@both
def test_init_under_eval_shape(preset):
    problem = h.plain_problem()
    tx = optax.chain(h.make_tx(preset, problem), optax.sgd(0.1, momentum=0.9))
    shapes = jax.eval_shape(tx.init, _abstract(problem.params))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes[0], h.initial_state(preset))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


@both
def test_init_on_abstract_parameters(preset):
    """Our state needs shapes only, so `init` itself takes `ShapeDtypeStruct`s and gives the state
    of real arrays.
    """
    problem = h.plain_problem()
    state = h.make_tx(preset, problem).init(_abstract(problem.params))
    h.assert_same_types(state, h.initial_state(preset))
    h.assert_close(state, h.initial_state(preset))


def test_layers_from_abstract_arrays_are_the_same():
    problem = h.linen_problem()
    assert (
        problem.estimator.layers(_abstract(problem.params), _abstract(problem.x)) == problem.layers
    )


def test_the_unit_state_holds_the_identity():
    """Before any statistic the factors are the identity, and what is held is its inverse, so
    updates are finite.
    """
    for preset in h.PRESETS:
        state = h.initial_state(preset)
        for factor in jax.tree.leaves(optax.tree.get(state, "factors")):
            np.testing.assert_array_equal(
                factor, np.broadcast_to(np.eye(factor.shape[-1]), factor.shape)
            )
        for inverse in optax.tree.get(state, "inverses").values():
            for values in (inverse.inputs.values, inverse.outputs.values):
                np.testing.assert_allclose(values, 1, rtol=1e-6)


NAMES = (
    "damping",
    "factors",
    "inverses",
    "coarse",
    "kfac_count",
    "kl_scale",
    "kl_count",
    "coarse_factors",
    "inverse_age",
)


def test_get_finds_unique_names():
    """In a chain with transformations that have states of their own, without ambiguity."""
    problem = h.plain_problem()
    sgd = optax.sgd(lambda _: 0.1, momentum=0.9)
    tx = optax.chain(
        optax.scale_by_adam(), h.make_tx("kfac_two_level", problem), sgd, optax.ema(0.9)
    )
    state = jax.eval_shape(tx.init, problem.params)
    for name in NAMES:
        assert len(optax.tree.get_all_with_path(state, name)) == 1, name
        assert optax.tree.get(state, name) is not None
    with pytest.raises(KeyError):
        optax.tree.get(state, "count")  # Optax's own counters clash with each other, not with ours
    assert optax.tree.get(state, "kfac_count").shape == ()
    assert list(optax.tree.get(state, "factors")) == ["dense_5x4_bias"]


def test_set_replaces_what_the_next_step_uses():
    """Scaled factors, refactorised by `refresh=True`, shrink the update; a count set back makes
    statistics due.
    """
    problem, grads = h.plain_problem(), h.plain_grads()
    tx = h.make_tx("kfac", problem, kl_clip=None, damping=0.0)
    state = optax.chain(tx).init(problem.params)
    large = jax.tree.map(lambda x: 10 * x, optax.tree.get(state, "factors"))
    changed = optax.tree.set(state, factors=large, kfac_count=jnp.int32(7))
    assert int(optax.tree.get(changed, "kfac_count")) == 7

    @h.counted_jit
    def refreshed(state):
        return optax.chain(tx).update(grads, state, problem.params, curvature=None, refresh=True)

    updates, after = refreshed(changed)
    h.assert_close(updates, jax.tree.map(lambda g: g / 100, grads))  # (10 I (x) 10 I)^{-1}
    assert int(optax.tree.get(after, "kfac_count")) == 8
    assert refreshed.traces == 1
    refreshed(state)
    assert refreshed.traces == 1, "a state with replaced leaves has the types of the original"


def test_missing_curvature_shows_the_line_to_write():
    problem = h.plain_problem()
    tx = optax.chain(h.make_tx("kfac", problem), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"curvature=fisher\.at\(params") as error:
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), problem.params)
    assert "curvature=None" in str(error.value)


def test_curvature_of_a_wrong_type_is_an_error():
    problem = h.plain_problem()
    tx = h.make_tx("kfac", problem)
    for wrong in (problem.estimator, problem.params, 1.0):
        with pytest.raises(TypeError, match=r"expected fisher\.at"):
            jax.eval_shape(
                lambda p, w=wrong: tx.update(p, tx.init(p), p, curvature=w), problem.params
            )


def test_a_model_of_taps_without_stored_parameters_is_an_error():
    """A bare vector reshaped into a kernel is no parameter as stored: no layer is left, and the
    error says so.
    """
    estimator = ko.ggn(lambda v: ko.Normal(h.dense(jnp.ones((1, 1)), v[None, :])))
    with pytest.raises(ValueError, match=r"no layer") as error:
        estimator.layers(jnp.ones(3))
    assert "as stored" in str(error.value)


def test_diagnostics_without_matrices_leave_eigenvalues_out():
    """Of two layers whose mean inputs, stacked, would be a square; and of scalars."""
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}

    def predict(params, x):
        return ko.Normal(h.dense(h.dense(x, params["a"]), params["b"]))

    layers = ko.ggn(predict).layers(params, jnp.ones((3, 2)))
    for tx in (ko.eva(layers, kl_clip=None), ko.singd(layers)):
        numbers = ko.diagnostics(tx.init(params))
        assert "eigenvalue_max" not in numbers and int(numbers["failed_inverses"]) == 0
