"""SAM: settle in a wide valley, not in a narrow crack.

A minimum that is low at one point only generalizes badly. Sharpness-aware minimization looks for a point whose
whole neighborhood is low: climb to (about) the worst point within radius rho, take the gradient there, then step
from where you stood.

    eps = rho * g / ||g||                  (1)   g = grad L(w); one norm over all parameters
    w  <- base step with grad L(w + eps)   (2)   SGD, AdamW, ...; eps is treated as a constant
    eps = rho * w^2 g / || |w| g ||        (3)   ASAM: the radius scales with each weight

It costs two forward-backward passes per step and one copy of the parameters.

    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-3)
    def closure():                          # called twice
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss
    loss = optimizer.step(closure)          # the loss at w

Dropout should drop the same units in both passes: call torch.manual_seed(step) first thing in the closure.
Under DDP pass the wrapped model, optimizer.step(closure, model=ddp): each process then climbs with the gradient of
its own batch (m-sharpness, as in the paper), and only the second gradient is averaged. Gradient accumulation: give
a list of closures, one per micro-batch. BatchNorm statistics move in the first pass only. A step whose loss or
gradient is not finite is skipped. fp16 with a GradScaler takes the two halves, for a backward() that scales the
loss and unscales the gradients:

    backward(); optimizer.first_step(zero_grad=True); scaler.update()
    with batchnorm_held(model):
        backward()
    optimizer.second_step(zero_grad=True); scaler.update()

We differ: weight decay is the base optimizer's alone; the official code has it in the loss, so in (1) too.

Source: Foret et al. 2021, arXiv 2010.01412; ViT and Mixer: Chen et al. 2022, arXiv 2106.01548; ASAM: Kwon et al.
2021, arXiv 2102.11600. Written from the papers. Needs: torch.
Demo: python sam.py (a few seconds on a CPU) saves sam_demo.png.
"""

