"""Unnormalised amplitudes: energy and metric against Rayleigh quotients, normalised distributions
and dense covariances; what the statistics are.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.estimators.centring import centred_cotangents
from kfac_optax.estimators.output_cotangents import OutputCotangents
from kfac_optax.likelihoods import is_likelihood
from tests import oracles
from tests.helpers import computed, dense

pytestmark = pytest.mark.usefixtures("x64")
N = 6
NORM = 20  # the row of the factor, behind those of the layers


def log_psi(p, x, phase):
    """A tapped layer, a parameter without one, a factor that changes nothing but the norm."""
    out = dense(jnp.tanh(dense(x, p["a"])), p["b"])
    # not linear, or the product would be a layer's
    s = jnp.sinh(jnp.arcsinh(p["s"]))
    modulus = out[:, 0] + jnp.sin(x) @ s + computed(p["norm"])
    return jax.lax.complex(modulus, out[:, 1]) if phase else modulus


def problem(n=N):
    params = {
        "a": oracles.normal(0, (3, 4)),
        "b": oracles.normal(1, (4, 2)),
        "s": oracles.normal(2, (3,)),
        "norm": jnp.float64(0.7),
    }
    return params, oracles.normal(3, (n, 3))


def scores(params, x, phase):
    """`O`, the derivatives of `log psi`, `[N, parameters]`."""
    part = lambda take: jax.jacrev(lambda p: take(log_psi(p, x, phase)))(params)
    flat = lambda tree: np.concatenate([np.reshape(v, (len(x), -1)) for v in tree.values()], 1)
    return flat(part(jnp.real)) + 1j * flat(part(jnp.imag))


def covariance(o, weights):
    """`4 Re Cov[O]` under weights."""
    share = np.asarray(weights) / np.sum(weights)
    about = o - share @ o
    return 4 * np.real((share[:, None] * about).T @ about.conj())


def estimator(phase, make=ko.ggn, **options):
    def predict(p, x, weights=None):
        return ko.LogAmplitude(log_psi(p, x, phase), weights)

    return make(predict, **options)


def matrix(product, params):
    """The matrix of `product: tree -> tree`."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    column = lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0]
    return jax.jit(jax.vmap(column))(jnp.eye(flat.size))


