"""Every command with names and paths that do harm where they are taken for more than letters."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import cli
from experiments.escape import printable
from experiments.training import run_folder
from tests.experiments import hostile

WORST = "[red] $x^$ <b> {{ 7 }}\x1b[31m"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, compilation_cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of decoded images


def images(folder):
    """A folder of images whose classes have harmful names too."""
    for split in ("train", "test"):
        for number, name in enumerate(hostile.FILE_NAMES[:3]):
            path = folder / split / name
            path.mkdir(parents=True)
            pixels = np.full((8, 8), 80 * number, np.uint8)
            Image.fromarray(pixels).save(path / "0.png")
    return folder


def is_printed_letter_by_letter(text):
    return not set(text) - {"\n"} & set(map(chr, [*range(32), 127, 0x85, 0x2028, 0x202E]))


UNREADABLE = [name for name in hostile.FILE_NAMES if set("[\\*?") & set(name)]
READABLE = [name for name in hostile.FILE_NAMES if name not in UNREADABLE]


@pytest.mark.slow  # trains whole runs
@pytest.mark.parametrize(
    "name",
    [
        # Folders in folders, all names in three runs, and a run each.
        *("/".join(names) for names in (READABLE[::2], READABLE[1::2], UNREADABLE)),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in hostile.FILE_NAMES),
    ],
)
def test_run_takes_a_path_letter_by_letter_or_refuses_it(tmp_path, capsys, name):
    data, out = images(tmp_path / "data" / name), tmp_path / "out" / name
    run = ["run", "--model", "digits_mlp", "--width", "0.1", "--steps", "1"]
    refused = set("[\\*?") & set(name)

    status = cli.main([*run, f"--dataset={data}", f"--out={out}"])
    told = capsys.readouterr()
    assert status == (2 if refused else 0)
    if refused:
        assert "could not be read again, for '" in told.err
    else:
        assert f"figure: {printable(out / run_folder.FIGURE)}\n" in told.out
        assert cli.main(["run", "--resume", f"--out={out}"]) == 0
        assert printable(out) in capsys.readouterr().out
        assert cli.main(["run", f"--out={out}"]) == 2
        assert f"error: {printable(out)} is not empty" in capsys.readouterr().err

    assert cli.main([*run, f"--dataset={data}"]) == 0
    told = capsys.readouterr()
    assert "figure: runs/" in told.out
    assert is_printed_letter_by_letter(told.out + told.err)
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.exhaustive  # trains under every name; those of a run are tested by default above
def test_a_sweep_and_its_report_take_names_and_paths_letter_by_letter(tmp_path, capsys):
    def quoted(name):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in name) + '"'

    out, data = tmp_path / "sweep" / WORST, images(tmp_path / "data" / WORST)
    notes = ", ".join(map(quoted, hostile.NAMES))
    plan = [f"title = {quoted(WORST)}", f"notes = [{notes}]", "steps = 2", "learning_rates = [0.1]"]
    plan += ['model = "digits_mlp"', "width = 0.1", "evaluations = 1", "[datasets.digits]"]
    plan += ["[datasets.images]", f"dataset = {quoted(str(data))}", f"title = {quoted(WORST)}"]
    for number, name in enumerate(hostile.NAMES[:6]):
        plan += [f"[methods.m{number}]", 'method = "constant"', f"title = {quoted(name)}"]
    path = tmp_path / (WORST + ".toml")
    path.write_text("\n".join(plan))
    assert cli.main(["sweep", str(path), f"--out={out}"]) == 0
    assert "12 runs finished" in capsys.readouterr().out

    report = tmp_path / "report" / WORST
    assert cli.main(["report", str(out), f"--out={report}"]) == 0
    told = capsys.readouterr()
    assert f"{printable(report)}/report.html" in told.out
    assert is_printed_letter_by_letter(told.out + told.err)
    assert "<script>alert(1)" not in (report / "report.html").read_text("utf-8")


@pytest.mark.parametrize("name", hostile.FILE_NAMES)
@pytest.mark.parametrize(
    "command",
    [
        ("run", "--dataset=a/{}"),
        ("run", "--resume", "--out={}/x"),
        ("sweep", "{}/plan.toml", "--out=out"),
        ("sweep", "{}/plan.toml", "--out=out", "--shard={}"),
        ("report", "a/{}", "--out=out"),
        ("soak", "--minutes={}"),
        ("bench", "step", "--parts={}"),
        ("{}",),
    ],
)
def test_mistakes_with_harmful_names_are_told_in_one_line(tmp_path, capsys, command, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").mkdir()
    (tmp_path / name / "x" / run_folder.CONFIG).write_text(json.dumps({name: name}))
    (tmp_path / name / "plan.toml").write_text("[datasets." + name)
    arguments = [part.replace("{}", name) for part in command]
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert is_printed_letter_by_letter(told.out + told.err)
    assert not (tmp_path / "out").exists()
