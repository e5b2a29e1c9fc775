"""Encoders: any backbone by name, the flags that change it, and the checkpoint it starts from.

A flag that was given goes to the constructor, whose signature decides whether it means anything:
`--num-heads 4 --model mixer_s16` is an error because Mixer has no num_heads. No table of rules.

A checkpoint of ours knows its encoder: --init supplies model and sizes, and a flag that says otherwise
is an error. A published file supplies what its tensors show (patch size, relative bias, layer scale).

Needs: torch; checkpoints.py and the encoders.
"""

import functools
import inspect
import os

import torch

import hierarchical
import mixer
import resnet
import vit
from checkpoints import encoder_options, load_pretrained, read_checkpoint
from training.flags import Parser, between, count, path

PRESETS = {vit.ViT: vit.PRESETS, hierarchical.HierarchicalViT: hierarchical.PRESETS, mixer.Mixer: mixer.PRESETS,
           resnet.ResNet: resnet.PRESETS}
KINDS = {kind.__name__: kind for kind in PRESETS}
MODELS = {}  # name -> (class, keyword arguments)
for kind, presets in PRESETS.items():
    MODELS |= {name: (kind, preset) for name, preset in presets.items()}

SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "window_size", "shift", "class_token")  # a checkpoint's own
OPTIONS = ("img_size", *SIZES, "pool", "drop_path", "checkpointing", "weight_init")


def encoder_flags(flag):
    switch = dict(default=None, action="store_true")
    flag("--model", choices=MODELS, metavar="PRESET", help="of vit.py, hierarchical.py, mixer.py or resnet.py")
    flag("--img-size", type=count, nargs="+", help="one number, or height and width")
    for name in ("patch-size", "embed-dim", "depth", "num-heads"):
        flag(f"--{name}", type=count, help="overrides the preset")
    flag("--window-size", type=count, nargs="+", help="hierarchical encoder: one number per stage")
    flag("--shift", **switch, help="hierarchical encoder: shift every other block's windows (Swin)")
    flag("--no-class-token", dest="class_token", default=None, action="store_false", help="ViT")
    flag("--weight-init", choices=("mae", "jax"), help="ViT, Mixer: how the weights start (default: mae)")
    flag("--drop-path", type=between(0, 1), help="stochastic depth of the last block")
    flag("--checkpointing", **switch, help="recompute activations: less memory, more time")
    flag("--init", type=path, metavar="FILE", help="checkpoint to start from: ours, MAE, timm, DeiT, MoCo v3, BEiT, "
                                                   "MIRL, MixMIM")


def is_vit(args):
    return MODELS[args.model][0] is vit.ViT


def is_hierarchical(args):
    return MODELS[args.model][0] is hierarchical.HierarchicalViT


def options_for(kind, args, names, kinds, spelling=()):
    """Those of args[names] that were given, as keyword arguments of kind. ValueError for one that it does not take.

    kinds: {what to call it: class}, all there are; spelling: (argument, flag) where their names differ
    """
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    for name in given:
        if name not in inspect.signature(kind).parameters:
            flag = dict(spelling).get(name, f"--{name.replace('_', '-')}")
            owners = [label for label, other in kinds.items() if name in inspect.signature(other).parameters]
            raise ValueError(f"{flag} belongs to {' or '.join(owners)}, not to {kind.__name__}; drop it")
    return given


def build_encoder(args, skip=(), init_options=None):
    """The encoder of the flags, without a head.

    skip: flags that something around it reads; init_options: what the file of --init asks for
    """
    kind, preset = MODELS[args.model]
    names = [name for name in OPTIONS if name not in skip]
    options = options_for(kind, args, names, KINDS, [("class_token", "--no-class-token")])
    if kind is hierarchical.HierarchicalViT and "num_heads" in options:  # a number per stage, the preset's
        raise ValueError("--num-heads belongs to ViT, not to HierarchicalViT; drop it")
    if "img_size" in options:
        size = options["img_size"]
        if len(size) > 2:
            raise ValueError(f"--img-size {' '.join(map(str, size))} must be one number, or height and width")
        options["img_size"] = size[0] if len(size) == 1 else tuple(size)
    if kind is vit.ViT:
        if args.weight_init != "jax":
            options["pos_embed"] = "sincos"
        if args.class_token is False:
            options["pool"] = "mean"
        options |= init_options or {}
    return kind(**{**preset, "num_classes": 0, **options})


def blocks_of(encoder):
    """The transformer or Mixer blocks in their order, of all stages."""
    if isinstance(encoder, resnet.ResNet):
        return []
    if isinstance(encoder, hierarchical.HierarchicalViT):
        return [block for layer in encoder.layers for block in layer.blocks]
    return list(encoder.blocks)


# ---------------------------------------------------------------------------- starting from a file


def read_init(path):
    """The file is needed twice, for the sizes and for the weights."""
    return read_unchanged(path, os.path.getmtime(path) if os.path.exists(path) else None)