WEIGHTS = {
    "equal": None,
    "unequal": np.array([1.0, 2.0, 0.5, 3.0, 0.1, 1.0]),
    "masked": np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("phase", [False, True])
def test_products_are_the_dense_centred_covariance(phase, weights):
    params, x = problem()
    w = WEIGHTS[weights]
    shares = np.ones(N) if w is None else w
    want = covariance(scores(params, x, phase), shares)
    spoil = lambda value: jnp.where(shares[:, None] > 0, x, value)
    args = lambda value: (spoil(value),) if w is None else (spoil(value), jnp.asarray(w))
    for make in (ko.ggn, ko.fisher):
        mine = estimator(phase, make)
        got = matrix(lambda v, m=mine: m.vector_product(params, v, *args(7.0)), params)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    v = jax.tree.map(jnp.cos, params)
    flat = jax.flatten_util.ravel_pytree(v)[0]
    key = jax.random.key(0)
    form = mine.at(params, *args(jnp.nan), key=key).quadratic_form([v])
    np.testing.assert_allclose(form[0, 0], flat @ want @ flat, rtol=1e-10)
    assert np.abs(got[NORM]).max() < 1e-12 < np.abs(got[NORM + 1]).max()


def test_products_on_part_of_the_walkers_are_centred_there():
    params, x = problem(9)
    want = covariance(scores(params, x[::3], True), np.ones(3))
    part = estimator(True, subsample=1 / 3)
    got = matrix(lambda v: part.vector_product(params, v, x), params)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    at = estimator(True).at(params, x)
    v = jax.tree.map(jnp.cos, params)
    flat = jax.flatten_util.ravel_pytree(v)[0]
    form = jax.jit(lambda v: at.quadratic_form([v], subsample=1 / 3))(v)
    np.testing.assert_allclose(form[0, 0], flat @ want @ flat, rtol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_products_of_devices_are_those_of_all_walkers(weighted):
    params, x = problem()
    v = jax.tree.map(jnp.cos, params)
    w = jnp.asarray(WEIGHTS["masked"]) if weighted else None
    mine = estimator(True)
    want = jax.jit(mine.vector_product)(params, v, x, w)

    def device(x, w):
        return mine.at(params, x, w).vector_product(v, axis_name="devices")

    split = lambda a: None if a is None else a.reshape(2, 3, *a.shape[1:])
    run = jax.jit(jax.vmap(device, (0, 0 if weighted else None), axis_name="devices"))
    for got in jax.tree.leaves(jax.tree.map(lambda g, t: g - t, run(split(x), split(w)), want)):
        np.testing.assert_allclose(got, 0, atol=1e-12)


def test_one_forward_pass_gives_energy_gradient_and_the_same_metric():
    params, x = problem()
    energies, v = oracles.normal(7, (N,)), jax.tree.map(jnp.cos, params)
    mine = estimator(True)
    step = mine.value_and_grad(lambda amplitude, e: amplitude.energy(e))
    loss, grads, curvature = step(params, x, targets=energies)
    o = scores(params, x, True)
    want = 2 * np.real((energies - energies.mean()) @ o) / N
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(grads)[0], want, rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(loss, energies.mean(), rtol=1e-12)
    for got, expected in zip(
        jax.tree.leaves(curvature.vector_product(v)),
        jax.tree.leaves(mine.vector_product(params, v, x)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


# --- a finite space: walkers in every state, weighted by what they are drawn with -----------------


def finite(phase):
    """States, a Hermitian matrix of energies, and what `N` states make of the parameters."""
    params, x = problem()
    h = oracles.normal(5, (N, N)) + (1j * oracles.normal(6, (N, N)) if phase else 0)
    h = h + h.conj().T
    psi = lambda p: jnp.exp(log_psi(p, x, phase))
    return params, x, h, psi


@pytest.mark.parametrize("phase", [False, True])
def test_the_energy_and_its_gradient_are_those_of_the_rayleigh_quotient(phase):
    params, x, h, psi = finite(phase)

    def rayleigh(p):
        state = psi(p)
        return (jnp.vdot(state, h @ state) / jnp.vdot(state, state)).real

    state = psi(params)
    local, weights = (h @ state) / state, jnp.abs(state) ** 2
    loss = lambda p: ko.LogAmplitude(log_psi(p, x, phase), weights).energy(local)
    got, want = (jax.value_and_grad(f)(params) for f in (loss, rayleigh))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_real_amplitude_has_the_fisher_information_of_its_normalised_square():
    """`p = |psi|^2 / Z` over the states, written as what it is: a softmax."""
    params, x, _, psi = finite(False)
    weights = jnp.abs(psi(params)) ** 2
    softmax = ko.ggn(lambda p, x: ko.Categorical(2 * log_psi(p, x, False)[None]))
    # one example against N walkers, the weights of which have mean one
    mine = estimator(False)
    got = matrix(lambda v: mine.vector_product(params, v, x, weights), params)
    want = matrix(lambda v: softmax.vector_product(params, v, x), params)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_walkers_that_do_not_count_are_not_read():
    w = jnp.asarray(WEIGHTS["masked"])
    u, e = oracles.normal(0, (N,)), oracles.normal(1, (N,))
    spoil = lambda v: jnp.where(w > 0, v, jnp.nan)
    for loss in ("energy", "mean_nll"):
        f = lambda u, e, w: getattr(ko.LogAmplitude(u, w), loss)(e)
        want = jax.value_and_grad(f)(u[w > 0], e[w > 0], None)
        value, grad = jax.value_and_grad(f)(spoil(u), spoil(e), w)
        np.testing.assert_allclose(value, want[0], rtol=1e-12)
        np.testing.assert_allclose(grad[w > 0], want[1], rtol=1e-12)
        assert (grad[w == 0] == 0).all()
        assert f(spoil(u), spoil(e), jnp.zeros(N)) == 0


# --- sample space ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("phase", [False, True])
def test_rows_of_sample_space_are_centred(phase, weights):
    """`J^T J / N` is the covariance, also at drawn signs where there is one column."""
    params, x = problem()
    w = WEIGHTS[weights]
    shares = np.ones(N) if w is None else w
    args = (x,) if w is None else (x, jnp.asarray(w))
    want = covariance(scores(params, x, phase), shares)
    mine = estimator(phase, ko.fisher)
    for sampled in {False, not phase}:
        j = mine.at(params, *args, key=jax.random.key(0)).linearize(sampled=sampled)
        got = matrix(lambda v, j=j: jax.tree.map(lambda g: g / N, j.vjp(j.jvp(v))), params)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("phase", [False, True])
def test_natural_gradients_of_sample_space_are_exact(phase):
    """From the gradient as from the residual whose `J^T r / N` it is."""
    params, x = problem()
    shares, mine = WEIGHTS["unequal"], estimator(phase)
    w = jnp.asarray(shares)
    want = covariance(scores(params, x, phase), shares)
    energies = oracles.normal(7, (N,)) + (1j * oracles.normal(8, (N,)) if phase else 0)
    head = lambda p: ko.LogAmplitude(log_psi(p, x, phase), w)
    grads = jax.grad(lambda p: head(p).energy(energies))(params)
    about = energies - np.average(energies, weights=shares)
    parts = jnp.stack([about.real, about.imag][: 1 + phase], -1)
    residual = [parts * jnp.sqrt(shares / shares.mean())[:, None]]
    tx = ko.smw(damping=0.1)
    flat = jax.flatten_util.ravel_pytree(grads)[0]
    expected = np.linalg.solve(want + 0.1 * np.eye(len(want)), flat)

    @jax.jit
    def update(grads, residual):
        at = mine.at(params, x, w)
        return tx.update(grads, tx.init(params), params, curvature=at, residual=residual)[0]

    for given in (None, residual):
        updates = update(grads, given)
        got = jax.flatten_util.ravel_pytree(updates)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-11)


def test_sample_space_of_devices_is_that_of_all_walkers():
    params, x = problem()
    w = jnp.asarray(WEIGHTS["masked"])
    mine, v = estimator(True, ko.fisher), jax.tree.map(jnp.cos, params)

    @jax.jit
    def both(x, w):
        def device(x, w):
            at = mine.at(params, x, w, key=jax.random.key(0))
            j = at.linearize(axis_name="devices")
            return j.vjp(j.jvp(v)), at.sampled_gradient(axis_name="devices")

        split = (a.reshape(2, 3, *a.shape[1:]) for a in (x, w))
        return jax.vmap(device, axis_name="devices")(*split)

    product, gradient = both(x, w)
    want = jax.jit(mine.vector_product)(params, v, x, w)
    for got, expected in zip(*map(jax.tree.leaves, (product, want)), strict=True):
        np.testing.assert_allclose(got[0] / N, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient["norm"], 0, atol=1e-12)
    assert np.abs(gradient["s"]).min() > 1e-3


def test_kernels_of_rows_are_refused():
    params, x = problem()
    mine = estimator(False)
    layers = mine.layers(params, x)
    with pytest.raises(ValueError, match="LogAmplitude has scores about their mean.*no `layers=`"):
        mine.at(params, x).rows(tuple(layers))


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cotangents_have_the_centred_second_moment(weights):
    """Over all patterns of signs: `4 (W - w w^T / N)`, and rows `4 w_b (1 - w_b / N)`."""
    w = np.ones(N) if WEIGHTS[weights] is None else WEIGHTS[weights] / WEIGHTS[weights].mean()
    root = None if WEIGHTS[weights] is None else jnp.sqrt(w)
    head = ko.LogAmplitude(jnp.zeros(N))
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=N)))
    drawn = OutputCotangents(1, lambda k: [(2 * jnp.sqrt(w) * k,)])
    make = centred_cotangents(drawn, [head], [root]).make
    rows = np.asarray(jax.vmap(lambda k: make(k)[0][0])(signs))
    moment = rows.T @ rows / len(rows)
    np.testing.assert_allclose(moment, 4 * (np.diag(w) - np.outer(w, w) / N), atol=1e-12)
    np.testing.assert_allclose(rows.sum(1), 0, atol=1e-12)
    plain = centred_cotangents(drawn, [ko.Normal(jnp.zeros(N))], [root]).make(signs[1])
    np.testing.assert_array_equal(plain[0][0], 2 * jnp.sqrt(w) * signs[1])


