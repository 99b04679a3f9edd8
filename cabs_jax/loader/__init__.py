"""An endless stream of shuffled examples, sliced into batches of any size."""

from cabs_jax.loader.device_order import Position as Position
from cabs_jax.loader.loader import BatchLoader as BatchLoader
from cabs_jax.loader.padding import buckets as buckets
