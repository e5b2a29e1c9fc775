import json
from array import array

import numpy as np
import pytest
from small_runs import make_pipe

import schema

NAN = float("nan")
SQUARE = [5, 5, 15, 5, 15, 20, 5, 20]
COUNTS = [155, 15, *[15, 15] * 9, 760]  # the same square in an image of 30 x 40


def content():
    box = dict(bbox=[5, 5, 10, 15], area=150, iscrowd=0)
    return dict(
        images=[dict(id=k, file_name=f"{k}.jpg", height=30, width=40) for k in (7, 3)],
        categories=[dict(id=5, name="cat"), dict(id=2, name="dog")],
        annotations=[
            dict(id=11, image_id=7, category_id=5, segmentation=[SQUARE], **box),
            dict(id=12, image_id=3, category_id=2, segmentation=dict(size=[30, 40], counts=COUNTS), **box),
        ],
    )


def read(folder, change=lambda content: None, **options):
    entries = content()
    change(entries)
    (folder / "a.json").write_text(json.dumps(entries))
    return schema.read_coco(folder / "a.json", **options)


def annotation(**values):
    return lambda content: content["annotations"][0].update(values)


def image(**values):
    return lambda content: content["images"][0].update(values)


def runs(size, counts):
    return annotation(segmentation=dict(size=size, counts=counts))


def test_polygons_and_run_lengths_are_read_and_annotations_numbered_from_1(tmp_path):
    entries = read(tmp_path)["annotations"]
    assert [entry["id"] for entry in entries] == [1, 2] and list(entries[0]["bbox"]) == [5, 5, 10, 15]
    assert entries[0]["segmentation"] == [array("d", SQUARE)] and entries[1]["segmentation"]["counts"] == COUNTS


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [entry.update(id=f"uuid-{entry['id']}") for entry in content["annotations"]],
        lambda content: [entry.pop("iscrowd") for entry in content["annotations"]],
        annotation(iscrowd=False),
        annotation(area=0),
        annotation(id=20_000_000_000_000_001),
        annotation(bbox=[-0.5, 5, 41, 15]),  # a fraction of a pixel beyond the image
        annotation(bbox=[5, 5, 10, 0]),
        annotation(segmentation=[[-3, 5, 45, 5, 15, 20]]),  # corners a little outside
        image(height=30.0, width=40.0),
        lambda content: content.update(annotations=[]),
    ],
)
def test_unusual_but_valid_entries_are_accepted(tmp_path, change):
    entries = read(tmp_path, change)["annotations"]
    assert [entry["id"] for entry in entries] == list(range(1, len(entries) + 1))
    assert all(entry["iscrowd"] == 0 for entry in entries)


