"""Hooks that record what a module gives, for `output_hidden_states` say, must see what its adapters make of it.

transformers puts such hooks on the modules of certain classes, found by their class: on the base module inside a site.
There they stand by, and the site calls them with its own output. A hook of the user's own sits wherever it was put.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

RECORDING = "transformers.utils.output_capturing"


class Deferred:
    """A recording hook in its place on the base module: it does nothing there."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> None:
        """Stand by."""


def recorders(module: nn.Module) -> list[Callable[..., Any]]:
    """The recording hooks of a module, which from now on stand by."""
    found = []
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Deferred):
            found.append(hook.hook)
        elif getattr(hook, "__module__", "") == RECORDING:
            module._forward_hooks[key] = Deferred(hook)
            found.append(hook)
    return found


def give_back(module: nn.Module) -> None:
    """Let the recording hooks of a module act by themselves again."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Deferred):
            module._forward_hooks[key] = hook.hook
