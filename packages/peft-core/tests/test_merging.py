"""Merging: the same function, exact return, clear refusals, ties."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from toys import GainConfig, MixConfig, ShiftConfig, SumConfig, digest, net, randomise

from peft_core import MergeError, RequestError, TargetError, get_peft_model

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]])
UP_DOWN = SumConfig(target_modules=["up", "down"])

pytestmark = pytest.mark.usefixtures("toy_methods")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_equals_forward_and_unmerge_is_exact(dtype):
    model = net().to(dtype)
    original = copy.deepcopy(model.state_dict())
    get_peft_model(model, UP_DOWN)
    model.add_adapter("gain", GainConfig(target_modules=["up"]))
    randomise(model, seed=1)
    randomise(model, "gain", seed=2)
    model.set_adapter(["default", "gain"])
    before = model(IDS)
    for _ in range(3):
        model.merge_adapter()
        # One rounding of the weight to `dtype` against one of the sum; the layers' gain is below ten.
        torch.testing.assert_close(
            model(IDS), before, rtol=10 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps
        )
        model.unmerge_adapter()
        assert torch.equal(model(IDS), before)
    assert all(torch.equal(v, original[k]) for k, v in model.base_state_dict().items())


def test_merging_refuses_and_changes_nothing():
    model = get_peft_model(net(), MixConfig(target_modules=["up"]))
    before = digest(model)
    with pytest.raises(MergeError, match="layers.0.up.*cannot be expressed"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="cannot be expressed"):
        model.merge_and_unload()
    assert digest(model) == before
    model = get_peft_model(net(), UP_DOWN)
    randomise(model)
    with torch.no_grad():
        model.layers[1].down.of("default")[""].u[0] = torch.inf
    before = digest(model)
    with pytest.raises(MergeError, match=r"layers.1.down.weight.*not finite"):
        model.merge_adapter()
    assert digest(model) == before


def test_merged_state_is_guarded():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("other", GainConfig(target_modules=["up"]))
    model.merge_adapter()
    for action in (
        lambda: model.set_adapter("other"),
        lambda: model.merge_adapter(),
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("third", UP_DOWN),
    ):
        with pytest.raises(MergeError, match=r"unmerge_adapter\(\)"):
            action()
    with pytest.raises(RequestError, match="merged"), model.disable_adapter():
        model(IDS)
    model.unmerge_adapter()
    with pytest.raises(MergeError, match="no adapter is merged"):
        model.unmerge_adapter()


def test_merging_into_one_of_two_tied_weights_opens_the_tie_and_unmerging_closes_it():
    model = net()
    model.layers[1].up.weight = model.layers[0].up.weight
    tied = model.layers[0].up.weight
    get_peft_model(model, SumConfig(target_modules=["layers.0.up"]))
    randomise(model)
    before = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), before)
    assert model.layers[1].up.weight is tied and model.layers[0].up.weight is not tied
    model.unmerge_adapter()
    assert model.layers[0].up.weight is tied


class Body(nn.Module):
    """A linear layer, then whatever head."""

    def __init__(self, head, body=None):
        super().__init__()
        self.body = nn.Linear(6, 6) if body is None else body
        self.head = head

    def forward(self, x):
        return self.head(self.body(x))


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 6)


HEADS = {
    "buffers": lambda: nn.BatchNorm1d(5),
    "tied inside": TiedHead,
    "recurrent": lambda: Recurrent(6, 6, batch_first=True),
    "stored the other way round": conv1d,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("later", [torch.float32, torch.float64])
def test_modules_trained_in_full_merge_whole(head, later):
    torch.manual_seed(0)
    model = Body(HEADS[head]()).train()
    original = copy.deepcopy(model.state_dict())
    get_peft_model(model, SumConfig(target_modules=["body"], modules_to_save=["head"])).to(later)
    x = torch.randn(4, 5, 6, dtype=later)
    model(3 * x + 1)  # running statistics, where there are any
    model.eval()
    randomise(model)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, original[k].to(v.dtype)) for k, v in model.base_state_dict().items())
    torch.testing.assert_close(model.merge_and_unload()(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("built", "later"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_modules_trained_in_full_follow_the_bases_dtype(head, built, later):
    torch.manual_seed(0)
    model = Body(HEADS[head]()).to(getattr(torch, built)).eval()
    get_peft_model(model, SumConfig(target_modules=["body"], modules_to_save=["head"])).to(getattr(torch, later))
    assert model(torch.randn(4, 5, 6, dtype=getattr(torch, later))).dtype == getattr(torch, later)


def test_no_adapter_sits_inside_a_copy():
    saved = ShiftConfig(target_modules=["body"], modules_to_save=["head"])
    for first, second in ((SumConfig(target_modules=["first"]), saved), (saved, SumConfig(target_modules=["first"]))):
        model = get_peft_model(Body(TiedHead()), first)
        before = digest(model)
        with pytest.raises(TargetError, match="head.first: adapter '.*' would sit inside head.*separate copies"):
            model.add_adapter("second", second)
        assert digest(model) == before


def test_layers_called_by_keyword():
    class Named(Body):
        def forward(self, x):
            return self.head(input=self.body(input=x))

    model = get_peft_model(Named(nn.Linear(6, 6)), SumConfig(target_modules=["body", "head"]))
    model.add_adapter("other", SumConfig(target_modules=["body"]))
    randomise(model)
    randomise(model, "other", seed=2)
    x = torch.randn(2, 5, 6)
    before = model(x)
    torch.testing.assert_close(model(x, adapter_names=["default", "other"])[:1], before[:1])
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)


def test_layers_that_do_more_see_their_own_shapes():
    class Centred(nn.Linear):
        def forward(self, input):
            return super().forward(input - input.mean(1, keepdim=True))

    for seen in ("class", "hook"):
        torch.manual_seed(0)
        model = Body(nn.Identity(), (Centred if seen == "class" else nn.Linear)(6, 6))
        if seen == "hook":
            model.body.register_forward_hook(lambda module, args, out: out + out[:, -1:])
        x = torch.randn(2, 5, 6)
        before = model(x)
        get_peft_model(model, SumConfig(target_modules=["body"]))
        torch.testing.assert_close(model(x), before)


def test_copies_keep_adapters_of_modules_that_copy_themselves():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            fresh = Own(self.in_features, self.out_features)
            fresh.load_state_dict(self.state_dict())
            return fresh

    model = get_peft_model(Body(nn.Identity(), Own(6, 6)), SumConfig(target_modules=["body"]))
    randomise(model)
    x = torch.randn(2, 6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert copy.deepcopy(model.body).names() == ("default",)


def scaled(module, name):
    parametrize.register_parametrization(module, name, nn.Identity())
    return module


def of_integers(module):
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: scaled(nn.Linear(6, 6), "weight"), "its weight is computed.*remove_parametrizations"),
        (lambda: scaled(nn.Linear(6, 6), "bias"), "its bias is computed"),
        (lambda: prune.l1_unstructured(nn.Linear(6, 6), "bias", 0.5), "its bias is computed.*remove"),
        (lambda: parametrizations.weight_norm(nn.Conv1d(5, 5, 1)), "its weight is computed"),
        (lambda: nn.LazyLinear(6), "before its first call"),
        (lambda: of_integers(nn.Linear(6, 6)), "stored as torch.int8"),
    ],
)
def test_weights_that_are_not_plain_are_refused(make, why):
    model = Body(nn.Linear(6, 6), make())
    with pytest.raises(TargetError, match=f"body.*{why}"):
        get_peft_model(model, ShiftConfig(target_modules=["body", "head"]))


def test_modules_that_cannot_be_copied_are_refused():
    head = prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)
    with pytest.raises(TargetError, match="head.*cannot be copied.*prune.remove"):
        get_peft_model(Body(head), SumConfig(target_modules=["body"], modules_to_save=["head"]))


def test_a_merge_changes_only_what_it_names():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("other", GainConfig(target_modules=["up"]))
    randomise(model, "other")
    for inference in (False, True):
        model.set_adapter("default", inference_mode=inference)
        flags = [parameter.requires_grad for parameter in model.parameters()]
        for names in (None, ["other"], ["default", "other"]):
            model.merge_adapter(names)
            model.unmerge_adapter()
            assert model.active_adapters == ["default"]
            assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_model_that_is_cast_while_it_is_merged():
    model = get_peft_model(net(), UP_DOWN)
    randomise(model)
    before = model(IDS)
    model.merge_adapter()
    model.double().unmerge_adapter()
    torch.testing.assert_close(model(IDS), before.double(), rtol=1e-5, atol=1e-6)


def test_modules_that_share_a_weight_and_merge_alike_go_on_sharing_one():
    model = net()
    first, second = model.layers[0].up, model.layers[1].up
    second.weight = shared = first.weight
    get_peft_model(model, SumConfig(target_modules=["up"]))
    randomise(model)
    model.layers[1].up.adapters.default.load_state(model.layers[0].up.adapters.default.state())
    model.merge_adapter()
    assert first.weight is second.weight is not shared
    model.unmerge_adapter()
    assert first.weight is second.weight is shared
