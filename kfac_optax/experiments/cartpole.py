"""Cart and pole in pure JAX: push a cart left or right so that the pole on it stays up.

The equations of motion, constants and limits are those of Barto, Sutton & Anderson, Neuronlike
adaptive elements that can solve difficult learning control problems (1983), without friction, in
the form that is usual today: a push of 10 N either way, Euler steps of 0.02 s, a reward of 1 a
step, the end at 2.4 m, 12 degrees or 500 steps.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
FORCE, SECONDS = 10.0, 0.02  # N, of a step
MAX_POSITION, MAX_ANGLE, MAX_STEPS = 2.4, 12 * math.pi / 180, 500
ACTIONS, OBSERVATIONS = 2, 4


class State(NamedTuple):
    """One environment, or several on leading axes."""

    observation: jax.Array  # [4]: position, velocity, angle from upright, angular velocity
    steps: jax.Array  # [], int32: of this episode


class Outcome(NamedTuple):
    """What a step led to; an episode ends where either flag is set."""

    observation: jax.Array  # [4], before any reset
    reward: jax.Array
    terminated: jax.Array  # the pole fell or the cart left the track: no reward would follow
    truncated: jax.Array  # the time was up: rewards would have followed


def reset(key: jax.Array) -> State:
    """A new episode, all of the observation uniform in [-0.05, 0.05].

    >>> print(reset(jax.random.key(0)).observation.shape)
    (4,)
    """
    observation = jax.random.uniform(key, (OBSERVATIONS,), minval=-0.05, maxval=0.05)
    return State(observation, jnp.zeros((), jnp.int32))


def move(observation: jax.Array, action: jax.Array) -> jax.Array:
    """The observation 0.02 s later, pushed right (action 1) or left (0).

    >>> print(move(jnp.zeros(4), 1).round(4))
    [ 0.      0.1951  0.     -0.2927]
    """
    _, velocity, angle, spin = observation
    force = jnp.where(action == 1, FORCE, -FORCE)
    mass, moment = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (force + moment * spin**2 * sine) / mass
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / mass))
    acceleration = push - moment * turn * cosine / mass
    return observation + SECONDS * jnp.stack([velocity, acceleration, spin, turn])


def step(key: jax.Array, state: State, action: jax.Array) -> tuple[State, Outcome]:
    """One step; where it ends the episode, the state is already that of the next one.

    >>> state, outcome = step(jax.random.key(0), State(jnp.array([2.4, 1.0, 0.0, 0.0]), jnp.int32(7)), 1)
    >>> print(outcome.terminated, outcome.truncated, state.steps)
    True False 0
    """
    observation, steps = move(state.observation, action), state.steps + 1
    terminated = (jnp.abs(observation[0]) > MAX_POSITION) | (jnp.abs(observation[2]) > MAX_ANGLE)
    truncated = (steps >= MAX_STEPS) & ~terminated
    outcome = Outcome(observation, jnp.ones(()), terminated, truncated)
    new = reset(key)
    done = terminated | truncated
    return State(
        jnp.where(done, new.observation, observation), jnp.where(done, new.steps, steps)
    ), outcome
