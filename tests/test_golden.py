"""Our models, given the parameters of the official codes, give the official numbers."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import mae
import mirl
import mixmim
from golden_inputs import (
    TOLERANCE,
    assert_agree,
    compare_grads,
    compare_tensor,
    first_values,
    golden_cases,
    image_batch,
    load_case,
    masking_noise,
    official_state,
    parameter,
    relative,
)
from mae import MAE
from masking import choose_patches, enlarge_mask
from mirl import MIRL
from mixmim import HierarchicalViT, MixMIM, create_mixmim
from vit import ViT, create_vit

CASES = golden_cases("mae_", "mirl_", "mixmim_", "vit_")
FILLED = {name: load_case(name) for name in CASES}
PRETRAINING = [name for name in CASES if "pretrain" in FILLED[name]["kind"]]
FINETUNING = [name for name in CASES if name not in PRETRAINING]
MIXMIM = golden_cases("mixmim_")
DTYPES = [torch.float32, torch.float64]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
every_case = pytest.mark.parametrize("name", CASES)
every_pretraining_case = pytest.mark.parametrize("name", PRETRAINING)
every_mixmim_case = pytest.mark.parametrize("name", MIXMIM)


def build(case):
    """Our model of a case, and the function from official to our names."""
    config = case["config"]
    if case["kind"].startswith("mixmim"):
        assert config["layer_norm_eps"] == 1e-5 and config["qkv_bias"] and config["patch_norm"]
        keys = ("img_size", "patch_size", "in_chans", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")
        encoder = HierarchicalViT(**{key: config[key] for key in keys}, num_classes=config.get("num_classes", 0))
        if case["kind"] == "mixmim_finetune":
            return encoder, mixmim.convert_official
        return MixMIM(
            encoder,
            config["decoder_dim"],
            config["decoder_depth"],
            config["decoder_num_heads"],
            config["norm_pix_loss"],
        ), mixmim.convert_official
    assert config["layer_norm_eps"] == 1e-6
    sizes = {
        key: config[key]
        for key in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
    }
    if case["kind"] == "vit_finetune":
        pool = "mean" if config["global_pool"] else "cls"
        return ViT(**sizes, num_classes=config["num_classes"], pool=pool), dict
    decoder = {key: config[key] for key in ("decoder_depth", "decoder_num_heads")}
    if case["kind"] == "mae_pretrain":
        return MAE(
            ViT(**sizes),
            decoder_embed_dim=config["decoder_embed_dim"],
            norm_pix_loss=config["norm_pix_loss"],
            **decoder,
        ), mae.convert_official
    widths, step = config["decoder_embed_dims"], config["depth"] // len(config["decoder_embed_dims"])
    assert len(set(widths)) == 1 and config["out_indices"] == [step * k - 1 for k in range(1, len(widths))]
    return MIRL(
        ViT(**sizes),
        segments=len(widths),
        decoder_embed_dim=widths[0],
        weight_norm_pred=config["weight_norm_pred"],
        **decoder,
    ), mirl.convert_official


@functools.lru_cache(maxsize=None)
def load(name, dtype):
    """The filled model, and official name -> our name."""
    case = FILLED[name]
    model, convert = build(case)
    shapes = {p["name"]: torch.empty(p["shape"], device="meta") for p in case["params"]}
    ours = dict(zip(shapes, convert(shapes), strict=True))
    own = model.state_dict()
    model.load_state_dict(convert(official_state(case, lambda fixed: own[ours[fixed]])), strict=True)
    return model.to(dtype), ours


@functools.lru_cache(maxsize=None)
def results(name, dtype):
    """One forward and backward pass in training mode -> everything the JSON files speak of."""
    case = FILLED[name]
    model, ours = load(name, dtype)
    imgs = image_batch(case["input"]["batch"], case["config"]["img_size"]).to(dtype)
    seen = {}

    def watch(module, key, give_input=False):
        module.register_forward_hook(
            lambda _, inputs, output: seen.update({key: inputs[0] if give_input else output})
        )

    result = SimpleNamespace(terms={}, logits=None, mask=None, tensors=seen)
    model.train()
    if name in MIXMIM:
        encoder = getattr(model, "encoder", model)
        watch(encoder.patch_embed, "patch_embed")
        for k, stage in enumerate(encoder.layers, start=1):
            watch(stage.downsample or stage, f"stage{k}")
    if name in FINETUNING:
        watch(model.head, "feature", give_input=True)
        result.logits = model(imgs)
        result.loss = F.cross_entropy(result.logits, torch.tensor(case["input"]["labels"]))
    else:
        watch(model.encoder.norm, "latent")
        for k, norm in enumerate(getattr(model, "norms", [])):
            watch(norm, f"feat{k - 1}" if k else "low_feat")
        noise = torch.tensor(case["noise"], dtype=torch.float64)
        if name in MIXMIM:
            watch(model.decoder_pred, "x_rec")
            noise = noise.squeeze(0)  # one row for the batch
        out = model(imgs, mask_ratio=case["config"]["mask_ratio"], noise=noise)
        result.loss, result.mask = out.loss, out.mask
        if case["kind"] == "mae_pretrain":
            seen["pred"] = out.pred
        elif case["kind"] == "mirl_pretrain":
            last = len(out.pred) - 1
            seen.update({f"pred{k}": pred for k, pred in enumerate(out.pred)})
            seen.update({f"pred{j}+pred{last - j}": out.pred[j] + out.pred[last - j] for j in range(len(out.pairs))})
            result.terms = {f"pair{j}_{last - j}": pair for j, pair in enumerate(out.pairs)}
    for key, seen_map in seen.items():
        if seen_map.ndim == 4:
            seen[key] = seen_map.flatten(1, 2)  # (B, h, w, D) -> (B, N, D)
    result.loss.backward()
    parameters = dict(model.named_parameters())
    result.grads = {name: parameters[key].grad for name, key in ours.items() if parameters[key].requires_grad}
    return result


def reference(name, dtype):
    """The block of the JSON and the tolerances that belong to a dtype."""
    case = FILLED[name]
    return (case["float64"], TOLERANCE["float64"]) if dtype == torch.float64 else (case, TOLERANCE[case["fill_rule"]])


# ---------------------------------------------------------------------------- the inputs are the described ones


@every_case
def test_filled_parameters_have_the_stored_norms_and_first_values(name):
    case = FILLED[name]
    for p in case["params"]:
        if p["fill"] != "fixed":
            value = parameter(p["name"], p["shape"], p["fill"], case["fill_rule"]).double()
            assert value.norm().item() == pytest.approx(p["l2"], rel=1e-8)
            assert value.flatten()[:2].tolist() == pytest.approx(p["first"], rel=1e-8, abs=1e-12)


@every_case
def test_the_image_batch_has_the_stored_values(name):
    case = FILLED[name]
    imgs = image_batch(case["input"]["batch"], case["config"]["img_size"])
    off = compare_tensor("image", imgs, case["input"]["image"], dict(statistics=1e-9, slices=1e-9))
    assert_agree(off)


@every_pretraining_case
def test_the_noise_formula_gives_the_stored_noise(name):
    stored = torch.tensor(FILLED[name]["noise"])
    torch.testing.assert_close(masking_noise(*stored.shape, FILLED[name]["seed"]), stored, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [*PRETRAINING, *(name for name in FINETUNING if name in MIXMIM)])
def test_our_sincos_tables_are_the_official_ones(name):
    case = FILLED[name]
    model, ours = load(name, torch.float32)
    off = {}
    for key, entry in case["fixed"].items():
        off |= compare_tensor(key, model.state_dict()[ours[key]], entry, TOLERANCE["hash"])
    assert_agree(off)
    fixed = [p for p in case["params"] if p["fill"] == "fixed"]
    assert fixed
    for p in fixed:
        table = dict(model.named_parameters())[ours[p["name"]]]
        assert not table.requires_grad
        assert list(table.shape) == p["shape"]
        assert table.double().norm().item() == pytest.approx(p["l2"], rel=1e-7)


@every_mixmim_case
def test_our_relative_position_indices_are_the_official_ones(name):
    encoder = load(name, torch.float32)[0]
    buffers = dict(getattr(encoder, "encoder", encoder).named_buffers())
    assert set(buffers) == set(FILLED[name]["integer_buffers"])
    for key, entry in FILLED[name]["integer_buffers"].items():
        assert list(buffers[key].shape) == entry["shape"] and buffers[key].sum() == entry["sum"]
        assert (
            buffers[key][0, :8].tolist() == entry["first_row"] and buffers[key][-1, :8].tolist() == entry["last_row"]
        )


@every_mixmim_case
def test_an_official_file_with_its_index_tables_loads_strictly(name):
    case, (model, ours) = FILLED[name], load(name, torch.float32)
    own = model.state_dict()
    official = official_state(case, lambda fixed: own[ours[fixed]])
    tables = {key: torch.zeros(entry["shape"], dtype=torch.long) for key, entry in case["integer_buffers"].items()}
    fresh, convert = build(case)
    fresh.load_state_dict(convert(official | tables), strict=True)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in own.items())


# ---------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", [name for name in PRETRAINING if name in MIXMIM])
@both_dtypes
def test_the_mixing_mask_of_every_stage_is_exactly_the_official_one(name, dtype):
    case, mask = FILLED[name], results(name, dtype).mask
    assert mask.tolist() == [np.ravel(case["mask"]).tolist()] * 4
    stages = [enlarge_mask(mask[0].view(4, 4), 8 // 2**k).tolist() for k in range(4)]
    assert stages == [case["stage_masks"][f"s{k + 1}_stride{4 * 2**k}"] for k in range(4)]


@pytest.mark.parametrize("name", [name for name in PRETRAINING if name not in MIXMIM])
@both_dtypes
def test_the_mask_is_exactly_the_official_one(name, dtype):
    case, config = FILLED[name], FILLED[name]["config"]
    assert torch.equal(results(name, dtype).mask, torch.tensor(case["mask"]).float())
    imgs = image_batch(case["input"]["batch"], config["img_size"])
    split = choose_patches(
        imgs, imgs.shape[-2:], config["patch_size"], config["mask_ratio"], noise=torch.tensor(case["noise"])
    )
    assert split.ids_restore.tolist() == case["ids_restore"]
    assert torch.equal(split.mask, torch.tensor(case["mask"]).float())


@every_case
@both_dtypes
def test_the_loss_and_its_terms_are_the_official_ones(name, dtype):
    expected, tolerance = reference(name, dtype)
    result = results(name, dtype)
    assert set(result.terms) == set(expected["loss_terms"])
    off = {key: relative(term, expected["loss_terms"][key]) / tolerance["loss"] for key, term in result.terms.items()}
    assert_agree({"loss": relative(result.loss, expected["loss"]) / tolerance["loss"], **off})


@every_case
@both_dtypes
def test_every_tensor_on_the_way_is_the_official_one(name, dtype):
    expected, tolerance = reference(name, dtype)
    result = results(name, dtype)
    assert set(expected["tensors"]) == set(result.tensors)
    off = {}
    for key, entry in expected["tensors"].items():
        assert result.tensors[key].dtype == dtype
        off |= compare_tensor(key, result.tensors[key], entry, tolerance)
    assert_agree(off)


@pytest.mark.parametrize("name", FINETUNING)
@both_dtypes
def test_the_logits_are_the_official_ones(name, dtype):
    expected, tolerance = reference(name, dtype)
    logits = np.array(expected["logits"])
    ours = results(name, dtype).logits.detach().double().numpy()
    assert ours.shape == logits.shape
    assert_agree({"logits": first_values(ours, logits, logits.std()) / tolerance["statistics"]})


@every_case
@both_dtypes
def test_every_gradient_is_the_official_one(name, dtype):
    expected, tolerance = reference(name, dtype)
    assert_agree(compare_grads(results(name, dtype).grads, expected["grads"], tolerance))


@pytest.mark.parametrize("name", golden_cases("mirl_"))
def test_the_effective_prediction_weights_are_the_official_ones(name):
    case = FILLED[name]
    model, _ = load(name, torch.float32)
    off = {}
    for key, entry in case["effective_pred_weight"].items():
        weight = model.decoders[int(key.removeprefix("decoder_pred"))].pred.weight.detach().double()
        assert list(weight.shape) == entry["shape"]
        columns, tolerance = weight.norm(dim=0), TOLERANCE["hash"]
        off[f"{key} l2"] = relative(weight.norm(), entry["l2"]) / tolerance["slices"]
        off[f"{key} least"] = relative(columns.min(), entry["column_l2_min"]) / tolerance["slices"]
        off[f"{key} most"] = relative(columns.max(), entry["column_l2_max"]) / tolerance["slices"]
        for row in (0, 1):
            off[f"{key} row {row}"] = (
                first_values(weight[row], entry[f"row{row}_first"], weight.std().item()) / tolerance["slices"]
            )
    if case["config"]["weight_norm_pred"]:
        assert len(case["effective_pred_weight"]) == 6
    if off:
        assert_agree(off)


# ---------------------------------------------------------------------------- real sizes, on the meta device

FACTS = load_case("facts")["models"]
VITS = {
    "vit_s16": "ViT-S/16",
    "vit_b16": "ViT-B/16",
    "vit_l16": "ViT-L/16",
    "vit_s54": "ViT-S-54",
    "vit_b24": "ViT-B-24",
    "vit_b48": "ViT-B-48",
}
PRETRAINERS = {
    "MAE ViT-B/16 pre-train": lambda: MAE(create_vit("vit_b16")),
    "MIRL ViT-S-54 pre-train": lambda: MIRL(
        create_vit("vit_s54"), 6, decoder_embed_dim=384, decoder_depth=1, decoder_num_heads=12
    ),
    "MIRL ViT-B-48 pre-train": lambda: MIRL(
        create_vit("vit_b48"), 6, decoder_embed_dim=512, decoder_depth=2, decoder_num_heads=16
    ),
}


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def multiply_adds(model, size=224):
    """Of one forward pass. The counter knows matrix products, not every fused attention kernel: compute it plainly."""
    with torch.device("meta"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("preset, fact", VITS.items())
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_vit_presets_have_the_official_number_of_parameters(preset, fact, pool):
    with torch.device("meta"):
        model = create_vit(preset, pool=pool)
    assert count(model) == count(model, trainable=True) == FACTS[f"{fact} fine-tune"]["params_total"]


def test_vit_ti_and_h_have_the_known_number_of_parameters():
    with torch.device("meta"):
        assert count(create_vit("vit_ti16")) == 5_717_416
        assert count(create_vit("vit_h14")) == 632_045_800


@pytest.mark.parametrize("fact", PRETRAINERS)
def test_pretraining_models_have_the_official_number_of_parameters(fact):
    with torch.device("meta"):
        model = PRETRAINERS[fact]()
    assert count(model) == FACTS[fact]["params_total"]
    assert count(model, trainable=True) == FACTS[fact]["params_trainable"]
    encoder = FACTS[fact].get("params_encoder_only", FACTS[fact].get("params_encoder_vit_only"))
    assert count(model.encoder) == encoder


@pytest.mark.parametrize("preset", VITS)
def test_vit_presets_need_the_official_number_of_multiply_adds(preset):
    with torch.device("meta"):
        model = create_vit(preset, pool="mean")
    assert multiply_adds(model) == FACTS[f"{VITS[preset]} fine-tune"]["forward_macs_matmul_and_conv"]


@pytest.mark.parametrize("preset", ["mixmim_b", "mixmim_l", "mixmim_h"])
def test_mixmim_presets_have_the_official_number_of_parameters_and_multiply_adds(preset):
    with torch.device("meta"):
        model = create_mixmim(preset)
    fact = FACTS[f"MixMIM-{preset[-1].upper()} fine-tune"]
    assert count(model) == fact["params_total"]
    assert count(model, trainable=True) == fact["params_trainable"]
    assert multiply_adds(model) == fact["forward_macs_matmul_and_conv"]


@pytest.mark.parametrize("fact", PRETRAINERS)
def test_pretraining_models_need_the_official_number_of_multiply_adds(fact):
    with torch.device("meta"):
        model = PRETRAINERS[fact]()
    assert multiply_adds(model) == FACTS[fact]["forward_macs_matmul_and_conv"]
