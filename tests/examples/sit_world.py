"""A small world for SiT's examples: labelled pictures, a VAE with statistics, a SiT that says something."""

from psvae import fit_latent_statistics
from tests.examples.generator_world import png, script
from tests.tiny import fill_weights, images, tiny_psvae

SIZE, CLASSES = 32, 3


def make_pictures(folder):
    """Twelve, of three classes."""
    for number in range(12):
        (folder / f"class{number % CLASSES}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{number % CLASSES}" / f"{number}.png").write_bytes(png(number))


def make_measured_vae(folder, kind="psvae"):
    vae = fill_weights(tiny_psvae(kind))
    fit_latent_statistics(vae, [images(8)])
    vae.save_pretrained(folder)


def tiny_sit(classes=CLASSES, **fields):
    """A fresh one returns zero."""
    return fill_weights(script("sit").build_sit("tiny/2", 8, 4, classes, **fields)).eval()
