"""Why a parameter has no block, or a layer no part in something: words of the coverage table."""

NOT_USED = "not used"  # reason of a parameter that the model does not touch
COMPLEX = (  # reason of a parameter that no block and no diagonal is for
    "complex parameter: not measured, its gradient is handed on (of jax.grad the conjugate of the "
    "direction of ascent); make its real and imaginary part real parameters to have them measured"
)
NOT_REAL = (  # reason of a parameter of integers or flags
    "not of floating point: it has no gradient; what is a constant belongs beside the parameters"
)
COMPLEX_LAYER = (
    "its layer computes with complex numbers: not measured"  # reason of a real parameter
)
NO_EXAMPLES = "no row per example: not in the coupling"
