import contextlib
import copy
import math
import os
import pickle
import socket
import statistics
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sam
from golden_inputs import TOLERANCE, assert_agree, first_values, golden_cases, load_case, parameter, relative
from sam import SAM, batchnorm_held

ROOT = Path(sam.__file__).resolve().parent
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
BASES = {
    "sgd": (SGD, dict(lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "adamw": (ADAMW, dict(lr=1e-2, weight_decay=0.1)),
    "adamw_fused": (ADAMW, dict(lr=1e-2, weight_decay=0.1, fused=True)),
}
every_base = pytest.mark.parametrize("base", BASES)
both_forms = pytest.mark.parametrize("form", ["step", "halves"])
plain_and_adaptive = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])


def mlp(seed=0, dims=(5, 16, 3), dtype=None):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(dims[0], dims[1], dtype=dtype), nn.Tanh(), nn.Linear(dims[1], dims[2], dtype=dtype))


def batch(seed=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


def closure_of(optimizer, loss_of, before=None):
    """The closure of the README; `before` is called first."""
    def closure():
        optimizer.zero_grad()
        if before:
            before()
        loss = loss_of()
        loss.backward()
        return loss
    return closure


def cross_entropy(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def take(optimizer, loss_of, form="step"):
    """One step in either form; the loss at w."""
    if form == "step":
        return optimizer.step(closure_of(optimizer, loss_of))
    loss = loss_of()
    loss.backward()
    optimizer.first_step(zero_grad=True)
    loss_of().backward()
    optimizer.second_step(zero_grad=True)
    return loss.detach()


def weights(model):
    return [p.detach().clone() for p in (model.parameters() if isinstance(model, nn.Module) else model)]


def same_bits(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def total_norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


def climbed(params, grads, rho):
    """w + rho g / |g|, by hand."""
    norm = total_norm(grads)
    return [p + rho * g / norm for p, g in zip(params, grads, strict=True)]


def gradient(model, at, loss_of):
    """The gradient of a loss at other weights, those of the model staying as they are."""
    here = weights(model)
    with torch.no_grad():
        for p, value in zip(model.parameters(), at, strict=True):
            p.copy_(value)
    grads = torch.autograd.grad(loss_of(), list(model.parameters()))
    with torch.no_grad():
        for p, value in zip(model.parameters(), here, strict=True):
            p.copy_(value)
    return grads


# ---------------------------------------------------------------------------- the numbers of the official code

GOLDEN = golden_cases("sam_")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", GOLDEN)
def test_every_step_is_the_official_one(name, dtype):
    case = load_case(name)
    config, double = case["config"], dtype == torch.float64
    expected, tolerance = (case["float64"], TOLERANCE["float64"]) if double else (case, TOLERANCE[case["fill_rule"]])
    layers = {f"fc{k}": nn.Linear(a, b, dtype=dtype) for k, (a, b) in enumerate(zip(config["dims"], config["dims"][1:]), start=1)}
    named = {f"{layer}.{kind}": p for layer, module in layers.items() for kind, p in module.named_parameters()}
    assert list(named) == [p["name"] for p in case["params"]]
    with torch.no_grad():
        for p in case["params"]:
            named[p["name"]].copy_(parameter(p["name"], p["shape"], p["fill"], case["fill_rule"]))
    b, j = torch.arange(case["input"]["batch"], dtype=torch.float64)[:, None], torch.arange(config["dims"][0], dtype=torch.float64)
    x, y = torch.sin(0.7 * j * (b + 1) + 0.3 * b).float().to(dtype), torch.tensor(case["input"]["labels"])
    torch.testing.assert_close(x.float(), torch.tensor(case["input"]["x"]), atol=1e-7, rtol=1e-6)

    def loss_of():
        h = x
        for k, layer in enumerate(layers.values()):
            h = layer(torch.tanh(h) if k else h)
        return F.cross_entropy(h, y)

    optimizer = SAM(named.values(), getattr(torch.optim, config["base_optimizer"]), rho=config["rho"], adaptive=config["adaptive"],
                    **config["base_kwargs"])
    seen, off, loss_tolerance = [], {}, max(tolerance["loss"], 1e-13)  # those of the steps are stored with 13 digits

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        seen.append((loss.item(), total_norm([p.grad for p in named.values()]).item(), weights(named.values())))
        return loss

    assert len(expected["steps"]) == config["steps"]
    for k, step in enumerate(expected["steps"], start=1):
        seen.clear()
        optimizer.step(closure)
        (first, norm, here), (second, norm_there, there) = seen
        moved = total_norm([a - b for a, b in zip(there, here, strict=True)])
        off |= {f"{k} first loss": relative(first, step["loss_first"]) / loss_tolerance,
                f"{k} second loss": relative(second, step["loss_second"]) / loss_tolerance,
                f"{k} gradient": relative(norm, step["grad_l2_first"]) / tolerance["grads"],
                f"{k} second gradient": relative(norm_there, step["grad_l2_second"]) / tolerance["grads"],
                f"{k} perturbation": relative(moved, step["perturbation_l2"]) / tolerance["grads"]}
        assert optimizer.last["first_loss"] == first and optimizer.last["second_loss"] == second
        if not config["adaptive"]:
            assert optimizer.last["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert set(step["params_after"]) == set(named)
        for key, entry in step["params_after"].items():
            rms = entry["l2"] / named[key].numel() ** 0.5
            off[f"{k} {key}"] = relative(named[key].norm(), entry["l2"]) / tolerance["statistics"]
            values = first_values(named[key].detach().flatten(), entry["first"], rms)
            off[f"{k} {key} first"] = values / tolerance.get("slices", tolerance["statistics"])
    off["loss at the end"] = relative(loss_of(), expected["loss"]) / tolerance["loss"]
    assert_agree(off)


def test_the_golden_cases_are_all_there():
    assert len(GOLDEN) == 6 and any("adaptive" in name for name in GOLDEN) and any("adamw" in name for name in GOLDEN)


# ---------------------------------------------------------------------------- by hand


def test_sam_step_matches_the_hand_computed_one():
    w = torch.tensor([3.0, 4.0], requires_grad=True)  # L = |w|^2 / 2: g = w, |g| = 5
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    loss = optimizer.step(closure_of(optimizer, lambda: w.square().sum() / 2))  # eps = 0.5 * w / 5 = (0.3, 0.4)
    torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56]))
    assert loss == 12.5 and not loss.requires_grad
    assert optimizer.last == dict(grad_norm=5.0, first_loss=12.5, second_loss=pytest.approx(15.125), skipped=False)


@both_forms
@plain_and_adaptive
def test_on_a_quadratic_the_gradient_is_the_algebraic_one(form, adaptive):
    torch.manual_seed(0)
    root, w = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64, requires_grad=True)
    A, start, rho = root @ root.T, w.detach().clone(), 0.3
    optimizer = SAM([w], SGD, rho=rho, adaptive=adaptive, lr=0.01)
    take(optimizer, lambda: w @ A @ w / 2, form)
    g = A @ start
    eps = rho * start**2 * g / (start.abs() * g).norm() if adaptive else rho * g / g.norm()
    torch.testing.assert_close((start - w.detach()) / 0.01, A @ (start + eps), rtol=1e-12, atol=1e-12)


