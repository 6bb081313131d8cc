"""THOR: factors in blocks, and layers that decide on their refresh, from traces."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Use
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.blocks.kronecker.split_kronecker import SplitFactors
from kfac_optax.linalg.groups import group_product, in_groups
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
N, R, P, Q, LAM = 6, 2, 5, 4, 0.3


def make_use(weights=None, bias=False):
    layer = ko.testing.dense_layer(P, Q, bias=bias)
    return Use(layer, N, N * R, jnp.float64, weights)


def dense(blocks, dimension):
    """The matrix that has these blocks on its diagonal."""
    return np.asarray(group_product(jnp.eye(dimension), blocks))


def shifted_solve(a, g, v, damping):
    a, g = (np.asarray(x) + np.sqrt(damping) * np.eye(len(x)) for x in (a, g))
    return np.linalg.solve(a, np.asarray(v)) @ np.linalg.inv(g)


def split_solve(size, factors, v):
    block = ko.split_kronecker(size)
    lam = jnp.asarray(LAM)
    return block.solve(block.factorize(factors, lam), v, lam)


@pytest.mark.parametrize("bias", [False, True])
def test_one_group_is_factored_tikhonov_shared_equally(bias):
    a, g = oracles.normal(0, (N, R, P)), oracles.normal(1, (N, R, Q))
    weights = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, (N, R)))
    use = make_use(weights, bias)
    full = ko.kronecker().measure(a, g, use)
    split = ko.split_kronecker(128).measure(a, g, use)
    np.testing.assert_allclose(split.inputs[0], full.inputs, rtol=1e-12)
    np.testing.assert_allclose(split.outputs[0], full.outputs, rtol=1e-12)
    v = oracles.normal(3, (P + bias, Q))
    want = shifted_solve(*full, v, LAM)
    np.testing.assert_allclose(split_solve(128, split, v), want, rtol=1e-10)
    np.testing.assert_allclose(
        ko.split_kronecker().multiply(split, v), full.inputs @ v @ full.outputs, rtol=1e-10
    )


@pytest.mark.parametrize("size", [1, 2])
def test_groups_are_blocks_of_the_factors_and_exact_where_nothing_else_is(size):
    """Some examples per group, with inputs in it alone: `A` has no entries outside of the blocks."""
    a, g = oracles.normal(0, (N, R, P)), oracles.normal(1, (N, R, Q))
    full = ko.kronecker().measure(a, g, make_use())
    split = ko.split_kronecker(size).measure(a, g, make_use())
    groups = [np.arange(d) // size for d in (P, Q)]
    inside = [index[:, None] == index for index in groups]
    for blocks, factor, mask in zip(split, full, inside, strict=True):
        np.testing.assert_allclose(dense(blocks, len(factor)), factor * mask, rtol=1e-12)
    v = oracles.normal(2, (P, Q))
    want = shifted_solve(full.inputs * inside[0], full.outputs * inside[1], v, LAM)
    np.testing.assert_allclose(split_solve(size, split, v), want, rtol=1e-10)

    alone = jnp.where(jnp.arange(N)[:, None, None] % len(split.inputs) == groups[0], a, 0)
    full = ko.kronecker().measure(alone, g, make_use())
    assert 0 < np.count_nonzero(full.inputs) <= np.count_nonzero(inside[0])
    split = ko.split_kronecker(size).measure(alone, g, make_use())
    np.testing.assert_allclose(dense(split.inputs, P), full.inputs, atol=1e-14)


def test_positions_are_shared_out_between_both_factors():
    """The normaliser of convolutions: inverses of means with `damping / T`, each over `sqrt(T)`."""
    examples, steps, (p, q) = 4, 9, (3, 2)
    a, g = oracles.normal(0, (examples, steps, p)), oracles.normal(1, (examples, steps, q))
    v, root = oracles.normal(2, (p, q)), np.sqrt(LAM / steps)
    use = Use(ko.testing.dense_layer(p, q), examples, examples * steps, jnp.float64)
    block, plain = ko.split_kronecker(8, balanced=True), ko.split_kronecker(8)
    factors = block.measure(a, g, use)
    got = block.solve(block.factorize(factors, jnp.asarray(LAM)), v, jnp.asarray(LAM))
    mean_a, mean_g = (np.einsum("nti,ntj->ij", x, x) / (examples * steps) for x in (a, g))
    right = np.linalg.solve(mean_g + root * np.eye(q), v.T).T
    want = np.linalg.solve(mean_a + root * np.eye(p), right) / steps
    np.testing.assert_allclose(got, want, rtol=1e-10)
    same = plain.multiply(plain.measure(a, g, use), v)
    np.testing.assert_allclose(block.multiply(factors, v), same, rtol=1e-12)


def test_groups_end_with_zeros():
    x = oracles.normal(0, (3, 5))
    grouped = in_groups(x, 2)
    assert grouped.shape == (3, 3, 2) and not grouped[:, 2, 1].any()
    np.testing.assert_array_equal(grouped.reshape(3, 6)[:, :5], x)


SIZES = (3, 4, 4, 4)  # a bucket of one layer and a bucket of two
EVERY = 2


@functools.cache
def setup(gate=(0.01, 0.001), stagger=None, made=None):
    """A compiled step without statistics, and the state before the first."""
    params = jax.tree.map(lambda x: np.asarray(x, "float64"), oracles.make_params(0, SIZES))
    estimator = ko.ggn(oracles.classifier)
    layers = estimator.layers(params, jnp.ones((2, 3)))
    plain = ko.split_kronecker(2) if made is None else made

    @functools.cache
    def block_of(shape):
        above, below = gate
        return ko.trace_gate(plain, shape, refresh_above=above, freeze_below=below)

    tx = ko.scale_by_curvature(
        layers,
        block=plain if gate is None else lambda layer: block_of(layer.shape),
        inverse_every=EVERY,
        stagger=stagger,
        damping=LAM,
    )

    def step(state, refresh=None):
        return tx.update(params, state, curvature=None, refresh=refresh)

    return jax.jit(step, static_argnames="refresh"), jax.jit(tx.init)(params)


def with_factors(state, scales):
    """As if a statistic had come in: the factors of every layer of a bucket times a number."""

    def scaled(name, factors):
        by = np.asarray(scales[name]).reshape(-1, 1, 1, 1)
        random = np.random.default_rng(0)

        def one(x):
            root = random.normal(size=x.shape)
            return by * (root @ root.swapaxes(-1, -2) + np.eye(x.shape[-1]))

        return SplitFactors(*map(one, factors))

    factors = {name: scaled(name, x) for name, x in state.factors.items()}
    return state._replace(factors=factors, curvature_count=state.curvature_count + 1)


def names(state):
    return sorted(state.factors, key=lambda name: state.factors[name].inputs.shape[0])


def run(step, state, scales):
    """Candidates for a refresh, one for every pair of scales; states behind each."""
    seen, (one, two) = [], names(state)
    for of_one, of_two in scales:
        state = with_factors(state, {one: [of_one], two: of_two})
        seen.append(step(state, refresh=True)[1])
        state = seen[-1]
    return seen


def remembered(state, field):
    one, two = names(state)
    return [int(x) for name in (one, two) for x in getattr(state.inverses[name], field)]


def test_constant_traces_are_refreshed_once_and_changing_ones_always():
    step, state = setup()
    states = run(step, state, [(1, (1, 1)), (1, (1, 2)), (2, (1, 1)), (1, (1, 2))])
    assert [remembered(s, "refreshes") for s in states] == [
        [1, 1, 1],
        [1, 1, 2],
        [1, 1, 3],
        [1, 1, 4],
    ]
    # what is frozen stays so, whatever comes
    assert [remembered(s, "frozen") for s in states] == [[0, 0, 0]] + [[1, 1, 0]] * 3
    assert int(states[-1].failed_inverses) == 0


def test_between_the_bounds_a_layer_keeps_its_inverse_and_is_asked_again():
    step, state = setup()
    first, second, third = run(step, state, [(1, (1, 1)), (1.004, (1, 1)), (1.1, (1, 1))])
    assert remembered(second, "frozen")[0] == 0
    assert [remembered(s, "refreshes")[0] for s in (first, second, third)] == [1, 1, 2]
    one = names(state)[0]
    for x, y in zip(*(jax.tree.leaves(s.inverses[one].inverse) for s in (first, second))):
        np.testing.assert_array_equal(x, y)


def test_the_change_is_that_of_the_damped_trace():
    a, g = 2 * np.eye(3), np.eye(2)
    block = ko.trace_gate(ko.kronecker("cholesky"), (3, 2))
    factors = Factors(jnp.asarray(a), jnp.asarray(g))
    lam, one = jnp.asarray(LAM), jnp.int32(1)
    held = block.refresh(block.factorize(factors, lam), factors, lam, one)
    root = np.sqrt(LAM)
    np.testing.assert_allclose(held.trace, (6 + 3 * root) * (2 + 2 * root), rtol=1e-14)


@pytest.mark.parametrize("stagger", [None, 2])
def test_without_bounds_it_is_the_plain_schedule(stagger):
    """Through the traced schedule, with factors that change or do not."""
    results = []
    for gate in ((0.0, 0.0), None):
        step, state = setup(gate, stagger)
        updates, factors = [], [1, 3, 3, 3, 3, 0.1]
        for scale in factors:
            state = with_factors(state, {name: [scale] for name in names(state)})
            update, state = step(state)
            updates.append(update)
        results.append((updates, jax.tree.leaves(state.inverses)))
    (gated, held), (plain, expected) = results
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), gated, plain)
    arrays = [x for x in held if x.ndim > 1]
    for x, y in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_where_nothing_is_due_nothing_is_factorised():
    """Counted while it runs, and in the program: factorisations stand in branches alone."""
    calls, plain = [], ko.split_kronecker(2)

    def factorize(statistic, damping):
        jax.debug.callback(lambda _: calls.append(1), damping)
        return plain.factorize(statistic, damping)

    step, state = setup(made=plain._replace(factorize=factorize))
    jax.effects_barrier()
    counts = []
    for scales in [(1, (1, 1)), (1, (1, 2)), (1, (1, 2))]:
        calls.clear()
        (state,) = run(step, state, [scales])
        jax.effects_barrier()
        counts.append(len(calls))
    # all layers, one of two in one bucket, none
    assert counts[0] > counts[1] > 0 and counts[2] == 0
    program = jax.make_jaxpr(functools.partial(step.__wrapped__, refresh=True))(state).jaxpr
    assert "cholesky" in set(primitives(program, branches=True))
    outside = set(primitives(program, branches=False))
    assert "cond" in outside and "cholesky" not in outside


def primitives(program, branches):
    """Names of all operations of a program, with or without those in branches of conditionals."""
    for equation in program.eqns:
        yield equation.primitive.name
        if equation.primitive.name == "cond" and not branches:
            continue
        for inner in jex.jaxprs_in_params(equation.params):
            yield from primitives(inner, branches)


def test_of_a_bucket_only_layers_that_are_due_change():
    step, state = setup()
    first, second = run(step, state, [(1, (1, 1)), (1, (1, 2))])
    two = names(state)[1]
    for x, y in zip(*(jax.tree.leaves(s.inverses[two].inverse) for s in (first, second))):
        np.testing.assert_array_equal(x[0], y[0])
        assert not np.allclose(x[1], y[1])


def test_without_a_new_statistic_nothing_is_frozen():
    """A batch that was not finite, or none: traces that stay say nothing."""
    step, state = setup()
    (state,) = run(step, state, [(1, (1, 1))])
    for _ in range(2):
        _, state = step(state, refresh=True)
    assert remembered(state, "frozen") == [0, 0, 0]
    assert remembered(state, "refreshes") == [1, 1, 1]


def test_an_inverse_of_no_statistic_is_nothing_to_compare_with():
    step, state = setup()
    _, state = step(state, refresh=True)
    (state,) = run(step, state, [(1, (1, 1))])
    assert remembered(state, "refreshes") == [2, 2, 2]


def test_a_failed_factorisation_is_tried_again():
    step, state = setup()
    (state,) = run(step, state, [(1, (1, 1))])
    (broken,) = run(step, state, [(-100, (1, 2))])
    assert int(broken.failed_inverses) == 1
    one = names(state)[0]
    for x, y in zip(*(jax.tree.leaves(s.inverses[one].inverse) for s in (state, broken))):
        np.testing.assert_array_equal(x, y)
    (mended,) = run(step, broken, [(3, (1, 1))])
    assert remembered(mended, "refreshes")[0] == 2 and np.isfinite(remembered(mended, "trace")[0])


def test_the_table_names_what_layers_get():
    params = {"table": jnp.zeros((6, 3)), "w": jnp.zeros((3, 2))}

    def predict(params, tokens):
        x = ko.tap_embedding(params["table"][tokens], tokens, params["table"])
        return ko.Normal(ko.tap_dense(x @ params["w"], x, params["w"]))

    tokens = jnp.arange(4)
    layers = ko.ggn(predict).layers(params, tokens)
    state = jax.eval_shape(ko.thor(layers, size=2).init, params).preconditioner
    gated = [name for name, x in state.inverses.items() if hasattr(x, "frozen")]
    assert gated == ["dense_3x2"] and len(state.inverses) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ko.split_kronecker(0), "split_kronecker: size=0"),
        (lambda: ko.split_kronecker(sharing="pool"), "sharing='pool'; expected one of 'expand'"),
        (lambda: ko.split_kronecker(positions=0), "positions=0"),
        (lambda: gate(refresh_above=-1.0), "refresh_above=-1.0; expected refresh_above >= 0"),
        (lambda: gate(freeze_below=-1.0), "freeze_below=-1.0; expected freeze_below >= 0"),
        (lambda: gate(freeze_below=0.1), "freeze_below <= refresh_above"),
        (lambda: ko.trace_gate(ko.low_rank(2), (3, 2)), r"a rule of its own .*\(refresh\)"),
        (lambda: ko.trace_gate(gate(), (3, 2)), r"\(refresh, due\)"),
    ],
)
def test_wrong_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def gate(**options):
    return ko.trace_gate(ko.kronecker("cholesky"), (3, 2), **options)
