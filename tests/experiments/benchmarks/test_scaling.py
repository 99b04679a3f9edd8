import json
import re

import pytest

from experiments.benchmarks import _collectives, scaling

HLO = """
  %a = (f32[3,4]{1,0}, f32[], /*index=2*/s32[]) all-reduce(%x, %y, %z), to_apply=%add
  %b = bf16[8]{0} all-gather-start(%x), dimensions={0}
  %c = pred[5]{0} collective-permute(%x), source_target_pairs={{0,1}}
  %d = f32[2]{0} reduce-scatter(f32[16]{0} %x), dimensions={0}
  %h = f32[4]{0} parameter(0)
  %g = f32[1]{0} reduce-scatter(%h), dimensions={0}
  %e = f32[100]{0} add(%all-reduce.1, %all-gather.2)
"""


def test_collectives_are_read_off_hlo():
    assert _collectives.parse(HLO) == [
        ("all-reduce", (48, 4, 4)),
        ("all-gather", (16,)),
        ("collective-permute", (5,)),
        ("reduce-scatter", (64,)),
        ("reduce-scatter", (16,)),
    ]


@pytest.mark.exhaustive
def test_a_step_sends_as_many_bytes_as_there_are_parameters_whatever_the_devices(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    scaling.main(models=("mlp",), devices=(1, 2, 4), batch=16, out=out)
    assert re.search(r"\| mlp +\| +factored \|", capsys.readouterr().out)
    results = json.loads(out.read_text())["results"]
    assert [result["devices"] for result in results] == [1, 2, 4] * 2
    for result in results:
        extra = result["collective_bytes"] - result["parameter_bytes"] * (result["devices"] > 1)
        assert 0 <= extra <= 32