@every_base
@both_forms
def test_radius_zero_is_the_base_optimizer_bit_for_bit(base, form):
    cls, kwargs = BASES[base]
    ours, theirs, (x, y) = mlp(), mlp(), batch()
    optimizer, plain = SAM(ours.parameters(), cls, rho=0, **kwargs), cls(theirs.parameters(), **kwargs)
    for _ in range(5):
        take(optimizer, cross_entropy(ours, x, y), form)
        plain.step(closure_of(plain, cross_entropy(theirs, x, y)))
    assert same_bits(weights(ours), weights(theirs))


@plain_and_adaptive
def test_the_perturbation_has_length_rho_and_is_undone_bit_for_bit(adaptive):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, rho=0.7, adaptive=adaptive, lr=0.1)
    places, before = [p.data_ptr() for p in model.parameters()], weights(model)
    for _ in range(2):  # the second time in memory that is there already
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.first_step()
        assert same_bits(grads, [p.grad for p in model.parameters()])
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if not adaptive:
            moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
            assert total_norm(moved).item() == pytest.approx(0.7, rel=1e-5)
        optimizer.restore()
        assert same_bits(before, weights(model))
    optimizer.step(closure_of(optimizer, cross_entropy(model, x, y)))
    assert places == [p.data_ptr() for p in model.parameters()]


def test_a_model_of_another_type_since_the_last_step_is_restored_bit_for_bit_too():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    optimizer.step(closure_of(optimizer, cross_entropy(model, x, y)))
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-12)  # to values that float32 does not have
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x.double()), y).backward()
    optimizer.first_step()
    optimizer.restore()
    assert same_bits(before, weights(model))


def test_both_forms_are_the_same_bit_for_bit():
    a, b, (x, y) = mlp(), mlp(), batch()
    ours, halves = SAM(a.parameters(), ADAMW, rho=0.1, lr=1e-2), SAM(b.parameters(), ADAMW, rho=0.1, lr=1e-2)
    for _ in range(3):
        assert take(ours, cross_entropy(a, x, y)) == take(halves, cross_entropy(b, x, y), "halves")
    assert same_bits(weights(a), weights(b))
    assert halves.last == dict(grad_norm=ours.last["grad_norm"], skipped=False)


def test_a_step_works_where_gradients_are_switched_off():
    a, b, (x, y) = mlp(), mlp(), batch()
    ours, other = SAM(a.parameters(), SGD, lr=0.1), SAM(b.parameters(), SGD, lr=0.1)
    with torch.no_grad():
        ours.step(closure_of(ours, cross_entropy(a, x, y)))
    other.step(closure_of(other, cross_entropy(b, x, y)))
    assert same_bits(weights(a), weights(b))


# ---------------------------------------------------------------------------- groups, schedulers, resuming


def shared(optimizer):
    base = optimizer.base_optimizer
    return optimizer.param_groups is base.param_groups and optimizer.state is base.state


