"""SAM: settle in a wide valley, not in a deep crack.

A minimum that is low only in one spot generalises badly, and vision transformers and MLP-Mixers
trained without tricks fall into just such minima. Sharpness-aware minimisation asks for a point
whose whole neighbourhood is low: climb to (about) the worst point within radius rho, take the
gradient there, then step from where you stood.

    eps = rho * g / ||g||                  (1)   g = grad L(w); one norm over all parameters
    w  <- base step with grad L(w + eps)   (2)   SGD, AdamW, ...; eps counts as a constant
    eps = rho * w^2 g / || |w| g ||        (3)   ASAM: a neighbourhood that scales with each weight

Twice the work of the base optimizer, one extra copy of the parameters. In PyTorch:

    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-3)
    def closure():                                # called twice
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = criterion(model(x), y)
        loss.backward()
        return loss
    loss = optimizer.step(closure)                # the loss at w

If a gradient or loss of either pass is not finite, the step is undone and skipped. fp16 with a
scaler takes the two halves:

    def backward():
        with torch.autocast(device, torch.float16):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward(); scaler.unscale_(optimizer)
    backward()                                    # several processes: inside ddp.no_sync()
    optimizer.first_step(zero_grad=True); scaler.update()
    with batchnorm_held(model):                   # running statistics move once a step
        backward()
    optimizer.second_step(zero_grad=True); scaler.update()

Several processes, optimizer.step(closure, model=ddp): each climbs with its own share of the batch,
and only the gradients of (2) are averaged. Perturbing by the gradient of m images at a time is called
m-sharpness, and a smaller m works better. Weight decay is the base optimizer's alone; the official code has it in the loss, so in (1) too.

Source: Foret et al. 2021, arXiv 2010.01412; for ViT and Mixer Chen, Hsieh, Gong 2022,
arXiv 2106.01548; ASAM: Kwon et al. 2021, arXiv 2102.11600. Written from the papers.
Needs: torch.
Demo: python sam.py (a few seconds on a CPU) rolls into a sharp and a wide valley, and saves sam_demo.png.
"""

