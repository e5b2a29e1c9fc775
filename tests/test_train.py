import ast
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image

import train
from data import Images, TrainBatches, augmentation, first_of_shuffle, open_source
from shapes import Shapes
from vit import create_vit

ROOT = Path(train.__file__).resolve().parent
MODEL = "--embed-dim 32 --depth 2 --num-heads 2 --patch-size 8"
TINY = f"{MODEL} --data-size 64 --batch-size 8 --epochs 2"
PRETRAIN = f"--task pretrain --segments 2 {TINY}"
CLASSIFY = f"--task classify {TINY}"
SMALL_MIXMIM = "--method mixmim --img-size 32 --embed-dim 16 --window-size 4 4 2"  # 2 x 2 positions of 16 pixels
MIXMIM = f"--task pretrain {SMALL_MIXMIM} --data-size 64 --batch-size 8 --epochs 2"
TIMING = ("img_s", "data_share")  # the only entries of a log that two equal runs may differ in
FLAT = "--lr 0.05 --min-lr 0.05 --warmup-epochs 0 --weight-decay 0"  # a constant learning rate


def start(flags, folder=None):
    """Train in this process."""
    return train.main([*flags.split(), *(["--output-dir", str(folder)] if folder else [])])


def command(flags, script=None):
    return [sys.executable, str(script or ROOT / "train.py"), *flags.split()]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(arguments, cwd, limit=120):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *arguments],
                          cwd=cwd, env=environment(), capture_output=True, text=True, timeout=limit)


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def log(folder, without=TIMING):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def on_each_loss(monkeypatch, act):
    """Call act(number, model, loss) at every micro-batch, counted from 1; a returned tensor replaces the loss."""
    make, count = train.make_objective, [0]

    def make_objective(model, *rest):
        objective = make(model, *rest)

        def wrapped(*batch):
            count[0] += 1
            loss = objective(*batch)
            other = act(count[0], model, loss)
            return loss if other is None else other
        return wrapped
    monkeypatch.setattr(train, "make_objective", make_objective)


class Killed(BaseException):
    pass


def kill_at_save(monkeypatch, number, after):
    """Ends the run as a kill would, just before or after the number-th checkpoint is written."""
    real, count = train.save_checkpoint, [0]

    def save_checkpoint(path, state):
        count[0] += 1
        if count[0] == number and not after:
            raise Killed
        real(path, state)
        if count[0] == number:
            raise Killed
    monkeypatch.setattr(train, "save_checkpoint", save_checkpoint)


# ---------------------------------------------------------------------------- a run and what it leaves behind


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The run without --task, small, in a fresh working directory."""
    folder, old = tmp_path_factory.mktemp("default"), os.getcwd()
    os.chdir(folder)
    try:
        start(f"--segments 2 {MODEL} --data-size 256 --batch-size 32 --epochs 2")
    finally:
        os.chdir(old)
    return folder / "runs" / "0001"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    start(PRETRAIN, folder)
    return folder


def test_a_run_without_flags_leaves_what_the_design_promises(default_run):
    names = {path.name for path in default_run.iterdir()}
    assert names == {"args.json", "log.jsonl", "checkpoint.pt", "reconstruction.png", "probe", "probe_random"}
    args = json.loads((default_run / "args.json").read_text())
    assert args["task"] is None and args["embed_dim"] == 32 and args["seed"] == 0
    epochs = [line for line in log(default_run) if "epoch" in line]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert all(math.isfinite(line[key]) for line in epochs for key in ("train_loss", "val_loss", "lr"))
    steps = [line for line in log(default_run, without=()) if "epoch" not in line]
    assert steps and all({"step", "loss", "lr", "img_s"} <= line.keys() for line in steps)
    saved = checkpoint(default_run)
    assert all(isinstance(name, str) and torch.is_tensor(value) for name, value in saved["model"].items())
    assert {"optimizer", "schedule", "rng", "epoch", "args"} <= saved.keys() and type(saved["args"]) is dict
    assert (default_run / "reconstruction.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("probe", "probe_random"):
        assert all("val_acc" in line for line in log(default_run / name) if "epoch" in line)


def test_the_default_run_ends_with_a_summary_and_numbers_its_folders(default_run, monkeypatch, capsys):
    monkeypatch.chdir(default_run.parents[1])
    start(f"--segments 2 {MODEL} --data-size 256 --batch-size 64 --epochs 1")
    out, folder = capsys.readouterr().out, Path("runs/0002")  # 0001 is taken
    summary = out[out.index("summary"):]
    percent = [float(p) for p in re.findall(r"([\d.]+) %", summary)]
    assert percent == [pytest.approx(log(folder / name)[-1]["val_acc"], abs=0.051) for name in ("probe", "probe_random")]
    losses = [float(p) for p in re.findall(r"\d+\.\d{3}", summary)]
    assert losses[0] == pytest.approx(log(folder)[-1]["val_loss"], abs=6e-4) and 0.9 < losses[1] < 1.1
    assert str(folder / "reconstruction.png") in summary


def test_a_set_too_small_for_the_probes_batch_still_gets_its_summary(tmp_path, capsys):
    start(f"--segments 2 {TINY}", tmp_path)  # 64 scenes, and the probe's default batch is 256
    assert "summary" in capsys.readouterr().out


@pytest.mark.slow
def test_python_train_py_works_on_a_fresh_clone_in_about_a_minute(tmp_path):
    begin = time.monotonic()
    done = subprocess.run(command(""), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    summary = done.stdout[done.stdout.index("summary"):]
    loss, baseline = map(float, re.findall(r"\d+\.\d{3}", summary)[:2])
    probe, random = map(float, re.findall(r"([\d.]+) %", summary))
    assert loss < baseline and probe > random + 5
    assert seconds < 200  # 100 s on two free cores


def test_it_says_device_precision_parameters_batch_lr_steps_and_baseline(tmp_path, capsys):
    start(f"{PRETRAIN} --blr 0.004", tmp_path)
    out = capsys.readouterr().out
    count = sum(value.numel() for value in checkpoint(tmp_path)["model"].values())
    assert "cpu" in out and "fp32" in out and f"{count:,}" in out
    assert re.search(r"effective batch 8\b", out) and "actual lr 0.000125" in out  # 0.004 * 8 / 256
    assert re.search(r"steps 16\b", out)
    assert 0.9 < float(re.search(r"predicting the mean of each hidden patch scores ([\d.]+)", out)[1]) < 1.1


def test_the_effective_batch_counts_accumulation(tmp_path, capsys):
    start(f"{PRETRAIN} --blr 0.004 --accum 4", tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"effective batch 32\b", out) and "actual lr 0.0005;" in out  # 0.004 * 32 / 256
    assert re.search(r"steps 4\b", out)


def test_the_first_epoch_already_beats_the_patch_mean(tmp_path):
    result = start("--task pretrain --embed-dim 64 --depth 4 --num-heads 2 --segments 2 --data-size 2048 --batch-size 32 "
                   "--epochs 1 --lr 2e-3", tmp_path)
    assert result["val_loss"] < result["baseline"] - 0.05


def test_a_tiny_vit_memorises_64_images(tmp_path):
    start(f"--task classify {MODEL} --data-size 64 --batch-size 32 --epochs 70 --augment none --lr 3e-3", tmp_path)
    args = train.resolve(train.parse(f"--task classify {MODEL} --augment none".split()))
    model = train.build_model(args, 10)
    model.load_state_dict(checkpoint(tmp_path)["model"])
    source = Shapes(64)
    images, labels, _ = default_collate([Images(source, augmentation("none", (32, 32), source.mean, source.std))[0, i] for i in range(64)])
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.95


def test_bfloat16_on_a_cpu_trains_like_float32(tmp_path):
    losses = [start(f"{PRETRAIN} --epochs 1 --precision {p}", tmp_path / p)["train_loss"] for p in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f"{PRETRAIN} --epochs 1", f"{CLASSIFY} --epochs 1", f"{MIXMIM} --epochs 1"])
def test_compiled_training_gives_the_same_loss(tmp_path, flags):
    eager, compiled = (start(f"{flags} {more}", tmp_path / f"c{more}") for more in ("", "--compile"))
    assert eager["train_loss"] == pytest.approx(compiled["train_loss"], abs=1e-4)
    assert checkpoint(tmp_path / "c")["model"].keys() == checkpoint(tmp_path / "c--compile")["model"].keys()


def test_check_prints_versions_and_ends_well(capsys):
    assert not train.main(["--check"])
    out = capsys.readouterr().out
    assert torch.__version__ in out and "torchvision" in out and "nms works" in out


# ---------------------------------------------------------------------------- interrupted and resumed

MIXED = f"{CLASSIFY} --drop-path 0.3 --mixup 0.8 --cutmix 1.0 --label-smoothing 0.1 --ema 0.9 --layer-decay 0.8 --clip-grad 1"
REFERENCES = {}


def uninterrupted(flags, tmp_path_factory):
    if flags not in REFERENCES:
        REFERENCES[flags] = tmp_path_factory.mktemp("whole")
        start(flags, REFERENCES[flags])
    return REFERENCES[flags]


# 8 steps an epoch and a save after each: saves 1 to 8 are steps, 9 is the end of epoch 1, 18 the end of the run.
# With --accum 3 an epoch has 3 steps, so save 4 is the end of epoch 1.
@pytest.mark.parametrize("number, after", [(3, True), (8, True), (9, False), (9, True), (13, True), (17, True), (18, False)])
@pytest.mark.parametrize("flags", [PRETRAIN, MIXED])
def test_a_run_killed_anywhere_and_resumed_ends_with_the_same_bits(tmp_path, tmp_path_factory, monkeypatch, flags, number, after):
    whole = uninterrupted(flags, tmp_path_factory)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_save(patch, number, after)
        start(f"{flags} --save-minutes 0", tmp_path)
    start("--resume", tmp_path)
    assert_same_bits(checkpoint(tmp_path)["model"], checkpoint(whole)["model"])
    if "ema" in flags:
        assert_same_bits(checkpoint(tmp_path)["ema"], checkpoint(whole)["ema"])
    assert log(tmp_path) == log(whole)


SAM = f"{CLASSIFY} --optimizer sam --rho 0.1 --drop-path 0.3 --clip-grad 1"


@pytest.mark.parametrize("flags, number, workers", [(f"{MIXED} --accum 3", 2, 0), (f"{SAM} --accum 3", 3, 0), (f"{SAM} --base-optimizer sgd", 5, 2), (f"{MIXMIM} --accum 3", 3, 2), (f"{PRETRAIN} --method mae --accum 3", 5, 2), (MIXED, 5, 2)])
def test_accumulation_and_workers_resume_to_the_same_bits(tmp_path, tmp_path_factory, monkeypatch, flags, number, workers):
    whole = uninterrupted(flags, tmp_path_factory)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_save(patch, number, True)
        start(f"{flags} --save-minutes 0 --workers {workers}", tmp_path)
    start(f"--resume --workers {2 - workers}", tmp_path)  # another number of workers is fine
    assert_same_bits(checkpoint(tmp_path)["model"], checkpoint(whole)["model"])
    assert log(tmp_path) == log(whole)


@pytest.mark.slow  # three processes with workers; kills at any save are tested above, in this process
def test_kill_9_with_workers_and_resume_gives_the_same_bits(tmp_path):
    flags = f"{PRETRAIN} --epochs 8"
    run = subprocess.Popen(command(f"{flags} --save-minutes 0 --workers 2 --output-dir {tmp_path / 'cut'}"), cwd=tmp_path,
                           env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    written = tmp_path / "cut" / "log.jsonl"
    limit = time.monotonic() + 60
    while not (written.exists() and '"epoch"' in written.read_text()) and time.monotonic() < limit and run.poll() is None:
        time.sleep(0.01)
    assert run.poll() is None, "the run ended before it could be killed"
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert 1 <= checkpoint(tmp_path / "cut")["schedule"]["step"] < 64
    start(f"--resume --workers 0 {flags}", tmp_path / "cut")  # the run's own flags may be repeated
    start(flags, tmp_path / "whole")
    assert_same_bits(checkpoint(tmp_path / "cut")["model"], checkpoint(tmp_path / "whole")["model"])
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(tmp_path, tmp_path_factory, monkeypatch, capsys, number, code):
    whole = uninterrupted(PRETRAIN, tmp_path_factory)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        on_each_loss(patch, lambda n, model, loss: os.kill(os.getpid(), number) if n == 11 else None)
        start(PRETRAIN, tmp_path)
    assert end.value.code == code
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert checkpoint(tmp_path)["schedule"]["step"] == 11
    out = capsys.readouterr().out
    assert "stopped at step 11" in out and f"--resume --output-dir {tmp_path}" in out
    start("--resume", tmp_path)
    assert "step 11 of 16" in capsys.readouterr().out
    assert_same_bits(checkpoint(tmp_path)["model"], checkpoint(whole)["model"])
    assert log(tmp_path) == log(whole)


def test_a_default_run_killed_in_its_probe_is_resumed_there(tmp_path, default_run, monkeypatch, capsys):
    flags = f"--segments 2 {MODEL} --data-size 256 --batch-size 32 --epochs 2"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_save(patch, 12, True)  # 2 epochs of pre-training, then the probe's tenth
        start(flags, tmp_path)
    assert checkpoint(tmp_path / "probe")["epoch"] == 10
    start("--resume", tmp_path)
    assert "summary" in capsys.readouterr().out
    for part in ("", "probe", "probe_random"):
        assert_same_bits(checkpoint(tmp_path / part)["model"], checkpoint(default_run / part)["model"])
        assert log(tmp_path / part) == log(default_run / part)


def test_a_default_run_stopped_in_its_probe_names_the_folder_that_resumes_all(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_each_loss(patch, lambda n, model, loss: os.kill(os.getpid(), signal.SIGTERM) if n == 20 else None)
        start(f"--segments 2 {MODEL} --data-size 256 --batch-size 32 --epochs 2", tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"--resume --output-dir (\S+)", out)[1] == str(tmp_path)


def test_a_complete_run_resumes_to_nothing(tmp_path, capsys):
    start(PRETRAIN, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    start("--resume", tmp_path)
    assert "complete" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_resume_in_an_empty_folder_starts_afresh(tmp_path, tmp_path_factory):
    start(f"{PRETRAIN} --resume", tmp_path)
    assert_same_bits(checkpoint(tmp_path)["model"], checkpoint(uninterrupted(PRETRAIN, tmp_path_factory))["model"])


def test_the_seed_decides_and_the_number_of_workers_does_not(tmp_path, tmp_path_factory):
    for flags in (PRETRAIN, MIXED):
        whole = checkpoint(uninterrupted(flags, tmp_path_factory))["model"]
        name = "mixed" if flags is MIXED else "pretrain"
        start(f"{flags} --workers 2", tmp_path / name)
        assert_same_bits(whole, checkpoint(tmp_path / name)["model"])
    start(f"{PRETRAIN} --seed 1", tmp_path / "other")
    whole = checkpoint(uninterrupted(PRETRAIN, tmp_path_factory))["model"]
    other = checkpoint(tmp_path / "other")["model"]
    assert not torch.equal(whole["encoder.blocks.0.attn.qkv.weight"], other["encoder.blocks.0.attn.qkv.weight"])


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, tmp_path_factory, monkeypatch):
    real, count = torch.save, [0]

    def save(state, file, *args, **kwargs):
        count[0] += 1
        if count[0] < 2:
            return real(state, file, *args, **kwargs)
        file.write(b"half a checkpoint") if hasattr(file, "write") else Path(file).write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(torch, "save", save)
        start(PRETRAIN, tmp_path)
    assert "No space left on device" in str(end.value.code) and "checkpoint.pt" in str(end.value.code)  # a text means exit code 1
    assert "\n" not in str(end.value.code)
    assert checkpoint(tmp_path)["epoch"] == 1
    assert not list(tmp_path.glob("*.tmp*"))
    start("--resume", tmp_path)
    assert_same_bits(checkpoint(tmp_path)["model"], checkpoint(uninterrupted(PRETRAIN, tmp_path_factory))["model"])


@pytest.mark.parametrize("flags, named", [
    ("--depth 4", "--depth"), ("--lr 0.1", "--lr"), ("--seed 3", "--seed"), ("--epochs 5", "--epochs"), ("--img-size 64", "--img-size"),
    ("--method mae", "--method"), ("--task classify", "--task"), ("--accum 2", "--accum"), ("--probe", "--probe"),
    ("--data-size 128", "--data-size"), ("--mask-ratio 0.5", "--mask-ratio")])
def test_resuming_with_another_flag_is_an_error_that_names_it(pretrained, capsys, flags, named):
    before = {path.name: path.read_bytes() for path in pretrained.iterdir()}
    with pytest.raises(SystemExit) as end:
        start(f"--resume {flags}", pretrained)
    err = capsys.readouterr().err
    assert end.value.code == 2 and named in err and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in pretrained.iterdir()}


# ---------------------------------------------------------------------------- accumulation


def test_accumulated_micro_batches_step_like_one_big_batch(tmp_path):
    flags = f"--task classify {MODEL} --data-size 64 --epochs 1 --optimizer sgd {FLAT}"
    big, small = tmp_path / "big", tmp_path / "small"
    start(f"{flags} --batch-size 16", big)
    start(f"{flags} --batch-size 4 --accum 4", small)
    assert_close(checkpoint(big)["model"], checkpoint(small)["model"], 2e-6)
    assert log(big)[-1]["train_loss"] == pytest.approx(log(small)[-1]["train_loss"], abs=2e-6)


def test_one_accumulated_step_is_the_gradient_of_the_big_batch(tmp_path):
    flags = f"--task classify {MODEL} --data-size 16 --batch-size 4 --accum 4 --epochs 1 --optimizer sgd {FLAT}"
    start(flags, tmp_path)
    model, window = by_hand(flags)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, labels = next(window(16))
    F.cross_entropy(model(images), labels).backward()
    after = checkpoint(tmp_path)["model"]
    for name, param in model.named_parameters():
        torch.testing.assert_close((before[name] - after[name]) / 0.05, param.grad, rtol=0, atol=1e-5)


def by_hand(flags):
    """The model as the run starts it, and its batches of any size in the run's own order."""
    args = train.resolve(train.parse(flags.split()))
    source = open_source("shapes", None, True, (32, 32), args.data_size)
    data = Images(source, augmentation(args.augment, (32, 32), source.mean, source.std), args.seed)
    torch.manual_seed(args.seed)
    model = train.build_model(args, 10)
    keys = [key for batch in TrainBatches(args.data_size, 1, args.seed) for key in batch]

    def windows(*sizes):
        for n in sizes:
            images, labels, _ = default_collate([data[key] for key in keys[:n]])
            del keys[:n]
            yield images, labels
    return model, windows