def test_the_groups_are_the_base_optimizers_own_list():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model[0].parameters(), SGD, rho=0.5, lr=0.1, momentum=0.9)
    assert shared(optimizer)
    optimizer.add_param_group(dict(params=model[2].parameters(), lr=0.3))
    assert shared(optimizer) and len(optimizer.base_optimizer.param_groups) == 2
    assert [(g["lr"], g["rho"], g["momentum"]) for g in optimizer.param_groups] == [(0.1, 0.5, 0.9), (0.3, 0.5, 0.9)]
    optimizer.load_state_dict(optimizer.state_dict())
    assert shared(optimizer)
    before, there = weights(model), []

    def closure():
        there.append(weights(model))
        return closure_of(optimizer, cross_entropy(model, x, y))()

    optimizer.step(closure)
    grads = gradient(model, before, cross_entropy(model, x, y))
    torch.testing.assert_close(there[1], climbed(before, grads, 0.5))  # the new group is perturbed
    second = gradient(model, there[1], cross_entropy(model, x, y))
    lrs = [0.1, 0.1, 0.3, 0.3]
    torch.testing.assert_close(weights(model), [p - lr * g for p, lr, g in zip(before, lrs, second, strict=True)])  # and stepped
    assert shared(optimizer)


def test_named_parameters_are_taken_too():
    model = mlp()
    optimizer = SAM(model.named_parameters(), SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_a_group_of_radius_zero_stays_in_place_but_counts_in_the_norm():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    optimizer = SAM([dict(params=[a]), dict(params=[b], rho=0)], SGD, rho=0.5, lr=0.1)
    seen = []

    def loss_of():
        seen.append((a.item(), b.item()))
        return (a.square() + b.square()).sum() / 2

    take(optimizer, loss_of)
    assert seen == [(3, 4), (pytest.approx(3.3), 4)]  # 0.5 * 3 / 5, not 0.5 * 3 / 3
    assert [a.item(), b.item()] == pytest.approx([3 - 0.33, 4 - 0.4])


def test_groups_may_mix_sam_and_asam():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    optimizer = SAM([dict(params=[a]), dict(params=[b], rho=1.0, adaptive=True)], SGD, rho=0.5, lr=0.1)
    (a.square().sum() / 2 + b.square().sum() / 2).backward()
    optimizer.first_step()  # the norm is over (3, 2 * 2) = 5
    assert [a.item(), b.item()] == pytest.approx([3 + 0.5 * 3 / 5, 2 + 1.0 * 2 * 4 / 5])


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@both_forms
def test_schedulers_steer_the_base_optimizer_without_a_warning(scheduler, base, form):
    cls, kwargs = BASES[base]
    ours, theirs, (x, y) = mlp(), mlp(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, plain = SAM(ours.parameters(), cls, rho=0, **kwargs), cls(theirs.parameters(), **kwargs)
        schedule, plainly = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](plain)
        rates = set()
        for _ in range(4):
            take(optimizer, cross_entropy(ours, x, y), form)
            plain.step(closure_of(plain, cross_entropy(theirs, x, y)))
            schedule.step()
            plainly.step()
            rates.add(optimizer.base_optimizer.param_groups[0]["lr"])
    assert len(rates) == 4 and schedule.get_last_lr() == plainly.get_last_lr()
    assert same_bits(weights(ours), weights(theirs))


@every_base
@plain_and_adaptive
def test_ten_steps_are_five_and_a_file_and_five(base, adaptive, tmp_path):
    cls, kwargs = BASES[base]
    x, y = batch()

    def start():
        model = mlp()
        optimizer = SAM(model.parameters(), cls, rho=0.2, adaptive=adaptive, **kwargs)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    def go(model, optimizer, schedule, steps):
        for _ in range(steps):
            take(optimizer, cross_entropy(model, x, y))
            schedule.step()

    straight = start()
    go(*straight, 10)
    first = start()
    go(*first, 5)
    torch.save([part.state_dict() for part in first], tmp_path / "five.pt")
    second = start()
    take(second[1], cross_entropy(second[0], *batch(seed=9)))  # whatever was there is replaced
    for part, state in zip(second, torch.load(tmp_path / "five.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert shared(second[1])
    go(*second, 5)
    assert same_bits(weights(straight[0]), weights(second[0]))
    assert not same_bits(weights(first[0]), weights(second[0]))


def test_a_file_of_the_bare_base_optimizer_can_be_continued_from():
    a, (x, y) = mlp(), batch()
    plain = SGD(a.parameters(), lr=0.1, momentum=0.9)
    plain.step(closure_of(plain, cross_entropy(a, x, y)))
    b = copy.deepcopy(a)
    optimizer = SAM(b.parameters(), SGD, rho=0, lr=0.5, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["rho"] == 0 and optimizer.param_groups[0]["lr"] == 0.1
    take(optimizer, cross_entropy(b, x, y))
    plain.step(closure_of(plain, cross_entropy(a, x, y)))
    assert same_bits(weights(a), weights(b))


# ---------------------------------------------------------------------------- parameters with and without gradients


@both_forms
def test_frozen_and_unused_parameters_stay_and_the_others_move(form):
    model, unused, (x, y) = mlp(), nn.Parameter(torch.ones(3)), batch()
    model[0].weight.requires_grad = False
    optimizer = SAM([*model.parameters(), unused], ADAMW, rho=0.5, lr=0.1, weight_decay=0.1)
    before = weights([*model.parameters(), unused])
    take(optimizer, cross_entropy(model, x, y), form)
    stayed = [torch.equal(a, b) for a, b in zip(before, [*model.parameters(), unused], strict=True)]
    assert stayed == [True, False, False, False, True]


@both_forms
@pytest.mark.parametrize("only_in", [1, 2])
def test_a_parameter_with_a_gradient_in_one_pass_alone_ends_unperturbed(form, only_in):
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    optimizer = SAM([a, b], SGD, rho=0.5, lr=0.1)
    passes = []

    def loss_of():
        passes.append((a.item(), b.item()))
        return (a.square() + b.square() if len(passes) == only_in else a.square()).sum() / 2

    take(optimizer, loss_of, form)
    if only_in == 1:
        assert passes[1] == (pytest.approx(3.3), pytest.approx(4.4))
        assert a.item() == pytest.approx(3 - 0.33) and b.item() == 4  # bit for bit
    else:
        assert passes[1] == (3.5, 4)
        assert [a.item(), b.item()] == pytest.approx([3 - 0.35, 4 - 0.4])


@both_forms
@plain_and_adaptive
def test_a_zero_gradient_gives_no_nan(form, adaptive):
    w = torch.tensor([0.0, 0.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, adaptive=adaptive, lr=0.1, momentum=0.9)
    take(optimizer, lambda: w.square().sum(), form)
    assert torch.equal(w.detach(), torch.zeros(2)) and optimizer.last["grad_norm"] == 0 and not optimizer.last["skipped"]


def test_if_no_parameter_has_a_gradient_it_says_so():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="no parameter has a gradient.*backward"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.first_step()
    optimizer.step(closure_of(optimizer, cross_entropy(model, x, y)))  # and is usable afterwards


# ---------------------------------------------------------------------------- BatchNorm, clipping, dropout


def bn_model(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16, momentum=momentum), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_batchnorm_statistics_move_once_per_step_and_both_passes_use_the_batch(momentum, given):
    model, (x, y) = bn_model(momentum), batch()
    optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
    twin = copy.deepcopy(model)
    for step in range(1, 4):
        twin.load_state_dict(model.state_dict())
        before = weights(twin)
        grads = gradient(twin, before, cross_entropy(twin, x, y))  # the one forward pass that may move the statistics
        statistics_once = [b.clone() for b in twin.buffers()]
        second = gradient(twin, climbed(before, grads, 0.5), cross_entropy(twin, x, y))
        optimizer.step(closure_of(optimizer, cross_entropy(model, x, y)), model=model if given else None)
        assert same_bits(list(model.buffers()), statistics_once)
        assert model[1].num_batches_tracked == step and model[1].track_running_stats
        torch.testing.assert_close(weights(model), [w - 0.1 * g for w, g in zip(before, second, strict=True)])


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_batchnorm_moves_again_after_a_closure_raised(given):
    model, (x, y) = bn_model(), batch()
    optimizer, before = SAM(model.parameters(), SGD, rho=0.5, lr=0.1), weights(model)
    calls = []

    def closure():
        loss = closure_of(optimizer, cross_entropy(model, x, y))()
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure, model=model if given else None)
    assert same_bits(before, weights(model))
    assert model[1].num_batches_tracked == 1
    model(x)
    assert model[1].num_batches_tracked == 2


def test_batchnorm_in_eval_mode_or_without_statistics_is_left_alone():
    still, bare, x = nn.BatchNorm1d(5).eval(), nn.BatchNorm1d(5, track_running_stats=False), batch()[0]
    expected = still(x), bare(x)
    for model in (None, nn.ModuleList([still, bare])):
        with batchnorm_held(model):
            assert same_bits(expected, (still(x), bare(x)))
        assert still.track_running_stats and not bare.track_running_stats


@pytest.mark.parametrize("position", ["first", "second", "third of a list"])
def test_a_closure_that_raises_leaves_the_weights_bit_for_bit(position):
    model, (x, y) = mlp(), batch()
    optimizer, before = SAM(model.parameters(), SGD, rho=0.5, lr=0.1), weights(model)
    left = [{"first": 1, "second": 2, "third of a list": 3}[position]]

    def fail():
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("out of memory")

    closure = closure_of(optimizer, cross_entropy(model, x, y), before=fail)
    for split in (False, True) if "list" in position else (False,):
        left[0] = {"first": 1, "second": 2, "third of a list": 3}[position]
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step([closure, closure] if "list" in position else closure, split=split)
        assert same_bits(before, weights(model))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.zero_grad()  # works as ever
    assert model[0].weight.grad is None
    twin = mlp()
    other = SAM(twin.parameters(), SGD, rho=0.5, lr=0.1)
    take(optimizer, cross_entropy(model, x, y))
    take(other, cross_entropy(twin, x, y))
    assert same_bits(weights(model), weights(twin))


def test_clipping_in_the_closure_shortens_the_gradients_and_does_not_turn_the_perturbation():
    clipped, free, (x, y) = mlp(), mlp(), batch()
    seen, first = {}, weights(free)
    for name, model in (("clipped", clipped), ("free", free)):
        optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
        seen[name] = []

        def closure():
            seen[name].append(weights(model))
            loss = closure_of(optimizer, cross_entropy(model, x, y))()
            if name == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return loss

        optimizer.step(closure)
        seen[name].append(weights(model))
    torch.testing.assert_close(seen["clipped"][1], seen["free"][1])  # the same w + eps
    moved = {name: [b - a for a, b in zip(first, places[2], strict=True)] for name, places in seen.items()}
    assert total_norm(moved["clipped"]).item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    lengths = {name: total_norm(steps) for name, steps in moved.items()}
    for a, b in zip(moved["clipped"], moved["free"], strict=True):
        torch.testing.assert_close(a / lengths["clipped"], b / lengths["free"], atol=1e-4, rtol=1e-3)


def test_a_closure_that_seeds_itself_drops_the_same_units_in_both_passes():
    x, y = batch()
    model, masks = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)), []
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer = SAM(model.parameters(), SGD, rho=1e-3, lr=0.1)

    def closure():
        torch.manual_seed(7)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])


