"""LAPACK calls of one matrix at a time, where a process has several CPU devices."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import kfac_optax
from kfac_optax.linalg import lapack
from kfac_optax.testing.factorizations import stacked
from tests import helpers as h

N, COLUMNS = 4, 2
_transposed = functools.partial(lapack.solve_triangular, trans=1, lower=True)


def _lu(matrix, b):
    return lapack.lu_solve(*lapack.lu_factor(matrix), b)


# by name: the call, JAX's own, and how many arrays it takes, of which the second has columns
CALLS = {
    "cholesky": (lapack.cholesky, jnp.linalg.cholesky, 1),
    "eigh": (lapack.eigh, lambda m: tuple(jnp.linalg.eigh(m)), 1),
    "eigvalsh": (lapack.eigvalsh, jnp.linalg.eigvalsh, 1),
    "qr": (lapack.qr, lambda m: tuple(jnp.linalg.qr(m)), 1),
    "svd": (lapack.svd, lambda m: tuple(jnp.linalg.svd(m)), 1),
    "slogdet": (lapack.slogdet, lambda m: tuple(jnp.linalg.slogdet(m)), 1),
    "solve": (lapack.solve, jnp.linalg.solve, 2),
    "lu": (
        _lu,
        lambda m, b: jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(m), b),
        2,
    ),
    "cho_solve": (
        lapack.cho_solve,
        lambda lower, b: jax.scipy.linalg.cho_solve((lower, True), b),
        2,
    ),
    "solve_triangular": (
        _transposed,
        lambda m, b: jax.scipy.linalg.solve_triangular(m, b, trans=1, lower=True),
        2,
    ),
}
DIFFERENTIATED = ("cholesky", "eigh", "slogdet", "solve", "lu", "solve_triangular")


@pytest.fixture
def several(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere a stack is one call")
    monkeypatch.setattr(lapack, "several_devices", lambda: True)


def _arguments(name, leading):
    """A positive definite stack, and columns beside it."""
    key_of_matrix, key_of_columns = jax.random.split(jax.random.key(0))
    root = jax.random.normal(key_of_matrix, (*leading, N, N))
    columns = jax.random.normal(key_of_columns, (*leading, N, COLUMNS))
    # eigenvalues apart, so that eigenvectors are known
    matrix = root @ root.mT / N + jnp.diag(jnp.arange(1.0, N + 1))
    return (matrix, columns)[: CALLS[name][2]]


def _check(call, expected, arguments):
    """The same numbers, and no call that takes a stack."""
    compiled = jax.jit(call).lower(*arguments).compile()
    h.assert_close(compiled(*arguments), expected(*arguments))
    found, count = stacked(compiled.as_text())
    assert found == []
    assert count > 0


@pytest.mark.parametrize("name", CALLS)
def test_a_stack_is_taken_one_matrix_at_a_time(several, name):
    call, own, _ = CALLS[name]
    arguments = _arguments(name, (2, 3))
    _check(call, own, arguments)
    _check(jax.vmap(jax.vmap(call)), own, arguments)
    # the axis of the stack behind the first of another one
    _check(jax.vmap(jax.vmap(call), 1, 1), own, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_one_device_makes_the_call_of_jax(name):
    call, own, _ = CALLS[name]
    arguments = _arguments(name, (3,))
    mine, theirs = (jax.jit(lambda *x, f=f: f(*x)).lower(*arguments).as_text() for f in (call, own))
    assert mine == theirs


def test_one_matrix_serves_several_right_hand_sides(several):
    matrix, columns = _arguments("solve", (3,))
    against = functools.partial(lapack.solve, matrix[0])
    _check(jax.vmap(against), functools.partial(jnp.linalg.solve, matrix[0]), (columns,))


def test_one_right_hand_side_serves_several_matrices(several):
    matrix, columns = _arguments("solve", (3,))
    call = jax.vmap(lambda m: lapack.solve(m, columns[0, :, 0]))
    expected = jax.vmap(lambda m: jnp.linalg.solve(m, columns[0, :, 0]))
    _check(call, expected, (matrix,))


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_are_those_of_jax(several, name):
    call, own, count = CALLS[name]
    arguments = _arguments(name, (3,))

    def total(f):
        # absolute values: the signs of eigenvectors are anybody's
        def of_arguments(*arguments):
            results = jax.vmap(f)(*arguments)
            return sum(jnp.sum(jnp.sin(jnp.abs(x))) for x in jax.tree.leaves(results))

        return jax.jit(jax.grad(of_arguments, tuple(range(count))))

    h.assert_close(total(call)(*arguments), total(own)(*arguments))
    forward = jax.jit(lambda *x: jax.jvp(jax.vmap(call), x, x))
    h.assert_close(forward(*arguments), jax.jvp(jax.vmap(own), arguments, arguments))


def test_without_a_cpu_there_are_not_several(monkeypatch):
    def missing(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", missing)
    assert not lapack.several_devices()


def test_all_calls_of_the_package_go_this_way():
    root = pathlib.Path(kfac_optax.__file__).parent
    # norms of entries, and powers, which are products, make no LAPACK calls
    direct = re.compile(r"\b(jnp|jax|lax|scipy|jsp)\.linalg\.(?!(norm|matrix_power)\b)")
    apart = {"experiments", "testing"}
    for path in root.rglob("*.py"):
        if path == pathlib.Path(lapack.__file__) or apart & set(path.relative_to(root).parts):
            continue
        assert direct.search(path.read_text()) is None, path
