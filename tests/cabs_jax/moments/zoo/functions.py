"""Weights that are functions of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve

from tests.cabs_jax.moments.zoo.case import case, convolution, normalised, squares


@case()
def weight_norm(draw):
    def loss(p, x):
        direction = p["direction"]
        norm = jnp.linalg.norm(direction, axis=0, keepdims=True)
        return squares(x @ (direction / norm * jnp.broadcast_to(p["gain"], direction.shape)))

    return loss, {"direction": draw(5, 7), "gain": draw(7)}, draw.batch(5)


@case()
def weight_standardised_convolution(draw):
    def loss(p, x):
        return squares(convolution(x, normalised(p["w"], (0, 1, 2)), 2))

    return loss, {"w": draw(3, 3, 2, 4)}, draw.batch(5, 4, 2)


@case()
def spectral_norm_by_power_iteration(draw):
    def loss(p, x):
        fixed = lax.stop_gradient(p["w"])
        u = lax.fori_loop(
            0, 3, lambda _, u: fixed.T @ (fixed @ u / jnp.linalg.norm(u)), jnp.ones_like(fixed[0])
        )
        u = u / jnp.linalg.norm(u)
        return squares(x @ (p["w"] / jnp.linalg.norm(p["w"] @ u)))

    return loss, {"w": draw(5, 4)}, draw.batch(5)


@case(unused="base")
def low_rank_update_of_a_frozen_layer(draw):
    def loss(p, x):
        return squares(x @ (lax.stop_gradient(p["base"]) + p["a"] @ p["b"]))

    return loss, {"base": draw(5, 4), "a": draw(5, 2), "b": draw(2, 4)}, draw.batch(5)


@case()
def product_of_weights_before_a_long_sequence(draw):
    def loss(p, x):
        return squares(x @ (p["a"] @ p["b"]))

    return loss, {"a": draw(5, 4), "b": draw(4, 4)}, draw.batch(40, 5)


@case()
def scaled_and_masked_weights(draw):
    def loss(p, x):
        return squares(x @ (p["w"] / 2)) + squares(x @ (p["v"] * np.tri(5, dtype=p["v"].dtype)))

    return loss, {"w": draw(5, 4), "v": draw(5, 5)}, draw.batch(5)


@case(held="a factor")
def linear_solve(draw):
    def loss(p, x):
        identity = jnp.eye(4, dtype=x.dtype)
        spread = p["factor"] @ p["factor"].T + identity
        h = jnp.linalg.solve(p["a"] / 4 + 2 * identity, x)
        return squares(h) + squares(cho_solve((jnp.linalg.cholesky(spread), True), x))

    return loss, {"a": draw(4, 4), "factor": draw(4, 4)}, draw.batch(4)


@case(held="real imaginary")
def fourier_layer(draw):
    def loss(p, x):
        spectrum = jnp.fft.rfft(x, axis=0)
        filtered = spectrum * lax.complex(p["real"], p["imaginary"])
        return squares(jnp.fft.irfft(filtered, 6, axis=0))

    return loss, {"real": draw(4, 3), "imaginary": draw(4, 3)}, draw.batch(6, 3)


@case()
def fourier_layer_with_a_product_for_each_frequency(draw):
    def loss(p, x):
        weights = lax.complex(p["w"][0], p["w"][1])
        spectrum = jnp.einsum("kc,kcd->kd", jnp.fft.rfft(x, axis=0), weights)
        mixed = lax.complex(p["a"], p["b"]) @ spectrum.T
        return squares(jnp.fft.irfft(spectrum, 6, axis=0)) + squares(mixed.real - mixed.imag)

    return loss, {"w": draw(2, 4, 3, 5), "a": draw(2, 5), "b": draw(2, 5)}, draw.batch(6, 3)


@case(held="kernel")
def fourier_convolution(draw):
    def loss(p, x):
        return squares(jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["kernel"]), 8))

    return loss, {"kernel": draw(8)}, draw.batch(8)


@case()
def regularised(draw):
    def loss(p, x):
        return squares(x @ p["w"]) + 0.1 * jnp.sum(jnp.square(p["w"]))

    return loss, {"w": draw(5, 7)}, draw.batch(5)


@case()
def gradient_penalty(draw):
    def loss(p, x):
        return squares(jax.grad(lambda x: squares(jnp.tanh(x @ p["w"]) @ p["v"]))(x))

    return loss, {"w": draw(4, 3), "v": draw(3, 2)}, draw.batch(4)


@case(held="b")
def scattered_and_sorted(draw):
    def loss(p, x):
        h = jnp.sort(x @ p["w"])
        return squares(lax.top_k(h, 3)[0] + jnp.zeros(5, x.dtype).at[:3].add(p["b"])[:3])

    return loss, {"w": draw(4, 5), "b": draw(3)}, draw.batch(4)


@case(held="scores")
def decisions_made_by_parameters(draw):
    def loss(p, x):
        best = jnp.argmax(p["scores"])
        pruned = jnp.where(jnp.abs(p["w"]) > 0.5, p["w"], 0)
        return squares(x @ pruned) + squares(x * p["scores"][best])

    return loss, {"w": draw(5, 4), "scores": draw(3)}, draw.batch(5)


@case()
def positive_weights_of_a_sequence(draw):
    def loss(p, x):
        return squares(x @ jax.nn.softplus(p))

    return loss, draw(5, 4), draw.batch(3, 5)


@case()
def weights_by_a_fourier_transform(draw):
    def loss(p, x):
        spectrum = jnp.fft.rfft(p, axis=0)
        return squares(x @ jnp.fft.irfft(spectrum * spectrum, 6, axis=0))

    return loss, draw(6, 4), draw.batch(6)


@case()
def orthogonal_weights_by_a_cayley_transform(draw):
    def loss(p, x):
        skew, identity = p - p.T, jnp.eye(4, dtype=x.dtype)
        return squares(x @ jnp.linalg.solve(identity + skew, identity - skew))

    return loss, draw(4, 4, scale=0.3), draw.batch(4)


@case()
def blocks_of_computed_weights(draw):
    def loss(p, x):
        first = jnp.concatenate([p["a"] ** 2, jnp.pad(jnp.cumsum(p["b"], 0), ((0, 0), (1, 0)))], 1)
        second = jnp.stack([p["a"][:, 0] * p["c"], p["c"][::-1]])
        return squares(x @ first) + squares(x[:2] @ second)

    return loss, {"a": draw(5, 2), "b": draw(5, 2), "c": draw(5)}, draw.batch(5)


@case()
def weights_computed_once_and_used_along_an_unrolled_loop(draw):
    def loss(p, x):
        w = p / jnp.linalg.norm(p, axis=0, keepdims=True)
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return squares(x)

    return loss, draw(5, 5), draw.batch(5)


@case()
def standardised_filters_in_groups(draw):
    def loss(p, x):
        return squares(convolution(x, normalised(p, (0, 1, 2)), feature_group_count=2))

    return loss, draw(3, 3, 1, 4), draw.batch(5, 4, 2)
