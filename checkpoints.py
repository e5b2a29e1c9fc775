"""Checkpoints: published weights differ in names and sizes; translate both, then report.

The same 12 blocks come as MAE's flat dict, under MoCo v3's `module.base_encoder.`, or with BEiT's q and v
biases apart. Three steps bring a file into a model, and none of them is silent:

    read       tensors only; a file that would run code on loading is refused
    convert    recognize the layout by its keys, keep encoder and classifier, use the names of vit.py
    adapt      to the model's sizes: position tables and relative biases are images of offsets, so they
               are resampled like images (bicubic, align_corners=False, no antialias, as MAE and DeiT);
               rows of the class token are no part of the image and stay

Then it prints what was loaded, resized, skipped and missing, because load_state_dict(strict=False) says
nothing when no name matched. Less than 90 % of the encoder is an error, and so is a file that was trained
with parts the model lacks (BEiT's relative bias and layer scale).

No file shows the number of heads. ViT-S has 12 heads in MoCo v3 and MIRL, 6 in DeiT and timm; all shapes are
equal, and the wrong number loads without an error but computes something else. See FORMATS.

We differ: BEiT's own code resamples its bias at geometrically spaced offsets, here it is plain bicubic.
Written from the papers and published files' key lists; parameter names of BEiT and MixMIM were checked in
unilm's beit/modeling_pretrain.py, modeling_finetune.py and in models_mixmim.py.
Needs: torch, einops, torchvision; vit.py.
Demo: python checkpoints.py (5 s on a CPU) loads a MAE, a MoCo v3 and a BEiT file into ViTs of other sizes.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from vit import resample

FORMATS = {  # how each source was trained; nothing of this can be read from the tensors
    "MAE": "input ImageNet mean/std; heads B 12, L 16, H 16; fixed sin-cos positions, column first",
    "MAE or timm": "keys do not tell which: MAE and DeiT use ImageNet mean/std, timm's augreg weights mean/std 0.5; "
                   "heads Ti 3, S 6 (MoCo v3 and MIRL: 12), B 12, L 16",
    "timm": "layer scale as ls1, ls2; input mean/std differs by model, see its timm config",
    "DeiT distilled": "input ImageNet mean/std; heads Ti 3, S 6, B 12; the distillation token is left out",
    "MoCo v3": "input ImageNet mean/std; heads S 12, B 12; fixed sin-cos positions, row first",
    "BEiT": "input mean/std 0.5 by default in its code (a flag selects ImageNet's); heads B 12, L 16",
    "MIRL": "input ImageNet mean/std; heads S 12, B 12; fixed sin-cos positions, column first",
    "MixMIM": "input ImageNet mean/std; layer norm eps 1e-5",
    "torchvision": "a ResNet; input ImageNet mean/std",
    "ours": "input and heads as in the run's args.json",
}


class Report(NamedTuple):
    format: str  # a key of FORMATS
    loaded: list  # names in the model
    resized: list  # those of them that were resampled or changed their class-token row
    skipped: list  # encoder and classifier tensors of the file that do not fit the model
    missing: list  # names of the model that the file does not fill; they keep their values


def load_pretrained(model, path, verbose=True, grid=None, name=None):
    """Load a published checkpoint, or one of ours, into a model; print and return a Report.

    path  a file, or a state dict (or a checkpoint's whole dict) already read; name: its name in messages
    grid  (gh, gw) rows and columns of patches the file was trained with; only their ratio counts. By default
          the shape of args["img_size"] in our own checkpoints, else square, as all published files are

    The model's grid is model.grid_size. A head with another number of classes is not loaded, nor is fc_norm
    where the model pools the mean and the file has norm: both are reported. The position table is the file's,
    resampled; never rebuild it, since MoCo v3 and MAE order the sin-cos channels differently. No shape shows
    the heads: create_vit("vit_s16", num_heads=12) for MoCo v3 and MIRL, 6 for DeiT and timm.

    ValueError, before the model is changed, if the file is unreadable or does not fit.
    """
    # read
    is_file = not isinstance(path, dict)
    file = read_checkpoint(path) if is_file else path
    where = str(path) if is_file else name or "the state dict"
    tensors = find_tensors(file)
    if not tensors:
        keys = shorten(map(str, file))
        raise ValueError(f"{where} holds no tensors under {', '.join(CONTAINERS)} or at its top; keys: {keys}")

    # convert
    kind, state, dropped = convert(tensors)
    own_aspect = source_aspect(file)
    if own_aspect:
        kind = "ours"
    where = f"{where} [{kind}]"
    target = {key: value for key, value in model.state_dict().items() if not key.endswith(INDEX)}
    check_parts(state, target, where)
    copy_shared_bias(state, target)

    # adapt
    adapted, resized, skipped = adapt(model, state, target, grid or own_aspect, where)
    check_match(state, adapted, target, skipped, where)
    model.load_state_dict(adapted, strict=False)

    # report
    missing = [key for key in target if key not in adapted]
    if verbose:
        count = sum(value.numel() for value in adapted.values())
        rest = f"; not of the encoder: {shorten(dropped, 2)}" if dropped else ""
        print(
            f"loaded {len(adapted)} tensors ({count / 1e6:.3g} M parameters) from {where}; "
            f"resized: {shorten(resized.values()) or 'none'}; skipped: {shorten(skipped) or 'none'}; "
            f"missing: {shorten(missing) or 'none'}{rest}\n  {kind}: {FORMATS[kind]}"
        )
    return Report(kind, list(adapted), list(resized), skipped, missing)


# ---------------------------------------------------------------------------- convert

CONTAINERS = ("model", "state_dict", "module", "model_ema")  # the first that exists is read
INDEX = ("relative_position_index", "attn_mask")  # tables of constants, rebuilt by the model
NOT_ENCODER = (r"(decoder|mask_token|lm_head\.|norm_low\.|norm\d+\.|dist_token$|head_dist\.|momentum_encoder\.|predictor\.)"
               r"|.*(relative_position_index|attn_mask)$")
SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"
BLOCK_BIAS = r"blocks\.\d+\.attn\.relative_position_bias_table"
MARKS = {  # the first format with a key like this
    "MixMIM": r"layers\.\d+\.blocks\.",
    "BEiT": rf"blocks\.\d+\.attn\.q_bias|{BLOCK_BIAS}|rel_pos_bias\.",
    "MIRL": r"norm_low\.|decoder_embed0_1\.|mask_token\d",
    "DeiT distilled": r"dist_token$",
    "timm": r"blocks\.\d+\.ls1\.",
    "MAE": r"decoder_pred\.",
    "torchvision": r"layer1\.0\.conv1\.",
}


def has(names, pattern):
    return any(re.match(pattern, name) for name in names)


def find_tensors(file):
    """The state dict in a checkpoint's dict, without its container if it has one."""
    for key in CONTAINERS:
        if isinstance(file.get(key), dict):
            return find_tensors(file[key])
    return {key: value for key, value in file.items() if isinstance(key, str) and torch.is_tensor(value)}


def find_format(state):
    """-> (key of FORMATS, prefix of the encoder's names)."""
    if has(state, r"(backbone\.)?pyramid\."):
        raise ValueError("the checkpoint is of a detector or a segmentation network, whose tables were resized and "
                         "shared; use the checkpoint of the encoder that it started from")
    if has(state, r"base_encoder\."):
        return "MoCo v3", "base_encoder."
    if has(state, r"encoder\."):  # our pre-training models: MAE, MIRL, MixMIM around an encoder
        return "ours", "encoder."
    for kind, pattern in MARKS.items():
        if has(state, pattern):
            return kind, ""
    return "MAE or timm", ""


def convert(state_dict):
    """-> (format, state dict under our names, names left out because they are no part of encoder or classifier)."""
    state = {strip(key.replace("_orig_mod.", "")): value for key, value in state_dict.items()}
    kind, prefix = find_format(state)

    converted, dropped = {}, []
    for full, value in state.items():
        key = strip(full.removeprefix(prefix))
        projection = kind == "MoCo v3" and key.startswith("head")  # three layers, not a classifier
        if not full.startswith(prefix) or re.match(NOT_ENCODER, key) or projection:
            dropped.append(full)
        elif key.endswith("attn.q_bias"):  # BEiT: a bias on the keys cancels in the softmax, so it has none
            v_bias = state.get(full.replace("q_bias", "v_bias"))
            if v_bias is None:
                raise ValueError(f"the checkpoint has {full} without its v_bias; is the file complete?")
            k_bias = torch.zeros_like(value)
            converted[key.replace("q_bias", "qkv.bias")] = torch.cat([value, k_bias, v_bias])
        elif key == "pos_embed" and "dist_token" in state:  # rows: class, distillation, patches
            converted[key] = torch.cat([value[:, :1], value[:, 2:]], dim=1)
        elif not key.endswith("attn.v_bias"):
            converted[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)] = value
    return kind, converted, dropped


