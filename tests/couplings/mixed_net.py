"""A small network for couplings: buckets out of order, a normalisation between layers, a parameter
that nothing covers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfac_optax as ko
from tests import oracles
from tests.helpers import computed

DAMPING = 0.05
CHAIN = ("w0", "w1", "w2", "w3")  # in order of execution; w0 and w3 are of one bucket
SHAPES = {
    "w0": (3, 3),
    "b0": (3,),
    "scale": (3,),
    "shift": (3,),
    "w1": (3, 2),
    "b1": (2,),
    "w2": (2, 3),
    "w3": (3, 3),
    "b3": (3,),
    "gain": (3,),
}


def predict(params, x):
    s = ko.tap_dense(x @ params["w0"] + params["b0"], x, params["w0"], params["b0"])
    a = s / jnp.sqrt(1 + jnp.mean(s**2, -1, keepdims=True))
    x = jnp.tanh(
        ko.tap_scale_shift(
            a * params["scale"] + params["shift"], a, params["scale"], params["shift"]
        )
    )
    x = jnp.tanh(ko.tap_dense(x @ params["w1"] + params["b1"], x, params["w1"], params["b1"]))
    x = jnp.tanh(ko.tap_dense(x @ params["w2"], x, params["w2"]))
    return ko.Categorical(
        computed(params["gain"])
        * ko.tap_dense(x @ params["w3"] + params["b3"], x, params["w3"], params["b3"])
    )


ESTIMATOR = ko.ggn(predict)


class Net(NamedTuple):
    params: Any
    x: jax.Array
    layers: ko.Layers
    fisher: np.ndarray  # exact, of what blocks cover; in the order of a raveled tree
    z: np.ndarray
    covered: np.ndarray


def positions(name):
    """Where the entries of a leaf are in the raveled parameters."""
    start = sum(int(np.prod(SHAPES[other])) for other in sorted(SHAPES) if other < name)
    return np.arange(start, start + int(np.prod(SHAPES[name])))


@functools.cache
def net():
    params = {name: oracles.normal(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    x = oracles.normal(20, (9, 3))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    logits = lambda v: predict(unravel(v), x).logits
    jacobian = np.asarray(jax.jit(jax.jacfwd(logits))(flat))
    y = np.asarray(jax.nn.softmax(jax.jit(logits)(flat)))
    hessian = np.einsum("ni,ij->nij", y, np.eye(3)) - np.einsum("ni,nj->nij", y, y)
    fisher = np.einsum("nip,nij,njq->pq", jacobian, hessian, jacobian) / len(x)
    covered = np.ones(len(fisher))
    covered[positions("gain")] = 0
    z = np.zeros((4, len(fisher)))
    for row, name in enumerate(CHAIN):
        for leaf in (name, name.replace("w", "b")):
            if leaf in SHAPES:
                z[row, positions(leaf)] = 1
    layers = ESTIMATOR.layers(params, x)
    return Net(params, x, layers, fisher * covered * covered[:, None], z, covered)


def operator(tx, problem):
    """Columns are the updates of the unit gradients after one refresh; to be called under `jit`."""
    flat, unravel = jax.flatten_util.ravel_pytree(problem.params)
    curvature = ESTIMATOR.at(problem.params, problem.x)
    _, state = tx.update(problem.params, tx.init(problem.params), curvature=curvature, refresh=True)

    def column(v):
        updates, _ = tx.update(unravel(v), state, curvature=curvature, refresh=False)
        return jax.flatten_util.ravel_pytree(updates)[0]

    return jax.vmap(column, out_axes=1)(jnp.eye(flat.size))


# what no block covers passes, so that an update is linear in the gradient
SETTINGS = dict(learning_rate=1.0, damping=DAMPING, kl_clip=None, uncovered="pass")
