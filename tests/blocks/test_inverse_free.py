"""Roots of inverse factors that products alone move: formulas, fixed points, structures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Average, Use
from kfac_optax.blocks.kronecker.inverse_free import Means, Roots
from kfac_optax.blocks.kronecker.inverse_root import Root
from kfac_optax.linalg.root_structures import STRUCTURES, structure_of
from tests import helpers, oracles

pytestmark = pytest.mark.usefixtures("x64")
N, P, Q, LAM = 8, 5, 4, 0.3
NEVER = Average(jnp.float32(0), jnp.int32(1), jnp.float32(0))
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def make_use(rows=N, weights=None, bias=False):
    return Use(ko.testing.dense_layer(P, Q, bias=bias), N, rows, jnp.float64, weights)


def make(structure="dense", shape=(P, Q), **options):
    """A block and what moves its roots by one batch."""
    block = ko.inverse_free(shape, structure, size=2, **options)

    @jax.jit
    def move(roots, a, g, damping=LAM):
        means, new = block.measure(a, g, make_use(), roots)
        return block.absorb(roots, new, means, jnp.asarray(damping), NEVER)

    return block, move


def batch(seed):
    return oracles.normal(seed, (N, P)), oracles.normal(seed + 100, (N, Q))


def random_roots(structure, seed=0):
    """Well-conditioned roots of a structure, far from the identity, and momenta of zero."""
    form, made = structure_of(structure, 2), []
    for d in (P, Q):
        blocks = form.expand(form.tangent(matrix_blocks(form, 0.3 * symmetric(seed + d, d))))
        eye = matrix_blocks(form, jnp.eye(d))
        root = form.compress(eye + blocks)
        made.append(Root(root, jnp.zeros_like(root)))
    return Roots(*made)


def symmetric(seed, d):
    x = oracles.normal(seed, (d, d))
    return x + x.T


def matrix_blocks(form, matrix):
    """Blocks on the diagonal of a matrix, zeros behind its end."""
    width = form.width(len(matrix))
    count = -(-len(matrix) // width)
    padded = np.pad(np.asarray(matrix), (0, count * width - len(matrix)))
    ends = [slice(i * width, (i + 1) * width) for i in range(count)]
    return jnp.stack([padded[s, s] for s in ends])


def as_matrix(form, held, d):
    """A held root as the whole matrix that it is."""
    return np.asarray(jax.scipy.linalg.block_diag(*form.expand(held))[:d, :d])


def of_roots(structure, roots):
    form = structure_of(structure, 2)
    return [as_matrix(form, x.root, d) for x, d in zip(roots, (P, Q), strict=True)]


def test_steps_are_the_dense_formula():
    """Three steps with momentum, both sides from the old roots."""
    _, move = make(root_rate=0.02, root_momentum=0.6)
    roots = random_roots("dense")
    k, c = of_roots("dense", roots)
    m_k, m_c = np.zeros((P, P)), np.zeros((Q, Q))
    for t in range(3):
        a, g = batch(t)
        h_k, h_c = k.T @ (a.T @ a / N) @ k, c.T @ (g.T @ g / N) @ c
        of_c = np.trace(h_c) / Q * h_k + LAM * np.trace(c.T @ c) / Q * k.T @ k - np.eye(P)
        of_k = np.trace(h_k) / P * h_c + LAM * np.trace(k.T @ k) / P * c.T @ c - np.eye(Q)
        m_k, m_c = 0.6 * m_k + of_c / 2, 0.6 * m_c + of_k / 2
        k, c = k - 0.02 * k @ m_k, c - 0.02 * c @ m_c
        roots = move(roots, a, g)
    for got, want in zip(of_roots("dense", roots), (k, c), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@every_structure
def test_a_solve_is_the_product_with_both_squares(structure):
    block, _ = make(structure)
    roots, v = random_roots(structure), oracles.normal(5, (P, Q))
    k, c = of_roots(structure, roots)
    got = block.solve(roots, v, jnp.asarray(LAM))
    np.testing.assert_allclose(got, k @ k.T @ v @ c @ c.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_moments_are_those_of_kfac_in_the_roots(bias):
    """Positions, masked NaN, and a bias row; of a structure only what it holds."""
    a, g = oracles.normal(0, (N, 3, P)), oracles.normal(1, (N, 3, Q))
    weights = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, (N, 3))).at[0].set(0)
    read = a.at[0].set(jnp.nan)
    use = make_use(3 * N, weights, bias)
    factors = ko.kronecker().measure(a, g, use)
    for structure in STRUCTURES:
        block, form = ko.inverse_free((P + bias, Q), structure, size=2), structure_of(structure, 2)
        roots = block.factorize(Means(jnp.asarray(2.0), jnp.asarray(0.5)), jnp.asarray(LAM))
        means, moved = block.measure(read, g, use, roots)
        for mean, got, held, factor in zip(means, moved, roots, factors, strict=True):
            k = as_matrix(form, held.root, len(factor))
            want = form.tangent(matrix_blocks(form, k.T @ factor @ k))
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)
            np.testing.assert_allclose(mean, np.trace(factor) / len(factor), rtol=1e-12)


@every_structure
def test_without_traces_a_step_is_an_average_of_the_inverse(structure):
    """Up to the square of the rate: half of it leaves a quarter of the defect. Of structures that
    have less than all symmetric matrices, in the coordinates that they can move."""
    roots, (a, g) = random_roots(structure), batch(1)
    form = structure_of(structure, 2)
    k = of_roots(structure, roots)[0]
    damped = np.asarray(a.T @ a / N) + LAM * np.eye(P)
    defects = []
    for rate in (1e-2, 5e-3, 2.5e-3):
        _, move = make(structure, root_rate=rate, root_momentum=0.0, coupled=False)
        new = of_roots(structure, move(roots, a, g))[0]
        average = (1 - rate) * np.linalg.inv(k @ k.T) + rate * damped
        # in the old basis, where the average is I + rate (K^T (A + damping I) K - I)
        change = k.T @ (np.linalg.inv(new @ new.T) - average) @ k
        in_structure = form.tangent(matrix_blocks(form, change))
        defects.append(np.abs(in_structure).max())
    assert defects[0] > 0
    np.testing.assert_allclose([defects[0] / defects[1], defects[1] / defects[2]], 4, rtol=0.05)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "block", "triangular"])
def test_the_fixed_point_is_the_damped_inverse(structure):
    """Of a constant factor; blocks and diagonals have that of theirs."""
    block, _ = make(structure, root_rate=0.3, root_momentum=0.0, coupled=False)
    a, g = batch(2)

    def step(roots, _):
        means, new = block.measure(a, g, make_use(), roots)
        return block.absorb(roots, new, means, jnp.asarray(LAM), NEVER), None

    roots = jax.jit(lambda roots: jax.lax.scan(step, roots, length=300)[0])(random_roots(structure))
    form = structure_of(structure, 2)
    for k, rows in zip(of_roots(structure, roots), (a, g), strict=True):
        damped = np.asarray(rows.T @ rows / N) + LAM * np.eye(len(k))
        held = jax.scipy.linalg.block_diag(*matrix_blocks(form, damped))[: len(k), : len(k)]
        np.testing.assert_allclose(k @ k.T, np.linalg.inv(held), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("coupled", [True, False])
def test_a_factor_moved_from_one_side_to_the_other(coupled):
    """Twenty steps of `(c A, G / c)` are those of `(A, G)` with traces, not without."""
    _, move = make(root_rate=0.05, coupled=coupled)
    plain = moved = random_roots("dense")
    for t in range(20):
        a, g = batch(t)
        plain, moved = move(plain, a, g), move(moved, 1.7 * a, g / 1.7)
    same = [
        np.allclose(x, y, rtol=1e-12, atol=0) for x, y in zip(*map(jax.tree.leaves, (plain, moved)))
    ]
    assert all(same) == coupled


@every_structure
def test_a_structure_is_closed_and_moves_as_far_as_it_can(structure):
    """`t + t^T` of a tangent is the orthogonal projection of `2 X`."""
    form, x = structure_of(structure, 2), symmetric(0, P)
    tangent = form.tangent(matrix_blocks(form, x))
    left = form.expand(tangent)
    np.testing.assert_allclose(form.expand(form.compress(left @ left)), left @ left, atol=1e-12)
    difference = 2 * matrix_blocks(form, x) - left - left.mT
    for index in np.ndindex(tangent.shape):
        one = form.expand(jnp.zeros_like(tangent).at[index].set(1.0))
        np.testing.assert_allclose(jnp.sum(difference * (one + one.mT)), 0, atol=1e-12)


def test_a_huge_curvature_leaves_roots_that_can_be_inverted():
    block, move = make(root_rate=1.0, root_momentum=0.9)
    roots = random_roots("dense")
    for t in range(5):
        a, g = batch(t)
        roots = move(roots, 1e6 * a, 1e6 * g)
        for k in of_roots("dense", roots):
            assert np.isfinite(k).all() and np.linalg.svd(k, compute_uv=False).min() > 0
    v = oracles.normal(0, (P, Q))
    assert np.vdot(v, block.solve(roots, v, jnp.asarray(LAM))) > 0


@every_structure
def test_a_step_of_an_optimizer_factorises_nothing(structure):
    estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    w, x = jnp.ones((P, Q)), oracles.normal(0, (N, P))
    tx = ko.singd(estimator.layers(w, x), structure=structure, size=2)

    def step(w, state):
        return tx.update(w, state, w, curvature=estimator.at(w, x))

    state = jax.eval_shape(tx.init, w)
    names = {e.primitive.name for e in helpers.equations(jax.make_jaxpr(step)(w, state).jaxpr)}
    assert "dot_general" in names
    assert not names & {"cholesky", "eigh", "lu", "triangular_solve", "qr", "svd", "householder"}


def test_a_refresh_leaves_the_roots_alone():
    block, _ = make()
    roots = random_roots("dense")
    means = Means(jnp.asarray(9.0), jnp.asarray(9.0))
    jax.tree.map(
        np.testing.assert_array_equal,
        block.refresh(roots, means, jnp.asarray(LAM), jnp.int32(3)),
        roots,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("sparse"), "structure='sparse'; expected one of 'dense', 'diagonal'"),
        (lambda: make(root_rate=0.0), "root_rate=0.0; expected root_rate > 0"),
        (lambda: make(root_rate=2.0), "root_rate=2.0; expected root_rate <= 1"),
        (lambda: make(root_momentum=1.0), "root_momentum=1.0"),
        (lambda: make(sharing="pool"), "sharing='pool'"),
        (lambda: make(positions=0), "positions=0"),
        (lambda: ko.inverse_free((2, 2), size=0), "size=0; expected size >= 1"),
        (
            lambda: make()[0].measure(jnp.ones((N, P)), None, make_use(), random_roots("dense")),
            "measures inputs only. Use fisher",
        ),
        (lambda: make()[0].multiply(None, None), "no average of the factors is kept"),
    ],
)
def test_wrong_settings_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
