"""Every test sees eight CPU devices and a JAX that refuses to guess.

Most of a test's time is XLA's, which here compiles twice as fast, to slower code. What users run is
tested with `XLA_FLAGS= python -m pytest`, as the nightly job does.
"""

import os
from collections import defaultdict

import hypothesis
import jax
import pytest

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

MANY = 4


def pytest_xdist_auto_num_workers():
    """One more than there are cores, at most four: what starts processes mostly waits for them."""
    return min(os.cpu_count() + 1, 4)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test's slow cases, where they are many, every third runs by default, by their names.

    The others are `exhaustive`, unless the test is marked `every_case`. What is exhaustive is slow.
    """
    cases = defaultdict(list)
    for item in items:
        if "slow" in item.keywords and hasattr(item, "callspec"):
            cases[item.path, item.originalname].append(item)
    for same in cases.values():
        if len(same) > MANY and "every_case" not in same[0].keywords:
            for number, item in enumerate(sorted(same, key=lambda item: item.name)):
                if number % 3:
                    item.add_marker(pytest.mark.exhaustive)
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker(pytest.mark.slow)