def test_a_short_last_window_averages_over_its_own_length(tmp_path):
    flags = f"--task classify {MODEL} --data-size 20 --batch-size 4 --accum 4 --epochs 1 --optimizer sgd {FLAT}"
    start(flags, tmp_path)  # 5 batches: a window of 4 and one of 1
    model, windows = by_hand(flags)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in windows(16, 4):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert_close(dict(model.state_dict()), checkpoint(tmp_path)["model"], 2e-6)


# ---------------------------------------------------------------------------- schedule, groups, average


@pytest.mark.parametrize("step, min_lr, expected", [(0, 0, 0), (5, 0, 0.5), (10, 0, 1), (55, 0, 0.5), (100, 0, 0), (55, 0.1, 0.55), (100, 0.1, 0.1),
                                                    (40, 0, 0.75)])  # cos(pi / 3) = 1/2
def test_the_learning_rate_matches_hand_computed_values(step, min_lr, expected):
    assert train.lr_at(step, 100, 10, 1.0, min_lr) == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_full_learning_rate():
    assert train.lr_at(0, 10, 0, 0.3, 0.0) == pytest.approx(0.3)


def test_layer_decay_and_weight_decay_groups_match_the_hand_computed_ones():
    args = train.resolve(train.parse(f"--task classify {MODEL} --layer-decay 0.5 --weight-decay 0.3".split()))
    model = train.build_model(args, 10)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in train.param_groups(model, args):
        for p in group["params"]:
            assert names[id(p)] not in seen
            seen[names[id(p)]] = (group["lr_scale"], group["weight_decay"])
    assert seen.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert seen["patch_embed.proj.weight"] == (0.125, 0.3)  # 0.5 ** 3
    assert seen["cls_token"] == (0.125, 0.0) and seen["pos_embed"] == (0.125, 0.0)
    assert seen["blocks.0.attn.qkv.weight"] == (0.25, 0.3)
    assert seen["blocks.1.mlp.fc1.weight"] == (0.5, 0.3)
    assert seen["blocks.1.norm1.weight"] == (0.5, 0.0)
    assert seen["head.weight"] == (1.0, 0.3) and seen["head.bias"] == (1.0, 0.0)
    assert seen["fc_norm.weight"] == (1.0, 0.0)
    assert all(decay == 0 for name, (_, decay) in seen.items() if name.endswith("bias") or "norm" in name)


def test_layer_decay_counts_the_blocks_of_all_stages():
    args = train.resolve(train.parse("--task classify --model mixmim_demo --layer-decay 0.5 --weight-decay 0.3".split()))
    model = train.build_model(args, 10)  # 2, 2 and 4 blocks
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in train.param_groups(model, args) for p in group["params"]}
    assert seen.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert seen["patch_embed.norm.weight"] == (0.5**9, 0.0) and seen["patch_embed.proj.weight"] == (0.5**9, 0.3)
    assert seen["layers.0.blocks.1.attn.qkv.weight"] == (0.5**7, 0.3)
    assert seen["layers.0.blocks.1.attn.relative_position_bias_table"] == (0.5**7, 0.3)  # decayed, as in the official code
    assert seen["layers.0.downsample.reduction.weight"] == (0.5**6, 0.3)  # with the first block behind it
    assert seen["layers.1.blocks.0.mlp.fc1.weight"] == (0.5**6, 0.3)
    assert seen["layers.2.blocks.3.norm2.bias"] == (0.5, 0.0)
    assert seen["norm.weight"] == (1.0, 0.0) and seen["head.weight"] == (1.0, 0.3)


