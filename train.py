"""Train: one loop for every task.

    python train.py                                   a minute: MIRL on generated shapes, then a linear probe
    python train.py --task pretrain --method mae --data cifar10 --data-path DATA --download
    python train.py --task classify --init runs/0001/checkpoint.pt --data cifar10 --data-path DATA
    python train.py --task probe --init runs/0001/checkpoint.pt       or detect, segment
    python train.py --task detect --help              the flags of one task
    python train.py @recipes/mirl_vit_s54_pretrain.txt --dry-run
    torchrun --nproc_per_node=4 train.py ...          the same on four GPUs

What differs between tasks (data, model, loss, metric, picture) is in tasks/, a module per task with the same
functions (tasks/__init__.py). Folders and checkpoints are in training/runs.py, ranks and signals in
training/world.py, the learning rate and the optimizers in training/optim.py. The loop itself is `fit`, below.

Interrupted anywhere, a run continues with --resume --output-dir DIR and ends, on a CPU, with the same weights:
the order of the data (data.TrainBatches), augmentation and masks (data.Images) are functions of (seed, epoch,
index), dropout of (seed, step, rank), and model, optimizer and position are saved (runs.Run.save).

Needs: torch, torchvision, einops, tqdm; all files here.
"""

import functools
import itertools
import math
import os
import shlex
import sys
import time
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from data import TrainBatches, make_loader
from tasks import classify, contrast, detection, pretrain, probe, segmentation
from training import optim, sources
from training.costs import check_installation, dry_run
from training.flags import Parser, expand, path, refuse
from training.judge import judge, validation_loader
from training.optim import lr_at, plan_steps
from training.runs import Run, check_folder, run_flags, same_flags, saved_flags, summary
from training.world import Stop, World, lost_process

TASKS = {
    "pretrain": pretrain,
    "classify": classify,
    "probe": probe,
    "contrast": contrast,
    "detect": detection,
    "segment": segmentation,
}
LOG_EVERY = 10  # steps
MAX_BAD_STEPS = 5  # steps in a row whose loss is not finite, before the run stops

DEFAULT_RUN = {  # python train.py; giving the flag on the left drops the defaults on its line
    "": "--then-probe --raw-pixels --mask-ratio 0.5 --epochs 3 --batch-size 64 --augment none --eval-every 3",
    "--model": "--model vit_demo --depth 8 --patch-size 8 --embed-dim 64 --num-heads 4",
    "--data": "--data-size 16384",
    "--method": "--segments 2",
    "--lr": "--blr 1.6e-2",
}


# ---------------------------------------------------------------------------- the loop


