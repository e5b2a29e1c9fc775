"""Faults: what went wrong under injected faults, and must not again. Nothing is lost, nothing silently wrong."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from small_runs import (
    CLASSIFY, FOLDER, PRETRAIN, RESNET, ROOT, SEGMENT, VIT, assert_same_bits, assert_same_run, checkpoint, command,
    environment, epochs, interrupted_run, inventory, killed, log, make_pipe, on_each_loss, position, refused, start,
    weights)
from test_optim import Poison
from test_runs import BROKEN, save_images

import train
from checkpoints import read_checkpoint
from training import optim, runs

DEFAULT = f"--segments 2 {VIT} --data-size 64 --batch-size 32 --epochs 1"  # no --task: pre-train, then probe
SHORT = f"--task classify {VIT} --batch-size 8 --data-size 24 --epochs 2"  # 3 steps an epoch


def ends(flags, folder):
    """A run that ends with exit code 1 -> its sentence."""
    with pytest.raises(SystemExit) as end:
        start(flags, folder)
    message = str(end.value.code)
    assert message.startswith("train.py: ") and "\n" not in message
    return message


def edit(folder, change):
    """change(dict) edits checkpoint.pt."""
    saved = checkpoint(folder)
    change(saved)
    torch.save(saved, folder / "checkpoint.pt")


def edit_args(folder, **values):
    file = folder / "args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of two epochs of which one is trained; for reading only."""
    return interrupted_run(SHORT, tmp_path_factory.mktemp("interrupted"))


@pytest.fixture
def halfway(tmp_path, finished, interrupted):
    """A copy of it, and the run that was not interrupted."""
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run", finished(SHORT)


# ---------------------------------------------------------------------------- a step that must not count


def poison_images(monkeypatch, task, *numbers):
    """Micro-batches of these numbers are infinite, so that the forward pass itself spoils what it touches."""
    loss_of, count = task.loss, 0

    def loss(model, batch, *rest):
        nonlocal count
        count += 1
        images = batch[0] + math.inf if count in numbers else batch[0]
        return loss_of(model, [images, *batch[1:]], *rest)

    monkeypatch.setattr(task, "loss", loss)


@pytest.mark.parametrize("flags, numbers", [
    (f"{RESNET} --ema 0.9", [3]),
    (f"{RESNET} --optimizer sam", [5]),
    (f"{RESNET} --optimizer sam", [6]),
    (f"{SEGMENT} --norm batch --epochs 1", [3]),
], ids=["adamw", "sam, first pass", "sam, second pass", "segment"])
def test_a_skipped_batch_leaves_no_trace_in_batch_norm(tmp_path, monkeypatch, flags, numbers):
    task = train.TASKS[flags.split()[1]]
    poison_images(monkeypatch, task, *numbers)
    line = start(flags, tmp_path)
    assert line["bad_steps"] == 1
    assert all(math.isfinite(value) for value in line.values())
    saved = checkpoint(tmp_path)
    for part in ("model", "ema"):
        assert all(value.isfinite().all() for value in saved.get(part, {}).values())
    if "ema" in saved:
        assert saved["ema"]["n_averaged"] == line["step"] - 1


@pytest.mark.parametrize("flags", ["", "--optimizer sgd", "--clip-grad 1", "--optimizer sgd --clip-grad 1"])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_skips_the_step(tmp_path, monkeypatch, flags):
    heads = []

    def act(number, model, loss):
        heads.append(model.head.weight.detach().clone())
        return Poison.apply(loss) if number == 2 else None

    on_each_loss(monkeypatch, act)
    line = start(f"{SHORT} {flags}", tmp_path)
    assert line["bad_steps"] == 1
    assert torch.equal(heads[1], heads[2]) and not torch.equal(heads[2], heads[3])
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_nothing_is_saved_while_the_last_steps_were_bad(tmp_path, monkeypatch):
    on_each_loss(monkeypatch, lambda number, model, loss: loss * math.nan if number > 10 else None)
    message = ends(f"{CLASSIFY} --save-minutes 0", tmp_path)
    assert f"step {10 + train.MAX_BAD_STEPS}" in message
    assert position(tmp_path)[1] == 10


