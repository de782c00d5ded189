"""Where the data that ships with the package lies, wheel and editable install alike."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def demo_model() -> Path:
    """Folder of the small model that every command uses when none is named."""
    return _PACKAGE / "demo_model"


def models_toml() -> Path:
    """The list of compression profiles and models."""
    packaged = _PACKAGE / "models.toml"
    return packaged if packaged.exists() else _PACKAGE.parent / "models.toml"


def metal_sources() -> Path:
    """Folder of the GPU kernels' sources."""
    packaged = _PACKAGE / "metal"
    return packaged if packaged.exists() else _PACKAGE.parent / "metal"


def masks() -> Path:
    """Folder of the channel masks that ship with the package, which need not exist."""
    return _PACKAGE / "masks"


def bases() -> Path:
    """Folder of the bases of keys that ship with the package, which need not exist."""
    return _PACKAGE / "bases"
