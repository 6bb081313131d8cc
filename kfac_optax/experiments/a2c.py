"""Advantage actor-critic on cart-pole: rollouts, loss and the whole training of a run as one scan."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn

import kfac_optax as ko
from kfac_optax.experiments import cartpole

Schedule = Callable[[Any], Any]


class ActorCritic(nn.Module):
    """Tanh networks of policy and value, with a trunk of their own or a shared one."""

    widths: tuple[int, ...] = (64, 64)
    shared: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        """Two likelihoods, whose joint Fisher the curvature measures: `[N]` policies and `[N]`
        values.
        """
        # a shared trunk sees the gradients of both heads
        trunk = self._trunk("trunk", x) if self.shared else None
        hidden = [self._trunk(name, x) if trunk is None else trunk for name in ("actor", "critic")]
        # small weights: at first all actions are about as likely
        head = functools.partial(nn.Dense, kernel_init=nn.initializers.orthogonal(0.01))
        logits = head(cartpole.ACTIONS, name="policy")(hidden[0])
        value = head(1, name="value")(hidden[1])[..., 0]
        return {"policy": ko.Categorical(logits), "value": ko.Normal(value)}

    def _trunk(self, name: str, x: jax.Array) -> jax.Array:
        for i, width in enumerate(self.widths):
            x = nn.tanh(
                nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5), name=f"{name}_{i}")(
                    x
                )
            )
        return x


class Method(NamedTuple):
    """An optimizer: its label, whether updates need `curvature=`, and how it is built.

    `build(config, layers, schedule)` makes the transformation; the layers are those that the
    library found.
    """

    label: str
    curvature: bool
    build: Callable[[ml_collections.ConfigDict, Any, Schedule], optax.GradientTransformation]


def _acktr(config: ml_collections.ConfigDict, layers: Any, schedule: Schedule) -> Any:
    options = config.acktr.to_dict()
    radius, metric, steps, factor = (
        options.pop(name) for name in ("radius", "metric", "cold_steps", "cold_scale")
    )
    # U of K-FAC, whose length the trust region decides on
    natural = ko.kfac(layers, learning_rate=1.0, kl_clip=None, **options)
    # a few steps of plain gradients, until statistics are of some use
    warmed = ko.cold_start(natural, steps=steps, initial=optax.scale(factor))
    clipped = ko.clip_by_trust_region(
        warmed, learning_rate=schedule, radius=radius, metric=metric, layers=layers
    )
    return optax.chain(clipped, optax.sgd(schedule))


def _adam(config: ml_collections.ConfigDict, layers: Any, schedule: Schedule) -> Any:
    del layers
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, eps=1e-5)
    )


def _rmsprop(config: ml_collections.ConfigDict, layers: Any, schedule: Schedule) -> Any:
    del layers
    tx = optax.rmsprop(schedule, decay=0.99, eps=1e-5, eps_in_sqrt=False)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)


METHODS = {
    "acktr": Method("ACKTR", True, _acktr),
    "adam": Method("A2C, Adam", False, _adam),
    "rmsprop": Method("A2C, RMSProp", False, _rmsprop),
}


class Batch(NamedTuple):
    """A rollout, `[T, n]` each."""

    observation: jax.Array
    action: jax.Array
    value: jax.Array
    outcome: cartpole.Outcome
    finished: jax.Array  # return of the episode that ended here, 0 where none did


class Log(NamedTuple):
    """One row for every update of a run."""

    total: jax.Array  # returns of the episodes that ended, added up
    episodes: jax.Array  # how many
    entropy: jax.Array


def train(
    config: ml_collections.ConfigDict, method: Method, rate: jax.Array, key: jax.Array
) -> Log:
    """A whole run, compiled as one scan over updates; learning rate and key may be traced.

    Args:
      config: the experiment.
      method: one of `METHODS`.
      rate: learning rate at the start; it falls linearly to zero.
      key: of weights, environments, actions and labels.

    Returns:
      What happened in every update, `[updates]`.
    """
    model = ActorCritic(tuple(config.widths), config.shared)
    # keys of parameters, environments and training
    init_key, reset_key, key = jax.random.split(key, 3)
    params = model.init(init_key, jnp.zeros((1, cartpole.OBSERVATIONS)))["params"]
    # the model's own distributions, for labels drawn from them
    predict = lambda params, x: model.apply({"params": params}, x)
    fisher = ko.fisher(predict)
    samples = jnp.zeros((config.environments * config.rollout, cartpole.OBSERVATIONS))
    updates = updates_of(config)
    # linearly to zero over the run
    schedule = lambda count: rate * (1 - count / updates)
    layers = fisher.layers(params, samples) if method.curvature else None
    tx = optax.with_extra_args_support(method.build(config, layers, schedule))

    def update(carry: Any, key: jax.Array) -> tuple[Any, Log]:
        params, opt_state, envs, returns = carry
        rollout_key, label_key = jax.random.split(key)
        envs, returns, batch = rollout(config, predict, params, envs, returns, rollout_key)
        x, grads, entropy = gradient(config, predict, params, batch)
        # the Fisher of the policy at observations of this rollout
        extra = {"curvature": fisher.at(params, x, key=label_key)} if method.curvature else {}
        steps, opt_state = tx.update(grads, opt_state, params, **extra)
        # episodes end by themselves or at the limit of steps
        ended = batch.outcome.terminated | batch.outcome.truncated
        log = Log(batch.finished.sum(), ended.sum(), entropy)
        return (optax.apply_updates(params, steps), opt_state, envs, returns), log

    envs = jax.vmap(cartpole.reset)(jax.random.split(reset_key, config.environments))
    carry = params, tx.init(params), envs, jnp.zeros(config.environments)
    return jax.lax.scan(update, carry, jax.random.split(key, updates))[1]


def updates_of(config: ml_collections.ConfigDict) -> int:
    """Number of updates of a run."""
    return config.steps // (config.environments * config.rollout)


def rollout(
    config: Any, predict: Any, params: Any, envs: Any, returns: jax.Array, key: jax.Array
) -> tuple:
    """`config.rollout` steps of all environments with actions drawn from the policy."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, Batch]:
        # all environments step by step
        envs, returns = carry
        action_key, env_key = jax.random.split(key)
        heads = predict(params, envs.observation)
        action = jax.random.categorical(action_key, heads["policy"].logits)
        keys = jax.random.split(env_key, config.environments)
        new, outcome = jax.vmap(cartpole.step)(keys, envs, action)
        returns = returns + outcome.reward
        done = outcome.terminated | outcome.truncated
        # returns of episodes that have ended, and of those that go on
        finished, returns = jnp.where(done, returns, 0), jnp.where(done, 0, returns)
        return (new, returns), Batch(
            envs.observation, action, heads["value"].mean, outcome, finished
        )

    (envs, returns), batch = jax.lax.scan(
        step, (envs, returns), jax.random.split(key, config.rollout)
    )
    return envs, returns, batch