@functools.lru_cache(maxsize=1)
def read_unchanged(path, changed):
    return read_checkpoint(path)


def init_file(args):
    """The dict of --init's file; {} without --init, and where its sizes are not needed or not to be had."""
    init = getattr(args, "init", None)
    resumed = args.init_options is not None  # such a run has them in its flags
    if not init or resumed or args.dry_run and not os.path.exists(init):  # written by a run yet to come
        return {}
    return read_init(init)


def inherit(args, default_model="vit_demo", **defaults):
    """Model and sizes from the file of --init, then defaults for what neither flags nor file say.

    defaults: sizes of the default model; another --model brings its own
    """
    named = args.model is not None
    file = init_file(args)
    args.init_options = args.init_options or {}
    if isinstance(file.get("args"), dict):
        take_over(args, typed(file["args"], args.init))
    args.model = args.model or default_model
    if file and is_vit(args):
        try:
            options = encoder_options(file)
        except ValueError as error:
            raise ValueError(f"--init {args.init}: {error}") from None
        published_sizes(args, options)
    for name, value in defaults.items():
        if not named and getattr(args, name) is None:
            setattr(args, name, value)


def typed(saved, init, names=("model", "img_size", *SIZES), add_flags=encoder_flags):
    """The flags in a checkpoint of ours; those with these names are checked as if they were given."""
    parser = Parser(add_help=False)
    add_flags(parser.add_argument)
    words = parser.as_argv({name: saved.get(name) for name in names})
    try:
        return {**saved, **vars(parser.parse_args(words))}
    except ValueError as error:
        raise ValueError(f"--init {init}: its args are of no run ({error}); is the file damaged?") from None


def take_over(args, saved):
    """A checkpoint of ours: what the flags leave open is the file's; what they contradict is an error."""
    values = {name: saved.get(name) or None for name in ("model", *SIZES)}
    # a ViT pre-trained by MixMIM has no class token; older files do not say so
    by_mixmim = saved.get("method") == "mixmim" and saved.get("model") in vit.PRESETS
    if by_mixmim or saved.get("class_token") is False:
        values["class_token"] = False
    for name, value in values.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif given != value and name != "window_size":  # windows may change: their tables are resized
            flag = "--no-class-token" if name == "class_token" else f"--{name.replace('_', '-')} {given}"
            raise ValueError(f"{flag} contradicts --init {args.init}, whose encoder has "
                             f"{name} {value}; drop the flag")
    if args.img_size is None and args.task not in ("detect", "segment"):
        args.img_size = saved.get("img_size")


def published_sizes(args, options):
    """What the tensors of any file show of its ViT, as constructor arguments."""
    patch_size = options.pop("patch_size", args.patch_size)
    args.patch_size = args.patch_size or patch_size
    if patch_size != args.patch_size:
        raise ValueError(f"--init {args.init} has patches of {patch_size} pixels, --patch-size is "
                         f"{args.patch_size}; use --patch-size {patch_size}")
    if "img_size" in options:
        options["img_size"] = list(options["img_size"])
    dense = args.task in ("detect", "segment")
    if options.get("rel_pos_bias") == "block" and dense:
        raise ValueError(f"--init {args.init} is a fine-tuned BEiT with a bias in every block, but --task "
                         f"{args.task} "
                         "shares one; take the pre-trained file")
    if options.get("rel_pos_bias") and args.class_token is False:
        raise ValueError(f"--init {args.init} has a relative position bias, which --no-class-token has no place for; "
                         "drop that flag")
    if not dense:  # a pyramid is built in the file's size and resizes the tables itself
        options.pop("img_size", None)
    args.init_options = options


def complete(args, skip=()):
    """The flags get the encoder's sizes, and its own checks run; no weights are made. -> the encoder on meta"""
    with torch.device("meta"):
        encoder = build_encoder(args, skip)
    args.img_size = list(encoder.img_size)
    if not isinstance(encoder, resnet.ResNet):
        args.patch_size, args.embed_dim = encoder.patch_size, encoder.embed_dim
        args.stride = encoder.stride  # pixels per token of the last stage
    elif getattr(args, "layer_decay", None) not in (None, 1.0):
        raise ValueError(f"--layer-decay {args.layer_decay:g} belongs to ViT, HierarchicalViT or Mixer, not to "
                         "ResNet; drop it")
    if isinstance(encoder, (vit.ViT, mixer.Mixer)):
        args.depth = len(encoder.blocks)
    if isinstance(encoder, vit.ViT):
        args.num_heads = encoder.num_heads
    return encoder


def load_init(encoder, args, data, world):
    """The weights of --init, unless the run's own come later -> the report."""
    if args.init and data.weights is None:
        return load_pretrained(encoder, read_init(args.init), verbose=world.main, name=args.init)
    if not args.init:
        world.say("  no --init: the encoder starts from random weights")
    return None
