"""Environment of all tests, doctests and benchmarks."""

import os

# Tests keep several optimizers in flight at once, and batched factorisations of independent programs can block each other
# in XLA's thread pool (see the README); the flag is read when the backend starts.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
