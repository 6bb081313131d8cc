"""A state as a matrix: inverse, root, determinant and factors against dense ones, in any wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

SIZES, DAMPING = (3, 4, 2), 0.125  # a state keeps its damping in single precision


def made(block=None, sizes=SIZES, **words):
    """One step from fresh factors in double precision: layers, state and what they were made of."""
    params, x = oracles.make_params(0, sizes), oracles.normal(1, (6, sizes[0]))
    estimator = ko.ggn(oracles.classifier)
    layers = estimator.layers(params, x)
    block = ko.kronecker() if block is None else block
    tx = ko.scale_by_curvature(layers, block=block, damping=DAMPING, **words)
    update = jax.jit(lambda v: tx.update(v, tx.init(v), v, curvature=estimator.at(params, x)))
    _, state = update(params)
    return params, x, layers, state, tx


def reference(params, x):
    """The damped block diagonal, from per-example rows."""
    s = jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))
    a, g = oracles.per_example(params, x, s)
    blocks = oracles.block_diagonal(oracles.kronecker_fisher(a, g), oracles.block_sizes(a, g))
    return a, g, blocks + DAMPING * np.eye(len(blocks))


def test_they_are_those_of_the_dense_block_diagonal(x64):
    params, x, layers, state, _ = made()
    a, g, matrix = reference(params, x)
    inverse = oracles.tree_matrix(lambda v: ko.inverse_product(layers, state, v), params)
    np.testing.assert_allclose(inverse @ matrix, np.eye(len(matrix)), atol=1e-9)
    root = oracles.tree_matrix(lambda z: ko.square_root_product(layers, state, z), params)
    np.testing.assert_allclose(root @ root.T, inverse, atol=1e-9)
    logdet = ko.log_determinant(layers, state)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(matrix)[1], rtol=1e-9)
    found = ko.factors(layers, state)
    for i, name in enumerate(("layer0", "layer1")):
        np.testing.assert_allclose(found[name].inputs, a[i].T @ a[i] / len(x), rtol=1e-9)
        gram = np.einsum("cni,cnj->ij", g[i], g[i]) / len(x)
        np.testing.assert_allclose(found[name].outputs, gram, rtol=1e-9)


def test_factored_damping_of_layers_that_share_a_call(x64):
    block = ko.kronecker("cholesky")
    params, x, layers, state, _ = made(block, (3, 3, 3))
    assert len(state.factors) == 1
    matrix = oracles.factored_tikhonov(*reference(params, x)[:2], DAMPING)
    root = oracles.tree_matrix(
        lambda z: ko.square_root_product(layers, state, z, block=block), params
    )
    np.testing.assert_allclose(root @ root.T @ matrix, np.eye(len(matrix)), atol=1e-9)
    logdet = ko.log_determinant(layers, state, block=block)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(matrix)[1], rtol=1e-9)


def test_a_coupling_has_its_part(x64):
    coupling = ko.coarse_correction()
    params, _, layers, state, tx = made(coupling=coupling)
    got, (expected, _) = jax.jit(
        lambda v: (
            ko.inverse_product(layers, state, v, coupling=coupling),
            tx.update(v, state, v, curvature=None, refresh=False),
        )
    )(params)
    np.testing.assert_allclose(oracles.flatten(got), oracles.flatten(expected), rtol=1e-12)
    with pytest.raises(ValueError, match="the state has a coupling between layers; expected coup"):
        ko.inverse_product(layers, state, params)
    for function in (ko.square_root_product, lambda *a: ko.log_determinant(*a[:2])):
        with pytest.raises(ValueError, match="has a coupling between layers, which has no square"):
            function(layers, state, params)


def with_injection(tx_of):
    return optax.inject_hyperparams(lambda damping: tx_of(damping=damping))(damping=0.05)


WRAPPED = {
    "chain": lambda tx_of: optax.chain(optax.clip(1.0), tx_of(damping=0.05), optax.adam(1e-3)),
    "inject_hyperparams": with_injection,
    "multi_steps": lambda tx_of: optax.MultiSteps(tx_of(damping=0.05), 1),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_state_may_be_wrapped(name):
    """`kfac` with its clip inside all sorts of transformations: the state of the step is found."""
    problem = h.plain_problem()

    def tx_of(damping):
        return ko.kfac(problem.layers, learning_rate=0.1, damping=damping)

    tx, bare = WRAPPED[name](tx_of), tx_of(0.05)

    @jax.jit
    def run(params, v):
        extra = {"curvature": problem.at(params)}
        states = [t.update(v, t.init(params), params, **extra)[1] for t in (tx, bare)]
        return [ko.inverse_product(problem.layers, state, v) for state in states]

    wrapped, plain = run(problem.params, h.plain_grads())
    h.assert_close(wrapped, plain)
    assert jnp.abs(plain["last"]["w"] - h.plain_grads()["last"]["w"]).max() > 0.1  # not passed on


def test_what_no_block_covers_passes_on():
    def predict(p, x):
        return ko.Normal(ko.tap_dense(x @ p["w"], x, p["w"]) + h.computed(p["free"]))

    params, x = {"w": jnp.ones((2, 3)), "free": jnp.ones(3)}, jnp.ones((4, 2))
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, learning_rate=1.0)
    update = jax.jit(lambda v: tx.update(v, tx.init(v), v, curvature=estimator.at(params, x)))
    _, state = update(params)
    for product in (ko.inverse_product, ko.square_root_product):
        np.testing.assert_array_equal(product(layers, state, params)["free"], params["free"])
    assert ko.factors(layers, state).keys() == {layers.layers[0].path}


def test_a_broken_vector_gives_no_numbers():
    problem, state = h.plain_problem(), h.initial_state("kfac")
    broken = jax.tree.map(lambda x: x * jnp.nan, problem.params)
    got = ko.inverse_product(problem.layers, state, broken)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(got))


def test_errors():
    problem, state = h.plain_problem(), h.initial_state("kfac")
    layers, v = problem.layers, problem.params
    with pytest.raises(ValueError, match="found 0 CurvatureState in the optimizer state"):
        ko.inverse_product(layers, optax.EmptyState(), v)
    with pytest.raises(
        ValueError, match="holds a EigenInverse, which is not what block 'kronecker"
    ):
        ko.inverse_product(layers, state, v, block=ko.kronecker("cholesky"))
    with pytest.raises(ValueError, match="inverse_product: the state of .* not what block 'foof'"):
        ko.inverse_product(layers, state, v, block=ko.foof_block())
    with pytest.raises(ValueError, match="the state has no coupling between layers; expected no"):
        ko.inverse_product(layers, state, v, coupling=ko.coarse_correction())
    with pytest.raises(ValueError, match="the state holds dense_5x4_bias; expected dense_4x4"):
        ko.inverse_product(layers, state, {k: {"w": x["w"]} for k, x in v.items()})
    with pytest.raises(ValueError, match="uncovered='graft'; expected one of 'pass', 'diagonal'"):
        ko.inverse_product(layers, state, v, uncovered="graft")
    with pytest.raises(ValueError, match="the vector has no leaf 'first/b'"):
        ko.square_root_product(layers, state, {k: {"w": x["w"]} for k, x in v.items()})
    no_root = ko.kronecker()._replace(name="mine", root_solve=None, logdet=None)
    with pytest.raises(ValueError, match="layer 'first' has block 'mine', which offers no square"):
        ko.square_root_product(layers, state, v, block=no_root)
    with pytest.raises(ValueError, match="layer 'first' has block 'mine', which offers no determ"):
        ko.log_determinant(layers, state, block=no_root)
