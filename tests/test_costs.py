"""Dry runs, the check of the installation, and what recipes and documentation say of each other."""

import ast
import math
import re

import pytest
import torch
from small_runs import ROOT, start

import train
from training.optim import plan_steps

NUMBER = r"([\d.,e+-]+)"
IMAGENET = "--data folder --train-images 1281167"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def dry_run(flags, capsys, tmp_path, monkeypatch):
    """What a dry run prints; it leaves nothing."""
    monkeypatch.chdir(tmp_path)
    start(f"{flags} --dry-run")
    assert not list(tmp_path.iterdir())
    return capsys.readouterr().out


def test_check_prints_versions_and_ends_well(capsys):
    assert not train.main(["--check"])
    out = capsys.readouterr().out
    assert torch.__version__ in out and "torchvision" in out


@pytest.mark.parametrize("flags, expected", [
    (f"--model vit_b16 --task classify --img-size 224 {IMAGENET}", "17.564 G"),
    ("--model vit_b16 --task pretrain --method mae --img-size 224 --decoder-embed-dim 512 --decoder-depth 8 "
     "--decoder-num-heads 16 --data cifar10", "9.781 G"),
    (f"--model mixmim_b --task classify {IMAGENET}", "16.316 G"),
    (f"--model resnet50 --task classify {IMAGENET}", "4.089 G")])  # as torchvision's documentation has it
def test_a_dry_run_prints_the_golden_multiply_adds_and_touches_nothing(tmp_path, capsys, monkeypatch, flags, expected):
    out = dry_run(flags, capsys, tmp_path, monkeypatch)
    assert expected in out
    for word in ("parameters", "steps", "memory", "device-hours"):
        assert word in out


def test_a_dry_run_counts_both_passes_of_sam_and_those_of_an_attack(tmp_path, capsys, monkeypatch):
    hours = []
    for flags in ("", "--optimizer sam", "--adversarial", "--optimizer sam --adversarial"):
        out = dry_run(f"--task classify --model resnet8 {flags}", capsys, tmp_path, monkeypatch)
        hours.append(float(re.search(f"device-hours {NUMBER}", out)[1]))
    assert [value / hours[0] for value in hours] == pytest.approx([1, 2, 2, 4], rel=1e-2)


def test_a_dry_run_counts_steps_and_device_hours_by_hand(tmp_path, capsys, monkeypatch):
    flags = "--data folder --data-path /nowhere --train-images 1000 --batch-size 16 --accum 4 --epochs 3 --tflops 50"
    out = dry_run(f"--task classify --model vit_b16 {flags}", capsys, tmp_path, monkeypatch)
    assert re.search(r"steps +48 of 64 images", out)  # 62 batches, 16 windows (the last one short), 3 epochs
    hours = float(re.search(f"device-hours {NUMBER}", out)[1])
    assert hours == pytest.approx(2 * 17.564e9 * 3 * 3 * 992 / 50e12 / 3600, rel=0.05)  # 992 images an epoch


@pytest.mark.parametrize("task", train.TASKS)
def test_every_task_has_a_dry_run_of_its_defaults(tmp_path, capsys, monkeypatch, task):
    assert "parameters" in dry_run(f"--task {task}", capsys, tmp_path, monkeypatch)


def test_a_dry_run_starts_from_a_file_that_may_not_exist_yet(tmp_path, capsys, monkeypatch):
    assert "parameters" in dry_run("--task classify --init runs/0001/checkpoint.pt", capsys, tmp_path, monkeypatch)


# ---------------------------------------------------------------------------- recipes and tables


QUICK = ("mae_vit_b16_linprobe", "mixer_s16_scratch_sam", "resnet50_scratch", "vit_s16_supcon")  # the others: slow


@pytest.mark.parametrize("recipe", [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((ROOT / "recipes").glob("*.txt"))])
def test_the_header_of_every_recipe_says_source_what_is_borrowed_and_the_cost_of_the_dry_run(
        tmp_path, capsys, monkeypatch, recipe):
    lines = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    header = " ".join(line.lstrip("# ") for line in lines)
    assert "# Source: " in recipe.read_text() and "# Borrowed: " in recipe.read_text()
    printed = dry_run(f"@{recipe}", capsys, tmp_path, monkeypatch)
    pattern = r"parameters +([\d,]+).*multiply-adds ([\d.]+) G.*steps +([\d,]+).*device-hours (\S+)"
    figures = re.search(pattern, printed, re.S)
    parameters, multiply_adds, steps, hours = figures.groups()
    parameters = int(parameters.replace(",", "")) / 1e6
    multiply_adds = f"{float(multiply_adds):.1f}"
    assert (f"Cost: {parameters:.1f} M parameters, {multiply_adds} G multiply-adds per image, {steps} steps, "
            f"{hours} device-hours at 100 TFLOP/s (--dry-run).") in header


def test_the_scratch_recipes_of_the_sam_paper_start_and_see_as_the_jax_code():
    for path in (ROOT / "recipes").glob("*_scratch*.txt"):
        args = recipe(path.name)
        if not path.name.startswith("resnet"):
            assert args.weight_init == "jax" and args.mean_std == [0.5, 0.5], path.name


FINETUNING_OF_MAE = {  # FINETUNE.md: epochs, blr, layer decay, drop path
    "vit_b16": (100, 5e-4, 0.65, 0.1), "vit_l16": (50, 1e-3, 0.75, 0.2), "vit_h14": (50, 1e-3, 0.75, 0.3)}


