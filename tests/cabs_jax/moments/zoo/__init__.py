"""Per-example losses of every kind, gathered in `ZOO` by name."""

from tests.cabs_jax.moments.zoo import (
    convolutions as convolutions,
)
from tests.cabs_jax.moments.zoo import (
    elementwise as elementwise,
)
from tests.cabs_jax.moments.zoo import (
    flax_modules as flax_modules,
)
from tests.cabs_jax.moments.zoo import (
    functions as functions,
)
from tests.cabs_jax.moments.zoo import (
    loops as loops,
)
from tests.cabs_jax.moments.zoo import (
    products as products,
)
from tests.cabs_jax.moments.zoo import (
    repeated_use as repeated_use,
)
from tests.cabs_jax.moments.zoo import (
    unusual as unusual,
)
from tests.cabs_jax.moments.zoo import (
    wrapped as wrapped,
)
from tests.cabs_jax.moments.zoo.case import EXAMPLES as EXAMPLES
from tests.cabs_jax.moments.zoo.case import ZOO as ZOO