def test_a_learning_rate_far_too_high_ends_with_finite_weights_in_the_checkpoint(tmp_path):
    message = ends(f"{CLASSIFY} --epochs 4 --lr 100 --warmup-epochs 0 --save-minutes 0", tmp_path)
    assert "--lr" in message
    saved = checkpoint(tmp_path)
    assert all(value.isfinite().all() for value in saved["model"].values())
    for state in saved["optimizer"]["state"].values():
        assert all(value.isfinite().all() for value in state.values())


def test_weights_that_overflow_in_a_step_are_not_saved(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def overflow(self, closure):
        step(self, closure)
        self.param_groups[0]["params"][0].data.mul_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    assert "the weights are not finite after step 1" in ends(f"{SHORT} --save-minutes 0", tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_an_epoch_without_a_good_step_logs_null(tmp_path, monkeypatch):
    on_each_loss(monkeypatch, lambda number, model, loss: loss * math.nan if number <= 3 else None)
    start(SHORT, tmp_path)
    assert [line["train_loss"] is None for line in epochs(tmp_path)] == [True, False]


def test_a_run_whose_last_steps_were_bad_ends_with_exit_1_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    on_each_loss(monkeypatch, lambda number, model, loss: loss * math.nan if number >= 5 else None)
    assert "last 2 steps" in ends(SHORT, tmp_path)
    assert position(tmp_path) == (1, 3)


def on_each_evaluation(monkeypatch, task, act):
    """act(figures, number), counted from 1, replaces the figures of every evaluation."""
    task, count = train.TASKS[task], 0
    evaluate = task.evaluate

    def replaced(*given):
        nonlocal count
        count += 1
        return act(evaluate(*given), count)

    monkeypatch.setattr(task, "evaluate", replaced)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_whose_last_evaluation_is_not_finite_ends_with_exit_1_and_the_last_good_checkpoint(
        tmp_path, finished, monkeypatch, value):
    def act(line, epoch):
        return line | dict(val_loss=value) if epoch == 2 else line

    with monkeypatch.context() as patch:
        on_each_evaluation(patch, "classify", act)
        assert "validation loss is not finite after epoch 2" in ends(SHORT, tmp_path)
    assert position(tmp_path) == (1, 3) and epochs(tmp_path)[-1]["val_loss"] is None
    start("--resume", tmp_path)
    assert_same_run(tmp_path, finished(SHORT))


def test_a_run_goes_on_after_an_evaluation_that_is_not_finite(tmp_path, finished, monkeypatch):
    def act(line, epoch):
        return line | dict(val_loss=math.nan) if epoch == 1 else line

    on_each_evaluation(monkeypatch, "classify", act)
    start(SHORT, tmp_path)
    assert position(tmp_path) == (2, 6)
    assert_same_bits(weights(tmp_path), weights(finished(SHORT)))


def test_bad_steps_count_across_a_resume(tmp_path, monkeypatch):
    def act(number, model, loss):
        return loss * math.nan if number == 2 else None

    with monkeypatch.context() as patch:
        on_each_loss(patch, act)
        start(SHORT, tmp_path / "whole")
    with monkeypatch.context() as patch:
        on_each_loss(patch, act)
        killed(patch, 1, SHORT, tmp_path / "run")
    assert start("--resume", tmp_path / "run")["bad_steps"] == 1
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_probe_on_one_image_is_an_error(tmp_path, capsys):
    flags = f"--task probe {VIT} --data-size 16 --train-images 1"
    assert "--train-images" in refused(flags, capsys, tmp_path / "run")


# ---------------------------------------------------------------------------- a folder is of one run


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1}\n'], ids=["missing", "empty", "short"])
def test_a_log_shorter_than_remembered_is_not_padded(halfway, content):
    run, whole = halfway
    (run / "log.jsonl").unlink()
    if content is not None:
        (run / "log.jsonl").write_bytes(content)
    start("--resume", run)
    assert_same_bits(weights(run), weights(whole))
    assert log(run)[-1] == log(whole)[-1]  # and every line is JSON


@pytest.mark.parametrize("flags", ["--resume", f"{SHORT} --seed 1", f"{SHORT} --resume"])
def test_a_folder_in_which_a_run_goes_on_is_refused(tmp_path, finished, monkeypatch, capsys, flags):
    def act(number, model, loss):
        if number == 5:
            with pytest.raises(SystemExit) as end:
                start(flags, tmp_path)
            assert end.value.code == 2

    with monkeypatch.context() as patch:
        on_each_loss(patch, act)
        start(SHORT, tmp_path)
    assert str(tmp_path) in capsys.readouterr().err
    assert_same_run(tmp_path, finished(SHORT))


def test_of_two_new_runs_in_one_folder_the_second_to_start_is_refused(tmp_path, finished, monkeypatch, capsys):
    open_run = runs.Run.open

    def start_another(self, data):  # between the checks of one run and its first file
        monkeypatch.setattr(runs.Run, "open", open_run)
        start(SHORT, tmp_path)
        open_run(self, data)

    monkeypatch.setattr(runs.Run, "open", start_another)
    with pytest.raises(SystemExit) as end:
        start(f"{SHORT} --seed 1", tmp_path)
    assert end.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert_same_run(tmp_path, finished(SHORT))


def test_runs_that_start_together_get_a_numbered_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def make():
        with runs.Run(Namespace(resume=False), None) as run:
            run.make_folder()
            made.append(run.folder)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folder.name for folder in made) == [f"{number:04d}" for number in range(1, 9)]


