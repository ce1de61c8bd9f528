"""Virtual tokens and key/value prefixes on small models of plain torch, against the same computed by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prompt_toys import PrefixConfig, Prompt, PromptConfig, prompt_methods
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from peft_core import PeftModel, RequestError, SiteRequest, TargetError, get_peft_model
from peft_core.backbones import Places, refuse_packed
from peft_core.counted_cache import counted, counted_copy
from peft_core.masks import extended, has_windows, is_causal
from peft_core.prompts import EncoderMask

WIDTH, VOCABULARY, N = 8, 11, 3
# In float64: some dozens of roundings of 1e-16 each, on numbers of order one to a hundred.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True, scope="module")
def _methods() -> Iterator[None]:
    with prompt_methods():
        yield


class Cache:
    """Keys and values of each layer, as transformers' caches hold them."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx][0].shape[2] if layer_idx < len(self.layers) else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        # From the layer, as transformers does: whoever sits around `get_seq_length` does not change it.
        length = self.layers[layer_idx][0].shape[2] if layer_idx < len(self.layers) else 0
        return length + query_length, 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx < len(self.layers):
            old = self.layers[layer_idx]
            self.layers[layer_idx] = (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2))
        else:
            self.layers.append((keys, values))
        return self.layers[layer_idx]

    def reset(self) -> None:
        self.layers = []


class Attention(nn.Module):
    is_causal = True

    def __init__(self, index: int, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.layer_idx = index
        self.is_causal = causal
        self.num_heads = 2
        self.config = SimpleNamespace(_attn_implementation="sdpa", num_attention_heads=2, hidden_size=WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, cache: Any = None) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(hidden_states).chunk(3, -1))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if attention_mask is not None and attention_mask.dim() == 2:  # as flash kernels take it, aligned at the end
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            attention_mask = seen & attention_mask.bool()[:, None, None]
        causal = attention_mask is None and self.is_causal and q.shape[2] > 1
        out = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        return out.transpose(1, 2).flatten(2), (q @ k.transpose(-1, -2)).softmax(-1)


class Backbone(nn.Module):
    def __init__(self, causal: bool = True, form: str = "dict") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(32, WIDTH)
        self.kind = nn.Embedding(2, WIDTH)
        self.layers = nn.ModuleList([Attention(i, causal) for i in range(2)])
        self.causal, self.form = causal, form

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        token_type_ids: Any = None,
        cache: Any = None,
        inputs_embeds: Any = None,
        make_cache: bool = False,
    ) -> Any:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if make_cache and cache is None:
            cache = Cache()
        past = 0 if cache is None else cache.get_seq_length()
        total = x.shape[1] if cache is None else cache.get_mask_sizes(x.shape[1], 0)[0]
        at = torch.arange(x.shape[1])[None] + past if position_ids is None else position_ids
        x = x + self.place(at) + self.kind(torch.zeros_like(at) if token_type_ids is None else token_type_ids)
        mask = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
        if mask is None or mask.dim() == 2:
            seen = torch.ones(x.shape[1], total, dtype=torch.bool)
            seen = seen.tril(past) if self.causal else seen
            mask = seen[None, None] if mask is None else seen & mask.bool()[:, None, None]
        states, attentions = [x], []
        for layer in self.layers:
            out, scores = layer(x, attention_mask=mask, cache=cache)
            x = x + out
            states.append(x)
            attentions.append(scores)
        if self.form == "tensor":
            return x
        if self.form == "tuple":
            return (x, tuple(states), tuple(attentions)) if cache is None else (x, cache)
        found = {"last_hidden_state": x, "hidden_states": tuple(states), "attentions": tuple(attentions)}
        return found if cache is None else {**found, "cache": cache}


class Model(nn.Module):
    """A backbone with a head that counts positions."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.body = Backbone(**fields)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.config = SimpleNamespace(model_type="toy")

    @property
    def base_model(self) -> nn.Module:
        return self.body

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Tensor:
        out = self.body(input_ids=input_ids, **kwargs)
        x = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out["last_hidden_state"]
        return self.head(x)


def make(*configs: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = Model(**fields).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    model.eval()
    for name, config in zip("abcd", configs, strict=False):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            get_peft_model(model, config, name)
    return model


def prompted(n: int = N, **fields: Any) -> Any:
    return make(PromptConfig(n=n), **fields)


def tokens(model: Any, name: str = "a") -> Tensor:
    return model._peft.adapters[name].adapters[0].prompt


def ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, given: Tensor, *prompts: Tensor, **kwargs: Any) -> Tensor:
    """The bare model's scores for the prompts and the input, without those of the prompts."""
    with model.disable_adapter():
        front = [prompt.expand(len(given), -1, -1) for prompt in prompts]
        return model(inputs_embeds=torch.cat([*front, model.body.embed(given)], 1), **kwargs)[:, -given.shape[1] :]


