import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_runs import make_pipe
from torchvision.transforms.functional import to_pil_image

from data import as_lists
from semantic import Segmentations, SemanticFolder, SemanticScenes, open_semantic
from shapes import Shapes

ROOT = Path(__file__).resolve().parents[1]


def write(root, layout, names=("b", "a"), size=(30, 40), value=2, mode="L"):
    """Two images, one of them gray, and masks: value, with a corner of 0."""
    train, masks = (
        ("images/training", "annotations/training") if layout == "ade20k" else ("train2017", "semantic_train2017")
    )
    for folder in (train, masks, "annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        to_pil_image(torch.rand(3 if k else 1, *size)).save(root / train / f"{name}.jpg")
        mask = torch.full(size, value, dtype=torch.uint8)
        mask[:3, :3] = 0
        Image.fromarray(mask.numpy()).convert(mode).save(root / masks / f"{name}.png")
    if layout == "coco":
        table = [dict(id=7, name="sky", train_id=1), dict(id=2, name="cat", train_id=0)]
        (root / "annotations" / "semantic_categories.json").write_text(json.dumps(dict(categories=table)))
    return root, root / train, root / masks


@pytest.mark.parametrize(
    "layout, value, label, classes",
    [("ade20k", 2, 1, 150), ("ade20k", 150, 149, 150), ("coco", 7, 1, 2), ("coco", 2, 0, 2)],
)
def test_mask_values_become_labels_from_0_and_zero_is_ignored(tmp_path, layout, value, label, classes):
    root, _, masks = write(tmp_path, layout, value=value)
    source = open_semantic(layout, str(root), True, 64)
    assert (
        len(source) == 2
        and [source.name(i) for i in range(2)] == ["a.jpg", "b.jpg"]
        and len(source.classes) == classes
    )
    for i in range(2):
        image, labels = source.sample(i)
        assert image.shape == (3, 30, 40) and image.dtype == labels.dtype == torch.uint8
        assert (labels[:3, :3] == 255).all() and (labels == label).sum() == 30 * 40 - 9
    assert source.classes[label] == (f"class {value}" if layout == "ade20k" else {7: "sky", 2: "cat"}[value])


def test_ade20ks_names_are_read_and_a_cut_off_table_is_refused(tmp_path):
    root, *_ = write(tmp_path, "ade20k")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{k}\t0.1\t9\t9\t1\tname {k}, other" for k in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    assert SemanticFolder("ade20k", root).classes[:2] == ["name 1", "name 2"]
    (root / "objectInfo150.txt").write_text("\n".join(lines[:100]))
    with pytest.raises(ValueError, match="names 99 classes"):
        SemanticFolder("ade20k", root)


def spoil(case, root, images, masks):
    if case == "sizes":
        to_pil_image(torch.rand(3, 30, 41)).save(images / "a.jpg")
    elif case == "value":
        Image.new("L", (40, 30), 200).save(masks / "a.png")
    elif case == "ignored":
        Image.new("L", (40, 30), 0).save(masks / "a.png")
    elif case == "colors":
        Image.new("RGB", (40, 30)).save(masks / "a.png")
    elif case == "no image":
        (images / "a.jpg").unlink()
    elif case == "no mask":
        (masks / "a.png").unlink()
    elif case == "broken image":
        (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    elif case == "broken mask":
        (masks / "a.png").write_bytes(b"no picture")
    elif case == "no masks":
        for file in masks.glob("*.png"):
            file.unlink()
    elif case == "no folder":
        masks.rename(masks.with_name("elsewhere"))


@pytest.mark.parametrize("layout", ["ade20k", "coco"])
@pytest.mark.parametrize(
    "case, words",
    [
        ("sizes", "a.png: the mask is 30x40, the image 30x41"),
        ("value", "a.png: value 200 "),
        ("ignored", "a.png: every pixel is 0"),
        ("colors", "a.png .* mode RGB"),
        ("no image", "a .the first of 1. lacks an image"),
        ("no mask", "a .the first of 1. lacks a mask"),
        ("broken image", "cannot read .*a.jpg"),
        ("broken mask", "cannot read .*a.png"),
        ("no masks", "holds no"),
        ("no folder", "has no folder"),
    ],
)
def test_a_bad_pair_is_named_in_one_sentence(tmp_path, layout, case, words):
    root, images, masks = write(tmp_path, layout)
    spoil(case, root, images, masks)
    if (layout, case) == ("coco", "no mask"):  # the masks say which images there are
        assert len(SemanticFolder(layout, root)) == 1
        return
    with pytest.raises(ValueError, match=words) as error:
        SemanticFolder(layout, root).sample(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "{}",
        '{"categories": [{"id": 1, "name": "a"}]}',
        '{"categories": []}',
        '{"categories": [{"id": 1, "name": "a", "train_id": 1}]}',
        '{"categories": [{"id": 300, "name": "a", "train_id": 0}]}',
        '{"categories": [{"id": 1, "name": 7, "train_id": 0}]}',
        '{"categories": [{"id": 0, "name": "a", "train_id": 0}]}',
        '{"categories": [{"id": 1, "name": "a", "train_id": null}]}',
        "[" * 100_000,
    ],
)
def test_a_bad_table_of_categories_is_named(tmp_path, text):
    root, *_ = write(tmp_path, "coco")
    (root / "annotations" / "semantic_categories.json").write_text(text)
    with pytest.raises(ValueError, match="semantic_categories.json"):
        SemanticFolder("coco", root)
    (root / "annotations" / "semantic_categories.json").unlink()
    with pytest.raises(ValueError, match="has no annotations/semantic_categories.json"):
        SemanticFolder("coco", root)


@pytest.mark.parametrize("name, words", [("cifar10", "no label for every pixel"), ("coco", "needs --data-path")])
def test_a_set_without_masks_or_path_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        open_semantic(name, None, True, 64)


def test_the_generated_scenes_have_their_background_as_class_0():
    source = open_semantic("shapes", None, False, (32, 48), size=16)
    assert len(source) == 4 and source.classes == ["background", *Shapes.classes]
    image, labels = source.sample(1)
    scene = Shapes(4, (32, 48), train=False).scene(1)
    assert (
        torch.equal(image, scene["image"])
        and torch.equal(labels.long(), scene["semantic"])
        and labels.shape == (32, 48)
    )


@pytest.mark.parametrize("suffix", ["JPG", "jpeg"])
def test_other_spellings_of_jpg_are_read_and_two_of_one_name_are_refused(tmp_path, suffix):
    root, images, _ = write(tmp_path, "ade20k")
    (images / "a.jpg").rename(images / f"a.{suffix}")
    (images / "._a.jpg").write_bytes(b"litter")
    source = SemanticFolder("ade20k", root)
    assert [source.name(i) for i in range(2)] == [f"a.{suffix}", "b.jpg"] and source.sample(0)[0].shape == (3, 30, 40)
    (images / "a.jpg").write_bytes(b"another")
    with pytest.raises(ValueError, match=f"a.{suffix}"):
        SemanticFolder("ade20k", root)


def test_a_pipe_in_place_of_a_mask_is_named_and_does_not_hang(tmp_path):
    root, _, masks = write(tmp_path, "ade20k")
    (masks / "a.png").unlink()
    make_pipe(masks / "a.png")
    with pytest.raises(ValueError, match="a.png is no regular file"):
        SemanticFolder("ade20k", root).sample(0)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    root, *_ = write(tmp_path, "ade20k")
    (root / "objectInfo150.txt").write_bytes(b"Name\n" + b"caf\xe9\n" * 150)
    with pytest.raises(ValueError, match="objectInfo150.txt is not UTF-8"):
        SemanticFolder("ade20k", root)


@pytest.mark.parametrize("height, width", [(1, 2000), (2000, 2), (1, 1)])
def test_a_strip_keeps_a_pixel_on_its_short_side(height, width):
    data = Segmentations(Coded(height, width), 32, train=True)
    assert [tuple(part.shape) for part in data[0, 0]] == [(3, 32, 32), (32, 32)]
    image, labels = Segmentations(Coded(height, width), 32, train=False)[0, 0]
    longest = max(image.shape[1:])
    assert min(image.shape[1:]) >= 1 and longest == (32 if height == width else 128)
    assert labels.shape == (height, width)


COCO = ROOT.parent / "shared" / "data" / "coco256"


@pytest.mark.skipif(not COCO.is_dir(), reason="coco256 is not beside the repository")
@pytest.mark.parametrize("train", [True, False])
def test_the_real_masks_of_coco256_pair_and_map(train):
    source = SemanticFolder("coco", COCO, train)
    assert len(source) == 100 and len(source.classes) == 133 and source.classes[0] == "person"
    data = Segmentations(source, 64, train=True)
    for i in range(0, 100, 20):
        image, labels = data[0, i]
        assert image.shape == (3, 64, 64) and ((labels < 133) | (labels == 255)).all()


# ---------------------------------------------------------------------------- augmentation


class Coded:
    """An image whose red channel is its label times 20, so that one can be read off the other."""

    mean, std, classes = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), [str(k) for k in range(12)]

    def __init__(self, height=40, width=60):
        self.labels = (torch.arange(height)[:, None] // 10 * 3 + torch.arange(width) // 20).to(torch.uint8)

    def __len__(self):
        return 6

    def sample(self, i):
        return (self.labels * 20).expand(3, -1, -1).contiguous(), self.labels


def test_image_and_labels_stay_together_through_resizing_cropping_and_flipping():
    """Without colour distortion the image tells the label, but for the blur at edges."""
    data, flips = Segmentations(Coded(), 40, train=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), set()
    compared = 0
    del data.transform.transforms[:4]  # the distortions
    for epoch in range(4):
        for i in range(6):
            image, labels = data[epoch, i]
            assert image.shape == (3, 40, 40) and labels.shape == (40, 40) and labels.dtype == torch.int64
            read = (image[0] * 0.5 + 0.5) * 255 / 20
            inside = labels != 255
            largest, smallest = (sign * F.max_pool2d(sign * labels[None].float(), 7, 1)[0] for sign in (1, -1))
            clear = torch.zeros_like(
                inside
            )  # 3 pixels from edges, whose blur is seen, and from the border, behind which they may be
            clear[3:-3, 3:-3] = (largest == smallest) & (largest < 255)
            assert ((read - labels).abs() < 0.05)[clear].all()
            compared += clear.sum().item()
            assert (image[:, ~inside].abs() < 1e-6).all()  # padding: zero after normalization
            row = labels[20][inside[20]]
            if len(row.unique()) > 1:
                flips.add((row[-1] < row[0]).item())
    assert flips == {True, False} and compared > 3000


def test_scales_lie_between_half_and_twice_the_crop():
    data, shown = Segmentations(Coded(40, 40), 40, train=True), []
    for epoch in range(10):
        for i in range(6):
            labels = data[epoch, i][1]
            shown.append((labels != 255).float().mean().item() ** 0.5 if (labels == 255).any() else 1.0)
    assert 0.48 <= min(shown) < 0.65 and max(shown) == 1  # a scene half as wide fills a quarter of the crop


def test_draws_depend_on_seed_epoch_and_index_alone():
    def draw(seed, epoch, index):
        return Segmentations(Coded(), 40, train=True, seed=seed)[epoch, index]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0, 3, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(0, 3, 2)))
    assert not any(torch.equal(first[0], draw(*key)[0]) for key in ((1, 3, 2), (0, 4, 2), (0, 3, 1)))