@pytest.mark.parametrize(("make", "phase"), [(ko.ggn, True), (ko.fisher, False), (ko.fisher, True)])
def test_statistics_are_what_they_are_said_to_be(make, phase):
    """On average over signs: factors about zero, up to `1 - w_b / N`; the diagonal of what has no
    layer centred.
    """
    params, x = problem()
    w = jnp.asarray(WEIGHTS["unequal"]) / np.mean(WEIGHTS["unequal"])
    mine = estimator(phase, make)
    tx = ko.scale_by_curvature(
        mine.layers(params, x, w), block=ko.kronecker(), damping=1.0, uncovered="diagonal"
    )

    @jax.jit
    @jax.vmap
    def run(key):
        at = mine.at(params, x, w, key=key)
        return tx.update(params, tx.init(params), params, curvature=at)[1].factors

    factors = jax.tree.map(lambda v: v.mean(0), run(jax.random.split(jax.random.key(0), 4000)))
    hidden = jnp.tanh(x @ params["a"])
    parts = [jnp.eye(2)[0], jnp.eye(2)[1]][: 1 + phase]
    rows = [(1 - hidden**2) * (params["b"] @ part) for part in parts]
    counts = w * (1 - w / N)
    want = sum(4 * (g * counts[:, None]).T @ g for g in rows) / N
    got = factors["dense_3x4"]
    np.testing.assert_allclose(got.inputs[0], (x * w[:, None]).T @ x / N, rtol=1e-10)
    np.testing.assert_allclose(got.outputs[0], want, atol=0.05 * np.abs(want).max())
    diagonal = np.diag(covariance(scores(params, x, phase), w))
    names = [name for name in factors if name.startswith("diagonal")]
    measured = np.concatenate([factors[name].ravel() for name in names])
    np.testing.assert_allclose(
        np.sort(measured), np.sort(diagonal[NORM:]), atol=0.1 * diagonal[NORM:].max()
    )


