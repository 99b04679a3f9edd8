"""What several tests of the experiments share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as cache

SETTINGS = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def compilation_cache(cache_folder):
    """What a test compiles, later ones and the processes that they start find on disk."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    settings = {**SETTINGS, "jax_compilation_cache_dir": cache_folder}
    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()
