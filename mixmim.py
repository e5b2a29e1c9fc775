"""MixMIM: hide patches of an image behind patches of another image, then predict both images.

Masked image modeling hides patches and predicts them. A mask token in the encoder's input costs compute and
never occurs after pre-training. MixMIM replaces patches of image A by those of image B at the same places:
the encoder works on real tokens everywhere, and each pass serves two predictions. In mixture k, A is image k
of the batch and B is its partner, image p(k). Three properties may look like bugs but are intended:

    partner     p has no fixed point: an image mixed with itself would hide nothing
    complement  one mask M serves both images: where A is replaced B is kept, and where A is kept B is hidden
    stitching   image k is predicted in two pieces: the patches that mixture k replaced, from mixture k; those
                it kept, from mixture q(k), in which k is the partner. Every patch is predicted once

    x_k = (1 - M) e_k + M e_p(k),  then + pos              (1)   e: patch embedding; M = 1: from the partner
    token i attends to token j  only if  M_i = M_j         (2)   same image, in every window of every stage
    a_k = (1 - M) D z_k + M m,   b_k = M D z_k + (1 - M) m (3)   z = Encoder(x); D: linear; m: mask token
    y_k = M dec(a_k) + (1 - M) dec(b_q(k)),  p(q(k)) = k   (4)   dec: decoder
    L   = mean over all patches of (y_k - x~_k)^2          (5)   x~: normalized patches, masking.py

M is drawn on the grid of the last stage and enlarged for the others, so no merging ever joins two images.

Source: Liu et al. 2022, arXiv 2205.13137. Written from the published description; the numbers of the
equations are ours. Details follow the official implementation, whose numbers it reproduces (tests/golden/mixmim_*).
We differ: in a batch of odd size the official flip pairs the middle image with itself; here the three images
in the middle form a cycle.
Needs: torch, torchvision, einops; hierarchical.py, vit.py, masking.py (and shapes.py for the demo).
Demo: python mixmim.py (half a minute on a CPU) predicts held-out scenes and saves mixmim_demo.png.
"""

from typing import NamedTuple

import torch
from torch import nn

from hierarchical import PRESETS, HierarchicalViT, create_mixmim, group_mask  # noqa: F401
from masking import enlarge_mask, hidden_error, masked_loss, mix_mask, normalize_patches, paste, patch_statistics
from masking import patch_mean_loss, patchify, unpatchify
from vit import Block, ViT, init_weights, sincos_pos_embed


class MixMIMOutput(NamedTuple):
    loss: torch.Tensor  # scalar
    pred: torch.Tensor  # (B, N, P): image k at every patch; with dual=False or fill="mask" where mask = 1
    mask: torch.Tensor  # (B, N), 1 = removed from image k and replaced by the partner's patch
    partner: torch.Tensor  # (B,) p(k) of (1); with fill="mask" k itself


