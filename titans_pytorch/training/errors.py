"""What a user can do something about: shown as one sentence, without a trace."""

from __future__ import annotations

from types import ModuleType


class SettingsError(ValueError):
    """A setting, file or run that cannot be used; the message says which, what came, and what is allowed."""


def needed(name: str, purpose: str) -> ModuleType:
    """A package that only training needs, imported when it is."""
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        package = name.split(".")[0]
        message = (
            f"{purpose} needs the package {package}, which is not installed: pip install 'titans-pytorch[examples]'"
        )
        raise SettingsError(message) from None
