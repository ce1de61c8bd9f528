"""`plan`: a draft made on the meta device, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .config import AdapterConfig
from .errors import TargetError
from .planning import META, draft


@dataclass(frozen=True)
class PlannedSite:
    """One row of a plan: the module, what it is, and what it would get."""

    path: str
    module: str
    shape: str
    adapter: str
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What `get_peft_model` would do. `problems` is empty when it would succeed; printing shows a table."""

    method: str
    config: AdapterConfig
    sites: tuple[PlannedSite, ...]
    problems: tuple[str, ...]
    trainable: int
    base: int

    def check(self) -> None:
        """Raise `TargetError` with all problems at once, if there are any."""
        if self.problems:
            raise TargetError("the plan has problems:\n" + "\n".join(f"- {problem}" for problem in self.problems))

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.sites)} sites, {self.trainable:,} trainable parameters on {self.base:,}"]
        rows = [("module", "type", "shape", "adapter", "parameters")] + [
            (site.path or "(the model)", site.module, site.shape, site.adapter, f"{site.parameters:,}")
            for site in self._grouped()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
            lines.append("  ".join([*cells, row[4].rjust(widths[4])]))
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)

    def _grouped(self) -> list[PlannedSite]:
        """Sites that differ only in numbers of their path, shown as one row."""
        groups: dict[tuple[str, str, str, str], list[PlannedSite]] = {}
        for site in self.sites:
            pattern = ".".join("*" if part.isdigit() else part for part in site.path.split("."))
            groups.setdefault((pattern, site.module, site.shape, site.adapter), []).append(site)
        rows = []
        for (pattern, module, shape, adapter), members in groups.items():
            path = members[0].path if len(members) == 1 else f"{pattern} ({len(members)} times)"
            rows.append(PlannedSite(path, module, shape, adapter, sum(m.parameters for m in members)))
        return rows


def plan(model: nn.Module, config: AdapterConfig, adapter_name: str = "default") -> Plan:
    """Show what adapting `model` with `config` would do. Nothing is changed; meta models are welcome.

    Problems with the selection are listed in the plan, all at once. Raises `MethodError` where the method
    itself cannot be loaded.
    """
    found = draft(model, adapter_name, config, device=META)
    record = found.record
    counted = {id(p): p.numel() for owner, key in record.learned if (p := owner._parameters[key]) is not None}
    sites = []
    # Before the adapters are built, problems leave none of them.
    for layer, adapter in zip(found.layers, record.adapters, strict=False):
        shape = " × ".join(map(str, layer.shape))
        count = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        sites.append(PlannedSite(layer.path, type(layer.module).__name__, shape, type(adapter).__name__, count))
    return Plan(
        record.method.name,
        record.config,
        tuple(sites),
        tuple(found.problems),
        sum(counted.values()),
        sum(p.numel() for p in found.tree.parameters().values()),
    )
