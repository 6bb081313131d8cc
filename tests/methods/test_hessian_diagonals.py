"""AdaHessian, ESGD and the Gauss-Newton-Bartlett estimator against dense Hessians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.engine.state import GNBState
from kfac_optax.methods.gradient import psgd_fit

W = jnp.array([3.0, -2.0, 0.5])
DIAGONAL = jnp.array([2.0, -8.0, 0.5])
INDEFINITE = jnp.array([[2.0, 1.0], [1.0, -3.0]])


def parabola(w):
    return jnp.sum(DIAGONAL * w**2) / 2


def run(tx, steps, **extra):
    """Updates at `W`, and the last state; one compiled step."""

    @jax.jit
    def step(state):
        return tx.update(jax.grad(parabola)(W), state, W, **extra)

    out, state = [], tx.init(W)
    for _ in range(steps):
        update, state = step(state)
        out.append(update)
    return out, state


@pytest.mark.parametrize("how", ["value_fn", "obj_fn", "hvp"])
def test_one_step_to_the_minimum_of_a_parabola(how):
    """Signs give the diagonal exactly where the Hessian has nothing else; its size counts."""
    extra = {how: (lambda v: DIAGONAL * v) if how == "hvp" else parabola}
    (update,), _ = run(ko.adahessian(b1=0.0, b2=0.0, eps=0.0), 1, **extra)
    np.testing.assert_allclose(update, W * jnp.sign(DIAGONAL), rtol=1e-6)


def test_adahessian_is_its_recursion(x64):
    """Moments, bias and power; the Hessian is measured in every third step only."""
    words = dict(b1=0.8, b2=0.6, eps=0.1, power=0.5, curvature_every=3)
    scales = iter([1.0, 2.0, 0.5])
    tx = ko.adahessian(**words)
    rng = np.random.default_rng(0)
    w = jnp.asarray(W, jnp.float64)
    state, m, n, seen = tx.init(w), np.zeros(3), np.zeros(3), 0
    step = jax.jit(lambda g, state, h: tx.update(g, state, w, hvp=lambda v: h * v))
    for t in range(1, 8):
        g = rng.normal(size=3)
        if (t - 1) % 3 == 0:
            h, seen = next(scales) * np.asarray(DIAGONAL, np.float64), seen + 1
            n = 0.6 * n + 0.4 * h**2
        m = 0.8 * m + 0.2 * g
        expected = m / (1 - 0.8**t) / ((n / (1 - 0.6**seen)) ** 0.25 + 0.1)
        update, state = step(jnp.asarray(g), state, h)
        np.testing.assert_allclose(update, expected, rtol=1e-10)


def test_the_mean_over_signs_is_the_diagonal():
    tx = ko.adahessian(b1=0.0, b2=0.0, abs_before_average=False)
    state, w = tx.init(jnp.zeros(2)), jnp.zeros(2)

    def step(state, _):
        _, state = tx.update(jnp.ones(2), state, w, hvp=lambda v: INDEFINITE @ v)
        return state, jnp.sqrt(state.held.probes.squares)

    _, sizes = jax.lax.scan(step, state, length=2000)
    # |2 +- 1| and |-3 +- 1|, each half of the time
    error = sizes.std(0) / np.sqrt(len(sizes))
    assert (np.abs(sizes.mean(0) - jnp.array([2.0, 3.0])) < 3 * error).all()
    assert (np.abs(sizes - jnp.array([2.0, 3.0])) > 0.99).all()


@pytest.mark.parametrize("abs_before_average", [True, False])
def test_entries_that_belong_together_share_their_curvature(x64, abs_before_average):
    rng = np.random.default_rng(1)
    shapes = {"conv": (2, 1, 2, 3), "line": (2, 2, 3), "dense": (2, 4), "odd": (2, 3)}
    h = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    params = jax.tree.map(jnp.zeros_like, h)
    tx = ko.adahessian(b2=0.0, block=2, abs_before_average=abs_before_average)
    hvp = lambda v: jax.tree.map(jnp.multiply, h, v)
    update = lambda tx: jax.jit(lambda: tx.update(h, tx.init(params), params, hvp=hvp)[1])()
    state = update(tx)
    size = np.abs if abs_before_average else (lambda x: x)
    conv = np.broadcast_to(size(h["conv"]).mean((0, 1)), (2, 1, 2, 3))
    dense = size(h["dense"]).reshape(2, 2, 2).mean(-1, keepdims=True).repeat(2, -1).reshape(2, 4)
    squares = state.held.probes.squares
    for name, expected in {
        "conv": conv,
        "line": h["line"],
        "dense": dense,
        "odd": h["odd"],
    }.items():
        np.testing.assert_allclose(squares[name], expected**2, rtol=1e-12)
    # what is a window can be said by name
    tx = ko.adahessian(b2=0.0, spatial=lambda name: 1 if name == "line" else 0)
    state = update(tx)
    line = np.broadcast_to(np.abs(h["line"]).mean(0), (2, 2, 3))
    np.testing.assert_allclose(state.held.probes.squares["line"], line**2, rtol=1e-12)
    np.testing.assert_allclose(state.held.probes.squares["conv"], h["conv"] ** 2, rtol=1e-12)


@pytest.mark.parametrize("axes", [-1, 3, 1.5])
def test_axes_that_a_leaf_does_not_have_are_said(axes):
    w = jnp.ones((2, 2))
    tx = ko.adahessian(spatial=lambda name: axes)
    message = (
        rf"adahessian: spatial\('kernel'\) is {axes} for a leaf of shape \(2, 2\).*from 0 to 2"
    )
    with pytest.raises(ValueError, match=message):
        tx.update({"kernel": w}, tx.init({"kernel": w}), hvp=lambda v: v)


def test_esgd_divides_by_norms_of_rows():
    """Not by the diagonal, 2 and 3; positive at a saddle."""
    tx = ko.esgd(damping=1e-3, curvature_every=1)
    w = jnp.zeros(2)

    def step(state, _):
        return tx.update(w, state, w, hvp=lambda v: INDEFINITE @ v)[1], None

    state, _ = jax.lax.scan(step, tx.init(w), length=2000)
    norms = jnp.sum(INDEFINITE**2, axis=1)
    # the square of a normal number has twice its squared mean as variance
    error = norms * np.sqrt(2 / 2000)
    assert (np.abs(state.held.squares - norms) < 3 * error).all()
    update, _ = tx.update(jnp.ones(2), state, w, hvp=lambda v: INDEFINITE @ v)
    np.testing.assert_allclose(update, 1 / (jnp.sqrt(norms) + 1e-3), rtol=0.1)
    # the diagonal preconditioner of PSGD on pairs (v, H v) comes to rest at the same numbers
    q = jnp.ones((1, 2))
    for _ in range(200):
        q = psgd_fit.moved(q, q**2 * state.held.squares, 1 / q**2, jnp.float32(0.5))
    np.testing.assert_allclose(q[0] ** 2, 1 / jnp.sqrt(state.held.squares), rtol=1e-4)


def test_esgd_does_not_depend_on_the_units(x64):
    """With `theta = c theta'` the Hessian is `c^2` times as large, the gradient `c` times."""
    c = 10.0

    def two_steps(c):
        tx, w = ko.esgd(damping=1e-12, curvature_every=2), jnp.ones(2)
        state = tx.init(w)
        for g in ([1.0, 2.0], [3.0, -1.0]):
            hvp = lambda v: c**2 * INDEFINITE @ v
            update, state = tx.update(c * jnp.array(g), state, w, hvp=hvp)
        return c * update

    np.testing.assert_allclose(two_steps(c), two_steps(1.0), rtol=1e-10)


@pytest.mark.parametrize("make", [ko.adahessian, ko.esgd], ids=["adahessian", "esgd"])
def test_a_product_that_is_not_finite_is_left_out(make):
    """In the first step there is no other, so there is no update; later the last ones serve."""

    def step(state, scale):
        return tx.update(W, state, W, hvp=lambda v: scale * DIAGONAL * v)

    tx = make(curvature_every=1)
    none, state = step(tx.init(W), jnp.nan)
    np.testing.assert_array_equal(none, jnp.zeros(3))
    update, state = step(state, 1.0)
    assert (update != 0).all()
    update, state = step(state, jnp.inf)
    assert (update != 0).all()
    assert int(state.counts.skipped_statistics) == 2
    assert int(state.counts.gradient_count) == 3


@pytest.mark.parametrize("make", [ko.adahessian, ko.esgd], ids=["adahessian", "esgd"])
def test_without_a_function_it_says_what_to_pass(make):
    tx = make()
    with pytest.raises(ValueError, match=r"neither `value_fn` nor `hvp`"):
        tx.update(W, tx.init(W), W)
    with pytest.raises(ValueError, match=r"needs all parameters, but got none"):
        tx.update(W, tx.init(W), value_fn=parabola)
    masked = optax.masked(tx, {"a": True, "b": False})
    params = {"a": W, "b": W}
    state = masked.init(params)
    with pytest.raises(ValueError, match=r"those that optax.masked left"):
        masked.update(params, state, params, value_fn=lambda p: parabola(p["a"]))
    update, _ = masked.update(
        params, state, params, hvp=lambda v: {"a": DIAGONAL * v["a"], "b": v["b"]}
    )
    np.testing.assert_array_equal(update["b"], W)


X = jax.random.normal(jax.random.key(0), (4, 2))
LOGITS = jax.random.normal(jax.random.key(1), (2, 2))


def categorical(weights=None):
    return lambda w, x: ko.Categorical(ko.tap_dense(x @ w, x, w), weights=weights)


def scores(x, w):
    """`s_b(y) = x_b (p - e_y)^T` for both labels, and their probabilities, `[N, 2, ...]`."""
    p = np.asarray(jax.nn.softmax(x @ w))
    difference = p[:, None, :] - np.eye(2)
    return np.einsum("bi,byj->byij", x, difference), p


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 3.0, 0.5)])
def test_the_mean_over_all_labels_is_the_diagonal(x64, weights):
    """All `2^4` drawings with their probabilities: `N g * g` has the diagonal of the mean loss's
    Gauss-Newton matrix as its mean, also with weights.
    """
    x, w = np.asarray(X, np.float64), np.asarray(LOGITS, np.float64)
    of_labels, p = scores(x, w)
    share = np.ones(4) if weights is None else np.asarray(weights) * 4 / np.sum(weights)
    mean = np.zeros((2, 2))
    for labels in itertools.product(range(2), repeat=4):
        chosen = np.arange(4), np.asarray(labels)
        g = np.einsum("b,bij->ij", np.sqrt(share), of_labels[chosen]) / 4
        mean += np.prod(p[chosen]) * 4 * g**2
    expected = (share[:, None] * x**2).T @ (p * (1 - p)) / 4
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    # and every estimate is one of these squares
    seen = np.stack(
        [
            4 * (np.einsum("b,bij->ij", np.sqrt(share), of_labels[np.arange(4), labels]) / 4) ** 2
            for labels in itertools.product(range(2), repeat=4)
        ]
    )
    weighted = None if weights is None else jnp.asarray(weights)
    estimator = ko.fisher(categorical(weighted))
    tx = ko.gnb_estimator()
    update = jax.jit(tx.update)
    for number in range(3):
        curvature = estimator.at(jnp.asarray(w), jnp.asarray(x), key=jax.random.key(number))
        got, _ = update(jnp.asarray(w), tx.init(w), curvature=curvature)
        assert np.abs(seen - got).max((1, 2)).min() < 1e-12


def test_gnb_plugs_into_sophia():
    """On the logistic model the average goes to the diagonal; nothing runs between two refreshes."""
    estimator = ko.fisher(categorical())
    tx = optax.contrib.sophia(
        0.1, b2=0.998, update_interval=2, hessian_diagonal_fn=ko.gnb_estimator()
    )

    def step(state, key):
        curvature = estimator.at(LOGITS, X, key=key)
        updates, state = tx.update(jnp.ones((2, 2)), state, LOGITS, curvature=curvature)
        return state, (updates, state[0].nu)

    keys = jax.random.split(jax.random.key(5), 3000)
    state, (updates, nu) = jax.jit(lambda s: jax.lax.scan(step, s, keys))(tx.init(LOGITS))
    p = jax.nn.softmax(X @ LOGITS)
    expected = np.asarray((X**2).T @ (p * (1 - p)) / 4)
    # an average with weight .998 sees about 1000 estimates, each as wide as its mean squared times 2
    error = expected * np.sqrt(2 / 1000)
    assert (np.abs(nu[-1] - expected) < 3 * error).all()
    np.testing.assert_array_equal(nu[2], nu[3])
    assert (nu[3] != nu[4]).any()
    assert (np.abs(updates) <= 0.1 * (1 + 1e-4 * np.abs(LOGITS)) + 1e-6).all()
    assert isinstance(state[0].hessian_fn_state, GNBState)
    assert int(state[0].hessian_fn_state.estimates) == 1500


def test_gnb_of_a_bad_batch_is_zero_and_counted():
    estimator, tx = ko.fisher(categorical()), ko.gnb_estimator()
    curvature = estimator.at(LOGITS, X * jnp.nan, key=jax.random.key(0))
    diagonal, state = jax.jit(tx.update)(LOGITS, tx.init(LOGITS), curvature=curvature)
    np.testing.assert_array_equal(diagonal, jnp.zeros((2, 2)))
    assert "1 estimates of the Hessian's diagonal" in ko.problems(state)[0]
    with pytest.raises(ValueError, match="gnb_estimator.update got no `curvature`"):
        tx.update(LOGITS, state)
    with pytest.raises(ValueError, match="labels are to be drawn"):
        losses = ko.empirical_fisher(lambda w, x: categorical()(w, x).nll(jnp.zeros(4, jnp.int32)))
        tx.update(LOGITS, state, curvature=losses.at(LOGITS, X))
