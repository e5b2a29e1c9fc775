"""Pre-training: hide patches of an image and learn to predict them. Methods: MAE, MIRL, MixMIM.

The objectives are in mae.py, mirl.py and mixmim.py: modules that take (images, mask ratio, noise) and return
.loss, with a `pictures` method. A new one is one line in METHODS; what it needs besides goes into `complete`.
Options of a method are arguments of its constructor: one that it does not have is refused, not ignored.

--init FILE starts from the encoder of any checkpoint. A run of ours by the same method goes on: the file supplies
the method, the mask and the decoders too.
"""

import base64
import math
import re

import torch
from torch.utils.data import default_collate

from data import Images, augmentation
from formats import flat_tensors
from mae import MAE
from masking import mix_mask, num_visible, patch_mean_loss
from mirl import MIRL
from mixmim import MixMIM
from tasks import Data
from training import encoders, pictures, sources
from training.flags import between, count

METHODS = {"mae": MAE, "mirl": MIRL, "mixmim": MixMIM}
OPTIONS = ("segments", "pairing", "fill", "dual", "masked_attention", "mask_per_cycle", "norm_pix_loss",
           "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
FLAGS = dict(pairing="--no-pairing", dual="--single", masked_attention="--open-attention", norm_pix_loss="--raw-pixels")
DEFAULTS = dict(epochs=6, batch_size=64, blr=4e-3, beta2=0.95)


def add_flags(flag):
    flag("--method", choices=tuple(METHODS), help="the objective (default: that of --init, else mirl)")
    flag("--mask-ratio", type=between(0, 1), help="share of patches hidden (default: 0.75, mixmim 0.5)")
    flag("--raw-pixels", dest="norm_pix_loss", action="store_false", default=None,
         help="predict pixels, not pixels normalized per patch")
    flag("--decoder-embed-dim", type=count, help="(default: about two thirds of the encoder's width)")
    flag("--decoder-depth", type=count, help="blocks per decoder (default: 1)")
    flag("--decoder-num-heads", type=count, help="(default: one per 32 channels)")
    flag("--segments", type=count, help="mirl: K (default: the largest of 6, 4, 2 that divides the depth)")
    flag("--no-pairing", dest="pairing", action="store_false", default=None,
         help="mirl, an ablation: every segment predicts the whole image")
    flag("--fill", choices=("mix", "mask"), help="mixmim: another image's patches, or a mask token, an ablation")
    flag("--single", dest="dual", action="store_false", default=None,
         help="mixmim, an ablation: reconstruct one image of each mixture")
    flag("--open-attention", dest="masked_attention", action="store_false", default=None,
         help="mixmim, an ablation: attend across the two images")
    flag("--mask-per-cycle", action="store_true", default=None,
         help="mixmim: a mask per cycle of partners, not per batch")
    flag("--then-probe", action="store_true", help="then probe the features, and those of the untrained encoder")
    encoders.encoder_flags(flag)
    sources.image_flags(flag)
    sources.augment_flag(flag, "padcrop up to 64 px, else mae")


def complete(args):
    # the encoder
    inherit_method(args)
    mixmim = args.method == "mixmim"
    encoders.inherit(args, "mixmim_demo" if mixmim else "vit_demo")
    if encoders.is_vit(args) and mixmim:
        args.class_token = False
    if not encoders.is_vit(args) and not (mixmim and encoders.is_hierarchical(args)):
        raise ValueError(f"--model {args.model} does not fit --method {args.method}: mae and mirl take a plain ViT, "
                         "mixmim a plain or a hierarchical one")
    if args.init_options.get("rel_pos_bias"):
        raise ValueError(f"--init {args.init} has a relative position bias, for which masking leaves no full grid; "
                         "take a file with a position table")
    encoder = encoders.complete(args)

    # the mask
    if args.mask_ratio is None:
        args.mask_ratio = 0.5 if mixmim else 0.75
    if mixmim:
        mix_mask(torch.zeros(num_patches(args)), args.mask_ratio)  # raises where nothing or everything would be hidden
        check_mixing(args)
    else:
        num_visible(num_patches(args), args.mask_ratio)

    # the decoders, and whether the method takes its options
    two_thirds = 32 * round(encoder.num_features * 2 / 3 / 32)
    args.decoder_embed_dim = args.decoder_embed_dim or max(32, two_thirds)
    args.decoder_depth = args.decoder_depth or 1
    args.decoder_num_heads = args.decoder_num_heads or max(1, args.decoder_embed_dim // 32)
    if args.method == "mirl" and args.segments is None:
        fitting = [k for k in (6, 4, 2) if args.depth % k == 0]
        args.segments = fitting[0] if fitting else 2
    with torch.device("meta"):
        METHODS[args.method](encoder, **method_options(args))
    if args.augment is None:
        args.augment = "padcrop" if max(args.img_size) <= 64 else "mae"


def inherit_method(args):
    """What the flags leave open, from a pre-training run of ours; then the default method."""
    saved = encoders.init_file(args).get("args")
    method = saved.get("method") if isinstance(saved, dict) else None
    if method in tuple(METHODS) and args.method in (None, method):
        names = ("method", "mask_ratio", *OPTIONS)
        saved = encoders.typed(saved, args.init, names, add_flags)
        for name in names:
            if getattr(args, name) is None:
                setattr(args, name, saved[name])
    args.method = args.method or "mirl"
    if args.init and args.then_probe:
        raise ValueError(f"--init {args.init} does not go with --then-probe, which compares with random weights; name "
                         "--task pretrain, and probe afterwards")


def method_options(args):
    """The arguments of the method's constructor."""
    kinds = {f"--method {name}": kind for name, kind in METHODS.items()}
    return encoders.options_for(METHODS[args.method], args, OPTIONS, kinds, FLAGS.items())


def num_patches(args):
    """Patches of an image; of a hierarchical encoder those of its last stage."""
    return math.prod(side // args.stride for side in args.img_size)


def check_mixing(args):
    if args.fill == "mask":
        for name in ("dual", "masked_attention"):
            if getattr(args, name) is not None:
                raise ValueError(f"{FLAGS[name]} acts with --fill mix only; drop it")
    elif args.batch_size < 2:
        raise ValueError(f"--batch-size {args.batch_size} leaves MixMIM nothing to mix; use at least 2")


def open_data(args, world):
    found = sources.open_images(args, world, need_val=False)
    needed = 2 if args.method == "mixmim" and args.fill != "mask" else 1
    if found.val is not None and len(found.val_indices) < needed * world.size:
        raise ValueError(f"the validation set has {len(found.val_indices)} images for {world.size} processes, but "
                         f"each needs {needed}; add images or leave the set out")
    transform = augmentation(args.augment, args.img_size, found.mean, found.std, args.crop_ratio)
    train = Images(found.train, transform, args.seed, found.indices, num_patches(args))
    val = None
    if found.val is not None:
        plain = augmentation("none", args.img_size, found.mean, found.std, args.crop_ratio)
        val = Images(found.val, plain, args.seed, found.val_indices, num_patches(args))
    return Data(train, val, list(found.train.classes), found.mean, found.std, smallest=needed)


def build(args, data, world):
    encoder = encoders.build_encoder(args, init_options=args.init_options)
    model = METHODS[args.method](encoder, **method_options(args))
    if data.weights is None and args.init:
        load_init(model, args, data, world)
    return model


def load_init(model, args, data, world):
    """The whole model from a run by the same method in the same sizes, else its encoder from any file."""
    file = encoders.read_init(args.init)
    saved, tensors = file.get("args"), flat_tensors(file, args.init)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    same_method = isinstance(saved, dict) and saved.get("method") == args.method
    if same_method and shapes == {name: value.shape for name, value in tensors.items()}:
        model.load_state_dict(tensors)
        world.say(f"  goes on from {args.init}, decoders included; optimizer and learning rate start anew")
    else:
        encoders.load_init(model.encoder, args, data, world)
        world.say(f"  the decoders of {args.method} start from random weights")


def mask_noise(noise, args):
    """A row of random numbers per image -> what the objective takes: MixMIM has one mask for all images."""
    return noise[0] if args.method == "mixmim" and not args.mask_per_cycle else noise


def loss(model, batch, args, data):
    images, _, noise = batch
    return model(images, args.mask_ratio, mask_noise(noise, args)).loss


def evaluate(model, loader, args, data, world):
    """The loss on hidden patches. baseline: that of predicting each patch's mean; a model that learns is below."""
    total = baseline = count = 0
    for images, _, noise in loader:
        images, noise = images.to(world.device), noise.to(world.device)
        total += model(images, args.mask_ratio, mask_noise(noise, args)).loss.item() * len(images)
        baseline += patch_mean_loss(images, args.stride, args.norm_pix_loss is not False).item() * len(images)
        count += len(images)
    total, baseline, count = world.sum([total, baseline, count])
    return {"val_loss": total / count, "baseline": baseline / count}


def save_picture(folder, model, args, data, rows=6, spacing=8):
    """Reconstructions of images from all over the validation set.

    Of rows x spacing images one of every `spacing` is drawn; all of them center MIRL's residual.
    """
    source = data.val or data.train
    images, _, noise = default_collate(pictures.spread(source, rows * spacing))
    device = next(model.parameters()).device
    columns = reconstructions(model, images.to(device), args, data.mean, data.std, noise.to(device))
    every = max(1, len(images) // rows)
    shown = {name: column[::every][:rows] for name, column in columns.items()}
    pictures.save_grid(folder / "reconstruction.png", shown)


def reconstructions(model, images, args, mean, std, noise):
    """{caption: (B, 3, H, W) in [0, 1]}: what the model saw and what it predicts."""
    mean = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(std, device=images.device).view(-1, 1, 1)
    columns = model.pictures(images, args.mask_ratio, mask_noise(noise, args), gray=(0.5 - mean) / std)
    return {name: (column * std + mean).clamp(0, 1).cpu() for name, column in columns.items()}


def predict(model, images, args, classes):
    """The loss on hidden patches, that of predicting each patch's mean, and the reconstructions as a PNG in base64.

    All images have the same mask. For the picture MixMIM mixes two images, and MIRL centers its residual over
    the batch; where that is too small, shifted copies join it.
    """
    batch = torch.stack(images)
    least = {"mirl": 8, "mixmim": 2}.get(args.method, 1)
    copies = [batch]
    for k in range(1, -(-least // len(batch))):
        copies.append(batch.roll((k * batch.shape[-2] // least, k * batch.shape[-1] // least), dims=(-2, -1)))
    batch = torch.cat(copies)
    noise = torch.rand(num_patches(args), generator=torch.Generator().manual_seed(0))
    noise = noise.to(batch.device).expand(len(batch), -1)
    columns = reconstructions(model, batch, args, args.mean, args.std, noise)

    # the losses of each image alone; MixMIM mixes it with its mirror image
    results = []
    for i, image in enumerate(images):
        alone = torch.stack([image, image.flip(-1)]) if args.method == "mixmim" else image[None]
        loss = model(alone, args.mask_ratio, mask_noise(noise[:len(alone)], args)).loss
        baseline = patch_mean_loss(image[None], args.stride, args.norm_pix_loss is not False)
        # captions hold the error of the whole batch
        row = {re.sub(r", error .*", "", name): column[i:i + 1] for name, column in columns.items()}
        picture = base64.b64encode(pictures.grid_png(row, cell=192)).decode()
        results.append(dict(loss=loss.item(), baseline=baseline.item(), picture=picture))
    return results


def draw(image, prediction, classes):
    return pictures.from_png(base64.b64decode(prediction["picture"]))
