"""The command line: a parser per task, recipes, and one sentence for every mistake."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from small_runs import (
    CLASSIFY, DETECT, HIERARCHICAL, MIXMIM, PRETRAIN, ROOT, SEGMENT, TINY, built, checkpoint, inventory, refused, shell,
    start)
from torchvision.transforms.functional import to_pil_image

import train
from shapes import Shapes
from vit import create_vit

CONTRACT = {  # name: its arguments
    "DEFAULTS": None,
    "add_flags": "flag",
    "complete": "args",
    "open_data": "args world",
    "build": "args data world",
    "loss": "model batch args data",
    "evaluate": "model loader args data world",
    "save_picture": "folder model args data",
    "predict": "model images args classes",
    "draw": "image prediction classes",
}
SHARED = """
    model img-size data data-path data-size train-images val-images
    epochs batch-size accum blr lr min-lr warmup-epochs weight-decay clip-grad optimizer rho
    output-dir resume seed workers save-minutes device precision compile dry-run
    """.split()


# ---------------------------------------------------------------------------- tasks


def test_the_tasks_are_those_of_the_documentation():
    assert set(train.TASKS) == {"pretrain", "classify", "probe", "contrast", "detect", "segment"}


@pytest.mark.parametrize("task", train.TASKS)
def test_every_task_defines_the_names_of_the_contract_with_their_arguments(task):
    for name, arguments in CONTRACT.items():
        value = getattr(train.TASKS[task], name)
        if arguments is None:
            assert type(value) is dict
            continue
        required = [p.name for p in inspect.signature(value).parameters.values() if p.default is p.empty]
        assert required == arguments.split()


@pytest.mark.parametrize("task", train.TASKS)
def test_the_defaults_of_a_task_are_defaults_of_its_flags(task):
    known = vars(train.parser_for(task).parse_args([]))
    assert set(train.TASKS[task].DEFAULTS) <= set(known)


# ---------------------------------------------------------------------------- help, and flags of other tasks


def flags_of(task):
    return set(re.findall(r"^  (--[a-z][\w-]*)", train.parser_for(task).format_help(), re.M))


FLAGS = {task: flags_of(task) for task in train.TASKS}


@pytest.mark.parametrize("task", train.TASKS)
def test_the_help_of_a_task_fits_on_two_screens_and_shows_defaults(task, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        train.main(["--task", task, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert len(text.splitlines()) <= 110
    assert "default" in text and all(flag in text for flag in FLAGS[task])


@pytest.mark.parametrize("task", train.TASKS)
def test_a_flag_of_another_task_is_an_error_that_names_the_flag_and_its_tasks(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    foreign = set().union(*FLAGS.values()) - FLAGS[task]
    assert len(foreign) > 5
    for flag in sorted(foreign):
        error = refused(f"--task {task} {flag} 1", capsys)
        owners = {other for other in FLAGS if flag in FLAGS[other]}
        assert flag in error
        assert owners <= set(re.findall(r"[a-z]+", error.replace(flag, ""))), error
    assert not list(tmp_path.iterdir())


def test_every_task_has_the_flags_of_the_loop():
    shared = set.intersection(*FLAGS.values())
    assert {f"--{name}" for name in SHARED} <= shared


@pytest.mark.parametrize("flags", ["--task classify --probe", "--probe --task classify"])
def test_the_older_name_of_probing_still_means_probing(flags, finished):
    flags = f"{flags} --style adamw {TINY}"
    assert checkpoint(finished(flags))["args"]["task"] == "probe"


def test_the_older_name_of_contrast_is_an_error_that_names_the_task(capsys):
    error = refused(f"{CLASSIFY} --loss supcon", capsys)
    assert "--loss" in error and "contrast" in error


# ---------------------------------------------------------------------------- flags of other methods, optimizers,
# sets


def cross(owners, values, template):
    """(value, flag, owners) for each flag and each value that does not own it."""
    for flag, owner in owners.items():
        for value in values:
            if value not in owner.split():
                yield template.format(value), flag, owner.split()


METHODS = {
    "--segments 2": "mirl", "--no-pairing": "mirl", "--fill mask": "mixmim", "--fill mix": "mixmim",
    "--single": "mixmim", "--open-attention": "mixmim", "--mask-per-cycle": "mixmim"}
OPTIMIZERS = {"--beta2 0.9": "adamw sam", "--rho 0.1": "sam", "--adaptive": "sam", "--base-optimizer sgd": "sam"}
IMAGE_SETS = {
    "--data-size 64": "shapes", "--scenes simple": "shapes", "--data-path empty": "cifar10 cifar100 folder",
    "--download": "cifar10 cifar100", "--skip-bad": "folder"}
CASES = [
    *cross(METHODS, ("mae", "mirl", "mixmim"), "--task pretrain --method {}"),
    *cross(OPTIMIZERS, ("adamw", "sgd", "sam"), "--task classify --optimizer {}"),
    *cross(IMAGE_SETS, ("shapes", "cifar10", "cifar100", "folder"), "--task classify --data {}"),
    *cross({"--data-size 64": "shapes", "--data-path empty": "coco"}, ("shapes", "coco"), "--task detect --data {}"),
    *cross({"--data-size 64": "shapes"}, ("ade20k", "coco"), "--task segment --data {}"),
    ("--task classify --optimizer sam --base-optimizer sgd", "--beta2 0.9", ["adamw"]),
]


@pytest.mark.parametrize("command, flag, owners", CASES)
def test_a_flag_of_another_method_optimizer_or_data_set_is_an_error_that_names_it(
        command, flag, owners, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(f"{command} {flag}", capsys)
    assert flag.split()[0] in error
    assert any(owner in error for owner in owners)
    assert not list(tmp_path.iterdir())


# a constructor's signature decides
@pytest.mark.parametrize("model, flag", [
    ("vit_demo", "--shift"), ("vit_demo", "--window-size 3"),
    ("mixmim_demo", "--depth 4"), ("mixmim_demo", "--num-heads 2"), ("mixmim_demo", "--pool cls"),
    ("mixer_demo", "--num-heads 2"), ("mixer_demo", "--pool cls"), ("mixer_demo", "--checkpointing"),
    ("mixer_demo", "--window-size 4"),
    ("resnet8", "--patch-size 8"), ("resnet8", "--embed-dim 32"), ("resnet8", "--depth 3"),
    ("resnet8", "--drop-path 0.1"), ("resnet8", "--pool cls"), ("resnet8", "--checkpointing")])
def test_an_option_that_the_model_does_not_take_is_an_error_that_names_it(model, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert flag.split()[0] in refused(f"--task classify --model {model} {flag}", capsys)


@pytest.mark.parametrize("flags, words", [
    ("--task classify --segments 4 --mask-ratio 0.5 --decoder-depth 7", "pretrain"),
    ("--task detect --method mae --segments 2", "pretrain"),
    ("--task pretrain --method mae --segments 6", "--segments mirl"),
    ("--task classify --optimizer sgd --beta2 0.5 --download --data-path /nonexistent", "--"),
])
def test_what_was_once_silently_ignored_is_an_error(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(flags, capsys)
    assert all(word in error for word in words.split())


# ---------------------------------------------------------------------------- recipes


def test_a_recipe_takes_comments_and_several_flags_a_line_and_later_flags_win(tmp_path):
    recipe = tmp_path / "r.txt"
    lines = "# a comment", "", "--task classify --img-size 32 64   # rectangles too", TINY, "--epochs 7 --seed 5"
    recipe.write_text("\n".join(lines))
    args = built(f"@{recipe} --epochs 1").args
    assert args.task == "classify" and args.img_size == [32, 64] and args.epochs == 1 and args.seed == 5


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.txt")), ids=lambda path: path.stem)
def test_every_recipe_has_flags_of_its_task_only(recipe):
    words = " ".join(line.partition("#")[0] for line in recipe.read_text().splitlines()).split()
    task = words[words.index("--task") + 1]
    assert {word for word in words if word.startswith("--")} <= FLAGS[task] | {"--task"}
    assert train.parse([f"@{recipe}"]).task == task


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def litter(tmp_path_factory, pretrained):
    """A working directory with everything a newcomer can point a flag at by mistake."""
    folder = tmp_path_factory.mktemp("litter")

    # checkpoints
    whole = (pretrained / "checkpoint.pt").read_bytes()
    (folder / "good.pt").write_bytes(whole)
    (folder / "junk.pt").write_bytes(bytes(range(256)) * 40)
    (folder / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    other = create_vit("vit_demo", embed_dim=48, depth=2, num_heads=2, patch_size=8, num_classes=0)
    torch.save({"model": other.state_dict()}, folder / "other.pt")
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, folder / "resnet.pt")
    torch.save({"model": Path("x")}, folder / "code.pt")

    # folders of runs
    (folder / "a_file").write_text("hello")
    for name in ("held", "args_only", "bad_json", "empty"):
        (folder / name).mkdir()
    for name in ("held", "bad_json"):
        (folder / name / "checkpoint.pt").write_bytes(whole)
    (folder / "args_only" / "args.json").write_text("{}")
    (folder / "bad_json" / "args.json").write_text("{")
    (folder / "bad_recipe.txt").write_text("--no-such-flag 3\n")

    # folders of images
    for name in ("no_classes/train", "no_classes/val", "no_images/train/cat", "no_images/val/cat"):
        (folder / name).mkdir(parents=True)
    images = Shapes(12).images
    for path in ("classes_differ/train/cat", "classes_differ/train/dog", "classes_differ/val/cat",
                 "classes_differ/val/fox", "no_val/train/cat", "no_val/train/dog", "one/train/cat", "one/val/cat"):
        (folder / path).mkdir(parents=True)
        for n in range(1 if path == "one/val/cat" else 8):
            to_pil_image(images[n]).save(folder / path / f"{n}.png")
    return folder


BAD = [  # flags, a word of the message
    # sizes
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
    (f"{MIXMIM} --img-size 40", "40"),
    (f"{MIXMIM} --img-size 16", "img_size"),
    (f"{MIXMIM} --window-size 4 4", "window_size"),
    (f"{MIXMIM} --window-size 4 4 0", "window-size"),
    (f"{MIXMIM} --embed-dim 18", "18"),
    (f"{MIXMIM} --decoder-embed-dim 33 --decoder-num-heads 2", "33"),
    ("--task classify --model mixer_demo --img-size 30", "30"),
    # masks and mixtures
    (f"{PRETRAIN} --mask-ratio 1.0", "mask"),
    (f"{PRETRAIN} --mask-ratio -0.1", "mask"),
    (f"{PRETRAIN} --mask-ratio 0.999", "mask"),
    (f"{PRETRAIN} --mask-ratio nan", "mask"),
    (f"{MIXMIM} --mask-ratio 0.1", "0.1"),
    (f"{MIXMIM} --mask-ratio 1", "mask"),
    (f"{MIXMIM} --batch-size 1", "at least 2"),
    (f"{MIXMIM} --fill mask --single", "--fill mix"),
    (f"{MIXMIM} --fill mask --open-attention", "--fill mix"),
    # models and methods
    ("--task pretrain --model mixmim_demo", "mixmim_demo"),
    ("--task pretrain --method mae --model mixmim_demo", "mixmim_demo"),
    ("--task pretrain --model mixer_demo", "mixer_demo"),
    ("--task pretrain --model resnet18", "resnet18"),
    (f"{PRETRAIN} --model vit_enormous", "vit_enormous"),
    ("--task classify --model resnet9000", "mixer_s16"),
    ("--task classify --model resnet8 --layer-decay 0.7", "layer-decay"),
    (f"{PRETRAIN} --learning-rate 3", "learning-rate"),
    (f"{PRETRAIN} --method simclr", "simclr"),
    (f"{PRETRAIN} --task dance", "dance"),
    # numbers
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
    (f"{PRETRAIN} --val-images 17", "val-images"),
    (f"{PRETRAIN} --crop-ratio 0", "crop-ratio"),
    (f"{CLASSIFY} --crop-ratio 3", "crop-ratio"),
    (f"{CLASSIFY} --crop-ratio nan", "crop-ratio"),
    (f"{CLASSIFY} --mean-std 0.5", "mean-std"),
    (f"{CLASSIFY} --mean-std 0.5 0", "mean-std"),
    (f"{CLASSIFY} --mean-std 127.5 127.5", "127.5"),
    (f"{CLASSIFY} --mean-std 0.5 0.5 --stats", "--stats"),
    (f"{DETECT} --crop-ratio 0.9", "crop-ratio"),
    (f"{PRETRAIN} --val-images 0", "val-images"),
    (f"{PRETRAIN} --weight-decay -1", "weight-decay"),
    (f"{PRETRAIN} --warmup-epochs -1", "warmup-epochs"),
    (f"{PRETRAIN} --clip-grad 0", "clip-grad"),
    (f"{PRETRAIN} --beta2 1.5", "beta2"),
    (f"{PRETRAIN} --optimizer sam --rho -0.1", "rho"),
    (f"{PRETRAIN} --optimizer sam --rho nan", "rho"),
    (f"{PRETRAIN} --schedule exponential", "exponential"),
    (f"{PRETRAIN} --workers -1", "workers"),
    (f"{PRETRAIN} --seed -1", "seed"),
    (f"{PRETRAIN} --seed 99999999999999999999", "seed"),
    (f"{CLASSIFY} --eval-every 0", "eval-every"),
    (f"{CLASSIFY} --drop-path 1", "drop-path"),
    (f"{CLASSIFY} --ema 1", "ema"),
    (f"{CLASSIFY} --label-smoothing 1", "label-smoothing"),
    # classification, probing, contrast
    (f"{CLASSIFY} --attack-eps 2", "attack-eps"),
    (f"{CLASSIFY} --adversarial --attack-eps -1", "attack-eps"),
    (f"{CLASSIFY} --eval-pgd --attack-eps 300", "255"),
    (f"{CLASSIFY} --adversarial --augment strong", "strong"),
    (f"--task contrast {TINY} --batch-size 1", "batch-size"),
    (f"--task contrast {TINY} --augment none", "augment none"),
    (f"{PRETRAIN} --probe", "probe"),
    (f"--probe {TINY}", "probe"),
    # detection and segmentation
    (f"{DETECT} --model mixer_demo".replace("--num-heads 2", ""), "mixer_demo"),
    (f"{DETECT} --data folder", "folder"),
    (f"{DETECT} --data coco".replace("--data-size 16", ""), "data-path"),
    (f"{DETECT} --data coco --data-path empty".replace("--data-size 16", ""), "annotations"),
    (f"{DETECT} --img-size 48 64", "img-size"),
    (f"{DETECT} --window-size 3 3", "window-size"),
    (f"{DETECT} --jitter 2 0.1", "jitter"),
    (f"{DETECT} --depth 6", "quarters"),
    (f"{DETECT} --eval-train --val-images 3", "--eval-train"),
    ("--task detect --model resnet18 --pyramid single", "--pyramid"),
    ("--task detect --model resnet20 --dry-run", "resnet18"),
    ("--task segment --data cifar10", "cifar10"),
    ("--task segment --data ade20k", "--data-path"),
    ("--task segment --data ade20k --data-path empty", "images/training"),
    ("--task segment --slide 16 32", "slide"),
    ("--task segment --window-size 7", "--global-blocks"),
    ("--task segment --model resnet18 --img-size 64 --window-size 7", "window-size"),
    ("--task segment --norm batch --batch-size 1", "--norm group"),
    ("--task segment --data coco --data-path empty --jitter 0 0", "jitter"),
    ("--task segment --model vit_s54", "simple"),
    (f"{CLASSIFY} --data ade20k", "ade20k"),
    (f"{CLASSIFY} --data coco", "coco"),
    # data sets
    ("--task pretrain --data folder", "data-path"),
    ("--task pretrain --data folder --data-path nowhere", "nowhere"),
    ("--task pretrain --data folder --data-path a_file", "a_file"),
    ("--task pretrain --data folder --data-path empty", "empty"),
    ("--task pretrain --data folder --data-path no_classes", "no_classes"),
    ("--task pretrain --data folder --data-path no_images", "no_images"),
    ("--task classify --data folder --data-path no_val", "val"),
    ("--task classify --data folder --data-path classes_differ", "classes"),
    (f"--task pretrain --method mixmim {HIERARCHICAL} --batch-size 4 --data folder --data-path one", "1 images"),
    ("--task pretrain --data cifar10", "data-path"),
    ("--task pretrain --data cifar10 --data-path empty", "download"),
    ("--task pretrain --data cifar100 --data-path nowhere", "nowhere"),
    # checkpoints
    (f"{CLASSIFY} --init missing.pt", "missing.pt"),
    (f"{CLASSIFY} --init empty", "directory"),
    (f"{CLASSIFY} --init junk.pt", "junk.pt"),
    (f"{CLASSIFY} --init truncated.pt", "truncated.pt"),
    (f"{CLASSIFY} --init other.pt", "other.pt"),
    (f"{CLASSIFY} --init resnet.pt", "resnet.pt"),
    (f"{CLASSIFY} --init code.pt", "code.pt"),
    # folders
    (f"{PRETRAIN} --output-dir a_file", "a_file"),
    (f"{PRETRAIN} --output-dir a_file/below", "a_file"),
    (f"{PRETRAIN} --output-dir held", "held"),
    (f"{PRETRAIN} --output-dir args_only", "args_only"),
    (f"{PRETRAIN} --output-dir bad_json --resume", "bad_json"),
    (f"{PRETRAIN} --resume", "output-dir"),
    # recipes, dry runs, devices
    ("@missing.txt", "missing.txt"),
    ("@bad_recipe.txt", "no-such-flag"),
    ("--dry-run --tflops 0", "tflops"),
    ("--dry-run --batch-size 20000", "batch-size"),
    ("--dry-run --batch-size 64 --accum 300", "accum"),
    ("--device cuda --task pretrain", "cuda"),
]


def short(flags):
    for prefix in (PRETRAIN, CLASSIFY, MIXMIM, DETECT, SEGMENT):
        flags = flags.removeprefix(f"{prefix} ")
    return flags


@pytest.mark.parametrize("flags, word", BAD, ids=[short(flags) for flags, _ in BAD])
def test_bad_input_is_one_sentence_and_leaves_no_trace(litter, monkeypatch, capsys, flags, word):
    if "--device cuda" in flags and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    monkeypatch.chdir(litter)
    before = inventory(litter)
    try:
        assert word in refused(flags, capsys)
    finally:
        new = sorted(inventory(litter).keys() - before.keys(), key=len, reverse=True)
        for path in new:  # for the next case
            Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()
    assert not new
    assert inventory(litter) == before


CONTRADICTIONS = ["--depth 4", "--embed-dim 64", "--patch-size 4", "--num-heads 4", "--model mixmim_demo"]


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_file_of_init_is_an_error_that_names_both_values(
        pretrained, tmp_path, capsys, flags):
    file = pretrained / "checkpoint.pt"
    error = refused(f"--task classify --data-size 64 {flags} --init {file}", capsys, tmp_path / "run")
    assert all(word in error for word in flags.split())
    saved = checkpoint(pretrained)["args"]
    assert str(saved[flags.split()[0].removeprefix("--").replace("-", "_")]) in error
    assert not (tmp_path / "run").exists()


def test_a_mistake_can_be_corrected_and_run_again_in_the_same_folder(litter, tmp_path, capsys):
    refused(f"{CLASSIFY} --init {litter / 'missing.pt'}", capsys, tmp_path / "run")
    start(f"{CLASSIFY} --init {litter / 'good.pt'}", tmp_path / "run")


@pytest.mark.slow
def test_from_the_shell_a_mistake_is_one_line_without_traceback(tmp_path):
    done = shell("--task pretrain --img-size 30 --patch-size 4", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1
    assert "30" in done.stderr and "4" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_shared_sizes_of_a_model_need_not_be_given_twice(pretrained, tmp_path):
    start(f"--task classify --data-size 64 --batch-size 8 --epochs 1 --init {pretrained / 'checkpoint.pt'}", tmp_path)
    before, after = (checkpoint(folder)["args"] for folder in (pretrained, tmp_path))
    for name in ("model", "img_size", "patch_size", "embed_dim", "depth", "num_heads"):
        assert before[name] == after[name]