def test_diagonals_of_devices_are_centred_on_each():
    params, x = problem()
    mine = estimator(False, ko.fisher)
    tx = ko.scale_by_curvature(
        mine.layers(params, x),
        block=ko.kronecker(),
        damping=1.0,
        uncovered="diagonal",
        axis_name="devices",
    )

    def device(x, key):
        at = mine.at(params, x, key=key)
        return tx.update(params, tx.init(params), params, curvature=at)[1].factors

    devices = jax.vmap(device, (0, None), axis_name="devices")
    run = jax.jit(jax.vmap(devices, (None, 0)))
    factors = run(x.reshape(2, 3, 3), jax.random.split(jax.random.key(0), 4000))
    apart = [
        np.diag(covariance(scores(params, part, False), np.ones(3))) for part in (x[:3], x[3:])
    ]
    want = np.mean(apart, 0)[NORM:]
    names = [name for name in factors if name.startswith("diagonal")]
    got = np.concatenate([factors[name].mean(0)[0].ravel() for name in names])
    np.testing.assert_allclose(np.sort(got), np.sort(want), atol=0.1 * want.max())


def test_one_walker_says_nothing():
    """Its score is its own mean."""
    params, x = problem(1)
    mine = estimator(True)
    product = jax.jit(mine.vector_product)(params, params, x)
    assert all((v == 0).all() for v in jax.tree.leaves(product))
    tx = ko.kfac(mine.layers(params, x), learning_rate=0.1, damping=0.5)
    update = jax.jit(lambda state: tx.update(params, state, params, curvature=mine.at(params, x)))
    updates, _ = update(tx.init(params))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(updates))


def test_the_table_says_what_is_not_centred():
    params, x = problem()
    for make in (ko.ggn, ko.fisher):
        layers = estimator(True, make).layers(params, x)
        table = str(layers)
        assert table.endswith("rows of single walkers are second moments about zero")
        assert str(ko.coverage(layers)).endswith(layers.remarks[0])
        assert "LogAmplitude: exact products and sums over the batch are centred" in table
    normal = ko.ggn(lambda p, x: ko.Normal(log_psi(p, x, False)))
    for other in (normal, estimator(True, ko.forward_only)):
        assert "centred" not in str(other.layers(params, x))


# --- refusals -------------------------------------------------------------------------------------


def test_what_is_no_amplitude_is_refused():
    assert is_likelihood(ko.LogAmplitude(jnp.zeros(3)))
    with pytest.raises(TypeError, match="LogAmplitude: log_psi has dtype int64"):
        ko.LogAmplitude(jnp.zeros(3, int))
    with pytest.raises(
        ValueError, match=r"weights have shape \(2,\), expected the batch shape \(3,\)"
    ):
        ko.LogAmplitude(jnp.zeros(3), jnp.ones(2))
    with pytest.raises(ValueError, match=r"energy: targets have shape \(3, 1\), expected \(3,\)"):
        ko.LogAmplitude(jnp.zeros(3)).energy(jnp.ones((3, 1)))
    params, x = problem()
    states = ko.ggn(lambda p, x: ko.LogAmplitude(dense(jnp.tanh(dense(x, p["a"])), p["b"])))
    with pytest.raises(ValueError, match=r"log_psi has shape \(6, 2\), expected \[N\].*each state"):
        states.layers(params, x)


def test_states_with_heads_of_their_own_are_centred_apart():
    params, x = problem()

    def predict(p, x):
        out = dense(jnp.tanh(dense(x, p["a"])), p["b"])
        return [ko.LogAmplitude(out[:, i]) for i in range(2)]

    names = ("a", "b")
    two = {name: params[name] for name in names}
    got = matrix(lambda v: ko.ggn(predict).vector_product(two, v, x), two)
    o = scores(two | {"s": jnp.zeros(3), "norm": jnp.zeros(())}, x, True)[:, :NORM]
    want = covariance(o.real, np.ones(N)) + covariance(o.imag, np.ones(N))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_half_precision_and_replacement_keep_their_types():
    head = ko.LogAmplitude(jnp.zeros(3, jnp.bfloat16))
    assert head.sample(jax.random.key(0)).dtype == jnp.float32
    assert head.fisher_sqrt_column(0)[0].dtype == head.hessian_product(head.natural)[0].dtype
    assert head.energy(jnp.ones(3)).dtype == jnp.float64 and head.num_columns == 1
    both = dataclasses.replace(head, log_psi=jnp.zeros(3, jnp.complex64))
    assert both.num_columns == 2 and both.with_natural(both.natural).log_psi.dtype == jnp.complex64
