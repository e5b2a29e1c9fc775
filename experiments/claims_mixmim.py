"""What MixMIM claims: fill the holes of one image with another's tokens, and a hierarchical encoder learns more from each pass.

A hierarchical encoder of three stages (48 channels) sees images of 32 px with 4 x 4 squares to hide. The paper's is Swin-B,
600 times through ImageNet.

Source: MixMIM, Liu et al. 2022, arXiv 2205.13137. Needs: lab.py, train.py with all it needs.
"""

from functools import partial

from lab import Claim, Statement

SHAPE = dict(method="mixmim", model="mixmim_demo", img_size=32, patch_size=2)


def pretrain(lab, epochs=2, images=10_000, **more):
    small = dict(embed_dim=8, decoder_embed_dim=32) if lab.tiny else {}
    return lab.train(task="pretrain", **{**SHAPE, **small, **more}, **lab.images(images), batch_size=lab.pick(64, 16), epochs=lab.epochs(epochs))


def probe(lab, init=None, images=4000, **more):
    small = dict(embed_dim=8) if lab.tiny else {}
    return lab.train(task="classify", probe=True, **{**SHAPE, **small, **more}, **lab.images(images), init=init, epochs=lab.pick(50, 1)).last["val_acc"]


def trained_and_probed(lab, epochs=2, **more):
    run = pretrain(lab, epochs, **more)
    return {"probe %": probe(lab, run.checkpoint), "loss": run.last["val_loss"], "minutes": run.seconds / 60}


def mixmim_fill(lab):
    epochs = 2

    def as_long():
        """The mask symbol's passes are cheaper, as each image is decoded once: as many more of them as MixMIM's time allows."""
        mix, mask = pretrain(lab, epochs), pretrain(lab, epochs, fill="mask")
        return trained_and_probed(lab, lab.pick(max(1, round(epochs * mix.seconds / mask.seconds)), 1), fill="mask")

    def gain(f, other):
        return f["mix"]["probe %"] - f[other]["probe %"]

    return Claim("MixMIM", "another image's tokens in the holes are better than a mask symbol", {
        "random": lambda: {"probe %": probe(lab)},
        "mix": partial(trained_and_probed, lab, epochs),
        "mask symbol": partial(trained_and_probed, lab, epochs, fill="mask"),
        "mask symbol, equal time": as_long}, [
        Statement("mixing is ahead of the symbol at equal steps", partial(gain, other="mask symbol")),
        Statement("mixing is ahead of the symbol at equal time", partial(gain, other="mask symbol, equal time"))], ("probe %", "minutes"))


CLAIMS = {"mixmim-fill": mixmim_fill}
