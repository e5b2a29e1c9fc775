"""Detection: a pre-trained encoder as the backbone of Mask R-CNN, judged by COCO's average precision.

The benchmark of detection with ViTs: the same detector, another start of its backbone. Model in detect.py and
pyramid.py, data and AP in coco.py. The small heads are for a laptop; --heads full is the paper's.
"""

import math

import torch
from torch import nn

import coco
from coco import CocoImages, Detections, ShapeScenes, coco_evaluate, large_scale_jitter
from data import as_lists
from detect import NORMS, init_as_beit, vit_mask_rcnn
from tasks import Data
from training import encoders, pictures, sources
from training.flags import between

DEFAULTS = dict(epochs=6, batch_size=4, blr=0.064, beta2=0.999, warmup_epochs=0.25, clip_grad=1.0, layer_decay=1.0)
FULL_HEADS = dict(rpn_post_nms_top_n_train=1000)  # all else as vit_mask_rcnn has it
SMALL_HEADS = dict(channels=64, rpn_convs=1, box_convs=1, box_dim=256, mask_convs=2,
                   rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=1000, rpn_pre_nms_top_n_test=500,
                   rpn_post_nms_top_n_train=300, rpn_post_nms_top_n_test=100, box_batch_size_per_image=32)
METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "proposal_recall")


def add_flags(flag):
    add_dense_flags(flag, ("shapes", "coco"), global_blocks="quarters", jitter="none for shapes, else 0.1 2")
    flag("--no-rel-pos", action="store_true", help="no relative position bias")
    flag("--class-agnostic", action="store_true", help="every object is of one class")
    flag("--boxes-only", action="store_true", help="train and evaluate boxes without masks, for files that have none")


def add_dense_flags(flag, sets, global_blocks, jitter):
    """What detection and segmentation share."""
    flag("--pyramid", choices=("taps", "simple", "single"),
         help="ViT: maps after each quarter, four scales of the last map, or the last map alone (default: taps)")
    flag("--global-blocks", choices=("quarters", "all", "none"),
         help=f"ViT: which blocks see the whole map (default: {global_blocks})")
    flag("--norm", choices=tuple(NORMS), default="group", help="in neck and heads")
    flag("--heads", choices=("small", "full"), default="small", help="for a laptop, or the paper's")
    flag("--jitter", type=between(0, 100), nargs=2,
         help=f"range of scales; 0 0 for no augmentation at all (default: {jitter})")
    flag("--eval-train", action="store_true", help="evaluate on the training images: can it overfit them?")
    flag("--layer-decay", type=between(0, 10), help="learning rate factor per block, from the head down")
    encoders.encoder_flags(flag)
    sources.source_flags(flag, sets)


def complete(args):
    coco.need_pycocotools()  # now, not after the first epoch
    if args.img_size and len(set(args.img_size)) > 1:
        raise ValueError(f"--img-size {' '.join(map(str, args.img_size))} must be one number for --task detect: "
                         "images are padded to a square")
    complete_dense(args, "quarters", img_size=[128], patch_size=8)
    if (args.init_options.get("rel_pos_bias")) and args.no_rel_pos:
        raise ValueError(f"--init {args.init} has a relative position bias, which --no-rel-pos has no place for; "
                         "drop that flag")
    if args.jitter is None and args.data != "shapes":
        args.jitter = [0.1, 2.0]


def complete_dense(args, global_blocks, img_size, patch_size):
    """Model and sizes; what acts on a plain ViT only."""
    encoders.inherit(args, img_size=img_size, patch_size=patch_size)
    if encoders.is_vit(args):
        args.global_blocks = args.global_blocks or global_blocks
        if args.window_size and len(args.window_size) > 1:
            raise ValueError(f"--window-size {' '.join(map(str, args.window_size))} must be one number for a plain "
                             f"ViT")
        if args.window_size and args.global_blocks == "all":
            raise ValueError(f"--window-size {args.window_size[0]} acts with --global-blocks quarters or none; drop "
                             f"one")
        encoders.complete(args, skip=("window_size",))
    else:
        for name in ("pyramid", "global_blocks", "no_rel_pos"):
            if getattr(args, name, None):
                raise ValueError(f"--{name.replace('_', '-')} belongs to a plain ViT, not to {args.model}; drop it")
        if args.model in encoders.mixer.PRESETS:
            raise ValueError(f"--model {args.model} has no map of features; choose a ViT, a hierarchical ViT or a "
                             f"ResNet")
        encoders.complete(args)
    if args.eval_train and args.val_images is not None:
        raise ValueError(f"--val-images {args.val_images} acts on a validation set, not with --eval-train; drop one")
    if args.jitter not in (None, [0, 0]) and not 0 < args.jitter[0] <= args.jitter[1]:
        raise ValueError(f"--jitter {args.jitter[0]:g} {args.jitter[1]:g} must be two positive numbers, the smaller "
                         "first, such as 0.5 2")


