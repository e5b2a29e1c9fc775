"""Classification: an encoder with a linear head, from scratch or from a checkpoint.

Fine-tuning as MAE, MIRL and MixMIM do it (layer decay, mixup, a weight average, a head that starts near zero),
training from scratch as the SAM paper does it, and training against attacks. With --init the head starts
near zero, so that the first steps follow the features and not the noise of a random head.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

from data import Images, augmentation
from files import read_text
from formats import convert, flat_tensors
from robust import corruption_accuracy, fgsm, mean_accuracy, pgd
from sam import batchnorm_held
from tasks import Data
from training import encoders, pictures, sources
from training.encoders import read_init
from training.flags import between, path, positive
from training.judge import match_classes

DEFAULTS = dict(epochs=20, batch_size=64, blr=2e-3, min_lr=1e-6, beta2=0.999, layer_decay=1.0, label_smoothing=0.0,
                mixup=0.0, cutmix=0.0)


def add_flags(flag):
    add_tuning_flags(flag)
    flag("--class-names", type=path, metavar="FILE",
         help="with --eval-only --init: what the file's outputs stand for, one folder name a line")
    flag("--tune-last", type=between(0, 1000, int), metavar="N",
         help="train the last N blocks, the last norm and the head only (default: all)")
    flag("--label-smoothing", type=between(0, 1))
    flag("--mixup", type=between(0, 100), help="alpha, 0 is off")
    flag("--cutmix", type=between(0, 100), help="alpha, 0 is off; with both, one of them per batch")
    flag("--adversarial", action="store_true", help="train on FGSM attacks from a random start")
    flag("--attack-eps", type=positive, help="how far an attack may move a pixel, in 255ths (default: 4)")
    flag("--eval-corruptions", action="store_true", help="at the end: accuracy under six kinds of corruption")
    flag("--eval-pgd", action="store_true", help="at the end: accuracy under ten steps of attack")


def add_tuning_flags(flag, augment="padcrop up to 64 px, else inception"):
    """What all tasks share that train a whole encoder on labeled images. augment: the default, in words"""
    flag("--pool", choices=("mean", "cls"), help="ViT: what the head reads (default: mean)")
    flag("--layer-decay", type=between(0, 10), help="learning rate factor per block, from the head down")
    encoders.encoder_flags(flag)
    sources.image_flags(flag)
    sources.augment_flag(flag, augment)


def complete(args):
    blocks = complete_encoder(args)
    if args.tune_last is not None and (not blocks or args.tune_last > len(blocks)):
        raise ValueError(f"--tune-last {args.tune_last} does not fit {args.model}, which has {len(blocks)} transformer "
                         "or Mixer blocks; drop it or use at most as many")
    if args.attack_eps is not None and not (args.adversarial or args.eval_pgd):
        raise ValueError(f"--attack-eps {args.attack_eps:g} acts with --adversarial or --eval-pgd only; drop it")
    if args.adversarial or args.eval_pgd:
        args.attack_eps = args.attack_eps or 4.0
        if args.attack_eps > 255:
            raise ValueError(f"--attack-eps {args.attack_eps:g} is in 255ths of a pixel's range, at most 255; try 4")
    if args.adversarial and args.augment == "strong":
        raise ValueError("--augment strong erases with noise beyond the range of a pixel, within which --adversarial "
                         "moves; take --augment inception")


def complete_encoder(args):
    encoders.inherit(args)
    if encoders.is_vit(args):
        args.pool = args.pool or "mean"
    if args.pool == "cls" and args.class_token is False:
        raise ValueError("--pool cls needs a class token, which this encoder does without; take --pool mean")
    encoder = encoders.complete(args)
    args.augment = args.augment or ("padcrop" if max(args.img_size) <= 64 else "inception")
    return encoders.blocks_of(encoder)


def open_data(args, world):
    found = sources.open_images(args, world)
    transform = augmentation(args.augment, args.img_size, found.mean, found.std, args.crop_ratio)
    plain = augmentation("none", args.img_size, found.mean, found.std, args.crop_ratio)
    train = Images(found.train, transform, args.seed, found.indices)
    val = Images(found.val, plain, args.seed, found.val_indices)
    return Data(train, val, list(found.train.classes), found.mean, found.std)


def build(args, data, world):
    if args.eval_only and not args.resume:
        return published_classifier(args, data, world)
    encoder = build_encoder(args, data, world)
    encoder.reset_classifier(len(data.classes))
    if args.init:
        nn.init.trunc_normal_(encoder.head.weight, std=2e-5)
    if args.tune_last is not None:
        freeze(encoder, args.tune_last)
    return encoder


def published_classifier(args, data, world):
    """The encoder of --init with the file's own head; data.classes become what its outputs stand for."""
    file = read_init(args.init)
    _, state, _ = convert(flat_tensors(file, args.init))
    if "head.weight" not in state:
        raise ValueError(f"--eval-only: --init {args.init} has no linear classifier; fine-tune it first, or judge a "
                         "run with --resume")
    outputs = len(state["head.weight"])
    names = file.get("classes") or (data.classes if outputs == len(data.classes) else None)
    if args.class_names is not None:
        names = read_text(args.class_names).splitlines()
    if names is None or len(names) != outputs:
        raise ValueError(f"--init {args.init} has {outputs} outputs, but {len(names or data.classes)} classes are "
                         "named; give --class-names FILE, one folder name a line in the order of the outputs")
    match_classes(data, names, partly=True)

    encoder = encoders.build_encoder(args, init_options=args.init_options)
    encoder.reset_classifier(outputs)
    missing = encoders.load_init(encoder, args, data, world).missing
    if missing:
        raise ValueError(f"--eval-only: --init {args.init} lacks {', '.join(missing[:3])}; take the other --pool, or a "
                         "file of this --model")
    return encoder


