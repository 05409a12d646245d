"""psvae's own modules in the folders that its diffusers classes write: our keys, their file names."""

from collections.abc import Mapping
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, same

__all__ = ["AUTOENCODER_PIXEL_VAE", "AUTOENCODER_PSVAE"]


def _written_by(class_name: str) -> Format:
    def recognise(config: Mapping[str, Any] | None, header: Header) -> bool:
        return config is not None and config.get("_class_name") == class_name

    def read_config(config: Mapping[str, Any] | None, header: Header) -> dict[str, Any]:
        core = (config or {}).get("core")
        if not isinstance(core, Mapping):
            raise CheckpointError(f"config.json of an {class_name} has no 'core'; save or download it again")
        return dict(core)

    return Format(f"psvae's {class_name}", recognise, read_config, lambda keys, config, header: same(keys))


AUTOENCODER_PSVAE = _written_by("AutoencoderPSVAE")
AUTOENCODER_PIXEL_VAE = _written_by("AutoencoderPixelVAE")
