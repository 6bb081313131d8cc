"""Random signs of the terms: nothing changes where a row sees one term, and where it sees several
it is right on average.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.estimators.output_cotangents import OutputCotangents, fisher_columns, signed
from tests import helpers, oracles
from tests.helpers import dense

pytestmark = pytest.mark.usefixtures("x64")
N, DRAWS = 5, 3000


def unsigned(estimator):
    """The same estimator with columns as they are."""
    kind = estimator.spec.kind
    if kind.losses:
        output_cotangents = lambda losses, *_: OutputCotangents(
            1, lambda k: [(jnp.ones_like(x),) for x in losses]
        )
    else:
        output_cotangents = lambda heads, roots, *_: fisher_columns(heads, roots)
    return ko.Estimator(
        estimator.spec._replace(kind=kind._replace(output_cotangents=output_cotangents))
    )


def statistics(estimator, params, x, **options):
    plan = oracles.plan(estimator.layers(params, x), **options)
    run = lambda count: estimator.at(params, x).statistics(plan._replace(count=count))
    return jax.jit(run), plan


def mean_over_steps(estimator, params, x, draws=DRAWS):
    """Of many steps, without any key."""
    run, _ = statistics(estimator, params, x)
    every = jax.jit(jax.vmap(run))(jnp.arange(draws))
    return jax.tree.map(lambda v: v.mean(0), every[0])


@pytest.mark.parametrize("coupling", [None, "exact", "factored"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", [False, True])
def test_examples_that_do_not_interact_have_the_same_statistics_bit_for_bit(
    loss, sharing, coupling
):
    params = {"a": oracles.normal(0, (3, 4)), "b": oracles.normal(1, (4, 2))}
    x = oracles.normal(2, (N, 3, 3))
    network = lambda p, x: dense(jnp.tanh(dense(x, p["a"])), p["b"]).mean(1)
    estimator = ko.ggn(lambda p, x: ko.Categorical(network(p, x)))
    if loss:
        estimator = ko.empirical_fisher(lambda p, x: jnp.sum(network(p, x) ** 2, 1))
    coupling = None if coupling is None else ko.coarse_correction(coupling)
    options = dict(block=ko.kronecker(sharing=sharing), coupling=coupling)
    results = [statistics(e, params, x, **options)[0](7) for e in (estimator, unsigned(estimator))]
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(got, want)


def centred(p, x):
    out = dense(jnp.tanh(dense(x, p["a"])), p["b"])
    return out - out.mean(0)


def normalised(p, x):
    """Batch norm in training mode."""
    h = dense(x, p["a"])
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)
    return dense(jnp.tanh(h), p["b"])


def attention(p, x):
    """A term for every position, and positions that see each other: `[N, T, q]`."""
    h = dense(x, p["a"])
    h = jax.nn.softmax(h @ h.swapaxes(1, 2), -1) @ h
    return dense(jnp.tanh(h), p["b"])


MODELS = {
    "centred": (centred, (N, 3)),
    "batch norm": (normalised, (N, 3)),
    "attention": (attention, (2, 3, 3)),
}


def jacobian_of_rows(model, params, x):
    """Derivative of every term's outputs by the rows of the first layer,
    `[terms, outputs, rows, q]`.
    """
    # `x` is seen through `x @ a` alone, so a shift of the product is one of `x`
    back = jnp.linalg.inv(params["a"])
    shifted = lambda shift: model(params, x + shift @ back)
    jacobian = np.asarray(jax.jacrev(shifted)(jnp.zeros_like(x)))
    q = params["a"].shape[1]
    return jacobian.reshape(-1, jacobian.shape[x.ndim - 1], x[..., 0].size, q)


@pytest.mark.parametrize(
    ("name", "loss"), [(name, False) for name in MODELS] + [("centred", True), ("batch norm", True)]
)
def test_examples_that_interact_are_right_on_average(name, loss):
    """Against the sum over single terms of dense Jacobians. Columns as they are miss it, whatever
    the step.
    """
    model, shape = MODELS[name]
    params = {"a": oracles.normal(0, (3, 3)), "b": oracles.normal(1, (3, 2))}
    x = oracles.normal(2, shape)
    columns = jacobian_of_rows(model, params, x)
    if loss:
        estimator, columns = (
            ko.empirical_fisher(lambda p, x: model(p, x).sum(1)),
            columns.sum(1, keepdims=True),
        )
    else:
        estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x), batch_ndim=len(shape) - 1))
    per_term = np.einsum("bcri,bcrj->ij", columns, columns) / len(columns)
    # G is a mean over rows, of a loss that is a mean over terms
    want = shape[0] * per_term / x[..., 0].size
    got = mean_over_steps(estimator, params, x)[0].outputs[0]
    np.testing.assert_allclose(got, want, atol=0.06 * np.abs(want).max())
    fixed = mean_over_steps(unsigned(estimator), params, x, draws=1)[0].outputs[0]
    assert np.abs(fixed - want).max() > 0.15 * np.abs(want).max()


def test_centred_scores_of_a_linear_model_have_their_closed_form():
    """`G = 1 - 1/N`, where a column of ones gives nothing at all."""
    w, x = oracles.normal(0, (3, 1)), oracles.normal(1, (16, 3))

    def out(w, x):
        s = dense(x, w)
        return s - s.mean(0)

    for estimator in (
        ko.ggn(lambda w, x: ko.Normal(out(w, x))),
        ko.empirical_fisher(lambda w, x: out(w, x)[:, 0]),
    ):
        (factors,) = mean_over_steps(estimator, w, x)
        np.testing.assert_allclose(factors.outputs, 1 - 1 / 16, rtol=0.01)
        (old,) = mean_over_steps(unsigned(estimator), w, x, draws=1)
        np.testing.assert_allclose(old.outputs, 0, atol=1e-20)


def test_the_gradient_and_its_rows_carry_no_signs():
    params, x, y = (
        {"a": oracles.normal(0, (3, 4))},
        oracles.normal(1, (N, 3)),
        oracles.normal(2, (N, 4)),
    )
    estimator = ko.ggn(lambda p, x: ko.Normal(dense(x, p["a"])))
    plan = oracles.plan(estimator.layers(params, x), block=ko.kronecker("cholesky"))

    @jax.jit
    def both(p):
        _, grads, curvature = estimator.value_and_grad(lambda d, y: d.mean_nll(y))(p, x, targets=y)
        ((a, g),) = curvature.gradient_rows(plan).values()
        return grads["a"], a[0].T @ g[0]

    got, from_rows = both(params)
    want = x.T @ (x @ params["a"] - y) / N
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(from_rows, want, rtol=1e-12)


def test_left_over_parameters_without_a_key_converge_to_their_diagonal():
    """The mean over statistics of `(sum_b s_b z_b)^2 / N`; with signs that never changed it stayed
    where it began.
    """
    x, z = oracles.normal(0, (64, 2)), oracles.normal(1, (64, 6))
    params = {"w": jnp.ones((2, 1)), "s": jnp.ones(6)}
    estimator = ko.ggn(
        lambda p, x: ko.Normal(dense(x, p["w"]) + (z @ helpers.computed(p["s"]))[:, None])
    )
    tx = ko.kfac(
        estimator.layers(params, x),
        learning_rate=0.1,
        kl_clip=None,
        damping=0.0,
        uncovered="diagonal",
        decay=1.0,
        curvature_every=1,
        inverse_every=1,
    )
    steps = 2000

    def train(key, fixed):
        def step(state, i):
            at = estimator.at(params, x, key=key)
            _, new = tx.update(params, state, params, curvature=at, refresh=False)
            if fixed:  # as before: every step is the first one to the signs
                new = new._replace(
                    preconditioner=new.preconditioner._replace(kfac_count=jnp.int32(0))
                )
            return new, new.preconditioner.factors["diagonal_1x6"]

        return jax.jit(lambda: jax.lax.scan(step, tx.init(params), jnp.arange(steps)))()[1]

    want = np.mean(z**2, 0)
    free = train(None, False)
    error = lambda factors: np.abs(np.asarray(factors).ravel() / want - 1).max()
    assert error(free[-1]) < 6 * np.sqrt(2 / steps)
    assert error(train(None, True)[-1]) > 10 * error(free[-1])
    # one key for all steps is enough
    assert error(train(jax.random.key(3), False)[-1]) < 6 * np.sqrt(2 / steps)


def test_signs_of_an_example_do_not_depend_on_padding():
    """Nor do those of two terms or heads agree: the signs are uncorrelated in pairs."""
    ones = lambda *shapes: OutputCotangents(1, lambda k: [(jnp.ones((*s, 2)),) for s in shapes])
    key = jax.random.key(0)
    make = lambda *shapes: [x[0] for x in signed(ones(*shapes), shapes, key).make(0)]
    short, long = make((3, 4))[0], make((5, 7))[0]
    np.testing.assert_array_equal(short, long[:3, :4])
    both = np.concatenate([x[..., 0].ravel() for x in make((30, 20), (30, 20))])
    assert set(both) == {-1.0, 1.0} and abs(both.mean()) < 0.1
    first, second = both[:600], both[600:]
    assert abs(np.mean(first * second)) < 0.15
