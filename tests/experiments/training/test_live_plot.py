import io

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cabs_jax
from experiments.training.live_plot import live_plot


def infos(steps):
    moments_of = cabs_jax.gradient_moments(lambda w, x: 0.5 * (w - x) ** 2)
    tx = optax.chain(cabs_jax.monitor(), optax.sgd(0.1))
    params, state = jnp.float32(0), tx.init(jnp.float32(0))
    for step in range(steps):
        m = moments_of(params, jnp.arange(4.0) + step)
        updates, state = tx.update(m.mean, state, params, moments=m)
        params = optax.apply_updates(params, updates)
        yield cabs_jax.info(state)


@pytest.mark.slow
def test_the_one_figure_is_redrawn_every_few_steps():
    shown = []

    def show(figure):
        figure.savefig(png := io.BytesIO(), format="png")
        losses, noise = figure.axes
        shown.append((figure, losses.lines[0].get_xydata(), noise.lines[0].get_ydata(), png))

    record, measured = live_plot(show, every=3), list(infos(7))
    for info in measured:
        record(info, 4)
    figures, losses, sizes, pngs = zip(*shown, strict=True)
    assert [len(points) for points in losses] == [3, 6]
    assert figures[0] is figures[1]
    assert all(png.getvalue().startswith(b"\x89PNG") for png in pngs)
    np.testing.assert_allclose(losses[1][:, 0], 4 * np.arange(1, 7))
    np.testing.assert_allclose(losses[1][:, 1], [info.value for info in measured[:6]])
    assert sizes[1].tolist() == [4] * 6


@pytest.mark.slow
def test_what_is_infinite_is_left_out():
    drawn = []
    record = live_plot(lambda figure: drawn.append(figure.axes[1].lines[1].get_ydata()), every=1)
    (first,) = infos(1)
    record(first._replace(noise_scale=jnp.float32(jnp.inf)), 4)
    assert np.isnan(drawn[0]).tolist() == [True]
