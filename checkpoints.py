"""Checkpoints: published weights differ in names and sizes; translate both, then report.

The same 12 blocks come as MAE's flat dict, under MoCo v3's `module.base_encoder.`, or with BEiT's q and v
biases apart. Three steps bring a file into a model:

    read       tensors only; a file that would run code on loading is refused
    convert    recognize the layout by its keys, keep encoder and classifier, use the names of vit.py
    adapt      to the model's sizes: position tables and relative biases are images of offsets, so they
               are resampled like images (bicubic, align_corners=False, no antialias, as MAE and DeiT)

Then it prints what was loaded, resized, skipped and missing, because load_state_dict(strict=False) says
nothing when no name matched. Less than 90 % of the encoder is an error, and so is a file with parts that the
model lacks (BEiT's relative bias, layer scale). No file shows the number of heads, and the wrong one loads
without an error but computes something else: see FORMATS.

We differ: BEiT's own code resamples its bias at geometrically spaced offsets, here it is plain bicubic.
Written from the papers and published files' key lists; names of BEiT and MixMIM were checked in their code.
Needs: torch, torchvision, einops; vit.py.
Demo: python checkpoints.py (5 s on a CPU) loads a MAE and a BEiT file into ViTs of other sizes.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vit import resample, resize_pos_embed

FORMATS = {  # how each source was trained; nothing of this can be read from the tensors
    "MAE": "input ImageNet mean/std; heads B 12, L 16, H 16; fixed sin-cos positions, column first",
    "MAE or timm": "same keys: MAE and DeiT use ImageNet mean/std, timm's augreg weights mean/std 0.5; "
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

    A head with another number of classes is not loaded, nor is fc_norm where the model pools the mean and the
    file has norm: both are reported. The position table is the file's, resampled; never rebuild it, since
    MoCo v3 and MAE order the sin-cos channels differently. No shape shows the number of heads:
    create_vit("vit_s16", num_heads=12) for MoCo v3 and MIRL, 6 for DeiT and timm.
    """
    # read
    file, where = path, name or "the state dict"
    if not isinstance(path, dict):
        file, where = read_checkpoint(path), str(path)
    tensors = find_tensors(file)
    if not tensors:
        keys = shorten(map(str, file))
        raise ValueError(f"{where} holds no tensors at its top or under {CONTAINERS}; keys: {keys}")

    # convert
    kind, state, dropped = convert(tensors)
    own_aspect = source_aspect(file)
    kind = "ours" if own_aspect else kind
    where = f"{where} [{kind}]"
    target = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith(INDEX)}
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
        print(f"loaded {len(adapted)} tensors ({count / 1e6:.3g} M parameters) from {where}; resized: "
              f"{shorten(resized.values())}; skipped: {shorten(skipped)}; missing: {shorten(missing)}; "
              f"not of the encoder: {shorten(dropped, 2)}\n  {kind}: {FORMATS[kind]}")
    return Report(kind, list(adapted), list(resized), skipped, missing)


CONTAINERS = ("model", "state_dict", "module", "model_ema")  # the first that exists is read
WRAPPER = r"^(module\.)+"  # DataParallel, AveragedModel
INDEX = ("relative_position_index", "attn_mask")  # tables of constants, rebuilt by the model
NOT_ENCODER = (r"(decoder|mask_token|lm_head\.|norm_low\.|norm\d+\.|dist_token$|head_dist\.|momentum_encoder\."
               r"|predictor\.)|.*(relative_position_index|attn_mask)$")
SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"
BLOCK_BIAS = r"blocks\.\d+\.attn\.relative_position_bias_table"
PREFIXES = {"MoCo v3": "base_encoder.", "ours": "encoder."}
MARKS = {  # the first format with a key like this
    "MoCo v3": r"base_encoder\.",
    "ours": r"encoder\.",  # MAE, MIRL, MixMIM around an encoder
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
        raise ValueError("the checkpoint is of a detector or segmentation network with resized tables; "
                         "use the checkpoint of the encoder that it started from")
    for kind, pattern in MARKS.items():
        if has(state, pattern):
            return kind, PREFIXES.get(kind, "")
    return "MAE or timm", ""


def convert(state_dict):
    """-> (format, state dict under our names, names left out: not of encoder or classifier)."""
    state = {}
    for key, value in state_dict.items():
        state[re.sub(WRAPPER, "", key.replace("_orig_mod.", ""))] = value
    kind, prefix = find_format(state)
    converted, dropped = {}, []
    for full, value in state.items():
        key = re.sub(WRAPPER, "", full.removeprefix(prefix))
        projection = kind == "MoCo v3" and key.startswith("head")  # three layers, not a classifier
        if not full.startswith(prefix) or re.match(NOT_ENCODER, key) or projection:
            dropped.append(full)
        elif key.endswith("attn.q_bias"):  # BEiT: a bias on the keys cancels in the softmax, so it has none
            v_bias = state.get(full.replace("q_bias", "v_bias"))
            if v_bias is None:
                raise ValueError(f"the checkpoint has {full} without its v_bias; is the file complete?")
            key = key.replace("q_bias", "qkv.bias")
            converted[key] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif key == "pos_embed" and "dist_token" in state:  # rows: class, distillation, patches
            converted[key] = torch.cat([value[:, :1], value[:, 2:]], dim=1)
        elif not key.endswith("attn.v_bias"):
            converted[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)] = value
    return kind, converted, dropped


