import jax.numpy as jnp
import optax
import pytest

import cabs_jax


@pytest.mark.slow
def test_tensorboard_reads_what_info_holds(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    event_file = pytest.importorskip("tensorboardX.proto.event_pb2")
    tx = optax.chain(cabs_jax.monitor(), optax.sgd(0.1))
    moments_of = cabs_jax.gradient_moments(lambda w, x: 0.5 * (w - x) ** 2)
    m = moments_of(jnp.float32(0), jnp.arange(4.0))
    _, state = tx.update(m.mean, tx.init(jnp.float32(0)), jnp.float32(0), moments=m)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for name, scalar in cabs_jax.info(state)._asdict().items():
            writer.add_scalar(f"cabs/{name}", scalar.item(), 7)
    (file,) = tmp_path.iterdir()
    written, data = {}, file.read_bytes()
    while data:  # length in 8 bytes, its checksum in 4, the event, its checksum in 4
        length = int.from_bytes(data[:8], "little")
        event = event_file.Event.FromString(data[12 : 12 + length])
        written |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert set(written) == {f"cabs/{name}" for name in cabs_jax.Info._fields}
    assert written["cabs/value"] == (7, m.value)
    assert written["cabs/gradient_variance"] == (7, m.variance)
