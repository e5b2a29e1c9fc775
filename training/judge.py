"""Judge: --eval-only, the figures of a finished run or of a published classifier, without a step of training.

A run is judged on its own data or on another set of the same classes. A classifier may also be judged on a
part of its classes (ImageNet-R and -A hold 200 of 1,000): classes are matched by the names of their folders,
and only the outputs of the part compete.

Needs: torch; data.py.
"""

import torch

from data import EvalBatches, make_loader
from training.runs import evaluated_weights


def judge(args, task, world, run):
    """-> the figures that an epoch of training would log, printed; nothing is written. run: runs.Run, not opened"""
    check(args, run)
    if run.saved is not None:
        args.normalization = run.saved["mean"], run.saved["std"]
    data = task.open_data(args, world)
    if data.val is None:
        raise ValueError("--eval-only has no validation set to judge on; name one with --data-path")
    if run.saved is not None:
        match_classes(data, run.saved["classes"], partly=args.task in ("classify", "probe"))

    # the model as it was evaluated
    data.weights, data.final = run.weights, True
    model = task.build(args, data, world).to(world.device)
    if run.saved is not None:
        model.load_state_dict(evaluated_weights(run.saved))
    judged = data.learner(model) if data.learner else model
    judged.eval()
    with torch.no_grad(), world.autocast(args.precision):
        line = task.evaluate(judged, validation_loader(args, data, world), args, data, world)
    line = {**line, "val_images": line.get("val_images", len(data.val))}
    world.say("  " + ", ".join(f"{name} {value:.6g}" for name, value in line.items()))
    return line


def validation_loader(args, data, world):
    """This rank's share of the validation set, every image once; None where there is no set."""
    if data.val is None:
        return None
    workers = 0 if data.learner else world.workers(args)  # features in memory need no loading
    batches = EvalBatches(len(data.val), args.batch_size, world.rank, world.size, data.smallest)
    return make_loader(data.val, batches, workers, world.device, data.val_collate)


def check(args, run):
    if args.resume and run.saved is None:
        raise ValueError(f"--eval-only --resume finds no checkpoint.pt in --output-dir {run.folder}; name the folder "
                         "of a finished run")
    if args.resume:
        return
    if args.task != "classify" or not args.init:
        raise ValueError("--eval-only judges a finished run (--resume --output-dir DIR) or a published classifier "
                         "(--task classify --init FILE); name one")
    if args.output_dir is not None:
        raise ValueError(f"--eval-only writes nothing; drop --output-dir {args.output_dir}, or add --resume to judge "
                         "the run in it")


def match_classes(data, known, partly):
    """known: what the outputs of the model stand for. Sets data.classes, and data.columns if the set has a part."""
    known = [str(name) for name in known]
    names = [str(name) for name in data.classes]
    if names == known:
        return
    unknown = sorted(set(names) - set(known))
    if unknown or not partly:
        differ = unknown or sorted(set(known) - set(names)) or ["another order"]
        raise ValueError(f"the classes of the set are not those of the model ({', '.join(differ[:3])}); name a set "
                         "with the same classes")
    data.columns = [known.index(name) for name in names]
    data.classes = known
