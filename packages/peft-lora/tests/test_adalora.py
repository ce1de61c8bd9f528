"""AdaLoRA: the paper's formulas, the schedule, and what a training does and leaves."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import PeftModel, drive, get_peft_model
from peft_core.errors import ConfigError, PeftError, TargetError
from peft_lora import AdaLoraConfig, LoraConfig, plot_ranks, prune_ranks, rank_history
from peft_lora.adalora.allocation import budget

OPTIONS: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["up", "down"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.down(torch.tanh(self.up(x)))
        return {"out": out, "loss": out.pow(2).mean()}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def adapted(**options: Any) -> Any:
    model = get_peft_model(net(), AdaLoraConfig(**{**OPTIONS, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.get_adapter_state_dict().values():
            tensor.normal_(0, 0.4, generator=generator)
    return model


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        model(inputs(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model: Any) -> dict[str, Tensor]:
    found = model.get_adapter_state_dict()
    return {key.removeprefix("base_model.model."): value.detach().clone() for key, value in found.items()}


def ranks(model: Any) -> dict[str, int]:
    found = tensors(model)
    return {key.removesuffix(".lora_E"): int((t != 0).sum()) for key, t in found.items() if key.endswith("lora_E")}


# -- formulas


def test_the_layer_computes_the_papers_formula() -> None:
    """Equation 3, W + P Λ Q, each row of E one singular value."""
    model, x = adapted(lora_alpha=3), inputs()
    t, base = tensors(model), net()
    scaling = 3 / (4 + 1e-5)
    expected = base.up(x)
    for i in range(4):
        expected = expected + scaling * (x @ t["up.lora_A"][i])[:, None] * t["up.lora_E"][i] * t["up.lora_B"][:, i]
    torch.testing.assert_close(model.up(x), expected, rtol=1e-12, atol=1e-12)


def test_the_loss_has_the_orthogonality_of_all_matrices() -> None:
    model = adapted(orth_reg_weight=0.3).train()
    output, t = model(inputs()), tensors(model)
    norms = []
    for path in ("up", "down"):
        a, b = t[f"{path}.lora_A"], t[f"{path}.lora_B"]
        norms += [(a @ a.t() - torch.eye(4)).pow(2).sum().sqrt(), (b.t() @ b - torch.eye(4)).pow(2).sum().sqrt()]
    expected = 0.3 * sum(norms) / 4
    torch.testing.assert_close(model.adapter_losses()["orthogonality"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(output["loss"], output["out"].pow(2).mean() + expected, rtol=1e-12, atol=0)
    assert torch.equal(model.eval()(inputs())["loss"], model(inputs())["out"].pow(2).mean())
    model.set_requires_grad("default", False)
    assert not (model.train()(inputs()), model.adapter_losses())[1]


def test_one_step_by_hand() -> None:
    """Equations 7 to 11 at the second step, with sensitivities of two steps."""
    model = adapted(beta1=0.6, beta2=0.7, orth_reg_weight=0.0, total_step=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    drive(model, optimizer)
    names = [f"{path}.lora_{end}" for path in ("up", "down") for end in "ABE"]
    mean = dict.fromkeys(names, 0.0)
    spread = dict.fromkeys(names, 0.0)
    sites = {"up": model.up, "down": model.down}
    for step in range(2):
        model(inputs(step))["loss"].backward()
        before = {n: getattr(sites[n.split(".")[0]].adapters.default, n.split(".")[1]) for n in names}
        grads = {n: p.grad.clone() for n, p in before.items()}
        updated = {n: p.detach() - 0.1 * grads[n] for n, p in before.items()}
        for n in names:
            sensitivity = (updated[n] * grads[n]).abs()
            mean[n] = 0.6 * mean[n] + 0.4 * sensitivity
            spread[n] = 0.7 * spread[n] + 0.3 * (sensitivity - mean[n]).abs()
        optimizer.step()
        optimizer.zero_grad()
    scores = {}
    for path in ("up", "down"):
        a, b, e = (mean[f"{path}.lora_{end}"] * spread[f"{path}.lora_{end}"] for end in "ABE")
        scores[path] = [float(e[i, 0] + a[i].mean() + b[:, i].mean()) for i in range(4)]
    kept, due = budget(model.peft_config["default"], 2, 1)
    assert due and kept == int(4 * (1 - 1 / 3) ** 3 + 4) == 5
    lowest = sorted(scores["up"] + scores["down"])[: 8 - kept]
    mine = tensors(model)
    for path in ("up", "down"):
        assert [float(v) == 0 for v in mine[f"{path}.lora_E"]] == [score in lowest for score in scores[path]]


@pytest.mark.parametrize("step", range(20))
def test_the_budget_is_cubic_between_the_phases(step: int) -> None:
    """Equation 12."""
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=20, tinit=4, tfinal=6, deltaT=3)
    rows, due = budget(config, 5, step)
    if step <= 4:
        assert (rows, due) == (30, False)
    elif step <= 14:
        assert rows == int(10 + 20 * (1 - (step - 4) / 10) ** 3)
        assert due is (step % 3 == 0)
    else:
        assert (rows, due) == (10, True)


# -- training


def test_the_training_ends_with_the_budget() -> None:
    model = adapted(deltaT=4)  # the last step, 9, is no multiple of 4
    optimizer = optimizer_of(model)
    drive(model, optimizer)
    train(model, optimizer, range(8))
    assert sum(ranks(model).values()) == 8  # what step 4 pruned has grown again
    train(model, optimizer, range(8, 10))
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == sum(ranks(model).values()) == 4
    assert not [key for key in tensors(model) if "sensitivity" in key or "uncertainty" in key]
    assert [step for step, _ in rank_history(model)] == [4, 8, 9]
    before = tensors(model)
    train(model, optimizer, range(10, 12))  # goes on at the ranks it has, with the optimizer it has
    assert {k: v.shape for k, v in tensors(model).items()} == {k: v.shape for k, v in before.items()}
    assert not torch.equal(tensors(model)["up.lora_A"], before["up.lora_A"])


def test_the_cut_changes_no_output() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    drive(model, optimizer)
    train(model, optimizer, range(9))
    with torch.no_grad():
        expected = model.eval()(inputs(50))["out"]
    before = ranks(model)
    assert prune_ranks(model) == before and min(before.values()) < 4
    with torch.no_grad():
        torch.testing.assert_close(model(inputs(50))["out"], expected, rtol=1e-12, atol=1e-12)


def test_steps_after_the_cut_are_those_of_the_uncut_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's state is cut with the tensors; without the cut, what is pruned stays so."""
    found = []
    for cut in (True, False):
        monkeypatch.setattr("peft_lora.adalora.allocation._replicated", lambda cut=cut: not cut)
        model = adapted(orth_reg_weight=0.0)  # that term would let the pruned rows act on the others
        optimizer = optimizer_of(model)
        drive(model, optimizer)
        train(model, optimizer, range(13))
        assert tensors(model)["up.lora_A"].shape == ((ranks(model)["up"], 6) if cut else (4, 6))
        prune_ranks(model)
        found.append(tensors(model))
    for key, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][key], rtol=1e-9, atol=1e-12)


