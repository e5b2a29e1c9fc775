"""Schema: annotation files are checked once, when they are opened, so that no later code has to check again.

A file in COCO's layout is read by Python, but used by pycocotools' C code, which trusts it: a coordinate that
is no number, or run lengths that do not cover the image, crash it, never end, or change the average precision
without a word. So every entry must satisfy

    ids         whole numbers or text, each once; an annotation's image and category are in the file      (1)
    boxes       four finite numbers, inside the image up to a pixel, no negative width or height          (2)
    polygons    an even number >= 6 of finite coordinates, at most one image size away from the image     (3)
    run lengths size = (height, width) of the image; counts >= 0 whose sum is height * width              (4)

and the first that does not is named in one sentence. Compressed counts are text: count m is the difference to
count m - 2, in groups of five bits, the lowest first,

    chr(48 + 32 * (another group follows) + bits), the highest bit of the last group is the sign          (5)

Source: the data format on cocodataset.org; (5) as in pycocotools' rleFrString. Written from both.
Needs: numpy; files.py.
Demo: python schema.py (at once) damages a small file in some ways and prints what is said about them.
"""

import gc
import json
import reprlib
from array import array
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from files import read_text, shown

LARGEST = 2**31  # pixels of an image; pycocotools counts them in 32 bits
AT_ONCE = 250_000  # annotations whose places are checked together
ROOM = 1  # pixels that a box may reach beyond the image: published ones do, by a fraction


# ---------------------------------------------------------------------------- JSON


def read_json(file):
    """The dict in a JSON file, packed."""
    text = read_text(file)
    try:
        # NaN and Infinity are no JSON, but Python reads them; str makes them text, which no check takes for a number
        content = json.loads(text, object_hook=pack, parse_constant=str)
    except RecursionError:
        raise ValueError(f"{shown(file)} is nested too deep for an annotation file; restore it") from None
    except ValueError as error:
        raise ValueError(f"{shown(file)} is no JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{shown(file)} holds {brief(content)} instead of an object with lists; restore it")
    return content


@contextmanager
def uncollected():
    """No garbage collection inside: with millions of new objects it would take as long as the work itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def pack(entry):
    """For json: boxes and polygons become arrays of doubles as soon as they are parsed, a quarter of the memory."""
    try:
        entry["bbox"] = array("d", entry["bbox"])
        entry["segmentation"] = [array("d", polygon) for polygon in entry["segmentation"]]
    except (KeyError, TypeError, OverflowError):
        pass  # another object, run lengths, or what is no number: check_annotation will see
    if "file_name" in entry:
        return {key: entry[key] for key in ("id", "file_name", "height", "width") if key in entry}
    return entry


def brief(value):
    """A value from a file, cut to one short line."""
    return reprlib.repr(value)


# ---------------------------------------------------------------------------- COCO


def read_coco(file, masks=True):
    """The content of an annotation file: images, categories and annotations, checked.

    masks False: only boxes are wanted; segmentations are dropped unseen. Annotations are numbered from 1, as
    pycocotools takes 0 for "no match" and cannot store text.
    """
    content = read_json(file)
    images = check_list(file, content, "images", check_image)
    categories = check_list(file, content, "categories", check_category)
    for name, entries in (("images", images), ("categories", categories)):
        if not entries:
            raise ValueError(f"{shown(file)} has no {name}; restore it")

    # annotations refer to both
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    known = {category["id"] for category in categories}
    check = partial(check_annotation, sizes, known, masks)
    annotations = check_list(file, content, "annotations", check)
    for first in range(0, len(annotations), AT_ONCE):
        check_places(file, annotations[first : first + AT_ONCE], sizes)
    for number, entry in enumerate(annotations, start=1):
        entry["id"] = number
    return dict(images=images, categories=categories, annotations=annotations)


def check_list(file, content, name, check):
    """(1) The entries of a list, each passed through `check`, whose complaint gets the name of the entry."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise ValueError(f"{shown(file)} is no COCO annotation file: {name} is {brief(entries)}, not a list")
    kinds, ids = set(), set()
    for number, entry in enumerate(entries):
        try:
            if type(entry) is not dict:
                raise ValueError(f"is {brief(entry)}, not an object")
            key = entry.get("id")
            if type(key) not in (int, str):
                raise ValueError(f"has id {brief(key)}; expected a whole number or text")
            if key in ids:
                raise ValueError("has the id of another; ids must differ")
            check(entry)
        except ValueError as error:
            key = entry.get("id") if type(entry) is dict else None
            which = f"number {number + 1}" if key is None else brief(key)
            kind = dict(images="image", categories="category", annotations="annotation")[name]
            raise ValueError(f"{shown(file)}: {kind} {which} {error}; correct or drop it") from None
        ids.add(key)
        kinds.add(type(key))
    if len(kinds) > 1:
        raise ValueError(
            f"{shown(file)}: some ids of {name} are numbers and some are text; make them all alike"
        )
    return entries