def advantages(
    batch: Batch, following: jax.Array, *, discount: float, trace: float, scale: float
) -> jax.Array:
    """Generalised advantage estimates, `[T, n]`.

    `A_t = d_t + discount trace (1 - done_t) A_{t+1}`,
    `d_t = scale r_t + discount v(x'_t) - v(x_t)`, with the value after a step zero where the
    episode terminated, but not where its time was up.

    Reference: Schulman et al., High-dimensional continuous control using generalized advantage
      estimation (2016).
    """
    terminated, truncated = batch.outcome.terminated, batch.outcome.truncated
    # an ended episode has no value behind it, one that was cut off has
    after = jnp.where(terminated, 0, following)
    # delta_t = r_t + discount v_(t+1) - v_t
    deltas = scale * batch.outcome.reward + discount * after - batch.value
    goes_on = ~(terminated | truncated)

    def back(advantage: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, goes_on = row
        # A_t = delta_t + discount trace A_(t+1), within an episode
        advantage = delta + discount * trace * goes_on * advantage
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(deltas[0]), (deltas, goes_on), reverse=True)[1]


def gradient(
    config: Any, predict: Any, params: Any, batch: Batch
) -> tuple[jax.Array, Any, jax.Array]:
    """Observations of the batch in one row, gradient of the loss, entropy of the policy.

    The loss is that of the policy gradient, plus `value_loss` times the squared error of the
    values, minus `entropy` times the entropy.
    """
    following = predict(params, batch.outcome.observation)["value"].mean
    advantage = advantages(
        batch, following, discount=config.discount, trace=config.trace, scale=config.reward_scale
    )
    # [T, n, ...] to [T n, ...]
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    x, action, weight = flat(batch.observation), flat(batch.action), flat(advantage)
    # advantage plus value is an estimate of the return
    target = weight + flat(batch.value)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        heads = predict(params, x)
        log_p = jax.nn.log_softmax(heads["policy"].logits)
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))
        # policy gradient: advantages weigh log-probabilities
        policy = jnp.mean(weight * heads["policy"].nll(action))
        value = jnp.mean(jnp.square(heads["value"].mean - target))
        return policy + config.value_loss * value - config.entropy * entropy, entropy

    grads, entropy = jax.grad(loss, has_aux=True)(params)
    return x, grads, entropy
