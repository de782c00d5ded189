"""Models that people run with mlx-lm: the [models.*] tables of models.toml. Imports no mlx."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass

from leankv_mlx.errors import UsageError
from leankv_mlx.resources import demo_model, models_toml


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model.

    Attributes:
        name: what the commands call it.
        repo: its hub id; "" for the bundled demo model.
        full_layers: layers whose keys and values grow with the context; these are compressed.
        sliding_layers: layers that keep `window` tokens; they stay as they are.
        context: tokens it was made for.
        weights: bytes of its parameters.
        kv: the profile to begin with.
        offered: whether the chat names it where no model was chosen.
    """

    name: str
    repo: str
    full_layers: int
    sliding_layers: int
    window: int
    kv_heads: int
    head_dim: int
    context: int
    weights: int
    kv: str
    offered: bool = False

    @property
    def layers(self) -> int:
        """All layers with keys and values."""
        return self.full_layers + self.sliding_layers


def catalogue() -> list[CatalogueEntry]:
    """The models of models.toml in its order, the bundled demo model first."""
    with models_toml().open("rb") as file:
        rows = tomllib.load(file)["models"]
    entries = [
        CatalogueEntry(
            name,
            row["repo"],
            row["layers"] - row.get("sliding_layers", 0),
            row.get("sliding_layers", 0),
            row.get("window", 0),
            row["kv_heads"],
            row["head_dim"],
            row["context"],
            row["weights"],
            row["kv"],
            row.get("offered", False),
        )
        for name, row in rows.items()
    ]
    return [_demo(), *entries]


def find(name: str) -> CatalogueEntry:
    """The entry of a name or hub id.

    Raises:
        UsageError: there is none.
    """
    entries = catalogue()
    for entry in entries:
        if name in (entry.name, entry.repo):
            return entry
    longer = [entry.name for entry in entries if name and entry.name.startswith(name)]
    meant = f" (is it {' or '.join(longer)}?)" if longer else ""
    raise UsageError(f"no model '{name}' in the list{meant}; leankv models shows the names.")


def in_full(name: str) -> str:
    """The hub id of a name in the list; anything else as it is."""
    return next((entry.repo for entry in catalogue() if entry.name == name), name)


def _demo() -> CatalogueEntry:
    folder = demo_model()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return CatalogueEntry(
        "demo",
        "",
        config["num_hidden_layers"],
        0,
        0,
        config["num_key_value_heads"],
        config["head_dim"],
        config["max_position_embeddings"],
        (folder / "model.safetensors").stat().st_size,
        "default",
    )
