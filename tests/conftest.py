"""What every test runs under."""

import os

import hypothesis

# Tests compile much and run little: machine code is not optimised. The numbers are the same.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

hypothesis.settings.register_profile(
    "project", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("project")
