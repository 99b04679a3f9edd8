import importlib
import warnings

import jaxlib
import pytest

import cabs_jax


def test_import_warns_of_the_jaxlib_that_miscompiles(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    with pytest.warns(UserWarning, match="39103.*wrong|wrong.*39103") as caught:
        importlib.reload(cabs_jax)
    assert len(caught) == 1
    assert "0.10.2" in str(caught[0].message)
    assert "pip install" in str(caught[0].message)


@pytest.mark.parametrize("version", ["0.9.0", "0.10.1", "0.10.3", "0.10.20"])
def test_import_is_silent_with_any_other_jaxlib(monkeypatch, version):
    monkeypatch.setattr(jaxlib, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(cabs_jax)
