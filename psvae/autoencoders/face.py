"""What SD-style callers ask of any image ↔ latent model beside encode and decode: slicing, tiling, dtype, device."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from psvae.decoders import Tiling, decode_tiled
from psvae.errors import ConfigError
from psvae.shapes import Images, Latents, check_images

__all__ = ["AutoencoderFace"]


class AutoencoderFace:
    """Switches for a module with ``config.sample_size``, ``config.spatial_compression_ratio`` and a ``decoder``."""

    config: Any
    decoder: Any
    use_slicing: bool = False
    use_tiling: bool = False
    tiling: Tiling | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's weights."""
        return next(self.decoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the decoder's weights."""
        return next(self.decoder.parameters()).device

    def enable_slicing(self) -> None:
        """Encode and decode a batch one item at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Whole batches again."""
        self.use_slicing = False

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Work tile by tile on images larger than a tile: `PSVAE` decodes so, `PixelVAE` encodes too.

        A semantic encoder is never tiled: its tokens attend to all others, so tiles would change their meaning.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile in pixels; ``config.sample_size``.
            tile_sample_stride_height, tile_sample_stride_width: step between tiles in pixels; 3/4 of a tile.

        Raises:
            ConfigError: a size is not a multiple of the stride, or a step is longer than its tile.
        """
        stride = self.config.spatial_compression_ratio
        asked = (tile_sample_stride_height, tile_sample_stride_width)
        for size in (tile_sample_min_height, tile_sample_min_width, *asked):
            if size is not None and (size < stride or size % stride):
                near = max(stride, round(size / stride) * stride)
                raise ConfigError(
                    f"tiling asks for {size} pixels; wanted a multiple of the stride {stride}, nearest {near}"
                )
        tile = [size or self.config.sample_size for size in (tile_sample_min_height, tile_sample_min_width)]
        step = [size or max(stride, side * 3 // 4) for size, side in zip(asked, tile, strict=True)]
        cells = [max(1, size // stride) for size in (*tile, *step)]
        grid = getattr(self.decoder.config, "grid", None)  # a ViT decoder takes one grid alone
        if grid not in (None, (cells[0], cells[1])):
            wanted = " x ".join(str(side * stride) for side in grid)
            raise ConfigError(
                f"tiling asks for tiles of {tile[0]} x {tile[1]} pixels; this decoder paints {wanted} alone"
            )
        self.use_tiling, self.tiling = True, Tiling((cells[0], cells[1]), (cells[2], cells[3]))

    def disable_tiling(self) -> None:
        """Whole images again."""
        self.use_tiling = False

    def _decode_tiles(self, decoder: Callable[[Latents], Images], latents: Latents) -> Images:
        """``B Z h w`` → ``B C H W``, by tiles where they are enabled."""
        if not self.use_tiling:
            return decoder(latents)
        return decode_tiled(decoder, latents, self.config.spatial_compression_ratio, self._tiles())

    def _encode_tiles(self, encoder: Callable[[Images], Tensor], images: Images) -> Tensor:
        """``B C H W`` → ``B 2Z h w``, by tiles where they are enabled: mean and log-variance are blended."""
        if not self.use_tiling:
            return encoder(images)
        stride = self.config.spatial_compression_ratio
        check_images(images, stride, self.config.in_channels)
        cells = F.pixel_unshuffle(images, stride)  # the grid of the latent, so that the same tiles serve
        return decode_tiled(lambda tile: encoder(F.pixel_shuffle(tile, stride)), cells, 1, self._tiles())

    def _tiles(self) -> Tiling:
        if self.tiling is None:  # a caller set use_tiling alone
            self.enable_tiling()
        return cast(Tiling, self.tiling)