def test_sam_logs_both_losses_and_trains_other_weights_than_its_base(tmp_path):
    for name, flags in (("sam", "--optimizer sam --rho 0.1"), ("zero", "--optimizer sam --rho 0"), ("plain", "")):
        start(f"{CLASSIFY} {flags}", tmp_path / name)
    lines = [line for line in log(tmp_path / "sam") if "epoch" not in line]
    assert lines and all(line["loss_climbed"] > line["loss"] and line["grad_norm"] > 0 for line in lines)
    sam, zero, plain = (checkpoint(tmp_path / name)["model"] for name in ("sam", "zero", "plain"))
    assert_same_bits(zero, plain)  # rho 0 climbs nowhere
    assert not torch.equal(sam["blocks.0.attn.qkv.weight"], plain["blocks.0.attn.qkv.weight"])


def test_a_non_finite_loss_in_either_of_sams_passes_skips_the_step(tmp_path, monkeypatch):
    seen = []

    def act(number, model, loss):
        seen.append(model.head.weight.detach().clone())
        return loss * math.nan if number in (3, 6) else None  # the first pass of step 2, the second of step 3
    on_each_loss(monkeypatch, act)
    start(f"{CLASSIFY} --optimizer sam --rho 0.1 --epochs 1", tmp_path)
    assert log(tmp_path)[-1]["bad_steps"] == 2
    assert torch.equal(seen[2], seen[4]) and torch.equal(seen[4], seen[6]) and not torch.equal(seen[6], seen[8])


def test_a_mixer_is_trained_and_tuned_from_its_checkpoint(tmp_path, capsys):
    mixer = "--task classify --model mixer_demo --embed-dim 32 --depth 2 --patch-size 8 --data-size 64 --batch-size 8 --epochs 1"
    start(mixer, tmp_path / "a")
    start(f"{mixer} --optimizer sam --layer-decay 0.7 --init {tmp_path / 'a' / 'checkpoint.pt'}", tmp_path / "b")
    assert "missing: none" in capsys.readouterr().out


RESNET = "--task classify --model resnet8 --data-size 64 --batch-size 8 --epochs 1"


def test_a_resnet_is_trained_with_sam_and_tuned_from_its_checkpoint(tmp_path, capsys):
    start(f"{RESNET} --optimizer sam --base-optimizer sgd --lr 0.05", tmp_path / "a")
    start(f"{RESNET} --init {tmp_path / 'a' / 'checkpoint.pt'}", tmp_path / "b")
    assert "missing: none" in capsys.readouterr().out
    assert checkpoint(tmp_path / "a")["model"]["bn1.num_batches_tracked"] == 8  # once a step, though SAM passes twice


def test_the_second_pass_of_sam_sees_the_same_mixed_images_as_the_first(tmp_path, monkeypatch):
    seen = []
    real = train.F.cross_entropy

    def watched(logits, labels, **options):
        if labels.is_floating_point():
            seen.append(labels.detach().clone())
        return real(logits, labels, **options)
    monkeypatch.setattr(train.F, "cross_entropy", watched)
    start(f"{CLASSIFY} --epochs 1 --optimizer sam --mixup 0.8", tmp_path)
    assert len(seen) == 16 and all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2]))
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("model", [MODEL, "--model resnet8", "--model mixer_demo --patch-size 8 --embed-dim 32 --depth 2"])
def test_supervised_contrast_trains_an_encoder_that_can_be_probed(tmp_path, capsys, model):
    sizes = "--data-size 64 --batch-size 16"
    start(f"--task classify {model} {sizes} --epochs 2 --loss supcon", tmp_path / "a")
    lines = log(tmp_path / "a")
    assert "val_acc" not in lines[-1] and 0 < lines[-1]["val_loss"] < 10
    start(f"--task classify {model} {sizes} --epochs 2 --probe --init {tmp_path / 'a' / 'checkpoint.pt'}", tmp_path / "b")
    assert "missing: none" in capsys.readouterr().out and "val_acc" in log(tmp_path / "b")[-1]
    trained, probed = (checkpoint(tmp_path / name)["model"] for name in "ab")
    assert all(torch.equal(probed[name.removeprefix("encoder.")], value) for name, value in trained.items() if name.startswith("encoder."))


def test_supervised_contrast_judges_batches_of_several_classes_and_no_single_image(tmp_path):
    for k in range(4):  # a folder is sorted by class
        for part, count in (("train", 8), ("val", 17 if k == 3 else 16)):
            (tmp_path / part / str(k)).mkdir(parents=True)
            for i in range(count):
                to_pil_image(torch.rand(3, 32, 32)).save(tmp_path / part / str(k) / f"{i}.png")
    start(f"{CLASSIFY} --epochs 1 --batch-size 16 --data folder --data-path {tmp_path} --loss supcon", tmp_path / "run")
    args = train.resolve(train.parse(f"{CLASSIFY} --loss supcon".split()))
    model = train.build_model(args, 4).eval()
    model.load_state_dict(checkpoint(tmp_path / "run")["model"])
    source = open_source("folder", str(tmp_path), False, (32, 32))
    plain, order, total = augmentation("none", (32, 32), source.mean, source.std), train.first_of_shuffle(65, 65), 0
    for some in (order[:16], order[16:32], order[32:48], order[48:]):
        imgs, labels = default_collate([(plain(source[i][0]), source[i][1]) for i in some])
        with torch.no_grad():
            total += model(imgs[:, None], labels).loss.item() * len(some) / 65
    assert log(tmp_path / "run")[-1]["val_loss"] == pytest.approx(total, abs=1e-4)


def test_supervised_contrast_groups_its_encoder_as_classification_does():
    groups = {}
    for loss in ("supcon", "cross-entropy"):
        args = train.resolve(train.parse(f"{CLASSIFY} --layer-decay 0.5 --loss {loss}".split()))
        model = train.build_model(args, 10)
        names = {param: name.removeprefix("encoder.") for name, param in model.named_parameters()}
        groups[loss] = {names[p]: (g["weight_decay"], g["lr_scale"]) for g in train.param_groups(model, args) for p in g["params"]}
    shared = [name for name in groups["supcon"] if not name.startswith("head.")]
    assert len(shared) > 20 and all(groups["supcon"][name] == groups["cross-entropy"][name] for name in shared)
    assert {value[1] for name, value in groups["supcon"].items() if name.startswith("head.")} == {1.0}


def test_a_gradient_that_is_not_finite_counts_as_a_bad_step_of_sam(tmp_path, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan
    on_each_loss(monkeypatch, lambda number, model, loss: Poison.apply(loss) if number in (3, 6) else None)
    start(f"{CLASSIFY} --optimizer sam --rho 0.1 --epochs 1", tmp_path)
    assert log(tmp_path)[-1]["bad_steps"] == 2


def test_sam_logs_the_gradients_norm_before_it_is_clipped(tmp_path):
    for name, flags in (("clipped", "--clip-grad 0.01"), ("free", "")):
        start(f"{CLASSIFY} --epochs 2 --optimizer sam {flags} --lr 0 --min-lr 0", tmp_path / name)
    clipped, free = ([line["grad_norm"] for line in log(tmp_path / name) if "grad_norm" in line] for name in ("clipped", "free"))
    assert clipped == free and clipped[0] > 0.01


def test_supervised_contrast_gets_two_different_views_of_each_image(tmp_path, monkeypatch):
    seen = []
    forward = train.SupCon.forward
    monkeypatch.setattr(train.SupCon, "forward", lambda self, views, labels=None: seen.append(views) or forward(self, views, labels))
    start(f"{CLASSIFY} --loss supcon --epochs 1", tmp_path)
    assert seen[0].shape == (8, 2, 3, 32, 32) and not torch.equal(seen[0][:, 0], seen[0][:, 1])


def test_the_adversarial_objective_is_the_loss_on_fgsms_images():
    args = train.resolve(train.parse(f"{CLASSIFY} --model resnet8 --adversarial --attack-eps 6".replace(MODEL, "").split()))
    args.num_classes = 10
    torch.manual_seed(0)
    model = train.build_model(args, 10)
    pixels, labels, scale = torch.rand(8, 3, 32, 32), torch.arange(8), dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    imgs = train.v2.functional.normalize(pixels, **scale)
    before = model.bn1.running_mean.clone()
    torch.manual_seed(1)
    loss = train.make_objective(model, args, model, *scale.values())(imgs, labels, None)
    moved = model.bn1.running_mean.clone()
    with torch.no_grad():
        model.bn1.running_mean.copy_(before)
    torch.manual_seed(1)
    attacked = train.fgsm(model, imgs, labels, 6 / 255, **scale)
    with torch.no_grad():
        model.bn1.running_mean.copy_(before)
    torch.testing.assert_close(loss, F.cross_entropy(model(attacked), labels))
    torch.testing.assert_close(model.bn1.running_mean, moved)  # once, by the attacked images: the attack itself leaves no trace
    args.adversarial = False
    assert loss > train.make_objective(model, args)(imgs, labels, None)


def test_robustness_at_the_end_is_what_the_functions_say_of_the_saved_model(tmp_path):
    start(f"{RESNET} --epochs 2 --eval-corruptions --eval-pgd --attack-eps 2", tmp_path)
    first, last = [line for line in log(tmp_path) if "epoch" in line]
    assert "pgd_acc" not in first and "corrupted_acc" not in first
    args = train.resolve(train.parse(RESNET.split()))
    model = train.build_model(args, 10).eval()
    model.load_state_dict(checkpoint(tmp_path)["model"])
    scenes = open_source("shapes", None, False, (32, 32), size=64)
    plain, table, right = augmentation("none", (32, 32), Shapes.mean, Shapes.std), [], 0
    for first in (0, 8):  # the batches of the run
        imgs, labels = default_collate([(plain(scenes[i][0]), scenes[i][1]) for i in range(first, first + 8)])
        scale = dict(mean=Shapes.mean, std=Shapes.std)
        table.append(train.mean_accuracy(train.corruption_accuracy(model, imgs, labels, batch_size=8, **scale)))
        attacked = train.pgd(model, imgs, labels, 2 / 255, generator=torch.Generator().manual_seed(0), **scale)
        right += (model(attacked).argmax(1) == labels).sum().item()
    assert last["corrupted_acc"] == pytest.approx(100 * sum(table) / 2, abs=1e-3)
    assert last["pgd_acc"] == pytest.approx(100 * right / 16, abs=1e-3)


def test_evaluation_may_be_rarer_than_epochs(tmp_path):
    start(f"{CLASSIFY} --epochs 5 --eval-every 2", tmp_path)
    assert [line["epoch"] for line in log(tmp_path) if "val_acc" in line] == [2, 4, 5]


def test_evaluation_may_be_on_part_of_the_validation_set(tmp_path, monkeypatch):
    seen = []
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, loader, *rest: (seen.append([i for batch in loader.batch_sampler for _, i in batch]),
                                                                         seen.append(loader.dataset.indices), evaluate(model, loader, *rest))[-1])
    some = start(f"{CLASSIFY} --epochs 1 --data-size 64 --val-images 5", tmp_path / "some")
    assert seen == [list(range(5)), train.first_of_shuffle(16, 5)]
    assert some["val_acc"] in [20.0 * k for k in range(6)]
    whole = start(f"{CLASSIFY} --epochs 1 --data-size 64", tmp_path / "whole")
    assert seen[3] == list(range(16)) and whole["val_loss"] != some["val_loss"]
    assert_same_bits(checkpoint(tmp_path / "some")["model"], checkpoint(tmp_path / "whole")["model"])


