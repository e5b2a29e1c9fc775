"""Sources: image sets by flag, their subsets, and how they are normalized.

A set has len, classes, mean and std, and gives uint8 images with a label, boxes, or a label per pixel.

Needs: torch; data.py.
"""

import argparse
from typing import NamedTuple

import torch

from data import AUGMENTATIONS, Folder, channel_statistics, first_of_shuffle, open_source
from training.flags import between, count, path

READ_BY = {  # flags that act on some sets only
    "data_path": ("cifar10", "cifar100", "folder", "coco", "ade20k"), "download": ("cifar10", "cifar100"),
    "skip_bad": ("folder",), "val_share": ("folder",), "data_size": ("shapes",), "data_seed": ("shapes",),
    "scenes": ("shapes",)}


def crop_ratio(text):
    """A number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1, such as 0.875")
    return value


def source_flags(flag, sets):
    """The flags of every task. sets: those that have what the task learns from."""
    flag("--data", choices=sets, default="shapes", help="image set")
    flag("--data-path", type=path, metavar="DIR", help="where it is")
    flag("--data-size", type=count, help="shapes: training scenes (default: 4096)")
    flag("--data-seed", type=between(0, 2**32, int), help="shapes: other scenes (default: 0)")
    flag("--scenes", choices=("simple", "crowded"),
         help="shapes: one large object, or several on a texture (default: crowded to detect and segment)")
    flag("--train-images", type=count, help="use the first N of a fixed shuffle; with --dry-run the size of the set")
    flag("--val-images", type=count, help="evaluate on the first N of a fixed shuffle")


def image_flags(flag):
    """The flags of tasks on whole images."""
    source_flags(flag, ("shapes", "cifar10", "cifar100", "folder"))
    flag("--download", action="store_true", default=None, help="let torchvision fetch CIFAR")
    flag("--skip-bad", action="store_true", default=None, help="folder: replace unreadable images instead of "
                                                               "stopping")
    flag("--val-share", type=between(0, 1), help="folder: use this share of train/ for validation instead of val/")
    flag("--stats", action="store_true", help="measure mean and std on the data instead of taking the set's own")
    flag("--mean-std", type=float, nargs=2, metavar=("MEAN", "STD"),
         help="of all three channels, instead of the set's own: 0.5 0.5 for BEiT and files from JAX")
    flag("--crop-ratio", type=crop_ratio,
         help="images of another size: center crop / shorter side (default: 0.875 up to 224 px, 1 above)")


def augment_flag(flag, default):
    flag("--augment", choices=AUGMENTATIONS, help=f"(default: {default})")


def without_set(flags):
    """The flags of a run without those of its image set, to judge it on another one."""
    return {name: value for name, value in flags.items() if name not in READ_BY and name != "stats"}


def complete(args):
    """Refuse flags of another set; the defaults of generated scenes."""
    for name, sets in READ_BY.items():
        if getattr(args, name, None) is not None and args.data not in sets:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --data {' or '.join(sets)}, not to "
                             f"{args.data}; drop it or name the set")
    if getattr(args, "mean_std", None) is not None:
        mean, std = args.mean_std
        if not (0 <= mean <= 1 and 0 < std <= 1):
            raise ValueError(f"--mean-std {mean:g} {std:g} must be a mean from 0 to 1 and a standard deviation above "
                             "0, at most 1, such as 0.5 0.5: pixels lie in [0, 1]")
        if args.stats:
            raise ValueError(f"--mean-std {mean:g} {std:g} contradicts --stats, which measures them; drop one")
    if args.data == "shapes":
        args.data_size = args.data_size or 4096
        args.data_seed = args.data_seed or 0
        args.scenes = args.scenes or ("crowded" if args.task in ("detect", "segment") else "simple")


class Sources(NamedTuple):
    train: object
    val: object  # None where there is none
    indices: list  # which images of the set are used
    val_indices: list | None
    mean: tuple
    std: tuple


def open_images(args, world, need_val=True):
    """Training and validation set of whole images, opened and, where small, decoded."""
    options = dict(name=args.data, path=args.data_path, img_size=tuple(args.img_size), size=args.data_size,
                   seed=args.data_seed, scenes=args.scenes, skip_bad=args.skip_bad,
                   labeled=args.task != "pretrain", bare=args.eval_only)
    # a set that is only judged needs no training part
    judged = args.eval_only and not args.val_share

    # rank 0 downloads, the others wait
    if args.download and not world.main:
        world.gather(None)
    train = open_source(train=not judged, download=bool(args.download and world.main), **options)
    if args.download and world.main:
        world.gather(None)

    val = train if judged else None
    if not args.val_share and not judged:
        try:
            val = open_source(train=False, download=bool(args.download and world.main), **options)
        except ValueError as error:
            way_out = "; or give --val-share 0.1, a tenth of the images" if args.data == "folder" else ""
            if need_val:
                raise ValueError(f"{error}{way_out}") from None
            world.say(f"no validation set: {error}{way_out}")  # unlabeled sets often have none
    sources = split(args, train, val)

    # decoded now, once, before loading processes copy it
    wanted = {sources.train: sources.indices}
    if sources.val is not None:
        wanted[sources.val] = sorted({*wanted.get(sources.val, []), *sources.val_indices})
    for source, indices in wanted.items():
        if isinstance(source, Folder):
            source.cache(indices, progress=world.main)
        getattr(source, "images", None)  # shapes are drawn at the first look
    if getattr(args, "normalization", None):  # of the run that is judged
        mean, std = args.normalization
        sources = sources._replace(mean=tuple(mean), std=tuple(std))
    if args.mean_std is not None:
        mean, std = args.mean_std
        sources = sources._replace(mean=(mean,) * 3, std=(std,) * 3)
    if args.stats:
        mean, std = channel_statistics(train)
        sources = sources._replace(mean=mean, std=std)
    return sources


def split(args, train, val):
    """The images that --train-images and --val-images leave."""
    if val is not None and args.task != "pretrain" and list(val.classes) != list(train.classes):
        differ = sorted(set(train.classes) ^ set(val.classes), key=str)[:3]
        raise ValueError(f"the classes of train and val differ: {', '.join(map(str, differ)) or 'another order'}")
    indices, val_indices = list(range(len(train))), None
    if getattr(args, "val_share", None):
        indices, val_indices = share(len(train), args.val_share, args.seed)
        val = train
    elif val is not None:
        val_indices = list(range(len(val)))

    # the first of a shuffle of each
    if args.train_images is not None:
        indices = [indices[i] for i in first_of_shuffle(len(indices), args.train_images)]
    if val is not None and args.val_images is not None:
        val_indices = [val_indices[i] for i in first_of_shuffle(len(val_indices), args.val_images, "val-images")]
    return Sources(train, val, indices, val_indices, train.mean, train.std)


def share(number, part, seed):
    """-> the indices to train on, and those of --val-share; which, depends on the seed alone."""
    held_out = round(part * number)
    if not 1 <= held_out < number:
        raise ValueError(f"--val-share {part:g} of {number} images leaves {number - held_out} to train on and "
                         f"{held_out} for validation; give another share")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def skipped_images(data):
    """For the log: how many unreadable images of a folder were replaced so far, if any."""
    source = getattr(data.train, "source", None)
    count = int(source.bad.sum()) if isinstance(source, Folder) else 0
    return {"skipped_images": count} if count else {}
