"""What SD-style callers ask of any image ↔ latent model beside encode and decode: slicing, tiling, dtype, device."""

from typing import Any

import torch

from psvae.decoders import Tiling
from psvae.errors import ConfigError

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
        """Decode images larger than a tile tile by tile. Encoding is never tiled: every token attends to all.

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
