"""Flow matching: pure functions on σ, which is 0 for clean latents and 1 for noise.

    x_σ = (1 − σ) x + σ ε        v = dx_σ/dσ = ε − x        (PS-VAE section 3.2; BAGEL, RAE, SD3 and FLUX agree)

A *velocity* below is any callable (latents ``B …``, σ ``B``) → v, of the latents' shape. `guided` makes one of
a model and its prefixes, `from_sit` and `from_jit` of networks with other conventions; `sample` integrates one.
Nothing is broadcast: latents, noise and velocities have one shape, σ one number for each item.
"""

from psvae.flow.guidance import Guidance, classifier_free, dual_guidance, guided, renormalise
from psvae.flow.paths import (
    Velocity,
    add_noise,
    clean_latents,
    flow_loss,
    from_jit,
    from_sit,
    to_sit,
    velocity_from_clean,
    velocity_target,
)
from psvae.flow.sampling import sample
from psvae.flow.sigmas import dimension_shift, sample_sigmas, shift_sigmas, sigma_schedule

__all__ = [
    "Guidance",
    "Velocity",
    "add_noise",
    "classifier_free",
    "clean_latents",
    "dimension_shift",
    "dual_guidance",
    "flow_loss",
    "from_jit",
    "from_sit",
    "guided",
    "renormalise",
    "sample",
    "sample_sigmas",
    "shift_sigmas",
    "sigma_schedule",
    "to_sit",
    "velocity_from_clean",
    "velocity_target",
]