def choose_partners(batch, device=None):
    """p of (1): (B,), a permutation without fixed points, so that no image is mixed with itself.

    Pairs from the outside in, as the official code flips the batch. In an odd batch the three images in the
    middle form a cycle.
    """
    if batch < 2:
        raise ValueError(f"MixMIM mixes the images of a batch, but the batch holds {batch}; use at least 2")
    index = torch.arange(batch, device=device)
    partner = index.flip(0)
    if batch % 2:
        middle = slice(batch // 2 - 1, batch // 2 + 2)
        partner[middle] = index[middle].roll(1)
    return partner


class MixMIM(nn.Module):
    """Mixed and masked image modeling around a hierarchical or a plain ViT.

    encoder           a HierarchicalViT or a ViT; it loses its head. A ViT also loses its class token, which
                      would attend to both images, and gets the fixed sin-cos position table, frozen
    norm_pix_loss     predict patches normalized to mean 0, variance 1 instead of raw pixels
    mask_per_cycle    ablation True: one mask per cycle of partners (official: one mask per batch)
    fill              ablation "mask": a learned mask token replaces patches, not another image
    dual              ablation False: predict only image A of each mixture
    masked_attention  ablation False: tokens attend to the tokens of both images. In short runs of ours this
                      lowers the loss, on held-out images too; but it is an easier task, not a better
                      pre-training. Compare features (a probe), not losses

    out = model(imgs) has out.loss, out.pred (B, N, P), out.mask (B, N) and out.partner (B,). The patches are
    tokens of the last stage: encoder.stride pixels wide, 32 for mixmim_b.
    """

    def __init__(
        self,
        encoder,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        norm_pix_loss=True,
        mask_per_cycle=False,
        fill="mix",
        dual=True,
        masked_attention=True,
    ):
        super().__init__()
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim {decoder_embed_dim} is not a multiple of decoder_num_heads "
                f"{decoder_num_heads}"
            )
        if fill not in ("mix", "mask"):
            raise ValueError(f"fill {fill!r} is unknown; choose 'mix' or 'mask'")
        self.patch_size = encoder.stride  # of the patches that are hidden and predicted
        self.grid_size = tuple(side // self.patch_size for side in encoder.img_size)
        table = sincos_pos_embed(decoder_embed_dim, *self.grid_size, cls_token=False)
        self.norm_pix_loss = norm_pix_loss
        self.mask_per_cycle = mask_per_cycle
        self.fill = fill
        self.dual = dual and fill == "mix"
        self.masked_attention = masked_attention

        # the encoder is changed only after all checks
        if isinstance(encoder, ViT):
            encoder.drop_class_token()
            encoder.fix_pos_embed()
        encoder.reset_classifier(0)
        self.encoder = encoder

        self.decoder_embed = nn.Linear(encoder.num_features, decoder_embed_dim)
        mask_token_dim = decoder_embed_dim if fill == "mix" else encoder.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_token_dim))
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        blocks = [Block(decoder_embed_dim, decoder_num_heads, norm_eps=1e-5) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-5)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.patch_size**2 * encoder.in_chans)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, imgs, mask_ratio=0.5, noise=None, mask=None):
        """imgs (B, C, H, W) -> MixMIMOutput.

        noise  (N,) fixes the mask: the patches with the smallest noise are replaced
        mask   (N,) or (gh, gw) is the mask itself, 1 = replaced
        With mask_per_cycle=True both have one row per image, and the first image of each cycle decides.
        """
        if imgs.shape[-2:] != self.encoder.img_size:
            raise ValueError(
                f"images are {imgs.shape[-2]}x{imgs.shape[-1]}, but the encoder's img_size is "
                f"{self.encoder.img_size}; resize them or build the encoder for their size"
            )
        if self.fill == "mask":
            return self.forward_mask_token(imgs, mask_ratio, noise, mask)
        if not self.dual:
            return self.forward_single(imgs, mask_ratio, noise, mask)

        # partners p, and the mask M: (1, N) bool, True where the partner's patch is
        partner = choose_partners(len(imgs), imgs.device)
        mask = self.choose_mask(partner, mask_ratio, noise, mask)

        # (1) mix the patch embeddings of each image and its partner
        e = self.encoder.patch_embed(imgs)
        x = torch.where(self.enlarge(mask), e[partner], e)

        # (2) encode: a token attends only to tokens of the same image
        z = self.encode(x, mask)
        dz = self.decoder_embed(z)

        # (3) separate the two images: a mask token where the other image was
        from_b = mask[..., None]
        mask_token = self.mask_token.to(dz.dtype)
        a = torch.where(from_b, mask_token, dz)
        b = torch.where(from_b, dz, mask_token)

        # (4) decode; image k is hidden at M in mixture k, and at the complement of M in mixture q(k)
        pred_a, pred_b = self.decode(torch.cat([a, b])).chunk(2)
        q = partner.argsort()  # the inverse of p
        pred = torch.where(from_b, pred_a, pred_b[q])

        # (5) every patch was hidden once, so every patch counts
        mask = mask.float().expand(len(imgs), -1)
        loss = masked_loss(pred, self.target(imgs), torch.ones_like(mask))
        return MixMIMOutput(loss, pred, mask, partner)

    def choose_mask(self, partner, mask_ratio, noise=None, mask=None):
        """M, True = replaced by the partner's patch: bool (1, N), with mask_per_cycle=True (B, N)."""
        gh, gw = self.grid_size
        n = gh * gw
        rows = (len(partner),) if self.mask_per_cycle else ()

        # draw the mask unless it is given
        if mask is None:
            if noise is None:
                noise = torch.rand(*rows, n, device=partner.device)
            check_shape("noise", noise, (*rows, n))
            mask = mix_mask(noise, mask_ratio)
        check_shape("mask", mask, (*rows, n), (*rows, gh, gw))
        mask = mask.to(partner.device).bool().reshape(-1, n)

        if self.mask_per_cycle:
            mask = mask[first_of_cycle(partner)]
        return mask

    def enlarge(self, mask):
        """M (b, N) for the tokens of the first stage: (b, N', 1)."""
        scale = self.encoder.grid_size[0] // self.grid_size[0]
        mask = enlarge_mask(mask.view(-1, *self.grid_size), scale)
        return mask.flatten(1)[..., None]

    def encode(self, x, mask):
        """(2): mixed tokens of the first stage (B, N', D') -> normalized tokens of the last (B, N, D)."""
        encoder = self.encoder
        # group_mask: bias 0 where M_i = M_j, else -inf, in every block; None: no masking, an ablation
        source = mask if self.masked_attention else None
        if isinstance(encoder, ViT):
            bias = None if source is None else group_mask(source)[:, None]  # (b, 1, N, N)
            x = encoder.forward_blocks(x + encoder.pos_embed, bias=bias)
            return encoder.fc_norm(x)
        if source is not None:
            source = source.view(-1, *self.grid_size)
        maps = encoder.forward_stages(x, encoder.grid_size, source)
        return encoder.norm(maps[-1].flatten(1, 2))

    def decode(self, x):
        """(B, N, decoder_embed_dim) -> (B, N, P)."""
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def target(self, imgs):
        """x~ of (5): (B, N, P)."""
        patches = patchify(imgs, self.patch_size)
        return normalize_patches(patches) if self.norm_pix_loss else patches

    # ------------------------------------------------------------------------ ablations

    def forward_single(self, imgs, mask_ratio, noise, mask):
        """dual=False: (1) to (3) for image A only, and a loss at its replaced patches only."""
        partner = choose_partners(len(imgs), imgs.device)
        mask = self.choose_mask(partner, mask_ratio, noise, mask)
        e = self.encoder.patch_embed(imgs)
        x = torch.where(self.enlarge(mask), e[partner], e)
        z = self.decoder_embed(self.encode(x, mask))
        a = torch.where(mask[..., None], self.mask_token.to(z.dtype), z)
        return self.masked_output(imgs, self.decode(a), mask, partner)

    def forward_mask_token(self, imgs, mask_ratio, noise, mask):
        """fill="mask": a learned token in the encoder's input instead of another image, as SimMIM.

        There is one image only: attention is not masked, and the decoder sees all tokens.
        """
        alone = torch.arange(len(imgs), device=imgs.device)
        mask = self.choose_mask(alone, mask_ratio, noise, mask)
        e = self.encoder.patch_embed(imgs)
        x = torch.where(self.enlarge(mask), self.mask_token.to(e.dtype), e)
        z = self.decoder_embed(self.encode(x, None))
        return self.masked_output(imgs, self.decode(z), mask, alone)

    def masked_output(self, imgs, pred, mask, partner):
        """The loss at the replaced patches -> MixMIMOutput."""
        mask = mask.float().expand(len(imgs), -1)
        loss = masked_loss(pred, self.target(imgs), mask)
        return MixMIMOutput(loss, pred, mask, partner)

    # ------------------------------------------------------------------------ pictures

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.5, noise=None, mask=None, use_true_patch_statistics=False):
        """The predicted images (B, C, H, W): every patch from the decoder, no true pixel in it.

        With fill="mask" or dual=False only the patches with out.mask = 1 are trained. Normalized predictions
        need each patch's mean and std back. By default they are estimated from nearby patches that are
        visible in the same mixture; use_true_patch_statistics=True LEAKS them, a part of the answer.
        """
        out = self(imgs, mask_ratio, noise, mask)
        return self.to_pixels(imgs, out, use_true_patch_statistics)

    def to_pixels(self, imgs, out, use_true_patch_statistics=False):
        """out.pred as images, see `reconstruct`."""
        pred = out.pred.float()
        if self.norm_pix_loss:
            # image k is hidden at the mask in mixture k and at its complement in mixture q(k)
            mean_a, std_a = patch_statistics(imgs, self.patch_size, out.mask, use_true_patch_statistics)
            mean_b, std_b = patch_statistics(imgs, self.patch_size, 1 - out.mask, use_true_patch_statistics)
            from_b = out.mask[..., None] > 0
            pred = pred * torch.where(from_b, std_a, std_b) + torch.where(from_b, mean_a, mean_b)
        return unpatchify(pred, self.patch_size, self.grid_size)

    @torch.no_grad()
    def pictures(self, images, mask_ratio, noise, gray):
        """The columns of a reconstruction picture: caption -> (B, C, H, W), normalized like `images`.

        gray (C, 1, 1) is the value of mid-gray; it marks hidden patches and predictions that are not trained.
        The caption of A's prediction ends with its mean squared error on hidden patches, over all images.
        """
        out = self(images, mask_ratio, noise)
        pred = self.to_pixels(images, out)
        error = hidden_error(pred, images, out.mask, self.patch_size)
        if self.fill == "mask":
            columns = {
                "input: all true pixels": images,
                "view: true, hidden is gray": paste(images, gray, out.mask, self.patch_size),
            }
        else:
            b = images[out.partner]
            columns = {
                "A: all true pixels": images,
                "B, partner: all true pixels": b,
                "mixture: all true pixels": paste(images, b, out.mask, self.patch_size),
            }

        if self.dual:
            columns[f"A predicted, no true pixels, {error}"] = pred
            columns["B predicted, no true pixels"] = pred[out.partner]
        else:
            trained = paste(pred, gray, 1 - out.mask, self.patch_size)
            columns[f"prediction, no true pixels, {error}"] = trained
        columns["A: true, hidden predicted"] = paste(images, pred, out.mask, self.patch_size)
        return columns


