"""SemanticVAE: features ↔ latent."""

from psvae import SemanticVAE, SemanticVAEConfig
from tests.base import ModuleTests
from tests.tiny import features, latents, tiny_vae_config


class TestSemanticVAE(ModuleTests):
    module_class = SemanticVAE
    config = tiny_vae_config()
    good_sizes = ((4, 4), (3, 5), (1, 7))
    repr_contains = ("D=48", "Z=8")
    presets = (("semantic_vae_96", SemanticVAEConfig()), ("semantic_vae_mlp_96", SemanticVAEConfig(depth=0)))
    exportable = False  # it returns a DiagonalGaussian; its halves export

    def inputs(self, height, width):
        return (features(2, height, width),)

    def expected_shapes(self, height, width):
        return [(2, 48, height, width), (2, 16, height, width)]

    def call(self, module, *inputs):
        rebuilt, posterior = module(*inputs, sample_posterior=False)
        return [rebuilt, posterior.parameters]

    def parts(self, module):
        return {"encoder": (module.encoder, (features(),)), "decoder": (module.decoder, (latents(),))}
