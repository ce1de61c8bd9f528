"""A plugin written elsewhere: built as a wheel, installed next to the core's, and proved there by its own test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torch import nn

from peft_core import PeftModel, get_peft_model, load_method, register_method, unregister_method

ROOT = Path(__file__).resolve().parent.parent
ACME = ROOT / "examples" / "acme-vera"


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two wheels and nothing else of this repository."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site-packages")
    for project in (ROOT / "packages" / "peft-core", ACME):
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels, cwd=project)
    # uv rather than pip: environments made by uv have no pip.
    run(
        sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps", "--no-index",
        "--python", sys.executable, "--target", target, *wheels.glob("*.whl"),
    )  # fmt: skip
    return target


def test_its_own_suite_passes_on_installed_wheels(site_packages: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_acme_vera.py"
    test.write_text((ACME / "tests" / "test_acme_vera.py").read_text())
    env = {**os.environ, "PYTHONPATH": str(site_packages)}
    where = "import acme_vera, peft_core; print(acme_vera.__file__); print(peft_core.__file__)"
    for file in run(sys.executable, "-c", where, cwd=tmp_path, env=env).split():
        assert Path(file).is_relative_to(site_packages), "the repository's own sources would be tested"
    said = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, test,
        cwd=tmp_path, env=env,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) > 100, said
    assert "skipped" not in said, said


def test_it_is_found_by_metadata(site_packages: Path, tmp_path: Path) -> None:
    code = (
        "import sys, peft_core; info = peft_core.available_methods()['vera']; "
        "print(info.distribution, info.version, info.problem, 'acme_vera' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(site_packages)}
    assert run(sys.executable, "-c", code, cwd=tmp_path, env=env).split() == ["acme-vera", "0.1.0", "None", "False"]


def test_it_stays_small() -> None:
    """About 60 lines of code, and a test of six: the measure of how much the core takes off an author's hands."""
    source = (ACME / "src" / "acme_vera.py").read_text()
    code = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 65
    test = (ACME / "tests" / "test_acme_vera.py").read_text()
    assert len([line for line in test.splitlines() if line.strip()]) <= 6


class Net(nn.Module):
    """Two linear layers, neither of which fills the shared projections in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 16)
        self.second = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


@pytest.fixture
def vera(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ACME / "src")
    import acme_vera

    yield register_method(acme_vera, replace=True)
    unregister_method("vera")


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


# HF PEFT warns about a choice that is the point of the test.
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning")
@pytest.mark.parametrize("saved", [True, False], ids=["projection-saved", "projection-from-seed"])
class TestHuggingFacePeft:
    """Files and outputs are those of HF PEFT, projections made from a seed included."""

    options: dict[str, Any] = {"r": 4, "target_modules": ["first", "second"], "projection_prng_key": 7}  # noqa: RUF012

    def test_theirs_loads_here(self, vera: Any, saved: bool, tmp_path: Path) -> None:
        theirs = peft.get_peft_model(make(), peft.VeraConfig(**self.options, save_projection=saved))
        torch.manual_seed(1)
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                nn.init.normal_(parameter)
        theirs.save_pretrained(tmp_path)
        ours = PeftModel.from_pretrained(make(), tmp_path)
        x = torch.randn(3, 10)
        # float32: the same products, in another order of additions.
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
        state = get_peft_model_state_dict(theirs)
        mine = ours.get_adapter_state_dict()
        assert mine.keys() == state.keys()
        assert all(torch.equal(mine[key], state[key]) for key in mine)

    def test_ours_loads_there(self, vera: Any, saved: bool, tmp_path: Path) -> None:
        ours = get_peft_model(make(), load_method("vera")(**self.options, save_projection=saved))
        torch.manual_seed(1)
        for parameter in ours.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
        x = torch.randn(3, 10)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)  # as above


def test_adapters_of_other_ranks_and_seeds_live_together(vera: Any) -> None:
    """Each has its own projections (HF PEFT's fail at the first forward where the ranks differ)."""
    configs = {
        "small": vera(r=2, target_modules=["first", "second"], projection_prng_key=1),
        "large": vera(r=8, target_modules=["second"], projection_prng_key=2),
    }
    alone = {}
    x = torch.randn(3, 10)
    model = None
    for name, config in configs.items():
        single = get_peft_model(make(), config, name)
        nn.init.ones_(single.second.of(name)[""].vera_lambda_b)
        alone[name] = single(x)
        if model is None:
            model = get_peft_model(make(), config, name)
        else:
            model.add_adapter(name, config)
        nn.init.ones_(model.second.of(name)[""].vera_lambda_b)
    assert model is not None
    for name, expected in alone.items():
        model.set_adapter(name)
        assert torch.equal(model(x), expected)
    mixed = model(x, adapter_names=["large", "small", "large"])
    torch.testing.assert_close(mixed[1], alone["small"][1], rtol=0, atol=1e-6)  # batches of another size
    torch.testing.assert_close(mixed[2], alone["large"][2], rtol=0, atol=1e-6)