# -- virtual tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "tuple", "tensor"])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_are_those_of_a_longer_sequence(causal: bool, form: str) -> None:
    model = prompted(causal=causal, form=form)
    expected = by_hand(model, ids(), tokens(model))
    assert torch.equal(model(ids()), expected)
    assert torch.equal(model(inputs_embeds=model.body.embed(ids())), expected)
    assert not torch.allclose(expected, by_hand(model, ids()))


@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_two_and_of_four_dimensions_say_the_same(causal: bool) -> None:
    model = prompted(causal=causal)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    long = torch.cat([torch.ones(2, N, dtype=mask.dtype), mask], 1)
    expected = by_hand(model, ids(), tokens(model), attention_mask=long)
    assert torch.equal(model(ids(), attention_mask=mask), expected)
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen = (seen.tril() if causal else seen) & mask.bool()[:, None, None]
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    for other in (seen, {"full_attention": seen}, added):
        torch.testing.assert_close(model(ids(), attention_mask=other), expected, **CLOSE)


def test_masks_that_cannot_be_extended_are_refused() -> None:
    model = prompted()
    with pytest.raises(RequestError, match="list cannot be extended"):
        model(ids(), attention_mask=[1])
    with pytest.raises(RequestError, match="sliding_attention"):
        model(ids(), attention_mask={"full_attention": None, "sliding_attention": None})


def test_positions_given_are_shifted_and_token_types_are_zero_in_front() -> None:
    model = prompted()
    assert torch.equal(model(ids(), position_ids=torch.arange(5)[None]), model(ids()))
    kinds = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    long = torch.cat([torch.zeros(2, N, dtype=kinds.dtype), kinds], 1)
    assert torch.equal(model(ids(), token_type_ids=kinds), by_hand(model, ids(), tokens(model), token_type_ids=long))


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_outputs_have_the_users_positions(form: str) -> None:
    model = prompted(form=form)
    out = model.body(ids())
    last, states, attentions = out if form == "tuple" else out.values()
    assert last.shape == (2, 5, WIDTH) and all(s.shape == (2, 5, WIDTH) for s in states)
    assert torch.equal(last, states[-1])
    assert all(a.shape == (2, 2, 5, 5) for a in attentions)


def test_gradients_reach_the_prompt_and_nothing_else() -> None:
    model = prompted()
    model(ids()).sum().backward()
    assert tokens(model).grad is not None and tokens(model).grad.abs().sum() > 0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["body.adapters.a.prompt"]


def test_two_prompts_the_last_one_is_in_front() -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=2))
    model.set_adapter(["a", "b"])
    # The outer adapter puts its tokens before the input, the inner one before both.
    assert torch.equal(model(ids()), by_hand(model, ids(), tokens(model, "a"), tokens(model, "b")))


def test_switching_off_gives_the_base_bit_for_bit_and_unload_gives_it_back() -> None:
    expected = make()(ids())
    model = prompted()
    with model.disable_adapter():
        assert torch.equal(model(ids()), expected)
    body = model.unload().body
    assert type(body) is Backbone and torch.equal(model(ids()), expected)


def test_save_and_load(tmp_path: Path) -> None:
    model = prompted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "a")
    assert torch.equal(loaded(ids()), model(ids()))
    assert [list(t.shape) for t in loaded.get_adapter_state_dict().values()] == [[N, WIDTH]]


def test_one_prompt_per_row_of_equal_and_of_other_lengths() -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=3), PromptConfig(n=5))
    given, mask = ids(4), torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = 0
    for names in (["a", "b", "b", "a"], ["a", "__base__", "c", "b"], ["__base__", "c", "__base__", "c"]):
        for extra in ({}, {"attention_mask": mask}):
            together = model(given, adapter_names=names, **extra)
            for row, name in enumerate(names):
                prompts = [] if name == "__base__" else [tokens(model, name)]
                own = {
                    k: torch.cat([torch.ones(1, len(prompts[0]) if prompts else 0), v[row : row + 1]], 1)
                    for k, v in extra.items()
                }
                alone = by_hand(model, given[row : row + 1], *prompts, **own)
                seen = mask[row].bool() if extra else slice(None)
                torch.testing.assert_close(together[row][seen], alone[0][seen], **CLOSE)