def test_replicas_are_not_cut_until_someone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several processes, gradients are expected in the sizes that they began with."""
    monkeypatch.setattr("peft_lora.adalora.allocation._replicated", lambda: True)
    model, alone = adapted(), adapted()
    optimizer = optimizer_of(model)
    drive(model, optimizer)
    train(model, optimizer, range(10))
    assert model.peft_config["default"].rank_pattern is None
    found = tensors(model)
    assert found["up.lora_A"].shape == (4, 6) and sum(ranks(model).values()) == 4
    assert not [key for key in found if "sensitivity" in key]
    kept = prune_ranks(model, optimizer=optimizer)
    monkeypatch.undo()
    optimizer = optimizer_of(alone)
    drive(alone, optimizer)
    train(alone, optimizer, range(10))
    assert kept == ranks(alone)
    assert model.peft_config["default"].rank_pattern == alone.peft_config["default"].rank_pattern
    assert all(torch.equal(tensor, tensors(alone)[key]) for key, tensor in tensors(model).items())


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for stop in (3, 6, 8):  # before, while, and after ranks change
        options = {"tinit": 3, "tfinal": 3}
        whole = adapted(**options)
        optimizer = optimizer_of(whole)
        drive(whole, optimizer)
        train(whole, optimizer, range(stop))
        whole.save_pretrained(tmp_path / str(stop))
        saved = copy.deepcopy(optimizer.state_dict())
        train(whole, optimizer, range(stop, 10))
        again = PeftModel.from_pretrained(net(), tmp_path / str(stop), is_trainable=True)
        optimizer = optimizer_of(again)
        optimizer.load_state_dict(saved)
        drive(again, optimizer, step=stop)
        train(again, optimizer, range(stop, 10))
        assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
        assert all(torch.equal(t, tensors(again)[key]) for key, t in tensors(whole).items())


def test_a_training_that_nobody_drives_says_so() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match=r"peft_core\.drive\(model, optimizer\)"):
        model(inputs())
    model(inputs())  # once
    driven = adapted()
    optimizer = optimizer_of(driven)
    drive(driven, optimizer)
    train(driven, optimizer, range(5))  # warnings are errors here
    with torch.no_grad():
        adapted().train()(inputs())


def test_a_compiled_training_prunes_the_same() -> None:
    plain, compiled = adapted(), adapted()
    for model in (plain, compiled):
        optimizer = optimizer_of(model)
        drive(model, optimizer)
        call = model.train()
        if model is compiled:
            call = torch.compile(model, fullgraph=True, backend="aot_eager")
        for step in range(10):
            call(inputs(step))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert compiled.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern
    for key, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(compiled)[key], tensor, rtol=1e-9, atol=1e-12)


def test_forwards_without_steps_are_no_training() -> None:
    model = adapted().train()
    for step in range(4):
        model(inputs(step))["loss"].backward()


def test_two_adapters_are_allocated_each_for_itself() -> None:
    """HF PEFT allows one trainable adapter; nothing in the maths needs that."""
    alone = adapted()
    optimizer = optimizer_of(alone)
    drive(alone, optimizer)
    train(alone, optimizer, range(10))
    model = adapted()
    model.add_adapter("other", AdaLoraConfig(**{**OPTIONS, "target_r": 1, "total_step": 10}))
    model.set_adapter(["default", "other"])  # "other" is at its start: the gradients of "default" are what they were
    both = {name: model._peft.adapters[name].parameters() for name in ("default", "other")}
    optimizer = torch.optim.AdamW([{"params": both["default"]}, {"params": both["other"], "lr": 0.0}], lr=0.02)
    drive(model, optimizer)
    train(model, optimizer, range(10))
    assert model.peft_config["default"].rank_pattern == alone.peft_config["default"].rank_pattern
    assert set(ranks_of(model, "other").values()) != {4}


def ranks_of(model: Any, name: str) -> dict[str, int]:
    return {path: int(getattr(model, path).adapters._modules[name].lora_E.shape[0]) for path in ("up", "down")}


def test_a_layer_that_took_no_part_has_no_importance() -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = self.up(x)
            return {"out": out, "loss": out.pow(2).mean()}

    torch.manual_seed(0)
    model = get_peft_model(Half().double(), AdaLoraConfig(**{**OPTIONS, "orth_reg_weight": 0.0}))
    optimizer = optimizer_of(model)
    drive(model, optimizer)
    train(model, optimizer, range(10))
    assert ranks(model)["down"] == 0


def test_all_ranks_may_go_and_the_layer_is_the_base(tmp_path: Path) -> None:
    pattern = {"up.lora_E": [False] * 4, "down.lora_E": [True, False, False, True]}
    model = get_peft_model(net(), AdaLoraConfig(**OPTIONS, rank_pattern=pattern)).eval()
    assert ranks_of(model, "default") == {"up": 0, "down": 2}
    assert torch.equal(model.up(inputs()), net().up(inputs()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True).train()
    again(inputs())["loss"].backward()
    drive(again, optimizer_of(again))
    again.merge_adapter()


# -- looking at it


def test_the_plot_shows_the_history(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    model = adapted()
    with pytest.raises(PeftError, match="no step has pruned"):
        plot_ranks(model)
    optimizer = optimizer_of(model)
    drive(model, optimizer)
    train(model, optimizer, range(10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's own
        ax = plot_ranks(model)
        ax.figure.savefig(tmp_path / "ranks.png")
    image = ax.collections[0].get_array().reshape(2, -1)
    assert [int(v) for v in image[:, -1]] == list(rank_history(model)[-1][1].values())
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_other_adapters_have_no_history() -> None:
    model = get_peft_model(net(), LoraConfig(target_modules=["up"]))
    with pytest.raises(PeftError, match="not an AdaLoRA"):
        rank_history(model)
    with pytest.raises(PeftError, match="no adapters"):
        rank_history(net())


# -- configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_step": None}, "needs total_step"),
        ({"total_step": 0}, "a positive integer"),
        ({"tinit": 10}, "tinit=10 must be less than total_step - tfinal = 10"),
        ({"tinit": 5, "tfinal": 5}, "tinit=5 must be less than total_step - tfinal = 5"),
        ({"beta1": 1.0}, "between 0 and 1"),
        ({"beta2": 0.0}, "between 0 and 1"),
        ({"deltaT": 0}, "positive integer"),
        ({"orth_reg_weight": -0.5}, "from 0 on"),
        ({"target_r": 0}, "positive integer"),
        ({"lora_alpha": 0}, "positive number"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"up": [True]}}, r"\.lora_E"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig(**{**OPTIONS, **options})


def test_r_is_said_to_be_unused() -> None:
    with pytest.warns(UserWarning, match="init_r"):
        config = AdaLoraConfig(total_step=5, r=16)
    assert config.r == 8
    assert config.resolve(init_r=6).init_r == 6


def test_what_the_model_says_against_a_config() -> None:
    with pytest.raises(TargetError, match="target_r=5 is more than init_r=4"):
        get_peft_model(net(), AdaLoraConfig(**{**OPTIONS, "target_r": 5}))
    with pytest.raises(TargetError, match=r"other\.lora_E"):
        get_peft_model(net(), AdaLoraConfig(**OPTIONS, rank_pattern={"other.lora_E": [True]}))
    with pytest.raises(TargetError, match="2 groups"):
        get_peft_model(
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), AdaLoraConfig(**{**OPTIONS, "target_modules": ["0"]})
        )


def test_a_files_ranks_are_its_tensors(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    pattern = {"up.lora_E": [True, False, True, False]}
    config = model.peft_config["default"].resolve(rank_pattern=pattern)
    with pytest.raises(TargetError, match=r"up.*2 rows"):
        PeftModel.from_pretrained(net(), tmp_path, config=config)
