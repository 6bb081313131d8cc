"""Eva and Eva-f as optimizers: training, state, what they leave out, batches split over devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._tree import tree_bytes
from kfac_optax.engine.state import CurvatureState, the_state
from tests import helpers


def own_pass(problem):
    """Curvature of the empirical Fisher, lazily."""
    estimator = ko.empirical_fisher(lambda p, x, y: problem.predict(p, x).nll(y))

    def run(params):
        loss, grads = jax.value_and_grad(problem.loss)(params)
        return loss, grads, estimator.at(params, problem.x, problem.y)

    return run


def shared_pass(problem):
    """Curvature that comes with the gradient."""
    step = problem.estimator.value_and_grad(lambda d, y: d.mean_nll(y))
    return lambda params: step(params, problem.x, targets=problem.y)


def inputs_alone(problem):
    estimator = ko.forward_only(problem.predict)

    def run(params):
        loss, grads = jax.value_and_grad(problem.loss)(params)
        return loss, grads, estimator.at(params, problem.x)

    return run


@pytest.mark.parametrize(
    ("preset", "source"), [(ko.eva, own_pass), (ko.eva, shared_pass), (ko.eva_f, inputs_alone)]
)
def test_it_trains(preset, source):
    problem = helpers.linen_problem()
    run = source(problem)
    tx = optax.chain(
        preset(problem.layers, learning_rate=0.1, kl_clip=0.1, damping=0.3), optax.sgd(0.1, 0.9)
    )

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, grads, curvature = run(params)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), length=40)[1]

    losses = train(problem.params)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(("preset", "vectors"), [(ko.eva, 2), (ko.eva_f, 1)])
def test_the_state_is_linear_in_the_width(preset, vectors):
    """Means, and the same again where other methods hold an inverse."""
    problem = helpers.linen_problem()
    tx = preset(problem.layers, kl_clip=None)
    state = the_state(tx.init(problem.params), CurvatureState, "test")
    sizes = [sum(layer.shape[:vectors]) for layer in problem.layers]
    assert tree_bytes((state.factors, state.inverses)) == 2 * 4 * sum(sizes)


def test_it_is_the_closed_form_after_an_average_of_two_batches():
    """New means have the weight 0.95, then KL-clip."""
    w = jnp.zeros((3, 2))
    losses = lambda w, x: ko.tap_dense(x @ w, x, w) @ jnp.array([1.0, -2.0])
    estimator = ko.empirical_fisher(losses)
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    tx = ko.eva(estimator.layers(w, x[0]), damping=0.1, learning_rate=1.0, kl_clip=0.01)
    v, state = jnp.ones((3, 2)), tx.init(w)
    for batch in x:
        updates, state = tx.update(v, state, w, curvature=estimator.at(w, batch))
    a = 0.05 * np.mean(x[0], 0) + 0.95 * np.mean(x[1], 0)
    c = np.ravel(np.outer(a, [1.0, -2.0]))
    want = np.linalg.solve(np.outer(c, c) + 0.1 * np.eye(6), np.ones(6))
    want *= min(1, np.sqrt(0.01 / np.sum(want)))
    np.testing.assert_allclose(np.ravel(updates), want, rtol=1e-4)


class Tied(nn.Module):
    """A normalisation layer and a table that is the head too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 4, name="embed")
        return embed.attend(nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(embed(tokens))))


@pytest.mark.parametrize("preset", [ko.eva, ko.eva_f])
def test_what_has_no_rank_one_block_passes_on(preset):
    tokens = jnp.arange(12).reshape(4, 3) % 5
    params = jax.jit(Tied().init)(jax.random.key(0), tokens)["params"]
    losses = lambda p, t: jnp.square(Tied().apply({"params": p}, t)).sum((1, 2))
    estimator = ko.empirical_fisher(losses)
    layers, grads = estimator.layers(params, tokens), jax.tree.map(jnp.ones_like, params)
    assert {layer.kind for layer in layers} == {"dense", "scale_shift", "tied_embedding"}

    def run(uncovered):
        tx = preset(layers, kl_clip=None, uncovered=uncovered)
        curvature = estimator.at(params, tokens)
        return jax.jit(lambda g: tx.update(g, tx.init(params), params, curvature=curvature)[0])(
            grads
        )

    updates = run("pass")
    for left in ("embed", "norm"):
        assert all((x == 1).all() for x in jax.tree.leaves(updates[left]))
    assert np.abs(updates["dense"]["kernel"] - 1).max() > 0.1
    assert np.abs(run("graft")["embed"]["embedding"] - 1).max() > 0.1
    with pytest.raises(ValueError, match=r"embed/embedding .*: tied_embedding: no block of rank"):
        run("raise")


@pytest.mark.parametrize("source", [own_pass, shared_pass])
def test_under_shard_map(source):
    """What varies over devices is typed; the means are those without it."""
    problem = helpers.plain_problem()
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split, same = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()

    def run(axis_name):
        tx = ko.eva(problem.layers, kl_clip=None, axis_name=axis_name)

        def update(params, x, y):
            _, _, curvature = source(problem._replace(x=x, y=y))(params)
            ones = jax.tree.map(jnp.ones_like, params)
            return tx.update(ones, tx.init(params), params, curvature=curvature)[0]

        return update

    mapped = jax.shard_map(run("batch"), mesh=mesh, in_specs=(same, split, split), out_specs=same)
    arguments = problem.params, problem.x, problem.y
    got, want = jax.jit(mapped)(*arguments), jax.jit(run(None))(*arguments)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_errors():
    layers = helpers.plain_problem().layers
    with pytest.raises(ValueError, match="eva: got kl_clip without learning_rate"):
        ko.eva(layers)
    with pytest.raises(ValueError, match="eva_f: damping=0"):
        ko.eva_f(layers, kl_clip=None, damping=0)
    with pytest.raises(ValueError, match="expected one of 'pass', 'graft', 'raise'"):
        ko.eva(layers, kl_clip=None, uncovered="diagonal")
    with pytest.raises(TypeError, match="eva: layers is a tuple"):
        ko.eva(tuple(layers), kl_clip=None)
