"""The errors psvae raises: one root, one class per kind of mistake.

Each also derives from the built-in that a caller would expect, so ``except ValueError`` works too.
Every message says what came, what was wanted and what to do.
"""

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "ConfigError",
    "DtypeError",
    "MissingDependencyError",
    "PSVAEError",
    "RangeWarning",
    "ShapeError",
]


class PSVAEError(Exception):
    """Root of every error that psvae raises on purpose."""


class ConfigError(PSVAEError, ValueError):
    """A configuration field is unknown, of the wrong type, or out of range."""


class ShapeError(PSVAEError, ValueError):
    """A tensor has the wrong rank, channel count or size, or holds no usable numbers."""


class DtypeError(PSVAEError, TypeError):
    """A tensor has a dtype that the module cannot take."""


class CheckpointError(PSVAEError, RuntimeError):
    """Weights could not be found, read, trusted, matched or written."""


class MissingDependencyError(PSVAEError, ImportError):
    """An optional library is absent or broken; the message says how to mend it."""


class CheckpointWarning(UserWarning):
    """A file was written, and what it has no place for must be passed when it is loaded."""


class RangeWarning(UserWarning):
    """Values lie far outside the range that a module was made for."""