def freeze(encoder, tune_last):
    """Partial fine-tuning (MAE, He et al. 2022): all but the last blocks, the norm after them and the head."""
    encoder.requires_grad_(False)
    blocks = encoders.blocks_of(encoder)
    for part in [*blocks[len(blocks) - tune_last:], encoder.norm, getattr(encoder, "fc_norm", None), encoder.head]:
        if part is not None:
            part.requires_grad_(True)


def build_encoder(args, data, world):
    """The encoder of --init; a ViT trains its position table, which MAE and MIRL froze."""
    encoder = encoders.build_encoder(args, init_options=args.init_options)
    encoders.load_init(encoder, args, data, world)
    if encoders.is_vit(args) and encoder.pos_embed is not None:  # BEiT has none
        encoder.pos_embed.requires_grad_(True)
    return encoder


def loss(model, batch, args, data):
    images, labels, _ = batch
    mixes = []
    if args.mixup:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=len(data.classes)))
    if args.cutmix:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=len(data.classes)))
    if mixes:
        images, labels = v2.RandomChoice(mixes)(images, labels)
    if args.adversarial:
        bare = getattr(model, "module", model)  # an attack sends no gradients to other processes
        bare = getattr(bare, "_orig_mod", bare)
        with batchnorm_held(bare):  # its statistics are those of the images trained on
            images = fgsm(bare, images, labels, args.attack_eps / 255, mean=data.mean, std=data.std)
    return F.cross_entropy(model(images).float(), labels, label_smoothing=args.label_smoothing)


def evaluate(model, loader, args, data, world):
    loss = correct = among_five = count = 0
    for images, labels, *_ in loader:
        images, labels = images.to(world.device), labels.to(world.device)
        logits = model(images).float()
        if data.columns is not None:
            logits = logits[:, data.columns]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(dim=1) == labels).sum().item()
        best = logits.topk(min(5, logits.shape[1])).indices
        among_five += (best == labels[:, None]).sum().item()
        count += len(images)
    loss, correct, among_five, count = world.sum([loss, correct, among_five, count])
    line = {"val_loss": loss / count, "val_acc": 100 * correct / count}
    line |= {"val_images": int(count), "classes": len(data.columns or data.classes)}
    if args.eval_only:
        line["val_top5"] = 100 * among_five / count
    if data.final and (getattr(args, "eval_corruptions", False) or getattr(args, "eval_pgd", False)):
        line |= evaluate_robustness(model, loader, args, data, world)
    return line


@torch.enable_grad()
def evaluate_robustness(model, loader, args, data, world):
    """corrupted_acc and pgd_acc in percent. The random numbers begin anew with each batch of the loader."""
    correct, count, pixels = {}, 0, dict(mean=data.mean, std=data.std)
    for images, labels, _ in tqdm(loader, "robustness", leave=False, disable=None if world.main else True):
        images, labels = images.to(world.device), labels.to(world.device)
        shares = {}
        if args.eval_corruptions:
            table = corruption_accuracy(model, images, labels, batch_size=len(images), seed=args.seed, **pixels)
            shares["corrupted_acc"] = mean_accuracy(table)
            for name, row in table.items():
                shares[f"corrupted_acc_{name}"] = mean_accuracy({name: row})
        if args.eval_pgd:
            generator = torch.Generator().manual_seed(args.seed)
            attacked = pgd(model, images, labels, args.attack_eps / 255, generator=generator, **pixels)
            with torch.no_grad():
                shares["pgd_acc"] = (model(attacked).argmax(dim=1) == labels).float().mean().item()
        for name, share in shares.items():
            correct[name] = correct.get(name, 0.0) + share * len(images)
        count += len(images)
    names = world.gather(list(correct))[0]  # a rank may have had no images
    *sums, count = world.sum([correct.get(name, 0.0) for name in names] + [count])
    return {name: 100 * total / count for name, total in zip(names, sums, strict=True)}


def save_picture(folder, model, args, data, columns=6):
    """Validation images, each with the class that the model sees in it."""
    samples = pictures.spread(data.val, columns)
    device = next(model.parameters()).device
    predictions = predict(model, [image.to(device) for image, *_ in samples], args, data.classes)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    grid = {}
    for (image, label, _), prediction in zip(samples, predictions):
        best = prediction["classes"][0]
        verdict = "right" if best["class"] == str(data.classes[label]) else f"truth: {data.classes[label]}"
        grid[f"{len(grid) + 1}: {best['class']} {best['probability']:.0%}, {verdict}"] = (image * std + mean)[None]
    pictures.save_grid(folder / "predictions.png", grid)


def predict(model, images, args, classes, most=5):
    """The most likely classes with their probabilities."""
    results = []
    for row in model(torch.stack(images)).float().softmax(dim=1).cpu():
        values, order = row.topk(min(most, len(classes)))
        ranked = [{"class": str(classes[k]), "probability": p} for p, k in zip(values.tolist(), order.tolist())]
        results.append(dict(classes=ranked))
    return results


def draw(image, prediction, classes):
    """The image above its most likely classes."""
    lines = [f"{100 * item['probability']:.1f} %  {item['class']}" for item in prediction["classes"]]
    return pictures.captioned(image, lines)
