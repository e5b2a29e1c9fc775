"""One visible loop: pretrain a vision transformer on unlabelled images, then classify with it.

    python train.py                                   a minute: MIRL on generated shapes, then a linear probe
    python train.py --task pretrain --method mae --data cifar10 --data-path DATA --download
    python train.py --task classify --init runs/0001/checkpoint.pt --data cifar10 --data-path DATA
    python train.py --task classify --probe --init runs/0001/checkpoint.pt ...
    python train.py --task detect --init runs/0001/checkpoint.pt ...
    python train.py --task segment --init runs/0001/checkpoint.pt ...
    python train.py @recipes/mirl_vit_s54_pretrain.txt --dry-run
    torchrun --nproc_per_node=4 train.py ...          the same on four devices

A run leaves args.json, log.jsonl, checkpoint.pt and pictures in its output folder. Interrupted
anywhere, it continues with --resume --output-dir DIR and ends with the weights it would have had:
data order, augmentations, masks and drop path are functions of (seed, epoch or step, index), so
the position in the run is all the state there is, besides model and optimizer.

Source: recipes of MAE (arXiv 2111.06377), MIRL (arXiv 2309.14136), MixMIM (arXiv 2205.13137), SAM for
ViT and Mixer (arXiv 2106.01548) and detection with ViTs (arXiv 2111.11429). Written from the papers.
Needs: torch, torchvision, einops, tqdm; every concept file of this repository.
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2
from tqdm import tqdm

from checkpoints import encoder_options, load_pretrained, read_checkpoint
from coco import CocoImages, Detections, ShapeScenes, coco_evaluate, large_scale_jitter, need_pycocotools
from data import (AUGMENTATIONS, EvalBatches, Folder, Images, TrainBatches, as_lists, augmentation, channel_statistics, first_of_shuffle,
                  make_loader, open_source)
from detect import NORMS, init_as_beit, vit_mask_rcnn
from mae import MAE
from masking import mix_mask, num_visible, paste, patch_mean_loss
from mirl import MIRL
from mixmim import PRESETS as HIERARCHICAL
from mixmim import MixMIM, create_mixmim
from mixer import PRESETS as MIXERS
from mixer import create_mixer
from resnet import PRESETS as RESNETS
from resnet import create_resnet
from robust import corruption_accuracy, fgsm, mean_accuracy, pgd
from sam import SAM, batchnorm_held
from segment import UperNet, predict, save_segments, segment_evaluate
from semantic import Segmentations, open_semantic
from shapes import save_grid
from supcon import SupCon
from vit import PRESETS as VITS
from vit import create_vit

LOG_EVERY = 10  # steps
MAX_BAD_STEPS = 5  # non-finite losses in a row before the run stops
RUN_FILES = ("args.json", "log.jsonl", "checkpoint.pt")

# Laptop-sized. What the papers did at full size stands in recipes/.
DEFAULTS = {
    "all": dict(
        task=None, method="mirl", model="vit_demo", img_size=None, patch_size=None, embed_dim=None, depth=None, num_heads=None,
        window_size=None, shift=False, segments=None, no_pairing=False, fill="mix", single=False, open_attention=False, mask_per_cycle=False,
        decoder_embed_dim=None, decoder_depth=1, decoder_num_heads=None, raw_pixels=False, checkpointing=False,
        data="shapes", data_path=None, data_size=4096, train_images=None, val_images=None, download=False, skip_bad=False, stats=False,
        accum=1, lr=None, warmup_epochs=None, clip_grad=None, mask_ratio=0.75, optimizer="adamw", rho=None,
        adaptive=False, base_optimizer="adamw", seed=0, workers=None,
        init=None, output_dir=None, probe=False, pool="mean", compile=False, precision="auto", device="auto", dry_run=False,
        tflops=100.0, resume=False, save_minutes=10.0, ema=None, drop_path=0.0, layer_decay=1.0, label_smoothing=0.0, mixup=0.0,
        cutmix=0.0, augment=None, schedule="cosine", loss="cross-entropy", adversarial=False, attack_eps=4.0, eval_every=1,
        pyramid="taps", global_blocks="quarters", no_rel_pos=False, norm="group", heads="small", jitter=None, class_agnostic=False, eval_train=False,
        channels=None, slide=None, eval_flip=False, eval_corruptions=False, eval_pgd=False,
        check=False),
    "mixmim": dict(model="mixmim_demo", mask_ratio=0.5),
    "pretrain": dict(epochs=6, batch_size=64, blr=4e-3, min_lr=0.0, weight_decay=0.05, beta2=0.95),
    "classify": dict(epochs=20, batch_size=64, blr=2e-3, min_lr=1e-6, weight_decay=0.05, beta2=0.999),
    # widths and regions of interest that two cores can train; the paper's: --heads full, its recipe in recipes/
    "detect": dict(img_size=[128], patch_size=8, epochs=6, batch_size=4, blr=0.064, min_lr=0.0, weight_decay=0.05, beta2=0.999, warmup_epochs=0.25,
                   clip_grad=1.0),
    "segment": dict(img_size=[64], patch_size=8, epochs=6, batch_size=16, blr=0.016, min_lr=0.0, weight_decay=0.05, beta2=0.999, clip_grad=1.0,
                    global_blocks="all", schedule="linear"),
    "probe": dict(epochs=50, batch_size=256, blr=0.2, min_lr=0.0, weight_decay=0.0, beta2=0.999, augment="none"),
    # python train.py: 16 tokens an image and 64 channels, so that 12 blocks learn something within a minute on two cores
    "tour": dict(patch_size=8, embed_dim=64, num_heads=2, segments=4, mask_ratio=0.5, epochs=10, batch_size=32, blr=1.2e-2, min_lr=0.0, weight_decay=0.05,
                 beta2=0.95),
    "tour mixmim": dict(img_size=[32], patch_size=2, embed_dim=32, epochs=4, batch_size=32, blr=8e-3, min_lr=0.0, weight_decay=0.05, beta2=0.95),
}
# flags that belong to one stage of the run without --task; its probes take their own defaults
STAGE_FLAGS = ("epochs", "batch_size", "accum", "blr", "lr", "min_lr", "weight_decay", "beta2", "warmup_epochs", "clip_grad",
               "optimizer", "rho", "adaptive", "base_optimizer", "augment", "init", "layer_decay", "ema", "mixup", "cutmix", "drop_path",
               "label_smoothing", "no_pairing", "fill", "single", "open_attention", "mask_per_cycle")
FREE_AT_RESUME = ("resume", "output_dir", "workers", "save_minutes", "data_path")  # may differ when resuming


# ---------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):  # recipes: several flags a line, # comments
        return shlex.split(line, comments=True)

    def error(self, message):
        fail(message)


def fail(message, every_rank=False):
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or every_rank:
        print(f"train.py: {f'[rank {rank}] ' if rank else ''}{message}; see --help", file=sys.stderr)
    sys.exit(2)


def parse(argv=None):
    """The flags that were given, as a dict; defaults come later, from DEFAULTS."""
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], fromfile_prefix_chars="@", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, epilog="@FILE reads flags from a file. Defaults: see DEFAULTS in train.py.")

    def flag(name, help, **kwargs):
        key = name[2:].replace("-", "_")
        known = {task: group[key] for task, group in DEFAULTS.items() if group.get(key) not in (None, False)}
        shown = ", ".join(str(value) if task == "all" else f"{task} {value}" for task, value in known.items())
        parser.add_argument(name, help=help + (f" (default {shown})" if shown else ""), **kwargs)

    switch = dict(action="store_true")
    flag("--task", "without it: pretrain, then probe", choices=("pretrain", "classify", "detect", "segment"))
    flag("--method", "pre-training objective; classify: mixmim builds ViTs without class token, as it pre-trains them", choices=("mae", "mirl", "mixmim"))
    flag("--model", "preset of vit.py, mixmim.py, mixer.py or resnet.py; without --task this also drops the small sizes of the default run")
    flag("--img-size", "one number or H W", type=int, nargs="+")
    for name in ("patch-size", "embed-dim", "depth", "num-heads"):
        flag(f"--{name}", "overrides the preset", type=int)
    flag("--window-size", "overrides the preset of mixmim.py, one per stage; a ViT with --global-blocks quarters or none: one number, default 14 tokens", type=int, nargs="+")
    flag("--pyramid", "detect, segment: maps after each quarter, four scales of the last map, or the last map alone", choices=("taps", "simple", "single"))
    flag("--global-blocks", "detect, segment: which blocks of a ViT see the whole map", choices=("quarters", "all", "none"))
    flag("--no-rel-pos", "detect: no relative position bias; segment has none but BEiT's", **switch)
    flag("--norm", "detect, segment: in neck and heads", choices=tuple(NORMS))
    flag("--heads", "detect, segment: small ones for a laptop, or the paper's", choices=("small", "full"))
    flag("--channels", "segment: width of the head; default 64, with --heads full 512", type=int)
    flag("--slide", "segment: evaluate by windows of so many pixels, at steps of so many; default the whole image", type=int, nargs=2)
    flag("--eval-flip", "segment: evaluate image and mirror image together", **switch)
    flag("--jitter", "detect, segment: range of scales; 0 0 for no augmentation at all (segment: shapes only); default none for shapes, detect 0.1 2, segment 0.5 2", type=float, nargs=2)
    flag("--class-agnostic", "detect: every object is of one class", **switch)
    flag("--eval-train", "detect, segment: evaluate on the training images; can it learn them by heart?", **switch)
    flag("--shift", "hierarchical encoder: shift every other block's windows, as Swin does", **switch)
    flag("--segments", "MIRL's K; default the largest of 6, 4, 2 that divides the depth", type=int)
    flag("--decoder-embed-dim", "default about two thirds of the encoder's width", type=int)
    flag("--decoder-depth", "blocks per decoder", type=int)
    flag("--decoder-num-heads", "default one per 32 channels", type=int)
    flag("--no-pairing", "MIRL, a contrast: every segment predicts the whole image", **switch)
    flag("--fill", "MixMIM: what stands in the holes; mask, a learnt symbol, is a contrast", choices=("mix", "mask"))
    flag("--single", "MixMIM, a contrast: reconstruct one image of each mixture", **switch)
    flag("--open-attention", "MixMIM, a contrast: attend across the two images", **switch)
    flag("--mask-per-cycle", "MixMIM: one mask per pair of images instead of one per batch", **switch)
    flag("--raw-pixels", "MAE, MixMIM: predict pixels, not normalised patches", **switch)
    flag("--checkpointing", "recompute activations: less memory, more time", **switch)
    flag("--data", "image set", choices=("shapes", "cifar10", "cifar100", "folder", "coco", "ade20k"))
    flag("--data-path", "where it lies")
    flag("--data-size", "shapes: training scenes", type=int)
    flag("--train-images", "use the first N of a fixed shuffle; with --dry-run just the epoch's size", type=int)
    flag("--val-images", "evaluate on the first N of a fixed shuffle", type=int)
    flag("--download", "let torchvision fetch CIFAR", **switch)
    flag("--skip-bad", "replace unreadable images instead of stopping", **switch)
    flag("--stats", "measure mean and std on the data instead of taking the set's own", **switch)
    flag("--augment", "default padcrop up to 64 px, mae (pretrain) or inception (classify) above", choices=AUGMENTATIONS)
    flag("--epochs", "passes over the training images", type=int)
    flag("--eval-every", "epochs between evaluations; the last epoch always has one", type=int)
    flag("--batch-size", "images per process and micro-batch", type=int)
    flag("--accum", "micro-batches per step", type=int)
    flag("--blr", "learning rate per 256 images of effective batch", type=float)
    flag("--lr", "the learning rate itself, instead of --blr", type=float)
    flag("--schedule", "how the learning rate falls after warm-up", choices=("cosine", "linear"))
    flag("--min-lr", "where it ends", type=float)
    flag("--weight-decay", "not on biases and norms", type=float)
    flag("--beta2", "AdamW's second beta", type=float)
    flag("--warmup-epochs", "linear warm-up; default 5 %% of the steps", type=float)
    flag("--clip-grad", "gradient norm; default off", type=float)
    flag("--mask-ratio", "share of patches hidden, in [0, 1); MixMIM: of the partner's, neither none nor all", type=float)
    flag("--optimizer", "sam climbs before each step, at twice the cost", choices=("adamw", "sgd", "sam"))
    flag("--rho", "SAM's radius; default 0.05, adaptive 0.5; see the README's table", type=float)
    flag("--adaptive", "SAM: a radius that scales with each weight (ASAM)", **switch)
    flag("--base-optimizer", "what SAM steps with", choices=("adamw", "sgd"))
    flag("--layer-decay", "learning rate factor per block, from the head down", type=float)
    flag("--drop-path", "stochastic depth of the last block", type=float)
    flag("--ema", "decay of the weight average that is evaluated; default off", type=float)
    flag("--label-smoothing", "classify", type=float)
    flag("--mixup", "alpha, 0 is off", type=float)
    flag("--cutmix", "alpha, 0 is off; with both, one of them per batch", type=float)
    flag("--pool", "what the classifier reads", choices=("mean", "cls"))
    flag("--loss", "classify; supcon: two views and a projection head instead of a classifier, to be judged with --probe", choices=("cross-entropy", "supcon"))
    flag("--adversarial", "classify: train on FGSM attacks from a random start", **switch)
    flag("--attack-eps", "how far --adversarial and --eval-pgd may move a pixel, in 255ths", type=float)
    flag("--eval-corruptions", "classify: at the end, accuracy on six kinds of corruption at five severities", **switch)
    flag("--eval-pgd", "classify: at the end, accuracy under ten steps of attack", **switch)
    flag("--probe", "freeze all but the head; the features are computed once, without augmentation", **switch)
    flag("--init", "checkpoint to start from: ours, MAE, timm, DeiT, MoCo v3, MIRL, MixMIM")
    flag("--seed", "", type=int)
    flag("--workers", "loading processes; default none on a CPU, up to 8 on a GPU", type=int)
    flag("--output-dir", "default a fresh folder under runs/")
    flag("--resume", "continue the run in --output-dir", **switch)
    flag("--save-minutes", "checkpoint at least this often, besides each epoch", type=float)
    flag("--compile", "torch.compile", **switch)
    flag("--precision", "auto: bf16 on CUDA of capability 8 and up, else fp32", choices=("auto", "fp32", "bf16"))
    flag("--device", "auto: cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"))
    flag("--dry-run", "print sizes and costs, train nothing, need no data", **switch)
    flag("--tflops", "device speed assumed by --dry-run", type=float)
    flag("--check", "print versions and test the installation", **switch)
    return vars(parser.parse_args(argv))


def resolve(given):
    """Given flags -> all flags, checked. ValueError in one sentence."""
    tour = given.get("task") is None  # pre-train, then probe
    if given.get("probe") and given.get("task") != "classify":
        raise ValueError("--probe goes with --task classify")
    stage = "tour" if tour else "probe" if given.get("probe") else given["task"]
    if tour and "model" in given:
        stage = "pretrain"  # somebody else's model: no sizes of ours
    by_method = DEFAULTS["mixmim"] if given.get("method") == "mixmim" else {}
    if stage == "tour" and by_method:
        stage = "tour mixmim"
    defaults = {**DEFAULTS["all"], **by_method, **DEFAULTS[stage]}
    if stage in ("detect", "segment") and "model" in given:
        defaults |= dict(img_size=None, patch_size=None)  # as its preset has them
    elif stage in ("detect", "segment") and by_method:
        defaults |= dict(patch_size=None)
    args = argparse.Namespace(**{**defaults, **given})
    args.task = args.task or "pretrain"
    if args.model not in {**VITS, **HIERARCHICAL, **MIXERS, **RESNETS}:
        raise ValueError(f"--model {args.model} is unknown; choose from {', '.join({**VITS, **HIERARCHICAL, **MIXERS, **RESNETS})}")
    hierarchical, mixer, resnet = (args.model in presets for presets in (HIERARCHICAL, MIXERS, RESNETS))
    idle = {"mixup": "--task classify", "cutmix": "--task classify", "label_smoothing": "--task classify",
            "layer_decay": "--task classify", "init": "--task classify", "loss": "--task classify", "adversarial": "--task classify",
            "eval_corruptions": "--task classify", "eval_pgd": "--task classify"} if args.task == "pretrain" else {}
    if args.probe:
        idle |= dict.fromkeys(("loss", "adversarial", "eval_corruptions", "eval_pgd"), "a whole model in training, not --probe,")
    if args.loss == "supcon":
        idle |= dict.fromkeys(("mixup", "cutmix", "label_smoothing", "adversarial", "eval_corruptions", "eval_pgd"), "--loss cross-entropy")
    if not (args.adversarial or args.eval_pgd):
        idle["attack_eps"] = "--adversarial or --eval-pgd"
    if args.method == "mirl":
        idle["raw_pixels"] = "--method mae or mixmim"
    dense = args.task in ("detect", "segment")
    if not dense:
        idle |= dict.fromkeys(("pyramid", "global_blocks", "norm", "heads", "jitter", "eval_train"), "--task detect or segment")
    else:
        if hierarchical or resnet:
            idle |= dict.fromkeys(("pyramid", "global_blocks", "no_rel_pos"), "a plain ViT")
        idle |= dict.fromkeys(("loss", "adversarial", "eval_corruptions", "eval_pgd", "mixup", "cutmix", "label_smoothing", "pool",
                               "augment", "stats", "skip_bad"), "--task classify")
        if resnet or not hierarchical and args.global_blocks == "all":
            idle["window_size"] = "a hierarchical --model or --global-blocks quarters or none"
    for task, keys in {"detect": ("no_rel_pos", "class_agnostic"), "segment": ("channels", "slide", "eval_flip")}.items():
        if args.task != task:
            idle |= dict.fromkeys(keys, f"--task {task}")
    if args.task != "pretrain" or args.method != "mixmim":
        idle |= dict.fromkeys(("fill", "single", "open_attention", "mask_per_cycle"), "--task pretrain --method mixmim")
    elif args.fill == "mask":
        idle |= dict.fromkeys(("single", "open_attention"), "--fill mix")
    if args.task != "pretrain" or args.method != "mirl":
        idle["no_pairing"] = "--task pretrain --method mirl"
    if args.eval_train:
        idle["val_images"] = "a validation set, not --eval-train,"
    if args.optimizer != "sam":
        idle |= dict.fromkeys(("rho", "adaptive", "base_optimizer"), "--optimizer sam")
    if hierarchical:
        idle |= dict.fromkeys(("depth", "num_heads", "pool"), "a plain ViT")
    else:
        idle |= dict.fromkeys(("shift",) if dense else ("window_size", "shift"), f"a hierarchical --model ({', '.join(HIERARCHICAL)})")
    if mixer or resnet:
        idle |= dict.fromkeys(("num_heads", "pool", "checkpointing"), "a ViT")
    if resnet:
        idle |= dict.fromkeys(("patch_size", "embed_dim", "depth", "drop_path", "layer_decay"), "a ViT or a Mixer")
    for key, place in idle.items():  # nothing that was asked for is silently ignored
        if key in given and given[key] not in (DEFAULTS["all"][key], defaults[key]):
            raise ValueError(f"--{key.replace('_', '-')} acts with {place} only; drop it")
    for key in ("batch_size", "accum", "epochs", "eval_every", "data_size", "patch_size", "embed_dim", "depth", "num_heads", "segments", "decoder_depth",
                "decoder_embed_dim", "decoder_num_heads", "train_images", "val_images", "channels"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    if args.optimizer == "sam" and args.rho is None:
        args.rho = 0.5 if args.adaptive else 0.05
    for key in ("lr", "blr", "rho", "min_lr", "weight_decay", "warmup_epochs", "workers", "seed", "label_smoothing", "mixup", "cutmix",
                "save_minutes", "drop_path", "beta2"):
        if getattr(args, key) is not None and not 0 <= getattr(args, key) < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be a number from 0 up")
    for key in ("clip_grad", "ema", "layer_decay", "tflops", "attack_eps"):
        if getattr(args, key) is not None and not 0 < getattr(args, key) < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be positive")
    for key in ("drop_path", "label_smoothing", "ema", "beta2"):
        if getattr(args, key) is not None and getattr(args, key) >= 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be below 1")

    if args.seed >= 2**32:
        raise ValueError(f"--seed {args.seed} must be below 2**32")
    if args.probe and (args.mixup or args.cutmix):
        raise ValueError("--mixup and --cutmix mix images, but --probe trains on features computed once; drop them")
    if args.method == "mixmim" and not hierarchical and args.pool == "cls":
        raise ValueError("--pool cls needs a class token, which --method mixmim does without; drop one of them")
    if args.window_size is not None and min(args.window_size) < 1:
        raise ValueError(f"--window-size {args.window_size} must be at least 1")
    if args.loss == "supcon" and args.batch_size < 2:
        raise ValueError(f"--batch-size {args.batch_size} leaves --loss supcon nothing to compare; use at least 2")
    if args.loss == "supcon" and args.augment == "none":
        raise ValueError("--augment none makes both views of --loss supcon the same image; take padcrop or inception")
    if args.attack_eps > 255:
        raise ValueError(f"--attack-eps {args.attack_eps:g} is in 255ths of the range of a pixel and must be at most 255; try 4")
    if args.adversarial and args.augment == "strong":
        raise ValueError("--augment strong erases with noise beyond the range of a pixel, within which --adversarial moves; take --augment inception")
    if args.task == "pretrain" and (mixer or resnet):
        raise ValueError(f"--model {args.model} has no tokens to leave out and cannot be pre-trained by --method {args.method}; it goes with --task classify")
    if args.task == "pretrain" and hierarchical and args.method != "mixmim":
        raise ValueError(f"--method {args.method} drops tokens, which windows do not allow: --model {args.model} goes with --method mixmim, "
                         f"--method {args.method} with a plain ViT")
    if args.task == "pretrain" and args.method == "mixmim" and args.fill == "mix" and args.batch_size < 2:
        raise ValueError(f"--batch-size {args.batch_size} leaves MixMIM nothing to mix; use at least 2")
    if dense:
        check_dense(args, mixer)
    elif args.data in ("coco", "ade20k"):
        raise ValueError(f"--data {args.data} has not one label an image; it goes with --task {'detect or segment' if args.data == 'coco' else 'segment'}")
    if args.img_size is not None and not 1 <= len(args.img_size) <= 2:
        raise ValueError(f"--img-size takes one number or H W, got {args.img_size}")
    with torch.device("meta"):  # no weights are made; the model's own checks run, and its sizes become the flags
        encoder = build_encoder(args)
    args.img_size = list(encoder.img_size)
    if not resnet:
        args.patch_size, args.embed_dim = encoder.patch_size, encoder.embed_dim
        args.mask_patch_size = encoder.stride  # pixels of what is hidden and predicted
    if not hierarchical and not resnet:
        args.depth = len(encoder.blocks)
    if not hierarchical and not resnet and not mixer:
        args.num_heads = encoder.num_heads
    if args.task == "pretrain":
        places = math.prod(side // encoder.stride for side in encoder.img_size)
        if args.method == "mixmim":
            mix_mask(torch.zeros(places, device="cpu"), args.mask_ratio)
        else:
            num_visible(places, args.mask_ratio)
        if args.decoder_embed_dim is None:
            args.decoder_embed_dim = max(32, round(encoder.num_features * 2 / 3 / 32) * 32)
        if args.decoder_num_heads is None:
            args.decoder_num_heads = max(1, args.decoder_embed_dim // 32)
        if args.method == "mirl" and args.segments is None:
            args.segments = next((k for k in (6, 4, 2) if args.depth % k == 0), 2)
    if args.augment is None and not dense:
        args.augment = "padcrop" if max(args.img_size) <= 64 else "mae" if args.task == "pretrain" else "inception"
    return args


def check_dense(args, mixer):
    """Detection and segmentation."""
    detecting = args.task == "detect"
    if mixer:
        raise ValueError(f"--model {args.model} takes one image size and has no map of places; choose a ViT, a hierarchical one or a ResNet")
    if args.data not in (known := ("shapes", "coco") if detecting else ("shapes", "coco", "ade20k")):
        raise ValueError(f"--data {args.data} has no {'boxes' if detecting else 'label for every pixel'}; --task {args.task} takes {' or '.join(known)}")
    if detecting and args.img_size is not None and len(set(args.img_size)) != 1:
        raise ValueError(f"--img-size {args.img_size} must be one number for --task detect: images are padded to a square")
    if args.window_size is not None and is_vit(args) and len(args.window_size) != 1:
        raise ValueError(f"--window-size {args.window_size} must be one number for a plain ViT in --task {args.task}")
    if not detecting and args.norm == "batch" and args.batch_size == 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ValueError("--batch-size 1 leaves --norm batch nothing to average over in the coarsest pooled map; take --norm group or at least 2")
    if not detecting and args.jitter == [0, 0] and args.data != "shapes":
        raise ValueError("--jitter 0 0 leaves images of different sizes, which do not stack; take --jitter 1 1 for crops without rescaling")
    if args.slide is not None and not 1 <= args.slide[1] <= args.slide[0]:
        raise ValueError(f"--slide {args.slide[0]} {args.slide[1]} must be window and step with 1 <= step <= window, such as 512 341")
    if args.channels is None and not detecting:
        args.channels = 64 if args.heads == "small" else 512
    if args.jitter is None and args.data != "shapes":
        args.jitter = [0.1, 2.0] if detecting else [0.5, 2.0]
    if args.jitter not in (None, [0, 0]) and not 0 < args.jitter[0] <= args.jitter[1] < math.inf:
        raise ValueError(f"--jitter {args.jitter} must be two positive numbers, the smaller first, such as 0.5 2")


# ---------------------------------------------------------------------------- models


FULL_HEADS = dict(rpn_post_nms_top_n_train=1000)  # all else as vit_mask_rcnn has it
SCENES = {"shapes": ShapeScenes, "coco": CocoImages}
SMALL_HEADS = dict(channels=64, rpn_convs=1, box_convs=1, box_dim=256, mask_convs=2, rpn_batch_size_per_image=64,
                   rpn_pre_nms_top_n_train=1000, rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_train=300, rpn_post_nms_top_n_test=100,
                   box_batch_size_per_image=32)


def is_vit(args):
    return not any(args.model in presets for presets in (HIERARCHICAL, MIXERS, RESNETS))


def build_encoder(args, **more):
    """The encoder of the flags; more: what the file of --init asks for (encoder_options)."""
    names = ["patch_size", "embed_dim", "depth", "num_heads", "window_size"]
    if args.task in ("detect", "segment") and is_vit(args):
        names.remove("window_size")  # the pyramid's, not the ViT's
    sizes = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    if args.img_size is not None:
        sizes["img_size"] = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    shared = dict(num_classes=0, drop_path=args.drop_path, checkpointing=args.checkpointing, **sizes)
    if args.model in HIERARCHICAL:
        return create_mixmim(args.model, shift=args.shift, **shared)
    if args.model in MIXERS:
        del shared["checkpointing"]
        return create_mixer(args.model, **shared)
    if args.model in RESNETS:
        return create_resnet(args.model, num_classes=0, **{key: sizes[key] for key in sizes if key == "img_size"})
    # a ViT pre-trained by MixMIM never had a class token
    return create_vit(args.model, **{**shared, "pool": args.pool, "pos_embed": "sincos", "class_token": args.method != "mixmim", **more})


def check_origin(args, file):
    """What no tensor shows, and our own checkpoints tell: ValueError if --init was trained with another network."""
    theirs = file.get("args")
    if not isinstance(theirs, dict):
        return
    if args.model in HIERARCHICAL and theirs.get("shift", False) != args.shift:
        raise ValueError(f"--init {args.init} was trained {'without' if args.shift else 'with'} --shift; {'drop' if args.shift else 'add'} it")
    if is_vit(args) and (theirs.get("method") == "mixmim") != (args.method == "mixmim"):
        raise ValueError(f"--init {args.init} was pre-trained by {theirs.get('method')}, and --method {args.method} builds a ViT with"
                         f"{'out' if args.method == 'mixmim' else ''} class token; give --model, --method {theirs.get('method')} and the sizes of that run")


def init_options(args, file):
    """How the ViT for a file must be built (encoder_options). ValueError where the flags say otherwise."""
    if not is_vit(args):
        return {}
    options, dense = encoder_options(file), args.task in ("detect", "segment")
    if options.get("patch_size", args.patch_size) != args.patch_size:
        raise ValueError(f"--init {args.init} has patches of {options['patch_size']} pixels, the model of {args.patch_size}; add --patch-size "
                         f"{options['patch_size']}")
    bias = options.get("rel_pos_bias")
    if bias and (args.method == "mixmim" or args.no_rel_pos):
        raise ValueError(f"--init {args.init} has a relative position bias, which {'--no-rel-pos' if args.no_rel_pos else '--method mixmim'} has no place "
                         "for; drop that flag")
    if bias == "block" and dense:
        raise ValueError(f"--init {args.init} is a fine-tuned BEiT with a bias in every block, but --task {args.task} shares one; take the pre-trained file")
    if not dense:  # a pyramid resizes the tables itself, and says so
        options.pop("img_size", None)
    return options


def build_model(args, num_classes, main_rank=False, resumed=False):
    """The pre-training model, or the classifier. The encoder is drawn first: the same seed, the same encoder. resumed: weights come later."""
    file = read_checkpoint(args.init) if args.init and not resumed else {}
    if file:
        args.init_options = init_options(args, file)  # kept with the flags: to resume, the file is not needed again
    encoder = build_encoder(args, **getattr(args, "init_options", {}))
    if file:
        check_origin(args, file)
        load_pretrained(encoder, file, verbose=main_rank, name=args.init)
    if args.task == "pretrain":
        decoder = dict(decoder_embed_dim=args.decoder_embed_dim, decoder_depth=args.decoder_depth,
                       decoder_num_heads=args.decoder_num_heads)
        if args.method == "mirl":
            return MIRL(encoder, args.segments, pairing=not args.no_pairing, **decoder)
        if args.method == "mixmim":
            return MixMIM(encoder, norm_pix_loss=not args.raw_pixels, mask_per_cycle=args.mask_per_cycle, fill=args.fill,
                          dual=not args.single, masked_attention=not args.open_attention, **decoder)
        return MAE(encoder, norm_pix_loss=not args.raw_pixels, **decoder)
    if is_vit(args) and encoder.pos_embed is not None:  # BEiT has none
        encoder.pos_embed.requires_grad_(True)
    if args.task == "detect":
        return build_detector(encoder, args, num_classes)
    if args.task == "segment":
        return UperNet(encoder, num_classes, args.channels, min(256, args.channels), args.norm, window_size=(args.window_size or [14])[0],
                       global_blocks=args.global_blocks, pyramid=args.pyramid, checkpointing=args.checkpointing, img_size=tuple(args.img_size))
    if args.loss == "supcon":
        return SupCon(encoder)
    encoder.reset_classifier(num_classes)
    if args.probe:
        encoder.requires_grad_(False)
        # MAE's probe: the parameter-free normalisation makes one learning rate fit features of any scale
        head = nn.Linear(encoder.num_features, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        encoder.head = nn.Sequential(nn.BatchNorm1d(encoder.num_features, affine=False, eps=1e-6), head)
    elif args.init:
        nn.init.trunc_normal_(encoder.head.weight, std=2e-5)  # as MAE: start from the features, not from noise
    return encoder


def build_detector(encoder, args, num_classes):
    """Mask R-CNN around it. Anchors and the scale of regions follow the image; 1024 pixels are the paper's."""
    size, small, data = args.img_size[0], args.heads == "small", SCENES[args.data]
    heads = SMALL_HEADS if small else FULL_HEADS
    shapes = small and args.data == "shapes"  # as wide as high: two sizes serve better than three ratios
    if shapes:
        heads = {**heads, "aspect_ratios": (1.0,)}
    if is_vit(args) and not args.init:
        init_as_beit(encoder)
    if args.pyramid != "single":
        levels = 1 + len(getattr(encoder, "depths", range(4)))
        sides = [max(4, size * 2**k // 32) for k in range(levels)]
        heads = {**heads, "anchor_sizes": [(side, round(side * 2**0.5)) if shapes else (side,) for side in sides]}
    return vit_mask_rcnn(encoder, num_classes, size, (args.window_size or [14])[0], args.global_blocks, args.pyramid, not args.no_rel_pos,
                         args.checkpointing, args.norm, canonical_scale=size * 7 // 8 if small else 224, image_mean=data.mean, image_std=data.std,
                         **heads)


def layer_number(name, depths):
    """0 the embedding, 1 .. the blocks, then norm and head; a merging goes with the block it leads to. depths: per stage."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "stem")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith("layers."):  # layers.STAGE.blocks.BLOCK.* or layers.STAGE.downsample.*
        stage, part, block = name.split(".")[1:4]
        return sum(depths[:int(stage)]) + int(block) + 1 if part == "blocks" else sum(depths[:int(stage) + 1]) + 1
    return sum(depths) + 1


def param_groups(model, args):
    """Groups with weight_decay and lr_scale: no decay on 1-D tensors, nor on a pyramid's position tables; one group per block and kind."""
    groups, depths = {}, next((module.depths for module in model.modules() if hasattr(module, "depths")), [args.depth or 0])
    for name, param in model.named_parameters():
        name = re.sub(r"^(backbone\.)?(pyramid\.)?(encoder\.|vit\.)?", "", name)
        if not param.requires_grad:
            continue
        # pre-training decays class and mask tokens as the official codes do; fine-tuning spares token and table
        spare = param.ndim <= 1 or name.endswith(".bias") or (args.task == "classify" and name in ("cls_token", "pos_embed"))
        spare |= args.task in ("detect", "segment") and name.endswith(("pos_embed", "relative_position_bias_table"))
        scale = args.layer_decay ** (sum(depths) + 1 - layer_number(name, depths))
        key = (spare, scale)
        groups.setdefault(key, dict(params=[], weight_decay=0.0 if spare else args.weight_decay, lr_scale=scale))
        groups[key]["params"].append(param)
    return list(groups.values())


def build_optimizer(model, args):
    groups = param_groups(model, args)
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    kinds = {"sgd": (torch.optim.SGD, dict(lr=0.0, momentum=0.9)),
             "adamw": (torch.optim.AdamW, dict(lr=0.0, betas=(0.9, args.beta2), fused=fused))}
    if args.optimizer == "sam":
        base, options = kinds[args.base_optimizer]
        return SAM(groups, base, rho=args.rho, adaptive=args.adaptive, **options)
    kind, options = kinds[args.optimizer]
    return kind(groups, **options)


def lr_at(step, total, warmup, lr, min_lr, schedule="cosine"):
    """Linear warm-up, then half a cosine, or a straight line, down to min_lr."""
    if step < warmup:
        return lr * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + (lr - min_lr) * left


class Plan(NamedTuple):
    batch_size: int  # per process and micro-batch
    effective: int  # images per step
    steps_per_epoch: int
    total_steps: int
    lr: float
    warmup: float  # steps


def plan_steps(args, num_images, world_size):
    """How a set of images becomes steps. ValueError where an epoch would be empty."""
    batch_size = args.batch_size
    if args.probe:  # its default batch may be larger than a small set
        batch_size = min(batch_size, max(1, num_images // world_size))
    batches = num_images // (batch_size * world_size)
    if batches == 0:
        raise ValueError(f"--batch-size {batch_size} x {world_size} processes is larger than the {num_images} training images; use at "
                         f"most {num_images // world_size}")
    if args.accum > batches:
        raise ValueError(f"--accum {args.accum} is larger than the {batches} batches of an epoch")
    steps = math.ceil(batches / args.accum)
    effective = batch_size * args.accum * world_size
    lr = args.lr if args.lr is not None else args.blr * effective / 256
    warmup = (0.05 * args.epochs if args.warmup_epochs is None else args.warmup_epochs) * steps
    return Plan(batch_size, effective, steps, args.epochs * steps, lr, warmup)


def mask_noise(noise, args):
    """The noise of a batch, a row per image -> what the objective takes: MixMIM has one mask for all images."""
    return noise[0] if args.method == "mixmim" and not args.mask_per_cycle else noise


def make_objective(model, args, bare=None, mean=0.0, std=1.0):
    """(images, labels, noise) -> scalar loss; the only place where the tasks differ during a step.

    bare  the model without its wrappers, for attacks; mean, std: how images are normalised
    """
    if args.task == "pretrain":
        return lambda images, labels, noise: model(images, args.mask_ratio, mask_noise(noise, args)).loss
    if args.task == "detect":
        return lambda images, targets: sum(model(images, targets).values())
    if args.task == "segment":
        # a mean over the labelled pixels of this process's micro-batch: means of means, where those counts differ
        return lambda images, labels: model(images, labels).loss
    if args.loss == "supcon":
        return lambda views, labels, noise: model(views, labels).loss  # each process contrasts within its own images
    mixes = [make(alpha=alpha, num_classes=args.num_classes) for make, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    mix = v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)

    def objective(images, labels, noise):
        images, labels = mix(images, labels)
        if args.adversarial:
            with batchnorm_held(bare):  # its statistics are those of the images trained on
                images = fgsm(bare, images, labels, args.attack_eps / 255, mean=mean, std=std)
        return F.cross_entropy(model(images).float(), labels, label_smoothing=args.label_smoothing)

    return objective


# ---------------------------------------------------------------------------- several processes


class World:
    """Device and ranks; one path for one process and for torchrun."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        kind = device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if kind in available and not available[kind]():
            raise ValueError(f"--device {kind} is not available here; try --device cpu")
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.grouped = self.size > 1 and not dist.is_initialized()
        if self.grouped:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    def sum(self, numbers):
        """Add up a list of numbers over all ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """Every rank's (picklable) value, as a list."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def share(self, tensors):
        """Rank 0's values for all."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))

    def close(self):
        if self.grouped:
            dist.destroy_process_group()


# ---------------------------------------------------------------------------- evaluation, pictures, checkpoints


def to_device(batch, device):
    """Tensors, also those in lists and dicts."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, (list, tuple)) else batch


def evaluate_detection(model, loader, scenes, world, autocast):
    """box_ap, box_ap50, mask_ap, mask_ap50, proposal_recall in percent. scenes: the Detections that the loader reads"""
    source = scenes.source
    with autocast:
        result = coco_evaluate(model, loader, source.truth(), source.ids, world.device, world.rank == 0, [source.image_ids[i] for i in scenes.indices])
    wanted = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "proposal_recall")
    return {key: 100 * result[key] if result.get(key, -1) >= 0 else math.nan for key in wanted}  # -1 or absent: there was nothing to find


def evaluate_segmentation(model, loader, classes, args, world, autocast):
    """miou and pixel_acc in percent."""
    window, stride = args.slide or (None, None)
    with autocast:
        result = segment_evaluate(model, loader, len(classes), world.device, window, stride, args.eval_flip, world.rank == 0)
    return {key: 100 * result[key] for key in ("miou", "pixel_acc")}


@torch.no_grad()
def save_segmentations(path, model, data, args, device, shown=6):
    """Image, truth and prediction of images from all over a set."""
    model.eval()
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.source.mean, data.source.std))
    some = [data[0, i] for i in torch.linspace(0, len(data) - 1, min(shown, len(data))).long().tolist()]
    window, stride = args.slide or (None, None)
    found = [predict(model, image[None].to(device), labels.shape, window, stride, args.eval_flip)[0].cpu() for image, labels in some]
    save_segments(path, [(image * std + mean).clamp(0, 1) for image, _ in some], [labels for _, labels in some], found, data.source.classes)
    model.train()


@torch.no_grad()
def save_detections(path, model, data, device, shown=6, sure=0.5):
    """Truth beside what was found with a score above `sure`: boxes and masks."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    def draw(image, boxes, masks, names, colour):
        colours = list(itertools.islice(itertools.cycle(("red", "lime", "blue", "orange", "magenta", "cyan")), len(masks)))  # the library's first is black
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colours) if len(masks) else image
        return draw_bounding_boxes(image, boxes, names, colors=colour, width=1) if len(boxes) else image

    model.eval()
    side, columns = max(data[0, 0][0].shape[-2:]), {"truth": [], f"found, score above {sure:g}": []}
    names = ["", *data.source.classes]
    for i in torch.linspace(0, len(data) - 1, min(shown, len(data))).long().tolist():
        image, target = data[0, i]
        out = {key: value.cpu() for key, value in model([image.to(device)])[0].items()}
        keep = out["scores"] > sure
        for column, boxes, labels, masks, colour in (("truth", target["boxes"], target["labels"], target["masks"].bool(), "white"), (
                f"found, score above {sure:g}", out["boxes"][keep], out["labels"][keep], out["masks"][keep, 0] > 0.5, "yellow")):
            picture = draw(image, boxes, masks, [names[label] for label in labels.tolist()], colour)
            side = max(side, *picture.shape[-2:])
            columns[column].append(picture)
    square = {name: torch.stack([F.pad(p, (0, side - p.shape[-1], 0, side - p.shape[-2])) for p in column]) for name, column in columns.items()}
    save_grid(path, square, cell=max(128, min(side, 320)))
    model.train()


@torch.no_grad()
def evaluate(model, loader, args, world, autocast):
    """val_loss, and val_acc in percent: every sample counts once, however many processes."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels, noise in loader:
        images, labels, noise = (t.to(world.device, non_blocking=True) for t in (images, labels, noise))
        with autocast:
            if args.task == "pretrain":
                loss += model(images, args.mask_ratio, mask_noise(noise, args)).loss.item() * len(images)
            elif args.loss == "supcon":
                loss += model(images[:, None], labels).loss.item() * len(images)  # one view: the positives are others of the class
            else:
                logits = model(images).float()
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                correct += (logits.argmax(dim=1) == labels).sum().item()
        count += len(images)
    model.train()
    loss, correct, count = world.sum([loss, correct, count])
    result = {"val_loss": loss / count}
    return result if args.task == "pretrain" or args.loss == "supcon" else {**result, "val_acc": 100 * correct / count}


def evaluate_robustness(model, loader, args, world, autocast, mean, std):
    """corrupted_acc and pgd_acc in percent, where asked for. The random numbers begin anew with each batch of the loader."""
    model.eval()
    right, count, pixels = {}, 0, dict(mean=mean, std=std)
    for images, labels, _ in tqdm(loader, desc="robustness", leave=False, disable=None if world.rank == 0 else True):
        images, labels = images.to(world.device), labels.to(world.device)
        found = {}
        with autocast:
            if args.eval_corruptions:
                table = corruption_accuracy(model, images, labels, batch_size=len(images), seed=args.seed, **pixels)
                found = {"corrupted_acc": mean_accuracy(table), **{f"corrupted_acc_{name}": mean_accuracy({name: row}) for name, row in table.items()}}
            if args.eval_pgd:
                generator = torch.Generator().manual_seed(args.seed)
                attacked = pgd(model, images, labels, args.attack_eps / 255, generator=generator, **pixels)
                with torch.no_grad():
                    found["pgd_acc"] = (model(attacked).argmax(dim=1) == labels).float().mean().item()
        right = {key: right.get(key, 0.0) + share * len(images) for key, share in found.items()}
        count += len(images)
    model.train()
    keys = world.gather(list(right))[0]  # a rank may have had no images
    *sums, count = world.sum([right.get(key, 0.0) for key in keys] + [count])
    return {key: 100 * value / count for key, value in zip(keys, sums, strict=True)}


@torch.no_grad()
def probe_features(encoder, images, args, world, autocast, workers):
    """Pooled features of a whole set, once: each rank computes its share, all get all. (n, D), (n,)"""
    encoder.eval()
    head, encoder.head = encoder.head, nn.Identity()
    parts = []
    loader = make_loader(images, EvalBatches(len(images), args.batch_size, world.rank, world.size), workers, world.device)
    for batch, labels, _ in tqdm(loader, desc="features", leave=False, disable=None if world.rank == 0 else True):
        with autocast:
            parts.append((encoder(batch.to(world.device)).float().cpu(), labels))
    encoder.head = head
    mine = [torch.cat(column) for column in zip(*parts)] if parts else [torch.empty(0, encoder.num_features), torch.empty(0, dtype=torch.long)]
    features, labels = torch.empty(len(images), encoder.num_features), torch.empty(len(images), dtype=torch.long)
    for rank, (some, these) in enumerate(world.gather(mine)):
        features[rank::world.size], labels[rank::world.size] = some, these
    return Features(features, labels)


class Features(torch.utils.data.Dataset):
    """Cached features in the form of Images: (epoch, index) -> (feature, label, noise)."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        return self.features[key[1]], self.labels[key[1]], torch.empty(0)


@torch.no_grad()
def save_pictures(path, model, data, args, mean, std, device, shown=6, behind=8):
    """Reconstructions of images from all over a set; the captions say which pixels are true.

    Of shown x behind images every `behind`-th is drawn; all serve to centre MIRL's residual.
    """
    model.eval()
    count = min(len(data), shown * behind)
    some = [data[0, int(i)] for i in torch.linspace(0, len(data) - 1, count)]
    images, noise = (torch.stack([sample[k] for sample in some]).to(device) for k in (0, 2))
    noise, patch = mask_noise(noise, args), args.mask_patch_size
    out = model(images, args.mask_ratio, noise)
    mean, std = (torch.tensor(s, device=images.device).view(-1, 1, 1) for s in (mean, std))
    grey = (0.5 - mean) / std

    def hidden_only(pictures):  # predictions at visible patches are not trained: grey
        return paste(pictures, grey, 1 - out.mask, patch)

    columns = {"input: all true pixels": images, "model's view: true pixels, grey hidden": paste(images, grey, out.mask, patch)}
    if args.method == "mixmim" and args.fill == "mix":
        b = out.partner
        columns = {"image A: all true pixels": images, "image B, its partner: all true pixels": images[b],
                   "mixture, the model's view": paste(images, images[b], out.mask, patch)}
    if args.method == "mirl" and not model.pairing:
        first, *_, whole = model.reconstruct(images, args.mask_ratio, noise)
        columns["first segment: no true pixels"], columns["last segment: no true pixels"] = hidden_only(first), hidden_only(whole)
    elif args.method == "mirl":
        main, residual, whole = model.reconstruct(images, args.mask_ratio, noise, center=True)[0]
        columns["main, first segment: no true pixels"] = hidden_only(main)
        columns["residual, last segment: grey is zero"] = hidden_only(residual + grey)
        columns["sum of both: no true pixels"] = hidden_only(whole)
    else:
        whole = model.reconstruct(images, args.mask_ratio, noise)
        if args.method == "mixmim" and model.dual:
            columns["A': prediction, no true pixels"], columns["B': prediction, no true pixels"] = whole, whole[b]
        else:
            columns["prediction: no true pixels"] = hidden_only(whole)
    columns["true where visible, else predicted"] = paste(images, whole, out.mask, patch)
    every = max(1, count // shown)
    save_grid(path, {name: (column * std + mean)[::every][:shown].clamp(0, 1).cpu() for name, column in columns.items()})
    model.train()


def save_checkpoint(path, state):
    """Write beside, then rename: a full disk or a kill leaves the previous checkpoint whole."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"train.py: cannot save {path} ({str(error).splitlines()[0]}); the previous checkpoint is untouched, "
                         "free some space and continue with --resume") from None


def ema_update(decay):
    """Weight average whose window grows with the run, min(decay, (1 + s) / (10 + s)), as MIRL fine-tunes."""
    def update(averaged, current, step):
        d = min(decay, (1 + int(step)) / (10 + int(step)))
        torch._foreach_lerp_(averaged, current, 1 - d)
    return update


# ---------------------------------------------------------------------------- the run


def open_scenes(args, train):
    """The training or validation scenes of --task detect and segment."""
    if args.task == "detect":
        need_pycocotools()  # now, not after the first epoch
    if args.task == "segment":
        return open_semantic(args.data, args.data_path, train, tuple(args.img_size), args.data_size)
    if args.data == "shapes":
        return ShapeScenes(args.data_size if train else max(1, args.data_size // 4), args.img_size[0], train=train, class_agnostic=args.class_agnostic)
    if args.data_path is None:
        raise ValueError("data 'coco' needs --data-path")
    return CocoImages(args.data_path, "train2017" if train else "val2017", args.class_agnostic)


def run(args, world, folder, stop, command, home=None):
    """One task from start (or checkpoint) to end. Returns the last epoch's log line, with `baseline` where it applies.

    command  the --task that was given, for args.json; home  the folder to name in a --resume hint
    """
    say, device = world.say, world.device
    checkpoint_path, main_rank = folder / "checkpoint.pt", world.rank == 0
    saved = read_checkpoint(checkpoint_path) if args.resume and checkpoint_path.exists() else None

    # data
    data = dict(name=args.data, path=args.data_path, img_size=tuple(args.img_size), size=args.data_size, download=args.download,
                skip_bad=args.skip_bad)
    if args.download and world.rank != 0:
        world.gather(None)  # rank 0 downloads first
        data["download"] = False
    detecting, segmenting = args.task == "detect", args.task == "segment"
    dense = detecting or segmenting
    source = open_scenes(args, train=True) if dense else open_source(train=True, **data)
    if args.download and world.rank == 0:
        world.gather(None)
    try:
        val_source = source if args.eval_train else open_scenes(args, train=False) if dense else open_source(train=False, **data)
    except ValueError as error:
        if args.task != "pretrain":
            raise
        val_source = None  # unlabelled sets often have no second half
        say(f"no validation set: {error}")
    if val_source is not None and args.task != "pretrain" and list(val_source.classes) != list(source.classes):
        raise ValueError(f"the classes of train and val differ: {len(source.classes)} against {len(val_source.classes)}, or other names")
    mixing = args.task == "pretrain" and args.method == "mixmim" and args.fill == "mix"
    comparing = mixing or args.loss == "supcon"
    indices = list(range(len(source))) if args.train_images is None else first_of_shuffle(len(source), args.train_images)
    val_indices = None if val_source is None else list(range(len(val_source)))
    if args.eval_train:
        val_indices = indices
    elif args.val_images is not None and val_indices is not None:
        val_indices = first_of_shuffle(len(val_source), args.val_images, "val-images")
    elif args.loss == "supcon" and val_indices is not None:  # folders come sorted by class, but supcon compares within a batch
        val_indices = first_of_shuffle(len(val_source), len(val_source))
    if comparing and val_source is not None and len(val_indices) < 2 * world.size:
        raise ValueError(f"the validation set has {len(val_indices)} images for {world.size} processes, but each needs two, to mix or compare them; "
                         "add images" + (" or leave the set out" if mixing else ""))
    for some, wanted in ((source, indices), (val_source, val_indices)):
        if isinstance(some, Folder):
            some.cache(wanted, progress=main_rank)
        getattr(some, "images", None)  # shapes: draw a small set now, once, before loading processes copy it
    mean, std = channel_statistics(source) if args.stats else (source.mean, source.std)
    # of detection and segmentation
    scales = None if args.jitter in (None, [0, 0]) else args.jitter
    if detecting:
        fill = [round(255 * value) for value in mean]  # what becomes zero by normalisation, with which the detector pads too
        jitter = scales and large_scale_jitter(args.img_size[0], fill, scales)
        train_set, val_set = Detections(source, jitter, args.seed, indices), Detections(val_source, indices=val_indices)
    elif segmenting:
        size = tuple(args.img_size)
        train_set = Segmentations(source, size, scales is not None, seed=args.seed, indices=indices, scale_range=scales or (1.0, 1.0))
        val_set = Segmentations(val_source, size, False, indices=val_indices)
    else:
        noise_size = math.prod(side // args.mask_patch_size for side in args.img_size) if args.task == "pretrain" else 0
        train_set = Images(source, augmentation(args.augment, args.img_size, mean, std), args.seed, indices, noise_size,
                           views=2 if args.loss == "supcon" else 1)
        plain = augmentation("none", args.img_size, mean, std)
        val_set = None if val_source is None else Images(val_source, plain, args.seed, val_indices, noise_size)
    workers = args.workers if args.workers is not None else min(8, os.cpu_count() or 1) if device.type == "cuda" else 0

    # model
    torch.manual_seed(args.seed)
    args.num_classes = len(source.classes)
    # a probe needs its frozen encoder at once
    model = build_model(args, args.num_classes, main_rank, resumed=saved is not None and not args.probe).to(device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if dense and world.size > 1 and device.type == "cuda":  # two images a process are too few for BatchNorm
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    learner = model
    if args.probe:  # the encoder is frozen, so its features never change: compute them once, train the head on them
        train_set = probe_features(model, Images(source, plain, args.seed, indices), args, world, autocast, workers)
        val_set = probe_features(model, val_set, args, world, autocast, workers)
        # BatchNorm with the statistics of the whole training set, the same on every rank, applied once
        model.head[0].running_mean.copy_(train_set.features.mean(dim=0))
        model.head[0].running_var.copy_(train_set.features.var(dim=0))
        for some in (train_set, val_set):
            some.features = model.head[0].eval().cpu()(some.features)
        model.head[0].to(device)
        learner, workers = model.head[1], 0
    plan = plan_steps(args, len(train_set), world.size)
    train_batches = TrainBatches(len(train_set), plan.batch_size, args.seed, world.rank, world.size)
    loader = make_loader(train_set, train_batches, workers, device, as_lists if detecting else None)
    val_loader = None
    if val_set is not None:
        smallest = 2 if comparing else 1  # who is mixed or compared needs a partner
        val_batches = EvalBatches(len(val_set), plan.batch_size, world.rank, world.size, smallest)
        lists = detecting or (segmenting and args.data != "shapes")  # of different sizes
        val_loader = make_loader(val_set, val_batches, workers, device, as_lists if lists else None)
    ema = AveragedModel(learner, multi_avg_fn=ema_update(args.ema)) if args.ema else None
    wrapped = torch.compile(learner) if args.compile else learner
    if world.size > 1:
        wrapped = DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == "cuda" else None)
    objective = make_objective(wrapped, args, learner, mean, std)

    # optimizer and schedule
    optimizer, sam = build_optimizer(learner, args), args.optimizer == "sam"
    steps_per_epoch, total_steps, lr, warmup = plan.steps_per_epoch, plan.total_steps, plan.lr, plan.warmup

    trainable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    say(f"{'probe' if args.probe else args.task}{' by ' + args.method if args.task == 'pretrain' else ''}: {args.model} on {args.data}, "
        f"{len(train_set)} images; {device.type} x {world.size}, {'bf16' if bf16 else 'fp32'}")
    say(f"  parameters {sum(p.numel() for p in model.parameters()):,}, trainable {trainable:,}; effective batch {plan.effective} "
        f"({plan.batch_size} x accum {args.accum} x {world.size} processes); base lr {args.blr:g} per 256, actual lr {lr:.3g}; "
        f"steps {total_steps} ({steps_per_epoch} an epoch)")
    baseline = None
    if args.task == "pretrain":
        looked_at = val_set or train_set  # for the baseline and the pictures
        baseline = patch_mean_loss(torch.stack([looked_at[0, i][0] for i in range(min(256, len(looked_at)))]), args.mask_patch_size,
                                   args.method == "mirl" or not args.raw_pixels).item()
        say(f"  predicting the mean of each hidden patch scores {baseline:.3f}: a model that learns is below")
    elif dense:
        size = "x".join(map(str, args.img_size))
        judged_by = "windows of {}, step {}".format(*args.slide) if args.slide else "the whole"
        say("  images: " + (f"fitted into {size} and padded, by the detector itself" if detecting else
                            f"crops of {size}; evaluated with a shorter side of {min(args.img_size)}, by {judged_by}"))
        for what, before, now in (model.backbone if detecting else model).pyramid.positions:
            say(f"  positions: {what:26} {before:12} -> {now}" + ("" if args.init or before == "none" else " (random start: a fresh sin-cos table)"))
    else:
        names = {True: [], False: []}
        for name, param in model.named_parameters():
            names[param.requires_grad].append(name.split(".")[0])
        pooling = "class token, norm" if args.pool == "cls" else "mean of patch tokens, fc_norm"
        if not is_vit(args):
            pooling = "mean over places" if args.model in RESNETS else "norm, mean of tokens"
        table = "; ".join(f"{'trainable' if on else 'frozen'}: {', '.join(dict.fromkeys(names[on])) or 'nothing'}" for on in (True, False))
        say(f"  {table}; pooling: {pooling}")
        if not args.init:
            say("  no --init: " + ("probing the RANDOM encoder" if args.probe else "training from scratch"))

    # where to start
    first_epoch, step, loss_sum, loss_count, bad_steps, log_bytes = 0, 0, 0.0, 0, 0, 0
    line = {}
    if saved is not None:
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if ema:
                ema.load_state_dict(saved["ema"])
            first_epoch, step, line = saved["epoch"], saved["schedule"]["step"], saved["last_line"]
            loss_sum, loss_count, bad_steps, log_bytes = (saved["counters"][key] for key in ("loss_sum", "loss_count", "bad_steps", "log_bytes"))
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{checkpoint_path} does not fit this run ({str(error).strip().splitlines()[0]}); resume with the run's own "
                             "model and flags") from None
        theirs, ours = (saved["schedule"]["total_steps"], saved["schedule"]["processes"]), (total_steps, world.size)
        if theirs != ours:
            raise ValueError(f"{checkpoint_path} is of a run of {theirs[0]} steps on {theirs[1]} processes, this one has {ours[0]} on "
                             f"{ours[1]}; resume with as many processes and images")
        if first_epoch == args.epochs:
            say(f"  the run in {folder} is complete: {line}")
            return {**line, "baseline": baseline}
        say(f"  resumed at epoch {first_epoch}, step {step} of {total_steps}")
    log = None
    if main_rank:  # every check is behind us: only now does the run leave a trace
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "args.json").exists():
                (folder / "args.json").write_text(json.dumps({**vars(args), "task": command}, indent=1) + "\n")
            log = open(folder / "log.jsonl", "a")
        except OSError as error:
            raise ValueError(f"cannot write to --output-dir {folder}: {error.strerror}") from None
        log.truncate(log_bytes)
        log.seek(0, os.SEEK_END)  # lines after the last checkpoint will be written again

    def write(**entry):
        if log:
            rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in entry.items()}
            log.write(json.dumps({key: None if value != value else value for key, value in rounded.items()}) + "\n")  # NaN is no JSON
            log.flush()

    def save(epoch):
        if main_rank:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, args=vars(args), last_line=line,
                         schedule=dict(step=step, total_steps=total_steps, processes=world.size), rng=dict(seed=args.seed, step=step),
                         counters=dict(loss_sum=loss_sum, loss_count=loss_count, bad_steps=bad_steps, log_bytes=log.tell()))
            if ema:
                state["ema"] = ema.state_dict()
            save_checkpoint(checkpoint_path, state)

    # the loop
    learner.train()
    last_save = time.monotonic()
    bad_in_a_row = 0
    for epoch in range(first_epoch, args.epochs):
        train_batches.epoch, train_batches.start = epoch, (step - epoch * steps_per_epoch) * args.accum
        batches = iter(loader)
        bar = tqdm(range(step - epoch * steps_per_epoch, steps_per_epoch), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False,
                   disable=None if main_rank else True)
        epoch_start, data_seconds, images_seen = time.monotonic(), 0.0, 0
        for _ in bar:
            now = lr_at(step, total_steps, warmup, lr, args.min_lr, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = now * group["lr_scale"]
            waited = time.monotonic()
            window = [to_device(batch, device) for batch in itertools.islice(batches, args.accum)]
            data_seconds += time.monotonic() - waited
            verdict = {}

            def closure():
                torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + world.rank)  # drop path, mixup, attacks: alike in both passes of SAM
                optimizer.zero_grad()
                loss = 0.0
                for n, batch in enumerate(window, start=1):
                    # gradients travel between processes once per step, with the last micro-batch
                    with nullcontext() if world.size == 1 or n == len(window) else wrapped.no_sync():
                        with autocast:
                            part = objective(*batch) / len(window)  # the last window may be short: its own length
                        part.backward()
                    loss += part.item()
                # one decision for all ranks: mean loss, anything non-finite, anyone asked to stop
                total, bad, stopped = world.sum([loss, float(not math.isfinite(loss)), float(stop.signal is not None)])
                # SAM calls twice: the loss that counts is the first, at the weights themselves; a fault in either spoils the step
                again = "loss" in verdict
                verdict.setdefault("loss", total / world.size)
                verdict.update(last_loss=total / world.size, bad=verdict.get("bad", False) or bad > 0, stopped=stopped > 0)
                if verdict["bad"] and not sam:
                    optimizer.zero_grad()  # without gradients the step changes nothing; SAM skips a step whose loss is not finite
                elif args.clip_grad and (again or not sam):  # only the direction of SAM's first gradient counts
                    nn.utils.clip_grad_norm_(learner.parameters(), args.clip_grad)
                return torch.tensor(math.nan if verdict["bad"] else loss)

            # under SAM every process climbs with its own share of the batch; only the gradients of the second pass are averaged
            optimizer.step(closure, **({"model": wrapped} if sam else {}))
            verdict["bad"] |= sam and optimizer.last["skipped"]  # a gradient that is not finite
            step += 1
            images_seen += len(window) * plan.batch_size * world.size
            if verdict["bad"]:
                bad_steps, bad_in_a_row = bad_steps + 1, bad_in_a_row + 1
                say(f"  non-finite loss{' or gradient' if sam else ''} at step {step}, lr {now:.3g}: step skipped ({bad_steps} so far)")
                if bad_in_a_row == MAX_BAD_STEPS:
                    raise SystemExit(f"train.py: the loss was not finite {MAX_BAD_STEPS} times in a row, last at step {step} with lr "
                                     f"{now:.3g}; try a smaller --lr, more --warmup-epochs or --clip-grad 1")
            else:
                bad_in_a_row, loss_sum, loss_count = 0, loss_sum + verdict["loss"], loss_count + 1
                if ema:
                    ema.update_parameters(learner)
            if step % LOG_EVERY == 0:
                speed = images_seen / (time.monotonic() - epoch_start)
                bar.set_postfix(loss=f"{verdict['loss']:.3f}", lr=f"{now:.1e}", img_s=f"{speed:.0f}")
                more = dict(loss_climbed=verdict["last_loss"], grad_norm=optimizer.last["grad_norm"]) if sam else {}
                write(step=step, loss=verdict["loss"], lr=now, img_s=speed, **more)
            if verdict["stopped"]:
                save(epoch)
                say(f"  stopped at step {step}; continue with --resume --output-dir {home or folder}")
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
            if time.monotonic() - last_save > 60 * args.save_minutes:
                save(epoch)
                last_save = time.monotonic()

        seconds = time.monotonic() - epoch_start
        judged = ema.module if ema else learner
        line = dict(epoch=epoch + 1, step=step, train_loss=loss_sum / max(1, loss_count),
                    lr=lr_at(step - 1, total_steps, warmup, lr, args.min_lr, args.schedule),
                    img_s=images_seen / seconds, data_share=data_seconds / seconds, bad_steps=bad_steps)
        due = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
        if due and val_loader is not None:  # its truth value would be its length, which may be 0 on one rank only
            world.share(judged.buffers())  # each rank's BatchNorm has seen its own last batch
            if detecting:
                line.update(evaluate_detection(judged, val_loader, val_set, world, autocast))
            elif segmenting:
                line.update(evaluate_segmentation(judged, val_loader, source.classes, args, world, autocast))
            else:
                line.update(evaluate(judged, val_loader, args, world, autocast))
            if epoch + 1 == args.epochs and (args.eval_corruptions or args.eval_pgd):
                line.update(evaluate_robustness(judged, val_loader, args, world, autocast, mean, std))
        if isinstance(source, Folder) and int(source.bad.sum()):
            line["skipped_images"] = int(source.bad.sum())
        write(**line)
        if not args.probe or (epoch + 1) % max(1, args.epochs // 5) == 0:  # a probe's epochs are short
            say("  " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()))
        if data_seconds > 0.3 * seconds and images_seen and not args.probe:
            say(f"  loading takes {data_seconds / seconds:.0%} of the time: try more --workers")
        if args.task == "pretrain" and main_rank:
            save_pictures(folder / "reconstruction.png", judged, looked_at, args, mean, std, device)
        if detecting and due and main_rank:
            save_detections(folder / "detections.png", judged, val_set, device)
        if segmenting and due and main_rank:
            save_segmentations(folder / "segments.png", judged, val_set, args, device)
        loss_sum, loss_count = 0.0, 0
        save(epoch + 1)
        last_save = time.monotonic()
    if log:
        log.close()
    world.gather(None)  # the checkpoint is complete before any rank goes on to read it
    return {**line, "baseline": baseline}


# ---------------------------------------------------------------------------- costs without training


def dry_run(args, world):
    """Parameters, multiply-adds, steps, memory and device-hours, from a forward pass without data or weights."""
    from torch.utils.flop_counter import FlopCounterMode

    segmenting = args.task == "segment"  # COCO's stuff and the background of shapes are classes then
    known = {"coco": (118_287, 133 if segmenting else 80), "ade20k": (20_210, 150), "shapes": (args.data_size, 10 + segmenting), "cifar10": (50_000, 10),
             "cifar100": (50_000, 100), "folder": (1_281_167, 1000)}
    images, num_classes = known[args.data]
    if args.data == "folder" and args.data_path and Path(args.data_path).is_dir():
        source = Folder(args.data_path, train=True)
        images, num_classes = len(source), len(source.classes)
    images = args.train_images or images  # without either: ImageNet-1k
    if args.init and Path(args.init).exists():  # it may be written by a run yet to come
        args.init_options = init_options(args, read_checkpoint(args.init))
    args.init = None
    if args.class_agnostic:
        num_classes = 1
    with torch.device("meta"):
        model = build_model(args, num_classes)
        weights = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
        kept = {}

        def keep(tensor):  # what autograd saves for the backward pass of one image
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        # a pair where images are mixed, or BatchNorm meets a map of one place
        count = 2 if segmenting or args.task == "pretrain" and args.method == "mixmim" else 1
        batch = torch.empty(count, getattr(getattr(model, "encoder", model), "in_chans", 3), *args.img_size)
        measured = model
        if args.loss == "supcon":  # two views an image; the comparison of all views costs next to nothing
            measured, batch = nn.Sequential(model.encoder, model.head), batch.repeat(2, 1, 1, 1)
        if args.task == "detect":  # regions depend on what is seen
            measured = model.backbone
        if args.probe:
            model.eval()
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            labels = [torch.zeros(count, *args.img_size, dtype=torch.long)] if segmenting else []
            measured(batch, args.mask_ratio) if args.task == "pretrain" else measured(batch, *labels)
    macs = counter.get_total_flops() / 2 / count
    passes = 1 if args.probe else 4 if args.checkpointing else 3  # a backward pass costs two forward passes
    passes *= (1 + (args.optimizer == "sam")) * (1 + args.adversarial)  # an attack is a pass forward and back, to the pixels
    plan = plan_steps(args, images, world.size)
    total, trainable = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    moments = 16 if args.optimizer == "sam" else 12  # bytes: gradient, two moments, SAM's copy
    activations = plan.batch_size * sum(s.nbytes() for s in kept.values()) // count
    seen = images if args.probe else plan.total_steps * plan.effective
    print(f"model        {args.model}, {args.task}{' by ' + args.method if args.task == 'pretrain' else ''}, {args.img_size[0]}x{args.img_size[1]} px")
    print(f"parameters   {total:,} ({trainable:,} trainable)")
    print(f"multiply-adds {macs / 1e9:.3f} G per image, forward" + (", without the heads on proposals" if args.task == "detect" else ""))
    print(f"steps        {plan.total_steps:,} of {plan.effective} images, {args.epochs} epochs of {images:,}")
    print(f"lr           {plan.lr:.3g} (base {args.blr:g} per 256)")
    print(f"memory       about {(4 * total + moments * trainable + activations) / 1e9:.1f} GB per device in fp32: weights, gradients, the optimizer's copies, "
          f"{activations / 1e9:.1f} GB of activations" + (", without the heads on proposals" if args.task == "detect" else ""))
    print(f"device-hours {2 * macs * passes * seen / (args.tflops * 1e12) / 3600:.4g} at {args.tflops:g} TFLOP/s")


def check_installation():
    """Versions, device, and whether torch and torchvision were built for each other."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, device {device}")
    try:
        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.1]]), torch.tensor([0.9, 0.8]), 0.5)
    except RuntimeError as error:
        raise ValueError(f"torchvision does not fit torch ({str(error).splitlines()[0]}); install both in one command from the same "
                         "index: pip install --force-reinstall torch torchvision") from None
    print(f"torchvision.ops.nms works ({len(kept)} of 2 overlapping boxes kept)")


