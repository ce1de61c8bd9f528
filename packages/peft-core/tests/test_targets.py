"""Names, globs and patterns, and what `select` makes of them: what was meant, or every problem at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from peft_core import patterns
from peft_core.config import TargetedConfig
from peft_core.errors import ConfigError
from peft_core.patterns import NameMatcher, PatternMap
from peft_core.targets import Selection, select


class PickConfig(TargetedConfig):
    peft_type: ClassVar[str] = "PICK"
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "v_proj")})
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})


class Tiny(nn.Module):
    """Three blocks, an embedding, a head."""

    def __init__(self, model_type: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Linear(4, 2)
        self.pre_classifier = nn.Linear(4, 4)
        if model_type:
            self.config = {"model_type": model_type}


def pick(model: nn.Module, /, **fields: Any) -> Selection:
    return select(model, PickConfig(**fields))


# ---- names, globs, patterns

segment = st.sampled_from(["a", "b", "ab", "q_proj", "0", "1", "10"])
path = st.lists(segment, min_size=1, max_size=5).map(".".join)
glob_segment = st.lists(st.sampled_from([*"ab01", "q", "*", "?", "[ab]", "[!a]"]), min_size=1, max_size=3).map("".join)
glob = st.lists(glob_segment | st.just("**"), min_size=1, max_size=4).map(".".join)


def naive_component(component: str, pattern: str) -> bool:
    """Match a glob against one component, the slow and obvious way."""
    if not pattern:
        return not component
    if pattern[0] == "*":
        return any(naive_component(component[at:], pattern[1:]) for at in range(len(component) + 1))
    if not component:
        return False
    if pattern[0] == "[":
        end = pattern.index("]")
        body = pattern[1:end]
        inside = component[0] not in body[1:] if body[0] == "!" else component[0] in body
        return inside and naive_component(component[1:], pattern[end + 1 :])
    return pattern[0] in ("?", component[0]) and naive_component(component[1:], pattern[1:])


def naive_parts(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        # At the end: something. Elsewhere: any number of components, none included.
        rest = patterns[1:]
        return any(naive_parts(parts[at:], rest) for at in range(len(parts) + 1)) if rest else bool(parts)
    return bool(parts) and naive_component(parts[0], patterns[0]) and naive_parts(parts[1:], patterns[1:])


def naive(entry: str, path: str) -> bool:
    """Whether an entry of a list names a path, straight from the rule."""
    parts = path.split(".")
    if not re.search(r"[*?\[]", entry):
        return path == entry or path.endswith("." + entry)
    return any(naive_parts(parts[at:], entry.split(".")) for at in range(len(parts)))


@pytest.mark.parametrize("trusted", [True, False])
@settings(deadline=None)
@example(entries=("a**",), paths=["a.b", "ab"])  # two stars are special as a whole component only
@given(
    entries=st.lists(path | glob, min_size=1, max_size=4, unique=True).map(tuple),
    paths=st.lists(path, max_size=6),
)
def test_names_match_as_the_rule_says(trusted: bool, entries: tuple[str, ...], paths: list[str]) -> None:
    matcher = NameMatcher(entries, what="target_modules", trusted=trusted)
    for each in paths:
        assert matcher.matches(each) == any(naive(entry, each) for entry in entries), each
    assert matcher.unmatched() == [e for e in entries if not any(naive(e, each) for each in paths)]


@pytest.mark.parametrize(
    ("entry", "path", "expected"),
    [
        ("q_proj", "a.q_proj", True),
        ("q_proj", "a.xq_proj", False),
        ("q_proj", "q_proj.a", False),
        ("layers.*.q", "m.layers.0.q", True),
        ("layers.*.q", "m.layers.0.a.q", False),
        ("layers.**.q", "m.layers.0.a.q", True),
        ("layers.**.q", "m.layers.q", True),
        ("encoder.**", "encoder.a.b", True),
        ("encoder.**", "encoder", False),
        ("[qv]_proj", "a.v_proj", True),
        ("[!qv]_proj", "a.v_proj", False),
        ("a[!b]c", "a.c", False),
        ("a[", "x.a[", True),
        ("a.c*", "abc", False),
        ("[^]x", "a.^x", True),
        ("[a-c]x", "a.bx", True),
    ],
)
def test_globs(entry: str, path: str, expected: bool) -> None:
    assert NameMatcher((entry,), what="x", trusted=True).matches(path) is expected


def test_a_string_is_a_pattern_for_the_whole_path() -> None:
    matcher = NameMatcher(r".*\.[qv]_proj", what="x", trusted=True)
    assert matcher.matches("a.q_proj")
    assert not matcher.matches("a.q_proj.b")
    assert not matcher.matches("q_proj")
    assert NameMatcher("a|b", what="x", trusted=True).unmatched() == ["a|b"]


@pytest.mark.parametrize("trusted", [True, False])
def test_an_invalid_pattern_is_named(trusted: bool) -> None:
    with pytest.raises(ConfigError, match=r"target_modules: the pattern '\(a' is not a valid regular expression"):
        NameMatcher("(a", what="target_modules", trusted=trusted)
    with pytest.raises(ConfigError, match=r"rank_pattern: the pattern '\(a' "):
        PatternMap({"(a": 1}, what="rank_pattern", trusted=trusted)


# Each of these runs for ages, or takes all memory, in at least one of the two engines.
HOSTILE = [
    r"(.|..)+[!%]",
    r"(?:(?:.?){30}){30}[!%]",
    r"(.*)(.*)(.*)(.*)(.*)\1\2\3\4[!%]",
    r"(?:(.)|(.)|(.)|(.))*[!%]",
    "[^!]*" * 200 + "[!%]",
    r"x{4294967290}",
    r"((a{99}){99}){99}",
    r"(?R)",
    r"(a|(?1))*b",
    r"(?:abc){e<=9}",
    "(" * 1000 + ")" * 1000,
    "a|" * 2500,
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
def test_hostile_patterns_from_files_are_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT", 0.1)
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]

    def match() -> None:
        matcher = NameMatcher(pattern, what="target_modules", trusted=False)
        for each in paths:
            matcher.matches(each)

    def look_up() -> None:
        lookup = PatternMap({pattern: 1}, what="rank_pattern", trusted=False)
        for each in paths:
            lookup.get(each, 0)

    for act in (match, look_up):
        with pytest.raises(ConfigError, match="the pattern"):
            act()


def test_the_number_of_patterns_from_a_file_is_limited() -> None:
    with pytest.raises(ConfigError, match="more than 1000 patterns"):
        PatternMap({f"a{i}|b": i for i in range(1001)}, what="rank_pattern", trusted=False)
    # Plain names, and whole paths in the form other writers give them, are looked up and need no limit.
    table = PatternMap({rf"^layers\.{i}\.q$": i for i in range(5000)}, what="rank_pattern", trusted=False)
    assert [table.get(f"layers.{i}.q", None) for i in (0, 4999)] == [0, 4999]
    assert table.get("x.layers.0.q", None) is None


def test_ordinary_patterns_from_files_work() -> None:
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
    )
    matcher = NameMatcher(unsloth, what="x", trusted=False)
    assert matcher.matches("model.layers.12.self_attn.q_proj")
    assert matcher.matches("language_model.layers.1.mlp.up_proj")
    assert not matcher.matches("model.layers.12.self_attn.k_proj")


pattern_key = path | st.sampled_from([r"^a\.b", r"a.*", r"(a|b)\.1", r"a$", r"^q_proj$", r"\d+", r"a|b.*"])


@pytest.mark.parametrize("trusted", [True, False])
@settings(deadline=None)
@given(keys=st.lists(pattern_key, max_size=5, unique=True), paths=st.lists(path, max_size=6))
def test_pattern_maps_take_the_first_hit(trusted: bool, keys: list[str], paths: list[str]) -> None:
    table = PatternMap({key: i for i, key in enumerate(keys)}, what="x", trusted=trusted)
    used = set()
    for each in paths:
        hits = [i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", each)]
        assert table.get(each, None) == (hits[0] if hits else None)
        used |= set(hits[:1])
    assert table.unmatched() == [key for i, key in enumerate(keys) if i not in used]


def test_a_dot_in_a_plain_key_is_a_dot() -> None:
    assert PatternMap({"fc.1": 1}, what="x", trusted=True).get("fc_1", None) is None


# ---- what select takes


def test_names_in_the_order_of_the_model() -> None:
    selection = pick(Tiny(), target_modules=["down", "attn.q_proj"])
    assert list(selection.matched) == [f"layers.{i}.{name}" for i in range(3) for name in ("attn.q_proj", "mlp.down")]
    assert all(isinstance(module, nn.Linear) for module in selection.matched.values())
    assert selection.resolved == {}


def test_exclude_wins() -> None:
    selection = pick(Tiny(), target_modules=["*_proj"], exclude_modules=["layers.[12].**", "v_proj"])
    assert list(selection.matched) == ["layers.0.attn.q_proj"]


def test_every_problem_at_once_with_the_nearest_name() -> None:
    selection = pick(
        Tiny(),
        target_modules=["q_porj", "v_proj", "mpl.up"],
        exclude_modules=["embd"],
        modules_to_save=["clasifier"],
        layers_to_transform=[1, 7],
        layers_pattern=["layers", "blocks"],
    )
    text = "\n".join(selection.problems)
    assert len(selection.problems) == 6
    for part in (
        "modules_to_save: 'clasifier' matches no module of the model. Did you mean 'classifier'?",
        "target_modules: 'q_porj' matches no module of the model. Did you mean 'q_proj'?",
        "target_modules: 'mpl.up' matches no module of the model. Did you mean 'mlp.up'?",
        "exclude_modules: 'embd' matches no module of the model. Did you mean 'embed'?",
        "layers_pattern: no number follows 'blocks'",
        "layers_to_transform: no target in layer 7; the targets are in layers 0-2.",
    ):
        assert part in text


def test_names_of_a_file_that_match_nothing_are_notes() -> None:
    config = PickConfig(target_modules=["v_proj", "w2"], exclude_modules=["x"], modules_to_save=["score"])
    selection = select(Tiny(), config, trusted=False)
    assert not selection.problems
    assert len(selection.notes) == 3
    assert len(selection.matched) == 3
    assert select(Tiny(), PickConfig(target_modules=["w2"]), trusted=False).problems


def test_a_hundred_misspelt_names_make_a_readable_message() -> None:
    selection = pick(Tiny(), target_modules=[f"x{i}" for i in range(100)])
    assert len(selection.problems) == 21
    assert "80 more entries" in selection.problems[-1]


def test_selecting_nothing_is_a_problem() -> None:
    assert "matches no module" in pick(Tiny(), target_modules=r"nothing\..*").problems[0]
    assert "taken out again" in pick(Tiny(), target_modules=["up"], exclude_modules=["mlp.*"]).problems[0]
    assert select(Tiny(), PickConfig(target_modules=r"x\..*"), trusted=False, other_sites=True).problems == []


def test_without_targets_and_without_default_the_message_says_what_to_do() -> None:
    (problem,) = pick(Tiny("unheard_of")).problems
    for part in ("'unheard_of'", "target_modules=[...]", "'all-linear'", "peft_architectures"):
        assert part in problem
    (problem,) = pick(Tiny()).problems
    assert "a Tiny" in problem
    assert select(Tiny(), PickConfig(), other_sites=True).problems == []


def test_default_targets_follow_the_model_type() -> None:
    selection = pick(Tiny("llama"))
    assert list(selection.matched) == [f"layers.{i}.attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")]
    assert selection.resolved == {"target_modules": ("q_proj", "v_proj")}


def test_default_names_that_the_model_lacks_are_left_out_of_the_resolved_config() -> None:
    class Three(PickConfig):
        default_roles: ClassVar[tuple[str, ...]] = ("query", "down")

    selection = select(Tiny("llama"), Three())
    assert selection.problems == []
    assert selection.resolved == {"target_modules": ("q_proj",)}
    assert "down_proj" in selection.notes[0]


def test_a_default_may_be_a_pattern() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.language_model = Tiny(), Tiny()
            self.config = {"model_type": "gemma4"}

    selection = pick(Both())
    assert len(selection.matched) == 6
    assert all(path.startswith("language_model.") for path in selection.matched)
    assert selection.resolved == {"target_modules": r".*language_model\..*\.(q_proj|v_proj)"}


def test_layers_by_the_first_number_or_by_a_pattern() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleList([Tiny(), Tiny()]), "tail": nn.Linear(2, 2)})
    by_number = pick(model, target_modules=["up", "tail"], layers_to_transform=1)
    assert list(by_number.matched) == [f"encoder.1.layers.{i}.mlp.up" for i in range(3)]
    by_name = pick(model, target_modules=["up"], layers_to_transform=[2], layers_pattern="layers")
    assert list(by_name.matched) == [f"encoder.{i}.layers.2.mlp.up" for i in range(2)]


def test_a_layer_that_is_excluded_as_well_is_no_missing_one() -> None:
    selection = pick(Tiny(), target_modules=["up"], exclude_modules=["layers.0.**"], layers_to_transform=[0, 1])
    assert (list(selection.matched), selection.problems) == (["layers.1.mlp.up"], [])


# ---- all-linear


def test_all_linear_leaves_the_output_embedding_and_resolves_to_short_names() -> None:
    class WithHead(Tiny):
        def get_output_embeddings(self) -> nn.Module:
            return self.classifier

    selection = pick(WithHead(), target_modules="ALL-linear")
    assert len(selection.matched) == 13
    assert "classifier" not in selection.matched
    assert selection.resolved == {"target_modules": ("q_proj", "v_proj", "up", "down", "pre_classifier")}


def test_all_linear_and_a_task_head() -> None:
    selection = pick(Tiny(), target_modules="all-linear", task_type="SEQ_CLS")
    assert "classifier" not in selection.matched
    assert selection.modules_to_save == ["classifier"]


def linear_tree(names: list[str]) -> nn.Module:
    root = nn.Module()
    for name in names:
        node = root
        for part in name.split("."):
            if part not in node._modules:
                node.add_module(part, nn.Linear(1, 1))
            node = node._modules[part]  # type: ignore[assignment]
    return root


@settings(deadline=None)
@given(names=st.lists(path, min_size=1, max_size=8, unique=True), data=st.data())
def test_the_resolved_names_of_all_linear_select_the_same_modules(names: list[str], data: st.DataObject) -> None:
    model = linear_tree(names)
    everything = [path for path, _ in model.named_modules() if path]
    exclude = data.draw(st.lists(st.sampled_from(everything), max_size=2, unique=True))
    fields: dict[str, Any] = {"exclude_modules": exclude} if exclude else {}
    if data.draw(st.booleans()):
        fields["layers_to_transform"] = [0, 1, 10]
    config = PickConfig(target_modules="all-linear", **fields)
    first = select(model, config)
    if not first.matched:
        return
    again = select(model, config.resolve(**first.resolved), trusted=False)
    assert list(again.matched) == list(first.matched)
    assert not again.problems


# ---- modules that do not call what they read


def test_the_output_projection_of_multihead_attention_is_refused() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "other": nn.ModuleDict({"out_proj": nn.Linear(4, 4)})})
    (problem,) = pick(model, target_modules=["out_proj"]).problems
    assert "'attn.out_proj'" in problem
    assert "would do nothing" in problem
    allowed = pick(model, target_modules=["out_proj"], exclude_modules=["attn.out_proj"])
    assert (list(allowed.matched), allowed.problems) == (["other.out_proj"], [])
    linear = pick(model, target_modules="all-linear")
    assert (list(linear.matched), linear.problems) == (["other.out_proj"], [])
    again = select(model, PickConfig(**linear.resolved))
    assert (list(again.matched), again.problems) == (["other.out_proj"], [])
    assert list(pick(model, target_modules=["attn"]).matched) == ["attn"]


# ---- modules to save


def test_modules_to_save_at_a_dot_boundary_and_left_out_of_targeting() -> None:
    selection = pick(Tiny(), target_modules=["up", "classifier"], modules_to_save=["classifier", "layers.0"])
    assert selection.modules_to_save == ["layers.0", "classifier"]
    assert list(selection.matched) == ["layers.1.mlp.up", "layers.2.mlp.up"]
    assert selection.problems == []
    assert selection.resolved == {}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_task_is_saved_where_there_is_one(task: str) -> None:
    selection = pick(Tiny(), target_modules=["up"], task_type=task)
    assert selection.modules_to_save == ["classifier"]
    assert selection.resolved == {"modules_to_save": ("classifier",)}
    assert selection.problems == []
    copied = pick(Tiny(), target_modules=["up"], task_type=task, modules_to_save=["classifier", "score", "embed"])
    assert copied.modules_to_save == ["embed", "classifier"]
    assert copied.problems == []
    assert pick(Tiny(), target_modules=["up"], task_type="QUESTION_ANS").modules_to_save == []


def test_a_copy_inside_a_copied_module_is_not_made_twice() -> None:
    selection = pick(Tiny(), target_modules=["down"], modules_to_save=["layers.1", "layers.1.mlp.up", "mlp.up"])
    assert selection.modules_to_save == ["layers.0.mlp.up", "layers.1", "layers.2.mlp.up"]


# ---- shared modules, a method's own rule


def test_a_shared_module_is_selected_once_under_its_first_path_by_any_of_its_names() -> None:
    model = Tiny()
    model.second = model.layers[1]  # type: ignore[assignment]
    for entry in ("second.mlp.up", "layers.1.mlp.up"):
        selection = pick(model, target_modules=[entry])
        assert (list(selection.matched), selection.problems) == (["layers.1.mlp.up"], [])
    selection = pick(model, target_modules=["up"], exclude_modules=["second.*.up"])
    assert list(selection.matched) == ["layers.0.mlp.up", "layers.2.mlp.up"]


def test_a_module_that_contains_itself_does_not_hang() -> None:
    model = Tiny()
    model.layers[0].add_module("root", model)
    assert len(pick(model, target_modules=["up"]).matched) == 3


def test_a_methods_rule_goes_before_the_names() -> None:
    def match(path: str, module: nn.Module) -> bool | None:
        return {"embed": True, "layers.0.mlp.up": False}.get(path)

    selection = select(Tiny(), PickConfig(target_modules=["up"], exclude_modules=["layers.1.**"]), match=match)
    assert list(selection.matched) == ["embed", "layers.2.mlp.up"]
    alone = select(Tiny(), PickConfig(), match=match)
    assert (list(alone.matched), alone.problems) == (["embed"], [])
    assert select(Tiny(), PickConfig(), match=lambda path, module: None).problems


def test_one_walk_and_no_tensor_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = Tiny()
    walks = 0
    original = nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        nonlocal walks
        walks += 1
        return original(self, *args, **kwargs)

    listing = list(model.named_modules(remove_duplicate=False))
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    assert len(select(model, PickConfig(target_modules=["up"]), modules=listing).matched) == 3
    assert walks == 0
