"""The settings, one field for each."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Select, Static, Switch

from leankv_app.factory import full_kv
from leankv_app.guard import Guarded
from leankv_app.settings import Settings, checked
from leankv_mlx.errors import ConfigError

_ABOUT = {
    "theme": "Theme",
    "model": "Model at start",
    "kv": "Compression at start",
    "system": "System prompt",
    "temperature": "Temperature (0 is greedy)",
    "top_p": "Top p",
    "max_tokens": "Longest reply in tokens",
    "panel": "Memory panel",
}


class SettingsScreen(Guarded, ModalScreen[Settings | None]):
    """Gives the changed settings."""

    AUTO_FOCUS = "Input"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="settings.cancel"),
        Binding("ctrl+s", "save", "Save", id="settings.save", priority=True),
    ]

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog large") as box:
            box.border_title = "Settings"
            with VerticalScroll():
                for field in fields(Settings):
                    value = getattr(self._settings, field.name)
                    yield Label(_ABOUT[field.name])
                    if field.name == "theme":
                        names = sorted(self.app.available_themes)
                        yield Select(
                            [(name, name) for name in names],
                            value=value if value in names else names[0],
                            allow_blank=False,
                            id="set-theme",
                        )
                    elif isinstance(value, bool):
                        yield Switch(value, id=f"set-{field.name}")
                    else:
                        yield Input(str(value), id=f"set-{field.name}")
            yield Static("", id="settings-error", markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Save (Ctrl+S)", variant="primary", id="save")
                yield Button("Cancel", id="cancel")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "save":
            self.action_save()
        else:
            self.dismiss(None)

    def action_save(self) -> None:
        """Check and close; a value that makes no sense is said and stays."""
        changed = self._settings
        try:
            for field in fields(Settings):
                widget = self.query_one(f"#set-{field.name}")
                assert isinstance(widget, Select | Switch | Input)
                value = checked(field.name, widget.value)
                changed = replace(changed, **{field.name: value})
            full_kv(changed.kv)
        except (ValueError, ConfigError) as error:
            self.query_one("#settings-error", Static).update(str(error))
            return
        self.dismiss(changed)