def test_an_adapter_of_some_rows_sees_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptConfig, "request_arguments", ("scale",))
    model = make(PromptConfig(n=3), PromptConfig(n=3))
    for name in "ab":
        adapter = model._peft.adapters[name].adapters[0]
        adapter.virtual_tokens = lambda batch, base, own=adapter: (
            own.prompt * base.call.rows("scale", batch)[:, None, None]
        )
    names, scale = ["b", "a", "__base__", "a"], torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    together = model(ids(4), adapter_names=names, scale=scale)
    for row, name in enumerate(names):
        alone = model(ids(4)[row : row + 1], adapter_names=[name], scale=scale[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **CLOSE)
    assert not torch.allclose(together[1], model(ids(4)[1:2], adapter_names=["a"], scale=scale[:1])[0])


def test_rows_that_cannot_have_their_own_are_refused() -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=2))
    first, second = (model._peft.adapters[name].adapters[0] for name in "ab")
    first.keep_positions = True
    with pytest.raises(RequestError, match="some adapters of the batch keep virtual positions and some do not"):
        model(ids(), adapter_names=["a", "b"])
    second.keep_positions = True
    assert model.body(ids())["last_hidden_state"].shape[1] == 5 + 3
    first._names = tuple(name for name in first._names if name != "position_ids")
    model.body.base_layer.embed_positions = nn.Identity()
    with pytest.raises(RequestError, match=r"\[2, 3\] virtual tokens, but positions are the same for all rows"):
        model(ids(), adapter_names=["a", "b"])


def test_kept_positions_and_the_mask_of_the_decoder() -> None:
    class Decoder(nn.Module):
        def forward(self, input_ids: Any, encoder_hidden_states: Any = None, encoder_attention_mask: Any = None) -> Any:
            return encoder_attention_mask

    class Link(SimpleNamespace):
        def __call__(self, **given: Any) -> Any:
            return Decoder()(**given)

    layer = SimpleNamespace(module=Decoder(), path="decoder", request=SiteRequest("decoder"))
    adapter = EncoderMask(layer, N)  # type: ignore[arg-type]
    states, mask = torch.zeros(2, N + 5, WIDTH), torch.tensor([[1, 1, 1, 1, 0]] * 2)
    longer = adapter(Link(), ids(), encoder_hidden_states=states, encoder_attention_mask=mask)
    assert longer.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]] * 2
    # One of two adapters that kept N positions each: the other's companion adds its own.
    both = torch.zeros(2, 2 * N + 5, WIDTH)
    once = adapter(Link(), ids(), encoder_hidden_states=both, encoder_attention_mask=mask)
    assert torch.equal(once, longer)
    twice = adapter(Link(), ids(), encoder_hidden_states=both, encoder_attention_mask=once)
    assert twice.shape == (2, 2 * N + 5)
    # A mask that fits what the encoder returned is nobody's to extend.
    assert adapter(Link(), ids(), encoder_hidden_states=states[:, N:], encoder_attention_mask=mask) is mask