def test_a_link_to_a_missing_disk_in_place_of_runs_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(tmp_path / "unmounted" / "disk")
    assert "runs" in refused(SHORT, capsys)


# ---------------------------------------------------------------------------- args.json


def test_without_args_json_a_run_goes_on_with_the_flags_of_its_checkpoint(halfway, capsys):
    run, whole = halfway
    (run / "args.json").unlink()
    assert "--lr" in refused("--resume --lr 0.1", capsys, run)
    start("--resume", run)
    assert_same_run(run, whole)


@pytest.mark.parametrize("text", ["null", "[]", "5", '"x"', "NaN", "true", "[" * 100_000, "{", "\0", ""])
def test_an_args_json_that_holds_no_flags_is_one_sentence_or_replaced_by_those_of_the_checkpoint(
        halfway, capsys, text):
    run, whole = halfway
    (run / "args.json").write_text(text)
    try:
        start("--resume", run)
    except SystemExit as end:
        assert end.code == 2 and "args.json" in capsys.readouterr().err
    else:
        pytest.fail("flags of a damaged file were taken")


WRONG = [dict(epochs="two"), dict(epochs=None), dict(epochs=2.0), dict(epochs=3), dict(lr="0.1"), dict(model=["x"]),
         dict(model="vit_b24"), dict(task="nothing"), dict(task=["classify"]), dict(optimizer="adam"),
         dict(device="tpu"), dict(img_size=32), dict(img_size="x"), dict(seed=1.5), dict(seed=1),
         dict(init_options="x"), dict(stats="no"), dict(schedule="x"), dict(precision="fp64"), dict(mixup=[1]),
         dict(depth={"a": 1}), dict(embed_dim=True), dict(data_path="--lr"), dict(ema="@/dev/zero")]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_an_edited_args_json_is_refused_by_name(halfway, capsys, values):
    run, _ = halfway
    edit_args(run, **values)
    before = inventory(run)
    message = refused("--resume", capsys, run)
    name = next(iter(values)).replace("_", "-")
    assert name in message or name.replace("-", "_") in message or "args.json" in message
    assert inventory(run) == before


def test_a_dry_run_in_args_json_does_not_keep_the_run_from_going_on(halfway):
    run, whole = halfway
    edit_args(run, dry_run=True)
    start("--resume", run)
    assert_same_run(run, whole)


