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
Needs: files.py.
Demo: python schema.py (at once) damages a small file in some ways and prints what is said about them.
"""

import gc
import json
import reprlib
from array import array
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from files import read_text, shown

LARGEST = 2**31  # pixels of an image; pycocotools counts them in 32 bits
ROOM = 1  # pixels that a box may reach beyond the image: published ones do, by a fraction


# ---------------------------------------------------------------------------- JSON


def read_json(file):
    """The dict in a JSON file, with polygons packed."""
    text = read_text(file)
    try:
        # NaN and Infinity are no JSON, but Python reads them; str makes them text, which no check takes for a number
        content = json.loads(text, object_hook=pack_polygons, parse_constant=str)
    except RecursionError:
        raise ValueError(
            f"{shown(file)} is nested too deep for an annotation file; restore it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{shown(file)} is no JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{shown(file)} holds {brief(content)} instead of an object with lists; restore it"
        )
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


def pack_polygons(entry):
    """For json: polygons become arrays of doubles as soon as they are parsed, a quarter of the memory.

    "reach" is added, four numbers per polygon: the smallest and the largest x, the smallest and the largest y.
    Polygons that are no lists of numbers are left to check_polygons.
    """
    polygons = entry.get("segmentation")
    if type(polygons) is not list:
        return entry
    packed, reach = [], array("d")
    try:
        for polygon in polygons:
            packed.append(array("d", polygon))
            x, y = polygon[::2], polygon[1::2]
            reach.extend((min(x), max(x), min(y), max(y)))
    except (TypeError, ValueError, KeyError, OverflowError):
        return entry
    entry["segmentation"], entry["reach"] = packed, reach
    return entry


def brief(value):
    """A value from a file, cut to one short line."""
    return reprlib.repr(value)


# ---------------------------------------------------------------------------- COCO


@uncollected()
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
    check = partial(check_annotation, sizes=sizes, categories=known, masks=masks)
    annotations = check_list(file, content, "annotations", check)
    for number, entry in enumerate(annotations, start=1):
        entry["id"] = number
    return dict(images=images, categories=categories, annotations=annotations)


def check_list(file, content, name, check):
    """(1) The entries of a list, each passed through `check`, whose complaint gets the name of the entry."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise ValueError(
            f"{shown(file)} is no COCO annotation file: {name} is {brief(entries)}, not a list"
        )
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
        raise ValueError(
            f"has {image['height']}x{image['width']} pixels, more than an image can have"
        )


def check_category(category):
    check_words(category, "name")


def check_annotation(entry, sizes, categories, masks):
    # what it belongs to
    for key, known in (("image_id", sizes), ("category_id", categories)):
        if type(entry.get(key)) not in (int, str) or entry[key] not in known:
            raise ValueError(f"has {key} {brief(entry.get(key))}, which is none of the file")
    height, width = sizes[entry["image_id"]]

    # (2)
    box, inside = entry.get("bbox"), False
    try:
        x, y, w, h = box
        inside = -ROOM <= x <= x + w <= width + ROOM and -ROOM <= y <= y + h <= height + ROOM and w >= 0 <= h
    except (TypeError, ValueError, OverflowError):
        pass  # not four, or no numbers
    if not inside:
        raise ValueError(
            f"has bbox {brief(box)} instead of [x, y, width, height] inside {width}x{height} pixels"
        )

    # area and crowd; an area of 0 is found in published files
    check_number(entry, "area", 0, LARGEST)
    crowd = entry.get("iscrowd", 0)
    if type(crowd) not in (int, float, bool) or crowd not in (0, 1):
        raise ValueError(f"has iscrowd {brief(crowd)}; expected 0 or 1")
    entry["iscrowd"] = int(crowd)

    # segmentation
    if not masks:
        entry.pop("segmentation", None)
        entry.pop("reach", None)
        return
    shape = entry.get("segmentation")
    if shape is None or shape == []:
        raise ValueError("has no segmentation (--boxes-only trains on boxes alone)")
    if type(shape) is dict:
        check_run_lengths(shape, height, width)
    elif type(shape) is list:
        check_polygons(shape, entry.pop("reach", None), height, width)
    else:
        raise ValueError(f"has segmentation {brief(shape)}; expected polygons or run lengths")


def check_polygons(polygons, reach, height, width):
    """(3)"""
    for number, polygon in enumerate(polygons):
        if type(polygon) is not array:
            raise ValueError(
                f"has polygons {brief(polygons)}; expected lists of x and y of at least three corners"
            )
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"has a polygon of {len(polygon)} numbers; expected x and y of at least three corners"
            )
        left, right, top, bottom = reach[4 * number : 4 * number + 4]
        near = -width <= left <= right <= 2 * width and -height <= top <= bottom <= 2 * height
        if not near:
            raise ValueError(f"has a polygon with corners far from its {width}x{height} pixels")
        if right <= 0 or left >= width or bottom <= 0 or top >= height:
            raise ValueError(f"has a polygon outside its {width}x{height} pixels")


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
            raise ValueError(
                f"has {key} {brief(category.get(key))}; expected a whole number from 0 to 255"
            )
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
        entry = dict(
            id="a", image_id=1, category_id=1, bbox=[5, 5, 10, 15], area=150, segmentation=[square]
        )
        images, categories = (
            [dict(id=1, file_name="a.jpg", height=30, width=40)],
            [dict(id=1, name="cat")],
        )
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
