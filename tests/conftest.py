"""What every test runs under."""

import os
from importlib.metadata import version

import hypothesis

# Tests compile much and run little: machine code is not optimised. The numbers are the same.
unoptimised = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones refuse the name
    unoptimised.append("--xla_cpu_use_fusion_emitters=false")  # which take as long as all the rest
os.environ.setdefault("XLA_FLAGS", " ".join(unoptimised))

hypothesis.settings.register_profile(
    "project", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("project")
