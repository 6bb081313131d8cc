"""What is known of a value of a program: whether it is a parameter, made of some, or of data."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from kfac_optax.capture.jaxpr.views import View


class Known(NamedTuple):
    """What is known of a value."""

    view: View | None = None
    data: bool = False  # it depends on what is no parameter
    made: bool = False  # it depends on a parameter
    leaves: int = 1  # at most so many there are where it comes apart

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, seen through casts and transposes: a layer's kernel already."""
        return self.view is not None and self.view.complete

    @property
    def is_kernel(self) -> bool:
        """Whether it is made of parameters, and of parameters only, but is none."""
        return self.made and not self.data and not self.is_parameter


def is_real(v: Any) -> bool:
    """Whether a value is of floating point."""
    return jnp.issubdtype(v.aval.dtype, jnp.floating)
