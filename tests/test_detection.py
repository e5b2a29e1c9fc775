"""Detection: Mask R-CNN on an encoder, trained by the loop and judged by average precision."""

import json
import math
import re

import pytest
import torch
from small_runs import (
    DETECT,
    STILL,
    assert_same_bits,
    assert_same_run,
    checkpoint,
    judged,
    killed,
    log,
    on_each_loss,
    refused,
    start,
    weights,
)
from torchvision.transforms.functional import to_pil_image

import train
from data import first_of_shuffle
from detect import vit_mask_rcnn
from tasks import load_run
from vit import create_vit

pytest.importorskip("pycocotools")

METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "proposal_recall")
SIZES = "--img-size 48 --depth 4 --embed-dim 32 --num-heads 2 --patch-size 8"
ONE_EPOCH = f"{DETECT} --epochs 1"
CLASSIFY = f"--task classify --data-size 16 --epochs 1 --batch-size 4 {SIZES}"


@pytest.fixture(scope="module")
def detected(finished):
    return finished(DETECT)


def test_detection_leaves_average_precision_pictures_and_a_checkpoint_that_loads(detected):
    last = log(detected)[-1]
    assert set(METRICS) <= set(last) and "val_loss" not in last
    for name in METRICS:
        assert last[name] is None or 0 <= last[name] <= 100
    assert (detected / "detections.png").exists()
    assert_same_bits(dict(load_run(detected).model.state_dict()), weights(detected))


def test_detections_figures_are_those_of_the_saved_model(detected):
    last = log(detected)[-1]
    for name, value in judged(detected, batch_size=3).items():
        assert last[name] == pytest.approx(value, abs=1e-3)


def test_detection_killed_and_resumed_ends_with_the_same_bits(detected, tmp_path, monkeypatch):
    killed(monkeypatch, 1, DETECT, tmp_path)
    start("--resume", tmp_path)
    assert_same_run(detected, tmp_path)


def test_detection_with_jitter_and_sam_starts_from_an_encoder_pretrained_at_another_size(tmp_path, finished, capsys):
    sizes = SIZES.replace("48", "32")
    source = finished(f"--task pretrain --segments 2 {sizes} --data-size 32 --batch-size 8 --epochs 1")
    flags = "--task detect --img-size 48 --data-size 8 --batch-size 4 --epochs 1 --optimizer sam --jitter 0.5 2"
    start(f"{flags} {STILL} --init {source / 'checkpoint.pt'}", tmp_path)
    assert re.search(r"4x4 .*6x6", capsys.readouterr().out)  # the position table is resized, and that is said

    encoder, detector = weights(source), weights(tmp_path)
    name = "blocks.1.attn.qkv.weight"
    inside = next(key for key in detector if key.endswith(name))
    torch.testing.assert_close(detector[inside], encoder[f"encoder.{name}"], rtol=0, atol=1e-6)


def beit_file(path, **options):
    """A BEiT of the size of DETECT's encoder, as its authors save it: no positions, one bias for all blocks."""
    sizes = dict(img_size=32, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=0)
    beit = dict(pos_embed=None, rel_pos_bias="shared", layer_scale=0.1)
    state = create_vit("vit_demo", **{**sizes, **beit, **options}).state_dict()
    for i in range(4):
        q, _, v = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("flags", [ONE_EPOCH, CLASSIFY], ids=["detect", "classify"])
def test_a_beit_is_built_with_its_bias_and_layer_scale(tmp_path, capsys, flags):
    start(f"{flags} --init {beit_file(tmp_path / 'beit.pth')}", tmp_path / "run")
    names = weights(tmp_path / "run")
    assert any(name.endswith("blocks.3.gamma_2") for name in names)
    assert "BEiT" in capsys.readouterr().out
    if flags is CLASSIFY:
        assert "rel_pos_bias.relative_position_bias_table" in names


@pytest.mark.parametrize(
    "options, flags, word",
    [
        (dict(patch_size=4), "--patch-size 8", "--patch-size 4"),
        (dict(), "--no-rel-pos", "--no-rel-pos"),
        (dict(), "--no-class-token", "--no-class-token"),
        (dict(rel_pos_bias="block"), "", "block"),
    ],
)
def test_a_beit_that_does_not_fit_the_flags_is_named(tmp_path, capsys, options, flags, word):
    file = beit_file(tmp_path / "beit.pth", **options)
    error = refused(f"{DETECT} {flags} --init {file}", capsys, tmp_path / "run")
    assert word in error and "beit.pth" in error


@pytest.mark.slow
def test_a_detector_is_resumed_without_the_file_it_started_from(tmp_path, monkeypatch):
    file = beit_file(tmp_path / "beit.pth")
    start(f"{DETECT} --init {file}", tmp_path / "whole")
    killed(monkeypatch, 1, f"{DETECT} --init {file}", tmp_path / "run")
    file.unlink()
    start("--resume", tmp_path / "run")
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_detector_is_no_start(detected, tmp_path, capsys):
    error = refused(f"{DETECT} --init {detected / 'checkpoint.pt'}", capsys, tmp_path / "run")
    assert "detect" in error and "checkpoint.pt" in error


