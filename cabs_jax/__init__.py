"""Adaptive batch sizes coupled to the learning rate, for JAX and Optax."""
