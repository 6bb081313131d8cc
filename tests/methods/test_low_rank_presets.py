"""Presets with low-rank factors: exact where the rank suffices, linear in the width, safe against
bad input.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax import testing
from kfac_optax.blocks.low_rank.low_rank_side import LowRankInverse, quality
from kfac_optax.engine.state import CurvatureState, the_state
from kfac_optax.estimators.output_cotangents import mean_over
from tests import oracles

N, SIZES, RANK = 6, (39, 30), 14  # one layer of which both factors are wide
ONLINE = ("b_kfac", "b_r_kfac", "b_kfac_c", "b_r_c")
PRESETS = {name: getattr(ko, name) for name in ("rs_kfac", *ONLINE)}
COMMON = dict(learning_rate=0.1, damping=1e-2, kl_clip=None, curvature_every=1, inverse_every=1)


FISHER = ko.fisher(oracles.classifier)


@functools.cache
def problem(dtype=jnp.float64, sizes=SIZES):
    params = jax.tree.map(lambda v: v.astype(dtype), oracles.make_params(0, sizes))
    return params, FISHER.layers(params, jnp.ones((N, sizes[0]), dtype))


def batch(seed, n=N, dtype=jnp.float64):
    return oracles.normal(seed, (n, SIZES[0])).astype(dtype)


def gradient(seed, params):
    return jax.tree.map(lambda p: oracles.normal(seed, p.shape).astype(p.dtype), params)


def run(tx, params, *, steps=2, estimator=FISHER, make=batch, every=False):
    """Updates of the last step, and the state, or those after every step."""
    grads = gradient(3, params)
    step = jax.jit(
        lambda s, x, key: tx.update(grads, s, params, curvature=estimator.at(params, x, key=key))
    )
    state, states = tx.init(params), []
    for i in range(steps):
        updates, state = step(state, make(10 + i), jax.random.key(i))
        states.append(state)
    return updates, states if every else state


@functools.cache
def dense_updates():
    params, layers = problem()
    return run(ko.kfac(layers, inverse="cholesky", **COMMON), params)[0]


def core(state):
    return the_state(state, CurvatureState, "test")


def close_to_largest(u, v, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
        scale = np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(a, b, atol=tolerance * scale)


@pytest.mark.parametrize("name", PRESETS)
def test_enough_rank_is_dense_kfac(x64, name):
    """Two batches of 6 rows fit into 14 pairs, online or sketched: then it is K-FAC with Cholesky
    inverses.
    """
    params, layers = problem()
    expected = dense_updates()
    options = {} if name == "rs_kfac" else {"rest": "zero"}
    got, _ = run(PRESETS[name](layers, rank=RANK, **options, **COMMON), params)
    close_to_largest(got, expected, 1e-9)


def test_every_pullback_counts(x64):
    """Two samples are twice as many rows of the outputs' factor."""
    params, layers = problem()
    estimator = ko.fisher(oracles.classifier, samples=2)
    expected, _ = run(
        ko.kfac(layers, inverse="cholesky", **COMMON), params, steps=1, estimator=estimator
    )
    got, _ = run(
        ko.b_kfac(layers, rank=12, rest="zero", **COMMON), params, steps=1, estimator=estimator
    )
    close_to_largest(got, expected, 1e-9)


@pytest.mark.parametrize("count", [1, 3, 11])
def test_columns_of_all_pullbacks_are_kept_in_order(count):
    mean, columns = mean_over(lambda k: (k * jnp.ones(2), k + jnp.arange(3.0)), count, chunk=4)
    np.testing.assert_allclose(mean, (count - 1) / 2)
    np.testing.assert_array_equal(columns, np.arange(count)[:, None] + np.arange(3.0))


def test_full_rank_is_dense_kfac(x64):
    params, layers = problem()
    expected, _ = run(ko.kfac(layers, inverse="cholesky", **COMMON), params, steps=4)
    got, _ = run(ko.rs_kfac(layers, rank=100, **COMMON), params, steps=4)
    close_to_largest(got, expected)


def test_overwriting_is_a_sketch_of_the_dense_average(x64):
    """At its refresh B-R-KFAC holds what RS-KFAC does with the same key, and other things in
    between.
    """
    params, layers = problem()
    names, kept = ("b_r_kfac", "rs_kfac"), {}
    for name in names:
        _, states = run(
            PRESETS[name](layers, rank=4, **(COMMON | dict(inverse_every=3))),
            params,
            steps=5,
            every=True,
        )
        kept[name] = [core(state).inverses for state in states]
    close_to_largest(*(kept[name][3] for name in names))
    between = [jax.tree.leaves(kept[name][4])[1] for name in names]
    assert np.abs(between[0] - between[1]).max() > 1e-3