import math
import warnings
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any torch optimizer class whose step needs no closure.

    params          parameters or groups, each group with its own rho (0: stays in place, but counts in the norm)
    base_optimizer  the class; base_kwargs are its arguments
    rho             radius (1); ResNets want a small one, ViTs and Mixers more, fewer devices more
    adaptive        ASAM (3); its rho is some ten times larger

    param_groups and state are the base optimizer's own, so schedulers, state_dict and resuming work as usual.
    `last` holds grad_norm (that of (1) or (3)), first_loss, second_loss and skipped of the last step, for the log.
    ValueError for a negative rho and for steps called in the wrong order.
    """

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **base_kwargs):
        is_class = isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)
        if not is_class or issubclass(base_optimizer, (SAM, torch.optim.LBFGS)):
            raise ValueError("base_optimizer must be an optimizer class whose step needs no closure, such as "
                             f"torch.optim.SGD, got {str(base_optimizer).splitlines()[0]}")
        super().__init__(params, dict(rho=rho, adaptive=adaptive))
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}
        self.last = {}
        self._start()

    # ------------------------------------------------------------------------ the two halves

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        """(1) or (3): climb from w to w + eps. A gradient that is not finite moves nothing, and second_step skips."""
        if self._moved is not None:
            raise ValueError("first_step was called twice; call second_step after the second backward pass")

        # the direction uphill: the gradient, for ASAM scaled by w^2, of which the norm takes one factor
        climbs = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            direction = [p.grad for p in params]
            if params and group["adaptive"]:
                direction = torch._foreach_mul(direction, params)
            climbs.append((group, params, direction))
        norm = get_total_norm([g for *_, direction in climbs for g in direction]).item()
        if not any(params for _, params, _ in climbs):
            raise ValueError("no parameter has a gradient; does the closure call loss.backward(), on these parameters?")
        self.last = dict(grad_norm=norm)
        self._skip = not math.isfinite(norm)

        # remember w, then climb to the local maximum
        self._moved = []
        for group, params, direction in climbs:
            if self._skip or not params or group["rho"] == 0:
                continue
            if group["adaptive"]:
                torch._foreach_mul_(direction, params)
            torch._foreach_copy_(self._memory(params), params)
            self._moved += params
            uphill = -1 if group.get("maximize") else 1
            torch._foreach_add_(params, direction, alpha=uphill * group["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Back from w + eps to w, bit for bit."""
        if self._moved is None:
            raise ValueError("there is no first_step to undo; call first_step after the first backward pass")
        if self._moved:
            torch._foreach_copy_(self._moved, self._memory(self._moved))
        self._moved = None

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        """Back to w, then (2). Nothing is stepped on if a gradient of either half is not finite."""
        self.restore()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise ValueError("no parameter has a gradient after the second pass; call loss.backward() in both")
        self._skip = self._skip or not math.isfinite(get_total_norm(grads).item())
        self.last["skipped"] = self._skip
        if not self._skip:
            self.base_optimizer.step()
        self._opt_called = True  # learning rate schedulers look for it
        if zero_grad:
            self.zero_grad()

    # ------------------------------------------------------------------------ both at once

    def step(self, closure=None, model=None, sync_perturbation=False, split=False):
        """Take one SAM step. Returns the loss at w.

        closure            zeroes gradients, computes the loss, calls backward(), returns the loss; it runs twice. Or a
                           list of them, one per micro-batch: their gradients add up (divide the losses)
        model              the DistributedDataParallel module: its first pass stays local; without it both are averaged
        sync_perturbation  average the gradient of the first pass over the processes too
        split              each closure of the list climbs on its own (m-sharpness on one device)
        """
        closures = list(closure) if isinstance(closure, (list, tuple)) else [closure]
        if not closures or not all(map(callable, closures)):
            raise ValueError(f"closure {closure!r} must be a function that computes the loss and calls backward(), or a "
                             "list of them; or call first_step and second_step yourself")
        if self._moved is not None:
            raise ValueError("step was called between first_step and second_step; call second_step first")
        climbs = [[one] for one in closures] if split else [closures]
        first, second, norms, skip = 0.0, 0.0, [], False
        gradient = None  # (2) of the climbs so far

        self.zero_grad()
        self._accumulating = len(closures) > 1
        try:
            for k, together in enumerate(climbs, start=1):
                # the gradient at w, and the climb
                first = first + passes(together, model, average=sync_perturbation)
                self.first_step()
                norms.append(self.last["grad_norm"])
                skip = skip or self._skip

                # the gradient at w + eps, added to that of the climbs before; then get back to w
                self._exchange_grads(gradient)
                with batchnorm_held(model):
                    second = second + passes(together, model, average=k == len(climbs))
                if k < len(climbs):
                    self.restore()
                    gradient = self._exchange_grads(None)
            self._skip = skip or not math.isfinite(first + second)
            self._vote(model)
            losses = dict(first_loss=float(first), second_loss=float(second))
            self.last = dict(grad_norm=sum(norms) / len(norms), **losses)
            self.second_step()
        finally:
            self._accumulating = False
            if self._moved is not None:  # a closure raised: leave the weights as they were
                self.restore()
        return first

    # ------------------------------------------------------------------------ bookkeeping

    def _start(self):
        """Share the base optimizer's groups and state; no step is under way."""
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self._copies = {}  # parameter -> memory for w, kept from step to step
        self._moved = None  # the parameters that are at w + eps; None between steps
        self._skip = self._accumulating = False

    def _memory(self, params):
        for p in params:
            copy = self._copies.get(p)
            if copy is None or (copy.dtype, copy.device) != (p.dtype, p.device):
                self._copies[p] = torch.empty_like(p)
        return [self._copies[p] for p in params]

    def _exchange_grads(self, new):
        """Give every parameter another gradient (None: none) and return the present ones."""
        params = [p for group in self.param_groups for p in group["params"]]
        present = [p.grad for p in params]
        for p, grad in zip(params, new or [None] * len(params), strict=True):
            p.grad = grad
        return present

    def _vote(self, model):
        """Each process saw its own losses and its own first gradient: all of them step, or none."""
        if hasattr(model, "no_sync"):
            votes = torch.tensor(float(self._skip), device=self.param_groups[0]["params"][0].device)
            torch.distributed.all_reduce(votes, group=model.process_group)
            self._skip = votes.item() > 0

    def zero_grad(self, set_to_none=True):
        if not self._accumulating:  # the gradients of a list of closures add up
            super().zero_grad(set_to_none)

    def add_param_group(self, group):
        rho = group.get("rho", self.defaults["rho"])
        if not isinstance(rho, (int, float)) or not 0 <= rho < math.inf:
            raise ValueError(f"rho {rho!r} must be zero or a positive number, such as 0.05")
        super().add_param_group(group)

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict):
        """Exact resume. A file of the base optimizer alone will do: rho and adaptive are then the constructor's."""
        self.base_optimizer.load_state_dict(state_dict)
        self._start()
        for group in self.param_groups:
            for key in ("rho", "adaptive"):
                group.setdefault(key, self.defaults[key])

    def __getstate__(self):  # deepcopy and pickle
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer, "last": self.last}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._start()


