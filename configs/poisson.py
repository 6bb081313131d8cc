"""Physics-informed networks: the Poisson equation in two dimensions, or `poisson.py:5d` in five.

Loss, forward Laplacian and factors per equation are those of Dangel, Mueller and Zeinhofer (2024);
network, points and settings are ours.

One command makes a table: every optimizer, with the rates below. It takes, by the fastest stretch
of 20 steps of each, `seeds * (rates * steps * time of a step)` added up over optimizers, 40 steps
more of each run that are thrown away, and the compilation of nine programs: 230 seconds of steps in
two dimensions, of which the natural gradient has 100, and about as many in five.
"""

import ml_collections


def get_config(variant: str = "2d") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    if variant not in ("2d", "5d"):
        raise ValueError(f"poisson: got {variant!r}, expected '2d' or '5d'")
    two = variant == "2d"
    kfac_steps = 500 if two else 300
    return ml_collections.ConfigDict(
        {
            "name": f"poisson_{variant}",
            "title": f"Poisson equation in {2 if two else 5} dimensions, 32-32-32 tanh network",
            "equation": "poisson_sines" if two else "poisson_cosines",
            "dimensions": 2 if two else 5,
            "float64": True,
            "seeds": 3,
            "first_seed": 100,  # the settings below were chosen on other seeds
            "inside_points": 300,
            "boundary_points": 300,  # as many as inside: the two-level methods need that
            "test_points": 4000,
            "widths": (32, 32, 32),
            "report_every": 20,
            "steps": {
                "adam": 3000,
                "lbfgs": 1000,
                "kfac": kfac_steps,
                "kfac_equations": kfac_steps,
                "two_level": kfac_steps,
                "kfac_adaptive": kfac_steps,
                "kfac_equations_adaptive": kfac_steps,
                "two_level_adaptive": kfac_steps,
                "natural_adaptive": 60,
            },
            "grid": {  # learning rates; one entry for those that find their own, () leaves one out
                "adam": (1e-1, 3e-2, 1e-2, 3e-3),
                "lbfgs": (1.0,),
                "kfac": (1.0,),
                "kfac_equations": (1.0,),
                "two_level": (1.0,),
                "kfac_adaptive": (1.0,),
                "kfac_equations_adaptive": (1.0,),
                "two_level_adaptive": (1.0,),
                "natural_adaptive": (1.0,),
            },
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 0.1,
                "bound": "exact",  # the length of a step is that of an exact quadratic model
                "momentum": 0.9,
                "curvature_every": 1,
                "inverse_every": 10,
            },
            "adaptive": {"damping_min": 1e-10, "initial_damping": 1e-2},
            "lbfgs_memory": 20,
            "out": "",  # results/<name> when empty
        }
    )
