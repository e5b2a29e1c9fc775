"""SAM: find weights whose whole neighborhood has a low loss.

A minimum that is low at one point only, a narrow crack, generalizes badly. Sharpness-aware minimization
prefers a wide valley: climb to (about) the worst point within radius rho, take the gradient there,
then step from where you were.

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

The closure should draw the same dropout in both passes: begin it with torch.manual_seed(step). BatchNorm
statistics move in the first pass only. A step whose loss or gradient is not finite is skipped. Under DDP pass
the wrapped model, optimizer.step(closure, model=ddp): each process climbs with the gradient of its own batch
(m-sharpness, as in the paper), and only the second gradient is averaged. fp16 needs a GradScaler and the two
halves:

    def backward():
        scaler.scale(criterion(model(x), y)).backward()
        scaler.unscale_(optimizer)
    backward()                              # DDP: inside ddp.no_sync()
    optimizer.first_step(zero_grad=True)
    scaler.update()                         # unscale_ is allowed once between updates
    with batchnorm_held(model):
        backward()
    optimizer.second_step(zero_grad=True)   # skips what is not finite: no scaler.step
    scaler.update()

We differ from google-research/sam (SGD): weight decay is the base optimizer's alone; there it is in the loss, so
in (1) too. The code for ViT and Mixer (big_vision, Adam) decouples it, as AdamW does here.

Source: Foret et al. 2021, arXiv 2010.01412; ViT and Mixer: Chen et al. 2022, arXiv 2106.01548; ASAM: Kwon et
al. 2021, arXiv 2102.11600. Written from the papers. Needs: torch.
Demo: python sam.py (a few seconds on a CPU) saves sam_demo.png.
"""

import math
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import get_total_norm


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around a torch optimizer class.

    params          parameters or groups; a group may have its own rho (0: not perturbed, but in the norm)
    base_optimizer  the class, such as torch.optim.AdamW; base_kwargs are its arguments
    rho             radius (1): 0.02 to 0.05 for ResNets, 0.1 to 0.6 for ViTs and Mixers (Chen et al., from memory)
    adaptive        ASAM (3); its rho is some ten times larger

    param_groups and state are the base optimizer's own, so schedulers, state_dict and resuming work as usual.
    `last` describes the last step, for the log: grad_norm (of (1) or (3)), first_loss, second_loss, skipped.
    """

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **base_kwargs):
        is_class = isinstance(base_optimizer, type)
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
        """(1) or (3): climb from w to w + eps. If a gradient is not finite, stay; second_step will skip."""
        if self._climbed is not None:
            raise ValueError("first_step was called twice; call second_step after the second backward pass")

        # the direction uphill: g, for ASAM w g, whose norm is that of |w| g; the sign cancels below
        climbs, directions = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                uphill = [p.grad for p in params]
                if group["adaptive"]:
                    uphill = torch._foreach_mul(uphill, params)
                climbs.append((group, params, uphill))
                directions += uphill
        if not directions:
            raise ValueError("no parameter has a gradient; does the closure call loss.backward()?")

        # one norm over all parameters; .item() is the only wait for the device in this half
        norm = get_total_norm(directions).item()
        self.last = dict(grad_norm=norm, skipped=not math.isfinite(norm))

        self._climbed = []
        for group, params, uphill in climbs if math.isfinite(norm) else []:
            # keep w
            torch._foreach_copy_(self._memory(params), params)
            self._climbed += params

            # climb to the local maximum; where the objective is to be large, the worst point is downhill
            if group["adaptive"]:
                torch._foreach_mul_(uphill, params)
            sign = -1 if group.get("maximize") else 1
            torch._foreach_add_(params, uphill, alpha=sign * group["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Back to w, bit for bit."""
        if self._climbed:
            torch._foreach_copy_(self._climbed, self._memory(self._climbed))
        self._climbed = None

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        """(2): back to w, then the base optimizer's step, unless a gradient of either half is not finite."""
        if self._climbed is None:
            raise ValueError("there is no first_step to undo; call first_step after the first backward pass")
        self.restore()
        self._base_step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def _base_step(self, losses=(), model=None):
        """The base optimizer's step if gradients and losses are finite. Returns the losses as floats."""
        grads = [p.grad for p in self._params() if p.grad is not None]
        if not grads:
            raise ValueError("no parameter has a gradient after the second pass; call loss.backward() in it")
        norm = get_total_norm(grads)
        numbers = torch.stack([norm, *(loss.to(norm.device) for loss in losses)])
        fault = self.last["skipped"] + numbers.isfinite().logical_not().sum()

        # each process has its own losses and its own first gradient: all of them step, or none
        if hasattr(model, "no_sync"):
            torch.distributed.all_reduce(fault, group=model.process_group)

        # .tolist() is the only wait for the device in this half
        fault, _, *losses = torch.cat([fault[None], numbers]).tolist()
        self.last["skipped"] = fault > 0
        if fault == 0:
            self.base_optimizer.step()  # (2)
        self._opt_called = True  # learning rate schedulers look for it
        return losses

    # ------------------------------------------------------------------------ both at once

    def step(self, closure, model=None, sync_perturbation=False, split=False):
        """Take one SAM step. Returns the loss at w.

        closure            zeroes gradients, computes the loss, calls backward(), returns the loss; it runs
                           twice. Or a list of closures, one per micro-batch: their gradients add up, so
                           divide each loss by their number
        model              the DistributedDataParallel module: its first pass stays local; without it both
                           passes are averaged. Also needed for a compiled model with BatchNorm
        sync_perturbation  average the gradient of the first pass over the processes too
        split              each closure of the list climbs on its own (m-sharpness on one device)
        """
        closures = list(closure) if isinstance(closure, (list, tuple)) else [closure]
        # usually all closures climb together; with split each is a group of its own
        groups = [[closure] for closure in closures] if split else [closures]
        first, second, norms = 0.0, 0.0, []
        gradient = None  # grad L(w + eps), summed over the groups so far

        self._accumulating = len(closures) > 1
        try:
            for number, group in enumerate(groups, start=1):
                # (1) gradient at w, and the climb
                self._set_grads(None)
                first = first + passes(group, model, average=sync_perturbation)
                self.first_step()
                norms.append(self.last["grad_norm"])

                # (2) gradient at w + eps, on top of that of earlier groups
                self._set_grads(gradient)
                with batchnorm_held(model):
                    second = second + passes(group, model, average=number == len(groups))
                gradient = [p.grad for p in self._params()]

                # back to w
                self.restore()

            # (2) the base optimizer's step
            norm = sum(norms) / len(norms)
            self.last = dict(grad_norm=norm, skipped=not math.isfinite(norm))
            self.last["first_loss"], self.last["second_loss"] = self._base_step([first, second], model)
        finally:
            self._accumulating = False
            self.restore()  # a closure raised: leave the weights as they were
        return first

    # ------------------------------------------------------------------------ bookkeeping

    def _start(self):
        """Share the base optimizer's groups and state; no step is under way."""
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self._climbed = None  # the parameters that are at w + eps; None between steps
        self._copies = {}  # parameter -> w; kept from step to step, since fresh memory is slow on a CPU
        self._accumulating = False

    def _memory(self, params):
        for p in params:
            copy = self._copies.get(p)
            if copy is None or (copy.dtype, copy.device) != (p.dtype, p.device):
                self._copies[p] = torch.empty_like(p)
        return [self._copies[p] for p in params]

    def _params(self):
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _set_grads(self, grads):
        """Give every parameter its gradient of this list; None removes all."""
        params = self._params()
        for p, grad in zip(params, grads or [None] * len(params), strict=True):
            p.grad = grad

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
        """Exact resume. From a file of the base optimizer alone, rho and adaptive are the constructor's."""
        self.base_optimizer.load_state_dict(state_dict)
        self._start()
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])
            group.setdefault("adaptive", self.defaults["adaptive"])

    def __getstate__(self):  # deepcopy and pickle
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer, "last": self.last}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._start()


