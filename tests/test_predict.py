"""predict.py and load_run: a finished run on new images, in agreement with its own evaluation."""

import base64
import io
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from small_runs import CONTRAST, FOLDER, MIXMIM, PRETRAIN, VIT, built, log, start
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import predict
from coco import average_precision, make_truth
from segment import confusion_matrix, mean_iou
from semantic import SemanticFolder
from shapes import Shapes
from tasks import describe, load_run, probe
from tasks.detection import coco_results
from training import pictures
from training.world import World

PROBE = f"--task probe {VIT} --data-size 64"
SIZES = [(48, 48), (40, 60), (60, 40), (33, 70)]


def photo(seed, size=(48, 48)):
    """A scene resized to any size, uint8 (3, H, W)."""
    image = Shapes(64, img_size=48)[seed][0]
    return pil_to_tensor(to_pil_image(image).resize(size[::-1]))


@pytest.fixture
def photos(tmp_path):
    """Three images, one of them in a folder below; all of different sizes."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for k, name in enumerate(("7.png", "8.png", "below/7.png")):
        to_pil_image(photo(k, SIZES[k])).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def call(folder, *words):
    predict.main(["--run", str(folder), "--device", "cpu", *map(str, words)])


def refused(capsys, folder, *words):
    """The sentence with which predict.py refuses."""
    with pytest.raises(SystemExit) as end:
        call(folder, *words)
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and error[-1].startswith("predict.py: ")
    return error[-1]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def label_map(line):
    return pil_to_tensor(Image.open(io.BytesIO(base64.b64decode(line["labels"]))))[0]


# ---------------------------------------------------------------------------- agreement with the evaluation


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run on a folder of images of two classes, with an average of its weights."""
    root = tmp_path_factory.mktemp("classifier")
    for split, images in (("train", 8), ("val", 7)):
        for k, name in enumerate(("cat", "dog")):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(images):
                to_pil_image(photo(8 * k + i, SIZES[i % 4])).save(root / "data" / split / name / f"{i}.png")
    start(f"{FOLDER} --ema 0.5 --img-size 32 --data-path {root / 'data'}", root / "run")
    return root / "run"


def test_classes_of_almost_no_pixel_are_not_in_the_line():
    assert describe({"shares": {"sky": 0.0004, "tree": 0.25, "grass": 0.7496}}) == "grass 75.0 %, tree 25.0 %"


def test_accuracy_from_the_json_is_that_of_the_log(classifier, tmp_path):
    call(classifier, classifier.parent / "data" / "val", "--json", tmp_path / "seen.jsonl")
    lines = lines_of(tmp_path / "seen.jsonl")
    correct = [f"/{line['classes'][0]['class']}/" in line["path"] for line in lines]
    assert len(lines) == 14
    assert 100 * sum(correct) / 14 == pytest.approx(log(classifier)[-1]["val_acc"], abs=1e-3)
    assert sum(item["probability"] for item in lines[0]["classes"]) == pytest.approx(1, abs=1e-5)


def test_a_run_with_an_average_of_its_weights_is_used_as_it_was_evaluated(classifier):
    run, saved = load_run(classifier), torch.load(classifier / "checkpoint.pt", weights_only=True)
    assert torch.equal(run.model.head.weight, saved["ema"]["module.head.weight"])
    assert not torch.equal(run.model.head.weight, saved["model"]["head.weight"])

    # and its loss, which moves with every weight, is that of the log
    data = datasets.ImageFolder(classifier.parent / "data" / "val")
    images, labels = zip(*data)
    logits = run.model(torch.stack([run.transform(pil_to_tensor(image)) for image in images]))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    assert loss.item() == pytest.approx(log(classifier)[-1]["val_loss"], abs=1e-4)