# ---------------------------------------------------------------------------- half precision, numbers that are not finite


def test_under_bfloat16_autocast_a_step_is_close_to_the_float32_one():
    ours, theirs, (x, y) = mlp(), mlp(), batch()
    half, full = (SAM(m.parameters(), SGD, rho=0.1, lr=0.1) for m in (ours, theirs))

    def loss_of():
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(x)
            assert out.dtype == torch.bfloat16
            return F.cross_entropy(out, y)

    start = weights(ours)
    for _ in range(3):
        assert take(half, loss_of).item() == pytest.approx(take(full, cross_entropy(theirs, x, y)).item(), rel=2e-2)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    ways = [torch.cat([(b - a).flatten() for a, b in zip(start, weights(m), strict=True)]) for m in (ours, theirs)]
    assert (ways[0] - ways[1]).norm() < 0.05 * ways[1].norm()


def scaled_step(optimizer, scaler, loss_of):
    """The recipe of the docstring."""
    scaler.scale(loss_of()).backward()
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True)
    scaler.update()
    scaler.scale(loss_of()).backward()
    scaler.unscale_(optimizer)
    optimizer.second_step(zero_grad=True)
    scaler.update()


@pytest.mark.parametrize("half", [False, True], ids=["scaled float32", "float16"])
def test_the_two_halves_with_a_scaler_are_the_float32_step(half):
    ours, theirs, (x, y) = mlp(), mlp(), batch()
    optimizer, full = (SAM(m.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9) for m in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss_of():
        with torch.autocast("cpu", torch.float16, enabled=half):
            out = ours(x)
        return F.cross_entropy(out.float(), y)

    for _ in range(3):
        scaled_step(optimizer, scaler, loss_of)
        take(full, cross_entropy(theirs, x, y))
    torch.testing.assert_close(weights(ours), weights(theirs), **(dict(atol=2e-3, rtol=0) if half else {}))
    assert scaler.get_scale() == 1024


def poisoned(model, passes, value):
    """A hook that spoils one gradient in the given backward passes (counted from 1)."""
    count = [0]

    def spoil(grad):
        count[0] += 1
        return torch.full_like(grad, value) if count[0] in passes else grad

    model[0].weight.register_hook(spoil)


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_in_either_half_skips_restores_and_makes_the_scaler_back_off(bad_pass, value):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), ADAMW, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    poisoned(model, {bad_pass}, value)
    before = weights(model)
    scaled_step(optimizer, scaler, cross_entropy(model, x, y))
    assert same_bits(before, weights(model)) and not optimizer.state and optimizer.last["skipped"]
    assert scaler.get_scale() == 512
    scaled_step(optimizer, scaler, cross_entropy(model, x, y))  # and goes on
    assert not same_bits(before, weights(model)) and all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 512 and not optimizer.last["skipped"]