def first_of_cycle(partner):
    """mask_per_cycle=True: the images of a cycle k, p(k), p(p(k)), ... share a mask, or (4) would leave gaps.

    partner (B,) -> (B,): the smallest image of each cycle. No cycle is longer than three.
    """
    first = torch.minimum(partner, partner[partner])
    return torch.minimum(first, torch.arange(len(partner), device=partner.device))


def check_shape(name, given, *shapes):
    """ValueError unless the tensor has one of the shapes."""
    if tuple(given.shape) not in shapes:
        raise ValueError(
            f"{name} {tuple(given.shape)} must be {' or '.join(map(str, shapes))}: one row for the batch, "
            "with mask_per_cycle=True one row per image"
        )


def convert_official(state_dict):
    """Official pre-training or fine-tuning state dict -> our names, for MixMIM or HierarchicalViT.

    The official index tables are left out: the model computes its own.
    """
    decoder = ("mask_token", "decoder_")
    pretraining = any(key.startswith(decoder) for key in state_dict)
    state = {}
    for key, value in state_dict.items():
        if key.endswith("relative_position_index"):
            continue
        if pretraining and not key.startswith(decoder):
            key = f"encoder.{key}"
        state[key] = value
    return state


if __name__ == "__main__":
    from shapes import Shapes, save_grid
    from vit import create_vit

    torch.manual_seed(0)
    # simple scenes are flat, and a flat patch has no contrast to normalize: raw pixels
    encoder = create_vit("vit_demo", depth=4, patch_size=8)  # the hierarchical mixmim_demo needs more steps
    model = MixMIM(encoder, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=False)
    trained = Shapes(1024, scenes="simple").images / 255
    held_out = Shapes(256, train=False, scenes="simple").images / 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(401):
        batch = trained[torch.randint(len(trained), (32,))]
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    # masked attention: no pixel of B reaches the prediction of A from their mixture
    model.eval()
    noise = torch.rand(16)  # 4 x 4 patches
    with torch.no_grad():
        out = model(held_out, noise=noise)
        changed = held_out.clone()
        changed[out.partner[0]] = torch.rand_like(held_out[0])
        difference = (model(changed, noise=noise).pred[0] - out.pred[0])[out.mask[0] > 0]
    baseline = patch_mean_loss(held_out, model.patch_size, normalize=False)
    print(f"held-out images: loss {out.loss:.4f}, predicting each patch's mean {baseline:.4f}")
    print(f"with other pixels in B the prediction of A changes by {difference.abs().max():.2g} (expect 0)")

    imgs = torch.cat([trained[:4], held_out[:4]])
    save_grid("mixmim_demo.png", model.pictures(imgs, 0.5, noise, gray=0.5))
    print("saved mixmim_demo.png: 4 trained images, below them 4 held-out ones")
