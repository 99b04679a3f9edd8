"""Every test sees eight CPU devices and a JAX that refuses to guess.

Most of a test's time is XLA's, which here compiles twice as fast, to slower code. What users run is
tested with `XLA_FLAGS= python -m pytest`, as the nightly job does.
"""

import os

import hypothesis
import jax

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # which XLA dropped later
os.environ.setdefault("XLA_FLAGS", QUICK)

# A clock says more of the machine and its other work than of the test.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
