"""Environment of all tests, doctests and benchmarks."""

import os

# Matrices here are small, so threads inside an operation only get in each other's way. Tests also
# keep several optimizers in flight at once, whose batched factorisations compete for the same
# threads (see docs/howto/loops.md).
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
