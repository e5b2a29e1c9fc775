import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

pytest.importorskip("pycocotools")

import coco
from coco import CocoImages, Detections, ShapeScenes, check_target, coco_evaluate, large_scale_jitter, make_truth
from data import as_lists


class Oracle(nn.Module):
    """Says what it was told, sample after sample."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.at = answers, 0

    def forward(self, images):
        self.at += len(images)
        return self.answers[self.at - len(images) : self.at]


def answer(target, scores=None, shift=0):
    n = len(target["boxes"])
    return dict(
        boxes=target["boxes"] + shift,
        labels=target["labels"],
        scores=torch.ones(n) if scores is None else torch.tensor(scores),
        masks=target["masks"][:, None].float(),
    )


def batches(samples, size=1):
    return [as_lists(samples[i : i + size]) for i in range(0, len(samples), size)]


@pytest.fixture(scope="module")
def scenes():
    source = ShapeScenes(21, 64, train=False)
    data = Detections(source)
    return source, [data[0, i] for i in range(len(data))]


def judge(source, samples, answers, size=1):
    return coco_evaluate(Oracle(answers), batches(samples, size), source.truth(), source.ids)


def test_the_truth_against_itself_is_one_and_nothing_found_is_zero(scenes):
    source, samples = scenes
    result = judge(source, samples, [answer(target) for _, target in samples])
    assert all(result[f"{kind}_{key}"] == 1 for kind in ("box", "mask") for key in ("ap", "ap50", "ap75"))
    none = dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        scores=torch.zeros(0),
        masks=torch.zeros(0, 1, 64, 64),
    )
    result = judge(source, samples, [none] * len(samples))
    assert result["box_ap"] == result["mask_ap50"] == 0


def test_without_any_truth_it_does_not_crash():
    empty = dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        masks=torch.zeros(0, 8, 8, dtype=torch.uint8),
    )
    truth = make_truth([(torch.zeros(3, 8, 8), empty)], [1])
    one = dict(
        boxes=torch.tensor([[0.0, 0, 4, 4]]),
        labels=torch.tensor([1]),
        scores=torch.tensor([0.9]),
        masks=torch.ones(1, 1, 8, 8),
    )
    result = coco_evaluate(Oracle([one]), [([torch.zeros(3, 8, 8)], [dict(image_id=0)])], truth, [1])
    assert result["box_ap"] == -1


def test_average_precision_matches_a_hand_computed_one():
    """Two objects of a class: the surest answer is right, the second wrong, the third right. Precision 1 up to
    recall 1/2, then 2/3."""
    mask = torch.zeros(2, 40, 40, dtype=torch.uint8)
    mask[0, :10, :10], mask[1, 20:30, 20:30] = 1, 1
    target = dict(boxes=torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), labels=torch.tensor([1, 1]), masks=mask)
    truth = make_truth([(torch.zeros(3, 40, 40), target)], [1])
    wrong = torch.tensor([[0.0, 30, 10, 40]])
    found = dict(
        boxes=torch.cat([target["boxes"][:1], wrong, target["boxes"][1:]]),
        labels=torch.ones(3, dtype=torch.long),
        scores=torch.tensor([0.9, 0.8, 0.7]),
    )
    result = coco_evaluate(Oracle([found]), [([torch.zeros(3, 40, 40)], [dict(image_id=0)])], truth, [1])
    assert (
        result["box_ap50"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101, abs=1e-6) and "mask_ap" not in result
    )  # 101 recalls: 0, 0.01, ...


def test_the_figures_do_not_depend_on_the_batch_size(scenes):
    source, samples = scenes
    torch.manual_seed(0)
    answers = [answer(target, torch.rand(len(target["boxes"])).tolist(), shift=2) for _, target in samples]
    assert judge(source, samples, answers) == judge(source, samples, answers, 4)


def test_proposal_recall_is_measured_in_the_images_own_pixels(scenes):
    """Of two boxes one is proposed, in the pixels of an image that was resized to half its size."""

    class Proposer(Oracle):
        def __init__(self, outputs):
            super().__init__(outputs)
            self.rpn = torch.nn.Identity()
            self.rpn.forward = lambda images: ([torch.tensor([[0.0, 0, 5, 5], [10, 10, 11, 11]])], {})

        def forward(self, images):
            self.rpn(SimpleNamespace(image_sizes=[(20, 20)]))
            return super().forward(images)

    mask = torch.zeros(2, 40, 40, dtype=torch.uint8)
    mask[0, :10, :10], mask[1, 20:30, 20:30] = 1, 1
    target = dict(boxes=torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), labels=torch.tensor([1, 1]), masks=mask)
    truth = make_truth([(torch.zeros(3, 40, 40), target)], [1])
    model, loader = Proposer([answer(target)]), [([torch.zeros(3, 40, 40)], [{**target, "image_id": 0}])]
    assert coco_evaluate(model, loader, truth, [1])["proposal_recall"] == 0.5
    assert not model.rpn._forward_hooks and "proposal_recall" not in coco_evaluate(
        Oracle([answer(target)]), loader, truth, [1]
    )


def test_only_the_named_images_count(scenes):
    source, samples = scenes
    right = [answer(target) for _, target in samples[:3]]
    part = coco_evaluate(Oracle(right), batches(samples[:3]), source.truth(), source.ids, image_ids=[0, 1, 2])
    assert part["box_ap"] == part["mask_ap"] == 1.0
    assert coco_evaluate(Oracle(right), batches(samples[:3]), source.truth(), source.ids)["box_ap"] < 0.9


def test_masks_are_kept_as_run_lengths(scenes, monkeypatch):
    source, samples = scenes
    truth, kept = source.truth(), []
    real = truth.loadRes
    monkeypatch.setattr(truth, "loadRes", lambda results: kept.append(results) or real(results))
    coco_evaluate(Oracle([answer(target) for _, target in samples]), batches(samples), truth, source.ids)
    sizes = [len(one["segmentation"]["counts"]) for one in kept[1]]
    assert max(sizes) < 64 * 64 / 8


@pytest.fixture
def layout(tmp_path):
    """Three images: an RGB one with an object and a crowd, a gray one with an object of the other class, an
    empty one."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, channels in (("a.jpg", 3), ("b.jpg", 1), ("c.jpg", 3)):
        to_pil_image(torch.rand(channels, 30, 40)).save(tmp_path / "train2017" / name)
    square = [[5, 5, 15, 5, 15, 20, 5, 20]]
    content = dict(
        images=[
            dict(id=k, file_name=name, height=30, width=40) for k, name in ((7, "a.jpg"), (3, "b.jpg"), (9, "c.jpg"))
        ],
        categories=[dict(id=5, name="cat"), dict(id=2, name="dog")],
        annotations=[
            dict(id=1, image_id=7, category_id=5, bbox=[5, 5, 10, 15], area=150, iscrowd=0, segmentation=square),
            dict(
                id=2,
                image_id=7,
                category_id=5,
                bbox=[0, 0, 40, 30],
                area=1200,
                iscrowd=1,
                segmentation=dict(size=[30, 40], counts=[0, 1200]),
            ),
            dict(id=3, image_id=3, category_id=2, bbox=[5, 5, 10, 15], area=150, iscrowd=0, segmentation=square),
        ],
    )

    def write(change=lambda content: None):
        change(content)
        (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_a_data_set_in_cocos_layout_gives_contiguous_labels_no_crowds_and_typed_empties(layout):
    source = CocoImages(layout())
    assert source.classes == ["dog", "cat"] and source.ids == [2, 5] and source.image_ids == [3, 7, 9]
    samples = [source.sample(i) for i in range(3)]
    assert [image.shape for image, _ in samples] == [(3, 30, 40)] * 3  # gray became RGB
    assert [target["labels"].tolist() for _, target in samples] == [[1], [2], []]
    torch.testing.assert_close(samples[0][1]["boxes"], torch.tensor([[5.0, 5, 15, 20]]))
    assert (
        samples[0][1]["masks"].sum() == 150
        and samples[2][1]["boxes"].shape == (0, 4)
        and samples[2][1]["masks"].shape == (0, 30, 40)
    )
    for k in range(3):
        image, target = Detections(source)[0, k]
        check_target(image, target, 2)


def test_a_class_agnostic_set_has_objects_only_in_targets_and_in_truth(layout):
    source = CocoImages(layout(), class_agnostic=True)
    assert (
        source.classes == ["object"]
        and source.ids == [1]
        and {a["category_id"] for a in source.truth().anns.values()} == {1}
    )
    assert [source.sample(i)[1]["labels"].tolist() for i in range(3)] == [[1], [1], []]
    scenes = ShapeScenes(4, 32, class_agnostic=True)
    assert {label for i in range(4) for label in scenes.sample(i)[1]["labels"].tolist()} == {
        1
    } and scenes.truth().getCatIds() == [1]


def test_a_crowd_is_neither_hit_nor_miss(layout):
    source = CocoImages(layout())
    data = Detections(source)
    samples = [data[0, i] for i in range(3)]
    answers = [answer(target) for _, target in samples]
    extra = torch.tensor([[20.0, 0, 40, 30]])  # inside the crowd
    answers[1] = dict(
        boxes=torch.cat([extra, answers[1]["boxes"]]),
        labels=torch.tensor([2, 2]),
        scores=torch.tensor([0.99, 0.9]),
        masks=torch.cat([torch.ones(1, 1, 30, 40), answers[1]["masks"]]),
    )
    assert judge(source, samples, answers)["box_ap"] == pytest.approx(1)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["images"].append(dict(id=1, file_name="gone.jpg", height=1, width=1)), "gone.jpg"),
        (lambda c: c["images"][1].update(height=31), "b.jpg: .*annotations say 31x40"),
        (lambda c: c["annotations"][0].update(category_id=99), "category_id 99"),
        (lambda c: c["annotations"][0].update(bbox=[30, 5, 25, 15]), "annotation 1 has .*bbox"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 1 has no segmentation"),
        (lambda c: c["annotations"][0].pop("segmentation"), "annotation 1 has no segmentation"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 has image_id"),
        (lambda c: c["images"][0].pop("height"), "height"),
        (lambda c: c.pop("categories"), "no COCO annotation file"),
        (lambda c: c.pop("annotations"), "no COCO annotation file"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), ".x, y, width, height"),
    ],
)
def test_a_broken_annotation_is_named(layout, change, words):
    with pytest.raises(ValueError, match=words) as error:
        source = CocoImages(layout(change))
        [Detections(source)[0, i] for i in range(len(source))]
    assert "\n" not in str(error.value)