def fit(args, task, world, run, stop):
    """One task, from its start or its last checkpoint to its end -> the last epoch's line of the log."""
    # data and model: `model` is saved, `learner` is the part that learns, `judged` is evaluated
    data = task.open_data(args, world)
    data.weights = run.weights
    torch.manual_seed(args.seed)
    model = task.build(args, data, world).to(world.device)
    learner = data.learner(model) if data.learner else model
    ema = AveragedModel(learner, multi_avg_fn=optim.ema_update(args.ema)) if args.ema else None
    judged = ema.module if ema else learner

    # `wrapped` computes the gradients: the learner, compiled, on several processes
    wrapped = torch.compile(learner) if args.compile else learner
    if world.size > 1:
        wrapped = DistributedDataParallel(wrapped, device_ids=world.device_ids)
    autocast = world.autocast(args.precision)

    # steps, batches, optimizer
    plan = plan_steps(args, 0 if data.fitted else len(data.train), world.size)
    batches, loader = training_loader(args, data, world)
    val_loader = validation_loader(args, data, world)
    optimizer = optim.build_optimizer(learner, args)
    sam = args.optimizer == "sam"
    statistics = optim.batch_statistics(learner)

    # where to start: at the beginning, or where the last checkpoint was
    at = run.restore(plan, model=model, optimizer=optimizer, ema=ema)
    run.describe(data, learner, at)
    if at.epoch == args.epochs:
        world.say(f"  the run in {run.folder} is complete: {at.line}")
        return at.line
    run.open(data)

    learner.train()
    for epoch in range(at.epoch, args.epochs):
        first = at.step - epoch * plan.steps_per_epoch
        batches.epoch, batches.start = epoch, first * args.accum
        stream, clock = iter(loader), time.monotonic() - 1e-6  # some time must pass
        waited, images = 0.0, 0
        bar = world.progress(range(first, plan.steps_per_epoch), f"epoch {epoch + 1}/{args.epochs}")
        for _ in bar:
            # learning rate
            lr = lr_at(at.step, plan, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # batch: --accum micro-batches; the last window of an epoch may be shorter
            start = time.monotonic()
            window = [world.move(batch) for batch in itertools.islice(stream, args.accum)]
            waited += time.monotonic() - start

            # loss and gradient of some of the micro-batches, usually all; SAM calls this twice, the others once
            groups = [[batch] for batch in window] if sam and args.split_climb else [window]
            pass_losses, bad, stopped = [], False, False

            def closure(batches=window, number=0):
                nonlocal bad, stopped
                seed = (args.seed * 1_000_003 + at.step) * 1_009 + world.rank + number * 2**40
                torch.manual_seed(seed)  # SAM: equal dropout in both passes
                optimizer.zero_grad()
                shares = backward(batches, len(window), wrapped, task, args, data, world, autocast)
                last = not sam or len(pass_losses) == 2 * len(groups) - 1  # only this gradient is stepped with
                norm = optim.clip_gradients(learner, args.clip_grad if last else None)
                loss, mean_loss, fault, stopped = agree(shares, norm, stop, world)
                pass_losses.append(mean_loss)
                bad = bad or fault
                if bad and not sam:
                    optimizer.zero_grad()  # without gradients a step changes nothing
                return torch.tensor(math.nan if bad else loss)

            # step; SAM climbs with each rank's own gradient, and averages the second one only
            before = [buffer.clone() for buffer in statistics]
            if sam:
                closures = [functools.partial(closure, group, number) for number, group in enumerate(groups)]
                optimizer.step(closures, model=wrapped, split=bool(args.split_climb))
                bad = bad or optimizer.last["skipped"]
            else:
                optimizer.step(closure)
            loss = sum(pass_losses[::2])
            at.step += 1
            images += len(window) * plan.batch_size * world.size
            at.bad_in_a_row = at.bad_in_a_row + 1 if bad else 0
            if bad:
                at.bad_steps += 1
                for buffer, value in zip(statistics, before):
                    buffer.copy_(value)
                run.report_bad_step(at, lr, gives_up=at.bad_in_a_row == MAX_BAD_STEPS)
            else:
                at.loss_sum += loss
                at.loss_count += 1
                if ema:
                    ema.update_parameters(learner)

            # log, and once in a while save: each rank asks its own clock, but only rank 0 writes
            if at.step % LOG_EVERY == 0:
                speed = images / (time.monotonic() - clock)
                entry = dict(step=at.step, loss=loss, lr=lr, img_s=speed)
                if sam:
                    entry |= dict(loss_climbed=sum(pass_losses[1::2]), grad_norm=optimizer.last["grad_norm"])
                run.log(**entry)
                bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}")
            if not bad and (stopped or run.save_is_due()):
                run.save(at, epoch)
            if stopped:
                run.exit(stop, at)

        # evaluate, log, picture, save
        seconds = time.monotonic() - clock
        train_loss = at.loss_sum / at.loss_count if at.loss_count else math.nan
        lr = lr_at(at.step - 1, plan, args)  # again: an epoch may have no steps left
        at.line = dict(epoch=epoch + 1, step=at.step, train_loss=train_loss, lr=lr, img_s=images / seconds)
        at.line["data_share"] = waited / seconds
        at.line["bad_steps"] = at.bad_steps
        at.line |= sources.skipped_images(data)
        data.final = epoch + 1 == args.epochs
        with evaluating(judged):
            if val_loader is not None and (data.final or (epoch + 1) % args.eval_every == 0):
                world.share(judged.buffers())  # each rank's BatchNorm has seen its own last batch
                with autocast:
                    at.line |= task.evaluate(judged, val_loader, args, data, world)
            run.log(**at.line)
            run.report_epoch(at)
            # a probe's encoder is frozen: one picture, at the end
            if data.final or not data.learner:
                run.save_picture(task, model if data.learner else judged, data)
        at.loss_sum, at.loss_count = 0.0, 0
        if run.fault(at) is None:
            run.save(at, epoch + 1)
    run.finish(at)
    return at.line


def backward(batches, count, wrapped, task, args, data, world, autocast):
    """Gradients of the mean loss over `count` micro-batches, of which these are some -> the share of each."""
    shares = []
    for n, batch in enumerate(batches, start=1):
        # DDP averages the gradients in the last backward pass only; in SAM's first pass never (sam.passes)
        alone = world.size == 1 or n == len(batches)
        with nullcontext() if alone else wrapped.no_sync():
            with autocast:
                loss = task.loss(wrapped, batch, args, data) / count
            loss.backward()
        shares.append(loss.detach())
    return shares


def agree(shares, norm, stop, world):
    """One decision for all ranks -> own loss, mean loss, a fault on any rank?, a signal on any rank?"""
    # .tolist() is the only wait for the device in a step
    *shares, norm = torch.stack([*shares, norm]).tolist()
    loss = sum(shares)
    fault = not math.isfinite(loss + norm)
    total, faults, signals = world.sum([loss, fault, stop.signal is not None])
    return loss, total / world.size, faults > 0, signals > 0


def training_loader(args, data, world):
    """-> this rank's share of the training batches, and their loader."""
    workers = 0 if data.learner else world.workers(args)  # features in memory need no loading
    batches = TrainBatches(len(data.train), args.batch_size, args.seed, world.rank, world.size)
    return batches, make_loader(data.train, batches, workers, world.device, data.collate)


