"""The factored method: exact moments without per-example gradients in memory.

From a loss to its sums, in the order of the data: `program` (with `sorted_loss`, `distributed`,
`spread`, `views` and `primitives`) → `choice` (with `cost`) → `interpreter`, `site_vjps` (with
`forms`), `site_derivatives`, `picked` and `outer_products` (with `values`) → `collected`,
`pulled_back` (with `separable`), `shift` → `batch_sums`, which calls them all. From outside,
`estimators` looks in for `batch_sums`, and `explain` for what was chosen. The docstring of
`cabs_jax.moments` has a worked example and a glossary.
"""
