"""The loops people write: TrainState, nnx.Optimizer, scan, eager steps, vmap over seeds, curvature
as an argument.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import kfac_optax as ko
from tests import helpers as h

both = pytest.mark.parametrize("preset", h.PRESETS)


class TrainState(train_state.TrainState):
    """The recipe of the README: `apply_gradients` that hands extra arguments on to the optimizer."""

    def apply_gradients(self, *, grads, changes=None, **extra):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **(changes or {})
        )


def test_train_state_recipe():
    problem = h.plain_problem()
    tx = optax.chain(h.make_tx("kfac_two_level", problem), optax.sgd(0.1))

    @jax.jit
    def train_step(state):
        return state.apply_gradients(
            grads=problem.grad(state.params), curvature=problem.at(state.params)
        )

    create = functools.partial(TrainState.create, apply_fn=problem.predict, tx=tx)
    state = create(params=problem.params)
    for _ in range(6):
        state = train_step(state)
    params, own, _ = h.reference_run("kfac_two_level")
    assert int(state.step) == 6
    h.assert_close(state.params, params)
    h.assert_close(state.opt_state[0], own)


def test_the_plain_train_state_says_what_to_do():
    problem = h.plain_problem()
    tx = h.make_tx("kfac", problem)

    def step(params):
        state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
        return state.apply_gradients(grads=params).params

    with pytest.raises(ValueError, match=r"TrainState\.apply_gradients"):
        jax.eval_shape(step, problem.params)


class NNXModel(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, h.CLASSES, rngs=rngs)])
        for layer, values in zip(self.layers, params.values(), strict=True):
            layer.kernel[...], layer.bias[...] = values["w"], values["b"]

    def __call__(self, x):
        first, last = self.layers
        return last(jnp.tanh(first(x)))


def _nnx_problem():
    """The plain problem as an NNX model; its parameters are an `nnx.State`."""
    plain = h.plain_problem()
    graph, params = nnx.split(NNXModel(plain.params), nnx.Param)
    return h.make_problem(
        lambda params, x: ko.Categorical(nnx.merge(graph, params)(x)), params, plain.x, plain.y
    )


def _as_plain(state):
    """Arrays of an NNX state in the tree of the plain problem."""
    pure = nnx.to_pure_dict(state)["layers"]
    return {
        name: {"w": pure[i]["kernel"], "b": pure[i]["bias"]}
        for i, name in enumerate(("first", "last"))
    }


@both
def test_nnx_optimizer(preset):
    """In `nnx.jit`; paths of parameters differ between its `init` and `update`, which must not
    matter.
    """
    problem, plain = _nnx_problem(), h.plain_problem()
    assert [(layer.kernel, layer.bias) for layer in problem.layers] == [
        ("layers/0/kernel", "layers/0/bias"),
        ("layers/1/kernel", "layers/1/bias"),
    ]
    model = NNXModel(plain.params)
    optimizer = nnx.Optimizer(
        model, optax.chain(h.make_tx(preset, problem), optax.sgd(0.1)), wrt=nnx.Param
    )

    @nnx.jit
    def train_step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda m: ko.Categorical(m(x)).mean_nll(y))(model)
        curvature = problem.estimator.at(nnx.state(model, nnx.Param), x)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    losses = [float(train_step(model, optimizer, problem.x, problem.y)) for _ in range(6)]
    params, own, _ = h.reference_run(preset)
    h.assert_close(_as_plain(nnx.state(model, nnx.Param)), params)
    state = nnx.as_pure(optimizer.opt_state)[0]
    h.assert_close(
        optax.tree.get(state, "factors"), optax.tree.get(own, "factors"), structure=False
    )
    assert int(optax.tree.get(state, "kfac_count")) == 6
    assert losses[-1] < losses[0]


def test_nnx_state_as_parameters():
    """An `nnx.State` works like any other tree: updates have its structure and the values of the
    plain problem.
    """
    problem = _nnx_problem()
    _, _, updates = h.run(h.make_tx("kfac_two_level", problem), problem, 6)
    assert isinstance(updates, nnx.State)
    h.assert_close(_as_plain(updates), h.reference_run("kfac_two_level")[2])


@both
def test_scan_is_the_python_loop(preset):
    problem = h.plain_problem()
    step = jax.jit(h.make_step(h.make_tx(preset, problem), problem))
    params, state, seen = problem.params, h.initial_state(preset), []
    for _ in range(6):
        params, state, updates = step(params, state)
        seen.append(updates)
    stacked = jax.tree.map(lambda *us: jnp.stack(us), *seen)
    h.assert_close((params, state, stacked), h.reference_run(preset))


def test_eager_is_jit():
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem)
    state = tx.init(problem.params)
    updates, state = tx.update(
        h.plain_grads(), state, problem.params, curvature=problem.at(problem.params)
    )
    expected = jax.jit(
        lambda s, g: tx.update(g, s, problem.params, curvature=problem.at(problem.params))
    )
    h.assert_close((updates, state), expected(h.initial_state("kfac_two_level"), h.plain_grads()))


def _seeds(problem, n=3):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(h.plain_params(seed) for seed in range(n)))


@pytest.mark.parametrize("static", [False, True], ids=["unbatched count", "static refresh"])
def test_vmap_over_seeds(static):
    """An ensemble is a loop over its members; with the count kept unbatched the branches stay
    branches.
    """
    problem, n, preset = h.plain_problem(), 3, "kfac" if static else "kfac_two_level"
    tx = h.make_tx(preset, problem)
    step = h.make_step(tx, problem)
    extra = {"refresh": True} if static else {}
    params = _seeds(problem, n)
    states = jax.jit(jax.vmap(tx.init))(params)
    axes = jax.tree.map(lambda _: 0, states)
    if not static:
        states = optax.tree.set(states, kfac_count=jnp.int32(0))
        axes = optax.tree.set(axes, kfac_count=None)
    many = jax.vmap(lambda p, s: step(p, s, **extra), in_axes=(0, axes), out_axes=(0, axes, 0))
    primitives = {eqn.primitive.name for eqn in jax.make_jaxpr(many)(params, states).eqns}
    assert ("cond" in primitives) == (not static)

    many, one = jax.jit(many), jax.jit(lambda p, s: step(p, s, **extra))
    batched = params, states
    singles = [(h.plain_params(seed), h.initial_state(preset)) for seed in range(n)]
    for _ in range(3):
        *batched, updates = many(*batched)
        results = [one(*single) for single in singles]
        singles = [result[:2] for result in results]
        h.assert_close(
            updates, jax.tree.map(lambda *us: jnp.stack(us), *(result[2] for result in results))
        )
    factors = [optax.tree.get(state, "factors") for _, state in singles]
    h.assert_close(
        optax.tree.get(batched[1], "factors"), jax.tree.map(lambda *fs: jnp.stack(fs), *factors)
    )
    assert not np.allclose(*(jax.tree.leaves(f)[0] for f in factors[:2]))


def test_a_batched_count_turns_branches_into_selects():
    """Documented: `vmap` over everything runs both branches in every step."""
    problem = h.plain_problem()
    tx = h.make_tx("kfac", problem)
    params = _seeds(problem)
    states = jax.eval_shape(jax.vmap(tx.init), params)
    jaxpr = jax.make_jaxpr(jax.vmap(h.make_step(tx, problem)))(params, states)
    assert "cond" not in {eqn.primitive.name for eqn in jaxpr.eqns}


def test_curvature_is_an_argument_of_a_compiled_step():
    """It is a pytree: through `jit` as an argument it is what it is inside, and new ones compile
    nothing.
    """
    problem = h.plain_problem()
    estimator = ko.fisher(problem.predict)
    tx = h.make_tx("kfac_two_level", problem)

    @h.counted_jit
    def outside(state, curvature):
        return tx.update(h.plain_grads(), state, problem.params, curvature=curvature, refresh=False)

    @jax.jit
    def inside(state, params, x, key):
        return tx.update(
            h.plain_grads(),
            state,
            params,
            curvature=estimator.at(params, x, key=key),
            refresh=False,
        )

    for seed in range(3):
        x, key = problem.x + seed, jax.random.key(seed)
        curvature = estimator.at(problem.params, x, key=key)
        got = outside(h.initial_state("kfac_two_level"), curvature)
        h.assert_close(got, inside(h.initial_state("kfac_two_level"), problem.params, x, key))
    assert outside.traces == 1


def test_curvature_survives_tree_operations():
    problem = h.plain_problem()
    curvature = problem.estimator.at(problem.params, problem.x, key=jax.random.key(1))
    leaves, structure = jax.tree.flatten(curvature)
    again = jax.tree.unflatten(structure, leaves)
    assert again.spec == curvature.spec
    assert again.args[0] is problem.x
    assert structure == jax.tree.structure(
        problem.estimator.at(problem.params, problem.x, key=jax.random.key(2))
    )
    assert hash(structure) == hash(jax.tree.structure(again))


def test_none_and_curvature_are_two_programs():
    """`curvature=None` keeps the factors and still preconditions; the two kinds of step mix in one
    loop.
    """
    problem = h.plain_problem()
    step = jax.jit(
        h.make_step(h.make_tx("kfac_two_level", problem), problem), static_argnames="curvature"
    )
    params, state, _ = step(problem.params, h.initial_state("kfac_two_level"))
    _, without, updates = step(params, state, curvature=None)
    assert int(optax.tree.get(without, "kfac_count")) == 2
    h.assert_equal(optax.tree.get(without, "factors"), optax.tree.get(state, "factors"))
    # nothing was due
    h.assert_close(updates, jax.tree.map(lambda u: u[1], h.reference_run("kfac_two_level")[2]))
