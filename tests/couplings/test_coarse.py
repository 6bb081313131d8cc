"""The coarse level on its own: unequal positions, solves, damping."""

import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.couplings.coarse import coarse_factorize, coarse_solve
from tests import oracles


def measured(coupling, a, g):
    """Of one layer, with the axis of its copies."""
    return coupling.measure(a.sum(-1)[None], g.sum(-1)[None], None)


def pick(x, shape, method):
    """Channel sums `[N, *shape]` on a smaller map, by definition and position by position."""
    x = np.asarray(x)
    for axis, size in enumerate(shape, 1):
        have = x.shape[axis]
        parts = []
        for i in range(size):
            cell = (
                range(i * have // size, -(-(i + 1) * have // size))
                if method == "area"
                else [i * have // size]
            )
            parts.append(np.mean([np.take(x, j, axis) for j in cell], 0))
        x = np.stack(parts, axis)
    return x


@pytest.mark.parametrize("resample", ["nearest", "area"])
@pytest.mark.parametrize(
    "maps", [((4,), (1,), (2,)), ((4, 6), (3, 2), (4, 6)), ((5, 3), (2, 4), (7,))]
)
def test_maps_of_unequal_size_are_compared_on_the_smaller(x64, maps, resample):
    """Axis by axis, non-square maps and sequences included; maps with different numbers of axes are
    laid out first.
    """
    n, coupling = 5, ko.coarse_correction("factored", resample=resample)
    a = [oracles.normal(i, (n, *t, 3)) for i, t in enumerate(maps)]
    g = [oracles.normal(9 + i, (n, *t, 2)) for i, t in enumerate(maps)]
    grams = coupling.reduce([measured(coupling, x, y) for x, y in zip(a, g)], n)
    for i, t in enumerate(maps):
        for j, u in enumerate(maps):
            flat = len(t) != len(u)
            shape = (min(np.prod(t), np.prod(u)),) if flat else tuple(map(min, t, u))
            prepared = [np.asarray(x).sum(-1) for x in (a[i], a[j], g[i], g[j])]
            if flat:
                prepared = [x.reshape(n, -1) for x in prepared]
            ai, aj, gi, gj = (pick(x, shape, resample) for x in prepared)
            np.testing.assert_allclose(grams.inputs[i, j], np.sum(ai * aj) / n, rtol=1e-10)
            np.testing.assert_allclose(
                grams.outputs[i, j], np.sum(gi * gj) / (n * np.prod(shape)), rtol=1e-10
            )


@pytest.mark.parametrize("damping", ["identity", "galerkin"])
def test_solve_is_the_dense_solve(x64, damping):
    galerkin = damping == "galerkin"
    rows = oracles.normal(0, (7, 4))
    fisher, sizes, r = rows.T @ rows, jnp.asarray([1.0, 5.0, 20.0, 3.0]), oracles.normal(1, (4,))
    inverse = coarse_factorize(fisher, sizes, galerkin=galerkin)
    got = coarse_solve(inverse, r, jnp.asarray(0.3), sizes, galerkin=galerkin)
    diagonal = 0.3 * (np.asarray(sizes) if damping == "galerkin" else np.ones(4))
    np.testing.assert_allclose(got, np.linalg.solve(fisher + np.diag(diagonal), r), rtol=1e-10)


def test_indefinite_matrices_are_clamped_before_damping(x64):
    inverse = coarse_factorize(jnp.diag(jnp.asarray([2.0, -5.0])), jnp.ones(2))
    got = coarse_solve(inverse, jnp.ones(2), jnp.asarray(1.0), jnp.ones(2))
    np.testing.assert_allclose(got, [1 / 3, 1.0])
