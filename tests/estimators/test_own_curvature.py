"""A curvature of one's own: a matrix `J` written down, and every kind of update that asks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import oracles

N, INPUTS, OUTPUTS = 5, 3, 2


class Known:
    """The Gauss-Newton matrix of `x @ w`, for which nothing has to be differentiated."""

    def __init__(self, params, x):
        self.params, self.x = params, x

    def _jacobian(self):
        """`[N, q, p q]`."""
        eye = jnp.eye(OUTPUTS)
        return jnp.einsum("np,oq->nopq", self.x, eye).reshape(N, OUTPUTS, -1)

    def linearize(self, *, sampled=False, subsample=None, axis_name=None):
        assert not sampled and subsample is None and axis_name is None
        j = self._jacobian()
        return ko.SampleJacobian(
            lambda v: [j @ v["w"].ravel()],
            lambda u: {"w": jnp.einsum("no,nod->d", u[0], j).reshape(INPUTS, OUTPUTS)},
            N,
        )

    def rows(self, layers, *, sampled=False, axis_name=None):
        (layer,) = layers
        g = jnp.broadcast_to(jnp.eye(OUTPUTS)[:, None, None, None], (OUTPUTS, 1, N, 1, OUTPUTS))
        return {layer: ko.LayerRows(self.x[None, :, None], g)}

    def vector_product(self, vector, **_):
        j = self.linearize()
        return {"w": j.vjp(j.jvp(vector))["w"] / N}

    def quadratic_form(self, directions, **_):
        tangents = jnp.stack([self.linearize().jvp(d)[0].ravel() for d in directions])
        return tangents @ tangents.T / N

    def statistics(self, plan):
        (layer,), (block,) = plan.layers, plan.blocks
        use = ko.Use(layer, N, N, plan.dtype)
        columns = [jnp.tile(jnp.sqrt(2.0) * e, (N, 1)) for e in jnp.eye(OUTPUTS)]
        measured = [block.measure(self.x, g, use) for g in columns]
        mean = [(a + b) / 2 for a, b in zip(*measured, strict=True)]
        return [type(measured[0])(*(x[None] for x in mean))], None


ESTIMATOR = ko.ggn(lambda p, x: ko.Normal(ko.tap_dense(x @ p["w"], x, p["w"])))
UPDATES = {
    "kfac": lambda layers: ko.kfac(layers, learning_rate=1.0, damping=0.1),
    "quadratic_step": lambda layers: ko.quadratic_step(damping=0.1),
    "smw": lambda layers: ko.smw(damping=0.1),
    "smw of rows": lambda layers: ko.smw(layers, damping=0.1),
    "spring": lambda layers: ko.spring(learning_rate=1.0, damping=0.1),
}


@pytest.mark.parametrize("name", UPDATES)
def test_it_serves_as_that_of_an_estimator(name, x64):
    params, x = {"w": oracles.normal(0, (INPUTS, OUTPUTS))}, oracles.normal(1, (N, INPUTS))
    gradient = {"w": oracles.normal(2, (INPUTS, OUTPUTS))}
    tx = optax.with_extra_args_support(UPDATES[name](ESTIMATOR.layers(params, x)))
    updates = []
    for curvature in (Known(params, x), ESTIMATOR.at(params, x)):
        update, _ = jax.jit(
            lambda g, c=curvature: tx.update(g, tx.init(g), params, curvature=c, grad=g)
        )(gradient)
        updates.append(update["w"])
    np.testing.assert_allclose(*updates, rtol=1e-9, atol=1e-12)


def test_its_products_are_those_of_the_estimator(x64):
    params, x = {"w": oracles.normal(0, (INPUTS, OUTPUTS))}, oracles.normal(1, (N, INPUTS))
    got, expected = (
        c.vector_product(params)["w"] for c in (Known(params, x), ESTIMATOR.at(params, x))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_estimators_have_all_that_the_protocol_names():
    params, x = {"w": jnp.ones((INPUTS, OUTPUTS))}, jnp.ones((N, INPUTS))
    shared = ESTIMATOR.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
    _, _, with_gradient = shared(params, x, targets=jnp.ones((N, OUTPUTS)))
    names = {name for name in vars(ko.Curvature) if not name.startswith("_")} | {"params"}
    assert names >= {"statistics", "linearize", "rows", "sampled_gradient"}
    for curvature in (ESTIMATOR.at(params, x), with_gradient):
        assert not [name for name in names if not hasattr(curvature, name)]
