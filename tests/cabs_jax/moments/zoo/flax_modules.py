"""Modules of flax."""

import contextlib

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.cabs_jax.moments.zoo.case import case, squares


@contextlib.contextmanager
def lenient():
    """Flax mixes ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def drawn(draw, shapes):
    return jax.tree.map(lambda x: draw(*x.shape, scale=0.5), shapes)


@case(held="*bias *scale", tolerance=1e-3)
def flax_nnx_residual_net(draw):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
            self.second = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            h = jnp.tanh(self.norm(self.first(x)))
            h = h + nnx.avg_pool(self.second(h), (3, 3), padding="SAME")
            return self.out(h)

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))

    def loss(p, x):
        with lenient():
            return squares(nnx.merge(graph, p)(x[None]))

    return loss, drawn(draw, nnx.to_pure_dict(state)), draw.batch(5, 4, 2)


@case(held="*bias *scale *position")
def flax_linen_transformer(draw):
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = nn.Embed(9, 8)
            h = table(tokens) + self.param("position", nn.initializers.normal(), (5, 8))
            mask = nn.make_causal_mask(tokens)
            attention = nn.MultiHeadDotProductAttention(2, use_bias=False)
            h = h + attention(nn.LayerNorm()(h), mask=mask)
            h = h + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(h))))
            return table.attend(h)

    net = Transformer()

    def loss(p, tokens):
        with lenient():
            logits = net.apply(p, tokens)
        return squares(jax.nn.log_softmax(logits)) + jnp.sum(jnp.square(logits))

    tokens = draw.tokens(5)
    with lenient():
        shapes = jax.eval_shape(net.init, jax.random.key(0), tokens[0])
    return loss, drawn(draw, shapes), tokens


@case(held="*")
def flax_linen_recurrent_net(draw):
    net = nn.RNN(nn.OptimizedLSTMCell(3))

    def loss(p, xs):
        with lenient():
            start = (jnp.zeros(3, xs.dtype),) * 2
            return squares(net.apply(p, xs, initial_carry=start))

    xs = draw.batch(4, 2)
    with lenient():
        shapes = jax.eval_shape(net.init, jax.random.key(0), xs[0])
    return loss, drawn(draw, shapes), xs