def test_a_run_that_goes_on_may_be_costed_first(halfway, capsys):
    run, _ = halfway
    before = inventory(run)
    start("--resume --dry-run", run)
    assert "device-hours" in capsys.readouterr().out and inventory(run) == before


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_an_args_json_that_is_no_file_gives_way_to_the_checkpoint(halfway, kind, capsys):
    run, whole = halfway
    (run / "args.json").unlink()
    if kind == "folder":
        (run / "args.json").mkdir()
        assert "args.json" in refused("--resume", capsys, run) or "output-dir" in refused("--resume", capsys, run)
        return
    make_pipe(run / "args.json")
    start("--resume", run)
    assert_same_run(run, whole)


def test_args_json_is_renamed_into_place_and_a_cut_one_without_a_checkpoint_counts_as_none(
        tmp_path, finished, monkeypatch):
    rename = os.replace

    def fail(source, target):
        if Path(target).name == "args.json":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", fail)
        start(SHORT, tmp_path / "run")
    assert not (tmp_path / "run" / "args.json").exists()

    (tmp_path / "run" / "args.json").write_text('{"task": "cla')
    start(f"{SHORT} --resume", tmp_path / "run")
    assert_same_run(tmp_path / "run", finished(SHORT))


# ---------------------------------------------------------------------------- checkpoint.pt


def moment(saved, name, value, index=0):
    saved["optimizer"]["state"][index][name] = value


def first_moment(saved):
    return saved["optimizer"]["state"][0]["exp_avg"]


