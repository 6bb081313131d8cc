"""Every likelihood formula against autodiff, quadrature or counting."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
import numpy as np
import pytest

from kfac_optax.likelihoods import Bernoulli, Categorical, Normal, is_likelihood


def _normals(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _scales(*shape, seed=1):
    return jnp.asarray(np.exp(0.5 * np.random.default_rng(seed).normal(size=shape)))


# One compilation instead of one for every primitive: the file is bound by compile time.
_nll = jax.jit(lambda likelihood, targets: likelihood.nll(targets))
_mean_nll = jax.jit(lambda likelihood, targets: likelihood.mean_nll(targets))
_product = jax.jit(lambda likelihood, v: likelihood.hessian_product(v))
_columns = jax.jit(lambda lik: [lik.fisher_sqrt_column(c) for c in range(lik.num_columns)])


# name -> (likelihood with a batch of terms, matching targets)
CASES = {
    "categorical": lambda: (Categorical(2 * _normals(3, 4)), jnp.array([0, 3, 1])),
    "categorical_2d_batch": lambda: (Categorical(_normals(2, 3, 5)), np.ones((2, 3), int)),
    "categorical_no_batch": lambda: (Categorical(_normals(3)), jnp.array(2)),
    "bernoulli": lambda: (Bernoulli(_normals(3, 2, 2)), np.asarray(_normals(3, 2, 2, seed=9)) > 0),
    "bernoulli_scalar_event": lambda: (Bernoulli(_normals(4)), jnp.array([0.0, 1, 1, 0])),
    "bernoulli_2d_batch": lambda: (Bernoulli(_normals(2, 3, 2), batch_ndim=2), np.ones((2, 3, 2))),
    "normal": lambda: (Normal(_normals(3, 4), 0.7), _normals(3, 4, seed=9)),
    "normal_no_batch": lambda: (Normal(_normals(2), 1.3, batch_ndim=0), _normals(2, seed=9)),
    "normal_learned": lambda: (
        Normal(_normals(3, 2, 2), _scales(3, 2, 2)),
        _normals(3, 2, 2, seed=9),
    ),
    "normal_shared_scale": lambda: (
        Normal(_normals(3, 2, 2), _scales(2)),
        _normals(3, 2, 2, seed=9),
    ),
}
LEARNED = ["normal_learned", "normal_shared_scale"]
HESSIAN_CASES = [name for name in CASES if name not in LEARNED]


@jax.jit
def _loss_and_grad(natural, likelihood, targets):
    return jax.value_and_grad(lambda n: likelihood.with_natural(n).mean_nll(targets))(natural)


@jax.jit
def _weights_grad(weights, natural, likelihood, targets):
    def loss(weights):
        weighted = dataclasses.replace(likelihood, weights=weights)
        return weighted.with_natural(natural).mean_nll(targets)

    return jax.grad(loss)(weights)


def _rows(likelihood, natural):
    """Stacks arrays like `natural` ([*batch, *event]) into one matrix [terms, outputs]."""
    terms = int(np.prod(likelihood.batch_shape))
    return np.concatenate([np.asarray(x).reshape(terms, -1) for x in natural], axis=1)


def _unrows(likelihood, rows):
    """Inverse of `_rows`, as jax arrays."""
    pieces = jnp.split(rows, len(likelihood.natural), axis=1)
    return tuple(p.reshape(x.shape) for p, x in zip(pieces, likelihood.natural, strict=True))


def _fisher_from_columns(likelihood):
    s = np.stack(
        [_rows(likelihood, column) for column in _columns(likelihood)],
        axis=-1,
    )
    return s @ s.swapaxes(-1, -2)


def _autodiff_hessian(likelihood, targets):
    """Hessian of each term's nll in its outputs, [terms, outputs, outputs]."""
    rows = _rows(likelihood, likelihood.natural)
    full = np.asarray(_full_hessian(rows, likelihood, targets))  # [terms, outputs] twice
    off_diagonal = full * (1 - np.eye(len(rows)))[:, None, :, None]
    assert not off_diagonal.any()  # a term depends on its own outputs only
    return np.einsum("nanb->nab", full)


@jax.jit
def _full_hessian(rows, likelihood, targets):
    def total(rows):
        return likelihood.with_natural(_unrows(likelihood, rows)).nll(targets).sum()

    return jax.hessian(total)(rows)


