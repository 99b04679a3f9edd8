"""Per-example losses of every kind, gathered in `ZOO` by name.

Each takes half a second to compile. `EACH` has them all as parameters of a test, and marks `slow`
those that are not in `QUICK`, which holds at least one of every kind of layer and use.
"""

import importlib

import pytest

from tests.cabs_jax.moments.zoo.case import EXAMPLES as EXAMPLES
from tests.cabs_jax.moments.zoo.case import ZOO as ZOO

for _kind in (
    "convolutions",
    "elementwise",
    "flax_modules",
    "functions",
    "lookups",
    "loops",
    "products",
    "repeated_use",
    "unusual",
    "viewed",
    "wrapped",
):
    importlib.import_module(f"{__name__}.{_kind}")

QUICK = """
    convolution_2d transposed_convolution elementwise weight_norm regularised
    bias_of_the_user words_added_up experts_picked_for_each_token scan_over_layers scan_over_time
    cond_on_the_example dense long_sequence causal_attention embedding_of_repeated_tokens
    entries_of_a_table embedding_as_output_head overlapping_slices odd_leaves bfloat16_compute
    scaled_weights merged_queries_keys_and_values custom_vjp checkpoint vmap_over_positions
""".split()  # noqa: SIM905
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in ZOO]
assert set(QUICK) <= set(ZOO)
