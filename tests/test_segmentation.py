"""Segmentation: UperNet on an encoder, trained by the loop and judged by mean IoU."""

import json
import math
import re

import pytest
import torch
from small_runs import (
    SEGMENT, STILL, assert_same_bits, assert_same_run, built, judged, killed, log, refused, start, weights)
from torchvision.transforms.functional import to_pil_image

from tasks import load_run

SIZES = "--img-size 48 --depth 4 --embed-dim 32 --num-heads 2 --patch-size 8"
FEW = "--task segment --channels 8 --data-size 8 --batch-size 4 --epochs 1"


@pytest.fixture(scope="module")
def segmented(finished):
    return finished(SEGMENT)


def test_segmentation_leaves_mean_iou_and_pictures_and_a_checkpoint_that_loads(segmented):
    last = log(segmented)[-1]
    assert 0 <= last["miou"] <= 100 and 0 <= last["pixel_acc"] <= 100
    assert (segmented / "segments.png").exists()
    assert_same_bits(dict(load_run(segmented).model.state_dict()), weights(segmented))


def test_segmentations_figures_are_those_of_the_saved_model(segmented):
    figures = judged(segmented, batch_size=3)
    assert set(figures) == {"miou", "pixel_acc"}
    for name, value in figures.items():
        assert log(segmented)[-1][name] == pytest.approx(value, abs=1e-3)


def test_segmentation_killed_and_resumed_ends_with_the_same_bits(segmented, tmp_path, monkeypatch):
    killed(monkeypatch, 1, SEGMENT, tmp_path)
    start("--resume", tmp_path)
    assert_same_run(segmented, tmp_path)


@pytest.mark.parametrize("flags", [
    "--model mixmim_demo --img-size 64 --layer-decay 0.7", "--model resnet18 --img-size 64",
    f"{SIZES} --optimizer sam --pyramid simple --norm layer --jitter 0.5 2",
    f"{SIZES} --global-blocks quarters --window-size 3 --slide 32 16 --eval-flip --checkpointing --ema 0.9 "
    "--eval-train --train-images 5"], ids=["hierarchical", "resnet", "simple pyramid", "windows"])
def test_other_segmenters_train_a_step_and_resume_to_nothing(tmp_path, flags):
    start(f"{FEW} {flags}", tmp_path)
    last = log(tmp_path)[-1]
    assert math.isfinite(last["train_loss"]) and 0 <= last["miou"] <= 100
    before = (tmp_path / "checkpoint.pt").read_bytes()
    start("--resume", tmp_path)
    assert before == (tmp_path / "checkpoint.pt").read_bytes()


def test_segmentation_starts_from_an_encoder_pretrained_at_another_size(finished, tmp_path, capsys):
    sizes = SIZES.replace("48", "32")
    source = finished(f"--task pretrain --segments 2 {sizes} --data-size 32 --batch-size 8 --epochs 1")
    start(f"{FEW} --img-size 48 {STILL} --init {source / 'checkpoint.pt'}", tmp_path)
    assert re.search(r"4x4 .*6x6", capsys.readouterr().out)  # the position table is resized, and that is said
    name = "blocks.1.attn.qkv.weight"
    expected = weights(source)[f"encoder.{name}"]
    torch.testing.assert_close(weights(tmp_path)[f"pyramid.vit.{name}"], expected, rtol=0, atol=1e-6)


def test_a_segmenter_is_no_start(segmented, tmp_path, capsys):
    error = refused(f"{SEGMENT} --init {segmented / 'checkpoint.pt'}", capsys, tmp_path / "run")
    assert "segment" in error and "checkpoint.pt" in error


@pytest.mark.parametrize("layout, images, masks, splits", [
    ("ade20k", "images/{}", "annotations/{}", ("training", "validation")),
    ("coco", "{}", "semantic_{}", ("train2017", "val2017"))], ids=["ade20k", "coco"])
def test_folders_of_masks_are_trained_on_with_images_of_different_sizes(tmp_path, layout, images, masks, splits):
    for split in splits:
        image_folder, mask_folder = tmp_path / images.format(split), tmp_path / masks.format(split)
        image_folder.mkdir(parents=True)
        mask_folder.mkdir(parents=True)
        for k, size in enumerate([(40, 60), (60, 40), (50, 50), (33, 70)]):
            to_pil_image(torch.rand(3, *size)).save(image_folder / f"{k}.jpg")
            to_pil_image(torch.randint(0, 3, (1, *size), dtype=torch.uint8)).save(mask_folder / f"{k}.png")
    if layout == "coco":
        categories = [dict(id=k + 1, name=f"thing {k}", train_id=k) for k in range(2)]
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "semantic_categories.json").write_text(json.dumps({"categories": categories}))

    flags = f"--task segment --channels 8 --batch-size 4 --epochs 1 {SIZES}"
    start(f"{flags} --data {layout} --data-path {tmp_path}", tmp_path / "run")
    assert 0 <= log(tmp_path / "run")[-1]["miou"] <= 100
    assert (tmp_path / "run" / "segments.png").exists()


def test_every_trainable_tensor_gets_a_gradient():
    run = built(SEGMENT)
    batch = torch.randn(2, 3, 48, 48), torch.randint(0, 11, (2, 48, 48))
    run.task.loss(run.model, batch, run.args, run.data).backward()
    for name, param in run.model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name