def test_correction_happens_on_its_period(x64):
    params, layers = problem()
    makes = (
        functools.partial(ko.b_kfac, layers),
        functools.partial(ko.b_kfac_c, layers, correct_every=3),
    )
    plain, corrected = (
        run(make(rank=4, **COMMON), params, steps=3, every=True)[1] for make in makes
    )
    values = [
        [jax.tree.leaves(core(s).inverses)[1] for s in states] for states in (plain, corrected)
    ]
    np.testing.assert_allclose(values[0][1], values[1][1], atol=1e-12)
    assert np.abs(values[0][2] - values[1][2]).max() > 1e-3


@pytest.mark.parametrize("name", ["rs_kfac", "b_kfac"])
def test_relative_damping_of_the_references(x64, name):
    """`shift = damping max(D)`, eigenvalues left out are zero or the smallest inverse."""
    params, layers = problem()
    rest = {"rs_kfac": "zero", "b_kfac": "smallest"}[name]
    _, state = run(
        PRESETS[name](layers, rank=4, damping_rule="relative", rest=rest, **COMMON), params
    )
    for inverse in core(state).inverses.values():
        for side in inverse:
            np.testing.assert_allclose(side.shift, 1e-2 * side.low.values[:, 0])
            np.testing.assert_allclose(side.rest, 0 if rest == "zero" else side.low.values[:, -1])


def _shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inside in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inside = getattr(inside, "jaxpr", inside)
            if hasattr(inside, "eqns"):
                yield from _shapes(inside)


@pytest.mark.parametrize(
    ("name", "linear"), [("b_kfac", True), ("b_r_kfac", False), ("rs_kfac", False)]
)
def test_online_updates_form_no_square_array(name, linear):
    params = {"w": jnp.zeros((150, 131))}
    estimator = ko.fisher(lambda p, x: ko.Normal(ko.tap_dense(x @ p["w"], x, p["w"])))
    x, key = jnp.ones((5, 150)), jax.random.key(0)
    tx = PRESETS[name](estimator.layers(params, x), rank=3, learning_rate=0.1)
    closed = jax.make_jaxpr(
        lambda s: tx.update(params, s, params, curvature=estimator.at(params, x, key=key))
    )(tx.init(params))
    square = [s for s in _shapes(closed.jaxpr) if s[-2:] in ((150, 150), (131, 131))]
    assert (not square) == linear


def test_only_what_is_followed_online_passes_through_the_branch_of_the_statistics():
    params, layers = problem(jnp.float32, sizes=(*SIZES, 3, 3))
    tx = ko.b_kfac(layers, rank=4, learning_rate=0.1)
    state, key = jax.eval_shape(tx.init, params), jax.random.key(0)
    closed = jax.make_jaxpr(
        lambda s, x: tx.update(
            params, s, params, curvature=FISHER.at(params, x, key=key), refresh=None
        )
    )(state, batch(0, dtype=jnp.float32))
    statistics, _ = (eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "cond")
    online = [core(state).inverses[name] for name in ("dense_40x30_bias", "dense_31x3_bias")]
    assert len(core(state).inverses) == 3  # one is too small
    passed = len(jax.tree.leaves((core(state).factors, online)))
    assert len(statistics.outvars) == passed + 3  # and three counts


@pytest.mark.parametrize(
    ("preset", "coarse"), [("rs_kfac", False), ("b_kfac", True), ("kfac", True)]
)
def test_rows_of_the_gradient_give_the_same_update(x64, preset, coarse):
    params, layers = problem(sizes=(*SIZES, 9)) if coarse else problem()
    dense = preset == "kfac"
    block_of = (
        ko.blocks_of(ko.kronecker("cholesky")) if dense else ko.low_rank_blocks(preset, rank=RANK)
    )
    calls = []

    @functools.cache
    def spied(block):
        return block._replace(
            solve_rows=lambda *args: calls.append(args) or block.solve_rows(*args)
        )

    make, updates = ko.kfac_two_level if coarse else ko.kfac, {}
    for factored in (False, True):
        tx = make(
            layers, block=lambda layer: spied(block_of(layer)), factored_gradient=factored, **COMMON
        )

        @jax.jit
        def step(state, x, y, tx=tx):
            work = FISHER.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
            _, grads, curvature = work(params, x, targets=y, key=jax.random.key(0))
            return tx.update(grads, state, params, curvature=curvature)

        updates[factored] = step(tx.init(params), batch(1), jnp.arange(N) % 3)[0]
        assert len(calls) == factored * len(layers)
    close_to_largest(updates[True], updates[False])