import math
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around any torch optimizer.

    params          parameters or groups; a group may have its own "rho" (0: it stays in place, but counts in the norm)
                    and "adaptive"
    base_optimizer  a class, such as torch.optim.AdamW; base_kwargs go to it
    rho             radius (1); ResNets want a small one, ViTs and Mixers more, fewer devices more
    adaptive        ASAM (3); its rho is some ten times larger
    same_draws      dropout, stochastic depth and other random numbers repeat in the second pass

    param_groups and state are the base optimizer's own, so schedulers, state_dict and resuming need no care.
    last holds grad_norm (the norm in (1) or (3)), first_loss, second_loss and skipped of the last step, to be logged. After
    the two halves it has no losses.
    Between the halves a parameter's values lie in other memory: a view of it that somebody kept still shows w, a weight in memory
    shared with other processes is not shared then, and recorded CUDA graphs (torch.compile's "reduce-overhead") do not fit.
    ValueError for a negative rho and for steps called wrongly.
    """

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, same_draws=False, **base_kwargs):
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)):
            raise ValueError("base_optimizer must be an optimizer class such as torch.optim.SGD, no instance and no name, got a "
                             f"{type(base_optimizer).__name__}")
        if issubclass(base_optimizer, (SAM, torch.optim.LBFGS)):
            raise ValueError(f"base_optimizer {base_optimizer.__name__} takes closures of its own; choose one whose step needs none, "
                             "such as torch.optim.SGD")
        super().__init__(params, dict(rho=rho, adaptive=adaptive))
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}
        self._link()
        self.same_draws = same_draws
        self.last = {}
        self._copies = {}  # parameter: memory for w + eps, kept from step to step since fresh memory is slow; during the climb it holds w
        self._moved = None  # the parameters at w + eps; None when no first_step is to be undone
        self._bad = self._accumulating = False

    def add_param_group(self, param_group):
        rho = param_group.get("rho", self.defaults["rho"])
        if not isinstance(rho, (int, float)) or not 0 <= rho < math.inf:
            raise ValueError(f"rho {rho!r} must be zero or a positive number, such as 0.05")
        super().add_param_group(param_group)  # the list is the base optimizer's, so it is added there too

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict):
        """Exact resume. A file of the base optimizer alone will do: rho and adaptive are then the constructor's."""
        self.base_optimizer.load_state_dict(state_dict)
        self._link()
        for group in self.param_groups:
            for key in ("rho", "adaptive"):
                group.setdefault(key, self.defaults[key])

    def __getstate__(self):  # deepcopy and pickle
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer, "same_draws": self.same_draws, "last": self.last}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._copies, self._moved, self._bad, self._accumulating = {}, None, False, False
        self._link()

    def _link(self):
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def zero_grad(self, set_to_none=True):
        if not self._accumulating:  # micro-batches of a list add up, also if each of their closures zeroes first
            super().zero_grad(set_to_none)

    # ------------------------------------------------------------------------ the two halves

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        """(1) or (3): from w to w + eps. A gradient that is not finite moves nothing, and second_step will skip."""
        if self._moved is not None:
            raise ValueError("first_step was called twice; call second_step after the second backward pass")
        groups, direction = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            along = [p.grad for p in params]
            if params and group["adaptive"]:  # (3) scales by w twice: here for the norm, below for the step
                along = torch._foreach_mul(along, params)
            groups.append((group, params, along))
            direction += along
        if not direction:
            raise ValueError("no parameter has a gradient; does the closure call loss.backward(), on these parameters?")
        norm = torch.nn.utils.get_total_norm(direction).item()
        self.last, self._bad, self._moved = dict(grad_norm=norm), not math.isfinite(norm), []
        for group, params, along in groups:
            if self._bad or not (params and group["rho"]):
                continue
            if group["adaptive"]:
                torch._foreach_mul_(along, params)
            uphill = -1 if group.get("maximize") else 1  # what is worst when the objective is to be large
            self._climb(params, along, uphill * group["rho"] / (norm + 1e-12))  # a zero gradient moves nothing
        if zero_grad:
            self.zero_grad()

    def _climb(self, params, along, scale):
        """w + eps is written beside w, and the two change places: w is not touched, and the way back costs nothing."""
        for p, direction in zip(params, along, strict=True):
            other = self._copies.get(p)
            if other is None or (other.shape, other.dtype, other.device) != (p.shape, p.dtype, p.device):
                other = self._copies[p] = torch.empty_like(p)
            torch.add(p, direction, alpha=scale, out=other)
        self._exchange(params)
        self._moved += params

    def _exchange(self, params):
        for p in params:
            p.data, self._copies[p] = self._copies[p], p.data

    @torch.no_grad()
    def restore(self):
        """Back from w + eps to w, bit for bit."""
        if self._moved is None:
            raise ValueError("there is no first_step to undo; call first_step after the first backward pass")
        self._exchange(self._moved)
        self._moved = None

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        """Back to w, then (2). Nothing is stepped on if a gradient of either half is not finite."""
        self.restore()
        self._base_step(self._bad)
        if zero_grad:
            self.zero_grad()

    def _base_step(self, skip):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise ValueError("no parameter has a gradient after the second pass; call loss.backward() in both")
        self.last["skipped"] = skip or not math.isfinite(torch.nn.utils.get_total_norm(grads).item())
        if not self.last["skipped"]:
            self.base_optimizer.step()
        self._opt_called = True  # where schedulers look; without it they warn if only the two halves were called

    # ------------------------------------------------------------------------ both at once

    def step(self, closure=None, model=None, sync_perturbation=False, split=False):
        """Both halves. Returns the loss of the first pass, at w.

        closure            zeroes gradients, computes the loss, calls backward(), returns the loss; it runs twice. Or a list of
                           closures, one per micro-batch: their gradients add up (divide the losses), then one common step;
                           they may call optimizer.zero_grad(), not model.zero_grad(), and only the last may clip
        model              the DistributedDataParallel module: its first pass stays local; without it both passes are averaged.
                           Also needed if a compiled model has BatchNorm
        sync_perturbation  average the gradient of the first pass over the processes too
        split              with a list: each micro-batch climbs on its own (m-sharpness on one device); without one it does nothing
        """
        if self._moved is not None:
            raise ValueError("step was called between first_step and second_step; call second_step, or restore, first")
        if closure is None:
            raise ValueError("SAM.step needs a closure that computes the loss and calls backward(), since it runs twice; or "
                             "call first_step and second_step yourself")
        closures = list(closure) if isinstance(closure, (list, tuple)) else [closure]
        if not closures or not all(map(callable, closures)):
            raise ValueError(f"closure must be a function without arguments, or a list of such, got {closure!r}")
        climbs = [[c] for c in closures] if split else [closures]
        parallel = hasattr(model, "no_sync")

        def run(closures, average):
            """The sum of their losses. Gradients travel between processes in the last backward pass, if average, else never."""
            total = 0.0
            for k, c in enumerate(closures, start=1):
                stay = parallel and not (average and k == len(closures))
                with model.no_sync() if stay else nullcontext(), torch.enable_grad():
                    loss = c()
                if not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
                    raise ValueError(f"the closure must return the loss, a tensor of one number, got {loss!r}")
                total = total + loss.detach()
            return total

        first, second, norms, bad = 0.0, 0.0, [], False
        grads = None  # (2) of the micro-batches so far, while the next one climbs
        self.zero_grad()
        self._accumulating = len(closures) > 1
        try:
            for k, together in enumerate(climbs, start=1):
                final = k == len(climbs)
                before = self._draws() if self.same_draws else None
                first = first + run(together, average=sync_perturbation)
                self.first_step()
                norms.append(self.last["grad_norm"])
                bad |= self._bad
                self._swap_grads(grads)
                if self.same_draws:
                    self._redraw(before)
                with batchnorm_held(model):
                    second = second + run(together, average=final)
                self.restore()
                grads = None if final else self._swap_grads(None)
        finally:
            self._accumulating = False
            if self._moved is not None:  # a closure raised: leave the weights as they were
                self.restore()
        self.last = dict(grad_norm=sum(norms) / len(norms), first_loss=float(first), second_loss=float(second))
        bad |= not math.isfinite(self.last["first_loss"] + self.last["second_loss"])
        if parallel:  # each process saw its own losses and first gradient: all of them step, or none
            votes = torch.tensor(float(bad), device=self.param_groups[0]["params"][0].device)  # a closure may return its loss on the CPU
            torch.distributed.all_reduce(votes, group=model.process_group)
            bad = votes.item() > 0
        self._base_step(bad)
        return first

    def _swap_grads(self, new):
        """Give every parameter another gradient (None: none) and return the present ones."""
        params = [p for group in self.param_groups for p in group["params"]]
        old = [p.grad for p in params]
        for p, grad in zip(params, new or [None] * len(params), strict=True):
            p.grad = grad
        return old

    def _draws(self):
        devices = {p.device for group in self.param_groups for p in group["params"] if p.device.type == "cuda"}
        return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    def _redraw(self, draws):
        torch.set_rng_state(draws[0])
        for device, state in draws[1].items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def batchnorm_held(model=None):
    """Inside, BatchNorm normalises by the batch as in training, but its running statistics do not move.

    Without a model it watches every BatchNorm that is called meanwhile (not seen inside a compiled model).
    """
    held = []

    def hold(module, *_):
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            module.track_running_stats = False
            held.append(module)

    handle = None
    if model is None:
        handle = register_module_forward_pre_hook(hold)
    else:
        for module in model.modules():
            hold(module)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for module in held:
            module.track_running_stats = True