def _expected_hessian(likelihood):
    """E over t ~ N(mean, scale) by Gauss-Hermite quadrature, exact: the Hessian is a quadratic."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    mean, scale = likelihood.natural
    parts = [
        w * _autodiff_hessian(likelihood, mean + scale * x)
        for x, w in zip(nodes, weights / weights.sum(), strict=True)
    ]
    return np.sum(parts, axis=0)


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.7, "array"])
def test_normal_nll_matches_scipy(x64, scale):
    mean, targets = _normals(3, 2, 2), _normals(3, 2, 2, seed=5)
    scale = _scales(3, 2, 2) if scale == "array" else scale
    expected = -jax.jit(jstats.norm.logpdf)(targets, mean, scale)
    expected = np.asarray(expected).sum((1, 2))
    np.testing.assert_allclose(_nll(Normal(mean, scale), targets), expected, rtol=1e-12)


def test_bernoulli_nll_matches_log_of_probability_and_takes_bool_and_soft_targets(x64):
    logits = _normals(3, 4)
    targets = np.asarray(_normals(3, 4, seed=5)) > 0
    y = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = -np.log(np.where(targets, y, 1 - y)).sum(1)
    likelihood = Bernoulli(logits)
    np.testing.assert_allclose(_nll(likelihood, targets), expected, rtol=1e-12)
    np.testing.assert_allclose(_nll(likelihood, targets.astype(float)), expected, rtol=1e-12)
    half = -0.5 * np.log(y * (1 - y)).sum(1)
    np.testing.assert_allclose(_nll(likelihood, np.full((3, 4), 0.5)), half, rtol=1e-12)


def test_categorical_nll_matches_log_of_probability(x64):
    logits, targets = _normals(2, 3, 4), jnp.array([[0, 1, 3], [2, 2, 0]])
    p = np.exp(np.asarray(logits))
    p /= p.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0])
    np.testing.assert_allclose(Categorical(logits).nll(targets), expected, rtol=1e-12)


def test_categorical_label_out_of_range_is_loud():
    nll = _nll(Categorical(jnp.zeros((3, 4))), jnp.array([-1, 4, 0]))
    np.testing.assert_array_equal(np.isnan(nll), [True, True, False])


# --- curvature --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HESSIAN_CASES)
def test_columns_square_to_autodiff_hessian(x64, name):
    likelihood, targets = CASES[name]()
    expected = _autodiff_hessian(likelihood, targets)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(_fisher_from_columns(likelihood), expected, atol=1e-10)


@pytest.mark.parametrize("name", LEARNED)
def test_columns_square_to_expected_hessian_of_mean_and_scale(x64, name):
    likelihood, _ = CASES[name]()
    expected = _expected_hessian(likelihood)
    np.testing.assert_allclose(_fisher_from_columns(likelihood), expected, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_hessian_product_is_the_dense_matrix(x64, name):
    likelihood, targets = CASES[name]()
    learned = name in LEARNED
    dense = _expected_hessian(likelihood) if learned else _autodiff_hessian(likelihood, targets)
    v = tuple(_normals(*x.shape, seed=i) for i, x in enumerate(likelihood.natural))
    expected = np.einsum("nab,nb->na", dense, _rows(likelihood, v))
    product = _product(likelihood, v)
    np.testing.assert_allclose(_rows(likelihood, product), expected, atol=1e-10)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "normal", "normal_learned"])
def test_traced_column_number(x64, name):
    likelihood, _ = CASES[name]()
    traced = jax.jit(jax.vmap(likelihood.fisher_sqrt_column))(np.arange(likelihood.num_columns))
    for c, static in enumerate(_columns(likelihood)):
        for t, s in zip(traced, static, strict=True):
            np.testing.assert_allclose(np.asarray(t)[c], s, rtol=1e-14)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    logits=hnp.arrays(np.float64, (2, 4), elements=st.floats(-30, 30)),
    v=hnp.arrays(np.float64, (2, 4), elements=st.floats(-5, 5)),
)
def test_property_product_is_s_s_transposed(logits, v):
    with jax.enable_x64(True):
        for likelihood in (Categorical(jnp.asarray(logits)), Bernoulli(jnp.asarray(logits))):
            (product,) = _product(likelihood, (jnp.asarray(v),))
            expected = np.einsum("nab,nb->na", _fisher_from_columns(likelihood), v)
            np.testing.assert_allclose(product, expected, atol=1e-12)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    logits=hnp.arrays(np.float64, (2, 4), elements=st.floats(-30, 30)),
    shift=st.floats(-100, 100),
)
def test_property_categorical_ignores_constant_shifts(logits, shift):
    with jax.enable_x64(True):
        logits, targets = jnp.asarray(logits), jnp.array([1, 2])
        likelihood, shifted = Categorical(logits), Categorical(logits + shift)
        nll = _nll(likelihood, targets)
        assert (nll >= 0).all()
        np.testing.assert_allclose(_nll(shifted, targets), nll, atol=1e-10)
        (product,) = _product(likelihood, (jnp.full((2, 4), shift),))
        np.testing.assert_allclose(product, 0, atol=1e-12)


def test_confident_categorical_in_float32_keeps_relative_accuracy():
    logits, v = np.array([[25.0, 1, 0, -1]]), np.array([[3.0, 1, -2, 5]])
    y = np.exp(logits - logits.max())
    y /= y.sum()
    centred = v - v[0, 0]
    expected = y * (centred - (y * centred).sum())  # float64, no cancellation
    likelihood = Categorical(jnp.asarray(logits, jnp.float32))
    (product,) = _product(likelihood, (jnp.asarray(v, jnp.float32),))
    np.testing.assert_allclose(product, expected, rtol=1e-5)
    (column,) = _columns(likelihood)[0]
    others = np.array([[y[0, 1:].sum(), *-y[0, 1:]]])
    np.testing.assert_allclose(column, others, rtol=1e-5)


# --- sampling ---------------------------------------------------------------------------------

_DRAWS = 20_000


def _draws(likelihood):
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    return jax.jit(jax.vmap(likelihood.sample))(keys)


def test_categorical_sample_frequencies():
    likelihood = Categorical(jnp.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]]))
    draws = np.asarray(_draws(likelihood))
    assert draws.shape == (_DRAWS, 2)
    assert jnp.issubdtype(draws.dtype, jnp.integer)
    p = np.exp(np.asarray(likelihood.logits))
    p /= p.sum(-1, keepdims=True)
    counts = np.stack([(draws == c).sum(0) for c in range(3)], axis=-1)
    chi2 = ((counts - _DRAWS * p) ** 2 / (_DRAWS * p)).sum(-1)
    assert (chi2 < 13.8).all()  # 2 degrees of freedom, p = 0.001


def test_bernoulli_sample_frequencies():
    likelihood = Bernoulli(jnp.array([[-2.0, 0.0], [1.0, 3.0]]))
    draws = np.asarray(_draws(likelihood))
    assert set(np.unique(draws)) == {0.0, 1.0}
    y = 1 / (1 + np.exp(-np.asarray(likelihood.logits)))
    z = (draws.mean(0) - y) / np.sqrt(y * (1 - y) / _DRAWS)
    assert (np.abs(z) < 4).all()


@pytest.mark.parametrize("scale", [0.5, "array"])
def test_normal_sample_moments(scale):
    scale = jnp.array([[0.5, 2.0]]) if scale == "array" else scale
    likelihood = Normal(jnp.array([[3.0, -1.0]]), scale)
    draws = np.asarray(_draws(likelihood))
    z = (draws - np.asarray(likelihood.mean)) / np.asarray(scale)
    assert (np.abs(z.mean(0)) < 4 / np.sqrt(_DRAWS)).all()
    assert (np.abs((z**2).mean(0) - 1) < 4 * np.sqrt(2 / _DRAWS)).all()


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "normal", "normal_learned"])
def test_scores_of_samples_have_the_fisher_as_second_moment(name):
    likelihood, _ = CASES[name]()

    def score(key):  # samples inside the differentiated function: they must act as constants
        return jax.grad(lambda n: _sampled_loss(likelihood.with_natural(n), key))(
            likelihood.natural
        )

    keys = jax.random.split(jax.random.key(1), _DRAWS)
    scores = jax.jit(jax.vmap(score))(keys)
    terms = likelihood.batch_shape[0]
    g = np.concatenate([np.reshape(x, (_DRAWS, terms, -1)) for x in scores], axis=-1)
    assert (np.abs(g.mean(0)) < 5 * g.std(0) / np.sqrt(_DRAWS)).all()
    fisher = _fisher_from_columns(likelihood)
    squares = g[..., :, None] * g[..., None, :]
    error = 5 * squares.std(0) / np.sqrt(_DRAWS) + 1e-6
    assert (error < 0.2 * np.abs(fisher).max()).all()
    np.testing.assert_array_less(np.abs(squares.mean(0) - fisher), error)


def _sampled_loss(likelihood, key):
    return _nll(likelihood, likelihood.sample(key)).sum()


def test_normal_sample_is_not_rounded_to_the_dtype_of_the_mean():
    likelihood = Normal(jnp.full((1, 1), 100.0, jnp.bfloat16), 0.1)  # bfloat16 steps by 0.5 here
    spread = np.std(_draws(likelihood))
    np.testing.assert_allclose(spread, 0.1, rtol=0.05)


# --- weights ----------------------------------------------------------------------------------

MASKED = ["categorical_2d_batch", "bernoulli", "bernoulli_2d_batch", "normal", "normal_learned"]


def _with_mask(name):
    likelihood, targets = CASES[name]()
    mask = np.arange(np.prod(likelihood.batch_shape)).reshape(likelihood.batch_shape) != 1
    return dataclasses.replace(likelihood, weights=mask), targets, mask


@pytest.mark.parametrize("name", MASKED)
def test_mask_equals_dropping_the_rows(x64, name):
    likelihood, targets, mask = _with_mask(name)
    full = dataclasses.replace(likelihood, weights=None)
    nll = np.asarray(_nll(full, targets))
    np.testing.assert_allclose(_mean_nll(likelihood, targets), nll[mask].mean(), rtol=1e-12)
    np.testing.assert_allclose(_mean_nll(full, targets), nll.mean(), rtol=1e-12)
    assert abs(nll[mask].mean() - nll.mean()) > 1e-3


@pytest.mark.parametrize("name", MASKED)
def test_nan_in_a_masked_row_leaks_neither_into_value_nor_gradient(name):
    clean, targets, mask = _with_mask(name)

    def spoil(x, value):
        x = np.array(x, type(value))
        x[~mask] = value
        return jnp.asarray(x)

    bad_targets = spoil(targets, -1 if name.startswith("categorical") else float("nan"))
    natural = tuple(spoil(x, float("nan")) for x in clean.natural)
    assert np.isnan(_nll(clean.with_natural(natural), bad_targets)).any()
    value, grads = _loss_and_grad(natural, clean, bad_targets)
    assert np.isfinite(_weights_grad(mask.astype(np.float32), natural, clean, bad_targets)).all()
    expected, expected_grads = _loss_and_grad(clean.natural, clean, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_weights_weigh_and_zero_weights_give_zero():
    mean, targets = np.zeros((2, 1), np.float32), np.array([[1.0], [3.0]], np.float32)
    nll = _nll(Normal(mean), targets)
    weighted = _mean_nll(Normal(mean, weights=jnp.array([3.0, 1.0])), targets)
    np.testing.assert_allclose(weighted, np.average(nll, weights=[3, 1]), rtol=1e-6)

    dropped = Normal(mean, weights=jnp.zeros(2))
    value, (grad,) = _loss_and_grad(dropped.natural, dropped, targets)
    assert np.isfinite(_weights_grad(dropped.weights, dropped.natural, dropped, targets)).all()
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


# --- precision and extremes -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "normal", "normal_learned"])
def test_dtypes(x64, name, dtype):
    likelihood, targets = CASES[name]()
    low = likelihood.with_natural(tuple(_cast(x, dtype) for x in likelihood.natural))
    wide = low.with_natural(tuple(_cast(x, jnp.float64) for x in low.natural))
    computed_in = jnp.promote_types(dtype, jnp.float32)
    if name != "categorical":
        targets = _cast(targets, jnp.float32)
    nll, mean_nll, *curvature = _everything(low, targets)
    wide_nll, _, *wide_curvature = _everything(wide, targets)
    assert nll.dtype == mean_nll.dtype == computed_in
    # Computed in float32 throughout: far closer than bfloat16 rounding (4e-3) would allow.
    np.testing.assert_allclose(nll, wide_nll, rtol=1e-5)
    for got, want in zip(curvature, wide_curvature, strict=True):
        for g, w in zip(got, want, strict=True):
            assert g.dtype == dtype
            rtol = 4 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(np.asarray(g, float), w, rtol=rtol)


@jax.jit
def _everything(likelihood, targets):
    return (
        likelihood.nll(targets),
        likelihood.mean_nll(targets),
        likelihood.fisher_sqrt_column(1),
        likelihood.hessian_product(likelihood.natural),
    )


def _cast(x, dtype):
    return jnp.asarray(np.asarray(x).astype(dtype))


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_stay_finite(size):
    logits = jnp.array([[size, -size, 0.0]])
    for likelihood, targets in (
        (Categorical(logits), jnp.array([1])),
        (Categorical(logits), jnp.array([0])),
        (Bernoulli(logits), jnp.array([[0.0, 1.0, 1.0]])),
        (Bernoulli(logits), jnp.array([[1.0, 0.0, 1.0]])),
    ):
        value, grads = _loss_and_grad(likelihood.natural, likelihood, targets)
        columns = _columns(likelihood)
        product = _product(likelihood, (jnp.ones((1, 3)),))
        for x in jax.tree.leaves((value, grads, columns, product)):
            assert np.isfinite(x).all()
        assert np.abs(jax.tree.leaves(grads)[0]).max() <= 1


def test_bernoulli_tail_is_not_rounded_away():
    likelihood = Bernoulli(jnp.array([[25.0]], jnp.float32))
    np.testing.assert_allclose(_nll(likelihood, np.ones((1, 1))), [np.log1p(np.exp(-25.0))], 1e-5)
    far = Bernoulli(jnp.array([[120.0]], jnp.float32))  # y (1 - y) underflows, its root does not
    np.testing.assert_allclose(_columns(far)[0][0], [[np.exp(-60.0)]], rtol=1e-4)


def test_forbidden_class():
    likelihood = Categorical(jnp.array([[0.0, -jnp.inf, 0.0]]))
    np.testing.assert_allclose(_nll(likelihood, jnp.array([0])), [np.log(2)], rtol=1e-6)
    expected = np.array([[[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]]])
    np.testing.assert_allclose(_fisher_from_columns(likelihood), expected, atol=1e-7)
    (product,) = _product(likelihood, (jnp.array([[1.0, 2.0, 3.0]]),))
    np.testing.assert_allclose(product, [[-0.5, 0, 0.5]], atol=1e-6)


# --- structure --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["categorical", "bernoulli_2d_batch", "normal", "normal_no_batch", "normal_learned"]
)
def test_pytree_round_trip_and_jit(name):
    likelihood, targets = CASES[name]()
    likelihood = dataclasses.replace(
        likelihood, weights=np.ones(likelihood.batch_shape, np.float32)
    )
    leaves, treedef = jax.tree.flatten(likelihood)
    assert len(leaves) == len(likelihood.natural) + 1
    compiled, nll = jax.jit(lambda lik, t: (lik, lik.nll(t)))(likelihood, targets)
    for again in (jax.tree.unflatten(treedef, leaves), compiled):
        assert type(again) is type(likelihood)
        assert again.batch_shape == likelihood.batch_shape
        assert again.num_columns == likelihood.num_columns
        assert jax.tree.structure(again) == treedef
        jax.tree.map(np.testing.assert_array_equal, again, likelihood)
    np.testing.assert_allclose(nll, _nll(CASES[name]()[0], targets), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("leaf", [None, object(), 0, "x", jax.ShapeDtypeStruct((), float)])
def test_unflatten_takes_placeholders(name, leaf):
    likelihood, _ = CASES[name]()
    leaves, treedef = jax.tree.flatten(likelihood)
    rebuilt = jax.tree.unflatten(treedef, [leaf] * len(leaves))
    assert rebuilt.natural[0] is leaf


@pytest.mark.parametrize("name", CASES)
def test_eval_shape(name):
    likelihood, _ = CASES[name]()
    abstract = jax.eval_shape(lambda x: x, likelihood)
    assert abstract.batch_shape == likelihood.batch_shape
    assert abstract.num_columns == likelihood.num_columns


@pytest.mark.parametrize("name", MASKED)
def test_vmap_keeps_the_event_axes(name):
    likelihood, targets = CASES[name]()
    weights = np.arange(1.0, 1 + np.prod(likelihood.batch_shape), dtype=np.float32)
    weights = weights.reshape(likelihood.batch_shape)
    likelihood = dataclasses.replace(likelihood, weights=weights)
    # One term at a time inside; the likelihood built inside comes out stacked.
    nll, mapped = jax.jit(jax.vmap(lambda lik, t: (lik.nll(t), lik)))(likelihood, targets)
    np.testing.assert_allclose(nll, _nll(likelihood, targets), rtol=1e-6)
    assert mapped.batch_shape == likelihood.batch_shape
    assert jax.tree.structure(mapped) == jax.tree.structure(likelihood)
    expected = np.average(nll, weights=weights)
    np.testing.assert_allclose(_mean_nll(mapped, targets), expected, rtol=1e-5)


def test_per_example_construction_under_vmap():
    mean = _normals(3, 2)
    mapped = jax.jit(jax.vmap(lambda m: Normal(m, 0.5, batch_ndim=0)))(mean)
    direct = Normal(mean, 0.5)
    assert mapped.batch_shape == (3,)
    assert jax.tree.structure(mapped) == jax.tree.structure(direct)
    np.testing.assert_allclose(
        _nll(mapped, 2 * np.asarray(mean)), _nll(direct, 2 * np.asarray(mean)), rtol=1e-6
    )


@pytest.mark.parametrize("scale", [1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(2)])
def test_number_as_scale_is_known_even_inside_jit(scale):
    likelihood = Normal(jnp.zeros((2, 3)), scale)
    assert likelihood.scale == scale
    inside = jax.jit(lambda lik: (lik.natural, jnp.zeros(lik.num_columns)))
    natural, columns = inside(likelihood)
    assert len(natural) == 1
    assert columns.shape == (3,)
    assert jax.eval_shape(likelihood.nll, jnp.zeros((2, 3))).dtype == jnp.float32


@pytest.mark.parametrize("scale", [jnp.array(0.5), jnp.full((3,), 0.5), np.full((3,), 0.5)])
def test_array_as_scale_is_an_output_and_broadcast(scale):
    likelihood = Normal(jnp.zeros((2, 3)), scale)
    assert likelihood.scale.shape == (2, 3)
    assert len(likelihood.natural) == 2
    assert likelihood.num_columns == 6


@pytest.mark.parametrize("name", CASES)
def test_with_natural_keeps_the_rest(name):
    likelihood, _ = CASES[name]()
    likelihood = dataclasses.replace(
        likelihood, weights=np.ones(likelihood.batch_shape, np.float32)
    )
    other = likelihood.with_natural(tuple(np.asarray(x) + 1 for x in likelihood.natural))
    assert jax.tree.structure(other) == jax.tree.structure(likelihood)
    np.testing.assert_array_equal(other.natural[0], np.asarray(likelihood.natural[0]) + 1)
    np.testing.assert_array_equal(other.weights, likelihood.weights)


# --- wrong use --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda w: Categorical(jnp.zeros((5, 3)), w), ["Categorical", "(4,)", "(5,)"]),
        (lambda w: Bernoulli(jnp.zeros((5, 3)), w), ["Bernoulli", "(4,)", "(5,)"]),
        (lambda w: Normal(jnp.zeros((5, 3)), weights=w), ["Normal", "(4,)", "(5,)"]),
        (
            lambda w: Normal(jnp.zeros((4, 3)), weights=w, batch_ndim=2),
            ["Normal", "(4,)", "(4, 3)", "batch_ndim"],
        ),
    ],
)
def test_wrong_weights_shape_says_what_to_do(build, parts):
    with pytest.raises(ValueError, match="one weight per term") as error:
        build(jnp.ones(4))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("scale", [0, -1.0, np.float32("nan"), float("inf")])
def test_impossible_scale(scale):
    with pytest.raises(ValueError, match="Normal: scale is"):
        Normal(jnp.zeros((2, 3)), scale)


def test_scale_that_does_not_broadcast():
    with pytest.raises(ValueError, match="Normal: scale has shape"):
        Normal(jnp.zeros((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match="Normal: scale has shape"):
        Normal(jnp.zeros((1, 3)), jnp.ones((2, 3)))


@pytest.mark.parametrize("batch_ndim", [-1, 3])
@pytest.mark.parametrize("cls", [Bernoulli, Normal])
def test_impossible_batch_ndim(cls, batch_ndim):
    with pytest.raises(ValueError, match=f"{cls.__name__}: batch_ndim is {batch_ndim}"):
        cls(jnp.zeros((2, 3)), batch_ndim=batch_ndim)


@pytest.mark.parametrize("cls", [Categorical, Bernoulli, Normal])
def test_targets_are_never_broadcast(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: targets have shape"):
        cls(jnp.zeros((3, 1))).nll(jnp.zeros((1, 3), int))


def test_categorical_wants_integers():
    with pytest.raises(TypeError, match="integer classes"):
        Categorical(jnp.zeros((3, 2))).nll(jnp.zeros(3))


@pytest.mark.parametrize("name", CASES)
def test_is_likelihood(name):
    likelihood, _ = CASES[name]()
    assert is_likelihood(likelihood)
    assert not is_likelihood(type(likelihood))


@pytest.mark.parametrize("x", [jnp.zeros((2, 3)), None, {}, "nll", lambda targets: targets])
def test_is_not_likelihood(x):
    assert not is_likelihood(x)