def test_rows_of_layers_that_share_a_bucket_but_not_their_number(x64):
    """A layer over positions and one after pooling, of one shape."""
    params = {"each": oracles.normal(0, (20, 20)), "pooled": oracles.normal(1, (20, 20))}

    def predict(p, x):
        h = jnp.tanh(ko.tap_dense(x @ p["each"], x, p["each"])).mean(1)
        return ko.Categorical(ko.tap_dense(h @ p["pooled"], h, p["pooled"]))

    x, y = oracles.normal(2, (2, 3, 20)), jnp.arange(2)
    estimator, options = ko.fisher(predict), dict(inverse="cholesky", **COMMON)
    layers = estimator.layers(params, x)
    assert [layer.rows for layer in layers] == [6, 2]

    @jax.jit
    def updates():
        work = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        _, grads, curvature = work(params, x, targets=y, key=jax.random.key(0))
        both = (
            ko.kfac(layers, factored_gradient=factored, **options) for factored in (False, True)
        )
        return [tx.update(grads, tx.init(params), params, curvature=curvature)[0] for tx in both]

    dense, factored = updates()
    close_to_largest(factored, dense)


def test_factored_gradient_needs_shared_curvature(x64):
    params, layers = problem()
    tx = ko.b_kfac(layers, rank=4, factored_gradient=True, **COMMON)
    for curvature, got in (
        (None, "got None"),
        (FISHER.at(params, batch(0), key=jax.random.key(0)), "fisher.at"),
    ):
        with pytest.raises(
            ValueError, match=rf"factored_gradient=True and .*{got}.*\n?.*value_and_grad"
        ):
            tx.update(params, tx.init(params), params, curvature=curvature)


def test_factored_gradient_needs_a_block_that_takes_rows():
    _, layers = problem()
    with pytest.raises(
        ValueError, match=r"no block can solve for rows: kronecker \(eigh\)\. Expected"
    ):
        ko.kfac(layers, inverse="eigh", factored_gradient=True, **COMMON)


@pytest.mark.parametrize(
    ("block", "most"),
    [
        # 2 n (8 + 6) 2 + 48 n <= 2 * 48 * 4: n <= 3.7
        pytest.param(ko.low_rank(2), 3, id="low rank"),
        # n (64 + 36 + 48) <= 48 * 14: n <= 4.5
        pytest.param(ko.kronecker("cholesky"), 4, id="cholesky"),
    ],
)
def test_rows_that_cost_more_fall_back_to_the_dense_gradient(x64, block, most):
    """Products of rows are taken exactly as long as they are no more work than the gradient's."""
    inverse = jax.eval_shape(
        lambda: block.factorize(block.init(testing.dense_layer(8, 6), jnp.float32), jnp.float32(1))
    )

    def shape(n):
        a, g = jnp.ones((n, 8)), jnp.ones((n, 6))
        return jax.eval_shape(lambda h: block.solve_rows(h, a, g, 1.0), inverse)

    update, rows = shape(most)
    assert update.shape == (8, 6)
    assert [x.shape for x in rows] == [(most, 8), (most, 6)]
    assert shape(most + 1) is None
    assert shape(300) is None


def test_coupled_by_the_second_level(x64):
    params, layers = problem(sizes=(*SIZES, 3))
    expected, _ = run(ko.kfac_two_level(layers, inverse="cholesky", **COMMON), params)
    block = ko.low_rank_blocks("b_kfac", rank=RANK, rest="zero")
    got, state = run(ko.kfac_two_level(layers, block=block, **COMMON), params)
    close_to_largest(got, expected, 1e-9)
    assert ko.coarse_fisher(state).matrix.shape == (2, 2)