@pytest.mark.parametrize(
    "change, words",
    [
        # what crashes pycocotools
        (annotation(segmentation=[[5, 6, None, 6, 25, 28]]), "11 .*polygon"),
        (annotation(segmentation=[[5, 6, NAN, 6, 25, 28]]), "11 .*polygon"),
        (annotation(segmentation=[[5, 6, 25, NAN, 25, 28]]), "11 .*polygon"),
        (annotation(segmentation=[[5, 6, 1e308, 6, 25, 28]]), "11 .*polygon"),
        (annotation(segmentation=[[5, 6, 2**70, 6, 25, 28]]), "11 .*polygon"),
        (annotation(segmentation=[[5, 6, 10**400, 6, 25, 28]]), "11 .*polygon"),
        (annotation(segmentation=[[5, 6, 1e9, 6, 25, 28]]), "11 .*polygon"),
        (runs([2**31, 2**31], [2**62]), "11 .*size"),
        # what makes it run for ever
        (runs([30, 40], [0.5, 1199.5]), "11 .*counts"),
        (runs([30, 40], "z" * 26), "11 .*counts"),
        (runs([30, 40], "o" * 10**5), "11 .*counts"),
        (runs([30, 40], "oo"), "11 .*counts"),
        (runs([30, 40], [94, 12]), "11 .*106.* 1200"),
        (runs([30, 40], [-5, 1205]), "11 .*counts"),
        (runs([30, 40], [600, 0, 600]), "11 .*count of 0"),
        (runs([30, 40], None), "11 .*counts None"),
        (runs([40, 30], COUNTS), "11 .*size .40, 30."),
        # what changes the average precision without a word
        (annotation(bbox=[NAN] * 4), "11 .*bbox"),
        (annotation(bbox=[5, 5, float("inf"), 15]), "11 .*bbox"),
        (annotation(bbox=[5, 5, NAN, 15]), "11 .*bbox"),
        (annotation(bbox=[5, 5, -10, 15]), "11 .*bbox"),
        (annotation(bbox=[5, 5, -5e-96, 15]), "11 .*bbox"),
        (annotation(bbox=[5, 5, 10, -1e-320]), "11 .*bbox"),
        (annotation(bbox=[30, 5, 25, 15]), "11 .*bbox"),
        (annotation(area=NAN), "11 .*area .NaN"),
        (annotation(area=-1), "11 .*area -1"),
        (annotation(id=12), "12 .*id"),
        (image(id=3), "image 3 .*id"),
        (lambda content: content["categories"][0].update(id=2), "category 2 .*id"),
        (annotation(segmentation=[SQUARE[:5]]), "11 .*polygon.*three corners"),
        (annotation(segmentation=[SQUARE[:4]]), "11 .*polygon.*three corners"),
        (annotation(segmentation=[SQUARE[:7]]), "11 .*polygon.*three corners"),
        (annotation(segmentation=[SQUARE, [50, 5, 60, 5, 60, 20]]), "11 .*outside"),
        # other types
        (annotation(segmentation=[SQUARE, "text"]), "11 .*polygon"),
        (annotation(segmentation=[SQUARE, []]), "11 .*polygon"),
        (annotation(segmentation=[[[5, 5], [15, 5], [15, 20]]]), "11 .*polygon"),
        (annotation(segmentation="text"), "11 .*'text'"),
        (annotation(segmentation=[]), "11 .*no segmentation.*--boxes-only"),
        (annotation(bbox=[5, 5, None, 15]), "11 .*bbox"),
        (annotation(bbox=["5", "5", "10", "15"]), "11 .*bbox"),
        (annotation(bbox=[[5, 5, 10, 15]]), "11 .*bbox"),
        (annotation(bbox=None), "11 .*bbox None"),
        (annotation(area="120"), "11 .*area '120'"),
        (annotation(iscrowd=None), "11 .*iscrowd None"),
        (annotation(iscrowd=-1), "11 .*iscrowd -1"),
        (annotation(iscrowd=NAN), "11 .*iscrowd .NaN"),
        (annotation(image_id=[7]), r"11 .*image_id \[7\]"),
        (annotation(image_id=8), "11 .*image_id 8"),
        (annotation(category_id={}), "11 .*category_id"),
        (annotation(id=None), "number 1 .*id None"),
        (annotation(id=1.5), "id 1.5"),
        (annotation(id="uuid"), "ids of annotations"),
        (image(id="7"), "ids of images|image_id 7"),
        (image(file_name=None), "image 7 .*file_name None"),
        (image(file_name=7), "image 7 .*file_name 7"),
        (image(height=0), "image 7 .*height 0"),
        (image(width=40.5), "image 7 .*width 40.5"),
        (image(height=2**20, width=2**20), "image 7 .*1048576x1048576"),
        (lambda content: content["categories"][0].update(name=7), "category 5 .*name 7"),
        (lambda content: content.update(annotations=None), "annotations is None"),
        (lambda content: content.update(annotations=5), "annotations is 5"),
        (lambda content: content["annotations"].append([1]), r"annotation number 3 is \[1\]"),
        (lambda content: content.pop("images"), "images is None"),
        (lambda content: content.update(categories=[], annotations=[]), "no categories"),
    ],
)
def test_the_first_entry_that_does_not_fit_is_named_in_one_sentence(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path, change)
    assert "\n" not in str(error.value) and "a.json" in str(error.value) and len(str(error.value)) < 400


def test_without_masks_segmentations_are_neither_needed_nor_looked_at(tmp_path):
    def change(content):
        content["annotations"][0].pop("segmentation")
        content["annotations"][1]["segmentation"] = [[1, None]]

    entries = read(tmp_path, change, masks=False)["annotations"]
    assert len(entries) == 2 and not any("segmentation" in entry for entry in entries)


def test_compressed_counts_are_those_of_pycocotools():
    coding = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for k in range(40):
        height, width = rng.integers(1, 400, 2)
        mask = (rng.random((height, width)) < rng.random()) if k % 2 else np.zeros((height, width))
        mask[height // 3 : height // 2] = 1
        code = coding.encode(np.asfortranarray(mask, dtype=np.uint8))
        counts = schema.decode_counts(code["counts"].decode())
        assert sum(counts) == height * width
        again = coding.frPyObjects(dict(size=[int(height), int(width)], counts=counts), int(height), int(width))
        assert again["counts"] == code["counts"]


def not_utf8(file):
    file.write_bytes('{"images": "\xe9"}'.encode("latin-1"))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda file: file.write_text("[" * 10**5), "nested"),
        (lambda file: file.write_text('{"a": ' * 10**5), "nested"),
        (not_utf8, "UTF-8"),
        (lambda file: file.mkdir(), "regular file"),
        (make_pipe, "regular file"),
        (lambda file: None, "No such file"),
        (lambda file: file.write_text("no json"), "JSON"),
        (lambda file: file.write_text('{"images": 1' + "0" * 5000 + "}"), "JSON|images"),
        (lambda file: file.write_text("[1, 2]"), "instead of an object"),
        (lambda file: file.write_text("null"), "instead of an object"),
    ],
)
def test_a_file_that_is_no_annotation_file_is_named_in_one_sentence(tmp_path, make, words):
    file = tmp_path / "a\n.json"
    make(file)
    with pytest.raises(ValueError, match=words) as error:
        schema.read_coco(file)
    assert "\n" not in str(error.value) and "a\\n.json" in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())
    assert len(schema.read_coco(tmp_path / "a.json")["images"]) == 2