def convert_official(state_dict):
    """Encoder and classifier of any layout in FORMATS, in the file's sizes, under the names of vit.py."""
    return convert(state_dict)[1]


def copy_shared_bias(state, target):
    """BEiT pre-trains one relative bias and fine-tunes a copy in every block."""
    if SHARED_BIAS in state and SHARED_BIAS not in target:
        copies = [name for name in target if re.match(BLOCK_BIAS, name)]
        state |= dict.fromkeys(copies, state.pop(SHARED_BIAS))


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
    """Grids of a table in the file and in the model, each (class-token rows, (gh, gw)) or None."""
    aspect = aspect or (1, 1)
    module = model.get_submodule(name.rpartition(".")[0])
    if "pos_embed" in name or not hasattr(module, "window"):
        wanted = find_grid(name, model.state_dict()[name], getattr(model, "grid_size", (1, 1)))
        return find_grid(name, state[name], aspect), wanted
    # MixMIM: windows are cut to the map of their stage
    source, positions = None, state.get("absolute_pos_embed")
    first = None if positions is None else find_grid("pos_embed", positions, aspect)
    if first:
        height, width = first[1]
        scale = 2 ** int(name.split(".")[1])  # layers.STAGE.blocks...
        source = find_window(len(state[name]), height // scale, width // scale)
    return source, (0, module.window)


def find_grid(name, table, aspect):
    """The grid that a table covers: (class-token rows, (gh, gw)), or None; aspect makes the answer unique."""
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
    """MixMIM's windows are k x k, cut to the map: the (0, (wh, ww)) with this many rows, or None."""
    for k in range(1, max(height, width) + 1):
        wh, ww = min(k, height), min(k, width)
        if (2 * wh - 1) * (2 * ww - 1) == rows:
            return 0, (wh, ww)
    return None


def resize_table(name, table, target, grids, aspect, where):
    """A position or bias table in the target's size -> (table, what was changed, or None)."""
    source, wanted = grids
    axis = 1 if "pos_embed" in name else 0
    rows, new_rows = table.shape[axis], target.shape[axis]
    unknown = wanted is None or source is None and aspect is None
    same = source is not None and source == wanted
    if same or unknown and rows == new_rows:
        return table, None  # the same grid, or an unknown one with the right number of rows
    if source is None or wanted is None:
        raise ValueError(f"{name} has {rows} rows in {where}, {new_rows} in the model, and one fits no grid; "
                         "pass grid=(gh, gw), the patches the file was trained with")
    (extra, old), (new_extra, new) = source, wanted
    change = f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    if rows == new_rows and aspect is None:
        raise ValueError(f"{change} in {where} is a guess from the number of rows alone; pass grid={old} or "
                         f"grid={new}, whichever the file was trained with")

    table = table.float()
    if axis == 0:  # ((2 gh - 1)(2 gw - 1) + extra, heads)
        offsets = rows - extra
        old, new = ((2 * gh - 1, 2 * gw - 1) for gh, gw in (old, new))
        return torch.cat([resample(table[:offsets], old, new), table[offsets:]]), change
    # (1, extra + gh gw, D)
    if new_extra > extra:
        table = F.pad(table, (0, 0, 1, 0))
        change += ", class row added as zeros"
    elif new_extra < extra:
        table = table[:, 1:]
        change += ", class row dropped"
    return resize_pos_embed(table, old, new, new_extra), change


def check_parts(state, target, where):
    """A position table, relative bias or layer scale on one side only would change what is computed."""
    parts = {
        "relative position bias": rf"rel_pos_bias\.|{BLOCK_BIAS}",
        "layer scale": r"blocks\.\d+\.gamma_",
        "position table": "pos_embed$",
    }
    bias, scale, pos = (has(state, part) for part in parts.values())
    lacking = [name for name, part in parts.items() if has(state, part) and not has(target, part)]
    faults = [f"the model has no {name}" for name in lacking]
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
    """Most of the encoder must be there, in the same shapes, and no part of a block may be left over."""
    encoder = [name for name in target if not name.startswith(("head.", "fc_norm.", "norm."))]
    absent = [name for name in encoder if name not in adapted]
    if len(absent) > 0.1 * len(encoder):
        raise ValueError(f"{where} lacks {len(absent)} of the model's {len(encoder)} encoder tensors, as "
                         f"{', '.join(absent[:5])}; the file has {shorten(skipped, 5)}; rename its keys, or "
                         "build the model in its size")
    for name, value in adapted.items():
        if value.shape != target[name].shape:
            shape, new_shape = tuple(value.shape), tuple(target[name].shape)
            raise ValueError(f"{name} is {shape} in {where}, {new_shape} in the model; build it with the "
                             "file's embed_dim, in_chans, patch_size, mlp_ratio and num_heads")
    extra = [name for name in skipped if re.match(r"(layers\.\d+\.)?blocks\.", name)]
    if extra:
        raise ValueError(f"{where} has parts of blocks that the model lacks ({shorten(extra)}); build it "
                         "with the file's depth, or delete them from the dict to load the first blocks only")


def shorten(names, limit=4):
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def source_aspect(file):
    """(height, width) of the images that one of our own checkpoints was trained with, else None."""
    args = file.get("args")  # other codes save a Namespace
    size = args.get("img_size") if isinstance(args, dict) else None
    return (size, size) if isinstance(size, int) else size and tuple(size)


def encoder_options(file):
    """Keyword arguments for a ViT with the parts and tables of a file, as read_checkpoint returns it."""
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
        for name in ("pos_embed", SHARED_BIAS, first_bias):
            grid = find_grid(name, state[name], source_aspect(file) or (1, 1)) if name in state else None
            if grid:
                options["img_size"] = tuple(side * patch.shape[2] for side in grid[1])
    return options


def read_checkpoint(path):
    """The dict in a file, as it was saved; tensors on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is a directory; pass a file, nothing is downloaded")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            file = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # plain data of MAE and DeiT
                file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk bytes can raise nearly anything
        raise ValueError(f"{path} {explain(path, error)}") from error
    if isinstance(file, dict):
        return file
    raise ValueError(f"{path} holds a {type(file).__name__}, not a dict; save model.state_dict()")


def explain(path, error):
    """Why a file could not be read, and what to do."""
    if isinstance(error, ImportError):
        return "needs the safetensors package; pip install safetensors"
    if path.suffix in (".npz", ".npy"):
        return "is a Flax / NumPy file; load it with timm and torch.save the model's state_dict()"
    if path.stat().st_size == 0:
        return "is empty; download or copy it again"
    with path.open("rb") as stream:
        head = stream.read(4096)
    plain_pickle = re.match(rb"\x80[\x02-\x05](?!\x8a\x0a)", head)  # torch.save adds a number, or a zip
    if path.suffix in (".pdparams", ".pdopt") or plain_pickle and re.search(b"numpy|paddle", head):
        return ("is a Paddle pickle; load it in Paddle, turn each array into a torch tensor, transpose the "
                "Linear weights to [out, in], and torch.save the dict")
    if plain_pickle or "GLOBAL" in str(error):
        return ("holds Python objects that could run code on loading, so it was not loaded; if you trust its "
                "source, save its tensors alone to a new file")
    return f"is not a readable checkpoint ({type(error).__name__}), perhaps cut short; copy it again"


if __name__ == "__main__":
    import tempfile

    from vit import ViT

    small = dict(patch_size=4, embed_dim=32, depth=2, num_heads=2)
    beit = dict(pos_embed=None, layer_scale=0.1, num_classes=0, **small)
    trained = ViT(img_size=16, num_classes=0, **small).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.weight": torch.zeros(48, 16)}
    published = ViT(img_size=16, rel_pos_bias="shared", **beit).state_dict()
    for i in range(2):
        q, _, v = published.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        published |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}

    print("a MAE file into a classifier of another size that pools the mean: fc_norm and head are not loaded")
    model = ViT(img_size=(8, 24), num_classes=10, pool="mean", **small)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": trained | decoder}, f"{folder}/mae.pth")
        load_pretrained(model, f"{folder}/mae.pth")
    print(f"  1 + 16 positions became {model.pos_embed.shape[1]} (expect 1 + 2 x 6 = 13)\n")

    print("a BEiT file: q and v biases joined, the shared relative bias copied to each block and resampled")
    model = ViT(img_size=24, rel_pos_bias="block", **beit)
    load_pretrained(model, published)
    rows = len(model.blocks[0].attn.relative_position_bias_table)
    print(f"  bias table of 7 x 7 + 3 rows -> {rows} (expect 11 x 11 + 3 = 124)")
