"""Write the core's directory of known methods from the workspace: `python -m tools.known_methods [--check]`.

The directory is data for one error message, "to get this method: pip install ...". The code of the core names
no method, so it is generated from the entry points that the packages of this workspace declare.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "packages/peft-core/src/peft_core/known_methods.json"


def collect(packages: Path = ROOT / "packages") -> dict[str, str]:
    """`{method: distribution}` of all packages, in alphabetical order.

    Raises:
        ValueError: two packages declare the same method.
    """
    known: dict[str, str] = {}
    for path in sorted(packages.glob("*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for name in project.get("entry-points", {}).get("peft_core.methods", {}):
            if name.lower() in known:
                raise ValueError(f"{known[name.lower()]} and {project['name']} both declare {name!r}")
            known[name.lower()] = project["name"]
    return dict(sorted(known.items()))


def render() -> str:
    return json.dumps(collect(), indent=2) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    if not parser.parse_args().check:
        TARGET.write_text(render(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != render():
        print(f"{TARGET} is out of date: run python -m tools.known_methods")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
