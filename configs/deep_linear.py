"""Deep linear MLP with planted targets: Figure 1 (left) and Figure 2 of the two-level paper.

Tselepidis, Kohler and Orvieto (2020), Appendix B.1. The paper runs 100 epochs and 5 seeds:
`--config.epochs=100 --config.seeds=5`. `--config=configs/deep_linear.py:paper` leaves the norm
layers alone and inverts every 100 steps, as the paper does; `:late` does the latter only, `:half`
inverts once more after 50.
"""

import ml_collections

VARIANTS = ("default", "paper", "late", "half")


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"--config=...:{variant}: got {variant!r}, expected one of {VARIANTS}")
    config = ml_collections.ConfigDict(
        {
            "name": "deep_linear",
            "title": "64-layer linear MLP, planted targets",
            "data": {
                "name": "planted_linear",
                "train": 25_000,
                "test": 2_500,
                "features": 10,
                "target_dim": 1,
            },
            "model": {"name": "linear_mlp", "depth": 64, "width": 10, "bn_momentum": 0.9},
            "likelihood": "bernoulli",
            "optimizers": ("sgd", "adam", "kfac", "two_level", "two_level_exact"),
            "seeds": 10,
            "epochs": 10,
            "batch_size": 512,
            "learning_rate": 1e-3,
            "momentum": 0.9,
            "weight_decay": 1e-3,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-3,
                # periods are the library's: statistics every 10 steps, inverses too during the first
                # 100, and every 100 from then on
                "inverse": "eigh",
            },
            "adaptive": {},  # options of kfac_adaptive and two_level_adaptive, which tune themselves
            # Rows within an epoch, and an end by the clock: for comparisons at equal seconds.
            "report_every": 0,  # steps between rows of metrics.csv; 0: one row an epoch
            "evaluate_every": 0,  # rows between evaluations, whose values the rows between repeat; 0: once an epoch
            "budget_seconds": 0.0,  # a run ends with the row in which its training has taken so long; 0: never
            # Batch statistics of an evaluation: taken anew from training batches, or the running
            # averages.
            "evaluate_with": "fresh",
            # Second table: every optimizer at its best rate of this grid.
            "tune": True,
            "tune_seeds": 2,  # seeds that another rate is tried with, then the best gets the others; 0: all
            "grid": (1e-2, 3e-3, 1e-3),
            "targets": (0.2, 0.1, 0.05),
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
    if variant == "late":
        config.name = "deep_linear_late"
        config.title = "64-layer linear MLP, planted targets, inverses every 100 steps"
        config.kfac = config.kfac.to_dict() | {"inverse_every": 100}
    if variant == "half":
        config.name = "deep_linear_half"
        config.title = "64-layer linear MLP, planted targets, inverses at 0, 50, 100, 200, ..."
        warmup = {"regular": 100, "warmup_steps": 100, "first": 50}
        config.kfac = config.kfac.to_dict() | {"inverse_every": warmup}
    if variant == "paper":
        config.name, config.title = (
            "deep_linear_paper",
            "64-layer linear MLP, planted targets, norm layers left alone",
        )
        literal = {"normalization": "pass", "uncovered": "pass", "inverse_every": 100}
        config.kfac = config.kfac.to_dict() | literal
    return config