def test_masked_examples_do_not_count(x64):
    params, layers = problem(sizes=(*SIZES, 2))  # two columns of four rows fit into eight pairs

    def masked(params, x):
        return ko.Categorical(oracles.forward(params, x)[0], weights=jnp.arange(len(x)) < 4)

    estimators = ko.ggn(masked), ko.ggn(oracles.classifier)
    tx = ko.b_kfac(layers, rank=8, **COMMON)
    padded, cut = (
        run(tx, params, steps=1, estimator=e, make=lambda seed, n=n: batch(seed)[:n])[0]
        for e, n in zip(estimators, (6, 4), strict=True)
    )
    close_to_largest(padded, cut, 1e-8)


def test_bad_batch_leaves_everything_as_it_was(x64):
    params, layers = problem()
    tx = ko.b_r_c(layers, rank=4, **COMMON)
    _, before = run(tx, params)
    after = jax.jit(
        lambda s, x: tx.update(
            params, s, params, curvature=FISHER.at(params, x, key=jax.random.key(0)), refresh=False
        )
    )(before, batch(0).at[0, 0].set(jnp.nan))[1]
    close_to_largest(core(after).inverses, core(before).inverses, 0)
    close_to_largest(core(after).factors, core(before).factors, 0)
    assert int(core(after).skipped_statistics) == 1 and int(core(after).failed_inverses) == 0


@pytest.mark.parametrize("name", ["b_kfac", "b_kfac_c", "b_r_kfac"])
def test_before_any_statistic_factors_are_the_identity(x64, name):
    """A first batch that is not finite leaves the update of dense K-FAC: nothing is blown up by the
    damping alone.
    """
    params, layers = problem()
    grads, broken = gradient(3, params), batch(0).at[0, 0].set(jnp.nan)

    def update(tx):
        curvature = FISHER.at(params, broken, key=jax.random.key(0))
        return jax.jit(lambda s: tx.update(grads, s, params, curvature=curvature))(tx.init(params))[
            0
        ]

    expected = update(ko.kfac(layers, inverse="cholesky", **COMMON))
    close_to_largest(update(PRESETS[name](layers, rank=4, **COMMON)), expected, 1e-9)


@pytest.mark.parametrize("name", ["rs_kfac", "b_kfac", "b_r_c"])
@pytest.mark.parametrize(
    "make", [lambda seed: batch(seed, 1), lambda seed: 0 * batch(seed)], ids=["one", "zeros"]
)
def test_a_batch_of_one_and_a_batch_of_zeros(x64, name, make):
    params, layers = problem()
    updates, state = run(PRESETS[name](layers, rank=8, **COMMON), params, make=make)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert not ko.problems(state)


def test_static_steps_agree_with_the_traced_schedule(x64):
    params, layers = problem()
    tx = ko.b_r_c(
        layers, rank=5, correct_every=2, **(COMMON | dict(curvature_every=2, inverse_every=4))
    )
    schedule, grads = ko.HostSchedule(2, 4), gradient(3, params)
    traced = jax.jit(
        lambda s, x, k: tx.update(grads, s, params, curvature=FISHER.at(params, x, key=k))
    )

    @functools.partial(jax.jit, static_argnames=("measure", "refresh"))
    def static(s, x, k, measure, refresh):
        curvature = FISHER.at(params, x, key=k) if measure else None
        return tx.update(grads, s, params, curvature=curvature, refresh=refresh)

    one = two = tx.init(params)
    for i in range(6):
        u, one = traced(one, batch(i), jax.random.key(i))
        v, two = static(two, batch(i), jax.random.key(i), **schedule(i))
        close_to_largest(u, v, 1e-9)


def test_diagnostics_and_rank_in_use(x64):
    params, layers = problem()
    _, state = run(ko.b_kfac(layers, rank=5, **COMMON), params)
    report = ko.diagnostics(state)
    inverse = core(state).inverses
    energies = [s.low.values.sum(-1) / s.trace for x in inverse.values() for s in x]
    np.testing.assert_allclose(report["captured_energy"], min(np.min(e) for e in energies))
    assert 0.3 < report["captured_energy"] < 1 and report["rank_in_use"] == 5
    sides = [side for x in inverse.values() for side in x]
    errors = np.concatenate([np.ravel(jax.vmap(quality)(side).error) for side in sides])
    assert errors.min() < errors.max()
    np.testing.assert_allclose(report["inversion_error"], errors.max())
    _, state = run(ko.b_kfac(layers, rank=5, target_error=0.7, **COMMON), params)
    fewer = ko.diagnostics(state)
    assert fewer["rank_in_use"] < 5 and fewer["captured_energy"] >= 0.3


