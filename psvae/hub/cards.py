"""The model card written beside the weights: what it is, how it was made, what was measured."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from psvae.latents import LatentSpec

__all__ = ["MARK", "model_card"]

MARK = "<!-- written by psvae; delete this line to keep your own edits -->"


def model_card(
    module: nn.Module,
    *,
    training_command: str | None = None,
    training_data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
) -> str:
    """Markdown with the Hub's metadata header.

    Args:
        module: a psvae module with a ``config``, and a class with ``pipeline_tag`` and ``card_tags``.
        training_command: the command that made the weights.
        training_data: what they learned from, in words.
        metrics: measured numbers by name.
        license: the Hub's name of it.
    """
    kind: Any = type(module)
    name, config = kind.__name__, module.config
    values: Any = config.to_dict()  # type: ignore[union-attr]
    task = f"pipeline_tag: {kind.pipeline_tag}\n" if kind.pipeline_tag else ""
    terms = f"license: {license}\n" if license else ""
    count = sum(parameter.numel() for parameter in module.parameters())
    rows = [f"| {key} | {value:.4g} |" for key, value in (metrics or {}).items()]
    spec = getattr(module, "latent_spec", None)
    latent = "" if spec is None else f"\n## Latent\n\n{_latent(spec)}\n"
    data = f"{training_data}\n\n" if training_data else ""
    measured = "\n".join(["| measure | value |", "| --- | --- |", *rows]) if rows else "Nothing was recorded."
    return f"""---
library_name: psvae
{terms}{task}tags: [{", ".join(("psvae", *kind.card_tags))}]
---
{MARK}

# {name}

{count / 1e6:.2f} M parameters. Load it with the psvae library:

```python
from psvae import {name}

model = {name}.from_pretrained("path or Hub id")
```
{latent}
## Training

{data}{f"```shell{chr(10)}{training_command}{chr(10)}```" if training_command else "No command was recorded."}

## Measured

{measured}

## Configuration

```json
{json.dumps(values, indent=2)}
```
"""


def _latent(spec: LatentSpec) -> str:
    mean, std = spec.mean.float(), spec.std.float()
    kind = "channel" if spec.grid is None else f"element of a grid of {spec.grid[0]} x {spec.grid[1]}"
    by = "`encode` normalises and `decode` undoes it" if spec.applied_by == "encode" else "the caller's to apply"
    return (
        f"{spec.channels} channels, one cell for {spec.stride} x {spec.stride} pixels. Statistics per {kind}, {by}: "
        f"means {mean.min():.3g} to {mean.max():.3g}, standard deviations {std.min():.3g} to {std.max():.3g}."
    )