def test_evaluation_leaves_labels_and_images_of_the_right_size_alone():
    data = Segmentations(Coded(), 40, train=False)
    image, labels = data[0, 0]
    assert torch.equal((image * 255).round(), Coded().sample(0)[0].float()) and torch.equal(
        labels, Coded().labels.long()
    )
    image, labels = Segmentations(Coded(), 20, train=False)[5, 0]
    assert image.shape == (3, 20, 30) and torch.equal(labels, Coded().labels.long())
    assert Segmentations(Coded(20, 200), 20, train=False)[0, 0][0].shape == (
        3,
        8,
        80,
    )  # the longer side at most four times
    images, maps = as_lists([data[0, 0], Segmentations(Coded(20, 30), 20, train=False)[0, 1]])
    assert [tuple(i.shape) for i in images] == [(3, 40, 60), (3, 20, 30)] and len(maps) == 2


def test_colors_change_but_grey_stays_grey_and_channels_keep_their_order():
    class Grey(Coded):
        def sample(self, i):
            image, labels = super().sample(i)
            return torch.full_like(image, 100), labels

    data = Segmentations(Grey(), 40, train=True, mean=(0.0,) * 3, std=(1.0,) * 3, scale_range=(1.0, 1.0))
    pictures = torch.stack([data[0, i][0] for i in range(len(data))] + [data[1, i][0] for i in range(len(data))])
    torch.testing.assert_close(pictures[:, 0], pictures[:, 1], atol=0.02, rtol=0)
    assert len(pictures[:, 0, 20, 20].unique()) > 1


def test_an_elongated_image_of_the_asked_size_is_left_alone():
    source = SemanticScenes(1, (32, 160))
    image, labels = Segmentations(source, (32, 160), train=False)[0, 0]
    assert image.shape[1:] == labels.shape == (32, 160)


def test_a_scale_range_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="scale_range"):
        Segmentations(Coded(), 40, train=True, scale_range=(2.0, 0.5))