def test_detection_without_pycocotools_stops_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    error = refused(DETECT, capsys, tmp_path / "run")
    assert "pip install pycocotools" in error and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_training_images_alone_are_evaluated_with_eval_train(tmp_path, monkeypatch):
    judged_images = []
    evaluate = train.TASKS["detect"].evaluate

    def watch(model, loader, args, data, world):
        judged_images.append([data.val.source.image_ids[i] for i in data.val.indices])
        return evaluate(model, loader, args, data, world)

    monkeypatch.setattr(train.TASKS["detect"], "evaluate", watch)
    start(f"{ONE_EPOCH} --eval-train --train-images 5", tmp_path)
    assert judged_images == [first_of_shuffle(16, 5)]
    assert log(tmp_path)[-1]["box_ap"] >= 0


@pytest.mark.parametrize("flags, jitter", [("", [0.1, 2.0]), ("--jitter 0 0", [0, 0]), ("--jitter 1 2", [1, 2])])
def test_jitter_of_photographs_has_a_default_and_can_be_turned_off(flags, jitter):
    args = train.parse(f"--task detect --data coco --model vit_demo {flags}".split())
    assert args.jitter == jitter


@pytest.mark.slow
def test_jitter_that_is_off_stays_off_when_the_run_is_resumed(tmp_path, finished, monkeypatch):
    killed(monkeypatch, 1, f"{DETECT} --jitter 0 0", tmp_path)
    start("--resume", tmp_path)
    assert checkpoint(tmp_path)["args"]["jitter"] == [0, 0]
    assert_same_bits(weights(tmp_path), weights(finished(f"{DETECT} --jitter 0 0")))


def test_class_agnostic_detection_has_one_class(tmp_path):
    start(f"{ONE_EPOCH} --class-agnostic", tmp_path)
    assert weights(tmp_path)["roi_heads.box_predictor.cls_score.weight"].shape[0] == 2
    assert len(checkpoint(tmp_path)["classes"]) == 1
    assert 0 <= log(tmp_path)[-1]["proposal_recall"] <= 100


def test_a_coco_file_with_boxes_only_trains_and_is_judged_by_boxes(tmp_path, capsys):
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        content = dict(images=[], categories=[dict(id=1, name="cat")], annotations=[])
        for k in range(4):
            to_pil_image(torch.rand(3, 48, 48)).save(tmp_path / split / f"{k}.png")
            content["images"].append(dict(id=k, file_name=f"{k}.png", height=48, width=48))
            entry = dict(id=k, image_id=k, category_id=1, bbox=[4, 4, 20, 30], area=600, iscrowd=0)
            content["annotations"].append(entry)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))

    flags = f"--task detect --data coco --data-path {tmp_path} --epochs 1 --batch-size 2 {SIZES}"
    assert "--boxes-only" in refused(flags, capsys, tmp_path / "refused")
    start(f"{flags} --boxes-only", tmp_path / "run")
    last = log(tmp_path / "run")[-1]
    assert last["box_ap"] >= 0 and last["mask_ap"] is None and math.isfinite(last["train_loss"])
    assert not any("mask" in name for name in weights(tmp_path / "run"))
    run = load_run(tmp_path / "run")
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    prediction, = run.predict([image])
    assert json.dumps(prediction) and run.draw(image, prediction).width >= 48


@pytest.mark.parametrize("height, width", [(2, 2000), (2000, 2), (1, 300)])
def test_a_strip_is_padded_rather_than_resized_to_nothing(height, width):
    model = vit_mask_rcnn(create_vit("vit_demo", img_size=64, patch_size=8, depth=4, num_classes=0), 2, 64,
                          norm="group", channels=16, box_dim=32, box_convs=1, mask_convs=1, rpn_convs=1,
                          box_score_thresh=0.0)
    boxes = torch.tensor([[0.0, 0, width, height]])
    target = dict(boxes=boxes, labels=torch.tensor([1]), masks=torch.ones(1, height, width, dtype=torch.uint8))
    images, targets = model.transform([torch.rand(3, height, width)], [target])
    assert min(images.image_sizes[0]) >= 1 and max(images.image_sizes[0]) == 64
    assert targets[0]["masks"].shape[1:] == images.image_sizes[0]
    out, = model.eval()([torch.rand(3, height, width)])
    assert out["masks"].shape[2:] == (height, width)


@pytest.mark.parametrize(
    "flags",
    [
        "--model mixmim_demo --img-size 64",
        "--model resnet18 --img-size 64",
        f"{SIZES} --pyramid simple --norm layer",
        f"{SIZES} --pyramid single --global-blocks none --window-size 3 --no-rel-pos --checkpointing",
    ],
)
def test_other_detectors_train_a_step(tmp_path, flags):
    start(f"--task detect --data-size 4 --batch-size 4 --epochs 1 {flags}", tmp_path)
    assert math.isfinite(log(tmp_path)[-1]["train_loss"])


def test_the_loss_is_the_sum_of_all_parts_of_mask_rcnn(tmp_path, monkeypatch):
    parts = []

    def act(number, model, loss):
        model.register_forward_hook(lambda module, inputs, out: parts.append(set(out)) if module.training else None)

    on_each_loss(monkeypatch, act)
    start(f"{ONE_EPOCH} --data-size 8", tmp_path)
    names = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert parts and parts[0] == names