def test_mirl_without_pairing_trains_by_plain_deep_supervision(tmp_path):
    start(f"{PRETRAIN} --method mirl --no-pairing --epochs 1", tmp_path)
    saved = checkpoint(tmp_path)
    args = train.argparse.Namespace(**saved["args"])
    model = train.build_model(args, 10, resumed=True)
    assert args.no_pairing and not model.pairing
    paired = train.build_model(train.argparse.Namespace(**{**saved["args"], "no_pairing": False}), 10, resumed=True)
    paired.load_state_dict(saved["model"])  # the same tensors, another loss
    assert paired.pairing and (tmp_path / "reconstruction.png").stat().st_size > 10_000


def test_the_linear_schedule_matches_hand_computed_values():
    values = [train.lr_at(step, 100, 10, 1.0, 0.1, "linear") for step in (5, 10, 55, 100)]
    assert values == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_the_weight_average_matches_hand_computed_values():
    update = train.ema_update(0.9)
    for step, expected in ((0, 1.9), (8, 1.5), (10_000, 1.1)):  # d = 0.1, 9/18, and the limit 0.9
        average = torch.tensor([1.0])
        update([average], [torch.tensor([2.0])], torch.tensor(step))
        assert average.item() == pytest.approx(expected)


# ---------------------------------------------------------------------------- non-finite losses


def test_a_non_finite_loss_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    weights = {}

    def act(number, model, loss):
        weights[number] = {name: value.clone() for name, value in model.state_dict().items()}
        return loss * math.nan if number in (3, 4) else loss * math.inf if number == 11 else None

    on_each_loss(monkeypatch, act)
    start(PRETRAIN, tmp_path)
    for number in range(2, 16):  # weights[n] are those with which loss n was computed
        moved = any(not torch.equal(weights[number][name], weights[number + 1][name]) for name in weights[number])
        assert moved == (number not in (3, 4, 11))
    epochs = [line for line in log(tmp_path) if "epoch" in line]
    assert [line["bad_steps"] for line in epochs] == [2, 3]
    assert all(math.isfinite(line["train_loss"]) for line in epochs)
    assert "non-finite loss at step 3" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["model"].values())


def test_non_finite_losses_in_a_row_stop_the_run_with_step_and_lr(tmp_path, monkeypatch):
    on_each_loss(monkeypatch, lambda number, model, loss: loss * math.nan if number > 8 else None)
    with pytest.raises(SystemExit) as end:
        start(f"{PRETRAIN} {FLAT}", tmp_path)
    message = str(end.value.code)
    assert f"step {8 + train.MAX_BAD_STEPS}" in message and "lr 0.05" in message and "\n" not in message
    assert checkpoint(tmp_path)["epoch"] == 1  # what was good is kept


# ---------------------------------------------------------------------------- probes and starting weights


def test_a_probe_changes_the_head_and_nothing_else(pretrained, tmp_path, capsys):
    flags = f"--task classify --probe {TINY} --init {pretrained / 'checkpoint.pt'}"
    start(flags, tmp_path)
    out = capsys.readouterr().out
    assert "trainable: head" in out and "frozen: cls_token, pos_embed, patch_embed, blocks" in out and "mean of patch tokens" in out
    assert "RANDOM" not in out
    before, after = checkpoint(pretrained)["model"], checkpoint(tmp_path)["model"]
    shared = [name for name in after if f"encoder.{name}" in before]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"} <= set(shared)
    assert all(torch.equal(after[name], before[f"encoder.{name}"]) for name in shared)
    torch.manual_seed(0)
    fresh = train.build_model(train.resolve(train.parse(flags.split())), 10).state_dict()
    changed = {name for name in after if not torch.equal(after[name], fresh[name])}
    assert changed and all(name.startswith("head.") for name in changed)


def test_a_probe_without_init_says_that_the_encoder_is_random(tmp_path, capsys):
    start(f"--task classify --probe --pool cls {TINY}", tmp_path)
    out = capsys.readouterr().out
    assert "RANDOM" in out and "class token" in out


def test_a_probe_with_the_fine_tuning_flags_still_runs(tmp_path):
    start(f"--task classify --probe {TINY} --label-smoothing 0.1 --drop-path 0.1 --ema 0.9", tmp_path)
    assert 0 <= log(tmp_path)[-1]["val_acc"] <= 100 and "ema" in checkpoint(tmp_path)


def test_a_probe_refuses_mixup_or_mixes_features_but_does_not_crash(tmp_path, capsys):
    try:
        start(f"--task classify --probe {TINY} --mixup 0.8 --cutmix 1.0", tmp_path)
    except SystemExit as end:
        assert end.code == 2 and "mixup" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--task pretrain --method mae", "--task pretrain --method mirl --segments 2", "--task pretrain --method mirl --segments 2 --checkpointing",
    "--task classify --pool mean", "--task classify --pool cls", "--task classify --probe", "--task pretrain --method mixmim --model vit_demo",
    *(f"--task pretrain {SMALL_MIXMIM} {more}" for more in ("", "--fill mask", "--single", "--open-attention", "--mask-per-cycle", "--shift")),
    f"--task classify {SMALL_MIXMIM}", f"--task classify --probe {SMALL_MIXMIM}"])
def test_every_trainable_tensor_gets_a_gradient(flags):
    args = train.resolve(train.parse(f"{flags} {'' if SMALL_MIXMIM in flags else MODEL}".split()))
    args.num_classes = 10
    torch.manual_seed(0)
    model = train.build_model(args, 10)
    train.make_objective(model, args)(torch.randn(4, 3, 32, 32), torch.arange(4), torch.rand(4, (32 // args.mask_patch_size) ** 2)).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen


def test_init_from_our_own_pretraining_at_another_image_size_resizes_the_positions(pretrained, tmp_path, capsys):
    start(f"--task classify --probe {TINY} --img-size 48 32 --init {pretrained / 'checkpoint.pt'}", tmp_path)
    assert "pos_embed 4x4 -> 6x4" in capsys.readouterr().out
    assert checkpoint(tmp_path)["model"]["pos_embed"].shape == (1, 25, 32)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    start(MIXMIM, folder)
    return folder


def test_mixmim_pretrains_and_shows_both_images_of_a_mixture(mixed):
    assert (mixed / "reconstruction.png").stat().st_size > 1000
    lines = [line for line in log(mixed) if "epoch" in line]
    assert len(lines) == 2 and all(math.isfinite(line["train_loss"]) and math.isfinite(line["val_loss"]) for line in lines)
    assert json.loads((mixed / "args.json").read_text())["model"] == "mixmim_demo"


@pytest.mark.parametrize("flags", ["--probe", "--layer-decay 0.7"])
def test_mixmims_encoder_is_probed_and_tuned_at_another_size(mixed, tmp_path, capsys, flags):
    start(f"--task classify {SMALL_MIXMIM} --img-size 48 32 --window-size 6 6 3 --data-size 64 --batch-size 8 --epochs 1 {flags} "
          f"--init {mixed / 'checkpoint.pt'}", tmp_path)
    out = capsys.readouterr().out
    assert "absolute_pos_embed 8x8 -> 12x8" in out and "mean of tokens" in out and "missing: none" in out
    before, after = (checkpoint(folder)["model"] for folder in (mixed, tmp_path))
    assert torch.equal(before["encoder.layers.1.blocks.0.attn.qkv.weight"], after["layers.1.blocks.0.attn.qkv.weight"]) == ("probe" in flags)


def test_a_plain_vit_pretrained_by_mixmim_is_tuned_without_class_token(tmp_path, capsys):
    start(f"--task pretrain --method mixmim --model vit_demo {TINY}", tmp_path / "a")
    start(f"{CLASSIFY} --method mixmim --model vit_demo --init {tmp_path / 'a' / 'checkpoint.pt'}", tmp_path / "b")
    assert "missing: none" in capsys.readouterr().out
    assert "cls_token" not in checkpoint(tmp_path / "b")["model"]


@pytest.mark.parametrize("flags", ["--fill mask", "--single", "--open-attention", "--mask-per-cycle", "--raw-pixels", "--shift --checkpointing"])
def test_every_form_of_mixmim_trains_and_draws_its_picture(tmp_path, flags):
    start(f"{MIXMIM} --epochs 1 {flags}", tmp_path)
    assert math.isfinite(log(tmp_path)[-1]["val_loss"]) and (tmp_path / "reconstruction.png").exists()


def test_mixmim_without_a_task_pretrains_and_probes_also_its_contrasts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(f"{SMALL_MIXMIM} --fill mask --data-size 64 --batch-size 8 --epochs 1")
    assert "after pre-training by mixmim" in capsys.readouterr().out


def test_the_last_image_of_a_validation_set_is_not_left_without_a_partner(tmp_path):
    start(f"{MIXMIM} --epochs 1 --batch-size 5", tmp_path)  # 16 validation images: 5, 5, 6
    assert math.isfinite(log(tmp_path)[-1]["val_loss"])


@pytest.mark.parametrize("flags, word", [(f"{SMALL_MIXMIM} --shift", "without --shift"), ("--model vit_demo --method mixmim", "class token"),
                                         ("--model vit_demo", "class token")])
def test_init_from_another_kind_of_encoder_is_refused_where_no_tensor_would_tell(mixed, pretrained, tmp_path, capsys, flags, word):
    init = pretrained
    if flags == "--model vit_demo":
        init = tmp_path / "a"
        start(f"--task pretrain --method mixmim --model vit_demo {TINY} --epochs 1", init)
    elif "--shift" in flags:
        init = mixed
    with pytest.raises(SystemExit):
        start(f"--task classify {flags} {'' if '--shift' in flags else MODEL} --data-size 64 --batch-size 8 --init {init / 'checkpoint.pt'}", tmp_path / "b")
    assert word in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_validation_set_of_one_image_is_refused_before_the_run(tmp_path, capsys):
    for part, count in (("train", 8), ("val", 1)):
        (tmp_path / "set" / part / "cat").mkdir(parents=True)
        for n in range(count):
            to_pil_image(Shapes(12).images[n]).save(tmp_path / "set" / part / "cat" / f"{n}.png")
    flags = f"--task pretrain {SMALL_MIXMIM} --batch-size 4 --epochs 1 --data folder --data-path {tmp_path / 'set'}"
    with pytest.raises(SystemExit):
        start(flags, tmp_path / "run")
    assert "validation set has 1 images" in capsys.readouterr().err and not (tmp_path / "run").exists()
    start(f"{flags} --fill mask", tmp_path / "run")


def test_init_from_a_file_in_maes_layout(tmp_path, capsys):
    import argparse
    encoder = create_vit("vit_demo", embed_dim=32, depth=2, num_heads=2, patch_size=8, num_classes=0).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 32), "decoder_pred.weight": torch.zeros(192, 16)}
    torch.save({"model": {**encoder, **decoder}, "args": argparse.Namespace(model="mae_vit"), "epoch": 3}, tmp_path / "mae.pth")
    start(f"--task classify --probe {TINY} --init {tmp_path / 'mae.pth'}", tmp_path / "run")
    assert "[MAE]" in capsys.readouterr().out
    after = checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(after[name], value) for name, value in encoder.items() if name in after and not name.startswith("norm."))