def check_image(image):
    check_words(image, "file_name")
    for key in ("height", "width"):
        side = check_number(image, key, 1, LARGEST)
        if side != int(side):
            raise ValueError(f"has {key} {side}; expected a whole number")
        image[key] = int(side)
    if image["height"] * image["width"] >= LARGEST:
        raise ValueError(f"has {image['height']}x{image['width']} pixels, more than an image can have")


def check_category(category):
    check_words(category, "name")


def check_annotation(sizes, categories, masks, entry):
    """All but where boxes and polygons lie."""
    # what it belongs to
    for key, known in (("image_id", sizes), ("category_id", categories)):
        if type(entry.get(key)) not in (int, str) or entry[key] not in known:
            raise ValueError(f"has {key} {brief(entry.get(key))}, which is none of the file")

    # area and crowd; an area of 0 is found in published files
    box, crowd = entry.get("bbox"), entry.get("iscrowd", 0)
    if type(box) is not array or len(box) != 4:
        raise ValueError(f"has bbox {brief(box)}; expected four numbers: x, y, width, height")
    check_number(entry, "area", 0, LARGEST)
    if type(crowd) not in (int, float, bool) or crowd not in (0, 1):
        raise ValueError(f"has iscrowd {brief(crowd)}; expected 0 or 1")
    entry["iscrowd"] = int(crowd)

    # segmentation
    if not masks:
        entry.pop("segmentation", None)
        return
    shape = entry.get("segmentation")
    if shape is None or shape == []:
        raise ValueError("has no segmentation (--boxes-only trains on boxes alone)")
    if type(shape) is dict:
        check_run_lengths(shape, *sizes[entry["image_id"]])
    elif type(shape) is not list or type(shape[0]) is not array:
        raise ValueError(f"has segmentation {brief(shape)}; expected run lengths or polygons, lists of x and y")


@np.errstate(all="ignore")
def check_places(file, annotations, sizes):
    """(2) and (3) in columns, of many annotations at once: a second, where a loop takes ten."""
    # the size of each image as (width, height)
    rows = {key: row for row, key in enumerate(sizes)}
    row_of = np.array([rows[entry["image_id"]] for entry in annotations])
    size = np.array(list(sizes.values()))[row_of, ::-1]

    # (2)
    boxes = np.frombuffer(b"".join(entry["bbox"] for entry in annotations)).reshape(-1, 2, 2)
    corner, extent = boxes[:, 0], boxes[:, 1]
    good = (-ROOM <= corner) & (0 <= extent) & (corner + extent <= size + ROOM)
    refuse(file, annotations, good.all(axis=1), size, "has a bbox that is not [x, y, width, height] inside")

    # all polygons, and which annotation each belongs to
    polygons, owners = [], []
    for number, entry in enumerate(annotations):
        if type(entry.get("segmentation")) is list:
            polygons += entry["segmentation"]
            owners += [number] * len(entry["segmentation"])
    if not polygons:
        return
    owner_of, size = [annotations[number] for number in owners], size[owners]
    lengths = np.array([len(polygon) for polygon in polygons])
    good = (lengths >= 6) & (lengths % 2 == 0)
    refuse(file, owner_of, good, size, "has a polygon that is not x and y of at least three corners in")

    # (3)
    points = np.frombuffer(b"".join(polygons)).reshape(-1, 2)
    starts = (np.cumsum(lengths) - lengths) // 2
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    good = (-size <= low) & (low < size) & (0 < high) & (high <= 2 * size)
    refuse(file, owner_of, good.all(axis=1), size, "has a polygon outside, or with corners far from,")