@pytest.mark.parametrize("mode, bad_pass", [("one", 1), ("one", 2), *((mode, k) for mode in ("list", "split") for k in (1, 2, 3, 4))])
def test_step_skips_as_well_whichever_pass_has_the_bad_gradient(mode, bad_pass):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), ADAMW, rho=0.1, lr=0.1)
    poisoned(model, {bad_pass}, math.inf)
    before, closure = weights(model), closure_of(optimizer, cross_entropy(model, x, y))
    closure = closure if mode == "one" else [closure, closure]
    optimizer.step(closure, split=mode == "split")
    assert same_bits(before, weights(model)) and not optimizer.state and optimizer.last["skipped"]
    optimizer.step(closure, split=mode == "split")
    assert not same_bits(before, weights(model)) and all(p.isfinite().all() for p in model.parameters())
    assert not optimizer.last["skipped"]


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_loss_that_is_not_finite_is_never_stepped_on_even_if_its_gradient_is(bad_pass):
    model, (x, y) = mlp(), batch()
    optimizer, passes, before = SAM(model.parameters(), SGD, lr=0.1), [], weights(model)

    def loss_of():
        passes.append(0)
        return F.cross_entropy(model(x), y) + (math.inf if len(passes) == bad_pass else 0)

    take(optimizer, loss_of)
    assert same_bits(before, weights(model)) and optimizer.last["skipped"]
    assert optimizer.last["first_loss" if bad_pass == 1 else "second_loss"] == math.inf


# ---------------------------------------------------------------------------- micro-batches