def test_several_sequences_in_a_row_are_refused() -> None:
    model = prompted()
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(RequestError, match="several sequences each"):
        model(ids(1), position_ids=packed)
    mask = torch.ones(1, 5, dtype=torch.long)  # left padding may begin with any positions
    assert model(ids(1), position_ids=packed, attention_mask=mask).shape == (1, 5, VOCABULARY)
    with pytest.raises(RequestError, match="body: the rows hold several sequences"):
        refuse_packed({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "body")


def test_tokens_of_each_row() -> None:
    model = prompted()
    adapter = model._peft.adapters["a"].adapters[0]
    own = torch.randn(2, N, WIDTH, dtype=torch.float64)
    adapter.virtual_tokens = lambda batch, base: own[:batch]
    with model.disable_adapter():
        longer = torch.cat([own, model.body.embed(ids())], 1)
        expected = model(inputs_embeds=longer)[:, N:]
    assert torch.equal(model(ids()), expected)


def test_places_beside_the_input() -> None:
    places = Places(2, torch.tensor([0, 1, 3]))
    joined = torch.tensor([[-1, -2, 10, 11, 12]] * 3)
    assert places.put(joined, 1).tolist() == [[-1, -2, 10, 11, 12], [10, -1, -2, 11, 12], [10, 11, 12, -1, -2]]
    assert places.take_off(places.put(joined, 1), 1).tolist() == [[10, 11, 12]] * 3
    assert places.put(joined[:1][None].expand(4, 1, 5), -1, -2).shape == (4, 3, 5)  # positions of several axes
    scores = torch.arange(25).view(1, 1, 5, 5).expand(3, 2, 5, 5)
    assert places.take_off(scores, -1).shape == (3, 2, 5, 3)
    assert places.take_off(scores, -1)[2, 0, 0].tolist() == [0, 1, 2]
    assert Places(2).put(joined, 1) is joined and Places(2).take_off(joined, 1).tolist() == [[10, 11, 12]] * 3


def test_windows_are_found() -> None:
    def of(**fields: Any) -> nn.Module:
        module = nn.Linear(1, 1)
        module.config = SimpleNamespace(**fields)  # type: ignore[assignment]
        return module

    assert not has_windows(nn.Linear(1, 1)) and not has_windows(of(sliding_window=None, layer_types=["full_attention"]))
    assert has_windows(of(sliding_window=4)) and has_windows(of(layer_types=["full_attention", "sliding_attention"]))
    assert has_windows(of(attention_layers=["global", "local"])) and has_windows(of(attention_chunk_size=8))


def test_mistakes_of_an_author_are_told() -> None:
    model = prompted()
    model._peft.adapters["a"].adapters[0].num_virtual_tokens = 4
    with pytest.raises(RequestError, match=r"body: Prompt.virtual_tokens returned \(3, 8\); it must be \(4, d\)"):
        model(ids())
    with pytest.raises(RequestError, match="neither input_ids nor inputs_embeds"):
        prompted()(None)

    class Bare(nn.Module):
        @property
        def base_model(self) -> nn.Module:
            return self.inner

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    bare = Bare()
    with pytest.raises(TargetError, match="no get_input_embeddings"):
        Prompt(SimpleNamespace(module=bare.inner, refuse=lambda why: TargetError(why)), PromptConfig())  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="does not say which module is its backbone"):
        get_peft_model(nn.Linear(2, 2), PromptConfig())


# -- caches ------------------------------------------------------------------------------------------------------------


def steps(model: Any, given: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    """Scores of a sequence that is given in three parts."""
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        own = {k: v[:, :stop] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        parts.append(model(given[:, start:stop], cache=cache, **own))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("active", [["a"], ["a", "b"], ["b", "a"]])
def test_a_cache_counts_the_users_positions_only(active: list[str]) -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=2))
    model.set_adapter(active)
    cache = Cache()
    torch.testing.assert_close(steps(model, ids(), cache), model(ids()), **CLOSE)
    assert isinstance(cache, Cache) and cache.get_seq_length() == 5
    assert cache.layers[0][0].shape[2] == 5 + sum({"a": 3, "b": 2}[name] for name in active)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    whole, parts = model(ids(), attention_mask=mask), steps(model, ids(), Cache(), attention_mask=mask)
    torch.testing.assert_close(parts[mask.bool()], whole[mask.bool()], **CLOSE)


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_so_does_one_that_the_backbone_made(form: str) -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=2), form=form)
    model.set_adapter(["a", "b"])
    out = model.body(ids()[:, :3], make_cache=True)
    cache = out["cache"] if form == "dict" else out[1]
    assert cache.get_seq_length() == 3 and cache.layers[0][0].shape[2] == 8
    torch.testing.assert_close(model(ids()[:, 3:], cache=cache), model(ids())[:, 3:], **CLOSE)


def test_rows_with_their_own_prompts_go_on_from_a_cache() -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=5))
    names = ["a", "b"]
    whole = model(ids(), adapter_names=names)
    cache, parts = Cache(), []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        parts.append(model(ids()[:, start:stop], cache=cache, adapter_names=names))
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    with pytest.raises(RequestError, match="other adapters"):
        model(ids()[:, :1], cache=cache, adapter_names=["b", "a"])


def test_a_cache_of_other_adapters_is_refused() -> None:
    model = make(PromptConfig(n=3), PromptConfig(n=3))
    model.set_adapter("a")
    filled, bare = Cache(), Cache()
    model(ids(), cache=filled)
    with model.disable_adapter():
        model(ids(), cache=bare)
        with pytest.raises(RequestError, match="holds 3 virtual tokens of an adapter that is not active"):
            model(ids()[:, :1], cache=filled)
    with pytest.raises(RequestError, match="filled without the virtual tokens"):
        model(ids()[:, :1], cache=bare)
    model.set_adapter("b")
    with pytest.raises(RequestError, match="virtual tokens of other adapters"):
        model(ids()[:, :1], cache=filled)
    model.set_adapter(["a", "b"])
    with pytest.raises(RequestError, match="virtual tokens of other adapters"):
        model(ids()[:, :1], cache=filled)
    model.set_adapter("a")
    assert filled.get_seq_length() == 5  # refusals leave it as it was
    torch.testing.assert_close(model(ids(), cache=Cache()), model(ids()), **CLOSE)
    filled.reset()
    model.set_adapter("b")
    torch.testing.assert_close(model(ids(), cache=filled), model(ids()), **CLOSE)