def coco_folder(root, split, ids):
    """Images with one large object each. The category ids are not those of COCO for these names."""
    (root / split).mkdir(parents=True)
    samples = []
    for k in range(len(ids)):
        size, label = SIZES[k % 4], 1 + k % 2
        image = torch.full((3, *size), 40, dtype=torch.uint8)
        mask = torch.zeros(1, *size, dtype=torch.uint8)
        top, left = 2 + k % 5, 3 + k % 7
        mask[0, top:size[0] - 4, left:size[1] - 3] = 1
        image[label, mask[0] > 0] = 250
        to_pil_image(image).save(root / split / f"{ids[k]:012d}.png")
        box = torch.tensor([[left, top, size[1] - 3, size[0] - 4]]).float()
        samples.append((image, dict(boxes=box, labels=torch.tensor([label]), masks=mask)))
    content = make_truth(samples, [4, 700]).dataset
    for image in content["images"]:
        image["id"] = ids[image["id"]]
        image["file_name"] = f"{image['id']:012d}.png"
    for entry in content["annotations"]:
        entry["image_id"] = ids[entry["image_id"]]
        entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
    content["categories"] = [dict(id=4, name="car"), dict(id=700, name="dog")]
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A run on a set in COCO's layout that learns where the objects are."""
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("detector")
    coco_folder(root / "data", "train2017", [100 + k for k in range(16)])
    coco_folder(root / "data", "val2017", [5, 139, 7, 9, 12])
    sizes = "--img-size 48 --patch-size 8 --depth 4 --embed-dim 32 --num-heads 2"
    flags = f"--task detect {sizes} --epochs 3 --batch-size 4 --blr 0.5 --jitter 0 0 --eval-every 3"
    start(f"{flags} --data coco --data-path {root / 'data'}", root / "run")
    return root / "run"


def test_average_precision_from_the_coco_file_is_that_of_the_log(detector, tmp_path, capsys):
    from pycocotools.coco import COCO

    data = detector.parent / "data"
    call(detector, data / "val2017", "--json", tmp_path / "seen.json", "--coco")
    assert "image_id: the number in its name; category_id: as in the run's training set" in capsys.readouterr().out
    results, last = json.loads((tmp_path / "seen.json").read_text()), log(detector)[-1]
    assert {result["category_id"] for result in results} <= {4, 700} and last["box_ap"] > 1
    truth = COCO(data / "annotations" / "instances_val2017.json")
    for kind in ("box", "mask"):
        figures = average_precision(results, truth, kind, None)
        assert 100 * figures[f"{kind}_ap"] == pytest.approx(last[f"{kind}_ap"], abs=1e-3)
        assert 100 * figures[f"{kind}_ap50"] == pytest.approx(last[f"{kind}_ap50"], abs=1e-3)


def test_category_ids_are_those_of_the_training_set_and_images_without_numbers_are_counted():
    paths = [Path("a.jpg"), Path("7.jpg")]
    item = dict(bbox=[0, 0, 1, 1], score=1.0, label=2, **{"class": "unicorn"})  # of a detector without masks
    args = Namespace(category_ids=[4, 700], data="coco")
    results, note = coco_results(args, paths, {1: dict(objects=[item])})
    assert results == [dict(image_id=2, category_id=700, bbox=[0, 0, 1, 1], score=1.0)]
    assert "counted from 1" in note


