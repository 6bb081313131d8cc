"""The gradient identity as a block: `(1/N) sum_rows a g^T` is the gradient of the mean loss, for
every kind of layer.

A layer whose rows, geometry, layout, order of axes, scale or uses were wrong would not give its own
gradient back.
"""

import jax
import jax.numpy as jnp
import numpy as np

import kfac_optax as ko
from kfac_optax._tree import make_buckets, named_leaves, scatter
from kfac_optax.estimators import heads
from kfac_optax.estimators.output_cotangents import OutputCotangents
from kfac_optax.estimators.plan import Plan
from kfac_optax.linalg.gram import gram, homogeneous


def _weights(a, g, use):
    if jnp.issubdtype(a.dtype, jnp.integer) and g.shape[-1] == use.outputs:
        return jnp.zeros((use.inputs, use.outputs), use.dtype).at[a].add(g) / use.examples
    a = homogeneous(a) if use.bias else a
    product = gram(a.astype(use.dtype), g.astype(use.dtype)) / use.examples
    # the head of a tied table: logits = h @ table.T
    return (
        product.T
        if product.shape == (use.outputs, use.inputs) != (use.inputs, use.outputs)
        else product
    )


def _scales(a, g, use):
    rows = [a * g, g] if use.bias else [a * g]
    return (
        jnp.stack([x.reshape(-1, x.shape[-1]).sum(0) for x in rows]).astype(use.dtype)
        / use.examples
    )


def block(measure, name, **options):
    """A block that only measures."""
    nothing = lambda *_: None
    return ko.Block(name, nothing, measure, nothing, nothing, nothing, **options)


WEIGHTS, SCALES = block(_weights, "weights"), block(_scales, "scales")


def measured_gradients(losses, params, *args, dtype=jnp.float64, weights=WEIGHTS):
    """Gradient of the mean of `losses(params, *args) [N]`, measured by the taps, by leaf; and the
    layers.
    """
    spec = ko.empirical_fisher(losses).spec
    # a gradient is a sum of rows as they are, while their products do not ask for the random signs
    as_they_are = lambda losses, *_: OutputCotangents(
        1, lambda k: [(jnp.ones_like(x),) for x in losses]
    )
    estimator = ko.Estimator(
        spec._replace(kind=heads.EMPIRICAL._replace(output_cotangents=as_they_are))
    )
    layers = estimator.layers(params, *args)
    blocks = tuple(SCALES if x.kind == "scale_shift" else weights for x in layers)
    plan = Plan(layers.layers, blocks, None, dtype)
    statistics, _ = jax.jit(lambda p, a: estimator.at(p, *a).statistics(plan))(params, args)
    leaves = {name: jnp.zeros_like(x) for name, x in named_leaves(params).items()}
    out = {}
    for layer, statistic in zip(layers, statistics, strict=True):
        (bucket,) = make_buckets([layer])
        out |= scatter(bucket, statistic, leaves | out)
    return out, layers


def assert_gradients(losses, params, *args, uncovered=(), rtol=1e-8, **options):
    """Every covered leaf's measured gradient equals autodiff's; exactly `uncovered` is left over."""
    got, layers = measured_gradients(losses, params, *args, **options)
    expected = named_leaves(jax.jit(jax.grad(lambda p: losses(p, *args).mean()))(params))
    assert {u.path for u in layers.uncovered} == set(uncovered), str(layers)
    assert set(got) == set(expected) - set(uncovered)
    for name, value in got.items():
        scale = np.abs(expected[name]).max()
        assert scale > 0, f"{name}: nothing to compare"
        np.testing.assert_allclose(
            value, expected[name], rtol=rtol, atol=rtol * scale, err_msg=name
        )
    return layers


def squares(outputs):
    """Per-example losses that treat every output differently."""
    flat = outputs.reshape(len(outputs), -1)
    return jnp.sum((flat - jnp.linspace(-1, 1, flat.shape[1])) ** 2, 1) / 2


def x64_params(init, *args):
    """Parameters drawn anew, so that zero initialisations do not hide anything."""
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape)), shapes)
