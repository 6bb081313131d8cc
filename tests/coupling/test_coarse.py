"""The coarse level on its own: unequal positions, solves, damping."""

import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Use
from tests import oracles


def sums(coupling, a, g):
    use = Use(False, g.shape[-1], len(a), a[..., 0].size, jnp.float64)
    return [x[None] for x in coupling.measure(a, g, use)]


def test_layers_with_different_numbers_of_positions_are_resampled_to_the_shorter(x64):
    """Three layers with 4, 1 and 2 positions: every pair is compared at the smaller number, nearest positions."""
    n, coupling = 5, ko.coarse_correction("factored")
    positions = (4, 1, 2)
    a = [oracles.normal(i, (n, t, 3)) for i, t in enumerate(positions)]
    g = [oracles.normal(9 + i, (n, t, 2)) for i, t in enumerate(positions)]
    measured = [
        type(coupling.measure(x, y, Use(False, 2, n, 1, jnp.float64)))(*sums(coupling, x, y)) for x, y in zip(a, g)
    ]
    grams = coupling.reduce(measured, n)
    for i, t in enumerate(positions):
        for j, u in enumerate(positions):
            m = min(t, u)
            pick = lambda x, have, m=m: np.asarray(x).sum(-1)[:, [k * have // m for k in range(m)]]
            inputs = np.sum(pick(a[i], t) * pick(a[j], u)) / n
            outputs = np.sum(pick(g[i], t) * pick(g[j], u)) / (n * m)
            np.testing.assert_allclose(grams.inputs[i, j], inputs, rtol=1e-10)
            np.testing.assert_allclose(grams.outputs[i, j], outputs, rtol=1e-10)


@pytest.mark.parametrize("damping", ["identity", "galerkin"])
def test_solve_is_the_dense_solve(x64, damping):
    coupling = ko.coarse_correction("exact", damping=damping)
    rows = oracles.normal(0, (7, 4))
    fisher, sizes, r = rows.T @ rows, jnp.asarray([1.0, 5.0, 20.0, 3.0]), oracles.normal(1, (4,))
    statistic = type(coupling.init(4, jnp.float64))(fisher)
    got = coupling.solve(coupling.factorize(statistic, sizes), r, jnp.asarray(0.3), sizes)
    diagonal = 0.3 * (np.asarray(sizes) if damping == "galerkin" else np.ones(4))
    np.testing.assert_allclose(got, np.linalg.solve(fisher + np.diag(diagonal), r), rtol=1e-10)


def test_indefinite_matrices_are_clamped_before_damping(x64):
    coupling = ko.coarse_correction("exact")
    statistic = type(coupling.init(2, jnp.float64))(jnp.diag(jnp.asarray([2.0, -5.0])))
    got = coupling.solve(coupling.factorize(statistic, jnp.ones(2)), jnp.ones(2), jnp.asarray(1.0), jnp.ones(2))
    np.testing.assert_allclose(got, [1 / 3, 1.0])