def test_a_run_that_saved_no_category_ids_writes_none(detector, photos, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    saved = torch.load(detector / "checkpoint.pt", weights_only=True)
    del saved["args"]["category_ids"]
    torch.save(saved, tmp_path / "old" / "checkpoint.pt")
    assert "category ids" in refused(capsys, tmp_path / "old", photos, "--json", tmp_path / "a.json", "--coco")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A run on a set in the layout of ADE20K, whose classes are brightnesses."""
    root = tmp_path_factory.mktemp("segmenter")
    for split in ("training", "validation"):
        images, masks = root / "data" / "images" / split, root / "data" / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for k, size in enumerate(SIZES):
            image = photo(k, size)
            labels = (image.float().mean(0, keepdim=True) / 64).to(torch.uint8)  # 0 is ignored
            to_pil_image(image).save(images / f"{k}.jpg")
            to_pil_image(labels).save(masks / f"{k}.png")
    sizes = "--img-size 48 --patch-size 8 --depth 4 --embed-dim 32 --num-heads 2"
    flags = f"--task segment {sizes} --channels 8 --batch-size 4 --epochs 2"
    start(f"{flags} --data ade20k --data-path {root / 'data'}", root / "run")
    return root / "run"


def test_mean_iou_from_the_json_is_that_of_the_log(segmenter, tmp_path):
    data = segmenter.parent / "data"
    call(segmenter, data / "images" / "validation", "--json", tmp_path / "seen.jsonl")
    lines, truth = lines_of(tmp_path / "seen.jsonl"), SemanticFolder("ade20k", data, train=False)
    confusion = torch.zeros(150, 150, dtype=torch.long)
    for k, line in enumerate(lines):
        assert line["path"].endswith(truth.name(k)) and sum(line["shares"].values()) == pytest.approx(1, abs=1e-5)
        confusion += confusion_matrix(label_map(line), truth.sample(k)[1], 150)
    figures, last = mean_iou(confusion), log(segmenter)[-1]
    assert 100 * figures["miou"] == pytest.approx(last["miou"], abs=1e-3) and last["miou"] > 0
    assert 100 * figures["pixel_acc"] == pytest.approx(last["pixel_acc"], abs=1e-3)


# ---------------------------------------------------------------------------- lines and pictures


@pytest.mark.parametrize("run, words", [
    ("classifier", " %, "), ("segmenter", "class "), ("detector", " at "), (PRETRAIN, "hidden patches 1."),
    (MIXMIM, "hidden patches 1."), (CONTRAST, "32 features")],
    ids=["classify", "segment", "detect", "mirl", "mixmim", "contrast"])
def test_every_image_gets_a_line_that_begins_with_its_path_and_a_picture(
        request, finished, photos, capsys, run, words):
    folder = finished(run) if " " in run else request.getfixturevalue(run)
    seen = photos.parent / "seen"
    capsys.readouterr()
    call(folder, photos, "--output-dir", seen, "--json", photos.parent / "seen.jsonl")
    lines = capsys.readouterr().out.splitlines()
    paths = [str(photos / name) for name in ("7.png", "8.png", "below/7.png")]
    assert [line.split(": ")[0] for line in lines] == paths
    assert all(words in line for line in lines)
    assert [line["path"] for line in lines_of(photos.parent / "seen.jsonl")] == paths
    assert sorted(file.name for file in seen.iterdir()) == ["7.png", "7_2.png", "8.png"]
    assert all(min(Image.open(file).size) >= 128 for file in seen.iterdir())


def test_objects_are_drawn_with_their_boxes_where_they_are():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    boxes, labels = torch.tensor([[16.0, 24, 48, 56]]), torch.tensor([1])
    drawn = pictures.draw_objects(image, boxes, labels, masks, ["cat"], "red", [1.0])
    assert drawn.shape == (3, 320, 320)  # enlarged five times
    assert drawn[:, 120, 200].tolist() == [255, 0, 0] and drawn[:, 279, 81].tolist() == [255, 0, 0]
    assert drawn[:, 200, 160].tolist() == [0, 0, 0]


def test_a_detector_says_how_sure_its_best_object_is_and_the_flag_that_shows_it(detector, photos, tmp_path, capsys):
    call(detector, photos / "7.png", "--threshold", 0.99, "--output-dir", tmp_path / "none")
    line = capsys.readouterr().out
    assert "at least 0.99 (--threshold)" in line
    score = float(re.search(r"the best is \w+ (0\.\d+) at", line)[1])
    call(detector, photos / "7.png", "--threshold", score - 0.01, "--output-dir", tmp_path / "best")
    assert f" {score} at x" in capsys.readouterr().out
    heights = [Image.open(tmp_path / folder / "7.png").height for folder in ("none", "best")]
    assert heights == [5 * 48 + 30, 7 * 48]  # without objects there is a sentence below


def test_a_reconstructions_loss_is_that_of_the_image_alone(finished):
    for flags in (PRETRAIN, MIXMIM):
        run = load_run(finished(flags))
        images = [photo(k) for k in range(3)]
        together = [prediction["loss"] for prediction in run.predict(images)]
        alone = [run.predict([image])[0]["loss"] for image in images]
        assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 3


def test_images_are_read_right_whatever_their_mode(finished, tmp_path):
    gray = photo(3).float().mean(0, keepdim=True).to(torch.uint8)
    pixels = to_pil_image(gray)
    pixels.convert("RGB").save(tmp_path / "a.png")
    pixels.save(tmp_path / "b.png")
    pixels.convert("P").save(tmp_path / "c.png")
    Image.fromarray(gray[0].numpy().astype("uint16") * 256 + 17).save(tmp_path / "d.png")
    pixels.convert("RGB").convert("CMYK").save(tmp_path / "e.tiff")
    photos = predict.Photos([tmp_path])
    assert len(photos) == 5
    for i in range(5):
        assert torch.equal(photos.read(i), gray.expand(3, -1, -1))


# ---------------------------------------------------------------------------- features, neighbors, export


def test_features_of_a_pretrained_run_are_those_that_a_probe_reads(pretrained, photos, tmp_path, capsys):
    call(pretrained, photos, "--features", tmp_path / "f.npz")
    file = numpy.load(tmp_path / "f.npz")
    assert file["paths"].tolist() == [str(photos / name) for name in ("7.png", "8.png", "below/7.png")]
    assert file["features"].shape == (3, 32)

    flags = f"--task probe --style adamw --init {pretrained / 'checkpoint.pt'} --data-size 16"
    args = built(flags)
    source = args.data.val.images.source
    expected = probe.features(args.model, args.data.val.images, args.args, World("cpu")).features
    features = load_run(pretrained).features([source[i][0] for i in range(len(source))])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", ["classifier", CONTRAST, MIXMIM, PROBE],
                         ids=["classify", "contrast", "mixmim", "probe"])
def test_runs_of_whole_images_have_features(request, finished, run):
    run = load_run(finished(run) if " " in run else request.getfixturevalue(run))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    features = run.features([photo(k, SIZES[k]) for k in range(3)])
    assert features.shape == (3, run.encoder.num_features) and features.std(dim=0).min() > 0
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_the_nearest_neighbor_of_an_image_is_its_copy_and_not_itself(pretrained, photos, tmp_path, capsys):
    to_pil_image(photo(1, SIZES[1])).save(photos / "copy.png")
    call(pretrained, photos, "--neighbors", photos / "8.png", "--output-dir", tmp_path / "seen")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{photos / 'copy.png'}: similarity 1.000"
    assert len(lines) == 4 and not any(line.startswith(str(photos / "8.png")) for line in lines)
    picture = Image.open(tmp_path / "seen" / "8_neighbors.png")
    assert picture.size == (4 * 200 + 8, 260)


@pytest.mark.parametrize("run", [
    pytest.param("classifier", id="classify"), pytest.param(PROBE, id="probe"),
    pytest.param("segmenter", id="segment")])
def test_an_exported_model_gives_the_same_outputs_at_another_batch_size(request, finished, tmp_path, run):
    folder = finished(run) if " " in run else request.getfixturevalue(run)
    call(folder, "--export", tmp_path / "model.pt2")
    about = {"about.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=about)
    run = load_run(folder)
    assert json.loads(about["about.json"])["classes"] == run.classes
    for batch in (1, 5):
        images = torch.randn(batch, 3, *run.args.img_size)
        torch.testing.assert_close(program.module()(images), run.model(images), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------- bad input


def test_a_broken_image_among_good_ones_stops_or_is_skipped_and_counted(classifier, photos, capsys):
    folder = classifier
    (photos / "a broken one.png").write_bytes((photos / "7.png").read_bytes()[:200])
    error = refused(capsys, folder, photos)
    assert "a broken one.png" in error and "--skip-bad" in error

    call(folder, photos, "--skip-bad", "--json", photos.parent / "seen.jsonl")
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == len(lines_of(photos.parent / "seen.jsonl")) == 3
    assert "a broken one.png" in error and "skipped 1 of 4 images" in error
    assert "none of the 1" in refused(capsys, folder, photos / "a broken one.png", "--skip-bad")


@pytest.mark.parametrize("words, named", [
    ("photos --json seen.json --coco", "--coco"), ("photos --coco", "--json"), ("", "PATH"), ("empty", "empty"),
    ("nowhere", "nowhere"), ("photos --features photos/7.png", "7.png"), ("photos --json nowhere/a.json", "nowhere"),
    ("photos --output-dir photos", "7.png"), ("photos --json a.json --features b.npz", "--json"),
    ("photos --neighbors nowhere.png", "nowhere.png"), ("--export a.pt2", "probe"), ("photos --louder", "--louder"),
    ("photos --threshold 0.3", "--threshold"), ("photos --threshold 2", "--threshold")])
def test_bad_input_is_one_sentence(pretrained, photos, monkeypatch, capsys, words, named):
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    before = {file: file.read_bytes() for file in photos.rglob("*.png")}
    assert named in refused(capsys, pretrained, *words.split())
    assert before == {file: file.read_bytes() for file in photos.parent.rglob("*.png")}


def test_a_detector_has_no_features_and_no_export_and_a_missing_run_is_named(detector, photos, capsys, tmp_path):
    assert "--task detect" in refused(capsys, detector, photos, "--features", tmp_path / "f.npz")
    assert "detector" in refused(capsys, detector, "--export", tmp_path / "d.pt2")
    assert "runs/nowhere" in refused(capsys, "runs/nowhere", photos)


def test_an_array_that_is_no_image_is_refused(classifier):
    with pytest.raises(ValueError, match="float32"):
        load_run(classifier).predict([torch.rand(3, 32, 32)])


# ---------------------------------------------------------------------------- curves


def test_a_run_leaves_curves_where_matplotlib_is_installed(classifier, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert Image.open(classifier / "curves.png").size[0] > 800
    (tmp_path / "log.jsonl").write_bytes((classifier / "log.jsonl").read_bytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # not installed
        pictures.save_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    pictures.save_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()
