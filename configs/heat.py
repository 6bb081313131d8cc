"""Physics-informed networks: the heat equation in one dimension of space.

Initial and boundary values are one equation, so that there are two: more points inside than on the
boundary, each a mean of its own. Without the two-level methods, which need as many of both, and
the natural gradient, whose kernel is cheap to make where there are as many. One command makes the
table, as in `poisson`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    return ml_collections.ConfigDict(
        {
            "name": "heat",
            "title": "heat equation in 1 + 1 dimensions, 32-32-32 tanh network",
            "equation": "heat",
            "dimensions": 1,  # of space
            "float64": True,
            "seeds": 3,
            "first_seed": 100,
            "inside_points": 400,
            "boundary_points": 100,
            "test_points": 4000,
            "widths": (32, 32, 32),
            "report_every": 20,
            "steps": {
                "adam": 3000,
                "lbfgs": 1000,
                "kfac": 500,
                "kfac_equations": 500,
                "two_level": 500,
                "kfac_adaptive": 500,
                "kfac_equations_adaptive": 500,
                "two_level_adaptive": 500,
                "natural_adaptive": 60,
            },
            "grid": {  # learning rates; one entry for those that find their own, () leaves one out
                "adam": (3e-2, 1e-2, 3e-3, 1e-3),
                "lbfgs": (1.0,),
                "kfac": (1.0,),
                "kfac_equations": (1.0,),
                "two_level": (),
                "kfac_adaptive": (1.0,),
                "kfac_equations_adaptive": (1.0,),
                "two_level_adaptive": (),
                "natural_adaptive": (),
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