def test_a_broken_image_is_named_when_it_is_read(layout):
    root = layout()
    (root / "train2017" / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read .*b.jpg"):
        CocoImages(root).sample(0)


@pytest.mark.parametrize("first", [0, "text"])
def test_annotation_ids_from_0_or_of_text_leave_average_precision_at_1(layout, first):
    def change(content):
        for k, entry in enumerate(content["annotations"]):
            entry["id"] = k if first == 0 else f"uuid {k}"

    source = CocoImages(layout(change))
    samples = [Detections(source)[0, i] for i in range(3)]
    result = judge(source, samples, [answer(target) for _, target in samples])
    assert result["box_ap"] == pytest.approx(1) and result["mask_ap"] == pytest.approx(1)


def test_a_picture_that_exif_turns_has_its_boxes_in_the_upright_picture(layout):
    root = layout()
    upright = torch.zeros(3, 30, 40, dtype=torch.uint8)
    upright[:, 5:20, 5:15] = 255
    lying = to_pil_image(upright.rot90(1, (1, 2)))  # anticlockwise, so that EXIF 6 turns it back
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(root / "train2017" / "b.jpg", exif=exif, quality=95)
    image, target = CocoImages(root).sample(0)
    left, top, right, bottom = target["boxes"][0].int().tolist()
    assert image.shape == (3, 30, 40) and image[:, top:bottom, left:right].float().mean() > 240
    assert image.float().mean() < 255 * 160 / 1200


def test_a_file_with_boxes_only_has_boxes_for_masks_and_no_mask_ap(layout):
    def change(content):
        for entry in content["annotations"]:
            entry.pop("segmentation")

    root = layout(change)
    with pytest.raises(ValueError, match="--boxes-only"):
        CocoImages(root)
    source = CocoImages(root, masks=False)
    samples = [Detections(source)[0, i] for i in range(3)]
    assert [target["masks"].sum().item() for _, target in samples] == [150, 150, 0]
    answers = [answer(target) for _, target in samples]
    kinds = dict(image_ids=None, kinds=("box",))
    result = coco_evaluate(Oracle(answers), batches(samples), source.truth(), source.ids, **kinds)
    assert result["box_ap"] == pytest.approx(1) and "mask_ap" not in result


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="instances_train2017.json"):
        CocoImages(tmp_path)


