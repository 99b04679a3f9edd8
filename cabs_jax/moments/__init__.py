"""Gradient moments of a batch from an ordinary per-example loss function."""

from cabs_jax.moments.explain import Explanation, explain
from cabs_jax.moments.gradient_moments import gradient_moments
from cabs_jax.moments.per_example import per_example_value_and_grad

__all__ = ["Explanation", "explain", "gradient_moments", "per_example_value_and_grad"]
