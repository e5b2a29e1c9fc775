"""Predict: what a finished run says about new images.

    python predict.py --run runs/0002 photo.jpg photos/               a line per image
    python predict.py --run runs/0002 --output-dir seen photos/       and a picture of each: seen/NAME.png
    python predict.py --run runs/0002 --json seen.jsonl photos/       and all that is known, a line per image
    python predict.py --run runs/0001 --features photos.npz photos/   arrays `paths` (n,) and `features` (n, D)
    python predict.py --run runs/0001 --neighbors photo.jpg photos/   the most similar images: photo_neighbors.png
    python predict.py --run runs/0002 --export model.pt2              for torch.export.load; any batch size

Images are resized and normalized as in the run's evaluation, so accuracy, AP and mIoU computed from the JSON
are those of its log. A label map in the JSON is a PNG in base64, as large as the image:

    Image.open(io.BytesIO(base64.b64decode(line["labels"])))

No existing file is written over. From Python: tasks.load_run.
Needs: torch, torchvision, tqdm; data.py, tasks/, training/.
"""

import json
import sys
from pathlib import Path

import numpy  # comes with torchvision
import torch
import torch.nn.functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data import Folder
from tasks import describe, detection, load_run
from training import pictures
from training.flags import Parser, between, path
from training.world import World

BATCH = 8  # images at a time


def parse(argv):
    parser = Parser(prog="predict.py", description=__doc__)
    parser.usage = "predict.py --run DIR [flags] PATH..."
    flag = parser.add_argument
    flag("paths", nargs="*", type=path, metavar="PATH", help="images, or folders of images at any depth")
    flag("--run", type=path, metavar="DIR", required=True, help="folder of a finished run, or its checkpoint.pt")
    flag("--output-dir", type=path, metavar="DIR", help="save a picture per image here")
    flag("--json", type=path, metavar="FILE", help="write the predictions, a line per image")
    flag("--coco", action="store_true", help="--json in COCO's result format, of a detector")
    flag("--threshold", type=between(0, 1), metavar="SCORE",
         help="print and draw a detector's objects from this score on (default: 0.5)")
    flag("--features", type=path, metavar="FILE", help="save the encoder's pooled features as .npz; predict nothing")
    flag("--neighbors", type=path, metavar="IMAGE", help="draw the images nearest to this one; predict nothing")
    flag("--export", type=path, metavar="FILE", help="save a classifier or segmenter by torch.export")
    flag("--skip-bad", action="store_true", help="skip unreadable images instead of stopping")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    args = parser.parse_args(argv)

    # what can be known to fail before the work
    compares = args.features or args.neighbors
    if not args.paths and (compares or not args.export):
        raise ValueError("PATH is missing; name images or folders of images")
    if args.json and compares:
        raise ValueError(f"--json {args.json} takes predictions, but --features and --neighbors predict nothing; "
                         "drop one")
    if args.coco and not args.json:
        raise ValueError("--coco is a format of --json; add --json FILE")
    for name in ("json", "features", "export"):
        file = getattr(args, name)
        if file and Path(file).exists():
            raise ValueError(f"--{name} {file} exists already; choose another name")
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"--{name} {file} lies in no existing folder; create it first")
    return args


def find_images(paths):
    """The given files, and all images in the given folders, sorted."""
    files = []
    for place in map(Path, paths):
        if not place.exists():
            raise ValueError(f"PATH {place} does not exist; give images or folders of images")
        images = [place]
        if place.is_dir():
            inside = sorted(place.rglob("*"))
            images = [file for file in inside if file.suffix.lower() in IMG_EXTENSIONS]
        if not images:
            raise ValueError(f"PATH {place} holds no images ({' '.join(IMG_EXTENSIONS)}); give another folder")
        files += images
    return list(dict.fromkeys(files))


class Photos(Folder):
    """Images by their paths, read as those of --data folder: read(i) -> uint8 (3, H, W), None where skipped."""

    def __init__(self, paths, skip_bad=False):
        self.paths = find_images(paths)
        self.samples = [(str(file), 0) for file in self.paths]
        self.bad = torch.zeros(len(self.paths), dtype=torch.bool)
        self.skip_bad = skip_bad

    def batches(self, title):
        """Lists of (index, image) of the readable images, with a bar on a terminal."""
        for first in tqdm(range(0, len(self), BATCH), title, leave=False, disable=None):
            batch = []
            for i in range(first, min(first + BATCH, len(self))):
                image = self.read(i)
                if image is None:
                    tqdm.write(f"skipped unreadable image {self.paths[i]}", file=sys.stderr)
                else:
                    batch.append((i, image))
            if batch:
                yield batch
        if self.bad.all():
            raise ValueError(f"none of the {len(self)} images can be read; give others")
        if self.bad.any():
            print(f"skipped {int(self.bad.sum())} of {len(self)} images", file=sys.stderr)


