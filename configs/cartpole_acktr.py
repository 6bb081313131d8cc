"""Actor-critic on cart-pole: ACKTR (a trust region over K-FAC) against A2C with Adam and RMSProp.

Wu, Mansimov, Liao, Grosse and Ba (2017) is the method; damping, averages and the cold start are
those of its authors' code.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    return ml_collections.ConfigDict(
        {
            "name": "cartpole_acktr",
            "title": "cart-pole, 16 environments, 64-64 tanh MLPs",
            "seeds": 5,
            "first_seed": 100,  # the settings below were chosen on other seeds
            "steps": 128_000,  # of all environments together
            "environments": 16,
            "rollout": 20,  # steps of every environment between updates
            "points": 16,  # of a curve; each is the mean over the episodes that ended in its part of the run
            "shown": (0.125, 0.25, 0.5, 1.0),  # parts of the run whose returns the table shows
            "widths": (64, 64),
            "shared": False,  # one trunk for policy and value
            "discount": 0.99,
            "trace": 0.95,  # lambda of the advantage estimates; 1 gives n-step returns
            "reward_scale": 0.1,  # values of at most 10
            "value_loss": 0.5,
            "entropy": 0.01,
            "max_grad_norm": 0.5,  # of Adam and RMSProp
            "grid": {  # learning rates at the start; () leaves an optimizer out
                "acktr": (1.0, 0.3, 0.1),
                "adam": (1e-2, 3e-3, 1e-3),
                "rmsprop": (1e-2, 3e-3, 1e-3),
            },
            "acktr": {
                "radius": 4e-3,
                "metric": "damped",
                "damping": 1e-2,
                "decay": 0.99,
                "curvature_every": 1,
                "inverse_every": 10,
                "cold_steps": 10,
                "cold_scale": 0.1,
            },
            "out": "",  # results/<name> when empty
        }
    )
