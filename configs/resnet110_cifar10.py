"""ResNet110 on CIFAR-10: Figure 1 (right) and Figure 3 of the two-level paper.

Tselepidis, Kohler and Orvieto (2020), Appendix B.1. SGD and Adam take batches of 64, K-FAC of 128;
Adam's rate is a tenth of the others'. Needs the CIFAR-10 files, `--config.data_dir=DIR`, and a GPU
for all its 100 epochs; `--config.model.depth=20 --config.epochs=10` is a small version of it.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    data_dir = ml_collections.FieldReference("")
    return ml_collections.ConfigDict(
        {
            "name": "resnet110_cifar10",
            "title": "ResNet110 on CIFAR-10",
            "data_dir": data_dir,
            "data": {"name": "cifar10", "data_dir": data_dir, "train": 50_000, "test": 10_000},
            # Mean and standard deviation of the training pixels per channel.
            "inputs": {
                "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.2470, 0.2435, 0.2616),
                "crop": 4,
                "flip": True,
            },
            "model": {
                "name": "resnet",
                "depth": 110,
                "width": 16,
                "outputs": 10,
                "bn_momentum": 0.9,
            },
            "likelihood": "categorical",
            "optimizers": ("sgd", "adam", "kfac", "two_level"),
            "seeds": 1,
            "epochs": 100,
            "batch_size": 128,
            "learning_rate": 1e-2,
            "per_optimizer": {
                "sgd": {"batch_size": 64},
                "adam": {"batch_size": 64, "learning_rate": 1e-3},
            },
            "schedule": {"epochs": (40, 80), "factors": (1.0, 0.1, 0.01)},
            "momentum": 0.9,
            "weight_decay": 1e-3,
            "kfac": {
                "damping": 1e-3,
                "kl_clip": 1e-2,
                "curvature_every": 200,
                "inverse_every": 2000,
                "inverse": "cholesky",  # factored Tikhonov damping
                # norm layers are left alone, as in the papers
                "normalization": "pass",
                "uncovered": "pass",
            },
            "tune": False,
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3),
            "targets": (0.5, 0.1, 0.02),
            "evaluation_batch": 1_000,
            "python_loop": True,  # convolutions in a compiled loop are slow on a CPU
            "steps_per_call": 50,
            "checkpoint_every": 1,  # epochs
            "checkpoint_seconds": 300,
            "workers": 1,
            "out": "",  # results/<name> when empty
        }
    )
