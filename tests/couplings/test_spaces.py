"""Coarse spaces against dense matrices, for a system made by hand and `Z` from its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import System
from kfac_optax.blocks.kronecker.kronecker import EigenInverse
from kfac_optax.couplings.deflated import MODES
from kfac_optax.couplings.spaces import SPACES, make_space, orthonormal
from kfac_optax.linalg.factorize import psd_eigh
from tests import oracles

# two matrices of one shape, a layer that couplings do not see, one more; rows are out of bucket
# order
SHAPES = ((2, 3, 2), (1, 2, 2), (1, 2, 4))
PLACES = ((2, 0), (0, 1), (0, 0))  # of every row
ENDS = np.cumsum([0, *map(np.prod, SHAPES)])
SIZE, ROWS = int(ENDS[-1]), len(PLACES)
DAMPING = 0.1
GRADIENTS = 3


def vector(flat):
    return [flat[i:j].reshape(s) for i, j, s in zip(ENDS, ENDS[1:], SHAPES)]


def flatten(parts):
    return jnp.concatenate([x.ravel() for x in parts])


def mask():
    """`[L, n]`: ones on every row."""
    out = np.zeros((ROWS, SIZE))
    for row, (i, k) in enumerate(PLACES):
        n = int(np.prod(SHAPES[i][1:]))
        out[row, ENDS[i] + k * n : ENDS[i] + (k + 1) * n] = 1
    return out


def moment(seed, n, rows=None):
    x = oracles.normal(seed, (n + 2 if rows is None else rows, n))
    return x.T @ x / len(x)


def eigen(row):
    i, _ = PLACES[row]
    return EigenInverse(
        psd_eigh(moment(30 + row, SHAPES[i][1])), psd_eigh(moment(40 + row, SHAPES[i][2]))
    )


@functools.cache
def fisher():
    """Of fewer examples than parameters."""
    return np.asarray(moment(0, SIZE, rows=6))


@functools.cache
def block_inverse():
    """Positive definite, block-diagonal over the matrices, and no inverse of anything here."""
    out, start = np.zeros((SIZE, SIZE)), 0
    for copies, p, q in SHAPES:
        for _ in range(copies):
            out[start : start + p * q, start : start + p * q] = np.linalg.inv(
                moment(start + 1, p * q) + np.eye(p * q)
            )
            start += p * q
    return out


def system(g, inverse, damping=DAMPING, products=None):
    z = jnp.asarray(mask(), g.dtype)
    f = jnp.asarray(fisher(), g.dtype)

    def product(v):
        if products is not None:
            products.append(v)
        return vector(f @ flatten(v))

    def coarse(prolong, m):
        directions = jnp.stack([flatten(prolong(row)) for row in jnp.eye(m, dtype=g.dtype)])
        return directions @ f @ directions.T

    def replace(v, matrices):
        of_place = dict(zip(PLACES, matrices))
        return [
            jnp.stack([of_place.get((i, k), x[k]) for k in range(len(x))]) for i, x in enumerate(v)
        ]

    return System(
        vector(g),
        lambda v: vector(jnp.asarray(inverse, g.dtype) @ flatten(v)),
        lambda v: z @ flatten(v),
        lambda c: vector(z.T @ c),
        lambda v: [v[i][k] for i, k in PLACES],
        replace,
        product,
        coarse,
        eigen,
        jnp.asarray(damping, g.dtype),
        z.sum(1),
    )


def definition(space, g, inverse, damped):
    """Rows of `Z`, neither scaled nor orthogonal."""
    ones, first = mask(), inverse @ g
    if space == "spectral":
        rows = [
            np.outer(a.vectors[:, -1], b.vectors[:, -1]).ravel() for a, b in map(eigen, range(ROWS))
        ]
        z = np.zeros_like(ones)
        for i, row in enumerate(rows):
            z[i, ones[i] > 0] = row
        return z
    return {
        "sums": ones,
        "updates": ones * first,
        "residual": ones * (inverse @ (g - damped @ first)),
        "krylov": np.concatenate([ones, ones * first]),
    }[space]


def expected(mode, space, g, inverse):
    damped = fisher() + DAMPING * np.eye(SIZE)
    z = definition(space, g, inverse, damped)
    # lambda Z Z^T is in here, entries off the diagonal included
    q = z.T @ np.linalg.solve(z @ damped @ z.T, z)
    p = np.eye(SIZE) - damped @ q
    matrix = {"a-def1": inverse @ p + q, "a-def2": p.T @ inverse + q, "bnn": p.T @ inverse @ p + q}[
        mode
    ]
    return matrix @ g, z @ (damped @ matrix @ g - g)


@functools.cache
def solver(mode, space, exact=False):
    inverse = np.linalg.inv(fisher() + DAMPING * np.eye(SIZE)) if exact else block_inverse()

    def solve(g):
        fine, added = ko.deflated(mode, space=space).apply((), system(g, inverse))
        return flatten(fine), flatten(added)

    return jax.jit(jax.vmap(solve))


def gradients():
    random = np.asarray(oracles.normal(3, (GRADIENTS, SIZE)))
    return np.concatenate([random, random @ fisher()])


def model(x, g):
    damped = fisher() + DAMPING * np.eye(SIZE)
    return np.einsum("ni,ij,nj->n", x, damped, x) / 2 - np.einsum("ni,ni->n", g, x)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mode", MODES)
def test_dense_formula_and_coarse_residual(x64, mode, space):
    g = gradients()
    got = sum(solver(mode, space)(g))
    for x, one in zip(got, g):
        wanted, residual = expected(mode, space, one, block_inverse())
        np.testing.assert_allclose(x, wanted, rtol=1e-9, atol=1e-10 * np.abs(wanted).max())
        damped = fisher() + DAMPING * np.eye(SIZE)
        z = definition(space, one, block_inverse(), damped)
        size = np.linalg.norm(z, axis=1) * np.linalg.norm(one)
        mine = np.abs(z @ (damped @ np.asarray(x) - one)) / size
        assert mine.max() < 1e-11 if mode != "a-def1" else mine.max() > 1e-3
        assert np.abs(residual / size).max() < 1e-11 or mode == "a-def1"


@pytest.mark.parametrize("space", SPACES)
def test_the_model_is_never_worse_than_that_of_less(x64, space):
    """Than that of the fine level alone, and of every space inside this one; somewhere it is
    better.
    """
    g = gradients()
    fine, added = solver("a-def2", space)(g)
    value, alone = model(fine + added, g), model(fine, g)
    assert (value <= alone + 1e-12).all() and (value < alone - 1e-3).any()
    for inside in ("sums", "updates") if space == "krylov" else ():
        less = model(sum(solver("a-def2", inside)(g)), g)
        assert (value <= less + 1e-12).all() and (value < less - 1e-3).any()
    not_seen = mask().sum(0) == 0
    assert not_seen.sum() == 4 and not np.asarray(added)[:, not_seen].any()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mode", MODES)
def test_an_exact_fine_level_stays_exact(x64, mode, space):
    g = gradients()
    exact = np.linalg.solve(fisher() + DAMPING * np.eye(SIZE), g.T).T
    got = sum(solver(mode, space, True)(g))
    np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-10 * np.abs(exact).max())


def test_updates_give_every_layer_its_own_step_size(x64):
    g = gradients()
    fine, added = map(np.asarray, solver("a-def2", "updates")(g))
    for row in mask():
        ratio = (added / fine)[:, row > 0]
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_vectors_that_add_no_direction_are_dropped(x64, dtype):
    """A row with a zero gradient, one whose update is constant, and one whose update is so up to
    rounding.
    """
    g = np.asarray(oracles.normal(4, (SIZE,)))
    ones = mask()
    noise = jnp.finfo(dtype).eps * np.asarray(oracles.normal(5, (SIZE,)))
    g = jnp.asarray(g * (1 - ones.sum(0)) + 3 * ones[1] + ones[2] * (2 + noise), dtype)
    made = system(g, np.eye(SIZE))
    np.testing.assert_allclose(make_space("updates", made, None).squares, [0, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(
        make_space("krylov", made, None).squares, [1, 1, 1, 0, 0, 0], rtol=1e-6
    )
    if dtype == jnp.float32:
        return
    x = {s: sum(map(flatten, ko.deflated(space=s).apply((), made))) for s in ("sums", "krylov")}
    np.testing.assert_allclose(x["krylov"], x["sums"], rtol=1e-10)  # the same span


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_squares_of_updates_neither_vanish_nor_overflow(scale):
    """In single precision; the correction has the scale of the gradient, bit for bit."""
    g = jnp.asarray(gradients()[0], jnp.float32)
    inverse = block_inverse()  # of NumPy: not made while something is traced
    for space in ("updates", "krylov", "residual"):
        apply = jax.jit(
            lambda g, space=space: flatten(
                ko.deflated(space=space).apply((), system(g, inverse))[1]
            )
        )
        np.testing.assert_array_equal(apply(g * scale) / jnp.float32(scale), apply(g))


def test_nothing_to_combine_and_no_damping(x64):
    """A zero gradient makes a space without vectors; an undamped one of dropped vectors divides by
    nothing.
    """
    ones = mask()
    for g in (jnp.zeros(SIZE), jnp.asarray(ones[0] * np.asarray(gradients()[0]))):
        for space in SPACES:
            parts = ko.deflated("bnn", space=space).apply(
                (), system(g, block_inverse(), damping=0.0)
            )
            assert np.isfinite(sum(map(flatten, parts))).all()
            assert g.any() or not sum(map(flatten, parts)).any()


def test_a_broken_gradient_is_not_hidden(x64):
    g = jnp.asarray(gradients()[0]).at[int(np.flatnonzero(mask()[0])[0])].set(jnp.nan)
    for space in ("updates", "residual", "krylov"):
        _, added = ko.deflated(space=space).apply((), system(g, block_inverse()))
        assert np.isnan(flatten(added)).any()


def test_basis_is_orthonormal_close_to_dependence():
    """Vectors that differ by little more than what is dropped, in single precision."""
    first, other = (oracles.normal(i, (2, 3, 50)).astype(jnp.float32) for i in range(2))
    basis = orthonormal([first, first + 1e-3 * other])
    gram = np.einsum("icpq,jcpq->cij", basis, basis)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "space", "products"),
    [
        ("a-def2", "updates", 1),
        ("a-def2", "residual", 1),
        ("a-def1", "residual", 2),
        ("bnn", "residual", 3),
    ],
)
def test_products(x64, mode, space, products):
    """The residual is a product of its own, unless the correction takes it too."""
    taken = []
    ko.deflated(mode, space=space).apply(
        (), system(jnp.asarray(gradients()[0]), block_inverse(), products=taken)
    )
    assert len(taken) == products


def test_the_space_outlives_the_weight_of_the_fine_level(x64):
    """With a weight of zero `M^{-1} g` still says where to go: the residual is the gradient then."""
    g = jnp.asarray(gradients()[0])
    made = [
        ko.deflated(space=s, fine_weight=0.0).apply((), system(g, block_inverse()))
        for s in ("updates", "residual")
    ]
    (fine, added), (_, same) = made
    assert not flatten(fine).any() and flatten(added).any()
    np.testing.assert_allclose(flatten(added), flatten(same), rtol=1e-10)


def test_wrong_use_is_named():
    with pytest.raises(
        ValueError, match=r"deflated: space='sum'; expected one of 'sums', 'updates', 'residual'"
    ):
        ko.deflated(space="sum")
    for space in SPACES[1:]:
        with pytest.raises(
            ValueError,
            match=rf"space='{space}' with coarse_operator='averaged'.*expected coarse_op",
        ):
            ko.deflated(space=space, coarse_operator="averaged")
    with pytest.raises(
        ValueError, match=r"space='spectral' got tuple; expected kronecker\('eigh'\)"
    ):
        made = system(jnp.ones(SIZE), block_inverse())
        ko.deflated(space="spectral").apply((), made._replace(inverses=lambda row: ()))
