"""Divergences between two predictions: their definition, and the Fisher as their Hessian."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def pair(name):
    """Two predictions of two terms, what may come out, and how likely the first makes that."""
    if name == "categorical":
        first, second = ko.Categorical(normal(0, 2, 3)), ko.Categorical(normal(1, 2, 3))
        outcomes = [jnp.full(2, c) for c in range(3)]
        return first, second, outcomes, lambda y: jnp.exp(-first.nll(y))
    if name == "bernoulli":
        first, second = ko.Bernoulli(normal(0, 2, 2)), ko.Bernoulli(3 * normal(1, 2, 2))
        outcomes = [jnp.asarray([y, y]) for y in itertools.product((0.0, 1.0), repeat=2)]
        return first, second, outcomes, lambda y: jnp.exp(-first.nll(y))
    scales = (
        (0.7, 1.3) if name == "normal" else (jnp.exp(normal(2, 2, 1)), jnp.exp(normal(3, 2, 1)))
    )
    if name == "known and learned":
        scales = 0.7, scales[1]
    first, second = (ko.Normal(normal(i, 2, 1), s) for i, s in enumerate(scales))
    # exact for squares, which the difference of two log densities is made of
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    outcomes = [first.mean + first.scale * x for x in points]
    chances = iter(weights / weights.sum())
    return first, second, outcomes, lambda y: next(chances)


KINDS = ("categorical", "bernoulli", "normal", "learned scales", "known and learned")


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_mean_difference_of_log_densities(name):
    first, second, outcomes, chance = pair(name)
    wanted = sum(chance(y) * (second.nll(y) - first.nll(y)) for y in outcomes)
    np.testing.assert_allclose(first.kl(second), wanted, rtol=1e-12)
    np.testing.assert_allclose(first.kl(first), 0, atol=1e-15)
    assert (first.kl(second) > 0).all()


@pytest.mark.parametrize("name", KINDS[:4])
def test_its_hessian_is_the_fisher(name):
    """In either prediction, where the two agree; its gradient vanishes there."""
    here, other, *_ = pair(name)
    v = tuple(map(jnp.tanh, other.natural))
    between = {
        "in other": lambda natural: here.kl(here.with_natural(natural)).sum(),
        "in self": lambda natural: here.with_natural(natural).kl(here).sum(),
    }
    for divergence in between.values():
        gradient, product = jax.jit(lambda n, v, f=divergence: jax.jvp(jax.grad(f), (n,), (v,)))(
            here.natural, v
        )
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
        jax.tree.map(close, gradient, jax.tree.map(jnp.zeros_like, gradient))
        jax.tree.map(close, product, here.hessian_product(v))


def test_classes_that_are_forbidden():
    """Without probability they count nothing, in the gradient neither."""
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    open_to_all = jnp.zeros((1, 3))
    divergence = lambda x, y: ko.Categorical(x).kl(ko.Categorical(y)).sum()
    smaller = ko.Categorical(logits[:, :2]).kl(ko.Categorical(open_to_all[:, :2]))
    np.testing.assert_allclose(divergence(logits, open_to_all), smaller + jnp.log(1.5), rtol=1e-12)
    assert divergence(open_to_all, logits) == jnp.inf
    assert divergence(logits, logits) == 0
    for argument in (0, 1):
        for pair in ((logits, open_to_all), (logits, logits)):
            assert jnp.isfinite(jax.grad(divergence, argument)(*pair)).all()


def test_outcomes_that_are_forbidden():
    """As classes that are."""
    sure, open_to_all = jnp.asarray([[jnp.inf, -jnp.inf]]), jnp.zeros((1, 2))
    divergence = lambda x, y: ko.Bernoulli(x).kl(ko.Bernoulli(y)).sum()
    np.testing.assert_allclose(divergence(sure, open_to_all), 2 * jnp.log(2), rtol=1e-12)
    assert divergence(open_to_all, sure) == divergence(sure, -sure) == jnp.inf
    assert divergence(sure, sure) == 0
    for argument in (0, 1):
        for pair in ((sure, open_to_all), (sure, sure)):
            assert jnp.isfinite(jax.grad(divergence, argument)(*pair)).all()


@pytest.mark.parametrize("kind", [ko.Categorical, ko.Bernoulli])
def test_what_is_too_unlikely_for_the_dtype_counts_nothing(kind):
    """A probability that rounds to zero, where the other has none at all."""
    unlikely, forbidden = jnp.asarray([[0.0, -800.0]]), jnp.asarray([[0.0, -jnp.inf]])
    divergence = lambda x, y: kind(x).kl(kind(y)).sum()
    np.testing.assert_allclose(divergence(unlikely, forbidden), 0, atol=1e-15)
    for argument in (0, 1):
        assert jnp.isfinite(jax.grad(divergence, argument)(unlikely, forbidden)).all()


def test_half_precision_is_widened():
    half = ko.Categorical(jnp.asarray([[0.0, 1.0]], jnp.bfloat16))
    other = ko.Categorical(jnp.asarray([[0.0, 1.0 + 2**-6]], jnp.bfloat16))
    got = half.kl(other)
    wide = [ko.Categorical(x.logits.astype(jnp.float32)) for x in (half, other)]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, wide[0].kl(wide[1]))


def test_what_has_no_closed_form_or_does_not_fit_is_refused():
    three = ko.Categorical(jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match=r"other is a Bernoulli, expected a Categorical"):
        three.kl(ko.Bernoulli(jnp.zeros((2, 3))))
    with pytest.raises(ValueError, match=r"other has shape \(2, 4\).*expected \(2, 3\)"):
        three.kl(ko.Categorical(jnp.zeros((2, 4))))
    with pytest.raises(ValueError, match=r"with the batch \(2,\)"):
        ko.Normal(jnp.zeros((2, 3)), batch_ndim=2).kl(ko.Normal(jnp.zeros((2, 3))))
    sample = lambda key, u: u
    mixture = ko.from_log_density(lambda y, u: jnp.logaddexp(y - u, u - y), sample, jnp.zeros(2))
    for head in (mixture, ko.LogAmplitude(jnp.zeros(2))):
        with pytest.raises(TypeError, match=r"kl: it has no closed form.*Estimate it"):
            head.kl(head)
