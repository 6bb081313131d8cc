"""Environment of all tests, doctests and benchmarks."""

import os

# Matrices here are small, so threads inside an operation only get in each other's way. Tests also
# keep several optimizers in flight at once, whose batched factorisations compete for the same
# threads (see docs/howto/loops.md).
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
# LAPACK has threads of its own, which on busy cores wait for each other far longer than they work;
# it reads their number once, when SciPy is imported, as it is with JAX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