def introduce(run):
    """What the run knows, and what it sees of an image."""
    args = run.args
    size = "x".join(map(str, args.img_size))
    seen = "it sees each image" if args.task in ("detect", "segment") else "it sees the middle of each image"
    if args.data == "shapes":
        data = "generated scenes only, so what it says of other images means little"
    else:
        data = f"--data {args.data}"
    print(f"--task {args.task}, trained on {data}; {seen} at {size} px", file=sys.stderr)


def predict(run, photos, args):
    """A line per image; pictures and JSON where wanted."""
    if args.coco and run.args.task != "detect":
        raise ValueError(f"--coco needs a run of --task detect, but {args.run} is of --task {run.args.task}; drop it")
    if args.coco and not hasattr(run.args, "category_ids"):
        raise ValueError(f"--coco needs the category ids of the training set, which {args.run}, of an earlier version, "
                         "has not saved; drop it")
    if args.threshold is not None and run.args.task != "detect":
        raise ValueError(f"--threshold {args.threshold:g} is a score of objects, but {args.run} is of --task "
                         f"{run.args.task}; drop it")
    threshold = 0.5 if args.threshold is None else args.threshold
    files = pictures.new_files(args.output_dir, photos.paths) if args.output_dir else []
    predictions = {}
    for batch in photos.batches("predict"):
        results = run.predict([image for _, image in batch])
        for (i, image), prediction in zip(batch, results, strict=True):
            line = describe(prediction, threshold)
            tqdm.write(f"{photos.paths[i]}: {line}")
            predictions[i] = prediction
            if files:
                run.draw(image, prediction, threshold).save(files[i])
            prediction.pop("picture", None)  # of a reconstruction

    if args.coco:
        results, note = detection.coco_results(run.args, photos.paths, predictions)
        Path(args.json).write_text(json.dumps(results))
        print(note)
    elif args.json:
        with open(args.json, "w") as file:
            for i, prediction in predictions.items():
                line = dict(path=str(photos.paths[i]), **prediction)
                file.write(json.dumps(line) + "\n")


def compare(run, photos, args, most=6):
    """Features of all images into a file; the images most similar to one as a picture."""
    query = None
    if args.neighbors:
        query = Photos([args.neighbors])
        name = Path(f"{query.paths[0].stem}_neighbors.png")
        drawing = pictures.new_files(args.output_dir or ".", [name])[0]

    kept, rows = [], []
    for batch in photos.batches("features"):
        kept += [photos.paths[i] for i, _ in batch]
        rows.append(run.features([image for _, image in batch]))
    features = torch.cat(rows)
    if args.features:
        paths = numpy.array([str(file) for file in kept])
        with open(args.features, "wb") as file:
            numpy.savez(file, paths=paths, features=features.numpy())
        print(f"saved {args.features}: {features.shape[1]} features of each of {len(kept)} images")
    if query is None:
        return

    # cosine similarity; the mean is subtracted, for all features have much in common
    mean = features.mean(dim=0)
    image = query.read(0)
    similarity = F.cosine_similarity(features - mean, run.features([image]) - mean)
    order = similarity.argsort(descending=True).tolist()
    nearest = [k for k in order if not kept[k].samefile(args.neighbors)][:most]
    columns = {f"query: {query.paths[0].name}": image}
    for k in nearest:
        print(f"{kept[k]}: similarity {similarity[k]:.3f}")
        columns[f"{similarity[k]:.3f} {kept[k].name}"] = photos.read(photos.paths.index(kept[k]))
    pictures.row(columns).save(drawing)
    print(f"saved {drawing}")


def main(argv=None):
    try:
        args = parse(argv)
        run = load_run(args.run, World(args.device).device)
        introduce(run)
        if args.export:
            print(run.export(args.export))
        if args.features or args.neighbors:
            compare(run, Photos(args.paths, args.skip_bad), args)
        elif args.paths:
            predict(run, Photos(args.paths, args.skip_bad), args)
    except (ValueError, OSError) as error:
        print(f"predict.py: {error}; see --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