@contextmanager
def evaluating(model):
    """Without dropout and without gradients; then back to training."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()


# ---------------------------------------------------------------------------- flags


def parser_for(task):
    """The parser of one task: its own flags, and those of every task."""
    module = TASKS[task]
    parser = Parser(prog=f"train.py --task {task}", description=module.__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default=task, help="this one")
    module.add_flags(parser.group(f"flags of --task {task}"))
    optim.optimizer_flags(parser.group("optimization"))
    run_flags(parser.group("the run"))
    parser.show_defaults(module.DEFAULTS)
    return parser


def find_task(argv):
    """-> (task, the flags of the run that goes on, the rest of the command line). Recipes are read here."""
    early = Parser(add_help=False)
    early.add_argument("--task", choices=tuple(TASKS))
    early.add_argument("--probe", action="store_true")  # --task classify --probe means --task probe
    early.add_argument("--resume", action="store_true")
    early.add_argument("--output-dir", type=path)
    given, argv = early.parse_known_args(expand(argv))
    task = given.task
    saved = {}
    if given.probe:
        if task not in ("classify", "probe"):
            raise ValueError("--probe goes with --task classify")
        task = "probe"
    if given.output_dir is not None:
        argv += ["--output-dir", given.output_dir]

    # a run that goes on knows its task
    if given.resume:
        if given.output_dir is None:
            raise ValueError("--resume needs --output-dir, the folder of the run to continue")
        argv += ["--resume"]
        saved = saved_flags(given.output_dir)
    if saved and saved.get("task") not in list(TASKS):
        raise ValueError(f"args.json in {given.output_dir} names no task, but {saved.get('task')!r}; see --task")
    if saved and task not in (None, saved["task"]):
        raise ValueError(f"--task {task} differs from the run's own {saved['task']}; start a new run")
    return task or saved.get("task"), saved, argv


def parse(argv):
    """-> all flags of the task at hand, checked and completed. ValueError in one sentence."""
    task, saved, argv = find_task(argv)
    given = {word.split("=")[0] for word in argv}
    if task is None:  # the default run
        task = "pretrain"
        default = [flags for name, flags in DEFAULT_RUN.items() if name not in given]
        argv = shlex.split(" ".join(default)) + argv

    # the flags of the run that goes on, then those given now
    parser = parser_for(task)
    earlier = sources.without_set(saved) if given >= {"--eval-only", "--data"} else saved
    args, unknown = parser.parse_known_args(parser.as_argv(earlier) + argv)
    if unknown:
        refuse(unknown[0], task, {name: parser_for(name) for name in TASKS})

    # refuse what means nothing beside the other flags, fill in the rest
    args.init_options = saved.get("init_options")
    optim.complete(args, TASKS[task].DEFAULTS)
    sources.complete(args)
    TASKS[task].complete(args)
    same_flags(args, saved)
    return args


# ---------------------------------------------------------------------------- command line


def probe_both(args, line, world, stop, folder):
    """After pre-training: what are the features worth, against those of the same encoder before it?"""
    shared = {name: getattr(args, name) for name in probe.SAME_AS_PRETRAINING}
    if args.data == "shapes":  # a quarter of the default scenes as labels, to save time
        shared["train_images"] = min(args.train_images or args.data_size, 4096)
    lines = []
    for name in ("probe", "probe_random"):
        argv = ["--task", "probe", *parser_for("probe").as_argv(shared)]
        if name == "probe":
            argv += ["--init", str(folder / "checkpoint.pt")]
        if args.resume:
            argv += ["--resume", "--output-dir", str(folder / name)]
        probe_args = parse(argv)
        with Run(probe_args, world, folder / name, hint=folder) as run:
            lines.append(fit(probe_args, probe, world, run, stop))
    world.say(summary(args, line, *lines, folder))


def start(args):
    """Train what the flags say -> the last epoch's line of the log."""
    world = World(args.device)
    try:
        check_folder(args, world)
        if args.eval_only:
            return judge(args, TASKS[args.task], world, Run(args, world, args.output_dir))
        with Stop() as stop, Run(args, world, args.output_dir) as run:
            line = fit(args, TASKS[args.task], world, run, stop)
            if getattr(args, "then_probe", False):
                probe_both(args, line, world, stop, run.folder)
            else:
                world.say(f"done: everything is in {run.folder}/")
        if stop.signal is not None:  # it came after the last step: the run is complete, but what follows must not start
            raise SystemExit(128 + stop.signal)
        return line
    except RuntimeError as error:
        sentence = lost_process(error)
        if sentence is None:
            raise
        raise SystemExit(f"train.py: {sentence}") from None
    finally:
        world.close()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    started = False
    try:
        if "--check" in argv:
            return check_installation()
        args = parse(argv)
        started = True
        if args.dry_run:
            return dry_run(args, TASKS[args.task], World("cpu"))
        return start(args)
    except ValueError as error:
        # an error from a loading process comes as its traceback, which ends with the sentence
        sentence = " ".join(str(error).rpartition("ValueError: ")[2].split())
        rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
        if rank == "0" or started:  # a bad file may concern one rank alone
            where = "" if rank == "0" else f"[rank {rank}] "
            print(f"train.py: {where}{sentence}; see --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
