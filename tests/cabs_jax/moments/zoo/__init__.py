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
    convolution_2d grouped_and_dilated_convolution transposed_convolution
    elementwise layer_and_rms_norm weight_norm regularised
    bias_of_the_user vmapped_embedding experts_picked_for_each_token
    scan_over_layers scan_over_time fori_loop cond_on_the_example while_loop_behind_stop_gradient
    dense weights_on_the_left short_sequence long_sequence causal_attention
    embedding_of_repeated_tokens embedding_of_the_label entries_of_a_table
    embedding_as_output_head siamese overlapping_slices two_parameters_in_one_equation
    odd_leaves bfloat16_compute a_single_array
    scaled_weights stacked_weights merged_queries_keys_and_values
    nested_jit custom_jvp custom_vjp checkpoint vmap_over_positions
""".split()  # noqa: SIM905
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in ZOO]
assert set(QUICK) <= set(ZOO)
