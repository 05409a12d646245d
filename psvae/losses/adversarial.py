"""The adversarial term of L_P: PatchGAN, hinge losses and LDM's adaptive weight (Rombach et al. 2022).

When it starts is the training loop's business: LDM starts at step 50 001 with weight 0.5. The paper says only
that its pixel loss follows LDM.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from psvae.shapes import Images

__all__ = [
    "PatchDiscriminator", "adaptive_weight", "discriminator_hinge_loss", "generator_hinge_loss", "gradient_ratio",
]  # fmt: skip


class PatchDiscriminator(nn.Module):
    """Images ``B C H W`` → one logit per overlapping patch, ``B 1 h' w'`` (Isola et al. 2017).

    LDM's: 4×4 convolutions, batch norm, LeakyReLU 0.2, three halvings, weights N(0, 0.02). With more than one
    process convert it by ``nn.SyncBatchNorm.convert_sync_batchnorm`` or accept statistics per process.

    Args:
        in_channels: C.
        base_channels: width after the first convolution, doubled at each halving up to ×8.
        num_layers: halvings.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1)
        strides = [2] * (num_layers - 1) + [1]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=s, padding=1, bias=False)
            for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Images) -> Float[Tensor, "B 1 hp wp"]:
        x = F.leaky_relu(self.conv_in(images), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Float[Tensor, ""]:
    """½ (mean relu(1 − D(x)) + mean relu(1 + D(x̂))). Detach x̂ before it enters the discriminator."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def generator_hinge_loss(fake_logits: Tensor) -> Float[Tensor, ""]:
    """−mean D(x̂)."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, *, maximum: float = 1e4, eps: float = 1e-4
) -> Float[Tensor, ""]:
    """‖∇ reconstruction‖ / (‖∇ generator‖ + eps) at ``last_layer``, clamped and detached (Esser et al. 2021, eq. 7).

    Args:
        last_layer: the weight that both losses reach last, ``decoder.conv_out.weight``. Both graphs are kept.
        maximum, eps: as in `gradient_ratio`; LDM's.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return gradient_ratio(of_reconstruction, of_generator, maximum=maximum, eps=eps)


def gradient_ratio(
    of_reconstruction: Float[Tensor, "..."], of_other: Float[Tensor, "..."], *, maximum: float = 1e8, eps: float = 1e-4
) -> Float[Tensor, ""]:
    """‖∇ reconstruction‖ / (‖∇ other‖ + eps), clamped and detached: the weight that makes both pull alike.

    VQGAN balances its adversary so (Esser et al. 2021, eq. 7), VA-VAE its alignment.

    Args:
        of_reconstruction, of_other: gradients of the two losses at one weight: the last layer of the decoder for an
            adversary, of the encoder for an alignment.
        maximum: the ratio is clamped to [0, maximum]. VA-VAE's 1e8 hardly ever binds; LDM clamps its adversary's
            to 1e4.
        eps: added to the norm below the line, so that a loss without gradient divides by no 0.
    """
    ratio = of_reconstruction.float().norm() / (of_other.float().norm() + eps)
    return ratio.clamp(0.0, maximum).detach()
