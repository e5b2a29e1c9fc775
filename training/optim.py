"""Optim: the plan of steps, the learning rate, which weights decay, and the papers' optimizers by name.

    lr = blr * effective batch / 256                                    linear scaling rule
    lr(s) = lr * s / warmup, then half a cosine (or a line) to min_lr   (1)   s: step; step 0 has rate 0
    lr of layer l = lr(s) * layer_decay^(L - l)                         (2)   L = depth + 1, the head: fastest
    average <- average + (1 - d) (weights - average)                    (3)   d = min(decay, (1 + s) / (10 + s))
    u = g + wd w;  m <- 0.9 m + q |w| / |u| u;  w <- w - lr m           (4)   LARS, per tensor; q = 0.001

LARS: You et al. 2017, arXiv 1708.03888, in the form in which MAE's linear probe uses it: biases and norms take
u = g. Needs: torch; sam.py.
"""

import itertools
import math
import re
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from sam import SAM
from training.flags import between, count, positive


class LARS(torch.optim.Optimizer):
    """(4): each tensor moves by a fixed share of its own length, whatever its gradient's. For large batches."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=1e-3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    w_norm, u_norm = p.norm(), update.norm()
                    ratio = group["trust"] * w_norm / u_norm
                    update = update * torch.where((w_norm > 0) & (u_norm > 0), ratio, 1.0)
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(update)
                p.sub_(momentum, alpha=group["lr"])
        return loss


OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lars": LARS}
USED_BY = {"beta2": "adamw", "rho": "sam", "adaptive": "sam", "base_optimizer": "sam", "split_climb": "sam"}


def optimizer_flags(flag):
    flag("--epochs", type=count, help="passes over the training images")
    flag("--batch-size", type=count, help="images per process and micro-batch")
    flag("--accum", type=count, default=1, help="micro-batches per step")
    flag("--blr", type=positive, help="learning rate per 256 images of the effective batch")
    flag("--lr", type=positive, help="the learning rate itself, instead of --blr")
    flag("--min-lr", type=between(0, 1e9), default=0.0, help="learning rate at the end")
    flag("--warmup-epochs", type=between(0, 1e6), help="linear warm-up (default: 5 %% of the run)")
    flag("--schedule", choices=("cosine", "linear"), default="cosine", help="how the rate falls after warm-up")
    flag("--weight-decay", type=between(0, 1000), default=0.05, help="not on biases and norms")
    flag("--clip-grad", type=positive, help="largest gradient norm (default: off)")
    flag("--ema", type=between(0, 1), help="evaluate an average of the weights with this decay (default: off)")
    flag("--optimizer", choices=(*OPTIMIZERS, "sam"),
         help="sam climbs first, at twice the cost (default: adamw; --task probe --style mae: lars)")
    flag("--beta2", type=between(0, 1), help="adamw")
    flag("--rho", type=positive, help="sam: radius (default: 0.05, adaptive 0.5)")
    flag("--adaptive", action="store_true", default=None, help="sam: scale the radius with each weight (ASAM)")
    flag("--split-climb", action="store_true", default=None,
         help="sam: each of the --accum micro-batches climbs on its own, as one device of many (m-sharpness)")
    flag("--base-optimizer", choices=tuple(OPTIMIZERS), help="sam: what it steps with (default: adamw)")


def complete(args, defaults):
    """Refuse flags of another optimizer, then fill in the task's defaults that apply, and SAM's."""
    defaults = dict(defaults)
    if args.optimizer is None:
        args.optimizer = "lars" if getattr(args, "style", None) == "mae" else "adamw"
    base = args.optimizer
    if args.optimizer == "sam":
        base = args.base_optimizer or "adamw"
    for name, optimizer in USED_BY.items():
        if optimizer not in (args.optimizer, base):
            defaults.pop(name, None)
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} belongs to --optimizer {optimizer}, not to "
                                 f"{args.optimizer}; drop one of them")
    if args.lr is not None:
        defaults.pop("blr", None)
        if args.blr is not None:
            raise ValueError(f"--lr {args.lr:g} and --blr {args.blr:g} both set the learning rate; drop one of them")
    if args.optimizer == "sam":
        args.base_optimizer = base
        args.rho = args.rho or (0.5 if args.adaptive else 0.05)
    if args.split_climb and args.accum < 2:
        raise ValueError(f"--split-climb needs micro-batches to split, but --accum is {args.accum}; use 2 or more")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


class Plan(NamedTuple):
    batch_size: int  # per process and micro-batch
    effective: int  # images per step
    steps_per_epoch: int
    total_steps: int
    lr: float
    warmup: float  # steps


def plan_steps(args, images, processes):
    """How a set of images becomes steps. ValueError where an epoch would be empty."""
    if images == 0:  # all was fitted before the loop, by tasks/probe.py
        return Plan(args.batch_size, 0, 0, 0, 0.0, 0.0)
    batches = images // (args.batch_size * processes)
    if batches == 0:
        raise ValueError(f"--batch-size {args.batch_size} x {processes} processes is larger than the {images} "
                         f"training images; use at most {images // processes}")
    if args.accum > batches:
        raise ValueError(f"--accum {args.accum} is larger than the {batches} batches of an epoch")
    steps = math.ceil(batches / args.accum)
    effective = args.batch_size * args.accum * processes
    lr = args.lr if args.lr is not None else args.blr * effective / 256
    if args.min_lr > lr:
        raise ValueError(f"--min-lr {args.min_lr:g} is above the learning rate {lr:g}, which falls to it; lower it")
    warmup = 0.05 * args.epochs if args.warmup_epochs is None else args.warmup_epochs
    if warmup > args.epochs:
        raise ValueError(f"--warmup-epochs {warmup:g} is longer than the run, --epochs {args.epochs}; lower it")
    return Plan(args.batch_size, effective, steps, args.epochs * steps, lr, warmup * steps)


def lr_at(step, plan, args):
    """(1), the learning rate of a step; of step -1, where there is none, that after warm-up."""
    if 0 <= step < plan.warmup:
        return plan.lr * step / plan.warmup
    done = (step - plan.warmup) / max(1, plan.total_steps - plan.warmup)
    left = 1 - done if args.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return args.min_lr + (plan.lr - args.min_lr) * left


def layer_number(name, depths):
    """0 for the embedding, 1 ... for the blocks, then norm and head. depths: blocks per stage.

    A merging between stages goes with the block it leads to.
    """
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "stem")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith("layers."):  # layers.STAGE.blocks.BLOCK.* or layers.STAGE.downsample.*
        stage, part, block = name.split(".")[1:4]
        if part == "blocks":
            return sum(depths[:int(stage)]) + int(block) + 1
        return sum(depths[:int(stage) + 1]) + 1
    return sum(depths) + 1


def without_decay(name, param, task):
    """Biases and norms. Pre-training decays tokens and tables, as in the official code; fine-tuning does not."""
    if param.ndim <= 1 or name.endswith(".bias"):
        return True
    if task in ("detect", "segment"):
        return name.endswith(("pos_embed", "relative_position_bias_table"))
    return task in ("classify", "contrast") and name in ("cls_token", "pos_embed")


def param_groups(model, args):
    """A group per layer and kind, with its weight_decay and lr_scale, (2)."""
    depths = next((module.depths for module in model.modules() if hasattr(module, "depths")), [args.depth or 0])
    layer_decay = getattr(args, "layer_decay", 1.0)
    groups = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        name = re.sub(r"^(backbone\.)?(pyramid\.)?(encoder\.|vit\.)?", "", name)
        spared = without_decay(name, param, args.task)
        scale = layer_decay ** (sum(depths) + 1 - layer_number(name, depths))
        new = dict(params=[], weight_decay=0.0 if spared else args.weight_decay, lr_scale=scale)
        groups.setdefault((spared, scale), new)["params"].append(param)
    return list(groups.values())


def build_optimizer(model, args):
    """The optimizer of the flags; the loop sets its learning rate before each step."""
    kind = OPTIMIZERS[args.base_optimizer if args.optimizer == "sam" else args.optimizer]
    options = dict(lr=0.0, momentum=0.9)
    if kind is torch.optim.AdamW:
        fused = next(model.parameters()).device.type in ("cuda", "cpu")
        options = dict(lr=0.0, betas=(0.9, 0.999 if args.beta2 is None else args.beta2), fused=fused)
    groups = param_groups(model, args)
    if args.optimizer == "sam":
        return SAM(groups, kind, rho=args.rho, adaptive=bool(args.adaptive), **options)
    return kind(groups, **options)


def check_state(optimizer, state):
    """ValueError where a saved state does not fit: torch loads any shape, and fused kernels write out of bounds."""
    for now, saved in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        if {**now, "lr": 0} != {**saved, "lr": 0}:
            raise ValueError("other settings of the optimizer")
    params = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
    names = [set(entries) for entries in state["state"].values()]
    if any(entries != names[0] for entries in names):
        raise ValueError("the optimizer remembers different things of different parameters")
    for index, entries in state["state"].items():
        for name, value in entries.items():
            shape = () if name == "step" else params[index].shape
            dense = value.layout == torch.strided and 0 not in value.stride()
            if not dense or value.shape != shape or value.dtype != params[index].dtype:
                raise ValueError(f"{name} of parameter {index} has another shape or type")
            if not value.isfinite().all():
                raise ValueError(f"{name} of parameter {index} is not finite")


def clip_gradients(learner, limit):
    """Scale the gradients to a norm of at most `limit`, if there is one -> their norm."""
    grads = [p.grad for p in learner.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if limit is not None:  # a norm that is not finite makes all gradients NaN, and the step is skipped
        torch.nn.utils.clip_grads_with_norm_(learner.parameters(), limit, norm)
    return norm


def batch_statistics(model):
    """The buffers of BatchNorm, which move in the forward pass: a step that must not count has to put them back."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return list(itertools.chain.from_iterable(layer.buffers() for layer in layers))


def ema_update(decay):
    """(3): the decay grows with the step, as in MIRL's fine-tuning."""

    def update(averaged, current, step):
        d = min(decay, (1 + int(step)) / (10 + int(step)))
        torch._foreach_lerp_(averaged, current, 1 - d)

    return update
