"""Likelihoods of one's own: from a log density, and as a class that follows the protocol."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.scipy.stats as stats
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.likelihoods import is_likelihood


def poisson(log_rate, **words):
    return ko.from_log_density(
        lambda y, u: y * u - jnp.exp(u) - jax.scipy.special.gammaln(y + 1),
        lambda key, u: jax.random.poisson(key, jnp.exp(u)).astype(u.dtype),
        log_rate,
        fisher=lambda u: jnp.exp(u)[None, None],
        **words,
    )


def gaussian(mean, scale, **words):
    def log_density(y, m, s):
        return jnp.sum(stats.norm.logpdf(y, m, s))

    def fisher(m, s):
        return jnp.diag(jnp.concatenate([1 / s**2, 2 / s**2]))

    def sample(key, m, s):
        return m + s * jax.random.normal(key, m.shape, m.dtype)

    return ko.from_log_density(log_density, sample, mean, scale, fisher=fisher, **words)


def student(mean, degrees=4.0, **words):
    """Of unit scale; the Fisher information of its mean is `(d + 1) / (d + 3)`."""
    return ko.from_log_density(
        lambda y, m: stats.t.logpdf(y, degrees, m),
        lambda key, m: m + jax.random.t(key, degrees, dtype=m.dtype),
        mean,
        fisher=lambda m: jnp.full((1, 1), (degrees + 1) / (degrees + 3), m.dtype),
        **words,
    )


def ordinal(score, cuts=(-1.0, 0.5), **words):
    """`P(y <= k) = sigmoid(cut_k - score)`; three classes."""

    def probabilities(u):
        below = jax.nn.sigmoid(jnp.asarray(cuts, u.dtype) - u)
        ends = jnp.zeros(1, u.dtype), jnp.ones(1, u.dtype)
        return jnp.diff(jnp.concatenate([ends[0], below, ends[1]]))

    def fisher(u):
        slopes = jax.jacobian(probabilities)(u)
        return jnp.sum(slopes**2 / probabilities(u))[None, None]

    return ko.from_log_density(
        lambda y, u: jnp.log(probabilities(u)[y]),
        lambda key, u: jax.random.categorical(key, jnp.log(probabilities(u))),
        score,
        fisher=fisher,
        **words,
    )


def mixture(outputs, **words):
    """Two Gaussians: logits, means, log scales on the last axis; no Fisher information known."""

    def parts(z):
        return jax.nn.log_softmax(z[:2]), z[2:4], jnp.exp(z[4:])

    def log_density(y, z):
        logits, means, scales = parts(z)
        return jax.nn.logsumexp(logits + stats.norm.logpdf(y, means, scales))

    def sample(key, z):
        logits, means, scales = parts(z)
        first, second = jax.random.split(key)
        k = jax.random.categorical(first, logits)
        return means[k] + scales[k] * jax.random.normal(second, (), z.dtype)

    return ko.from_log_density(log_density, sample, outputs, **words)


SCALAR = {"poisson": poisson, "student": student, "ordinal": ordinal}


def linear(make, size=1):
    def predict(w, x):
        s = ko.tap_dense(x @ w, x, w)
        return make(s[:, 0] if size == 1 else s)

    return predict


def data(size=1):
    keys = jax.random.split(jax.random.key(1), 2)
    w = 0.5 * jax.random.normal(keys[0], (3, size), jnp.float64)
    return w, jax.random.normal(keys[1], (5, 3), jnp.float64)


def columns_to_matrix(head, k):
    """`S S^T` of the only term, from its columns."""
    columns = [
        jnp.concatenate([x.ravel() for x in head.fisher_sqrt_column(c)])
        for c in range(head.num_columns)
    ]
    root = jnp.stack(columns, 1)
    assert root.shape[0] == k
    return root @ root.T


@pytest.mark.parametrize("name", SCALAR)
def test_columns_and_products_are_the_second_moment_of_the_score(x64, name):
    """The Fisher information that is given is that of the samples that are drawn."""
    one = jnp.array([0.3])
    head = SCALAR[name](one)
    many = SCALAR[name](jnp.full(200_000, 0.3))
    score = jax.grad(lambda u: jnp.sum(many.with_natural((u,)).nll(many.sample(jax.random.key(0)))))
    moment = jnp.mean(score(many.natural[0]) ** 2)
    matrix = columns_to_matrix(head, 1)
    np.testing.assert_allclose(matrix[0, 0], moment, rtol=0.02)
    np.testing.assert_allclose(head.hessian_product((one,))[0], matrix[0, 0] * one, rtol=1e-12)


def test_two_arrays_are_the_normal_that_is_here(x64):
    keys = jax.random.split(jax.random.key(0), 4)
    mean = jax.random.normal(keys[0], (4, 2))
    scale = 0.5 + jax.random.uniform(keys[1], (4, 2))
    weights = jnp.array([1.0, 0.0, 2.0, 1.0])
    own, known = gaussian(mean, scale, weights=weights), ko.Normal(mean, scale, weights)
    y = jax.random.normal(keys[2], (4, 2))
    np.testing.assert_allclose(own.nll(y), known.nll(y), rtol=1e-12)
    np.testing.assert_allclose(own.mean_nll(y), known.mean_nll(y), rtol=1e-12)
    assert own.num_columns == known.num_columns and own.batch_shape == known.batch_shape
    v = (jax.random.normal(keys[3], (4, 2)), jnp.ones((4, 2)))
    for got, expected in zip(own.hessian_product(v), known.hessian_product(v), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    for term in range(4):
        mine = gaussian(mean[term : term + 1], scale[term : term + 1])
        theirs = ko.Normal(mean[term : term + 1], scale[term : term + 1])
        np.testing.assert_allclose(
            columns_to_matrix(mine, 4), columns_to_matrix(theirs, 4), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", SCALAR)
def test_ggn_of_a_linear_model_is_dense(x64, name):
    w, x = data()
    estimator = ko.ggn(linear(SCALAR[name]))
    heads = SCALAR[name]((x @ w)[:, 0])
    information = heads.hessian_product((jnp.ones(5),))[0]
    dense = (x * information[:, None]).T @ x / 5
    v = jnp.array([[1.0], [-2.0], [0.5]])
    np.testing.assert_allclose(estimator.vector_product(w, v, x), dense @ v, rtol=1e-10)
    # one layer with one output: A (x) G is exact where the information is the same for all
    tx = ko.kfac(estimator.layers(w, x), kl_clip=None, damping=0.1)
    updates, _ = tx.update(v, tx.init(w), w, curvature=estimator.at(w, x))
    expected = np.linalg.inv(x.T @ x / 5 * information.mean() + 0.1 * np.eye(3)) @ v
    np.testing.assert_allclose(updates, expected, rtol=1e-9)


def test_a_mixture_trains_by_sampled_labels():
    """A head without exact Fisher information, on data with two values for one input."""
    w = 0.1 * jax.random.normal(jax.random.key(3), (3, 6))
    x = jnp.concatenate([jnp.ones((64, 1)), jax.random.normal(jax.random.key(0), (64, 2))], 1)
    y = jnp.where(jnp.arange(64) % 2 == 0, 2.0, -2.0)
    predict = linear(mixture, 6)
    estimator = ko.fisher(predict)
    tx = ko.kfac(
        estimator.layers(w, x), learning_rate=0.3, damping=0.1, curvature_every=1, inverse_every=1
    )

    @jax.jit
    def step(w, state, key):
        loss, grads = jax.value_and_grad(lambda w: predict(w, x).mean_nll(y))(w)
        updates, state = tx.update(grads, state, w, curvature=estimator.at(w, x, key=key))
        return w - 0.3 * updates, state, loss

    state, losses = tx.init(w), []
    for i in range(200):
        w, state, loss = step(w, state, jax.random.key(i))
        losses.append(float(loss))
    # one Gaussian for both values: log 2 + log(2 pi e) / 2 = 2.11; two of them: log 2 and less
    assert losses[-1] < 1.5 < losses[0]


def test_padding_of_weight_zero_is_not_read(x64):
    weights = jnp.array([1.0, 0.0, 1.0])
    rates, counts = jnp.array([0.1, jnp.nan, 0.4]), jnp.array([1.0, jnp.nan, 2.0])
    loss, gradient = jax.value_and_grad(lambda u: poisson(u, weights=weights).mean_nll(counts))(
        rates
    )
    kept = jnp.array([0, 2])
    np.testing.assert_allclose(loss, jnp.mean(poisson(rates[kept]).nll(counts[kept])), rtol=1e-12)
    assert gradient[1] == 0 and np.isfinite(gradient).all()


def test_vmap_over_examples_keeps_what_is_a_term():
    w, x = jnp.ones((3, 1)), jnp.ones((4, 3))

    def one(w, x):
        return poisson(ko.tap_dense(x @ w, x, w)[0], batch_ndim=0)

    layers = ko.ggn(jax.vmap(one, (None, 0))).layers(w, x)
    assert layers.layers[0].shape == (3, 1)


def test_errors_of_log_densities():
    with pytest.raises(ValueError, match="got no natural arrays"):
        ko.from_log_density(lambda y: y, lambda key: key)
    with pytest.raises(ValueError, match=r"natural\[1\] has shape \(3,\); expected 1 leading axes"):
        gaussian(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"expected the batch shape \(2,\)"):
        poisson(jnp.ones(2), weights=jnp.ones(3))
    with pytest.raises(TypeError, match="expected real numbers"):
        poisson(jnp.ones(2, complex))
    with pytest.raises(ValueError, match=r"targets have shape \(3,\)"):
        poisson(jnp.ones(2)).nll(jnp.ones(3))
    with pytest.raises(ValueError, match=r"Pass fisher=, a function .* matrix \[6, 6\]"):
        ko.ggn(linear(mixture, 6)).layers(jnp.ones((3, 6)), jnp.ones((5, 3)))
    wrong = functools.partial(
        ko.from_log_density, lambda y, u: -(y - u), lambda key, u: u, fisher=lambda u: jnp.ones(2)
    )
    with pytest.raises(ValueError, match=r"fisher returned shape \(2,\)"):
        ko.ggn(linear(wrong)).layers(jnp.ones((3, 1)), jnp.ones((5, 3)))
    vector = functools.partial(ko.from_log_density, lambda y, u: -(y - u), lambda key, u: u)
    with pytest.raises(ValueError, match=r"log_density returned shape \(2,\)"):
        vector(jnp.ones((3, 2))).nll(jnp.ones((3, 2)))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rate", "weights"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Exponential:
    """As a user writes one: `p(y) = r exp(-r y)`, with `log r` for the natural array."""

    rate: jax.Array
    weights: jax.Array | None = None
    num_columns = 1

    @property
    def natural(self):
        return (self.rate,)

    @property
    def batch_shape(self):
        return self.rate.shape

    def with_natural(self, natural):
        return dataclasses.replace(self, rate=natural[0])

    def nll(self, y):
        return jnp.exp(self.rate) * y - self.rate

    def mean_nll(self, y):
        return jnp.mean(self.nll(y))

    def sample(self, key):
        draw = jax.random.exponential(key, self.rate.shape, self.rate.dtype)
        return jax.lax.stop_gradient(draw * jnp.exp(-self.rate))

    def fisher_sqrt_column(self, c):
        return (jnp.ones_like(self.rate),)

    def hessian_product(self, v):
        return v


def test_a_class_of_ones_own_is_a_head_like_any_other(x64):
    w, x = data()
    assert is_likelihood(Exponential(x[:, 0]))
    ggn, fisher = ko.ggn(linear(Exponential)), ko.fisher(linear(Exponential))
    v = jnp.ones((3, 1))
    np.testing.assert_allclose(ggn.vector_product(w, v, x), x.T @ x @ v / 5, rtol=1e-12)
    for estimator, key in ((ggn, None), (fisher, jax.random.key(0))):
        tx = ko.kfac_two_level(estimator.layers(w, x), learning_rate=0.1)
        updates, _ = tx.update(v, tx.init(w), w, curvature=estimator.at(w, x, key=key))
        assert np.isfinite(updates).all()


def test_what_a_class_lacks_is_named():
    def without(*names):
        members = {n: m for n, m in vars(Exponential).items() if n not in names}
        made = type("Mine", (), {k: m for k, m in members.items() if not k.startswith("__")})
        made.__init__ = lambda self, rate: setattr(self, "rate", rate)
        made.weights = None
        jax.tree_util.register_pytree_node(made, lambda h: ((h.rate,), None), lambda _, c: made(*c))
        return made

    w, x = jnp.ones((3, 1)), jnp.ones((5, 3))
    with pytest.raises(TypeError, match="returned Mine without batch_shape, num_columns"):
        ko.ggn(linear(without("batch_shape", "num_columns"))).layers(w, x)

    class Summed(Exponential):
        def nll(self, y):
            return jnp.sum(super().nll(y))

    jax.tree_util.register_dataclass(Summed, ["rate", "weights"], [])
    with pytest.raises(ValueError, match=r"Summed.nll\(sample\(key\)\) returned shapes \[\(\)\]"):
        ko.fisher(linear(Summed)).layers(w, x)