def test_without_pycocotools_the_install_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        coco.need_pycocotools()


@pytest.mark.parametrize("scale_range", [(0.1, 0.3), (1.0, 1.0), (1.5, 2.0)])
def test_jittered_scenes_have_one_size_and_boxes_that_fit_their_masks(scale_range):
    data = Detections(ShapeScenes(12, 64), large_scale_jitter(48, [80, 90, 100], scale_range))
    for i in range(12):
        image, target = data[0, i]
        check_target(image, target, 10)
        assert image.shape == (3, 48, 48)
        for box, mask in zip(target["boxes"], target["masks"]):
            y, x = torch.nonzero(mask, as_tuple=True)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        if scale_range[1] < 0.5:  # mostly padding, in the colour asked for
            assert ((image * 255).round() == torch.tensor([80.0, 90, 100]).view(3, 1, 1)).all(0).float().mean() > 0.7
    again = Detections(data.source, data.jitter)
    assert torch.equal(data[3, 5][0], again[3, 5][0]) and not all(
        torch.equal(data[3, i][0], data[4, i][0]) for i in range(12)
    )


def test_a_small_scene_is_padded_right_and_below_only():
    jitter = large_scale_jitter(64, [7, 8, 9], (0.25, 0.5))
    white = coco.tv_tensors.Image(torch.full((3, 40, 80), 255, dtype=torch.uint8))
    mask = coco.tv_tensors.Mask(torch.ones(1, 40, 80, dtype=torch.uint8))
    heights = set()
    for i in range(20):
        torch.manual_seed(i)
        image, masks = jitter(white, mask)
        height, width = int(masks.any(2).sum()), int(masks.any(1).sum())
        assert 16 <= width <= 32 and abs(height - width / 2) <= 1  # the longer side is a quarter to half of 64
        assert masks[0, :height, :width].all() and (image[:, :height, :width] == 255).all()
        assert image[:, height:].unique().tolist() == [7, 8, 9] and masks[0, height:].sum() == 0
        assert image[:, :, width:].unique().tolist() == [7, 8, 9] and masks[0, :, width:].sum() == 0
        heights.add(height)
    assert len(heights) > 3


