"""Gradient moments of a batch from an ordinary per-example loss function.

What happens to a loss, `loss_fn(params, example) -> scalar`:

1. `gradient_moments` checks the options (`split`), sets aside what is no parameter (`parameters`),
   finds out whether the batch is split over devices (`sharding`) and what they are (`target`), and
   goes through it block by block (`blocks`).
2. An estimator (`estimators`) turns a block into sums of losses, gradients and squared gradients.
   The plain one holds every gradient (`per_example`); what follows is the factored one
   (`factored`), which gives the same numbers without holding them.
3. The loss is traced to a jaxpr for one example, products with merged weights multiplied out
   (`distributed`), repeated and padded ones made products with the weights themselves (`spread`),
   and its equations are sorted (`program`): where do parameters meet the example? These are the
   sites. What do they look like there (`views`)?
4. For each parameter a way to measure it is chosen (`choice`): by the rules of the primitives at
   its sites (`primitives`), by what these cost (`cost`), or as per-example gradients where no rule
   goes.
5. The jaxpr is evaluated for the whole batch (`interpreter`). At each site a derivative rule is put
   in (`site_vjps`, `site_derivatives`) that also measures the gradients of the examples
   (`outer_products`), and hands out what it finds through a slot (`values`). What an example looked
   up for itself is measured where it is multiplied (`picked`), rows that are looked up to be added
   up, such as the words of a text, as multiples of one vector.
6. One backward pass gives the gradient and fills the slots (`batch_sums`). Norms of parameters that
   are used several times are put together at the end (`collected`), those of parameters from which
   weights are computed are pulled back (`pulled_back`, `separable`), and penalties added (`shift`).
7. Sums become moments: tr Σ̂ = (1/m) Σ_i ‖g_i‖² − ‖ḡ‖².

`explain` prints what was chosen and what it costs (`price`, `flops`). Two more things are done on
the way: convolutions of two batched operands are computed from patches (`rewriting`,
`convolution`), since XLA's partitioner gets them wrong; and all of JAX's less stable surface is
kept in one file (`jaxprs`).

Worked example: one dense layer. In the jaxpr of this loss the parameter `w` meets the example in
one equation, the `dot_general` of y = x·w. That is its site, and here is its number 0:

    >>> import jax, jax.numpy as jnp
    >>> from cabs_jax.moments.factored.program import trace_program
    >>> def loss_fn(w, x):
    ...     return 0.5 * jnp.sum((x @ w) ** 2), ()
    >>> w = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> x = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    >>> (site,) = trace_program(loss_fn, w, x).sites
    >>> site.equation.primitive.name, site.rule.sizes()  # groups, positions, p, q
    ('dot_general', (1, 1, 3, 2))

The backward pass comes to the site with the cotangents c = ∂ℓ/∂y of all examples, here c = y. The
gradient of one example is the outer product of two factors, made of x and of c:

    >>> cotangents = x @ w
    >>> left, right = site.rule.factors(x, cotangents)
    >>> left.shape, right.shape  # (examples, groups, positions, p) and q
    ((2, 1, 1, 3), (2, 1, 1, 2))

An outer product has the norm ‖left ⊗ right‖² = ‖left‖²·‖right‖²: two short sums, and no gradient.
The derivative rule of the site hands them out as the derivative with respect to its slot for norms,
and returns the usual gradient of the batch besides.

    >>> from cabs_jax.moments.factored.outer_products import gram_norms
    >>> gram_norms([(left, right)]).tolist()
    [25.0, 10.0]
    >>> gradients = jax.vmap(jax.grad(lambda w, x: loss_fn(w, x)[0]), (None, 0))(w, x)
    >>> jnp.sum(gradients**2, axis=(1, 2)).tolist()
    [25.0, 10.0]
    >>> moments = gradient_moments(loss_fn, has_aux=True)(w, x)[0]
    >>> float(moments.variance), float((25 + 10) / 2 - jnp.sum(moments.mean**2))
    (3.75, 3.75)

Glossary:

* site: an equation that takes both a parameter and something of the example's, or any other place
  where a parameter becomes a value of the example's own.
* slot: an argument added to the loss that holds zeros and does not change it; what we want to know
  of the gradients comes back as the derivative with respect to it.
* view: what an equation sees of a parameter after nothing but reshapes, transposes, casts and
  slices; the squared norm of the gradient is the same for both.
* mosaic: entries of one or several views, each at most once and times a constant (its scale), as
  after masks, `concatenate` or `pad`; the squared norm is a sum of squares weighted by the scale.
* factor: `left` or `right`; the gradient of an example is Σ_t left_t ⊗ right_t over positions t.
* form: the way in which a norm is taken from factors. The Gram form uses their inner products, the
  direct form adds up the outer products; with one position it is a product of two norms. A kernel
  is the direct form with nothing but the factors and the sum in memory.
* shift: a term of the loss of parameters alone (a penalty). It moves the mean gradient, not the
  variance.
* share: 1/m, the part of one example in a mean over m of them.
* lane: an equal stretch of the batch, which may belong to one device.
* target: the machine that is compiled for; it decides between ways of equal result.
"""

from cabs_jax.moments.explain import Explanation, explain
from cabs_jax.moments.gradient_moments import gradient_moments
from cabs_jax.moments.gradient_norms import per_example_gradient_norms
from cabs_jax.moments.per_example import per_example_value_and_grad

__all__ = [
    "Explanation",
    "explain",
    "gradient_moments",
    "per_example_gradient_norms",
    "per_example_value_and_grad",
]
