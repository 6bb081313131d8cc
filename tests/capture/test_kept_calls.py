"""Calls among parameters, of which some come apart and the others stay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from jax.interpreters import partial_eval

from kfac_optax.capture.kernels.distribute import distributed
from kfac_optax.capture.layers import trace

N, WIDTH = 5, 3
positions = jax.jit(lambda table: jnp.take(table, jnp.arange(N), axis=0))
halved = jax.jit(lambda w: w / 2)
outer = jax.jit(lambda w: halved(w) + 1)
twice = jax.jit(lambda w: (w + 1, w + 1))
same = jax.jit(lambda w: w)


def params():
    draw = np.random.default_rng(0).normal
    return {"table": jnp.asarray(draw(size=(N, WIDTH))), "w": jnp.asarray(draw(size=(WIDTH, 2)))}


def traced(model):
    p, x = params(), jnp.ones((N, WIDTH))
    closed = jax.make_jaxpr(model)(p, x)
    new = distributed(closed, len(p))
    inputs = [*jax.tree.leaves(p), x]
    was, now = (jex.jaxpr_as_fun(program)(*inputs) for program in (closed, new))
    for before, after in zip(was, now, strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6)
    return closed, new


def calls(closed):
    """How many there are that something reads."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return [eqn.primitive.name for eqn in jaxpr.eqns].count("jit")


def test_a_program_of_which_nothing_comes_apart_is_handed_back():
    closed, new = traced(lambda p, x: (x + positions(p["table"])) @ p["w"] + outer(p["w"]).sum())
    assert new is closed


@pytest.mark.parametrize("call", [positions, outer])
def test_a_call_stays_one_beside_a_kernel_that_comes_apart(call):
    kept = lambda p: call(p["table"])
    closed, new = traced(lambda p, x: kept(p) * 2 + (x @ halved(p["w"])).sum())
    # the kernel's own call is gone, and nothing that was inside the other one is outside
    assert calls(closed) == 2
    assert calls(new) == 1


def test_what_is_read_inside_of_a_call_stays_written_out():
    bent = jax.jit(lambda w: jnp.tanh(w) + w)
    closed, new = traced(lambda p, x: x @ bent(p["w"]))
    assert calls(closed) == 1
    assert calls(new) == 0


@pytest.mark.parametrize("call", [twice, same])
def test_calls_that_hand_out_a_value_twice_or_an_input(call):
    others = lambda p: jax.tree.map(jnp.sum, call(p["table"]))
    traced(lambda p, x: (others(p), x @ halved(p["w"])))


def test_look_ups_of_constant_positions_are_calls_in_the_traced_model():
    """As they are in the gradient of the same model, whose forward pass the compiler merges."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            steps = jnp.broadcast_to(jnp.arange(N), tokens.shape)
            x = nn.Embed(7, WIDTH)(tokens) + nn.Embed(N, WIDTH)(steps)
            return nn.Dense(2)(nn.LayerNorm()(x))

    tokens = jnp.zeros((4, N), jnp.int32)
    variables = Net().init(jax.random.key(0), tokens)
    found = trace(Net().apply, variables, (tokens,), "test")
    names = [eqn.params.get("name") for eqn in found.jaxpr.eqns]
    assert names.count("_take") == 2
    # the norm has come apart: its gain is a layer
    assert len(found.layers.layers) == 4