def passes(closures, model, average):
    """Run the closures -> the sum of their losses. DDP averages gradients in the last backward pass, if at all."""
    total = 0.0
    for k, closure in enumerate(closures, start=1):
        local = hasattr(model, "no_sync") and not (average and k == len(closures))
        with model.no_sync() if local else nullcontext(), torch.enable_grad():
            loss = closure()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ValueError(f"the closure must return the loss, a tensor of one number, got {loss!r}")
        total = total + loss.detach()
    return total


@contextmanager
def batchnorm_held(model=None):
    """Inside, BatchNorm normalizes by the batch as in training, but its running statistics do not move.

    Without a model every BatchNorm that is called meanwhile is held (not seen inside a compiled model).
    """
    held = []

    def hold(module, *_):
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            module.track_running_stats = False
            held.append(module)

    handle = None
    if model is None:
        handle = torch.nn.modules.module.register_module_forward_pre_hook(hold)
    else:
        for module in model.modules():
            hold(module)
    try:
        with warnings.catch_warnings():  # torch.compile remarks on such hooks at every call
            warnings.filterwarnings("ignore", "Using `torch.compile")
            yield
    finally:
        if handle is not None:
            handle.remove()
        for module in held:
            module.track_running_stats = True


def draw(landscape, paths, rho):
    """The two paths over a map of the landscape, if matplotlib is there."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    y, x = torch.meshgrid(torch.linspace(-0.8, 0.8, 200), torch.linspace(-1.5, 2.2, 400), indexing="ij")
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    shades = axes.contourf(x, y, landscape(torch.stack([x, y], dim=-1)), levels=40, cmap="Greys_r")
    figure.colorbar(shades, label="height")
    for (name, path), color in zip(paths.items(), ("tab:red", "tab:blue"), strict=True):
        axes.plot(*path.T, color=color, label=name)
        axes.plot(*path[-1], "o", color=color)
    axes.add_patch(plt.Circle(paths["SAM"][-1].tolist(), rho, fill=False, color="tab:blue", linestyle=":"))
    axes.set_title("same start, same step size: the crack is lower, the valley is wide (dotted: radius rho)", fontsize=9)
    axes.legend(loc="lower right")
    figure.savefig("sam_demo.png", dpi=110)
    print("saved sam_demo.png")


if __name__ == "__main__":
    # a wide valley, and on the way to it a narrow crack that is deeper
    rho = 0.3
    crack, valley = torch.tensor([-0.4, 0.3]), torch.tensor([1.2, 0.0])

    def landscape(w):
        """w (..., 2) -> height (...)"""
        narrow = torch.exp(-(w - crack).square().sum(dim=-1) / (2 * 0.15**2))
        wide = torch.exp(-(w - valley).square().sum(dim=-1) / (2 * 1.2**2))
        return 0.05 * w.square().sum(dim=-1) - narrow - 1.2 * wide

    def descend(optimizer, w, steps=400):
        path = [w.detach().clone()]

        def closure():
            optimizer.zero_grad()
            loss = landscape(w)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
            path.append(w.detach().clone())
        return torch.stack(path)

    paths = {}
    for name in ("plain", "SAM"):
        w = torch.tensor([-1.2, 0.0], requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.01, momentum=0.9)
        if name == "SAM":
            optimizer = SAM([w], torch.optim.SGD, rho=rho, lr=0.01, momentum=0.9)
        paths[name] = descend(optimizer, w)
        end = paths[name][-1]
        curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(landscape, end)).max()
        print(f"{name:5s} ends at ({end[0]:5.2f}, {end[1]:5.2f}): height {landscape(end):5.2f}, curvature {curvature:5.1f}")
    print("(expect: plain descent falls into the crack at (-0.4, 0.3); SAM passes it and settles in the valley at")
    print(" (1.1, 0.0). Try rho = 0.05: a radius smaller than the crack is wide, and SAM falls in too)")
    draw(landscape, paths, rho)