def test_a_large_scene_is_cropped_anywhere():
    jitter = large_scale_jitter(32, [0, 0, 0], (2.0, 2.0))
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    masks = coco.tv_tensors.Mask(torch.ones(1, 64, 64, dtype=torch.uint8))
    starts = set()
    for i in range(40):
        torch.manual_seed(i)
        image, _ = jitter(coco.tv_tensors.Image(ramp), masks)
        starts.add(int(image[0, 0].min()))
    assert min(starts) < 6 and max(starts) > 26  # 0 to 32


@pytest.mark.parametrize("height", [0, 5e-324, 1e-96])
def test_an_object_without_height_is_no_target_and_iscrowd_may_be_left_out(layout, height):
    def change(content):
        content["annotations"][0].update(bbox=[5, 5, 10, height])
        content["annotations"][2].pop("iscrowd")

    source = CocoImages(layout(change))
    assert [len(Detections(source)[0, i][1]["boxes"]) for i in range(3)] == [1, 0, 0]
    assert source.truth().loadAnns([3])[0]["iscrowd"] == 0


def test_a_long_image_survives_the_smallest_zoom():
    jitter = large_scale_jitter(16, [0, 0, 0], (0.1, 0.1))
    image, masks = jitter(
        coco.tv_tensors.Image(torch.zeros(3, 4, 400, dtype=torch.uint8)),
        coco.tv_tensors.Mask(torch.zeros(1, 4, 400, dtype=torch.uint8)),
    )
    assert image.shape == (3, 16, 16) and masks.shape == (1, 16, 16)


def test_nothing_found_where_nothing_is_counts_as_nothing_to_find():
    empty = dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        masks=torch.zeros(0, 8, 8, dtype=torch.uint8),
    )
    truth = make_truth([(torch.zeros(3, 8, 8), empty)], [1])
    result = coco_evaluate(
        Oracle([dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))]),
        [([torch.zeros(3, 8, 8)], [dict(image_id=0)])],
        truth,
        [1],
    )
    assert result["box_ap"] == -1
