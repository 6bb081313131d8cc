"""Deflated and balanced two-level couplings against dense matrices, as operators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.couplings.deflated import MODES
from tests import oracles
from tests.couplings.mixed_net import DAMPING, ESTIMATOR, SETTINGS, net, operator

# correction, coarse operator, whether the coarse residual vanishes, whether the operator is
# symmetric
CASES = [
    ("additive", "batch", False, True),
    ("a-def1", "batch", False, False),
    ("a-def2", "batch", True, False),
    ("bnn", "batch", True, True),
    ("a-def2", "averaged", True, False),  # on the first step the averages are the batch's own
]


def dense(fine, damped, z, correction):
    """The couplings in matrices."""
    q = z.T @ np.linalg.solve(z @ damped @ z.T, z)
    p = np.eye(len(damped)) - damped @ q
    return {
        "additive": fine + q,
        "a-def1": fine @ p + q,
        "a-def2": p.T @ fine + q,
        "bnn": p.T @ fine @ p + q,
    }[correction]


@functools.cache
def operators(correction, coarse_operator):
    """With the coarse level switched off and on."""
    problem = net()

    @jax.jit
    def run(weight):
        tx = ko.kfac_two_level(
            problem.layers,
            correction=correction,
            coarse_operator=coarse_operator,
            coarse="exact",
            coarse_weight=weight,
            coarse_damping="galerkin",
            **SETTINGS,
        )
        return operator(tx, problem)

    return np.asarray(run(0.0)), np.asarray(run(1.0))


@functools.cache
def one_level():
    problem = net()
    return np.asarray(jax.jit(lambda: operator(ko.kfac(problem.layers, **SETTINGS), problem))())


def damped_fisher():
    return net().fisher + DAMPING * np.diag(net().covered)


def relative(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("correction", "coarse_operator", "projects", "symmetric"), CASES)
def test_operators(x64, correction, coarse_operator, projects, symmetric):
    """The dense formula; `Z (F x - g) = 0` for every `g`; symmetry; K-FAC bit for bit where the
    coarse level is off.
    """
    off, on = operators(correction, coarse_operator)
    np.testing.assert_array_equal(off, one_level())
    damped, z = damped_fisher(), net().z
    assert relative(on, dense(off, damped, z, correction)) < 1e-10
    residual = np.abs(z @ (damped @ on - np.eye(len(damped)))).max()
    assert residual < 1e-10 if projects else residual > 1e-2
    asymmetry = relative(on, on.T)
    assert asymmetry < 1e-12 if symmetric else asymmetry > 1e-3
    assert not symmetric or np.linalg.eigvalsh(on).min() > 0


def test_the_quadratic_model_is_never_worse_than_one_level(x64):
    """For any gradient; the additive correction counts twice and can be worse."""
    damped, z = damped_fisher(), net().z
    fine, both = operators("a-def2", "batch")
    additive = dense(fine, damped, z, "additive")
    random = np.asarray(oracles.normal(3, (len(damped), 50)))
    gradients = np.concatenate([random, net().fisher @ random], 1) * net().covered[:, None]

    def values(matrix):
        x = matrix @ gradients
        return np.einsum("in,ij,jn->n", x, damped, x) / 2 - np.einsum("in,in->n", gradients, x)

    assert (values(both) <= values(fine) + 1e-12).all()
    assert (values(both) < values(fine) - 1e-3).any()
    assert (values(additive) > values(fine) + 1e-3).any()


def test_many_directions_are_made_a_few_at_a_time(x64):
    """What `E` is made with: a quadratic form of more directions than exist at once."""
    problem = net()
    _, unravel = jax.flatten_util.ravel_pytree(problem.params)
    directions = oracles.normal(5, (11, len(problem.fisher))) * problem.covered
    at = ESTIMATOR.at(problem.params, problem.x)
    form = jax.jit(lambda d: at.quadratic_form(lambda i: unravel(d[i]), count=len(d)))(directions)
    assert relative(form, directions @ problem.fisher @ directions.T) < 1e-12
    with pytest.raises(ValueError, match="directions is a function; expected count="):
        at.quadratic_form(lambda i: unravel(directions[i]))


def test_an_exact_fine_level_stays_exact(x64):
    rows = oracles.normal(0, (8, 6))
    damped, z, g = (
        rows.T @ rows + 0.1 * jnp.eye(6),
        oracles.normal(1, (2, 6)),
        oracles.normal(2, (6,)),
    )
    inverse = jnp.linalg.inv(damped)
    coarse = z.T @ jnp.linalg.inv(z @ damped @ z.T) @ z
    for function in MODES.values():
        got = function(g, lambda v: inverse @ v, lambda v: damped @ v, lambda v: coarse @ v)
        np.testing.assert_allclose(got, inverse @ g, rtol=1e-10)
    # the additive correction counts twice
    assert relative(inverse @ g + coarse @ g, inverse @ g) > 0.1


def test_wrong_use_is_named(x64):
    params, layers = net().params, net().layers
    tx = ko.kfac_two_level(layers, learning_rate=0.1, correction="bnn")
    with pytest.raises(
        ValueError,
        match=r"bnn \(batch, factored\): this coupling takes exact products.*curvature=None",
    ):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, curvature=None), params)
    with pytest.raises(
        ValueError, match=r"correction='bn'; expected one of 'additive', 'a-def1', 'a-def2', 'bnn'"
    ):
        ko.kfac_two_level(layers, learning_rate=0.1, correction="bn")
    with pytest.raises(ValueError, match=r"mode='additive'; expected one of 'a-def1'"):
        ko.deflated("additive")
    with pytest.raises(
        ValueError, match=r"coarse_operator='exact'; expected one of 'batch', 'averaged'"
    ):
        ko.deflated(coarse_operator="exact")
