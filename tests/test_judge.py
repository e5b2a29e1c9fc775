"""--eval-only: a finished run or a published classifier is judged, and nothing is trained or written."""

import pytest
import torch
from PIL import Image
from small_runs import (
    CLASSIFY, DETECT, MIXMIM, PRETRAIN, PROBE, SEGMENT, VIT, assert_same_bits, checkpoint, epochs, inventory, refused,
    start, weights)

import train
from data import Folder, augmentation
from shapes import CLASSES, Shapes
from tasks import load_run
from vit import create_vit

SIZES = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8)


def write_scenes(root, names, each=3):
    """A folder per class with scenes of it, as PNG files."""
    images = Shapes(400, train=False, scenes="simple")
    counts = dict.fromkeys(names, 0)
    for image, label in images:
        name = CLASSES[label]
        if counts.get(name, each) < each:
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{counts[name]}.png")
            counts[name] += 1
    return root


RUNS = {
    "pretrain": PRETRAIN, "mixmim": MIXMIM, "classify": CLASSIFY, "ema": f"{CLASSIFY} --ema 0.9", "probe": PROBE,
    "probe by batches": f"--task probe --style mae {VIT} --data-size 64 --batch-size 16 --epochs 1 --ema 0.9",
    "lbfgs": f"--task probe {VIT} --data-size 64", "detect": DETECT, "segment": SEGMENT,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_judged_to_the_figures_of_its_log(finished, name):
    if name == "detect":
        pytest.importorskip("pycocotools")
    folder = finished(RUNS[name])
    before = inventory(folder)
    figures = train.main(["--resume", "--output-dir", str(folder), "--eval-only"])
    assert inventory(folder) == before
    last = epochs(folder)[-1]
    shared = [key for key in figures if key in last]
    assert "val_loss" in shared or "box_ap" in shared or "miou" in shared
    for key in shared:
        if last[key] is not None:
            assert figures[key] == pytest.approx(last[key], rel=2e-4), key


@pytest.mark.parametrize("name", ["ema", "probe by batches"])
def test_a_loaded_run_has_the_weights_that_were_evaluated(finished, name):
    folder = finished(RUNS[name])
    average = checkpoint(folder)["ema"]
    assert_same_bits(load_run(folder).model.state_dict(),
                     {key.removeprefix("module."): average[key] for key in average if key.startswith("module.")})


def test_another_set_is_normalized_as_the_run_was_and_a_part_of_the_classes_competes_alone(finished, tmp_path):
    folder, names = finished(CLASSIFY), CLASSES[2:5]
    images = write_scenes(tmp_path, names)
    figures = train.main(["--resume", "--output-dir", str(folder), "--eval-only", "--data", "folder",
                          "--data-path", str(images)])
    assert figures["val_images"] == 9 and figures["classes"] == 3

    # by hand: only the three outputs count
    model = create_vit("vit_demo", num_classes=10, pool="mean", pos_embed="sincos", **SIZES)
    model.load_state_dict(weights(folder))
    source = Folder(str(images), train=False, bare=True)
    simple = Shapes(1, scenes="simple")
    transform = augmentation("none", (32, 32), simple.mean, simple.std)
    x = torch.stack([transform(source[i][0]) for i in range(9)])
    labels = torch.tensor([source[i][1] for i in range(9)])
    order = [CLASSES.index(name) for name in source.classes]
    logits = model.eval()(x)[:, order]
    assert figures["val_acc"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert figures["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.fixture
def published(tmp_path):
    """A file of weights without names: 10 classes, scale 0.5; a folder of three of its classes; the list of names."""
    torch.manual_seed(0)
    model = create_vit("vit_demo", num_classes=10, **SIZES)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    write_scenes(tmp_path / "part", CLASSES[2:5])
    write_scenes(tmp_path / "all" / "val", sorted(CLASSES), each=1)
    return model.eval(), tmp_path


def flags_of(folder, part="part", more=""):
    sizes = "--embed-dim 32 --depth 2 --num-heads 2 --patch-size 8 --img-size 32 --pool cls"
    return (f"--task classify --init {folder / 'weights.pt'} --eval-only {sizes} --data folder "
            f"--data-path {folder / part} --mean-std 0.5 0.5 {more}")


def test_a_published_classifier_keeps_its_head(published):
    model, folder = published
    figures = start(flags_of(folder, more=f"--class-names {folder / 'names.txt'}"))

    source = Folder(str(folder / "part"), train=False, bare=True)
    x = torch.stack([source[i][0] for i in range(9)]) / 127.5 - 1
    labels = torch.tensor([source[i][1] for i in range(9)])
    logits = model(x)[:, [CLASSES.index(name) for name in source.classes]]
    assert figures["val_acc"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert figures["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert figures["val_images"] == 9 and figures["val_top5"] == 100  # of three classes

    # as many folders as outputs: in their order; five of ten
    figures = start(flags_of(folder, "all"))
    assert figures["val_acc"] <= figures["val_top5"] < 100 and figures["classes"] == 10


@pytest.mark.parametrize("more, words", [
    ("", ("10 outputs", "3 classes", "--class-names")),
    ("--class-names {folder}/two.txt", ("10 outputs", "2 classes")),
    ("--class-names {folder}/other.txt", ("classes", "not those of the model")),
    ("--class-names {folder}/none.txt", ("none.txt",)),
    ("--class-names {folder}/names.txt --pool mean", ("fc_norm", "--pool")),
    ("--class-names {folder}/names.txt --output-dir {folder}/x", ("--output-dir",)),
])
def test_what_cannot_be_judged_is_one_sentence(published, capsys, more, words):
    folder = published[1]
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "other.txt").write_text("\n".join("abcdefghij"))
    error = refused(flags_of(folder, more=more.format(folder=folder)), capsys)
    assert all(word in error for word in words), error


def test_a_file_without_a_classifier_is_refused(published, capsys):
    _, folder = published
    torch.save(create_vit("vit_demo", num_classes=0, **SIZES).state_dict(), folder / "weights.pt")
    assert "no linear classifier" in refused(flags_of(folder), capsys)


def test_a_run_is_not_judged_with_other_flags_or_where_there_is_none(finished, capsys, tmp_path):
    folder = finished(CLASSIFY)
    assert "--depth" in refused(f"--resume --output-dir {folder} --eval-only --depth 3", capsys)
    assert "checkpoint.pt" in refused(f"{CLASSIFY} --resume --output-dir {tmp_path} --eval-only", capsys)
    assert "--init" in refused(f"{CLASSIFY} --eval-only", capsys)
    write_scenes(tmp_path / "set", CLASSES[:2])
    (tmp_path / "set" / CLASSES[0]).rename(tmp_path / "set" / "unicorn")
    words = f"--resume --output-dir {folder} --eval-only --data folder --data-path {tmp_path / 'set'}"
    assert "unicorn" in refused(words, capsys)