if __name__ == "__main__":
    sharp, wide, rho = torch.tensor([-0.4, 0.3]), torch.tensor([1.2, 0.0]), 0.3

    def landscape(w):
        """A wide valley, and on the way to it a narrow crack: w (..., 2) -> height (...)."""
        def hole(at, width, depth):
            return depth * torch.exp(-(w - at).square().sum(dim=-1) / (2 * width**2))
        return 0.05 * w.square().sum(dim=-1) - hole(wide, 1.2, 1.2) - hole(sharp, 0.15, 1.0)

    def descend(make, steps=400):
        w = torch.tensor([-1.2, 0.0], requires_grad=True)
        optimizer, path = make([w]), [w.detach().clone()]

        def closure():
            optimizer.zero_grad()
            loss = landscape(w)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
            path.append(w.detach().clone())
        return torch.stack(path)

    sgd = dict(lr=0.01, momentum=0.9)
    paths = {"plain": descend(lambda params: torch.optim.SGD(params, **sgd)),
             "SAM": descend(lambda params: SAM(params, torch.optim.SGD, rho=rho, **sgd))}
    turn = torch.linspace(0, 2 * math.pi, 60)
    ring = rho * torch.stack([turn.cos(), turn.sin()], dim=1)
    for name, path in paths.items():
        end = path[-1]
        curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(landscape, end)).max()
        print(f"{name:5s} ends at ({end[0]:5.2f}, {end[1]:5.2f}): height {landscape(end):5.2f}, highest within rho "
              f"{landscape(end + ring).max():5.2f}, largest curvature {curvature:5.1f}")
    print("(expect: plain descent falls into the crack at (-0.4, 0.3); SAM passes it and settles in the wide valley at (1.1, 0.0))")
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install matplotlib")
    else:
        y, x = torch.meshgrid(torch.linspace(-0.8, 0.8, 200), torch.linspace(-1.5, 2.2, 400), indexing="ij")
        figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
        shades = axes.contourf(x, y, landscape(torch.stack([x, y], dim=-1)), levels=40, cmap="Greys_r")
        figure.colorbar(shades, label="height")
        for (name, path), colour in zip(paths.items(), ("tab:red", "tab:blue"), strict=True):
            axes.plot(*path.T, color=colour, label=name)
            axes.plot(*path[-1], "o", color=colour)
        axes.add_patch(plt.Circle(paths["SAM"][-1].tolist(), rho, fill=False, color="tab:blue", linestyle=":"))
        axes.set_title("the same start, the same step size: the crack is lower, the valley is flat (dotted: radius rho)", fontsize=9)
        axes.legend(loc="lower right")
        figure.savefig("sam_demo.png", dpi=110)
        print("saved sam_demo.png")
