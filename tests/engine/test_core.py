"""Schedule, averaging, robustness, messages and inspection of the transformation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._tree import tree_bytes
from tests import helpers as h
from tests import oracles

SIZES = (3, 4, 4, 2)
N = 6


ESTIMATOR = ko.ggn(oracles.classifier)


def problem():
    _, params, x, _, _, layers = h.classes_problem(SIZES, (0,) * N, "float32")
    return params, x, layers


def stepper(tx):
    """One compiled step; the statistics come from `x`, the gradient is given."""
    return jax.jit(
        lambda grads, state, params, x: tx.update(
            grads, state, params, curvature=ESTIMATOR.at(params, x)
        )
    )


def core(state):
    return state.preconditioner


def test_schedule_order_and_averaging():
    """Statistics first, then inverses, then the step; factors are the running mean, then an average
    with `decay`.
    """
    params, _, layers = problem()
    tx = ko.kfac_two_level(
        layers, learning_rate=0.1, curvature_every=2, inverse_every=3, decay=0.6, kl_clip=None
    )
    step, state, kept = stepper(tx), tx.init(params), []
    measured = jax.jit(
        lambda p, x: [m.inputs for m in ESTIMATOR.at(p, x).statistics(_plan(layers))[0]]
    )
    expected, k, inverse_from = None, 0, None
    for i in range(7):
        x = oracles.normal(10 + i, (N, 3)).astype(jnp.float32)
        _, state = step(params, state, params, x)
        inner = core(state)
        if i % 2 == 0:
            k += 1
            e = min(1 - 1 / k, 0.6)
            new = measured(params, x)
            expected = (
                new if expected is None else [e * o + (1 - e) * n for o, n in zip(expected, new)]
            )
            kept.append(new)
            if k <= 2:  # still the arithmetic mean
                h.assert_leaves_close(expected, [sum(v) / k for v in zip(*kept)])
        if i % 3 == 0:
            inverse_from = expected
        assert int(inner.curvature_count) == k
        assert int(inner.inverse_age) == i % 3 + 1
        for bucket, got in inner.factors.items():
            rows = [
                j
                for j, layer in enumerate(layers)
                if bucket == f"dense_{layer.shape[0]}x{layer.shape[1]}_bias"
            ]
            h.assert_leaves_close(got.inputs, np.concatenate([expected[j] for j in rows]))
            v = inner.inverses[bucket].inputs
            rebuilt = np.einsum("nij,nj,nkj->nik", v.vectors, v.values, v.vectors)
            h.assert_leaves_close(
                rebuilt, np.concatenate([inverse_from[j] for j in rows]), rtol=1e-4
            )
    assert int(inner.kfac_count) == 7


def _plan(layers):

    return oracles.plan(layers, None, jnp.float32)


def test_static_refresh_has_no_branch_and_equals_the_traced_schedule():
    params, x, layers = problem()
    tx = ko.kfac_two_level(
        layers, learning_rate=0.1, curvature_every=2, inverse_every=4, bound="damped"
    )
    schedule = ko.HostSchedule(curvature_every=2, inverse_every=4)
    traced = stepper(tx)

    @functools.partial(jax.jit, static_argnames=("measure", "refresh"))
    def static(grads, state, params, x, *, measure, refresh):
        curvature = ESTIMATOR.at(params, x) if measure else None
        return tx.update(grads, state, params, curvature=curvature, refresh=refresh)

    one = two = tx.init(params)
    for i in range(9):
        x = oracles.normal(i, (N, 3)).astype(jnp.float32)
        u, one = traced(params, one, params, x)
        v, two = static(params, two, params, x, **schedule(i))
        h.assert_leaves_close((u, one), (v, two), rtol=1e-4)
    for flags in ({"measure": False, "refresh": False}, {"measure": True, "refresh": True}):
        text = str(
            jax.make_jaxpr(functools.partial(static.__wrapped__, **flags))(params, two, params, x)
        )
        assert "cond[" not in text
    text = str(
        jax.make_jaxpr(functools.partial(static.__wrapped__, measure=False, refresh=False))(
            params, two, params, x
        )
    )
    assert "eigh" not in text and "cholesky" not in text


@pytest.mark.parametrize("inverse", ["eigh", "cholesky"])
def test_a_bad_batch_is_counted_and_changes_nothing(inverse):
    params, x, layers = problem()
    tx = ko.kfac_two_level(
        layers,
        learning_rate=0.1,
        bound="damped",
        curvature_every=1,
        inverse_every=1,
        inverse=inverse,
    )
    step = stepper(tx)
    _, good = step(params, tx.init(params), params, x)
    for value in (np.nan, np.inf):
        updates, state = step(params, good, params, x.at[2, 1].set(value))
        assert int(core(state).skipped_statistics) == 1
        assert int(core(state).curvature_count) == 1
        h.assert_leaves_close(
            (core(state).factors, core(state).coarse), (core(good).factors, core(good).coarse)
        )
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    updates, state = step(params, state, params, x)  # and it goes on
    assert int(core(state).curvature_count) == 2


def test_a_failed_factorisation_keeps_the_last_good_inverse_of_that_layer_only():
    params, x, layers = problem()
    tx = ko.scale_by_curvature(
        layers, block=ko.kronecker("cholesky"), curvature_every=1, inverse_every=1
    )
    _, state = stepper(tx)(params, tx.init(params), params, x)
    bucket = "dense_5x4_bias"
    indefinite = state.factors[bucket].outputs.at[0].set(-100 * jnp.eye(4))
    broken = state._replace(
        factors=state.factors | {bucket: state.factors[bucket]._replace(outputs=indefinite)}
    )
    refresh = jax.jit(lambda s: tx.update(params, s, params, curvature=None, refresh=True))
    updates, new = refresh(broken._replace(damping=jnp.float32(0)))
    assert int(new.failed_inverses) == 1
    np.testing.assert_array_equal(
        new.inverses[bucket].outputs[0], state.inverses[bucket].outputs[0]
    )
    assert all(np.isfinite(u).all() for u in jax.tree.leaves((updates, new.inverses)))


def test_zero_gradients_dead_layers_batch_of_one_and_rank_deficiency_stay_finite():
    params, x, layers = problem()
    dead = params | {"layer1": jax.tree.map(jnp.zeros_like, params["layer1"])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for inverse in ("eigh", "cholesky"):
        tx = ko.kfac_two_level(
            layers, learning_rate=0.1, inverse=inverse, damping=1e-3, bound="damped"
        )
        step = stepper(tx)
        updates, state = step(zeros, tx.init(params), params, x)
        assert all(not np.any(u) for u in jax.tree.leaves(updates))
        assert float(state.kl_scale) == 1.0
        updates, _ = step(params, tx.init(params), dead, jnp.zeros_like(x))
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        alone = jax.jit(lambda g, s, p, x, tx=tx: tx.update(g, s, p, curvature=ESTIMATOR.at(p, x)))
        updates, _ = alone(params, tx.init(params), params, x[:1])
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_uncovered_parameters_pass_through_unscaled_and_unsummed():
    def with_scale(params, x):
        return ko.Categorical(h.computed(params["scale"]) * oracles.forward(params["net"], x)[0])

    net, x, _ = problem()
    params = {"net": net, "scale": jnp.full((2,), 3.0)}
    estimator = ko.ggn(with_scale)
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, learning_rate=10.0, kl_clip=1e-4, uncovered="pass", bound="damped")
    updates, state = jax.jit(tx.update)(
        params, tx.init(params), params, curvature=estimator.at(params, x)
    )
    assert float(state.kl_scale) < 1e-2
    np.testing.assert_array_equal(updates["scale"], params["scale"])
    other = params | {"scale": 1e6 * params["scale"]}  # not part of the clip's sum either
    _, again = jax.jit(tx.update)(other, tx.init(params), params, curvature=estimator.at(params, x))
    assert float(again.kl_scale) == float(state.kl_scale)
    with pytest.raises(
        ValueError, match=r"uncovered='raise' and no block covers\n  scale \(2,\): used by mul"
    ):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")


def test_hyperparameters_may_be_schedules_or_traced():
    params, x, layers = problem()
    ramp = lambda count: 0.1 + 0.1 * count
    scheduled = ko.kfac(
        layers,
        learning_rate=ramp,
        damping=ramp,
        decay=lambda c: 0.95,
        kl_clip=lambda c: 1e-3,
        bound="damped",
        inverse_every=1,
    )
    step, state = stepper(scheduled), scheduled.init(params)
    for i in range(3):
        _, state = step(params, state, params, x)
        assert float(core(state).damping) == pytest.approx(0.1 + 0.1 * i)

    @jax.jit
    def traced(rate, damping, every):
        tx = ko.kfac(
            layers,
            learning_rate=rate,
            damping=damping,
            bound="damped",
            curvature_every=every,
            inverse_every=every,
        )
        return tx.update(params, tx.init(params), params, curvature=ESTIMATOR.at(params, x))[0]

    fixed = ko.kfac(layers, learning_rate=0.3, damping=0.2, bound="damped")
    expected, _ = stepper(fixed)(params, fixed.init(params), params, x)
    h.assert_leaves_close(traced(0.3, 0.2, 10), expected)


def test_no_recompilation_and_a_stable_state_over_200_steps():
    params, x, layers = problem()
    tx = optax.chain(
        ko.kfac_two_level(layers, learning_rate=0.1, curvature_every=3, inverse_every=7),
        optax.sgd(0.1, momentum=0.9),
    )

    @h.counted_jit
    def step(params, state, x):
        grads = jax.grad(lambda p: oracles.classifier(p, x).mean_nll(jnp.zeros(N, int)))(params)
        updates, state = tx.update(grads, state, params, curvature=ESTIMATOR.at(params, x))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    for _ in range(200):
        params, state = step(params, state, x)
    assert step.traces == 1
    assert jax.tree.map(jax.typeof, state) == types
    assert not any(t.weak_type for t in jax.tree.leaves(types))
    assert float(oracles.classifier(params, x).mean_nll(jnp.zeros(N, int))) < 0.01


@pytest.mark.parametrize(
    ("inverse", "coarse"),
    [("eigh", None), ("cholesky", None), ("eigh", "factored"), ("eigh", "exact")],
)
def test_coverage_table_adds_up_to_the_bytes_of_the_state(inverse, coarse):
    params, _, layers = problem()
    block = ko.kronecker(inverse)
    coupling = None if coarse is None else ko.coarse_correction(coarse)
    state = ko.scale_by_curvature(layers, block=block, coupling=coupling).init(params)
    table = ko.coverage(layers, block=block, coupling=coupling)
    inverses = tree_bytes((state.factors, state.inverses, state.coarse))
    assert sum(table.state_bytes) + table.coupling_bytes == inverses
    assert f"{inverses:,}" in str(table)
    # counters, and two scalars for each of four hyperparameters
    assert tree_bytes(state) - inverses == 16 * 4


class Twins(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="b")(nn.Dense(3, name="a")(x))
        return nn.Dense(2, name="c", use_bias=False)(nn.Dense(3, name="d")(x))


def test_diagnostics_and_coarse_fisher():
    x = oracles.normal(0, (20, 3)).astype(jnp.float32)
    params = Twins().init(jax.random.key(0), x)["params"]
    estimator = ko.ggn(lambda p, x: ko.Normal(Twins().apply({"params": p}, x)))
    layers = estimator.layers(params, x)
    two = ko.kfac_two_level(layers, learning_rate=0.1, damping=0.02, kl_clip=1e-5)
    tx = optax.chain(optax.add_decayed_weights(0.1), two, optax.sgd(0.1))
    _, state = jax.jit(tx.update)(
        params, tx.init(params), params, curvature=estimator.at(params, x)
    )
    scalars = jax.jit(ko.diagnostics)(state)
    assert float(scalars["damping"]) == pytest.approx(0.02)
    assert 0 < float(scalars["kl_scale"]) < 1
    assert 0 < float(scalars["coarse_share"]) <= 1.5
    assert int(scalars["statistics"]) == 1 and int(scalars["inverse_age"]) == 1
    assert float(scalars["eigenvalue_max"]) > float(scalars["eigenvalue_min"]) > -1e-5

    matrix, names = ko.coarse_fisher(state)
    assert names == ("a", "b", "d", "c")  # order of execution, not of names
    np.testing.assert_allclose(np.diagonal(matrix), 1, rtol=1e-5)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-5)
    a, g = linear_rows(params, x)
    cross_a, cross_g = oracles.cross_factors(a, g)
    dense = np.array(
        [[cross_a[i][j].sum() * cross_g[i][j].sum() for j in range(4)] for i in range(4)]
    )
    root = np.sqrt(np.diagonal(dense))
    np.testing.assert_allclose(matrix, dense / root[:, None] / root, rtol=1e-4, atol=1e-5)


def linear_rows(params, x):
    """Rows of the linear network by hand: inputs forward, output columns backward."""
    chain = [params[k] for k in ("a", "b", "d", "c")]
    a, h = [], np.asarray(x)
    for layer in chain:
        a.append(np.concatenate([h, np.ones((len(h), 1))], 1) if "bias" in layer else h)
        h = h @ layer["kernel"] + layer.get("bias", 0)
    g, back = [], np.broadcast_to(np.eye(2)[:, None], (2, len(x), 2))
    for layer in reversed(chain):
        g.insert(0, back)
        back = back @ np.asarray(layer["kernel"]).T
    return a, g


def test_sums_that_vanish_are_not_normalised_to_correlations():
    """The gradients of logits sum to zero, so the coarse space does not see a softmax head: its row
    is rounding.
    """
    x = oracles.normal(0, (20, 3)).astype(jnp.float32)
    params = Twins().init(jax.random.key(0), x)["params"]
    estimator = ko.fisher(lambda p, x: ko.Categorical(Twins().apply({"params": p}, x)))
    tx = ko.kfac_two_level(estimator.layers(params, x), learning_rate=0.1)
    _, state = jax.jit(tx.update)(
        params, tx.init(params), params, curvature=estimator.at(params, x, key=jax.random.key(1))
    )
    matrix, names = ko.coarse_fisher(state)
    np.testing.assert_allclose(np.diagonal(matrix), [1, 1, 1, 0], rtol=1e-5)
    assert names[-1] == "c" and not matrix[-1].any()


def test_kernels_of_one_module_keep_rows_and_names_of_their_own():
    params = {"net": {"first": jnp.eye(3), "second": jnp.ones((3, 2))}}

    def twice(p, x):
        h = ko.tap_dense(x @ p["net"]["first"], x, p["net"]["first"])
        return ko.Normal(ko.tap_dense(h @ p["net"]["second"], h, p["net"]["second"]))

    estimator, x = ko.ggn(twice), jnp.ones((4, 3))
    tx = ko.kfac_two_level(estimator.layers(params, x), learning_rate=0.1)
    _, state = jax.jit(tx.update)(
        params, tx.init(params), params, curvature=estimator.at(params, x)
    )
    matrix, names = ko.coarse_fisher(state)
    assert names == ("net/first", "net/second")
    assert matrix.shape == (2, 2)


def test_inspection_names_what_is_missing():
    params, _, layers = problem()
    with pytest.raises(ValueError, match="found 0 CoarseState"):
        ko.coarse_fisher(ko.kfac(layers, learning_rate=0.1).init(params))
    with pytest.raises(ValueError, match="found 0 CurvatureState"):
        ko.diagnostics(optax.sgd(0.1).init(params))


def other_model(params, x):
    return ko.Categorical(oracles.forward({"other": params["layer0"]}, x)[0])


WRONG = [
    (dict(damping=-1.0), ValueError, "damping=-1.0; expected damping >= 0"),
    (dict(kl_clip=-1.0), ValueError, "kl_clip=-1.0; expected kl_clip > 0"),
    (dict(kl_clip=0.0), ValueError, "kl_clip=0.0; expected kl_clip > 0"),
    (dict(learning_rate=-0.1), ValueError, "learning_rate=-0.1"),
    (dict(curvature_every=0), ValueError, "curvature_every=0; expected curvature_every >= 1"),
    (dict(inverse_every=0), ValueError, "inverse_every=0"),
    (dict(decay=1.5), ValueError, "decay=1.5; expected decay <= 1"),
    (dict(damping="small"), TypeError, "expected a number, a jax.Array or a schedule"),
    (dict(damping=float("nan")), ValueError, "damping=nan"),
    (dict(inverse="lu"), ValueError, "inverse='lu'; expected one of 'eigh', 'cholesky'"),
    (
        dict(uncovered="skip"),
        ValueError,
        "uncovered='skip'; expected one of 'pass', 'diagonal', 'graft', 'raise'",
    ),
    (dict(coarse="fine"), ValueError, "coarse='fine'; expected one of 'factored', 'exact'"),
    (dict(coarse_damping="none"), ValueError, "coarse_damping='none'"),
    (dict(coarse_weight=-1.0), ValueError, "coarse_weight=-1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_hyperparameters_raise_at_construction(change, error, message):
    _, _, layers = problem()
    with pytest.raises(error, match=message):
        ko.kfac_two_level(layers, **({"learning_rate": 0.1} | change))


def test_wrong_curvature_is_named():
    params, x, layers = problem()
    tx = ko.kfac_two_level(layers, learning_rate=0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"(?s)curvature=fisher.at\(params.*curvature=None"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match=r"curvature is a ArrayImpl; expected fisher.at"):
        tx.update(params, state, params, curvature=x)
    with pytest.raises(ValueError, match="no layer 'layer0'"):
        estimator = ko.ggn(lambda p, x: oracles.classifier(p["net"], x))
        tx.update(params, state, params, curvature=estimator.at({"net": params}, x))
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), oracles.make_params(0, (3, 7, 4, 2)))
    with pytest.raises(
        ValueError,
        match=r"layer 'layer0' has shape \(3, 4\) with bias in `layers` but \(3, 7\) with bias",
    ):
        tx.update(params, state, params, curvature=ESTIMATOR.at(wide, x))
    with pytest.raises(
        ValueError, match=r"layer 'layer0' has a weight of shape \(3, 7\), but \(3, 4\)"
    ):
        tx.init(wide)
    with pytest.raises(ValueError, match="none of the layers .* is among the parameters"):
        tx.init({"elsewhere": jnp.ones(3)})
    with pytest.raises(TypeError, match="layers is a list"):
        ko.kfac([1], learning_rate=0.1)
