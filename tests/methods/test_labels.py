"""Labels of leaves and the table of their axes."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c

DOCS = pathlib.Path(__file__).parents[2] / "docs"

PARAMS = {
    "Embed_0": {"embedding": jnp.ones((9, 4))},
    "MultiHeadDotProductAttention_0": {"query": {"kernel": jnp.ones((4, 2, 2))}},
    "LayerNorm_0": {"scale": jnp.ones(4)},
    "row": jnp.ones((1, 4)),
    "scanned": {"bias": jnp.ones((3, 4)), "kernel": jnp.ones((3, 4, 4))},
    "lm_head": {"kernel": jnp.ones((4, 9))},
    "Dense_3": {"kernel": jnp.ones((4, 2))},
    "empty": jnp.ones((0, 4)),
}


def stacked(name):
    return int(name.startswith("scanned"))


def matrices(labels, of="matrix"):
    leaves = jax.tree_util.tree_leaves_with_path(labels)
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, x in leaves if x == of}


def test_weights_between_units_are_matrices():
    """An attention head is none of the classes; scales of scanned layers are vectors."""
    query = "MultiHeadDotProductAttention_0/query/kernel"
    labels = ko.matrix_labels(PARAMS, stacked=stacked)
    assert matrices(labels) == {query, "scanned/kernel", "Dense_3/kernel"}
    labels = ko.matrix_labels(PARAMS, stacked=stacked, more_others="dense_3")
    assert matrices(labels) == {query, "scanned/kernel"}
    labels = ko.matrix_labels(PARAMS, others=(), more_others=["lm_*/kernel"], matrix="m")
    both = {"Embed_0/embedding", query, "scanned/kernel", "scanned/bias", "Dense_3/kernel"}
    assert matrices(labels, "m") == both


def test_labels_divide_the_leaves_between_two_optimizers():
    params = c.tree_of_all_kinds()
    labels = ko.matrix_labels(params)
    both = {"matrix": ko.scale_by_shampoo(), "other": optax.scale_by_adam()}
    (mine,), _ = c.run(optax.partition(both, labels), [params])
    for name, tx in both.items():
        (alone,), _ = c.run(tx, [{n: params[n] for n in params if labels[n] == name}])
        h.assert_close({n: mine[n] for n in alone}, alone, rtol=1e-4)
    assert matrices(labels) == {"conv", "dense"}


def test_a_pattern_that_names_nothing_is_an_error():
    with pytest.raises(ValueError, match="'Dense_4' names no leaf.*'Dense_3/kernel'"):
        ko.matrix_labels(PARAMS, more_others=["Dense_4"])
    with pytest.raises(ValueError, match="both labels are 'a'"):
        ko.matrix_labels(PARAMS, matrix="a", other="a")


@pytest.mark.parametrize("number", [9, -1, 1.0])
@pytest.mark.parametrize("ask", [ko.matrix_labels, ko.axes_table])
def test_axes_that_a_leaf_does_not_have_are_an_error(ask, number):
    with pytest.raises(ValueError, match=f"{ask.__name__}: stacked.* is {number}.*an integer from"):
        ask(PARAMS, stacked=lambda name: number)


@pytest.mark.parametrize(
    "words",
    [{}, dict(max_dim=3), dict(max_dim=3, long_axes="diagonal", vectors="diagonal"), dict(merge=1)],
)
def test_table_counts_the_numbers_of_the_statistics(words):
    words = words | {"stacked": stacked}
    state = jax.eval_shape(ko.scale_by_shampoo(**words).init, PARAMS)
    expected = sum(x.size for x in jax.tree.leaves(state.factors))
    lines = ko.axes_table(PARAMS, **words).splitlines()[2:]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == expected
    assert len(lines) == len(jax.tree.leaves(PARAMS))


def test_table_says_what_soap_does_with_long_axes_and_vectors():
    words = dict(max_dim=4, long_axes="identity", vectors="identity")
    table = ko.axes_table({"k": jnp.ones((9, 4)), "v": jnp.ones(4)}, **words)
    assert "9: as it is; 4: 4x4" in table
    assert "4: as it is" in table.splitlines()[-1]


def test_table_of_the_page_is_that_of_its_example():
    sizes = {"layers_0": (4, 8), "layers_2": (8, 3)}  # as its set-up makes them
    params = {n: {"bias": np.ones(q), "kernel": np.ones((p, q))} for n, (p, q) in sizes.items()}
    page = (DOCS / "howto" / "gradient_only.md").read_text()
    (table,) = re.findall(r"```text\n(leaf .*?)```", page, re.DOTALL)
    assert table.strip() == ko.axes_table(params, max_dim=6)


def test_labels_have_a_column_and_are_of_the_same_leaves():
    params = {"a": np.ones((2, 3)), "b": np.ones(3)}
    table = ko.axes_table(params, labels=ko.matrix_labels(params))
    assert "label" in table.splitlines()[0]
    assert [line.split()[2] for line in table.splitlines()[2:]] == ["matrix", "other"]
    with pytest.raises(ValueError, match="labels are of the leaves"):
        ko.axes_table(params, labels={"a": "x"})
    with pytest.raises(ValueError, match="long_axes"):
        ko.axes_table(params, long_axes="cut")
