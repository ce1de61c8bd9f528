"""`python -m peft_core`: what is installed, and whether it works."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from . import discovery
from .errors import PeftError
from .extensions import extensions
from .methods import available_methods, load_method
from .scaffold import KINDS, create


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all is well, 1 if something checked is not."""
    parser = argparse.ArgumentParser(prog="python -m peft_core", description="Method plugins of peft-core.")
    commands = parser.add_subparsers(dest="command", title="commands")
    commands.add_parser("methods", help="list the installed methods, without importing any")
    check = commands.add_parser("check", help="load methods and check their hooks, or their whole contract")
    check.add_argument(
        "names", nargs="*", metavar="NAME", help="methods to check; without any, all methods and extensions"
    )
    check.add_argument("--contract", action="store_true", help="run the contract suite on the methods (needs pytest)")
    check.add_argument("--config", metavar="JSON", help="with --contract: fields of the config, as '{\"r\": 4}'")
    check.add_argument("-k", dest="select", default="", metavar="EXPRESSION", help="with --contract: as pytest's -k")
    check.add_argument("--tracebacks", action="store_true", help="with --contract: pytest's own output")
    new = commands.add_parser("new", help="write the package of a new method into ./NAME")
    new.add_argument("name", metavar="NAME", help="the distribution's name, such as acme-method")
    new.add_argument("--kind", choices=KINDS, default="additive", help=_listed(KINDS))
    new.add_argument("--method", metavar="METHOD", help="the method's name, if it is not the package's")
    new.add_argument("--directory", type=Path, metavar="DIR", help="make the folder NAME there, not here")
    arguments = parser.parse_args(argv)
    if arguments.command == "methods":
        return list_methods()
    if arguments.command == "new":
        return create_package(arguments.name, arguments.kind, arguments.method, arguments.directory)
    if arguments.command == "check" and arguments.contract:
        return check_contracts(arguments.names, arguments.config, arguments.select, arguments.tracebacks)
    if arguments.command == "check":
        return check_plugins(arguments.names)
    parser.print_help()
    return 0


def list_methods() -> int:
    """Print the table of installed methods and extensions."""
    rows = [("method", "distribution", "version", "status")]
    for info in available_methods().values():
        status = info.problem.splitlines()[0] if info.problem else "ok"
        rows.append((info.name, info.distribution or "", info.version or "", status))
    if len(rows) == 1:
        print("No methods are installed.")
    else:
        _print_table(rows)
    installed = discovery.entries(discovery.EXTENSIONS)
    if installed:
        print()
        rows = [("extension", "distribution", "version", "status")]
        for entry in installed:
            status = "disabled" if discovery.is_disabled(entry) else "ok"
            rows.append((entry.name, entry.source.distribution or "", entry.source.version or "", status))
        _print_table(rows)
    plugins = (*discovery.entries(discovery.METHODS), *installed)
    idle = {name for name in discovery.disabled_names() if not any(discovery.is_named(p, name) for p in plugins)}
    if idle:
        print(f"\n{discovery.DISABLE_VARIABLE} names nothing installed: {', '.join(sorted(idle))}")
    return 0


def check_plugins(names: Sequence[str]) -> int:
    """Load the named methods, or all methods and extensions, and print what is wrong with each."""
    failed = 0
    for name in names or available_methods():
        failed += not _passes(f"method {name}", partial(load_method, name))
    if not names:
        for entry in discovery.entries(discovery.EXTENSIONS):
            if not discovery.is_disabled(entry):
                failed += not _passes(f"extension {entry.name}", partial(extensions.load_one, entry))
    return 1 if failed else 0


def check_contracts(names: Sequence[str], config: str | None, select: str, tracebacks: bool) -> int:
    """Run the contract suite on the named methods, or on all of them."""
    try:
        from .testing.command import check_contract
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        print(error, file=sys.stderr)
        return 1
    failed = 0
    for name in names or available_methods():
        try:
            failed += not check_contract(name, config, select=select, tracebacks=tracebacks)
        except PeftError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def create_package(name: str, kind: str, method: str | None, directory: Path | None) -> int:
    """Write the package of a new method, and say what comes next."""
    try:
        folder = create(name, kind, method=method, directory=directory)
    except PeftError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(path)
    print(f"\nNow: cd {folder} && python -m pip install -e '.[test]' && python -m pytest")
    return 0


def _listed(kinds: Mapping[str, str]) -> str:
    return "what the method does: " + "; ".join(f"{kind} {what}" for kind, what in kinds.items())


def _passes(what: str, load: Callable[[], object]) -> bool:
    try:
        load()
    except PeftError as error:
        print(f"{what}: {type(error).__name__}")
        print("\n".join(f"    {line}" for line in str(error).splitlines()))
        return False
    print(f"{what}: ok")
    return True


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
