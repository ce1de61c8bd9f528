"""What a plugin may implement. All of it is cold path: nothing here runs per forward or per generated token.

An implementation declares only the arguments it needs; pluggy passes those by name, so a spec can grow
arguments for years without breaking a plugin. Defaults live in `defaults.py`, itself a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .adapter import Adapter
    from .calibration import Batches
    from .combining import CombineSource
    from .config import AdapterConfig
    from .layers import BaseLayer, SiteRequest
    from .records import AdapterState, Structure

PROJECT = "peft_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class MethodSpecs:
    """Hooks of one method. Each method has a plugin manager of its own."""

    @hookspec(firstresult=True)
    def peft_config(self) -> type[AdapterConfig]:  # type: ignore[empty-body]
        """Return the method's config class; its `peft_type` is the method's name in upper case."""

    @hookspec(firstresult=True)
    def peft_match(self, config: AdapterConfig, path: str, module: nn.Module, model: nn.Module) -> bool | None:
        """Say whether `module` at `path` gets an adapter; None leaves it to `target_modules`."""

    @hookspec(firstresult=True)
    def peft_resolve(
        self, config: AdapterConfig, model: nn.Module, matched: Mapping[str, nn.Module]
    ) -> AdapterConfig | None:
        """Return `config.resolve(...)` with what this model makes of fields left open; None leaves it as it is.

        The result is what the other hooks see and what is saved; `target_modules` is settled before. `matched`
        are the modules that `target_modules` or `peft_match` selected, by path.
        """

    @hookspec(firstresult=True)
    def peft_structure(self, config: AdapterConfig, model: nn.Module) -> Structure | None:
        """Return modules to put in place of others before sites are chosen; None to leave the model's build alone.

        `config` is the user's. The change goes when the adapter goes, and is made again when it is loaded.
        """

    @hookspec
    def peft_sites(  # type: ignore[empty-body]
        self, config: AdapterConfig, model: nn.Module, matched: Mapping[str, nn.Module]
    ) -> Sequence[SiteRequest]:
        """Return sites beyond the matched modules: single parameters, embedding rows, tied twins, blocks.

        `matched` are the modules that `target_modules` or `peft_match` selected, by path.
        """

    @hookspec
    def peft_prepare(
        self,
        model: nn.Module,
        name: str,
        config: AdapterConfig,
        layers: Sequence[BaseLayer],
        shared: nn.Module,
        trusted: bool,
    ) -> None:
        """See all sites before any adapter is built: shared tensors, budgets, refusals across adapters.

        `trusted` says that the config was written by the user: from a file, what it names in vain is no error,
        and its patterns are matched within limits.

        `shared` is the adapter's own module for tensors that several sites use; it is moved with the model
        and saved once. Raise a `PeftError` to refuse.
        """

    @hookspec(firstresult=True)
    def peft_build(  # type: ignore[empty-body]
        self,
        config: AdapterConfig,
        layer: BaseLayer,
        shared: nn.Module,
        model: nn.Module,
        tensors: Mapping[str, Tensor] | None,
    ) -> Adapter:
        """Build the adapter of one layer, with empty parameters (`layer.parameter(...)`).

        `tensors` holds the checkpoint's part for this layer where one is being loaded, by the file's keys (what
        `peft_state_key` makes of slots): shapes may come from it. Otherwise the core calls
        `adapter.reset_parameters()` afterwards.
        """

    @hookspec(firstresult=True)
    def peft_merge(  # type: ignore[empty-body]
        self, config: AdapterConfig, adapter: Adapter, params: dict[str, Tensor], arguments: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the weights that make the bare base layer compute what base and adapter compute together.

        `arguments` are request arguments given to the merge: the case that the merged weights are for.
        """

    @hookspec(firstresult=True)
    def peft_state_key(self, config: AdapterConfig, key: str) -> str:  # type: ignore[empty-body]
        """Map a slot of an adapter to its key in the file, one to one; the core inverts it for loading."""

    @hookspec(firstresult=True)
    def peft_calibrate(
        self, model: nn.Module, name: str, config: AdapterConfig, layers: Sequence[BaseLayer], batches: Batches
    ) -> AdapterState | None:
        """Look at data before the adapters are built; return a config and starting values.

        Called where the user gave batches. A config that selects other sites, or gives them other sizes, is what is
        built and saved. None: nothing to say about these sites.
        """

    @hookspec(firstresult=True)
    def peft_combine(
        self,
        model: nn.Module,
        name: str,
        sources: Sequence[CombineSource],
        how: str,
        config: AdapterConfig | None,
        options: Mapping[str, Any],
    ) -> AdapterState | None:
        """Return the config and the tensors of an adapter made of `sources`; None for an unknown `how`.

        An empty `how` is your usual one. `config` is the new adapter's where the user gave one. Raise a `CombineError`
        where these adapters do not fit.
        """

    @hookspec(firstresult=True)
    def peft_step(
        self,
        model: nn.Module,
        name: str,
        config: AdapterConfig,
        adapters: Mapping[str, Adapter],
        shared: nn.Module,
        event: str,
        step: int,
        optimizer: torch.optim.Optimizer,
    ) -> AdapterConfig | None:
        """Act at a step of the optimizer (0-based): `event` is "before" it, gradients being present, or "after" it.

        Gradients may be changed in place before, tensors after. Return `config.resolve(...)` where the step changed
        what files should say (ranks, for instance).
        """

    @hookspec(firstresult=True)
    def peft_param_groups(
        self, config: AdapterConfig, parameters: Mapping[str, nn.Parameter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]] | None:
        """Return an optimizer's parameter groups, each tensor of `parameters` in one of them; None for a single group.

        Names are the site's path, a dot, and the tensor's name; a group without `lr` or `weight_decay` has the given.
        """


class ExtensionSpecs:
    """Registries, broadcast to every installed extension (entry-point group `peft_core.extensions`)."""

    @hookspec(firstresult=True)
    def peft_layer(self, path: str, module: nn.Module) -> BaseLayer | None:
        """Return the view of a module's storage (quantised, sharded ...), or None if it is not yours."""

    @hookspec
    def peft_architectures(self) -> Mapping[str, Mapping[str, Sequence[str]]]:  # type: ignore[empty-body]
        """Return the roles of model types: `{model_type: {role: module names}}`."""

    @hookspec(firstresult=True)
    def peft_checkpoint(self, path: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Read a foreign checkpoint as (config dict, tensors in the library's own keys), or None."""

    @hookspec(firstresult=True)
    def peft_export(
        self, save_format: str, path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> bool | None:
        """Write an adapter (its config and tensors as in the library's own files) in a foreign format into a directory.

        Return True where it was written, None for a format that is not yours.
        """
