import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.errors import Interrupted
from experiments.soak.kills import untimed
from experiments.training import checkpoint, run_folder
from experiments.training.checkpoint import FOLDER, Checkpoints, Schedule
from experiments.training.config import RunConfig
from experiments.training.train import set_up, train

pytestmark = pytest.mark.usefixtures("compilation_cache")

EVERY_STEP = Schedule(every_steps=1)


class CrashError(Exception):
    pass


def crash_at(step):
    def observe(metrics):
        if metrics["step"] == step:
            raise CrashError

    return observe


def experiment(**options):
    options = {"steps": 12, "width": 0.1, "evaluations": 4, "learning_rate": 1.0, **options}
    return set_up(RunConfig(**options))


def resume(job, out, schedule=EVERY_STEP):
    with Checkpoints(out / FOLDER, schedule) as checkpoints:
        return train(job, out, checkpoints=checkpoints, resume=True)


@pytest.mark.slow  # trains whole runs, more than once
@pytest.mark.parametrize(
    ("options", "crashes"),
    [
        pytest.param({}, (4, 6, 8), marks=pytest.mark.exhaustive),
        ({"lag": 2, "batch_size": 64, "evaluations": 3}, (4,)),
        pytest.param({"learning_rate": 3e38, "lag": 1}, (1, 1, 1), marks=pytest.mark.exhaustive),
    ],
    ids=["plain", "late sizes", "diverging"],
)
def test_a_run_that_was_cut_off_writes_the_same_lines_as_one_that_was_not(
    tmp_path, options, crashes
):
    job, whole, cut = experiment(**options), tmp_path / "whole", tmp_path / "cut"
    expected = train(job, whole)
    schedules = (EVERY_STEP, Schedule(every_steps=2), Schedule())
    for number, (crash, schedule) in enumerate(zip(crashes, schedules, strict=False)):
        with pytest.raises(CrashError), Checkpoints(cut / FOLDER, schedule) as checkpoints:
            train(job, cut, crash_at(crash), checkpoints=checkpoints, resume=number > 0)
        with (cut / run_folder.METRICS).open("a") as file:
            file.write('{"step": ')
    summary = resume(job, cut)
    assert untimed(cut) == untimed(whole)
    assert run_folder.read(cut).summary.keys() == summary.keys()
    assert summary["diverged"] == expected["diverged"] == (job.config.learning_rate > 1)
    assert np.all(np.diff(run_folder.read(cut).metrics["seconds"]) > 0)