def test_a_call_that_raises_leaves_the_count_as_it_was() -> None:
    model = prompted()
    cache = Cache()
    with pytest.raises(IndexError):
        model(ids() + VOCABULARY, cache=cache)
    model(ids(), cache=cache)
    with pytest.raises(IndexError):
        model(ids()[:, :1] + VOCABULARY, cache=cache)
    assert cache.get_seq_length() == 5
    with pytest.raises(RuntimeError):
        model(ids()[:, :1], cache=cache, attention_mask=torch.ones(2, 9))
    assert cache.get_seq_length() == 5


def test_counted_caches_are_copied_and_pickled_as_such() -> None:
    model = prompted().requires_grad_(False)
    cache = Cache()
    model(ids()[:, :4], cache=cache)
    expected = model(ids())[:, 4:]
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(other, Cache) and other.get_seq_length() == 4
        torch.testing.assert_close(model(ids()[:, 4:], cache=other), expected, **CLOSE)
    assert cache.get_seq_length() == 4


def test_lengths_of_a_counted_cache() -> None:
    class Static(Cache):
        def get_max_length(self) -> int:
            return 16

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return torch.tensor(super().get_seq_length(layer_idx))

    cache = Static()
    cache.update(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4), 0)
    own = counted(cache)
    assert own is cache and counted(cache) is cache and type(cache).__name__ == "Static"
    own.filled = (("a", 2, 4), ("b", 1, 4))
    assert int(own.get_seq_length()) == 4 and own.get_max_length() == 13 and own.hidden == 3
    pair = SimpleNamespace(self_attention_cache=Cache())
    same, part = counted_copy(pair)
    assert same is pair and pair.self_attention_cache is part and counted(pair) is part
    assert counted_copy(part) == (part, part)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_an_extended_mask_by_hand() -> None:
    seen = torch.tensor([[True, False], [True, True]])[None, None]
    columns = torch.tensor([[True, True], [False, True]])
    found = extended(seen, columns, rows=True, causal=True, where="")
    assert found.shape == (2, 1, 4, 4)
    assert found[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # A position that no one sees is seen by itself: a softmax over nothing is not a number.
    assert found[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    found = extended(seen, columns[:1], rows=True, causal=False, where="")
    assert found[0, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert extended(seen.int(), columns[:1], rows=False, causal=True, where="")[0, 0].tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert extended(None, columns, rows=True, causal=True, where="") is None


def test_what_a_backbone_says_of_itself() -> None:
    assert is_causal(Backbone(True)) and not is_causal(Backbone(False)) and is_causal(nn.Linear(2, 2))


# -- prefixes ----------------------------------------------------------------------------------------------------------


def prefixed(*numbers: int, **fields: Any) -> Any:
    sites = ["body.layers.0", "body.layers.1", "body"]
    return make(*(PrefixConfig(n=n, by_hand=sites) for n in numbers or (N,)), **fields)


def fronts(model: Any, name: str = "a") -> list[Any]:
    return [adapter for adapter in model._peft.adapters[name].adapters if hasattr(adapter, "keys")]


def attention_by_hand(model: Any, given: Tensor, n: int, name: str = "a", mask: Tensor | None = None) -> Tensor:
    """The toy's scores, each attention over the prefix and what the mask allows, positions beginning at n."""
    body = model.body
    x = body.embed(given) + body.place(torch.arange(given.shape[1]) + n) + body.kind.weight[0]
    length = given.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if body.causal else seen
    seen = seen if mask is None else seen & mask.bool()[:, None, None]
    for layer, front in zip(body.layers, fronts(model, name), strict=True):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        k, v = (
            torch.cat([f.expand(len(given), -1, -1, -1), own], 2) for f, own in ((front.keys, k), (front.values, v))
        )
        scores = q @ k.transpose(-1, -2) / 2
        scores[..., n:] = scores[..., n:].masked_fill(~seen, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return model.head(x)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_prefix_is_attended_to_and_nothing_else_changes(causal: bool, implementation: str) -> None:
    model = prefixed(causal=causal)
    for layer in model.body.layers:
        layer.config._attn_implementation = implementation
    torch.testing.assert_close(model(ids()), attention_by_hand(model, ids(), N), **CLOSE)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    got, expected = model(ids(), attention_mask=mask), attention_by_hand(model, ids(), N, mask=mask)
    torch.testing.assert_close(got, expected, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(model(ids()), make(causal=causal)(ids()))


def test_modules_that_need_no_mask_get_none_only_where_that_is_right() -> None:
    model = prefixed()
    attention = model.body.layers[0]
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    masks: list[Any] = []
    attention.base_layer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    attention(x)
    attention(x[:, :1])
    attention.config._attn_implementation = "flash_attention_2"
    attention(x)
    attention(x, attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert masks[0].shape == (1, 1, 5, N + 5) and masks[0].sum() == 5 * N + 15
    assert masks[1] is None and masks[2] is None
    assert masks[3].tolist() == [[1] * (N + 5)] * 2


def test_the_users_cache_never_holds_a_prefix() -> None:
    model = prefixed()
    cache = Cache()
    torch.testing.assert_close(steps(model, ids(), cache), attention_by_hand(model, ids(), N), **CLOSE)
    assert type(cache) is Cache and cache.get_seq_length() == 5
    with model.disable_adapter():
        model(ids()[:, :1], cache=cache)
    assert cache.get_seq_length() == 6


def test_one_prefix_per_row_of_equal_lengths_and_of_others() -> None:
    model = prefixed(3, 3, 5)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = 0
    lengths = {"a": 3, "b": 3, "c": 5, "__base__": 0}
    for names in (["a", "b", "b", "a"], ["a", "__base__", "c", "b"]):
        for extra in ({}, {"attention_mask": mask}):
            together = model(ids(4), adapter_names=names, **extra)
            parts = steps(model, ids(4), Cache(), adapter_names=names) if not extra else together
            for row, name in enumerate(names):
                one, own = ids(4)[row : row + 1], mask[row : row + 1] if extra else None
                if name == "__base__":
                    with model.disable_adapter():
                        alone = model(one, attention_mask=own)
                else:
                    alone = attention_by_hand(model, one, lengths[name], name, own)
                seen = mask[row].bool() if extra else slice(None)
                torch.testing.assert_close(together[row][seen], alone[0][seen], **CLOSE)
                torch.testing.assert_close(parts[row][seen], alone[0][seen], **CLOSE)


def test_a_prefix_and_a_prompt_together() -> None:
    model = make(PromptConfig(n=2), PrefixConfig(n=3, by_hand=["body.layers.0", "body.layers.1", "body"]))
    model.set_adapter(["a", "b"])
    prompt = tokens(model, "a").detach()
    got = model(ids())
    torch.testing.assert_close(steps(model, ids(), Cache()), got, **CLOSE)
    model.set_adapter("b")
    longer = torch.cat([prompt.expand(2, -1, -1), model.body.embed(ids())], 1)
    # The shift is the outer one: it moves the input, and the prompt's tokens keep the first positions.
    at = torch.cat([torch.arange(2), torch.arange(2, 7) + 3])[None] - 3
    torch.testing.assert_close(model(inputs_embeds=longer, position_ids=at)[:, 2:], got, **CLOSE)


def test_prefixes_of_a_wrong_shape_and_modules_without_a_cache_are_refused(tmp_path: Path) -> None:
    model = prefixed()
    front = fronts(model)[1]
    front.keys = nn.Parameter(torch.zeros(1, N, 4, dtype=torch.float64))
    with pytest.raises(RequestError, match=r"body.layers.1: key_values returned a tensor of shape \(1, 1, 3, 4\)"):
        model(ids())
    with pytest.raises(TargetError, match="through its cache"):
        make(PrefixConfig(n=2, by_hand=["body.embed", "body"]))
    with pytest.raises(TargetError, match="positions cannot be shifted"):
        make(PrefixConfig(n=2, by_hand=["body.layers.0", "head"]))
    with pytest.raises(TargetError, match="is not known"):
        make(PrefixConfig(n=2))


def test_a_prefix_is_saved_and_trains(tmp_path: Path) -> None:
    model = prefixed()
    model(ids()).sum().backward()
    assert all(f.keys.grad.abs().sum() > 0 and f.values.grad.abs().sum() > 0 for f in fronts(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path / "a")(ids()), model(ids()))
