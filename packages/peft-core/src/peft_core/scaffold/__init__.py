"""`python -m peft_core new`: the package of a new method, ready to be installed, tested and published.

The templates are files under `templates/`, filled in by `string.Template`; a `$` that is meant is written `$$`.
"""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from string import Template

from packaging.version import Version

from peft_core.discovery import CORE, METHODS, core_version, entries
from peft_core.errors import PeftError

KINDS = {
    "additive": "adds to a layer's output (DeltaAdapter)",
    "weight": "changes a layer's weights (WeightAdapter)",
    "activation": "changes what comes out of a layer (Adapter)",
    "block": "changes what comes out of a whole block (Adapter)",
}

# Template -> the file it becomes.
_COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "LICENSE": "LICENSE",
    "gitignore": ".gitignore",
    "ci.yml": ".github/workflows/ci.yml",
    "init.py": "src/{package}/__init__.py",
}
_OF_KIND = {"method.py": "src/{package}/method.py", "test_method.py": "tests/test_{package}.py"}
# Longer ones would break lines of the templates.
_LONGEST = 30


class ScaffoldError(PeftError, ValueError):
    """A package cannot be made under this name, or at this place. Nothing was written."""


def create(name: str, kind: str = "additive", *, method: str | None = None, directory: Path | None = None) -> Path:
    """Write a working package for a new method and return its folder.

    Args:
        name: the distribution's name, such as "acme-method"; the package is `acme_method`.
        kind: one of `KINDS`, what the method does.
        method: the method's name in configs and files; by default the package's.
        directory: where the folder `name` is made; by default the working directory.

    Raises:
        ScaffoldError: the name is no name for a package or is taken, or the folder exists.
    """
    if kind not in KINDS:
        raise ScaffoldError(f"There is no kind {kind!r} of methods; the kinds are {', '.join(KINDS)}.")
    distribution = re.sub(r"[-_.]+", "-", name).lower()
    package = _identifier(distribution, name)
    method = package if method is None else _identifier(method.lower(), method)
    _refuse_taken(package, method)
    folder = (directory or Path()) / distribution
    if folder.exists():
        raise ScaffoldError(f"{folder} exists already, and is not overwritten. Remove it, or take another name.")
    values = {
        "distribution": distribution,
        "package": package,
        "method": method,
        "peft_type": method.upper(),
        "title": "".join(part.capitalize() for part in method.split("_")),
        "core": requirement(core_version()),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and moved there in one step: no half a package is left behind.
    with tempfile.TemporaryDirectory(prefix=f".{distribution}-", dir=folder.parent) as made:
        whole = Path(made) / distribution
        for path, text in rendered(kind, values).items():
            (whole / path).parent.mkdir(parents=True, exist_ok=True)
            (whole / path).write_text(text, encoding="utf-8")
        shutil.move(whole, folder)
    return folder


def rendered(kind: str, values: dict[str, str]) -> dict[str, str]:
    """The files of a package: path -> content."""
    templates = resources.files(__package__) / "templates"
    files = {f"src/{values['package']}/py.typed": ""}
    for source, names in ((templates / "common", _COMMON), (templates / kind, _OF_KIND)):
        for template, path in names.items():
            text = (source / f"{template}.template").read_text(encoding="utf-8")
            files[path.format(**values)] = Template(text).substitute(values)
    return files


def requirement(version: str | None) -> str:
    """The range of peft-core that a package written today declares: this release up to the next that may break it.

    Below 1.0 every minor release may; "peft-core" alone where the core is not installed and has no version.
    """
    if version is None:
        return CORE
    current = Version(version)
    above = f"0.{current.minor + 1}" if current.major == 0 else f"{current.major + 1}"
    # A pre-release comes before the release of its number, which the range must not ask for yet.
    below = str(current) if current.is_prerelease else f"{current.major}.{current.minor}"
    return f"{CORE}>={below},<{above}"


def _identifier(name: str, given: str) -> str:
    found = re.sub(r"[-_.]+", "_", name)
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", found) or keyword.iskeyword(found):
        raise ScaffoldError(
            f"{given!r} is no name for a package: it becomes {found!r}, which Python cannot import. Use letters, "
            "digits and single hyphens, beginning with a letter, as in acme-method."
        )
    if len(found) > _LONGEST:
        raise ScaffoldError(f"{given!r} is longer than {_LONGEST} characters; take a shorter name.")
    return found


def _refuse_taken(package: str, method: str) -> None:
    for entry in entries(METHODS):
        if entry.name == method:
            raise ScaffoldError(
                f"A method {method!r} is installed already ({entry.source}): two of one name cannot be told apart in "
                "files. Take another name, or give the method one of its own with --method."
            )
    known: dict[str, str] = json.loads((resources.files("peft_core") / "known_methods.json").read_text())
    if method in known:
        raise ScaffoldError(
            f"{method!r} is the method of {known[method]}: files would be ambiguous. Take another name, or give the "
            "method one of its own with --method."
        )
    if importlib.util.find_spec(package) is not None:
        raise ScaffoldError(f"A module {package!r} can be imported already; a package of that name would hide it.")