def open_scenes(args, train):
    if args.data == "shapes":
        size = args.data_size if train else max(1, args.data_size // 4)
        return ShapeScenes(size, args.img_size[0], args.data_seed, train, args.class_agnostic, args.scenes)
    if args.data_path is None:
        raise ValueError("--data coco needs --data-path")
    return CocoImages(args.data_path, "train2017" if train else "val2017", args.class_agnostic, not args.boxes_only)


def split_scenes(args, train, val):
    """The images that are used; val None: the training images again."""
    found = sources.split(args, train, train if val is None else val)
    return found if val is not None else found._replace(val_indices=found.indices)


def open_data(args, world):
    source = open_scenes(args, train=True)
    args.category_ids = source.ids  # for predict --coco
    found = split_scenes(args, source, None if args.eval_train else open_scenes(args, train=False))
    jitter = None
    if args.jitter not in (None, [0, 0]):
        fill = [round(255 * value) for value in found.mean]  # becomes zero, with which the detector pads too
        jitter = large_scale_jitter(args.img_size[0], fill, args.jitter)
    train = Detections(found.train, jitter, args.seed, found.indices)
    val = Detections(found.val, indices=found.val_indices)
    return Data(train, val, list(source.classes), found.mean, found.std, collate=as_lists, val_collate=as_lists)


def build(args, data, world):
    encoder = build_encoder(args, data, world)
    model = build_detector(encoder, args, data)
    describe_positions(model.backbone.pyramid, args, world)
    return synchronized(model, world)


def build_encoder(args, data, world):
    skip = ("window_size",) if encoders.is_vit(args) else ()
    encoder = encoders.build_encoder(args, skip, args.init_options)
    encoders.load_init(encoder, args, data, world)
    if encoders.is_vit(args) and encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad_(True)
    return encoder


def build_detector(encoder, args, data):
    """Mask R-CNN around it. Anchors and the scale of regions follow the image; 1024 pixels are the paper's."""
    size, small = args.img_size[0], args.heads == "small"
    heads = dict(SMALL_HEADS if small else FULL_HEADS)
    square = small and args.data == "shapes"  # as wide as high: two sizes serve better than three ratios
    if square:
        heads["aspect_ratios"] = (1.0,)
    if encoders.is_vit(args) and not args.init:
        init_as_beit(encoder)
    if args.pyramid != "single":
        levels = 1 + len(getattr(encoder, "depths", range(4)))
        sides = [max(4, size * 2**k // 32) for k in range(levels)]
        heads["anchor_sizes"] = [(side, round(side * 2**0.5)) if square else (side,) for side in sides]
    model = vit_mask_rcnn(
        encoder,
        len(data.classes),
        img_size=size,
        window_size=args.window_size[0] if args.window_size else 14,
        global_blocks=args.global_blocks or "quarters",
        pyramid=args.pyramid or "taps",
        rel_pos_bias=not args.no_rel_pos,
        checkpointing=bool(args.checkpointing),
        norm=args.norm,
        canonical_scale=size * 7 // 8 if small else 224,
        image_mean=data.mean,
        image_std=data.std,
        **heads,
    )
    if args.boxes_only:  # torchvision's way to say that there are no masks
        parts = model.roi_heads
        parts.mask_roi_pool = parts.mask_head = parts.mask_predictor = None
    return model


def describe_positions(pyramid, args, world):
    for what, before, now in pyramid.positions:
        start = "" if args.init or before == "none" else " (random start: a fresh sin-cos table)"
        world.say(f"  positions: {what:26} {before:12} -> {now}{start}")


def synchronized(model, world):
    """Two images per process are too few for BatchNorm."""
    if world.size > 1 and world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def loss(model, batch, args, data):
    images, targets = batch
    return sum(model(images, targets).values())


def evaluate(model, loader, args, data, world):
    """AP and recall in percent."""
    source = data.val.source
    ids = [source.image_ids[i] for i in data.val.indices]
    kinds = ("box",) if args.boxes_only else ("box", "mask")
    result = coco_evaluate(model, loader, source.truth(), source.ids, world.device, world.main, ids, kinds)
    # -1 or absent: there was nothing to detect
    return {name: 100 * result[name] if result.get(name, -1) >= 0 else math.nan for name in METRICS}


def save_picture(folder, model, args, data, rows=6, threshold=0.5):
    """Truth beside what is detected with a score above the threshold: boxes and masks."""
    device = next(model.parameters()).device
    names = list(map(str, data.classes))
    truth, detected = [], []
    for image, target in pictures.spread(data.val, rows):
        boxes, labels, masks = target["boxes"], target["labels"], target["masks"].bool()
        truth.append(pictures.draw_objects(image, boxes, labels, masks, names, "white"))
        out = model([image.to(device)])[0]
        keep = out["scores"] > threshold
        boxes, labels = out["boxes"][keep].cpu(), out["labels"][keep].cpu()
        masks = torch.zeros(len(boxes), *image.shape[-2:], dtype=torch.bool)
        if "masks" in out:
            masks = out["masks"][keep, 0].cpu() > 0.5
        detected.append(pictures.draw_objects(image, boxes, labels, masks, names, "yellow"))
    pictures.save_grid(folder / "detections.png", {"truth": truth, f"score above {threshold:g}": detected})


def predict(model, images, args, classes):
    """All objects that count in evaluation: class, label 1..K, score, box x y w h, mask in COCO's run lengths."""
    results = []
    for out in model(images):
        objects = []
        for k in range(len(out["scores"])):
            label = out["labels"][k].item()
            x1, y1, x2, y2 = out["boxes"][k].tolist()
            objects.append({
                "class": str(classes[label - 1]),
                "label": label,
                "score": out["scores"][k].item(),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            })
            if "masks" in out:
                rle = coco.encode(out["masks"][k, 0] > 0.5)
                size = [int(side) for side in rle["size"]]
                objects[-1]["segmentation"] = dict(size=size, counts=rle["counts"].decode())
        results.append(dict(objects=objects))
    return results


def draw(image, prediction, classes, threshold=0.5):
    """Boxes, classes, scores and masks of the objects with a score of at least the threshold."""
    mask, *_ = coco.need_pycocotools()
    objects = [item for item in prediction["objects"] if item["score"] >= threshold]
    if not objects:
        return pictures.captioned(image, [f"no object with a score of at least {threshold:g}"])
    boxes = torch.tensor([item["bbox"] for item in objects]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = torch.zeros(len(objects), *image.shape[-2:], dtype=torch.bool)
    for k, item in enumerate(objects):
        if "segmentation" in item:
            masks[k] = torch.from_numpy(mask.decode(item["segmentation"])).bool()
    labels = torch.tensor([item["label"] for item in objects], dtype=torch.long)
    scores = [item["score"] for item in objects]
    names = list(map(str, classes))
    picture = pictures.draw_objects(image, boxes, labels, masks, names, "yellow", scores)
    return pictures.to_pil(picture)


def coco_results(args, paths, predictions):
    """Predictions {index of the path: prediction} -> COCO's list of results, and a note on the ids in it.

    args: of the run, with the category ids of its training set
    """
    # images: COCO has numbers as names
    stems = [path.stem for path in paths]
    numbered = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems)
    ids = [int(stem) for stem in stems] if numbered else range(1, len(stems) + 1)
    note = "image_id: " + ("the number in its name" if numbered else "the order of the images, counted from 1")
    note += f"; category_id: as in the run's training set ({args.data})"

    results = []
    for i, prediction in predictions.items():
        for item in prediction["objects"]:
            result = {name: item[name] for name in ("bbox", "score", "segmentation") if name in item}
            category = args.category_ids[item["label"] - 1]
            results.append(dict(image_id=ids[i], category_id=category, **result))
    return results, note