@pytest.mark.slow  # trains whole runs, more than once
def test_without_a_checkpoint_the_run_starts_at_the_first_step(tmp_path):
    job = experiment()
    train(job, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(job, tmp_path / "cut", crash_at(5))
    resume(job, tmp_path / "cut")
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


@pytest.mark.slow  # trains a whole run
def test_parameters_can_be_read_from_the_last_checkpoint_of_a_finished_run(tmp_path):
    resume(experiment(), tmp_path)
    template = {"w": np.zeros(1)}
    with Checkpoints(tmp_path / FOLDER) as checkpoints:
        assert max(checkpoints.steps()) == 12
        with pytest.raises(OSError, match=r"none of the checkpoints in .* can be read"):
            checkpoints.restore(template)


@pytest.mark.slow  # trains whole runs, more than once
def test_only_the_newest_checkpoints_are_kept(tmp_path):
    resume(experiment(), tmp_path, Schedule(every_steps=1, keep=2))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["11", "12"]


@pytest.mark.slow  # trains whole runs, more than once
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGTERM]
)
def test_a_signal_writes_a_checkpoint_and_ends_the_run(tmp_path, number):
    job, handlers = experiment(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train(job, tmp_path / "whole")

    def observe(metrics):
        if metrics["step"] == 3:
            os.kill(os.getpid(), number)

    out = tmp_path / "out"
    with (
        pytest.raises(Interrupted, match=f"{number.name} after step 3") as interrupted,
        Checkpoints(out / FOLDER) as checkpoints,
    ):
        train(job, out, observe, checkpoints=checkpoints)
    assert interrupted.value.signal == number
    assert len(run_folder.read(out).metrics["step"]) == 3
    assert [path.name for path in (out / FOLDER).iterdir()] == ["3"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resume(job, out)
    assert untimed(out) == untimed(tmp_path / "whole")


def test_a_second_signal_acts_at_once(tmp_path):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    try:
        with Checkpoints(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.slow  # trains whole runs, more than once
def test_another_configuration_or_data_set_is_refused_and_shown(tmp_path):
    job = experiment()
    with Checkpoints(tmp_path / FOLDER) as checkpoints:
        train(job, tmp_path, checkpoints=checkpoints)
    before = untimed(tmp_path)
    assert len(before[run_folder.METRICS]) == 12
    with pytest.raises(
        run_folder.ResumeError, match=r"learning_rate 1\.0, now 0\.5; seed 0, now 7\.$"
    ):
        resume(experiment(learning_rate=0.5, seed=7), tmp_path)
    (tmp_path / run_folder.CONFIG).unlink()
    with pytest.raises(FileExistsError, match=r"holds no config\.json"):
        resume(job, tmp_path)
    run_folder.write_json(tmp_path / run_folder.CONFIG, {**job.config.__dict__})

    label = job.dataset.train["label"].copy()
    label[0] = (label[0] + 1) % 10
    other = job.dataset._replace(train={**job.dataset.train, "label": label})
    with pytest.raises(
        run_folder.ResumeError, match=r"fingerprint of the data set '\w+', now '\w+'"
    ):
        resume(job._replace(dataset=other), tmp_path)
    assert untimed(tmp_path) == before


@pytest.mark.slow
def test_lines_that_a_checkpoint_counts_on_must_be_there(tmp_path):
    job = experiment()
    with pytest.raises(CrashError), Checkpoints(tmp_path / FOLDER, EVERY_STEP) as checkpoints:
        train(job, tmp_path, crash_at(4), checkpoints=checkpoints)
    (tmp_path / run_folder.METRICS).write_text("")
    with pytest.raises(run_folder.ResumeError, match=r"metrics\.jsonl was cut to 0 bytes"):
        resume(job, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_that_another_version_wrote_is_refused_and_what_it_lacks_named(
    tmp_path, monkeypatch, capsys
):
    save = Checkpoints.save

    def save_less(self, step, arrays, progress):
        del progress["first_loss"], progress["evaluated"]
        save(self, step, arrays, progress)

    job, out = experiment(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_less)
        with pytest.raises(CrashError), Checkpoints(out / FOLDER, EVERY_STEP) as checkpoints:
            train(job, out, crash_at(4), checkpoints=checkpoints)
    written = (out / run_folder.METRICS).read_bytes()
    assert cli.main(["run", "--resume", "--out", str(out)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "the checkpoint to resume lacks evaluated, first_loss, for another version" in told
    assert (out / run_folder.METRICS).read_bytes() == written


def some_arrays(seed):
    random = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(random.normal(size=(8, 3)), jnp.float32),
        "b": [jnp.asarray(random.normal(size=4), jnp.bfloat16), jnp.int32(seed)],
    }


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, some_arrays(step), {"step": step, "loss": float("nan")})
    return folder


def restore_damaged(two_checkpoints, tmp_path, damage):
    """Restores from copies, a file of whose newest checkpoint is damaged, each in its turn."""
    files = sorted(path for path in (two_checkpoints / "2").rglob("*") if path.is_file())
    assert len(files) > 5
    for number, path in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_checkpoints, folder)
        damage(folder / path.relative_to(two_checkpoints))
        with Checkpoints(folder) as checkpoints:
            yield path.relative_to(two_checkpoints), folder, checkpoints.restore(some_arrays(0))


def flip(path):
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), max(1, len(content) // 8)):
        content[at] ^= 0x55
    path.write_bytes(content)


# What Orbax had begun to read when it failed ends later, with an exception that nobody waits for.
ignore_tasks_of_failed_reads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.slow
@ignore_tasks_of_failed_reads
@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: os.truncate(path, path.stat().st_size // 2), os.remove],
    ids=["flipped", "truncated", "removed"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    two_checkpoints, tmp_path, capfd, damage
):
    fallen_back = 0
    for name, folder, (arrays, progress) in restore_damaged(two_checkpoints, tmp_path, damage):
        told = capfd.readouterr().err
        assert equal(arrays, some_arrays(progress["step"])), name
        if progress["step"] == 1:
            fallen_back += 1
            assert f"damaged checkpoint {folder / '2'}: " in told, name
            assert not (folder / "2").exists()
    assert fallen_back >= 3


@ignore_tasks_of_failed_reads
def test_a_value_that_was_changed_is_noticed_though_orbax_reads_it(
    two_checkpoints, tmp_path, capsys
):
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    path = folder / "2" / "progress" / "metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with Checkpoints(folder) as checkpoints:
        _, progress = checkpoints.restore(some_arrays(0))
    assert progress["step"] == 1
    assert "its digest does not match" in capsys.readouterr().err


def test_arrays_come_back_as_they_were_though_their_memory_was_reused(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        arrays = some_arrays(5)
        checkpoints.save(1, arrays, {})
        overwrite(arrays)
        checkpoints.wait()
        restored, _ = checkpoints.restore(some_arrays(0))
    assert equal(restored, some_arrays(5))


def test_checkpoints_are_due_by_steps_or_minutes(tmp_path):
    with Checkpoints(tmp_path, Schedule(every_steps=3)) as checkpoints:
        assert [step for step in range(1, 8) if checkpoints.due(step)] == [3, 6]
    with Checkpoints(tmp_path, Schedule(every_minutes=1e-9)) as checkpoints:
        assert checkpoints.due(1)
    assert not Checkpoints(None, EVERY_STEP).due(1)
    with pytest.raises(ValueError, match="every_minutes must be positive, got 0"):
        Checkpoints(tmp_path, Schedule(every_minutes=0))


@ignore_tasks_of_failed_reads
@pytest.mark.parametrize("name", ["o[lr=0.1]", "a\\b"])
def test_a_folder_that_could_be_written_but_not_read_is_refused(tmp_path, monkeypatch, name):
    with pytest.raises(ValueError, match="could not be read again"):
        Checkpoints(tmp_path / name)
    monkeypatch.setattr(checkpoint, "UNREADABLE", "")  # as if this were not known of the name
    with (
        pytest.raises(OSError, match="cannot read back the checkpoint of step 1 in"),
        Checkpoints(tmp_path / name) as checkpoints,
    ):
        checkpoints.save(1, some_arrays(0), {})
