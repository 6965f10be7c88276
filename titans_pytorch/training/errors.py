"""What a user can do something about: shown as one sentence, without a trace."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
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


def report_errors(work: Callable[[], int]) -> int:
    """Do it; what a user can mend is told in one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        # Said of blocks whose output is a view; nothing of ours changes it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return work()
        except SettingsError as error:
            print(f"error{'' if is_first() else f' in process {process()}'}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read our output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def process() -> str:
    """Its number among all, as `accelerate launch` and `torchrun` say it."""
    return os.environ.get("RANK", "0")


def is_first() -> bool:
    return process() == "0"
