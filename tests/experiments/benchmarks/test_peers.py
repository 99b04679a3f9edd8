import importlib.util
import json
from functools import partial

import pytest

from experiments import cli
from experiments.benchmarks import _nets

PEERS = ("torch", "backpack", "opacus")
INSTALLED = all(importlib.util.find_spec(name) for name in PEERS)


@pytest.mark.skipif(INSTALLED, reason="needs them to be missing")
def test_missing_peers_are_named(capsys):
    assert cli.main(["bench", "peers"]) == 2
    assert "pip install 'cabs_jax[peers]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra `peers`")
@pytest.mark.filterwarnings("ignore")
def test_all_contenders_find_the_same_variance(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(_nets._NETS, "mlp", partial(_nets.mlp, (12, 8, 8, 10)))
    for name, shape in (("mnist_2c2d", (8, 8, 1)), ("cifar10_2c3d", (32, 32, 3))):
        monkeypatch.setitem(_nets._NETS, name, partial(_nets.of_the_study, name, shape))
    out = tmp_path / "out.json"
    assert cli.main(["bench", "peers", "--quick", "--batches", "4", "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 3 * 9
    plain = [cell["contender"] for cell in cells if cell["variance_error"] is None]
    assert sorted(plain) == 3 * ["JAX"] + 3 * ["PyTorch"]
    assert all((cell["variance_error"] or 0) < 1e-3 for cell in cells)
    assert capsys.readouterr().out.count("| mlp") == 1