def test_target_error_leaves_out_what_is_not_needed(x64):
    """With a target that two of five pairs meet, the solve is that of rank two."""
    factors = (
        ko.kronecker()
        .init(testing.dense_layer(6, 1), jnp.float64)
        ._replace(inputs=jnp.diag(jnp.array([9.0, 5.0, 0.3, 0.2, 0.1, 0.05])))
    )
    v = oracles.normal(0, (6, 1))
    kinds = [ko.low_rank(5, target_error=0.1, rest="smallest"), ko.low_rank(2, rest="smallest")]
    solved = [b.solve(b.factorize(factors, 0.1), v, 0.1) for b in kinds]
    close_to_largest(*solved, 1e-10)


def test_the_table_says_what_every_factor_gets():
    layers = problem(jnp.float32, (*SIZES, 3))[1]
    table = str(ko.coverage(layers, block=ko.low_rank_blocks("b_kfac", rank=10)))
    assert "low rank (10 of 40 online x 10 of 30 online)" in table
    assert "low rank (10 of 31 online x all 3, clamped)" in table
    # 30 pairs and 6 rows are more than 31, so the average of that factor is kept and sketched
    assert "low rank (30 of 31 sketched x all 3, clamped)" in str(
        ko.coverage(layers, block=ko.low_rank_blocks("b_kfac", rank=30))
    )
    by_layer = ko.low_rank_blocks("rs_kfac", rank=lambda layer: 7 if layer.outputs == 30 else 2)
    assert "7 of 40 sketched" in str(ko.coverage(layers, block=by_layer))
    assert "2 of 31 sketched" in str(ko.coverage(layers, block=by_layer))


def test_convolutions_are_sketched():
    def model(params, x):
        axes = ("NHWC", "HWIO", "NHWC")
        s = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=axes)
        s = ko.tap_conv(s, x, params["conv"], padding="SAME")
        pooled = s.mean((1, 2))
        return ko.Categorical(ko.tap_dense(pooled @ params["w"], pooled, params["w"]))

    params = {"conv": jnp.ones((3, 3, 3, 16)) * 0.1, "w": jnp.ones((16, 4))}
    x = jnp.ones((2, 5, 5, 3))
    estimator = ko.ggn(model)
    layers = estimator.layers(params, x)
    assert "4 of 27 sketched" in str(
        ko.coverage(layers, block=ko.low_rank_blocks("b_kfac", rank=4))
    )
    tx = ko.b_kfac(layers, rank=4, learning_rate=0.1)
    updates, _ = jax.jit(lambda s: tx.update(params, s, params, curvature=estimator.at(params, x)))(
        tx.init(params)
    )
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank"),
        (dict(rank=4, oversampling=-1), "oversampling"),
        (dict(rank=4, rest="some"), "rest"),
        (dict(rank=4, damping_rule="absolute"), "damping_rule"),
        (dict(rank=4, target_error=2.0), "target_error"),
        (dict(rank=4, correct_every=0), "correct_every"),
        (dict(rank=4, correct_share=-0.5), "correct_share"),
        (dict(rank=4, variant="lu"), "variant"),
        (dict(rank=4, power_iterations=-2), "power_iterations"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    _, layers = problem(jnp.float32)
    with pytest.raises(ValueError, match=message):
        ko.b_r_c(layers, learning_rate=0.1, **options)


def test_what_online_factors_cannot_do():
    params, layers = problem(jnp.float32)
    tx = ko.b_kfac(layers, rank=4, **COMMON)
    with pytest.raises(ValueError, match="output gradients"):
        tx.update(
            params,
            tx.init(params),
            params,
            curvature=ko.forward_only(oracles.classifier).at(params, batch(0, dtype=jnp.float32)),
        )
    block = ko.low_rank_blocks("b_kfac", rank=4)(layers.layers[0])
    with pytest.raises(ValueError, match="followed online"):
        block.multiply(block.init(testing.dense_layer(40, 30), jnp.float32), jnp.ones((40, 30)))
    with pytest.raises(ValueError, match="method"):
        ko.low_rank_blocks("c_kfac")


def test_the_table_is_what_the_state_says():
    params, layers = problem(jnp.float32)
    state = ko.b_kfac(layers, rank=4, **COMMON).init(params)
    assert all(isinstance(x, LowRankInverse) for x in core(state).inverses.values())
