"""Extension point E14: loss terms, proved by a small method of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import Adapter, RequestError, TargetedConfig, get_peft_model
from tests.tiny_transformers import fresh, gradients, make
from tests.toy_plugins import net, plugin, randomise, registered

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10]])


class TermsConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYTERMS"
    decay: float = 0.5
    spread: float = 0.25


class Terms(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: TermsConfig) -> None:
        super().__init__(layer)
        self.config = config
        self.scale = layer.parameter(layer.out_features)
        self.aside = layer.parameter(1)  # in no output: only the loss term trains it

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.aside)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs) * self.scale
        base.call.add_loss("spread", self.config.spread * out.square().mean())
        return out

    def losses(self) -> Mapping[str, Tensor]:
        return {"decay": self.config.decay * ((self.scale - 2).square().sum() + (self.aside - 1).square().sum())}


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(plugin(TermsConfig, Terms)):
        yield


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def termed() -> Any:
    return randomise(get_peft_model(net(), TermsConfig(target_modules=["up"]))).train()


def test_terms_are_named_weighted_and_added() -> None:
    model = termed()
    outputs = model(X, labels=LABELS)
    plain = nn.functional.cross_entropy(outputs.logits, LABELS)
    adapters = model._peft.record("default").adapters
    decay = sum(0.5 * ((a.scale - 2).square().sum() + (a.aside - 1).square().sum()) for a in adapters)
    spread, x = torch.zeros(()), X
    for block, adapter in zip(net().blocks, adapters, strict=True):
        out = block.up(x) * adapter.scale
        spread = spread + 0.25 * out.square().mean()
        x = x + block.down(torch.tanh(out))
    terms = model.adapter_losses()
    assert set(terms) == {"decay", "spread"}
    torch.testing.assert_close(terms["decay"], decay, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["spread"], spread, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs.loss, plain + decay + spread, rtol=1e-6, atol=0)
    outputs.loss.backward(retain_graph=True)
    found = gradients(model)
    by_hand = torch.autograd.grad(plain + decay + spread, [p for p in model.parameters() if p.requires_grad])
    for one, other in zip(found.values(), by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_terms_are_of_training_alone() -> None:
    model = termed().eval()
    outputs = model(X, labels=LABELS)
    assert torch.equal(outputs.loss, nn.functional.cross_entropy(outputs.logits, LABELS))
    model.train()
    with torch.no_grad():
        outputs = model(X, labels=LABELS)
    assert torch.equal(outputs.loss, nn.functional.cross_entropy(outputs.logits, LABELS))
    assert model.adapter_losses() == {}
    model(X, labels=LABELS)
    assert set(model.adapter_losses()) == {"decay", "spread"}
    with model.disable_adapter():
        outputs = model(X, labels=LABELS)
    assert torch.equal(outputs.loss, nn.functional.cross_entropy(outputs.logits, LABELS))
    assert model.adapter_losses() == {}, "no term of a call before the last one"


def test_a_model_without_a_loss_leaves_the_sum_to_the_user() -> None:
    model = termed()
    outputs = model(X)
    assert outputs.loss is None
    loss = nn.functional.cross_entropy(outputs.logits, LABELS) + sum(model.adapter_losses().values())
    torch.testing.assert_close(loss, model(X, labels=LABELS).loss, rtol=0, atol=0)


def test_terms_in_the_outputs_of_transformers() -> None:
    model = get_peft_model(make("llama"), TermsConfig(target_modules=["q_proj"])).train()
    whole = model(IDS, labels=IDS)
    extra = sum(model.adapter_losses().values())
    with model.disable_adapter():
        plain = model(IDS, labels=IDS).loss
    torch.testing.assert_close(whole["loss"], plain + extra, rtol=1e-6, atol=0)
    assert whole.loss is whole["loss"] and whole[0] is whole.loss
    assert torch.equal(model(IDS, labels=IDS, return_dict=False)[0], whole.loss)
    assert torch.equal(model(IDS, return_dict=False)[0], whole.logits)


def test_terms_under_activation_checkpointing() -> None:
    def trained(kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = randomise(get_peft_model(make("llama"), TermsConfig(target_modules=["q_proj", "up_proj"]))).train()
        if kwargs is not None:
            model.activation_checkpointing_enable(kwargs)
            model.enable_input_require_grads()
        loss = model(IDS, labels=IDS).loss + model(IDS.flip(1), labels=IDS).loss
        loss.backward()
        return loss.detach(), gradients(model)

    loss, plain = trained(None)
    again, recomputed = trained({"use_reentrant": False})
    assert torch.equal(loss, again)
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name
    with pytest.raises(RequestError, match="'spread'.*use_reentrant=False"):
        trained({"use_reentrant": True})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_t9_terms_need_no_trainer_of_their_own(accumulate: int, smoothing: float, tmp_path: Path) -> None:
    """A step's share of a term is one, whatever the number of batches it accumulates and whoever computes the loss."""
    from tests.trainer_scenarios import sentences, strict_warnings, trainer

    model = get_peft_model(fresh("llama"), TermsConfig(target_modules=["q_proj"], decay=0.5))
    aside = model._peft.record("default").adapters[0].aside
    arguments = {"gradient_accumulation_steps": accumulate, "label_smoothing_factor": smoothing}
    constant = {"lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    with strict_warnings():
        trainer(model, tmp_path, sentences(), max_steps=2, **arguments, **constant).train()
    # d/da 0.5 (a - 1)^2 = a - 1, twice: 0 -> 0.1 -> 0.19.
    torch.testing.assert_close(aside.detach(), torch.tensor([0.19]), rtol=1e-5, atol=0)
    assert set(model.adapter_losses()) == {"decay", "spread"}
