import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import geometry
import train
from data import first_of_shuffle
from experiments import landscape
from shapes import Shapes
from tasks import load_run

TINY = ("--task classify --data shapes --scenes crowded --data-size 64 --epochs 1 --batch-size 16 --patch-size 8 "
        "--embed-dim 32 --depth 2")
QUICK = "--images 48 --micro-batch 24 --surface-steps 5 --surface-radius 6 --iters 12 --draws 2 --device cpu"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of AdamW, one of SAM, one Mixer."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        "adamw0": "--num-heads 2",
        "adamw1": "--num-heads 2 --seed 1 --workers 0",
        "sam": "--num-heads 2 --optimizer sam --rho 0.1",
        "mixer": "--model mixer_demo",
    }
    for name, words in flags.items():
        train.main([*TINY.split(), *words.split(), "--output-dir", str(folder / name)])
    return folder


def start(folder, names, *flags):
    """Run the script in this process -> what it printed, the JSON lines by run."""
    records, printed = folder / "figures.jsonl", io.StringIO()
    records.unlink(missing_ok=True)
    output = ["--json", str(records), "--output", str(folder / "picture.png")]
    with contextlib.redirect_stdout(printed):
        landscape.main([*(str(folder / name) for name in names), *QUICK.split(), *flags, *output])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    return printed.getvalue(), {Path(line["checkpoint"]).name: line for line in lines}


@pytest.fixture(scope="module")
def compared(runs):
    pytest.importorskip("matplotlib")
    return start(runs, ["adamw0", "sam", "adamw1", "mixer"])


def rows_of(text):
    """{label: {header: cell}} of the table that was printed."""
    header, _, *lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[0].splitlines()]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}


def pictures(part, size, count):
    """The first of the fixed shuffle, normalized by hand."""
    source = Shapes(size, 32, train=part)
    chosen = first_of_shuffle(len(source), count)
    mean, std = (torch.tensor(scale).view(3, 1, 1) for scale in (source.mean, source.std))
    return (source.images[chosen].float() / 255 - mean) / std, source.labels[chosen]


@pytest.mark.parametrize("name", ["sam", "mixer"])
def test_the_figures_are_those_of_geometry_called_directly(runs, compared, name):
    model, (x, y), figures = load_run(runs / name).model.requires_grad_(True), pictures(True, 64, 48), compared[1][name]

    def loss_fn():
        return F.cross_entropy(model(x), y)

    flat = geometry.average_flatness(model, loss_fn, sigma=0.01, draws=2)
    active = list(geometry.active_neurons(model, x).values())
    expected = dict(
        params=sum(p.numel() for p in model.parameters()),
        train_loss=flat.clean,
        L_N=flat.perturbed,
        weight_norm=geometry.weight_norm(model),
        lambda_max=geometry.hessian_max_eigenvalue(model, loss_fn, iters=12, tol=1e-2),
        active_first=100 * active[0],
        active_mean=100 * sum(active) / len(active),
    )
    assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert figures["gap"] == pytest.approx(flat.gap, abs=1e-5)
    surface = geometry.loss_surface(model, lambda: F.cross_entropy(model(x[:24]), y[:24]), radius=6.0, steps=5)
    radius = geometry.doubling_radius(surface)
    assert figures["doubling_radius"] == (pytest.approx(radius, rel=1e-3) if math.isfinite(radius) else None)


def test_the_accuracy_is_that_of_all_test_images(runs, compared):
    model, (x, y) = load_run(runs / "adamw0").model, pictures(False, 16, 16)
    right = (model(x).argmax(dim=1) == y).float().mean().item()
    assert compared[1]["adamw0"]["test_acc"] == pytest.approx(100 * right)


def test_two_seeds_are_one_row_and_the_others_rows_of_their_own(compared):
    rows, lines = rows_of(compared[0]), compared[1]
    assert [row["seeds"] for row in rows.values()] == ["2", "1", "1"]
    assert {name: line["row"] for name, line in lines.items()} == {
        "adamw0": "adamw", "adamw1": "adamw", "sam": "sam", "mixer": "mixer"}
    assert [line["train_seed"] for line in lines.values()] == [0, 0, 1, 0]


def test_the_table_holds_mean_and_sample_deviation_of_the_json_lines(compared):
    rows, lines = rows_of(compared[0]), compared[1]
    a, b = (lines[name]["test_acc"] for name in ("adamw0", "adamw1"))
    assert rows[lines["adamw0"]["row"]]["test %"] == landscape.spread([a, b])
    assert rows["mixer"]["params"] == f"{lines['mixer']['params']:,}"
    assert "On 48 training images" in compared[0] and "On 24 of" in compared[0].replace("\n", " ")


def test_rows_are_named_after_folders():
    paths = map(Path, ("runs/0001", "runs/0002", "runs/sam0/checkpoint.pt", "runs/sam1", "other.pt"))
    assert landscape.group(paths) == {"0001": [0], "0002": [1], "sam": [2, 3], "other": [4]}


def test_the_figures_do_not_depend_on_the_order_and_company_of_the_runs(runs, compared):
    printed, lines = start(runs, ["sam", "adamw1"])
    for name, line in lines.items():
        same = compared[1][name]
        assert {key: line[key] for key in landscape.COLUMNS} == {key: same[key] for key in landscape.COLUMNS}
    table = printed.split("\n\n")[0].splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_the_picture_is_a_png(runs, compared):
    assert (runs / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert compared[0].endswith(f"saved {runs / 'picture.png'}\n")


@pytest.mark.parametrize("key, values, text", [
    ("lambda_max", [3.0], "3.00"), ("lambda_max", [1.0, 3.0], "2.00 ± 1.41"), ("params", [1000, 1000], "1,000"),
    ("doubling_radius", [0.25, 0.5], "0.375 ± 0.177"), ("doubling_radius", [math.inf, 0.3], "> 0.400"),
    ("doubling_radius", [math.nan], "n/a")])
def test_a_cell_is_the_hand_computed_one(key, values, text):
    assert landscape.cell(key, values, reach=0.5) == text


# ---------------------------------------------------------------------------- what is refused


def changed(runs, path, **args):
    saved = torch.load(runs / "adamw0" / "checkpoint.pt", weights_only=True)
    saved["args"].update(args)
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("args, words", [
    (dict(data_size=128), "data_size 128"), (dict(scenes="simple"), "scenes simple"),
    (dict(data="cifar10"), "data cifar10"),
    (dict(data_path="elsewhere", seed=1), "--data-path")])
def test_runs_that_cannot_be_compared_are_refused_in_one_sentence(runs, tmp_path, capsys, args, words):
    other = changed(runs, tmp_path / "other.pt", **args)
    assert words in refused(capsys, runs / "adamw0", other, "--output", tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_two_runs_of_one_row_and_seed_are_refused(runs, tmp_path, capsys):
    other = changed(runs, tmp_path / "adamw7.pt", seed=0)
    assert "same seed" in refused(capsys, runs / "adamw0", other, "--output", tmp_path / "picture.png")


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        landscape.main([*QUICK.split(), *map(str, words)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("landscape.py: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("words, named", [
    ("nowhere.pt", "nowhere.pt"), ("{runs}/sam --images 72", "72"), ("{runs}/sam --surface-steps 4", "use 5"),
    ("{runs}/sam --images 50", "multiple of --micro-batch 24"), ("--seed 1", "checkpoints")])
def test_bad_inputs_end_with_one_line(runs, capsys, words, named):
    assert named in refused(capsys, *words.format(runs=runs).split())
