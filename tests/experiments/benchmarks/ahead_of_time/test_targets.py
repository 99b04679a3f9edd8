import importlib.util
import json
import subprocess
import sys

import pytest

from experiments.benchmarks import _nets
from experiments.benchmarks.ahead_of_time import command, programs, targets
from experiments.errors import UserError

PACKAGES = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}
CODE = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from experiments.benchmarks import _nets
from experiments.benchmarks.ahead_of_time import targets
from experiments.benchmarks.ahead_of_time.costs import costs
from experiments.benchmarks.ahead_of_time.kernels import kernels

target = {"tpu": lambda: targets.tpu("v5e:1x1"), "cuda": lambda: targets.gpu("h100")}[sys.argv[1]]()
whole = NamedSharding(Mesh(targets.devices(target), ("data",)), PartitionSpec())

def matmul(a, b):
    return a @ b

def scan(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

def measure(function, *operands):
    placed = [jax.ShapeDtypeStruct(s, "bfloat16", sharding=whole) for s in operands]
    found = kernels(jax.jit(function).lower(*placed).compile().as_text())
    total = costs(found, target)
    products = sum(k.runs * sum(k.products.values()) for k in found)
    return products, total.memory_bytes, sum(k.nearby_bytes for k in found), total.seconds

print(json.dumps({
    "matmul": measure(matmul, (1024, 2048), (2048, 4096)),
    "scan": measure(scan, (1024, 1024), (12, 1024, 1024)),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("platform", PACKAGES)
def test_a_matmul_and_a_scan_compiled_for_the_target_cost_what_they_must(platform):
    if importlib.util.find_spec(PACKAGES[platform]) is None:
        pytest.skip(f"{PACKAGES[platform]} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", CODE, platform],
        env=targets.environment(platform),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    flops, memory, _, seconds = found["matmul"]
    operands = 2 * (1024 * 2048 + 2048 * 4096 + 1024 * 4096)
    assert flops == 2 * 1024 * 2048 * 4096
    assert operands <= memory + 2**20
    assert memory <= 1.1 * operands
    peak = {"tpu": 197e12, "cuda": 989e12}[platform]
    assert flops / peak <= seconds <= 1.5 * flops / peak
    flops, memory, nearby, _ = found["scan"]
    assert flops == 12 * 2 * 1024**3
    assert memory + nearby >= 12 * 2 * 1024**2  # every matrix is read at least once


@pytest.mark.parametrize("platform", PACKAGES)
def test_a_missing_compiler_is_named_with_how_to_install_it(platform, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{PACKAGES[platform]} is not installed.*pip install"):
        targets.check_installed(platform)


@pytest.mark.parametrize("topology", ["v9:1x1", "v5e", ""])
def test_an_unknown_topology_is_named(topology):
    with pytest.raises(UserError, match=f"unknown topology '{topology}'"):
        targets.tpu(topology)


def test_columns_that_make_no_sense_are_left_out():
    columns = programs.COLUMNS
    assert "between" not in programs.columns_for(columns, "mlp", 12, 1, "tpu")
    assert "trace_mesh" not in programs.columns_for(columns, "mlp", 128, 1, "tpu")
    assert "kernels" not in programs.columns_for(columns, "mlp", 128, 1, "cuda")
    assert programs.columns_for(["trace"], "mlp", 128, 4, "tpu") == ["plain", "trace"]
    assert "per_example" not in programs.columns_for(columns, "lm-17M", 16, 4, "tpu")


def test_options_become_one_job_for_each_net_and_batch_size():
    options = command.Options(nets=("mlp",), batches=(8, 16), lm=("17M",))
    jobs = list(command.jobs(targets.tpu("v5e:2x2"), options))
    assert [(job.target, job.net, job.batch_size) for job in jobs] == [
        ("v5e:2x2", "mlp", 8),
        ("v5e:2x2", "mlp", 16),
        ("v5e:2x2", "lm-17M", 8),
        ("v5e:2x2", "lm-17M", 16),
    ]


def test_all_nets_are_compiled_unless_language_models_are_asked_for():
    def nets(**options):
        return {job.net for job in command.jobs(targets.tpu("v5e:2x2"), command.Options(**options))}

    assert nets() == set(_nets.NAMES)
    assert nets(lm=("17M",)) == {"lm-17M"}
