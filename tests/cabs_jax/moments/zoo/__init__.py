"""Per-example losses of every kind, gathered in `ZOO` by name."""

import importlib

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