# ---------------------------------------------------------------------------- detection


DETECT = "--task detect --data-size 16 --epochs 2 --batch-size 4 --img-size 48 --depth 4 --embed-dim 32 --num-heads 2"


@pytest.fixture(scope="module")
def detected(tmp_path_factory):
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("detected")
    start(DETECT, folder)
    return folder


def test_detection_leaves_average_precision_pictures_and_a_checkpoint_that_loads(detected):
    last = log(detected)[-1]
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap50", "proposal_recall"} <= set(last) and "val_loss" not in last
    assert all(-100 <= last[key] <= 100 for key in ("box_ap", "mask_ap50")) and (detected / "detections.png").exists()
    model = train.build_model(train.resolve(train.parse(DETECT.split())), 10)
    model.load_state_dict(checkpoint(detected)["model"])


def test_detections_figures_are_those_of_the_saved_model(detected):
    args = train.resolve(train.parse(DETECT.split()))
    model = train.build_model(args, 10)
    model.load_state_dict(checkpoint(detected)["model"])
    scenes = train.Detections(train.open_scenes(args, train=False))
    loader = train.make_loader(scenes, train.EvalBatches(4, 3), 0, torch.device("cpu"), train.as_lists)
    figures = train.evaluate_detection(model, loader, scenes, train.World("cpu"), train.nullcontext())
    for key, value in figures.items():  # in batches of another size
        assert log(detected)[-1][key] == pytest.approx(value, abs=1e-3)