def strip(name):
    """Without the prefixes of DataParallel and AveragedModel."""
    return re.sub(r"^(module\.)+", "", name)


def convert_official(state_dict):
    """Encoder and classifier of any layout in FORMATS, under the names of vit.py (MixMIM: its own names).

    Decoders, mask tokens, momentum encoders, projection heads and index buffers are left out. Sizes stay as
    they are: load_pretrained adapts them to a model. Our own classifiers come back unchanged.
    """
    return convert(state_dict)[1]


def copy_shared_bias(state, target):
    """BEiT pre-trains one relative bias and fine-tunes a copy in every block."""
    if SHARED_BIAS in state and SHARED_BIAS not in target:
        table = state.pop(SHARED_BIAS)
        for name in target:
            if name.endswith("attn.relative_position_bias_table"):
                state[name] = table


# ---------------------------------------------------------------------------- adapt


def adapt(model, state, target, aspect, where):
    """The file's tensors in the model's sizes -> (adapted, what was resized by name, names skipped)."""
    adapted, resized, skipped = {}, {}, []
    for name, value in state.items():
        if name not in target or (name.startswith("head.") and value.shape != target[name].shape):
            skipped.append(name)
            continue
        table = ("pos_embed" in name and value.ndim == 3) or name.endswith("relative_position_bias_table")
        if table and value.shape[-1] == target[name].shape[-1]:
            grids = find_grids(model, state, name, aspect)
            value, change = resize_table(name, value, target[name], grids, aspect, where)
            if change:
                resized[name] = change
        adapted[name] = value
    return adapted, resized, skipped


