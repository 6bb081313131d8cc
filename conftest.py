"""Environment of all tests, doctests and benchmarks."""

import os

# XLA's CPU thread pool can lose a wake-up on machines with few cores, after which a step never returns (seen with
# batched factorisations in flight); the flag is read when the backend starts. See "On CPU" in the README.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