DAMAGE = {
    "another shape": lambda saved: moment(saved, "exp_avg", torch.zeros(3)),
    "one number": lambda saved: moment(saved, "exp_avg", torch.zeros(1)),
    "expanded": lambda saved: moment(saved, "exp_avg", first_moment(saved).view(-1)[0].expand_as(first_moment(saved))),
    "sparse": lambda saved: moment(saved, "exp_avg", first_moment(saved).to_sparse()),
    "complex": lambda saved: moment(saved, "exp_avg", first_moment(saved) + 0j),
    "NaN": lambda saved: first_moment(saved).view(-1)[:1].fill_(math.nan),
    "no tensor": lambda saved: moment(saved, "exp_avg", "x"),
    "missing": lambda saved: saved["optimizer"]["state"][0].pop("exp_avg"),
    "five steps": lambda saved: moment(saved, "step", torch.zeros(5)),
    "betas": lambda saved: saved["optimizer"]["param_groups"][0].update(betas="x"),
    "maximize": lambda saved: saved["optimizer"]["param_groups"][0].update(maximize=True),
    "weight decay": lambda saved: saved["optimizer"]["param_groups"][0].update(weight_decay=1e9),
    "no lr_scale": lambda saved: saved["optimizer"]["param_groups"][0].pop("lr_scale"),
    "no optimizer": lambda saved: saved.update(optimizer=None),
    "no group": lambda saved: saved["optimizer"]["param_groups"].pop(),
    "unknown parameter": lambda saved: saved["optimizer"]["state"].update({999: saved["optimizer"]["state"][0]}),
    "no total_steps": lambda saved: saved.pop("total_steps"),
    "no position": lambda saved: saved.pop("at"),
    "an incomplete position": lambda saved: saved["at"].pop("loss_sum"),
    "epoch 7": lambda saved: saved["at"].update(epoch=7),
    "epoch -1": lambda saved: saved["at"].update(epoch=-1),
    "epoch 1.0": lambda saved: saved["at"].update(epoch=1.0),
    "epoch x": lambda saved: saved["at"].update(epoch="x"),
    "step 10**6": lambda saved: saved["at"].update(step=10**6),
    "step None": lambda saved: saved["at"].update(step=None),
    "trained to the end in another step": lambda saved: saved["at"].update(epoch=2),
    "a loss of NaN": lambda saved: saved["at"].update(loss_sum=math.nan),
    "a line that is none": lambda saved: saved["at"].update(line=3),
    "log_bytes -1": lambda saved: saved.update(log_bytes=-1),
    "log_bytes x": lambda saved: saved.update(log_bytes="x"),
    "log_bytes 5.0": lambda saved: saved.update(log_bytes=5.0),
    "other flags": lambda saved: saved["args"].update(lr=5.0),
    "weights of another shape": lambda saved: saved["model"].update({"head.weight": torch.zeros(3, 3)}),
    "a weight of NaN": lambda saved: saved["model"]["head.weight"].fill_(math.nan),
    "a weight too few": lambda saved: saved["model"].pop("head.weight"),
    "no weights": lambda saved: saved.update(model=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_it_touches_anything(halfway, capsys, damage):
    run, _ = halfway
    edit(run, DAMAGE[damage])
    before = inventory(run)
    refused("--resume", capsys, run)
    assert inventory(run) == before


def test_the_state_of_an_optimizer_fits_itself():
    for kind in (torch.optim.AdamW, torch.optim.SGD, optim.LARS):
        param = torch.nn.Parameter(torch.randn(3, 2))
        options = dict(momentum=0.9) if kind is torch.optim.SGD else {}
        optimizer = kind([param], lr=0.1, **options)
        param.square().sum().backward()
        optimizer.step()
        optim.check_state(optimizer, optimizer.state_dict())


# ---------------------------------------------------------------------------- signals and processes


def test_sigterm_to_the_whole_group_saves_and_ends_like_one_to_the_process(tmp_path):
    words = command(f"{PRETRAIN} --epochs 50 --workers 2 --output-dir {tmp_path / 'run'}")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(words, cwd=tmp_path, env=environment(), start_new_session=True, **pipes)
    limit = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and run.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and err == "", err
    assert "--resume" in out and position(tmp_path / "run")[1] > 0
    with pytest.raises(ProcessLookupError):  # no loading process is left
        os.killpg(run.pid, 0)


def test_a_signal_in_the_last_evaluation_is_not_swallowed(tmp_path, monkeypatch):
    """The run is complete, but whatever started it (experiments/claims.py, a loop of a shell) must not go on."""
    evaluate = train.TASKS["classify"].evaluate

    def interrupt(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*rest)

    monkeypatch.setattr(train.TASKS["classify"], "evaluate", interrupt)
    with pytest.raises(SystemExit) as end:
        start(f"{CLASSIFY} --epochs 1", tmp_path)
    assert end.value.code == 128 + signal.SIGTERM and position(tmp_path)[0] == 1


def test_sighup_saves_too(tmp_path, finished, monkeypatch):
    def missed(*_):
        pytest.fail("nothing listens to SIGHUP")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        before = signal.signal(signal.SIGHUP, missed)
        on_each_loss(patch, lambda n, model, loss: os.kill(os.getpid(), signal.SIGHUP) if n == 4 else None)
        start(SHORT, tmp_path)
    signal.signal(signal.SIGHUP, before)
    assert end.value.code == 128 + signal.SIGHUP and position(tmp_path)[1] == 4
    start("--resume", tmp_path)
    assert_same_run(tmp_path, finished(SHORT))


def test_python_exits_though_loading_processes_are_alive(tmp_path):
    (tmp_path / "alive.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from data import TrainBatches, make_loader

class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return key[1]

loader = make_loader(Numbers(), TrainBatches(8, 2, 0), 1, torch.device("cpu"))  # lives as long as the module
print(sum(len(batch) for batch in loader))
""")
    done = subprocess.run([sys.executable, "alive.py"], cwd=tmp_path, env=environment(), capture_output=True,
                          text=True, timeout=180)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


@pytest.mark.slow  # torch takes 10 s to clear away what is left of the workers
def test_a_lost_loading_process_is_called_that(tmp_path, monkeypatch):
    def act(number, model, loss):
        if number == 2:
            multiprocessing.active_children()[0].kill()
            time.sleep(1)

    on_each_loss(monkeypatch, act)
    message = ends(f"{SHORT} --workers 1 --epochs 30", tmp_path)
    assert "loading process" in message and "space" not in message


@pytest.mark.slow
def test_a_lost_rank_is_called_that_and_the_run_resumes(tmp_path):
    from small_runs import torchrun

    flags = f"--task pretrain --segments 2 {VIT} --data-size 64 --batch-size 4 --epochs 3"
    (tmp_path / "lose.py").write_text(f"""
import os
import signal
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import train
loss_of, count = train.TASKS["pretrain"].loss, 0

def loss(*given):
    global count
    count += 1
    if count == 12 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return loss_of(*given)

if sys.argv[1] == "lose":
    train.TASKS["pretrain"].loss = loss
train.main([*{flags.split()!r}, "--output-dir", *sys.argv[2:]])
""")
    lost = torchrun(["lose.py", "lose", "run"], tmp_path)
    assert lost.returncode != 0 and "train.py: another of the training processes was lost" in lost.stderr
    assert torchrun(["lose.py", "keep", "run", "--resume"], tmp_path).returncode == 0
    assert torchrun(["lose.py", "keep", "whole"], tmp_path).returncode == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


class Closed:
    """What stands behind it is gone."""

    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


@pytest.mark.parametrize("stdout", [Closed(), open("/dev/full", "w"), None], ids=["pipe", "full", "none"])
def test_a_closed_or_full_stdout_does_not_end_a_training(tmp_path, finished, monkeypatch, stdout):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        start(SHORT, tmp_path)
    assert_same_run(tmp_path, finished(SHORT))


def test_what_a_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, open(tmp_path / "out.txt", "w", encoding="ascii") as terminal:
        patch.setattr(sys, "stdout", terminal)
        start(SHORT, tmp_path / "gr\u00fcn")
    assert "gr\\xfcn" in (tmp_path / "out.txt").read_text() and position(tmp_path / "gr\u00fcn")[0] == 2


@pytest.mark.parametrize("variables", [
    dict(RANK="abc"), dict(RANK="1"), dict(WORLD_SIZE="0"), dict(WORLD_SIZE="-1"), dict(WORLD_SIZE="two"),
    dict(RANK="2", WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="2")], ids=str)
@pytest.mark.parametrize("flags", ["", "--dry-run", "--no-such-flag"])
def test_bad_environment_variables_are_one_sentence(tmp_path, monkeypatch, capsys, variables, flags):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        start(f"{SHORT} {flags}")
    error = capsys.readouterr().err
    if flags == "--no-such-flag" and variables == dict(RANK="2", WORLD_SIZE="2"):
        return  # rank 0 says it
    assert end.value.code == 2
    assert error.startswith("train.py: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_default_run_killed_in_its_probe_records_the_same_flags(tmp_path, monkeypatch):
    start(DEFAULT, tmp_path / "whole")
    killed(monkeypatch, 2, DEFAULT, tmp_path / "run", after=False)
    start("--resume", tmp_path / "run")
    for part in ("", "probe", "probe_random"):
        run, whole = (checkpoint(tmp_path / name / part)["args"] for name in ("run", "whole"))
        differ = {name for name in run if run[name] != whole[name]}
        assert differ <= {"output_dir", "resume", "init"}


# ---------------------------------------------------------------------------- recipes


RECIPES = {  # content, what the sentence names
    "apostrophe": (b"--task classify\nit's\n", "line 2"),
    "open quote": (b'--task classify\n\n--output-dir "runs/a\n', "line 3"),
    "backslash": (b"--task classify \\\n--depth 2\n", "line 1"),
    "UTF-16": ("--task classify\n".encode("utf-16"), "line 1"),
    "Latin-1": ("# a\n# gr\u00fcn\n".encode("latin-1"), "line 2"),
    "binary": (bytes(range(256)), "line 2"),
    "itself": (b"--depth 2\n@recipe.txt\n", "line 2"),
    "each other": (b"@other.txt\n", "line 1 of recipe other.txt"),
    "a recipe that is missing": (b"\n\n@missing.txt\n", "line 3"),
    "a word of 5 MB": (b"x" * 5_000_000, "bytes"),
    "NUL": (b'--task classify\n--output-dir "a\0b"\n', "output-dir"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_cannot_be_read_is_one_sentence_with_the_line(tmp_path, monkeypatch, capsys, name):
    content, words = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    Path("recipe.txt").write_bytes(content)
    Path("other.txt").write_text("@recipe.txt\n")
    begin = time.monotonic()
    assert words in refused("@recipe.txt", capsys)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("file", ["/dev/zero", "pipe", ".", "missing"])
def test_a_recipe_that_is_no_regular_file_is_one_sentence(tmp_path, monkeypatch, capsys, file):
    monkeypatch.chdir(tmp_path)
    make_pipe("pipe")
    assert file in refused(f"@{file}", capsys)


def test_words_of_a_recipe_keep_backslashes_quotes_and_signs(tmp_path):
    (tmp_path / "r.txt").write_text(
        "--data-path C:\\Users\\me\\set  # isn't a quote\n"
        "'my data' --name=\"it's\" set#1 a\\ \"\"\n"
        "  # only a comment\n\n"
        "\ttab\r\n")
    words = ["--data-path", "C:\\Users\\me\\set", "my data", "--name=it's", "set#1", "a\\", "", "tab"]
    assert train.find_task(["first", f"@{tmp_path / 'r.txt'}", "last"])[2] == ["first", *words, "last"]


def test_recipes_may_include_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("--depth 2\n@b.txt\n--seed 1\n")
    Path("b.txt").write_text("--lr 3\n")
    assert train.find_task(["@a.txt", "@b.txt"])[2] == "--depth 2 --lr 3 --seed 1 --lr 3".split()


# ---------------------------------------------------------------------------- flags


BOUNDS = ["--depth 2147483648", "--depth 100000", "--embed-dim 9223372036854775807", f"--data-size {'9' * 400}",
          "--data-size 1000000000000", "--epochs 100000000000", "--batch-size 99999999999", "--img-size 1000000",
          "--lr 1e300", "--lr 1e-300", "--blr 1e300", "--min-lr 1e39", "--warmup-epochs 1e10", "--weight-decay 1e38",
          "--clip-grad 1e300", "--layer-decay 1e300", "--crop-ratio 1e-30", "--layer-decay 255", "--workers 2147483648",
          "--save-minutes 1e300", "--eval-every 9999999999999", "--mixup 1e-300", "--mixup 1e300", "--cutmix inf",
          "--optimizer sam --rho 1e39", "--tflops 1e300", "--train-images 99999999999999999999",
          f"--seed {'9' * 5000}"]


@pytest.mark.parametrize("flags", BOUNDS, ids=lambda flags: flags[:40])
def test_a_number_beyond_what_makes_sense_is_refused_by_name(tmp_path, monkeypatch, capsys, flags):
    def build(args):
        pytest.fail("it is taken, and a model of this size built")

    monkeypatch.setattr(train.TASKS["classify"], "complete", build)
    monkeypatch.chdir(tmp_path)
    error = refused(f"--task classify {VIT} {flags}", capsys)
    assert flags.rpartition("--")[2].split()[0] in error
    assert not list(tmp_path.iterdir())


def test_jitter_is_bounded_too(capsys):
    assert "jitter" in refused("--task detect --jitter 2 1e300", capsys)


@pytest.mark.parametrize("flags, words", [
    ("--warmup-epochs 3", "--warmup-epochs 3"),
    ("--warmup-epochs 2.5", "--epochs 2"),
    ("--lr 1e-3 --min-lr 2e-3", "--min-lr 0.002"),
    ("--blr 1e-3 --min-lr 1e-3", "--min-lr 0.001"),
])
def test_a_schedule_that_contradicts_itself_is_refused(tmp_path, capsys, flags, words):
    assert words in refused(f"{SHORT} {flags}", capsys, tmp_path / "run")
    assert words in refused(f"{SHORT} {flags} --dry-run", capsys)


def test_a_schedule_at_its_limits_is_accepted():
    args = Namespace(batch_size=8, accum=1, lr=0.1, min_lr=0.1, warmup_epochs=2.0, epochs=2)
    assert optim.plan_steps(args, 24, 1).warmup == 6


def test_a_sentence_with_a_line_break_is_printed_whole(monkeypatch, capsys):
    def fail(argv):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(train, "parse", fail)
    assert "first second" in refused("", capsys)


# ---------------------------------------------------------------------------- folders and disks


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_an_output_folder_whose_name_is_too_long_is_one_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for flags in (SHORT, "--resume", f"{SHORT} --resume"):
        assert "output-dir" in refused(f"{flags} --output-dir {name}", capsys)


def test_an_output_folder_that_may_not_be_looked_into_is_one_sentence(tmp_path, monkeypatch, capsys):
    closed = PermissionError(13, "Permission denied")

    def stat(self, *given, stat_of=Path.stat, **options):
        if "closed" in str(self):
            raise closed
        return stat_of(self, *given, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "exists", lambda self: bool(self.stat()))
    for flags in (SHORT, "--resume"):
        assert "Permission denied" in refused(flags, capsys, tmp_path / "closed" / "run")


@pytest.mark.parametrize("name", ["checkpoint.pt.tmp", "checkpoint.pt"])
def test_a_folder_in_the_place_of_the_checkpoint_is_one_sentence(tmp_path, monkeypatch, name):
    on_each_loss(monkeypatch, lambda n, model, loss: (tmp_path / name).mkdir() if n == 2 else None)
    assert "checkpoint.pt" in ends(SHORT, tmp_path)


def test_a_folder_that_vanishes_is_one_sentence(tmp_path, monkeypatch):
    run = tmp_path / "run"
    on_each_loss(monkeypatch, lambda n, model, loss: shutil.rmtree(run) if n == 2 else None)
    assert "cannot write" in ends(SHORT, run)


def test_a_folder_in_the_place_of_the_picture_is_one_sentence_and_the_run_resumes(tmp_path, finished, monkeypatch):
    picture = tmp_path / "predictions.png"
    with monkeypatch.context() as patch:
        on_each_loss(patch, lambda n, model, loss: picture.mkdir() if n == 2 else None)
        assert "picture" in ends(SHORT, tmp_path)
    picture.rmdir()
    start("--resume", tmp_path)
    assert_same_run(tmp_path, finished(SHORT))


def test_a_disk_that_fills_while_the_log_is_written_is_one_sentence(tmp_path, finished, monkeypatch):
    class Full:
        """A log on a disk with room for so many writes."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            self.room -= 1
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(text)

    def open_full(self, data, open_run=runs.Run.open):
        open_run(self, data)
        self.file = Full(self.file, 1)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "open", open_full)
        message = ends(SHORT, tmp_path)
    assert "log.jsonl" in message and "--resume" in message
    start("--resume", tmp_path)
    assert_same_run(tmp_path, finished(SHORT))


def test_a_clock_that_stands_still_divides_nothing_by_zero(tmp_path, finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 1e6)
        start(SHORT, tmp_path)
    assert_same_run(tmp_path, finished(SHORT))


def test_curves_that_a_kill_prevented_are_drawn_on_resuming(tmp_path):
    pytest.importorskip("matplotlib")
    start(SHORT, tmp_path)
    (tmp_path / "curves.png").unlink()
    start("--resume", tmp_path)
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("way_out", ["repaired", "--skip-bad"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])  # torch takes 10 s to end them
def test_a_run_that_meets_a_broken_image_says_how_to_go_on(tmp_path, capsys, workers, way_out):
    images = save_images(tmp_path / "set", train=6, val=6)
    flags = f"{FOLDER} --data-path {images} --workers {workers}"
    broken = images / BROKEN
    content = broken.read_bytes()
    if way_out == "repaired":
        start(flags, tmp_path / "whole")
    broken.write_bytes(content[:60])
    if way_out == "--skip-bad":
        start(f"{flags} --skip-bad", tmp_path / "whole")
    with pytest.raises(SystemExit) as end:
        start(flags, tmp_path / "run")
    said, error = capsys.readouterr()
    assert end.value.code == 2 and str(broken) in error and "--skip-bad" in error
    assert said.splitlines()[-1].endswith(f"continue with --resume --output-dir {tmp_path / 'run'}")
    if way_out == "repaired":
        broken.write_bytes(content)
    assert "--resume" in refused(flags, capsys, tmp_path / "run")  # the folder is taken, and the way out named
    start("--resume" + (" --skip-bad" if way_out == "--skip-bad" else ""), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_sentence_comes_without_warnings_of_others(tmp_path):
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "x.pt", pickle_protocol=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="x.pt"):
            read_checkpoint(tmp_path / "x.pt")
    assert not caught
