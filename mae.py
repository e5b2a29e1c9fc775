"""MAE: hide three quarters of an image, encode the rest, paint the whole.

The encoder sees visible patches only, so it is cheap; a small decoder gets its output and
one learnt mask token for every hidden place, and predicts pixels. Afterwards the decoder
is thrown away. MAE is the baseline of MIRL (mirl.py): with one loss at the very end, the
deep blocks of a deep encoder learn less than they should.

    V      = the int(N (1 - ratio)) patches with the smallest noise              visible
    z      = LN(Blocks([cls ; W x_V + b + pos_V]))                         (1)   encoder
    y      = P LN(Blocks(unshuffle([E z ; mask tokens]) + pos))            (2)   decoder
    L      = mean over hidden patches of (y - x~)^2                        (3)   x~: masking.py

E embeds into the decoder's width, P reads the pixels of a patch out of it.

Source: He et al. 2021, arXiv 2111.06377. Written from the paper; details it leaves open
follow the official code's behaviour, whose numbers are met (tests/golden/mae_*).
Needs: torch, torchvision, einops; vit.py, masking.py (and shapes.py for the demo).
Demo: python mae.py (15 s on a CPU) overfits 16 scenes and saves mae_demo.png.
"""

from typing import NamedTuple

import torch
from torch import nn

from masking import (choose_patches, hide, masked_loss, normalize_patches, paste, patch_statistics, patchify, unpatchify,
                     unshuffle)
from vit import Block, init_weights, sincos_pos_embed


class MAEOutput(NamedTuple):
    loss: torch.Tensor  # scalar
    pred: torch.Tensor  # (B, N, P), every patch, also the visible ones
    mask: torch.Tensor  # (B, N), 1 = removed


class MAE(nn.Module):
    """Masked autoencoder around a ViT.

    encoder        a ViT with class token; it loses its head, and its position table becomes the fixed
                   sin-cos one, frozen
    norm_pix_loss  predict patches normalised to mean 0, variance 1 (better features) instead of raw pixels

    out = model(imgs) has out.loss, out.pred (B, N, P) and out.mask (B, N). ValueError where sizes do not fit.
    """

    def __init__(self, encoder, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, norm_pix_loss=True):
        super().__init__()
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(f"decoder_embed_dim {decoder_embed_dim} is not a multiple of decoder_num_heads {decoder_num_heads}")
        encoder.prepare_for_masking()
        self.encoder, self.norm_pix_loss = encoder, norm_pix_loss

        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        table = sincos_pos_embed(decoder_embed_dim, *encoder.grid_size)
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, encoder.patch_size**2 * encoder.in_chans)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward_decoder(self, z, ids_restore):
        """(2): (B, 1 + n, D) -> (B, N, P)."""
        x = self.decoder_embed(z)
        x = torch.cat([x[:, :1], unshuffle(x[:, 1:], self.mask_token, ids_restore)], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, imgs, mask_ratio=0.75, noise=None, mask=None):
        """imgs (B, C, H, W) -> MAEOutput.

        noise (B, N): fixes which patches stay, the smallest; mask (B, N) or (B, gh, gw) gives them outright.
        """
        split = choose_patches(imgs, self.encoder.img_size, self.encoder.patch_size, mask_ratio, noise, mask)
        z = self.encoder.norm(self.encoder.forward_blocks(self.encoder.embed(imgs, split.ids_keep)))  # (1)
        pred = self.forward_decoder(z, split.ids_restore)
        target = patchify(imgs, self.encoder.patch_size)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        return MAEOutput(masked_loss(pred, target, split.mask), pred, split.mask)  # (3)

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.75, noise=None, mask=None, use_true_patch_statistics=False):
        """The predicted image (B, C, H, W): every patch from the decoder, no true pixel in it.

        Normalised predictions need each patch's mean and std back. By default they are guessed from the
        visible neighbours; use_true_patch_statistics=True takes the true ones, which LEAK part of the answer.
        """
        out = self(imgs, mask_ratio, noise, mask)
        pred = out.pred.float()
        if self.norm_pix_loss:
            mean, std = patch_statistics(imgs, self.encoder.patch_size, out.mask, use_true_patch_statistics)
            pred = pred * std + mean
        return unpatchify(pred, self.encoder.patch_size, self.encoder.grid_size)


def convert_official(state_dict):
    """The official MAE pre-training state dict (encoder and decoder) under our names, for load_state_dict."""
    ours = ("mask_token", "decoder_")
    return {key if key.startswith(ours) else f"encoder.{key}": value for key, value in state_dict.items()}


if __name__ == "__main__":
    from shapes import save_grid, shapes
    from vit import create_vit

    torch.manual_seed(0)
    model = MAE(create_vit("vit_demo", depth=4), decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
    imgs = shapes(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(401):
        loss = model(imgs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss on hidden patches {loss.item():.2f}")
    print("(predicting each patch's mean scores 0.98; expect below 0.60 at the end)")
    out = model.eval()(imgs[:6], noise=(noise := torch.rand(6, 64)))
    pred, leaky = (model.reconstruct(imgs[:6], noise=noise, use_true_patch_statistics=leak) for leak in (False, True))
    save_grid("mae_demo.png", {
        "input: all true pixels": imgs[:6],
        "model's view: true pixels, grey hidden": hide(imgs[:6], out.mask, 4),
        "prediction: no true pixels": hide(pred, 1 - out.mask, 4),  # at visible patches it was never trained: grey
        "true where visible, else predicted": paste(imgs[:6], pred, out.mask, 4),
        "prediction with TRUE patch statistics": hide(leaky, 1 - out.mask, 4),
    })
    print("saved mae_demo.png")
