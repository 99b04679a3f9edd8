"""What several tests of the experiments share."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as cache

from experiments.training.shared_programs import cache_settings

# As in `experiments.__main__`, for processes that are forked from one that imports JAX first.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compilation_cache(cache_folder):
    """What a test compiles, later ones and the processes that they start find on disk."""
    settings = cache_settings(cache_folder)
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()