def find_grids(model, state, name, aspect):
    """Grids of a table in the file and in the model, each (class-token rows, (gh, gw)), or None if unknown."""
    aspect = aspect or (1, 1)
    module = model.get_submodule(name.rpartition(".")[0])
    if "pos_embed" in name or not hasattr(module, "window"):
        new_table = model.state_dict()[name]
        return find_grid(name, state[name], aspect), find_grid(name, new_table, getattr(model, "grid_size", (1, 1)))

    # MixMIM: windows are cut to the map of their stage
    source, positions = None, state.get("absolute_pos_embed")
    first = find_grid("pos_embed", positions, aspect) if positions is not None and positions.ndim == 3 else None
    if first:
        stage = int(name.split(".")[1])
        height, width = first[1]
        source = find_window(len(state[name]), height // 2**stage, width // 2**stage)
    return source, (0, module.window)


def find_grid(name, table, aspect):
    """The grid that a table covers: (class-token rows, (gh, gw)), or None if no grid fits.

    aspect (height, width) is the image's shape up to scale; it makes the answer unique.
    """
    p, q = (side // math.gcd(*aspect) for side in aspect)
    if "pos_embed" in name:  # (1, gh gw, D), one row more with a class token
        for prefix in (0, 1):
            patches = table.shape[1] - prefix
            k = math.isqrt(patches // (p * q))
            if k and k * k * p * q == patches:
                return prefix, (k * p, k * q)
        return None
    # BEiT: (2 gh - 1)(2 gw - 1) offsets, then cls-token, token-cls, cls-cls
    for k in range(1, len(table) + 1):
        if (2 * k * p - 1) * (2 * k * q - 1) == len(table) - 3:
            return 3, (k * p, k * q)
    return None


def find_window(rows, height, width):
    """MixMIM's windows are k x k, cut to the map (height, width): (0, (wh, ww)) with this many rows, or None."""
    for k in range(1, max(height, width) + 1):
        wh, ww = min(k, height), min(k, width)
        if (2 * wh - 1) * (2 * ww - 1) == rows:
            return 0, (wh, ww)
    return None


def resize_table(name, table, target, grids, aspect, where):
    """A position or bias table in the target's size -> (table, what was changed, or None)."""
    source, wanted = grids
    is_position = "pos_embed" in name
    rows, new_rows = (value.shape[1 if is_position else 0] for value in (table, target))
    same = rows == new_rows
    if source == wanted and source or same and (wanted is None or source is None and aspect is None):
        return table, None  # either the same grid, or an unknown one of the right size
    if source is None or wanted is None:
        raise ValueError(
            f"{name} has {rows} rows in {where} and {new_rows} in the model, and no grid fits the "
            f"{'file' if source is None else 'model'}'s; pass grid=(gh, gw), the rows and columns of patches "
            "the file was trained with"
        )
    (extra, old), (new_extra, new) = source, wanted
    if same and aspect is None:
        raise ValueError(
            f"{name} of {where} fits both a {old[0]}x{old[1]} and the model's {new[0]}x{new[1]} patches; pass "
            f"grid={old} or grid={new}, whichever the file was trained with"
        )

    if is_position:  # (1, extra + gh gw, D)
        head = table[0, :new_extra].float()
        if new_extra > extra:
            head = torch.zeros_like(table[0, :new_extra]).float()
        resized = torch.cat([head, resample(table[0, extra:], old, new)])[None]
    else:  # ((2 gh - 1)(2 gw - 1) + extra, heads)
        old_offsets, new_offsets = ((2 * gh - 1, 2 * gw - 1) for gh, gw in (old, new))
        last = rows - extra
        tail = table[last:].float()[:new_extra]
        resized = torch.cat([resample(table[:last], old_offsets, new_offsets), tail])
    change = f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    if extra != new_extra:
        change += ", class row " + ("dropped" if extra > new_extra else "added as zeros")
    return resized, change


# ---------------------------------------------------------------------------- what does not fit


def check_parts(state, target, where):
    """A position table, relative bias or layer scale on one side only would change what the network computes."""
    parts = {
        "relative position bias": rf"rel_pos_bias\.|{BLOCK_BIAS}",
        "layer scale": r"blocks\.\d+\.gamma_",
        "position table": "pos_embed$",
    }
    bias, scale, pos = (has(state, part) for part in parts.values())
    faults = [f"the model has no {name}" for name, part in parts.items() if has(state, part) and not has(target, part)]
    if bias and not pos and has(target, "pos_embed$"):
        faults.append("the file has no position table")
    if has(state, BLOCK_BIAS) and has(target, r"rel_pos_bias\."):
        faults.append("the file has one relative position bias per block, the model shares one")
    if not faults or not has(target, r"blocks\.0\."):
        return

    options = []
    if bias:
        options.append('rel_pos_bias="block"' + ("" if has(state, BLOCK_BIAS) else ' (or "shared")'))
    if scale:
        options.append("layer_scale=0.1")
    options.append('pos_embed="learned"' if pos else "pos_embed=None")
    raise ValueError(f"{where} does not fit: {', '.join(faults)}; build the model with {', '.join(options)}")


def check_match(state, adapted, target, skipped, where):
    """Most of the encoder must be in the file, in the same shapes, and no part of a block may be left over."""
    encoder = [name for name in target if not name.startswith(("head.", "fc_norm.", "norm."))]
    absent = [name for name in encoder if name not in adapted]
    if len(absent) > 0.1 * len(encoder):
        raise ValueError(
            f"{where} has only {len(encoder) - len(absent)} of the model's {len(encoder)} encoder tensors: the model "
            f"wants {', '.join(absent[:5])}, the file has {shorten(skipped, 5) or 'nothing else'}; build the model "
            "in the file's size, or rename the file's keys"
        )
    for name, value in adapted.items():
        if value.shape != target[name].shape:
            patch = state.get("patch_embed.proj.weight", torch.empty(0))
            sizes = "embed_dim={}, in_chans={}, patch_size={}, ".format(*patch.shape[:3]) if patch.ndim == 4 else ""
            raise ValueError(
                f"{name} is {tuple(value.shape)} in {where} but {tuple(target[name].shape)} in the model; build "
                f"the model in the file's sizes: {sizes}and its mlp_ratio and num_heads"
            )
    extra = [name for name in skipped if re.match(r"(layers\.\d+\.)?blocks\.", name)]
    if extra:
        raise ValueError(
            f"{where} has parts of blocks that the model lacks ({shorten(extra)}); build the model with the file's "
            "depth, or delete them from the state dict if you want the first blocks only"
        )


def shorten(names, limit=4):
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def source_aspect(file):
    """(height, width) of the images that one of our own checkpoints was trained with, else None."""
    args = file["args"] if isinstance(file.get("args"), dict) else {}  # other codes save a Namespace
    size = args.get("img_size")
    return (size, size) if isinstance(size, int) else size and tuple(size)


def encoder_options(file):
    """Keyword arguments with which a ViT has the parts and tables of a file: patch_size, img_size, pos_embed,
    rel_pos_bias, layer_scale, where known. The preset gives heads, depth and width.

    file  what read_checkpoint returns
    """
    state = convert(find_tensors(file))[1]
    options = {}
    first_bias = "blocks.0.attn.relative_position_bias_table"
    if SHARED_BIAS in state:
        options["rel_pos_bias"] = "shared"
    elif first_bias in state:
        options["rel_pos_bias"] = "block"
    if options and "pos_embed" not in state:
        options["pos_embed"] = None
    if "blocks.0.gamma_1" in state:
        options["layer_scale"] = 0.1  # loading replaces it by the file's values

    patch = state.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4 and patch.shape[2] == patch.shape[3]:
        options["patch_size"] = patch.shape[2]
        name = next((name for name in ("pos_embed", SHARED_BIAS, first_bias) if name in state), None)
        grid = find_grid(name, state[name], source_aspect(file) or (1, 1)) if name else None
        if grid:
            options["img_size"] = tuple(side * patch.shape[2] for side in grid[1])
    return options


# ---------------------------------------------------------------------------- read


def read_checkpoint(path):
    """The dict in a file, as it was saved; tensors on the CPU. ValueError if the file cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a directory or does not exist; pass the checkpoint file, nothing is downloaded")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            file = load_file(path)
        else:
            # MAE and DeiT save their argparse.Namespace beside the weights; it is plain data, so it is allowed
            with torch.serialization.safe_globals([argparse.Namespace]):
                file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk bytes can raise nearly anything
        raise ValueError(f"{path} {explain(path, error)}") from error
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not a dict of tensors; save model.state_dict()")
    return file


def explain(path, error):
    """Why a file could not be read, and what to do."""
    if isinstance(error, ImportError):
        return "needs the safetensors package; pip install safetensors"
    if path.suffix in (".npz", ".npy"):
        return ("is a Flax / NumPy file; load it with timm (create_model(..., checkpoint_path=...)) and torch.save the "
                "model's state_dict()")
    with path.open("rb") as stream:
        head = stream.read(4096)
    if not head:
        return "is empty; download or copy it again"
    plain_pickle = re.match(rb"\x80[\x02-\x05](?!\x8a\x0a)", head)  # torch.save's have a magic number, or are zips
    if path.suffix in (".pdparams", ".pdopt") or plain_pickle and re.search(b"numpy|paddle", head):
        return ("is a Paddle pickle; load it in Paddle, turn each array into a torch tensor, transpose the Linear "
                "weights to [out, in], and torch.save the dict")
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign or plain_pickle:
        objects = foreign[1] if foreign else "a plain pickle"
        return (f"holds Python objects ({objects}) that could run code on loading, so it was not loaded; if you trust "
                "its source, save its tensors alone to a new file")
    return f"is not a readable checkpoint ({type(error).__name__}), perhaps cut short; download or copy it again"


if __name__ == "__main__":
    import tempfile

    from vit import ViT

    torch.manual_seed(0)
    small = dict(patch_size=4, embed_dim=32, depth=2, num_heads=2)
    trained = ViT(img_size=16, num_classes=0, **small).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.weight": torch.zeros(48, 16)}
    moco = {f"module.base_encoder.{name}": value for name, value in trained.items()}
    moco |= {f"module.momentum_encoder.{name}": value for name, value in trained.items()}
    beit = ViT(img_size=16, num_classes=0, pos_embed=None, rel_pos_bias="shared", layer_scale=0.1, **small).state_dict()
    for i in range(2):
        bias = beit.pop(f"blocks.{i}.attn.qkv.bias")
        beit[f"blocks.{i}.attn.q_bias"], _, beit[f"blocks.{i}.attn.v_bias"] = bias.chunk(3)

    print("a MAE file into a classifier of another size that pools the mean: fc_norm and head are not loaded")
    model = ViT(img_size=(8, 24), num_classes=10, pool="mean", **small)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": trained | decoder}, Path(folder, "mae.pth"))
        load_pretrained(model, Path(folder, "mae.pth"))
    print(f"  1 + 16 positions became {model.pos_embed.shape[1]} (expect 1 + 2 x 6 = 13)\n")

    print("a MoCo v3 file into a ViT of its own size: every tensor bit for bit")
    model = ViT(img_size=16, num_classes=0, **small)
    load_pretrained(model, {"state_dict": moco})
    equal = all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    print(f"  equal: {equal} (expect True)\n")

    print("a BEiT file: q and v biases joined, the shared relative bias copied to each block and resampled")
    model = ViT(img_size=24, num_classes=0, pos_embed=None, rel_pos_bias="block", layer_scale=0.1, **small)
    load_pretrained(model, beit)
    rows = len(model.blocks[0].attn.relative_position_bias_table)
    print(f"  bias table of 7 x 7 + 3 rows -> {rows} (expect 11 x 11 + 3 = 124)\n")

    print("the same file into a plain ViT is refused:")
    try:
        load_pretrained(ViT(img_size=16, num_classes=0, **small), beit)
    except ValueError as error:
        print(f"  ValueError: {error}")