def refuse(file, annotations, good, size, words):
    """ValueError with the first annotation that is not good."""
    if not good.all():
        first = good.argmin()
        width, height = size[first]
        key = brief(annotations[first]["id"])
        raise ValueError(f"{shown(file)}: annotation {key} {words} its {width}x{height} pixels; correct or drop it")


def check_run_lengths(code, height, width):
    """(4)"""
    if code.get("size") != [height, width]:
        raise ValueError(
            f"has run lengths of size {brief(code.get('size'))}, the image is [{height}, {width}]"
        )
    code["size"] = [height, width]
    counts = code.get("counts")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if type(counts) is not list or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(
            f"has counts {brief(counts)}; expected whole numbers from 0 or their compressed text"
        )
    if sum(counts) != height * width:
        raise ValueError(
            f"has counts whose sum is {brief(sum(counts))}, the image has {height * width} pixels"
        )
    if 0 in counts[1:-1]:
        raise ValueError("has a count of 0 between others; only the first and the last may be 0")


def decode_counts(text):
    """(5)"""
    counts, value, shift = [], 0, 0
    for letter in text:
        group = ord(letter) - 48
        if not 0 <= group < 64 or shift > 30:
            raise ValueError(f"has counts {brief(text)}, which are no compressed run lengths")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue

        # the last group of a count
        if group & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value, shift = 0, 0
    if shift:
        raise ValueError(f"has counts {brief(text)}, which end within a number")
    return counts


def check_number(entry, key, low, high):
    """entry[key], a finite number from low to high."""
    value = entry.get(key)
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"has {key} {brief(value)}; expected a number of at least {low}")
    return value


def check_words(entry, key):
    if not isinstance(entry.get(key), str) or not entry[key]:
        raise ValueError(f"has {key} {brief(entry.get(key))}; expected text")


# ---------------------------------------------------------------------------- semantic categories


def read_categories(file):
    """What the values of semantic masks mean: ids and names, in the order of train_id."""
    content = read_json(file)
    entries = check_list(file, content, "categories", check_semantic)
    entries = sorted(entries, key=lambda entry: entry["train_id"])
    if not entries or [entry["train_id"] for entry in entries] != list(range(len(entries))):
        raise ValueError(
            f"{shown(file)} must have train_id from 0 on, each once and without gaps; restore it"
        )
    return [entry["id"] for entry in entries], [entry["name"] for entry in entries]


def check_semantic(category):
    check_words(category, "name")
    for key in ("id", "train_id"):
        if type(category.get(key)) is not int or not 0 <= category[key] <= 255:
            raise ValueError(f"has {key} {brief(category.get(key))}; expected a whole number from 0 to 255")
    if category["id"] == 0:
        raise ValueError("has id 0, the value of pixels that are ignored")


if __name__ == "__main__":
    import tempfile

    square = [5, 5, 15, 5, 15, 20, 5, 20]
    lengths = dict(size=[30, 40], counts=[155, 15, *[15, 15] * 9, 760])
    damages = {
        "nothing": {},
        "a box that is no number": dict(bbox=[float("nan"), 5, 10, 15]),
        "a polygon with a missing number": dict(segmentation=[[5, 5, None, 5, 15, 20]]),
        "run lengths": dict(segmentation=lengths),
        "run lengths of half the image": dict(segmentation=dict(size=[30, 40], counts=[155, 445])),
        "an image that is not there": dict(image_id=9),
    }
    for name, damage in damages.items():
        entry = dict(id="a", image_id=1, category_id=1, bbox=[5, 5, 10, 15], area=150, segmentation=[square])
        images, categories = ([dict(id=1, file_name="a.jpg", height=30, width=40)], [dict(id=1, name="cat")])
        content = dict(images=images, categories=categories, annotations=[entry | damage])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "instances.json")
            file.write_text(json.dumps(content))
            try:
                read_coco(file)
                print(f"{name}: fine")
            except ValueError as error:
                print(f"{name}: {str(error).split(': ', 1)[-1]}")
    print("(expect: nothing and run lengths are fine)")
