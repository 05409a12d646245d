"""The model card written beside the weights: what it is, how it was made, what was measured."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["MARK", "model_card"]

MARK = "<!-- written by psvae; delete this line to keep your own edits -->"


def model_card(
    module: nn.Module, *, training_command: str | None = None, metrics: Mapping[str, float] | None = None
) -> str:
    """Markdown with the Hub's metadata header.

    Args:
        module: a psvae module with a ``config``, and a class with ``pipeline_tag`` and ``card_tags``.
        training_command: the command that made the weights.
        metrics: measured numbers by name.
    """
    kind: Any = type(module)
    name, config = kind.__name__, module.config
    values: Any = config.to_dict()  # type: ignore[union-attr]
    task = f"pipeline_tag: {kind.pipeline_tag}\n" if kind.pipeline_tag else ""
    count = sum(parameter.numel() for parameter in module.parameters())
    rows = [f"| {key} | {value:.4g} |" for key, value in (metrics or {}).items()]
    measured = "\n".join(["| measure | value |", "| --- | --- |", *rows]) if rows else "Nothing was recorded."
    return f"""---
library_name: psvae
{task}tags: [{", ".join(("psvae", *kind.card_tags))}]
---
{MARK}

# {name}

{count / 1e6:.2f} M parameters. Load it with the psvae library:

```python
from psvae import {name}

model = {name}.from_pretrained("path or Hub id")
```

## Training

{f"```shell{chr(10)}{training_command}{chr(10)}```" if training_command else "No command was recorded."}

## Measured

{measured}

## Configuration

```json
{json.dumps(values, indent=2)}
```
"""