def micro_closures(optimizer, model, x, y, parts, zero):
    def make(rows):
        def closure():
            if zero:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows]) / parts
            loss.backward()
            return loss
        return closure
    return [make(slice(k * len(x) // parts, (k + 1) * len(x) // parts)) for k in range(parts)]


@every_base
@plain_and_adaptive
@pytest.mark.parametrize("zero", [False, True], ids=["no zero_grad", "each zeroes"])
def test_a_list_of_micro_batches_is_the_one_big_batch(base, adaptive, zero):
    cls, kwargs = BASES[base]
    ours, theirs, (x, y) = mlp(dtype=torch.float64), mlp(dtype=torch.float64), batch(size=12)
    x = x.double()
    optimizer, whole = (SAM(m.parameters(), cls, rho=0.3, adaptive=adaptive, **kwargs) for m in (ours, theirs))
    for _ in range(3):
        loss = optimizer.step(micro_closures(optimizer, ours, x, y, 3, zero))
        assert loss.item() == pytest.approx(take(whole, cross_entropy(theirs, x, y)).item(), rel=1e-12)
        assert optimizer.last == {key: pytest.approx(value, rel=1e-12) for key, value in whole.last.items()}
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero", [False, True], ids=["no zero_grad", "each zeroes"])
def test_split_is_the_hand_computed_m_sharpness(zero):
    model, (x, y) = mlp(), batch(size=12)
    optimizer, before = SAM(model.parameters(), SGD, rho=0.3, lr=0.1), weights(model)
    total, losses, norms = [torch.zeros_like(p) for p in before], [], []
    for k in range(3):
        loss_of = cross_entropy(model, x[4 * k:4 * k + 4], y[4 * k:4 * k + 4])
        losses.append(loss_of().item() / 3)
        grads = gradient(model, before, loss_of)
        norms.append(total_norm(grads).item() / 3)
        second = gradient(model, climbed(before, grads, 0.3), loss_of)
        total = [t + g / 3 for t, g in zip(total, second, strict=True)]
    loss = optimizer.step(micro_closures(optimizer, model, x, y, 3, zero), split=True)
    torch.testing.assert_close(weights(model), [p - 0.1 * g for p, g in zip(before, total, strict=True)])
    assert loss.item() == pytest.approx(sum(losses)) and optimizer.last["grad_norm"] == pytest.approx(sum(norms) / 3)
    whole = mlp()
    other = SAM(whole.parameters(), SGD, rho=0.3, lr=0.1)
    other.step(micro_closures(other, whole, x, y, 3, zero))
    assert not torch.allclose(whole[0].weight, model[0].weight, atol=1e-5, rtol=0)  # split is something else


@pytest.mark.parametrize("split", [False, True])
def test_the_same_closure_may_stand_in_the_list_twice(split):
    ours, theirs, (x, y) = mlp(), mlp(), batch()
    optimizer, other = (SAM(m.parameters(), SGD, rho=0.3, lr=0.1) for m in (ours, theirs))
    closure = closure_of(optimizer, lambda: F.cross_entropy(ours(x), y) / 2)
    optimizer.step([closure, closure], split=split)
    take(other, cross_entropy(theirs, x, y))
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_a_closure_that_forgets_to_zero_the_gradients_is_no_harm():
    ours, theirs, (x, y) = mlp(), mlp(), batch()
    optimizer, other = (SAM(m.parameters(), SGD, rho=0.3, lr=0.1) for m in (ours, theirs))

    def closure():
        loss = F.cross_entropy(ours(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        take(other, cross_entropy(theirs, x, y))
    assert same_bits(weights(ours), weights(theirs))


# ---------------------------------------------------------------------------- wrong use


W = torch.ones(2, requires_grad=True)
WRONG = {
    "a negative rho": (lambda: SAM([W], SGD, rho=-0.1, lr=0.1), "rho -0.1"),
    "a rho that is no number": (lambda: SAM([W], SGD, rho=math.nan, lr=0.1), "rho nan"),
    "an infinite rho": (lambda: SAM([W], SGD, rho=math.inf, lr=0.1), "rho inf"),
    "a negative rho in a group": (lambda: SAM([dict(params=[W], rho=-1)], SGD, lr=0.1), "rho -1"),
    "an instance": (lambda: SAM([W], SGD([W], lr=0.1)), "base_optimizer must be"),
    "a name": (lambda: SAM([W], "sgd"), "base_optimizer.*sgd"),
    "no closure": (lambda: SAM([W], SGD, lr=0.1).step(), "closure None"),
    "an empty list": (lambda: SAM([W], SGD, lr=0.1).step([]), r"closure \[\]"),
    "a number as closure": (lambda: SAM([W], SGD, lr=0.1).step(5), "closure 5"),
    "rho as text": (lambda: SAM([W], SGD, rho="0.05", lr=0.1), "rho '0.05'"),
    "SAM in SAM": (lambda: SAM([W], SAM, lr=0.1), "base_optimizer.*SAM"),
    "LBFGS inside": (lambda: SAM([W], torch.optim.LBFGS, lr=0.1), "base_optimizer.*LBFGS"),
    "second_step alone": (lambda: SAM([W], SGD, lr=0.1).second_step(), "no first_step to undo; call first_step"),
    "restore alone": (lambda: SAM([W], SGD, lr=0.1).restore(), "no first_step to undo; call first_step"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_is_told_in_one_line(what):
    wrong, words = WRONG[what]
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_group_with_a_wrong_rho_is_not_added():
    optimizer = SAM([W], SGD, lr=0.1)
    with pytest.raises(ValueError, match="rho -1"):
        optimizer.add_param_group(dict(params=[torch.ones(1, requires_grad=True)], rho=-1))
    assert len(optimizer.param_groups) == 1


def test_first_step_twice_is_refused_and_can_still_be_undone():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    w.square().sum().backward()
    optimizer.first_step()
    with pytest.raises(ValueError, match="first_step was called twice; call second_step"):
        optimizer.first_step()
    optimizer.restore()
    assert w.tolist() == [3, 4]


def test_a_closure_that_returns_nothing_is_told_so():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    with pytest.raises(ValueError, match="closure must return the loss, a tensor of one number, got None"):
        optimizer.step(lambda: w.square().sum().backward())
    assert w.tolist() == [3, 4]


# ---------------------------------------------------------------------------- two processes

PARALLEL = {  # arguments of step, micro-batches on each process, which of the backward passes of a step average
    "local": (dict(), 1, [False, True]),
    "synchronized": (dict(sync_perturbation=True), 1, [True, True]),
    "without model": (dict(model=None), 1, [True, True]),
    "list": (dict(), 2, [False, False, False, True]),
    "synchronized list": (dict(sync_perturbation=True), 2, [False, True, False, True]),
    "split list": (dict(split=True), 2, [False, False, False, True]),
    "synchronized split list": (dict(split=True, sync_perturbation=True), 2, [True, False, True, True]),
}
RHO, LR, STEPS = 0.5, 0.2, 3


def two_process_job():
    """What each of the two processes runs: every case, from the same weights, each with its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, results = torch.distributed.get_rank(), {}
    x, y = (t[8 * rank:8 * rank + 8] for t in batch(size=16))
    for name, (arguments, parts, _) in PARALLEL.items():
        for view in (False, True):
            model = mlp()
            ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
            optimizer = SAM(model.parameters(), SGD, rho=RHO, lr=LR, momentum=0.9)
            seen, travels = [], []
            closures = micro_closures(optimizer, ddp, x, y, parts, zero=True)

            def spy(c):
                seen.append(weights(model))
                travels.append(ddp.require_backward_grad_sync)
                return c()

            losses = [optimizer.step([lambda c=c: spy(c) for c in closures], **{"model": ddp, **arguments}).item() for _ in range(STEPS)]
            results[name, view] = dict(seen=seen[:2 * parts], travels=travels, weights=weights(model), losses=losses)
    for bad_rank, bad_pass, loss in ((1, 1, False), (0, 2, False), (1, 1, True)):  # an inf on one process alone
        model = mlp()
        ddp = nn.parallel.DistributedDataParallel(model)
        optimizer, passes, skipped = SAM(model.parameters(), SGD, rho=RHO, lr=LR), [], []
        if rank == bad_rank and not loss:
            poisoned(model, {bad_pass}, math.inf)

        def loss_of():
            passes.append(0)
            return F.cross_entropy(ddp(x), y) + (math.inf if loss and rank == bad_rank and len(passes) == bad_pass else 0)

        for _ in range(2):
            optimizer.step(closure_of(optimizer, loss_of), model=ddp)
            skipped.append((optimizer.last["skipped"], weights(model)))
        results["inf", bad_rank, bad_pass, loss] = skipped
    model = nn.Sequential(bn_model())  # BatchNorm, its buffers broadcast from rank 0
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = SAM(model.parameters(), SGD, rho=RHO, lr=LR)
    for _ in range(STEPS):
        optimizer.step(closure_of(optimizer, cross_entropy(ddp, x, y)), model=ddp)
    results["batchnorm"] = weights(model), model[0][1].num_batches_tracked.item()
    torch.save(results, f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "job.py").write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
                                   "import test_sam\ntest_sam.two_process_job()\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, "job.py"], cwd=folder, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank in range(2)]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-2000:] for error in errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def by_hand(climbs):
    """STEPS steps of SGD with momentum on the mean of the gradients, each part at the top of its own climb.

    climbs: lists of rows of the batch; each list climbs together
    """
    model, (x, y) = mlp(), batch(size=16)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(STEPS):
        here, mean = weights(model), 0
        for rows in climbs:
            loss_of = cross_entropy(model, x[rows], y[rows])
            second = gradient(model, climbed(here, gradient(model, here, loss_of), RHO), loss_of)
            mean = [m + g / len(climbs) for m, g in zip(mean or [0] * len(second), second, strict=True)]
        momentum = [0.9 * m + g for m, g in zip(momentum, mean, strict=True)]
        with torch.no_grad():
            for p, m in zip(model.parameters(), momentum, strict=True):
                p -= LR * m
    return weights(model)


CLIMBS = {name: [list(range(16))] for name in ("synchronized", "without model", "synchronized list")}
CLIMBS |= {name: [list(range(8)), list(range(8, 16))] for name in ("local", "list")}
CLIMBS["split list"] = [list(range(k, k + 4)) for k in (0, 4, 8, 12)]
CLIMBS["synchronized split list"] = [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]


@pytest.mark.parametrize("view", [False, True], ids=["", "bucket view"])
@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes_end_with_the_same_weights_and_those_computed_by_hand(ranks, name, view):
    ours, theirs = (rank[name, view] for rank in ranks)
    assert same_bits(ours["weights"], theirs["weights"])
    assert ours["travels"] == theirs["travels"] == PARALLEL[name][2] * STEPS
    torch.testing.assert_close(ours["weights"], by_hand(CLIMBS[name]), atol=1e-5, rtol=1e-4)
    assert same_bits(ours["seen"][0], theirs["seen"][0])
    perturbed = [r["seen"][-1] for r in (ours, theirs)]
    assert same_bits(*perturbed) == (name not in ("local", "list", "split list"))  # there each climbs its own hill
    for there in perturbed:
        moved = [b - a for a, b in zip(ours["seen"][0], there, strict=True)]
        assert total_norm(moved).item() == pytest.approx(RHO, rel=1e-4)


@pytest.mark.parametrize("name", ["synchronized", "synchronized list"])
def test_synchronized_processes_are_one_process_with_the_big_batch(ranks, name):
    x, y = batch(size=16)
    model = mlp()
    optimizer = SAM(model.parameters(), SGD, rho=RHO, lr=LR, momentum=0.9)
    losses = [take(optimizer, cross_entropy(model, x, y)).item() for _ in range(STEPS)]
    for view in (False, True):
        ours, theirs = (rank[name, view] for rank in ranks)
        torch.testing.assert_close(ours["weights"], weights(model), atol=1e-5, rtol=1e-4)
        assert [(a + b) / 2 for a, b in zip(ours["losses"], theirs["losses"], strict=True)] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("where", [("inf", 1, 1, False), ("inf", 0, 2, False), ("inf", 1, 1, True)], ids=["first", "second", "loss"])
def test_an_infinity_on_one_process_alone_makes_both_skip(ranks, where):
    start = weights(mlp())
    for skipped, after in (rank[where][0] for rank in ranks):
        assert skipped and same_bits(after, start)
    (first, ours), (second, theirs) = (rank[where][1] for rank in ranks)
    assert not first and not second and same_bits(ours, theirs) and not same_bits(ours, start)


def test_batchnorm_under_two_processes_counts_each_step_once(ranks):
    (ours, count), (theirs, other) = (rank["batchnorm"] for rank in ranks)
    assert same_bits(ours, theirs) and count == other == STEPS


# ---------------------------------------------------------------------------- cost


@pytest.mark.slow
def test_what_sam_adds_to_the_two_passes_costs_at_most_two_and_a_half_adamw_updates():
    """Norm, copy, climb and way back: 5 reads and 3 writes of every parameter; fused AdamW: 4 and 3."""
    from vit import create_vit
    model = create_vit("vit_s16", num_classes=1000)
    base, params = dict(lr=1e-9, weight_decay=0.1, fused=True), list(model.parameters())
    plain, optimizer = ADAMW(params, **base), SAM(params, ADAMW, rho=0.1, **base)
    for p in params:
        p.grad = torch.randn_like(p)
    times = {"update": [], "first_step": [], "restore": [], "finite": []}

    def clock(name, work):
        start = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - start)

    for _ in range(2 + 15):
        clock("update", plain.step)
        clock("first_step", optimizer.first_step)
        clock("restore", optimizer.restore)
        clock("finite", lambda: torch.nn.utils.get_total_norm([p.grad for p in params]).item())
    median = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    ratio = (median["first_step"] + median["restore"]) / median["update"]
    print({name: f"{1000 * value:.1f} ms" for name, value in median.items()}, f"ratio {ratio:.2f}",
          f"with the check of the second gradient {ratio + median['finite'] / median['update']:.2f}")
    assert ratio <= 2.5


# ---------------------------------------------------------------------------- copies, maximizing, odd calls


def quadratic_closure(optimizer, w, backward=lambda: True):
    def closure():
        optimizer.zero_grad()
        loss = w.square().sum() / 2
        if backward():
            loss.backward()
        return loss
    return closure


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_model_and_optimizer_goes_on_like_the_original(copier):
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], ADAMW, rho=0.5, lr=0.1)
    optimizer.step(quadratic_closure(optimizer, w))
    other, v = copier((optimizer, w))
    for one, weights in ((optimizer, w), (other, v)):
        one.step(quadratic_closure(one, weights))
    assert torch.equal(w, v) and w is not v
    assert other.param_groups is other.base_optimizer.param_groups and other.param_groups[0]["params"][0] is v


def test_a_maximized_objective_is_met_where_it_is_lowest():
    w = torch.tensor([1.0], requires_grad=True)  # maximize -w^2: the worst within 0.5 is at 1.5, with gradient -3
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, maximize=True)

    def closure():
        optimizer.zero_grad()
        objective = -w.square().sum()
        objective.backward()
        return objective
    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))


def test_a_second_pass_without_gradients_is_told_and_undone():
    w, calls = torch.tensor([3.0, 4.0], requires_grad=True), []
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    with pytest.raises(ValueError, match="after the second pass"):
        optimizer.step(quadratic_closure(optimizer, w, lambda: calls.append(0) or len(calls) == 1))
    assert w.tolist() == [3.0, 4.0]


def test_a_step_between_the_two_halves_is_refused_and_the_halves_still_end():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    closure = quadratic_closure(optimizer, w)
    closure()
    optimizer.first_step()
    with pytest.raises(ValueError, match="between first_step and second_step"):
        optimizer.step(closure)
    closure()
    optimizer.second_step()
    torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56]))


def test_the_vote_on_a_bad_step_is_cast_where_the_parameters_are(monkeypatch):
    """A closure may return its loss on the CPU; NCCL serves tensors of the GPU only."""
    w, devices = torch.zeros(2, device="meta", requires_grad=True), []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda votes, group: devices.append(votes.device.type))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    parallel = types.SimpleNamespace(no_sync=contextlib.nullcontext, process_group=None, modules=list)

    def closure():
        w.grad = torch.zeros_like(w)
        return torch.tensor(0.5)
    optimizer.step(closure, model=parallel)
    assert devices == ["meta"]
