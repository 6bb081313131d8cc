"""The ground state of helium by variational Monte Carlo: K-FAC against Adam on a small FermiNet.

The exact energy is that of Nakashima & Nakatsuji (2007), Solving the Schroedinger equation for
helium atom and its isoelectronic ions with the free iterative complement interaction method. Clip,
decay of the rate and bound on the step are those of Pfau, Spencer, Matthews & Foulkes (2020).

The whole takes `seeds * sum over rates of (steps * time of a step + (evaluations + burn_in) * time of
an evaluation)` and a minute or two of compilation: 4 min 24 s where two cores are free, a step of
K-FAC .012 s and one of Adam .010. A step of SPRING takes half a second.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    return ml_collections.ConfigDict(
        {
            "name": "helium",
            "title": "helium, 512 walkers",
            "atom": {"charge": 2, "up": 1, "down": 1},
            "exact": -2.903724,  # hartree
            "network": {"one": 32, "two": 8, "depth": 2, "determinants": 4},
            "seeds": 3,
            "first_seed": 100,  # the settings below were chosen on other seeds
            "walkers": 512,
            "steps": 1000,
            "moves": 10,  # Metropolis steps between two steps of training
            "burn_in": 100,  # rounds of moves before training, and before the evaluation
            "move_width": 0.5,  # in bohr, at first
            "evaluations": 1000,  # rounds of the final evaluation
            "clip": 5.0,  # local energies, in mean absolute deviations from the median
            "points": 20,  # of a curve; each is the mean over its part of the run
            "delay": 1000.0,  # steps until the learning rate is halved
            "grid": {  # learning rates at the start; () leaves an optimizer out
                "kfac": (0.1, 0.03),
                "spring": (),  # for instance (0.2,); its settings have not been tuned
                "adam": (3e-2, 1e-2),
            },
            "kfac": {
                "damping": 1e-3,
                "kl_clip": 1e-3,
                "bound": "damped",  # KL-clip alone, as in the papers
                "decay": 0.95,
                "curvature_every": 1,
                "inverse_every": 5,
            },
            "spring": {"damping": 4e-3, "momentum": 0.95, "norm_constraint": 0.1},
            "out": "",  # results/<name> when empty
        }
    )
