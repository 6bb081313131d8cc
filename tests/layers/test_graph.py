"""Graph convolutions by `tap_dense`: a dense layer on aggregated features, whose rows are nodes.
Izadi et al. (2020).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves
from tests import oracles
from tests.layers.gradients import assert_gradients, squares

NODES, SIZES = 7, (3, 4, 2)


def graph():
    """A random undirected graph with self-loops, normalised by degree; its last node has no
    neighbours.
    """
    upper = np.triu(np.random.default_rng(0).random((NODES, NODES)) < 0.4, 1)
    upper[:, -1] = False
    adjacency = upper + upper.T + np.eye(NODES)
    root = np.sqrt(adjacency.sum(1))
    return jnp.asarray(adjacency / root[:, None] / root)


def gcn(params, adjacency, x, readout=None):
    """Logits of all nodes, or those of `readout`."""
    for i, layer in enumerate(params.values()):
        a = adjacency @ x
        x = ko.tap_dense(a @ layer["kernel"] + layer["bias"], a, layer["kernel"], layer["bias"])
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x if readout is None else x[readout]


def problem():
    return oracles.make_params(0, SIZES), graph(), oracles.normal(1, (NODES, SIZES[0]))


def updated(predict, make, params, *args):
    estimator = ko.ggn(predict)
    tx = make(estimator.layers(params, *args), learning_rate=0.1, damping=0.1)
    grads = jax.tree.map(jnp.sin, params)
    return jax.jit(lambda p, a: tx.update(grads, tx.init(p), p, curvature=estimator.at(p, *a))[0])(
        params, args
    )


def assert_same(a, b):
    for name, x in named_leaves(a).items():
        np.testing.assert_allclose(x, named_leaves(b)[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("readout", [None, [5, 0, 2]], ids=["all", "labelled"])
def test_gradients_of_graph_convolutions(x64, readout):
    """CHECK 8a, with a loss of every node or of a few: N counts the losses, rows are all nodes."""
    readout = None if readout is None else jnp.asarray(readout)
    losses = lambda p, adjacency, x: squares(gcn(p, adjacency, x, readout))
    layers = assert_gradients(losses, *problem())
    assert [layer.shape for layer in layers] == [(p + 1, q) for p, q in itertools.pairwise(SIZES)]


@pytest.mark.parametrize("make", [ko.kfac, ko.kfac_two_level])
def test_without_edges_a_graph_convolution_is_a_dense_layer(x64, make):
    """CHECK 8b."""
    params, _, x = problem()
    on_graph = updated(lambda p, x: ko.Categorical(gcn(p, jnp.eye(NODES), x)), make, params, x)
    assert_same(on_graph, updated(oracles.classifier, make, params, x))


@pytest.mark.parametrize("labelled", [range(NODES), [0, 2, 5]], ids=["all", "labelled"])
def test_the_order_of_the_nodes_does_not_matter(x64, labelled):
    """CHECK 8c. The labels stay in their order, so each keeps its random sign."""
    params, adjacency, x = problem()
    order = np.random.default_rng(2).permutation(NODES)
    labelled = np.asarray(labelled)
    new = np.argsort(order)[labelled]  # where the labelled nodes have gone
    updates = []
    for graph_, features, nodes in (
        (adjacency, x, labelled),
        (adjacency[order][:, order], x[order], new),
    ):
        predict = lambda p, g, x, nodes=nodes: ko.Categorical(gcn(p, g, x, jnp.asarray(nodes)))
        updates.append(updated(predict, ko.kfac, params, graph_, features))
    assert_same(*updates)


def test_factors_of_a_graph_with_few_labels(x64):
    """`A` is the sum over all nodes per label, `G` the mean over all nodes; labelled nodes draw
    their labels alone.
    """
    params, adjacency, x = problem()
    labelled = jnp.asarray([1, 4])
    predict = lambda p, x: ko.Normal(gcn(p, adjacency, x, labelled))
    estimator = ko.fisher(predict)
    plan = oracles.plan(estimator.layers(params, x))
    measure = lambda key: estimator.at(params, x, key=key).statistics(plan)[0][0]
    inputs, outputs = jax.jit(jax.vmap(measure))(jax.random.split(jax.random.key(0), 4000))
    a = jnp.concatenate([adjacency @ x, jnp.ones((NODES, 1))], 1)
    np.testing.assert_allclose(inputs[0, 0], a.T @ a / 2, rtol=1e-10)
    slope = 1 - jnp.tanh(adjacency @ x @ params["layer0"]["kernel"] + params["layer0"]["bias"]) ** 2
    # derivative of logit c of labelled node v by the hidden values of node u
    g = jnp.einsum("vu,uk,kc->vcuk", adjacency[labelled], slope, params["layer1"]["kernel"])
    expected = jnp.einsum("vcui,vcuj->ij", g, g) / NODES
    np.testing.assert_allclose(
        outputs.mean(0)[0], expected, atol=0.1 * float(jnp.abs(expected).max())
    )


def test_two_levels_need_one_row_per_example():
    params, adjacency, x = problem()
    with pytest.raises(ValueError, match="Axis 0 of a layer's input has to be the examples"):
        updated(
            lambda p, x: ko.Categorical(gcn(p, adjacency, x, jnp.arange(2))),
            ko.kfac_two_level,
            params,
            x,
        )
