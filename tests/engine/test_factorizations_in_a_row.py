"""No two LAPACK calls of a compiled step may run at the same time.

On the CPU, JAX spreads a batched call over a pool of threads while one thread of that pool waits
for it; two at a time can take all threads for waiting, and the step never returns. So there has to
be a path of data from each call to every later one.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_optax as ko
from kfac_optax import testing
from kfac_optax.linalg import lapack
from kfac_optax.testing.factorizations import side_by_side, stacked
from tests import oracles

N, SIZES = 5, (40, 30, 30, 30, 3)  # buckets of one and of two layers, factors wide and small


FISHER = ko.fisher(oracles.classifier)
COMMON = dict(learning_rate=0.1)
RANK = dict(rank=4, oversampling=2, **COMMON)
OPTIMIZERS = {
    "eigh": lambda layers: ko.kfac(layers, **COMMON),
    "two-level": lambda layers: ko.kfac_two_level(layers, inverse="cholesky", **COMMON),
    "by halves": lambda layers: ko.kfac(layers, inverse="cholesky", **COMMON),
    "tridiagonal": lambda layers: ko.kfac(
        layers, inverse="cholesky", coupling=ko.tridiagonal(), **COMMON
    ),
    "deflated": lambda layers: ko.kfac_two_level(
        layers, correction="a-def2", coarse_damping="galerkin", **COMMON
    ),
    "gated": lambda layers: ko.thor(layers, size=8),
    "examples": lambda layers: ko.hylo(layers, rank=3),
    "rows": lambda layers: ko.skfac(layers),
    "per equation": lambda layers: ko.kfac(layers, block=ko.per_equation(), **COMMON),
    "sketched": lambda layers: ko.rs_kfac(layers, **RANK),
    "symmetric": lambda layers: ko.rs_kfac(layers, variant="symmetric", **RANK),
    "online": lambda layers: ko.b_kfac(layers, **RANK),
    "online, all": lambda layers: ko.b_r_c(layers, correct_every=2, **RANK),
    "online, staggered": lambda layers: ko.b_r_c(layers, correct_every=2, stagger=2, **RANK),
}
# these factorise in a step of their own
WITHOUT_REFRESH = {
    "sketches": lambda layers: ko.scale_by_sketchy(rank=4),
    "pairs": lambda layers: ko.k_bfgs(layers, **COMMON),
}
ALL_PARTS = {"online, staggered": (0, 1)}
# triangles so wide that they are inverted in parts; two layers in one bucket
SIZES_OF = {"by halves": (40, 600, 600, 600, 3)}
# eigenvectors, Cholesky factors, triangular solves, QR and singular values
FAMILIES = ("eigh", "two-level", "by halves", "rows", "sketched", "online, all")


def test_calls_side_by_side_are_seen():
    x = jnp.eye(3)
    apart = (
        jax.jit(lambda x, y: (jnp.linalg.eigh(x), jnp.linalg.eigh(y)))
        .lower(x, x)
        .compile()
        .as_text()
    )
    inside = jax.jit(
        lambda x, y: jax.lax.map(lambda z: (jnp.linalg.eigh(z[0]), jnp.linalg.eigh(z[1])), (x, y))
    )
    inside = inside.lower(jnp.stack([x, x]), jnp.stack([x, x])).compile().as_text()
    row = jax.jit(lambda x: jnp.linalg.eigh(jnp.linalg.eigh(x)[1])).lower(x).compile().as_text()
    assert len(side_by_side(apart)[0]) == 1
    assert len(side_by_side(inside)[0]) == 1
    assert side_by_side(row) == ([], 2)


def test_a_transformation_that_factorises_side_by_side_is_named():
    def update(updates, state, params=None):
        del params
        return {name: jnp.linalg.eigh(x @ x.T)[1] for name, x in updates.items()}, state

    params = {"a": jnp.eye(2), "b": jnp.eye(3)}
    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    trial = testing.Trial("apart", tx, params, lambda params, scale: (params, {}))
    with pytest.raises(
        AssertionError, match="'apart': factorisations follow .* 1 pairs of 2 calls"
    ):
        testing.check_factorizations(trial)


def _programs(name):
    """Lowered programs of a preset: its start, a refresh, and a step by the schedule."""
    sizes = SIZES_OF.get(name, SIZES)
    params = jax.eval_shape(lambda: oracles.make_params(0, sizes))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    x, key = jnp.ones((N, sizes[0])), jax.random.key(0)
    tx = OPTIMIZERS[name](FISHER.layers(params, x))
    state = jax.eval_shape(tx.init, params)

    def step(state, x, key, refresh):
        return tx.update(
            params, state, params, curvature=FISHER.at(params, x, key=key), refresh=refresh
        )

    yield jax.jit(tx.init).lower(params)
    for refresh in (ALL_PARTS.get(name, True), None):
        yield jax.jit(lambda *args, refresh=refresh: step(*args, refresh)).lower(state, x, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factorizations_follow_one_another(name):
    found = [side_by_side(program.compile().as_text()) for program in _programs(name)]
    assert not any(pairs for pairs, _ in found)
    assert all(calls for _, calls in found[1:])  # the first may have nothing to invert yet


@pytest.fixture
def several(monkeypatch):
    """A process with several devices; traces that know of one are forgotten, and the other way
    round.
    """
    jax.clear_caches()
    monkeypatch.setattr(lapack, "several_devices", lambda: True)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", FAMILIES)
def test_several_devices_of_a_process_take_one_matrix_at_a_time(several, name):
    _, refresh, _ = _programs(name)
    program = refresh.compile().as_text()
    calls, count = stacked(program)
    assert calls == []
    assert count > 0
    # loops over matrices follow one another as well
    assert side_by_side(program)[0] == []


@pytest.mark.parametrize("name", WITHOUT_REFRESH)
def test_factorizations_without_a_refresh_follow_one_another(name):
    params = jax.tree.map(jnp.float32, oracles.make_params(0, SIZES))
    x = jnp.ones((N, SIZES[0]))
    estimator = ko.empirical_fisher(lambda p, x: oracles.forward(p, x)[0].sum(1))
    tx = WITHOUT_REFRESH[name](estimator.layers(params, x))

    def step(state, x):
        return tx.update(params, state, params, curvature=estimator.at(params, x))

    program = jax.jit(step).lower(jax.eval_shape(tx.init, params), x)
    pairs, calls = side_by_side(program.compile().as_text())
    assert not pairs
    assert calls > 2  # of several groups