# ---------------------------------------------------------------------------- command line


class Stop:
    """SIGTERM and Ctrl-C ask the loop to save and end; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def with_saved_flags(given):
    """On --resume: the flags the run was started with, which those given now must not contradict."""
    if not given.get("resume"):
        return given
    if given.get("output_dir") is None:
        raise ValueError("--resume needs --output-dir, the folder of the run to continue")
    path = Path(given["output_dir"]) / "args.json"
    if not path.exists():
        return given
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not readable JSON; restore it or start afresh in another folder") from None
    for key, value in given.items():
        if key not in FREE_AT_RESUME and key in saved and not same_flag(saved[key], value):
            raise ValueError(f"--{key.replace('_', '-')} {value} differs from the run's own {saved[key]}; drop it or start a new run")
    return {**{key: value for key, value in saved.items() if key not in ("resume", "output_dir")}, **given}


def choose_folder(given, world):
    """The output folder, checked but not yet made."""
    name = given.get("output_dir")
    if name is None:
        numbers = (Path("runs") / f"{n:04d}" for n in itertools.count(1))
        return world.gather(next(path for path in numbers if not path.exists()))[0]  # rank 0's choice
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {name} is a file, not a folder")
    taken = [file for file in RUN_FILES if (folder / file).exists()]
    if taken and not given.get("resume"):
        raise ValueError(f"--output-dir {name} already holds a run ({taken[0]}); choose another folder or add --resume")
    world.gather(None)  # nobody creates it before everybody has looked
    return folder


def same_flag(saved, given):
    """img_size comes back as [H, W] where one number was given."""
    if isinstance(given, list) and isinstance(saved, list) and len(given) == 1:
        given = given * len(saved)
    return saved == given


def main(argv=None):
    given, running = parse(argv), False
    try:
        if given.get("check"):
            return check_installation()
        given = with_saved_flags(given)
        args = resolve(given)
        world = World(args.device)
        if args.dry_run:
            return dry_run(args, world)
        folder, task = choose_folder(given, world), given.get("task")
        running = True
        try:
            with Stop() as stop:
                result = run(args, world, folder, stop, task)
                if task is None:
                    probe_both(given, args, result, world, folder, stop)
                else:
                    world.say(f"done: everything is in {folder}/")
        finally:
            world.close()
        return result
    except ValueError as error:
        # an error from a loading process comes as its traceback; the sentence is its last line
        fail(str(error).strip().splitlines()[-1].removeprefix("ValueError: "), every_rank=running)  # one rank alone may meet a bad file


def probe_both(given, args, result, world, folder, stop):
    """After pre-training: what are the features worth, against those of the same encoder at initialisation?"""
    accuracy = {}
    for name, init in (("probe", str(folder / "checkpoint.pt")), ("probe_random", None)):
        sizes = {key: getattr(args, key) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
        shared = {key: value for key, value in given.items() if key not in STAGE_FLAGS}
        probe = resolve({**shared, **sizes, "task": "classify", "probe": True, "init": init})
        accuracy[name] = run(probe, world, folder / name, stop, "classify", home=folder)["val_acc"]
    loss = result.get("val_loss", result["train_loss"])
    world.say(f"""
summary
  loss on hidden patches  {loss:.3f}   (predicting the patch mean: {result['baseline']:.3f})
  linear probe            {accuracy['probe']:.1f} %  after pre-training by {args.method}
                          {accuracy['probe_random']:.1f} %  same encoder at initialisation
  pictures                {folder / 'reconstruction.png'}""")


if __name__ == "__main__":
    main()