@pytest.mark.parametrize("model", FINETUNING_OF_MAE)
def test_the_recipes_of_mae_have_the_settings_of_its_repository(model):
    tuned, trained = recipe(f"mae_{model}_finetune.txt"), recipe(f"mae_{model}_pretrain.txt")
    assert (tuned.epochs, tuned.blr, tuned.layer_decay, tuned.drop_path) == FINETUNING_OF_MAE[model]
    assert tuned.batch_size * tuned.accum == 1024 and trained.batch_size * trained.accum == 4096
    assert (tuned.mixup, tuned.cutmix, tuned.weight_decay, tuned.model) == (0.8, 1.0, 0.05, model)
    assert (trained.blr, trained.warmup_epochs, trained.mask_ratio, trained.model) == (1.5e-4, 40, 0.75, model)


def test_the_recipe_of_the_resnet_detector_has_the_settings_of_detectron2():
    args = recipe("resnet50_detect.txt")
    assert (args.optimizer, args.lr, args.weight_decay, args.epochs) == ("sgd", 0.1, 4e-5, 100)
    assert args.batch_size * args.accum == 64 and args.jitter == [0.1, 2.0] and args.img_size == [1024, 1024]
    assert args.warmup_epochs * 118_287 / 64 == pytest.approx(500, abs=2)


def test_the_recipe_of_beits_segmentation_has_the_settings_of_its_repository():
    args = recipe("beit_b16_segment.txt")
    assert (args.lr, args.layer_decay, args.weight_decay, args.drop_path) == (7e-4, 0.65, 0.05, 0.1)
    assert args.batch_size * args.accum == 16 and args.slide == [512, 341] and args.schedule == "linear"
    assert args.warmup_epochs * 20_210 / 16 == pytest.approx(1500, abs=5)


def test_the_transfer_recipe_takes_ten_thousand_steps_of_sgd():
    args = recipe("vit_b16_transfer.txt")
    plan = plan_steps(args, 50_000, 1)
    assert plan.total_steps == pytest.approx(10_000, abs=10) and plan.warmup == pytest.approx(500, abs=2)
    assert (args.optimizer, args.weight_decay, args.clip_grad, args.crop_ratio) == ("sgd", 0, 1.0, 1.0)
    assert plan.effective == 512 and args.lr in (1e-3, 3e-3, 1e-2, 3e-2)


def table_rows(pattern):
    """(kind, setting, stated value) of the rows `kind.setting` | value | of all documents."""
    rows = []
    for document in DOCUMENTS:
        rows += re.findall(rf"^\| `({pattern})\.(?!py`)([\w *]+)` \| (.*?) \|", document.read_text(), re.M)
    return rows


def recipe_value(args, setting):
    """A flag, or a product of flags."""
    values = [getattr(args, name) for name in setting.split(" * ")]
    return math.prod(values) if len(values) > 1 else values[0]


def recipe(name):
    return train.parse([f"@{ROOT / 'recipes' / name}"])


def test_the_table_of_mixmims_settings_says_what_the_recipes_do():
    rows = table_rows(r"(?:pre|fine)\w+")
    kinds = {kind for kind, _, _ in rows}
    assert kinds == {"pretrain", "finetune", "finetune_384"} and len(rows) > 20
    recipes = {kind: recipe(f"mixmim_b_{kind}.txt") for kind in kinds}
    for kind, setting, stated in rows:
        assert recipe_value(recipes[kind], setting) == ast.literal_eval(stated), (kind, setting)


def test_the_table_of_detections_settings_says_what_the_recipe_does():
    pytest.importorskip("pycocotools")
    args = recipe("vit_b16_detect.txt")
    rows = table_rows("detect")
    assert len(rows) > 12
    for _, setting, stated in rows:
        assert recipe_value(args, setting) == ast.literal_eval(stated), setting


def test_the_table_of_the_detectors_settings_says_what_the_model_of_the_recipe_has():
    pytest.importorskip("pycocotools")
    from tasks import Data, detection
    from training.world import World

    data = Data(classes=list(range(80)), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with torch.device("meta"):
        model = detection.build(recipe("vit_b16_detect.txt"), data, World("cpu"))
    rpn, heads, pyramid = model.rpn, model.roi_heads, model.backbone.pyramid
    facts = dict(
        # backbone
        strides=pyramid.strides, global_blocks=sorted(pyramid.global_blocks), channels=model.backbone.out_channels,
        # proposals
        anchor_sizes=[size for level in rpn.anchor_generator.sizes for size in level],
        aspect_ratios=list(rpn.anchor_generator.aspect_ratios[0]),
        rpn_convs=len(rpn.head.conv),
        rpn_thresholds=[rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold],
        rpn_sampled=rpn.fg_bg_sampler.batch_size_per_image,
        pre_nms=list(rpn._pre_nms_top_n.values()), post_nms=list(rpn._post_nms_top_n.values()), rpn_nms=rpn.nms_thresh,
        # regions of interest
        rois=heads.fg_bg_sampler.batch_size_per_image, roi_share=heads.fg_bg_sampler.positive_fraction,
        roi_threshold=heads.proposal_matcher.high_threshold, box_weights=list(heads.box_coder.weights),
        box_pool=heads.box_roi_pool.output_size[0], mask_pool=heads.mask_roi_pool.output_size[0],
        sampling_ratio=heads.box_roi_pool.sampling_ratio,
        box_convs=sum(p.ndim == 4 for p in heads.box_head.parameters()),
        box_dim=heads.box_predictor.cls_score.in_features,
        mask_convs=sum(p.ndim == 4 for p in heads.mask_head.parameters()),
        score=heads.score_thresh, per_image=heads.detections_per_img)
    rows = table_rows("detector")
    assert {setting for _, setting, _ in rows} == set(facts)
    for _, setting, stated in rows:
        assert facts[setting] == ast.literal_eval(stated), setting