def passes(closures, model, average):
    """Run the closures. Returns the sum of their losses. DDP averages in the last backward pass or never."""
    total = 0.0
    for number, closure in enumerate(closures, start=1):
        local = hasattr(model, "no_sync") and not (average and number == len(closures))
        with model.no_sync() if local else nullcontext(), torch.enable_grad():
            loss = closure()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ValueError(f"the closure must return the loss, a tensor of one number, got {loss!r}")
        total = total + loss.detach().squeeze()
    return total


@contextmanager
def batchnorm_held(model=None):
    """Inside, BatchNorm normalizes by the batch as in training, but its running statistics do not move.

    Without a model every BatchNorm that is called meanwhile is held (not seen inside a compiled model).
    """
    with ExitStack() as undo:

        def hold(module, *_):
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                module.track_running_stats = False
                undo.callback(setattr, module, "track_running_stats", True)

        if model is None:
            undo.enter_context(warnings.catch_warnings())  # torch.compile warns of global hooks at every call
            warnings.filterwarnings("ignore", "Using `torch.compile")
            undo.enter_context(register_module_forward_pre_hook(hold))
        else:
            model.apply(hold)
        yield


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
    axes.set_title("same start, same step size: the crack is lower, the valley is wide (dotted: radius rho)",
                   fontsize=9)
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
        print(f"{name:5s} ends at ({end[0]:5.2f}, {end[1]:5.2f}): height {landscape(end):5.2f}, "
              f"curvature {curvature:5.1f}")
    print("(expect: plain descent falls into the crack at (-0.4, 0.3); SAM passes it and settles in the")
    print(" valley at (1.1, 0.0). Try rho = 0.05: a radius smaller than the crack is wide, and SAM falls in too)")
    draw(landscape, paths, rho)