def test_detection_killed_and_resumed_ends_with_the_same_bits(detected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_save(patch, 1, True)
        with pytest.raises(Killed):
            start(DETECT, tmp_path)
    start("--resume", tmp_path)
    assert_same_bits(checkpoint(detected)["model"], checkpoint(tmp_path)["model"])


def test_detection_starts_from_an_encoder_pretrained_at_another_size(tmp_path, capsys):
    sizes = "--embed-dim 32 --depth 4 --num-heads 2 --patch-size 8"
    start(f"--task pretrain --segments 2 {sizes} --img-size 32 --data-size 32 --batch-size 8 --epochs 1", tmp_path / "pre")
    start(f"--task detect --data-size 8 --epochs 1 --img-size 48 {sizes} --optimizer sam --jitter 0.5 2 --init {tmp_path / 'pre' / 'checkpoint.pt'}",
          tmp_path / "run")
    out = capsys.readouterr().out
    assert re.search(r"absolute table +4x4 +-> resized to 6x6, trains", out) and re.search(r"bias of \w+ blocks +none +-> zeros", out)


def beit_file(path):
    """A BEiT of the size of DETECT's encoder, as its authors save it: no positions, one bias for all blocks, layer scale."""
    vit = create_vit("vit_demo", img_size=32, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=0, pos_embed=None, rel_pos_bias="shared",
                     layer_scale=0.1)
    state = vit.state_dict()
    for i in range(4):
        q, _, v = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
    torch.save({"model": state}, path)


@pytest.mark.parametrize("flags", [DETECT, "--task classify --data-size 16 --epochs 1 --batch-size 4 --img-size 48 --patch-size 8 --depth 4 --embed-dim 32 --num-heads 2"])
def test_a_beit_is_built_with_its_bias_and_layer_scale(tmp_path, capsys, flags):
    pytest.importorskip("pycocotools")
    beit_file(tmp_path / "beit.pth")
    start(f"{flags} --epochs 1 --init {tmp_path / 'beit.pth'}", tmp_path / "run")
    names, out = checkpoint(tmp_path / "run")["model"], capsys.readouterr().out
    assert any(name.endswith("blocks.3.gamma_2") for name in names) and "[BEiT]" in out
    if flags == DETECT:
        assert re.search(r"absolute table +none +-> random, 6x6", out) and re.search(r"global blocks +4x4, shared +-> resized to 6x6", out)
    else:
        assert "rel_pos_bias.relative_position_bias_table" in names


def test_the_training_images_alone_are_evaluated_where_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    judged = []
    real = train.coco_evaluate
    monkeypatch.setattr(train, "coco_evaluate", lambda *args: judged.append((len(args[2].imgs), args[6])) or real(*args))
    start(f"{DETECT} --epochs 1 --eval-train --train-images 5", tmp_path)
    assert judged == [(16, first_of_shuffle(16, 5))] and log(tmp_path)[-1]["box_ap"] >= 0


def test_jitter_can_be_turned_off_and_stays_off_when_the_run_is_resumed():
    coco = ["--task", "detect", "--data", "coco", "--model", "vit_demo"]
    assert train.resolve(train.parse(coco)).jitter == [0.1, 2.0]
    off = train.resolve(train.parse([*coco, "--jitter", "0", "0"]))
    assert off.jitter == [0, 0] and train.resolve({**vars(off), "resume": True}).jitter == [0, 0]


def test_a_run_resumes_without_data_path_and_init_file(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    beit_file(tmp_path / "beit.pth")
    start(f"{DETECT} --init {tmp_path / 'beit.pth'}", tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at_save(patch, 1, True)
        with pytest.raises(Killed):
            start(f"{DETECT} --init {tmp_path / 'beit.pth'}", tmp_path / "run")
    (tmp_path / "beit.pth").unlink()
    start("--resume", tmp_path / "run")
    assert_same_bits(checkpoint(tmp_path / "whole")["model"], checkpoint(tmp_path / "run")["model"])


def test_detection_without_pycocotools_stops_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(SystemExit) as stopped:
        start(DETECT, tmp_path / "run")
    assert stopped.value.code == 2 and "pip install pycocotools" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("options, flags, words", [
    (dict(patch_size=4), "", "add --patch-size 4"), (dict(), "--no-rel-pos", "--no-rel-pos has no place"),
    (dict(), "--method mixmim --model vit_demo", "--method mixmim has no place"), (dict(rel_pos_bias="block"), "", "take the pre-trained file")])
def test_a_beit_that_does_not_fit_the_flags_is_named(tmp_path, capsys, options, flags, words):
    pytest.importorskip("pycocotools")
    sizes = dict(img_size=32, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=0)
    model = create_vit("vit_demo", **{**sizes, "pos_embed": None, "rel_pos_bias": "shared", "layer_scale": 0.1, **options})
    torch.save({"model": model.state_dict()}, tmp_path / "beit.pth")
    with pytest.raises(SystemExit) as stopped:
        start(f"{DETECT} --patch-size 8 {flags} --init {tmp_path / 'beit.pth'}", tmp_path / "run")
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_detector_is_no_start(detected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start(f"{DETECT} --init {detected / 'checkpoint.pt'}", tmp_path / "run")
    assert "of a detector or a segmentation network" in capsys.readouterr().err


def test_class_agnostic_detection_has_one_class(tmp_path):
    pytest.importorskip("pycocotools")
    start(f"{DETECT} --epochs 1 --class-agnostic", tmp_path)
    assert checkpoint(tmp_path)["model"]["roi_heads.box_predictor.cls_score.weight"].shape[0] == 2
    assert 0 <= log(tmp_path)[-1]["proposal_recall"] <= 100


@pytest.mark.parametrize("model", ["--model mixmim_demo", "--model resnet18 --img-size 64", "--pyramid simple --norm layer",
                                   "--pyramid single --global-blocks none --window-size 3 --no-rel-pos --checkpointing"])
def test_other_detectors_train_a_step(tmp_path, model):
    pytest.importorskip("pycocotools")
    small = "--img-size 48 --depth 4 --embed-dim 32 --num-heads 2" if "--model" not in model else ""
    start(f"--task detect --data-size 4 --epochs 1 {small} {model}", tmp_path)
    assert math.isfinite(log(tmp_path)[-1]["train_loss"])


def test_detection_spares_positions_and_norms_from_decay():
    args = train.resolve(train.parse(DETECT.split()))
    model = train.build_model(args, 10)
    names = {param: name for name, param in model.named_parameters()}
    spared = {names[p] for group in train.param_groups(model, args) if group["weight_decay"] == 0 for p in group["params"]}
    tables = [name for name in names.values() if name.endswith(("pos_embed", "relative_position_bias_table"))]
    assert len(tables) == 2 and set(tables) <= spared and all(name in spared for name in names.values() if name.endswith(("bias", "norm1.weight")))
    assert "roi_heads.box_predictor.cls_score.weight" not in spared


# ---------------------------------------------------------------------------- segmentation


SEGMENT = "--task segment --data-size 16 --epochs 2 --batch-size 4 --img-size 48 --depth 4 --embed-dim 32 --num-heads 2 --channels 16"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmented")
    start(SEGMENT, folder)
    return folder


def test_segmentation_leaves_mean_iou_and_pictures_and_its_figures_are_those_of_the_saved_model(segmented):
    args = train.resolve(train.parse(SEGMENT.split()))
    model = train.build_model(args, 11)
    model.load_state_dict(checkpoint(segmented)["model"])
    data = train.Segmentations(train.open_scenes(args, train=False), (48, 48), False)
    loader = train.make_loader(data, train.EvalBatches(4, 3), 0, torch.device("cpu"))
    figures = train.evaluate_segmentation(model, loader, data.source.classes, args, train.World("cpu"), train.nullcontext())
    assert set(figures) == {"miou", "pixel_acc"} and (segmented / "segments.png").exists()
    for key, value in figures.items():  # in batches of another size
        assert log(segmented)[-1][key] == pytest.approx(value, abs=1e-3)


def test_segmentation_killed_and_resumed_ends_with_the_same_bits(segmented, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_save(patch, 1, True)
        with pytest.raises(Killed):
            start(SEGMENT, tmp_path)
    start("--resume", tmp_path)
    assert_same_bits(checkpoint(segmented)["model"], checkpoint(tmp_path)["model"])


@pytest.mark.parametrize("model", ["--model mixmim_demo --layer-decay 0.7", "--model resnet18 --img-size 64", "--optimizer sam --pyramid simple --norm layer --jitter 0.5 2",
                                   "--global-blocks quarters --window-size 3 --slide 32 16 --eval-flip --checkpointing --ema 0.9 --eval-train --train-images 5"])
def test_other_segmenters_train_a_step(tmp_path, model):
    small = "--img-size 48 --depth 4 --embed-dim 32 --num-heads 2" if "--model" not in model else ""
    start(f"--task segment --data-size 8 --epochs 1 --batch-size 4 {small} {model}", tmp_path)
    assert math.isfinite(log(tmp_path)[-1]["train_loss"]) and 0 <= log(tmp_path)[-1]["miou"] <= 100


@pytest.mark.parametrize("model", ["mixmim_demo", "resnet18"])
def test_segmentation_with_other_encoders_resumes(tmp_path, model):
    start(f"--task segment --model {model} --img-size 64 --channels 8 --data-size 4 --batch-size 4 --epochs 1", tmp_path)
    start("--resume", tmp_path)
    assert len([line for line in log(tmp_path) if "epoch" in line]) == 1


def test_segmentation_starts_from_an_encoder_pretrained_at_another_size(tmp_path, capsys):
    sizes = "--embed-dim 32 --depth 4 --num-heads 2 --patch-size 8"
    start(f"--task pretrain --segments 2 {sizes} --img-size 32 --data-size 32 --batch-size 8 --epochs 1", tmp_path / "pre")
    start(f"--task segment --data-size 8 --batch-size 4 --epochs 1 --img-size 48 {sizes} --init {tmp_path / 'pre' / 'checkpoint.pt'}", tmp_path / "run")
    assert re.search(r"absolute table +4x4 +-> resized to 6x6, trains", capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["ade20k", "coco"])
def test_folders_of_masks_are_trained_on_with_images_of_different_sizes(tmp_path, layout):
    images, masks = {"ade20k": ("images/{}", "annotations/{}"), "coco": ("{}", "semantic_{}")}[layout]
    for split in ("training", "validation") if layout == "ade20k" else ("train2017", "val2017"):
        for k, size in enumerate([(40, 60), (60, 40), (50, 50), (33, 70)]):
            for folder, content in ((images, torch.rand(3, *size)), (masks, torch.randint(0, 3, (1, *size), dtype=torch.uint8))):
                (tmp_path / folder.format(split)).mkdir(parents=True, exist_ok=True)
                to_pil_image(content).save(tmp_path / folder.format(split) / f"{k}.{'jpg' if len(content) == 3 else 'png'}")
    if layout == "coco":
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "semantic_categories.json").write_text(json.dumps({"categories": [
            dict(id=k + 1, name=f"thing {k}", train_id=k) for k in range(2)]}))
    start(f"{SEGMENT} --epochs 1 --data {layout} --data-path {tmp_path}", tmp_path / "run")
    assert 0 <= log(tmp_path / "run")[-1]["miou"] <= 100 and (tmp_path / "run" / "segments.png").exists()


def test_layer_decay_reaches_the_blocks_inside_a_pyramid():
    args = train.resolve(train.parse([*SEGMENT.split(), "--layer-decay", "0.5"]))
    model = train.build_model(args, 11)
    names = {param: name for name, param in model.named_parameters()}
    scale = {names[p]: group["lr_scale"] for group in train.param_groups(model, args) for p in group["params"]}
    assert scale["pyramid.vit.patch_embed.proj.weight"] == 0.5**5 and scale["pyramid.vit.blocks.3.mlp.fc1.weight"] == 0.5
    assert scale["conv_seg.1.weight"] == scale["ppm.bottleneck.0.weight"] == scale["pyramid.scales.1.weight"] == 1.0


# ---------------------------------------------------------------------------- dry runs and recipes


def dry_run(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(f"{flags} --dry-run")
    assert not list(tmp_path.iterdir())
    return capsys.readouterr().out


@pytest.mark.parametrize("flags, expected", [
    ("--model vit_b16 --task classify --img-size 224 --data folder --train-images 1281167", "17.564 G"),
    ("--model vit_b16 --task pretrain --method mae --img-size 224 --decoder-embed-dim 512 --decoder-depth 8 --decoder-num-heads 16 --data cifar10",
     "9.781 G"),
    ("--model mixmim_b --task classify --data folder --train-images 1281167", "16.316 G"),
    ("--model resnet50 --task classify --data folder --train-images 1281167", "4.089 G")])  # as torchvision's documentation has it
def test_a_dry_run_prints_the_golden_multiply_adds_and_touches_nothing(tmp_path, capsys, monkeypatch, flags, expected):
    out = dry_run(flags, capsys, tmp_path, monkeypatch)
    assert expected in out
    for word in ("parameters", "steps", "memory", "device-hours"):
        assert word in out


def test_a_dry_run_counts_both_passes_of_sam_and_those_of_an_attack(tmp_path, capsys, monkeypatch):
    hours = [float(re.search(r"device-hours ([\d.e-]+)", dry_run(f"--task classify --model resnet8 {flags}", capsys, tmp_path, monkeypatch))[1])
             for flags in ("", "--optimizer sam", "--adversarial", "--optimizer sam --adversarial")]
    assert [value / hours[0] for value in hours] == pytest.approx([1, 2, 2, 4], rel=1e-2)


def test_a_dry_run_counts_steps_and_device_hours_by_hand(tmp_path, capsys, monkeypatch):
    flags = "--task classify --model vit_b16 --data folder --data-path /nowhere --train-images 1000 --batch-size 16 --accum 4 --epochs 3 --tflops 50"
    out = dry_run(flags, capsys, tmp_path, monkeypatch)
    assert re.search(r"steps +48 of 64 images", out)  # 62 batches, 16 windows (the last one short), 3 epochs
    hours = float(re.search(r"device-hours ([\d.e-]+)", out)[1])
    assert hours == pytest.approx(2 * 17.564e9 * 3 * 3 * 992 / 50e12 / 3600, rel=0.05)  # 992 images an epoch


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.txt")) or [pytest.param(None, marks=pytest.mark.skip("no recipes"))],
                         ids=lambda path: path.stem if path else "none")
def test_every_recipe_passes_a_dry_run(tmp_path, capsys, monkeypatch, recipe):
    assert "multiply-adds" in dry_run(f"@{recipe}", capsys, tmp_path, monkeypatch)


def test_the_readmes_table_of_mixmims_settings_says_what_the_recipes_do():
    rows = re.findall(r"^\| `((?:pre|fine)\w+)\.([\w *]+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    assert {recipe for recipe, _, _ in rows} == {"pretrain", "finetune", "finetune_384"} and len(rows) > 20
    recipes = {recipe: train.resolve(train.parse([f"@{ROOT / 'recipes' / f'mixmim_b_{recipe}.txt'}"])) for recipe in {row[0] for row in rows}}
    for recipe, setting, stated in rows:
        values = [getattr(recipes[recipe], key) for key in setting.split(" * ")]
        value = math.prod(values) if len(values) > 1 else values[0]
        assert value == ast.literal_eval(stated), (recipe, setting)


def test_the_readmes_table_of_detections_settings_says_what_recipe_and_detector_do():
    rows = re.findall(r"^\| `(detect|detector)\.(?!py`)([\w *]+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    args = train.resolve(train.parse([f"@{ROOT / 'recipes' / 'vit_b16_detect.txt'}"]))
    with torch.device("meta"):
        model = train.build_model(args, 80)
    rpn, heads, pyramid = model.rpn, model.roi_heads, model.backbone.pyramid
    facts = dict(
        strides=pyramid.strides, global_blocks=sorted(pyramid.global_blocks), channels=model.backbone.out_channels,
        anchor_sizes=[size for level in rpn.anchor_generator.sizes for size in level], aspect_ratios=list(rpn.anchor_generator.aspect_ratios[0]),
        rpn_convs=len(rpn.head.conv), rpn_thresholds=[rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold],
        rpn_sampled=rpn.fg_bg_sampler.batch_size_per_image, pre_nms=list(rpn._pre_nms_top_n.values()), post_nms=list(rpn._post_nms_top_n.values()),
        rpn_nms=rpn.nms_thresh, rois=heads.fg_bg_sampler.batch_size_per_image, roi_share=heads.fg_bg_sampler.positive_fraction,
        roi_threshold=heads.proposal_matcher.high_threshold, box_weights=list(heads.box_coder.weights), box_pool=heads.box_roi_pool.output_size[0],
        mask_pool=heads.mask_roi_pool.output_size[0], sampling_ratio=heads.box_roi_pool.sampling_ratio,
        box_convs=sum(p.ndim == 4 for p in heads.box_head.parameters()), box_dim=heads.box_predictor.cls_score.in_features,
        mask_convs=sum(p.ndim == 4 for p in heads.mask_head.parameters()), score=heads.score_thresh, per_image=heads.detections_per_img)
    assert {name for kind, name, _ in rows if kind == "detector"} == set(facts)
    assert len([row for row in rows if row[0] == "detect"]) > 12
    for kind, setting, stated in rows:
        values = [facts[setting]] if kind == "detector" else [getattr(args, key) for key in setting.split(" * ")]
        assert (math.prod(values) if len(values) > 1 else values[0]) == ast.literal_eval(stated), (kind, setting)


def test_a_recipe_takes_comments_and_several_flags_a_line_and_later_flags_win(tmp_path, capsys):
    recipe = tmp_path / "r.txt"
    recipe.write_text(f"# a comment\n\n--task classify --img-size 32 64   # rectangles too\n{TINY}\n--epochs 7 --seed 5\n")
    given = train.parse([f"@{recipe}", "--epochs", "1"])
    assert given["img_size"] == [32, 64] and given["epochs"] == 1 and given["seed"] == 5 and given["task"] == "classify"


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def litter(tmp_path_factory, pretrained):
    """A working directory with everything a newcomer can point a flag at by mistake."""
    folder = tmp_path_factory.mktemp("litter")
    whole = (pretrained / "checkpoint.pt").read_bytes()
    (folder / "good.pt").write_bytes(whole)
    (folder / "junk.pt").write_bytes(bytes(range(256)) * 40)
    (folder / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"model": create_vit("vit_demo", embed_dim=48, depth=2, num_heads=2, patch_size=8, num_classes=0).state_dict()}, folder / "other.pt")
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, folder / "resnet.pt")
    torch.save({"model": Path("x")}, folder / "code.pt")
    (folder / "a_file").write_text("hello")
    (folder / "held").mkdir()
    (folder / "held" / "checkpoint.pt").write_bytes(whole)
    (folder / "args_only").mkdir()
    (folder / "args_only" / "args.json").write_text("{}")
    (folder / "bad_json").mkdir()
    (folder / "bad_json" / "args.json").write_text("{")
    (folder / "empty").mkdir()
    for name in ("no_classes/train", "no_classes/val", "no_images/train/cat", "no_images/val/cat"):
        (folder / name).mkdir(parents=True)
    images = Shapes(12).images
    for data in ("mixed", "broken", "classes_differ", "no_val"):
        for part in ("train", "val") if data != "no_val" else ("train",):
            for i, kind in enumerate(("cat", "dog") if (data, part) != ("classes_differ", "val") else ("cat", "fox")):
                path = folder / data / part / kind
                path.mkdir(parents=True)
                for n in range(6):  # of mixed sizes, so that nothing is decoded before training starts
                    image = images[6 * i + n]
                    to_pil_image(image[:, :, :28] if n % 2 and data == "broken" else image).save(path / f"{n}.png")
    whole = (folder / "broken/train/dog/4.png").read_bytes()
    (folder / "broken/train/dog/4.png").write_bytes(whole[:60])
    (folder / "empty_recipe.txt").write_text("--no-such-flag 3\n")
    return folder


def inventory(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


BAD = [  # flags, a word of the message
    (f"{PRETRAIN} --img-size 36", "36"),
    (f"{PRETRAIN} --img-size 0", "img"),
    (f"{PRETRAIN} --img-size -32", "img"),
    (f"{PRETRAIN} --img-size 32 32 32", "img-size"),
    (f"{PRETRAIN} --img-size", "img-size"),
    (f"{PRETRAIN} --img-size 16", "16"),
    (f"{PRETRAIN} --num-heads 5", "num_heads"),
    (f"{PRETRAIN} --embed-dim 30", "30"),
    (f"{PRETRAIN} --segments 5", "segments"),
    (f"{PRETRAIN} --depth 4 --segments 6", "segments"),
    (f"{PRETRAIN} --depth 3", "segments"),
    (f"{PRETRAIN} --segments 0", "segments"),
    (f"{PRETRAIN} --decoder-embed-dim 33 --decoder-num-heads 2", "33"),
    (f"{PRETRAIN} --decoder-num-heads 0", "decoder"),
    (f"{PRETRAIN} --decoder-embed-dim 0", "decoder"),
    (f"{PRETRAIN} --decoder-embed-dim -8", "decoder"),
    (f"{PRETRAIN} --mask-ratio 1.0", "mask"),
    (f"{PRETRAIN} --mask-ratio -0.1", "mask"),
    (f"{PRETRAIN} --mask-ratio 0.999", "mask"),
    (f"{PRETRAIN} --mask-ratio nan", "mask"),
    (f"{PRETRAIN} --fill mask", "--method mixmim"),
    (f"{PRETRAIN} --single", "--method mixmim"),
    (f"{PRETRAIN} --window-size 3", "hierarchical"),
    (f"{PRETRAIN} --shift", "hierarchical"),
    (f"{CLASSIFY} --model mixmim_demo", "plain ViT"),
    ("--task classify --model mixmim_demo --pool cls", "plain ViT"),
    ("--task pretrain --model mixmim_demo", "--method mixmim"),
    ("--task pretrain --method mae --model mixmim_demo", "--method mixmim"),
    ("--task pretrain --method mixmim --fill mask --single", "--fill mix"),
    (f"{MIXMIM} --batch-size 1", "at least 2"),
    (f"{MIXMIM} --img-size 40", "40"),
    (f"{MIXMIM} --img-size 16", "img_size"),
    ("--task classify --method mixmim --model vit_demo --pool cls", "class token"),
    (f"{MIXMIM} --mask-ratio 0.1", "0.1"),
    (f"{MIXMIM} --mask-ratio 1", "mask"),
    (f"{MIXMIM} --window-size 4 4", "window_size"),
    (f"{MIXMIM} --window-size 4 4 0", "window-size"),
    (f"{MIXMIM} --embed-dim 18", "18"),
    (f"{MIXMIM} --decoder-embed-dim 33 --decoder-num-heads 2", "33"),
    (f"{PRETRAIN} --model vit_enormous", "vit_enormous"),
    (f"{PRETRAIN} --learning-rate 3", "learning-rate"),
    (f"{PRETRAIN} --method simclr", "simclr"),
    (f"{PRETRAIN} --task dance", "dance"),
    (f"{PRETRAIN} --lr -0.1", "lr"),
    (f"{PRETRAIN} --lr nan", "lr"),
    (f"{PRETRAIN} --blr inf", "blr"),
    (f"{PRETRAIN} --lr fast", "lr"),
    (f"{PRETRAIN} --batch-size 0", "batch-size"),
    (f"{PRETRAIN} --batch-size -3", "batch-size"),
    (f"{PRETRAIN} --batch-size 65", "65"),
    (f"{PRETRAIN} --accum 0", "accum"),
    (f"{PRETRAIN} --accum 9", "accum"),
    (f"{PRETRAIN} --epochs 0", "epochs"),
    (f"{PRETRAIN} --data-size 0", "data-size"),
    (f"{PRETRAIN} --data-size 99999999999", "99999999999"),
    (f"{PRETRAIN} --train-images 65", "train-images"),
    (f"{PRETRAIN} --train-images 0", "train-images"),
    (f"{PRETRAIN} --train-images -1", "train-images"),
    (f"{PRETRAIN} --val-images 17", "val-images 17 must lie in 1..16"),
    (f"{PRETRAIN} --val-images 0", "val-images"),
    (f"{PRETRAIN} --method mae --no-pairing", "--method mirl"),
    (f"{CLASSIFY} --no-pairing", "--method mirl"),
    (f"{DETECT} --eval-train --val-images 3", "--eval-train"),
    (f"{PRETRAIN} --weight-decay -1", "weight-decay"),
    (f"{PRETRAIN} --warmup-epochs -1", "warmup-epochs"),
    (f"{PRETRAIN} --clip-grad 0", "clip-grad"),
    (f"{PRETRAIN} --beta2 1.5", "beta2"),
    (f"{PRETRAIN} --rho 0.1", "--optimizer sam"),
    (f"{PRETRAIN} --adaptive", "--optimizer sam"),
    (f"{PRETRAIN} --optimizer sam --rho -0.1", "rho"),
    (f"{PRETRAIN} --optimizer sam --rho nan", "rho"),
    ("--task pretrain --model mixer_demo", "--task classify"),
    ("--task classify --model mixer_demo --pool cls", "a ViT"),
    ("--task classify --model mixer_demo --img-size 30", "30"),
    (f"{DETECT} --model mixer_demo".replace("--num-heads 2", ""), "mixer_demo"),
    (f"{DETECT} --data folder", "boxes"),
    (f"{DETECT} --data coco", "data-path"),
    (f"{DETECT} --data coco --data-path empty", "annotations"),
    (f"{DETECT} --img-size 48 64", "square"),
    (f"{DETECT} --window-size 3 3", "window-size"),
    (f"{DETECT} --jitter 2 0.1", "jitter"),
    (f"{DETECT} --mixup 0.8", "--task classify"),
    (f"{DETECT} --depth 6", "quarters"),
    ("--task detect --model resnet18 --pyramid single", "a plain ViT"),
    ("--task detect --model resnet20 --dry-run", "resnet18"),
    (f"{CLASSIFY} --pyramid simple", "--task detect or segment"),
    ("--task segment --data cifar10 --data-path empty", "no label for every pixel"),
    ("--task segment --data ade20k", "needs --data-path"),
    ("--task segment --data ade20k --data-path empty", "images/training"),
    ("--task segment --slide 16 32", "must be window and step"),
    ("--task segment --class-agnostic", "--task detect"),
    ("--task segment --window-size 7", "--global-blocks quarters or none"),
    ("--task segment --model resnet18 --img-size 64 --window-size 7", "a hierarchical --model"),
    ("--task segment --norm batch --batch-size 1", "--norm group"),
    ("--task segment --data coco --data-path empty --jitter 0 0", "--jitter 1 1"),
    ("--task segment --model vit_s54", "pyramid='simple'"),
    ("--task detect --eval-flip", "--task segment"),
    ("--task segment --stats", "--task classify"),
    (f"{CLASSIFY} --data ade20k --data-path empty", "--task segment"),
    (f"{CLASSIFY} --data coco --data-path empty", "--task detect"),
    ("--task pretrain --model resnet18", "--task classify"),
    ("--task classify --model resnet50 --depth 3", "a ViT or a Mixer"),
    ("--task classify --model resnet8 --layer-decay 0.7", "a ViT or a Mixer"),
    (f"{PRETRAIN} --loss supcon", "--task classify"),
    (f"{PRETRAIN} --adversarial", "--task classify"),
    (f"{PRETRAIN} --eval-pgd", "--task classify"),
    (f"{CLASSIFY} --loss hinge", "hinge"),
    (f"{CLASSIFY} --loss supcon --batch-size 1", "batch-size"),
    (f"{CLASSIFY} --loss supcon --augment none", "augment none"),
    ("--task classify --model resnet8 --pool cls", "a ViT only"),
    ("--task classify --model resnet9000", "mixer_s16"),
    (f"{CLASSIFY} --loss supcon --mixup 0.8", "--loss cross-entropy"),
    (f"{CLASSIFY} --loss supcon --adversarial", "--loss cross-entropy"),
    (f"{CLASSIFY} --probe --eval-corruptions", "--probe"),
    (f"{CLASSIFY} --attack-eps 2", "--eval-pgd"),
    (f"{CLASSIFY} --adversarial --attack-eps -1", "attack-eps"),
    (f"{CLASSIFY} --eval-pgd --attack-eps 300", "255"),
    (f"{CLASSIFY} --adversarial --augment strong", "strong"),
    (f"{CLASSIFY} --eval-every 0", "eval-every"),
    (f"{PRETRAIN} --schedule exponential", "exponential"),
    (f"{PRETRAIN} --workers -1", "workers"),
    (f"{PRETRAIN} --seed -1", "seed"),
    (f"{PRETRAIN} --seed 99999999999999999999", "seed"),
    (f"{CLASSIFY} --seed 99999999999999", "seed"),
    (f"{CLASSIFY} --drop-path 1", "drop-path"),
    (f"{CLASSIFY} --ema 1", "ema"),
    (f"{CLASSIFY} --label-smoothing 1", "label-smoothing"),
    (f"{PRETRAIN} --probe", "probe"),
    (f"--probe {TINY}", "probe"),
    (f"{PRETRAIN} --data folder", "data-path"),
    (f"{PRETRAIN} --data folder --data-path nowhere", "nowhere"),
    (f"{PRETRAIN} --data folder --data-path a_file", "a_file"),
    (f"{PRETRAIN} --data folder --data-path empty", "empty"),
    (f"{PRETRAIN} --data folder --data-path no_classes", "no_classes"),
    (f"{PRETRAIN} --data folder --data-path no_images", "no_images"),
    (f"{CLASSIFY} --data folder --data-path no_val", "val"),
    (f"{CLASSIFY} --data folder --data-path classes_differ", "classes"),
    (f"{PRETRAIN} --data cifar10", "data-path"),
    (f"{PRETRAIN} --data cifar10 --data-path empty", "download"),
    (f"{PRETRAIN} --data cifar100 --data-path nowhere", "nowhere"),
    (f"{CLASSIFY} --init missing.pt", "missing.pt"),
    (f"{CLASSIFY} --init empty", "directory"),
    (f"{CLASSIFY} --init junk.pt", "junk.pt"),
    (f"{CLASSIFY} --init truncated.pt", "truncated.pt"),
    (f"{CLASSIFY} --init other.pt", "other.pt"),
    (f"{CLASSIFY} --init resnet.pt", "resnet.pt"),
    (f"{CLASSIFY} --init code.pt", "code.pt"),
    (f"{CLASSIFY} --init good.pt --depth 4", "good.pt"),
    (f"{PRETRAIN} --output-dir a_file", "a_file"),
    (f"{PRETRAIN} --output-dir a_file/below", "a_file"),
    (f"{PRETRAIN} --output-dir held", "held"),
    (f"{PRETRAIN} --output-dir args_only", "args_only"),
    (f"{PRETRAIN} --output-dir bad_json --resume", "bad_json"),
    (f"{PRETRAIN} --resume", "output-dir"),
    ("@missing.txt", "missing.txt"),
    ("@empty_recipe.txt", "no-such-flag"),
    ("--dry-run --tflops 0", "tflops"),
    ("--dry-run --batch-size 5000", "batch-size"),
    ("--dry-run --batch-size 64 --accum 65", "accum"),
    ("--device cuda --task pretrain", "cuda"),
]


@pytest.mark.parametrize("flags, word", BAD, ids=[flags.removeprefix(f"{PRETRAIN} ").removeprefix(f"{CLASSIFY} ") for flags, _ in BAD])
def test_bad_input_is_one_sentence_and_leaves_no_trace(litter, monkeypatch, capsys, flags, word):
    if flags.startswith("--device cuda") and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    monkeypatch.chdir(litter)
    before = inventory(litter)
    with pytest.raises(SystemExit) as end:
        start(flags)
    err = capsys.readouterr().err
    after = inventory(litter)
    new = sorted(after.keys() - before.keys(), key=len, reverse=True)
    for path in new:  # for the next case
        Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()
    assert end.value.code == 2
    assert err.count("\n") == 1 and err.endswith("see --help\n"), err
    assert word in err
    assert not new, f"created {[os.path.relpath(path, litter) for path in new]}"
    assert after == before


# torch takes 10 s to clear away workers of which one has failed, unless the process ends
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_image_stops_the_run_with_its_path(litter, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        start(f"{CLASSIFY} --batch-size 4 --data folder --data-path {litter / 'broken'} --workers {workers}")
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.endswith("see --help\n")
    assert str(litter / "broken/train/dog/4.png") in err and "--skip-bad" in err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_skipped_and_counted_on_request(litter, tmp_path, workers):
    start(f"{CLASSIFY} --batch-size 4 --data folder --data-path {litter / 'broken'} --skip-bad --workers {workers}", tmp_path)
    assert log(tmp_path)[-1]["skipped_images"] == 1


def test_unlabelled_images_without_a_second_half_can_be_pretrained_on(litter, tmp_path):
    start(f"{PRETRAIN} --batch-size 4 --data folder --data-path {litter / 'no_val'}", tmp_path)
    assert math.isfinite(log(tmp_path)[-1]["train_loss"])


def test_a_mistake_can_be_corrected_and_run_again_in_the_same_folder(litter, tmp_path):
    with pytest.raises(SystemExit):
        start(f"{CLASSIFY} --init {litter / 'missing.pt'}", tmp_path / "run")
    start(f"{CLASSIFY} --init {litter / 'good.pt'}", tmp_path / "run")


def test_from_the_shell_a_mistake_is_one_line_without_traceback(tmp_path):
    done = subprocess.run(command("--task pretrain --img-size 30 --patch-size 4"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "30" in done.stderr and "4" in done.stderr and done.stderr.endswith("see --help\n")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- two processes


FEW = f"{MODEL} --data-size 84 --epochs 1 --optimizer sgd {FLAT}"  # 21 scenes to validate on: one rank gets 11, the other 10
JOBS = {
    "mirl": f"--task pretrain --segments 2 {FEW}",
    "mae": f"--task pretrain --method mae {FEW}",
    "classify": f"--task classify {FEW}",
    "accum": f"--task classify {FEW} --blr 0.002 --accum 2",
    "probe": f"--task classify --probe {FEW}",
    "resnet": f"--task classify --model resnet8 --data-size 84 --epochs 1 --optimizer sam --base-optimizer sgd {FLAT} --eval-pgd --eval-corruptions",
    "supcon": f"--task classify --loss supcon {FEW}",
    "detect": "--task detect --img-size 48 --depth 4 --embed-dim 32 --num-heads 2 --data-size 84 --epochs 1 --lr 1e-3",
    "segment": "--task segment --img-size 48 --depth 4 --embed-dim 32 --num-heads 2 --channels 16 --data-size 84 --epochs 1 --lr 1e-3",
    "default": f"--segments 2 {MODEL} --data-size 512 --epochs 1 --accum 2 --blr 0.004",
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every job of JOBS under one torchrun, two processes with batches of 8."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "jobs.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
train.LOG_EVERY = 1
for name, flags in {JOBS!r}.items():
    train.main([*flags.split(), "--batch-size", "8", "--output-dir", name])
torch.distributed.destroy_process_group()
""")
    done = torchrun(["jobs.py"], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("job", ["mirl", "mae", "classify", "accum", "probe"])
def test_one_process_and_two_agree(two_processes, tmp_path, monkeypatch, job):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    start(f"{JOBS[job]} --batch-size 16", tmp_path)
    one, two = log(tmp_path), log(two_processes[0] / job)
    assert len(one) == len(two) and [line.keys() for line in one] == [line.keys() for line in two]  # rank 0 alone writes
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-5)
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], abs=1e-5)  # every sample counts once
    assert one[-1].get("val_acc") == two[-1].get("val_acc")
    weights, others = (checkpoint(folder)["model"] for folder in (tmp_path, two_processes[0] / job))
    assert_close(weights, others, 1e-5)


@pytest.mark.parametrize("job", ["resnet", "supcon"])
def test_two_processes_judge_the_checkpoint_they_save(two_processes, tmp_path, job):
    """Each has batches of its own, so the weights differ from one process's; but all must judge the same BatchNorm statistics."""
    last, saved = log(two_processes[0] / job)[-1], checkpoint(two_processes[0] / job)
    args = train.resolve(train.parse(JOBS[job].split()))
    model = train.build_model(args, 10)
    model.load_state_dict(saved["model"])
    scenes, plain = open_source("shapes", None, False, (32, 32), size=84), augmentation("none", (32, 32), Shapes.mean, Shapes.std)
    if job == "supcon":  # a loss within the batches of each process
        assert last["val_loss"] > 0
        return
    loader = train.make_loader(Images(scenes, plain), train.EvalBatches(21, 8), 0, torch.device("cpu"))
    world = train.World("cpu")
    judged = train.evaluate(model, loader, args, world, train.nullcontext())
    assert last["val_loss"] == pytest.approx(judged["val_loss"], abs=1e-5) and last["val_acc"] == pytest.approx(judged["val_acc"], abs=1e-3)
    assert 0 <= last["pgd_acc"] <= last["val_acc"] + 1e-6 and 0 <= last["corrupted_acc"] <= 100


def test_two_processes_evaluate_detection_exactly_as_one(two_processes):
    last, saved = log(two_processes[0] / "detect")[-1], checkpoint(two_processes[0] / "detect")
    args = train.resolve(train.parse(JOBS["detect"].split()))
    model = train.build_model(args, 10)
    model.load_state_dict(saved["model"])
    scenes = train.Detections(train.open_scenes(args, train=False))  # 21 scenes
    loader = train.make_loader(scenes, train.EvalBatches(21, 8), 0, torch.device("cpu"), train.as_lists)
    figures = train.evaluate_detection(model, loader, scenes, train.World("cpu"), train.nullcontext())
    assert {key: float(f"{value:.6g}") for key, value in figures.items()} == {key: last[key] for key in figures}


def test_two_processes_count_a_segmentation_exactly_as_one(two_processes):
    last, saved = log(two_processes[0] / "segment")[-1], checkpoint(two_processes[0] / "segment")
    args = train.resolve(train.parse(JOBS["segment"].split()))
    model = train.build_model(args, 11)
    model.load_state_dict(saved["model"])
    data = train.Segmentations(train.open_scenes(args, train=False), (48, 48), False)  # 21 scenes
    loader = train.make_loader(data, train.EvalBatches(21, 5), 0, torch.device("cpu"))
    figures = train.evaluate_segmentation(model, loader, data.source.classes, args, train.World("cpu"), train.nullcontext())
    assert {key: float(f"{value:.6g}") for key, value in figures.items()} == {key: last[key] for key in figures}


def test_two_processes_report_the_effective_batch_of_both(two_processes):
    assert re.search(r"effective batch 16 \(8 x accum 1 x 2 processes\)", two_processes[1])
    assert re.search(r"effective batch 32 \(8 x accum 2 x 2 processes\)", two_processes[1])
    assert "actual lr 0.0005;" in two_processes[1]  # 0.004 * 8 * 2 * 2 / 256
    assert two_processes[1].count("done: everything is in") == len(JOBS) - 1  # said once, by rank 0
    assert two_processes[1].count("summary") == 1


@pytest.mark.slow
def test_torchrun_trains_and_probes_as_one_process_does(tmp_path):
    done = torchrun([str(ROOT / "train.py"), *f"--segments 2 {MODEL} --data-size 512 --batch-size 8 --epochs 1 --accum 2 --blr 0.004".split()],
                    tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "effective batch 32" in done.stdout and "actual lr 0.0005;" in done.stdout  # 0.004 * 8 * 2 * 2 / 256
    assert done.stdout.count("summary") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["0001"]
    assert [line["epoch"] for line in log(tmp_path / "runs/0001") if "epoch" in line] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_from_the_shell_a_broken_image_ends_the_run_at_once_with_one_line(litter, tmp_path, workers):
    begin = time.monotonic()
    done = subprocess.run(command(f"{CLASSIFY} --batch-size 4 --data folder --data-path {litter / 'broken'} --workers {workers}"), cwd=tmp_path,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "4.png" in done.stderr, done.stderr
    assert time.monotonic() - begin < 12  # most of it starting torch


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_once_and_by_whichever_rank_meets_it(litter, tmp_path):
    done = torchrun([str(ROOT / "train.py"), *f"{PRETRAIN} --img-size 36".split()], tmp_path)
    assert done.returncode != 0 and len(re.findall("^train.py: .*see --help$", done.stderr, re.M)) == 1
    for seed in range(2):  # in one of these the broken image falls to rank 1
        done = torchrun([str(ROOT / "train.py"), *f"{CLASSIFY} --batch-size 6 --seed {seed} --data folder --data-path {litter / 'broken'}".split()],
                        tmp_path)
        assert done.returncode != 0 and "dog/4.png" in done.stderr


@pytest.mark.slow
def test_sigterm_to_a_subprocess_saves_and_exits_143(tmp_path):
    flags = f"{PRETRAIN} --epochs 50 --output-dir {tmp_path / 'run'} --workers 2"
    run = subprocess.Popen(command(flags), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists() and run.poll() is None:
        time.sleep(0.01)
    run.terminate()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143 and err == "" and "stopped at step" in out
