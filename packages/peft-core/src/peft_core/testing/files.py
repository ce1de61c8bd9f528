"""Promises about states, files, copies and configs."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from peft_core import hook_results
from peft_core.config import AdapterConfig
from peft_core.errors import ConfigError
from peft_core.model import PeftModel

from .checks import check, gap, promised, refused, same
from .models import token_ids
from .setup import Setup, fixed_seed, record, state, tensors, trained, weights


class Files(Setup):
    """What is saved comes back; what is copied is apart."""

    def test_save_and_load(self, tmp_path: Path) -> None:
        """A saved adapter, loaded onto a fresh base, is the same adapter: every bit of its state, every
        output."""
        x = token_ids()
        model = self.adapted("a")
        before, expected, base = tensors(model, "a"), self.run(model, x), weights(model)
        with promised("an adapter can be saved", "Adapter.state / peft_state_key"):
            model.save_pretrained(tmp_path, selected_adapters=["a"])
        fresh = self.fresh()
        # Another seed than the first time: nothing that matters may come from the random numbers of the
        # loader.
        with (
            fixed_seed("loading"),
            promised(
                "a saved adapter loads onto a fresh base",
                "Adapter.state / load_state / peft_state_key / peft_build (tensors)",
            ),
        ):
            PeftModel.from_pretrained(fresh, tmp_path / "a", "b")
        fresh.eval()
        after = tensors(fresh, "b")
        differing = [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))]
        check(
            not differing,
            "the state that was saved is the state that is loaded, bit for bit",
            f"differing: {sorted(differing)}",
            "Adapter.slots / load_state; tensors that are made from a seed are buffers (saved) or made from the config",
        )
        check(
            same(self.run(fresh, x), expected),
            "a loaded adapter computes what the saved one computed, bit for bit",
            f"outputs differ by {gap(self.run(fresh, x), expected):.2g}",
            "something that acts is not saved: plain attributes drawn at random, unregistered tensors",
        )
        written = [name for name, tensor in weights(fresh).items() if not same(tensor, base[name])]
        check(
            not written,
            "loading writes nothing into the base",
            f"changed: {written}",
            "peft_build / load_state",
        )
        configs = [
            record(owner, name).config.to_dict(inference_mode=True) for owner, name in ((model, "a"), (fresh, "b"))
        ]
        check(
            configs[0] == configs[1],
            "the config that was saved is the config that is loaded",
            f"{configs[0]} became {configs[1]}",
            "the config class: fields, translate, written_if_set",
        )

    def test_loaded_adapter_trains_on(self, tmp_path: Path) -> None:
        """With `is_trainable=True` the same tensors train as before saving."""
        model = self.adapted("a")
        model.save_pretrained(tmp_path, selected_adapters=["a"])
        fresh: Any = PeftModel.from_pretrained(self.fresh(), tmp_path / "a", "a", is_trainable=True)
        wanted = {name for name, parameter in trained(model, "a").items() if parameter.requires_grad}
        found = {name for name, parameter in trained(fresh, "a").items() if parameter.requires_grad}
        check(
            wanted == found and wanted,
            "a loaded adapter has the trainable tensors of the saved one",
            f"before {sorted(wanted)}, after {sorted(found)}",
            "Adapter.__init__: mark what never trains there, with requires_grad_(False), not in reset_parameters",
        )

    def test_state_keys(self) -> None:
        """Every tensor has a key of its own, which depends neither on the adapter's name nor on the
        moment."""
        model = self.adapted("a", "quite_another")
        adapter = record(model, "a")
        for request, one in zip(adapter.requests, adapter.adapters, strict=True):
            slots = list(one.state())
            keys = [
                hook_results.call(adapter.method, "peft_state_key", config=adapter.config, key=slot) for slot in slots
            ]
            clash = {
                key: [s for s, k in zip(slots, keys, strict=True) if k == key] for key in keys if keys.count(key) > 1
            }
            check(
                not clash,
                "peft_state_key gives every slot a key of its own",
                f"{request.path}: {clash}",
                "peft_state_key",
            )
        with promised("the adapter's tensors can be listed by the keys of its file", "peft_state_key"):
            saved = {name: model.get_adapter_state_dict(name) for name in ("a", "quite_another")}
            again = model.get_adapter_state_dict("a")
        check(
            set(saved["a"]) == set(saved["quite_another"]) and list(saved["a"]) == list(again),
            "keys do not depend on the adapter's name and are the same each time",
            f"only in one: {sorted(saved['a'].keys() ^ saved['quite_another'].keys())}",
            "peft_state_key / Adapter.slots",
        )
        expected = len(tensors(model, "a"))
        check(
            len(saved["a"]) == expected,
            "every tensor of the adapter is saved, once",
            f"{expected} tensors, {len(saved['a'])} keys: {sorted(saved['a'])}",
            "peft_state_key; tensors that several sites use belong into `shared`",
        )

    # -- copies ----------------------------------------------------------------------------------------------

    def test_deepcopy(self) -> None:
        """A deep copy computes the same and shares nothing."""
        self._copies(copy.deepcopy, "copy.deepcopy")

    def test_pickle(self) -> None:
        """So does a pickled and unpickled model."""
        self._copies(lambda model: pickle.loads(pickle.dumps(model)), "pickle")

    def _copies(self, duplicate: Any, how: str) -> None:
        x = token_ids()
        model = self.adapted("a", "b")
        model.set_adapter("a")
        expected = self.run(model, x)
        look = "Adapter: attributes that cannot be copied, or that point to the original model"
        with promised(f"an adapted model survives {how}", look):
            twin = duplicate(model)
            out = self.run(twin, x)
        check(
            same(out, expected),
            f"a model after {how} computes the same",
            f"differs by {gap(out, expected):.2g}",
            look,
        )
        with torch.no_grad():
            for owner, attribute in (*record(twin, "a").learned, *record(twin, "b").learned):
                getattr(owner, attribute).zero_()
            for parameter in twin.parameters():
                parameter.zero_()
        twin.set_adapter("b")
        check(
            same(self.run(model, x), expected),
            f"changing a model made by {how} leaves the original alone",
            f"the original's output differs by {gap(self.run(model, x), expected):.2g}",
            look,
        )

    # -- configs ---------------------------------------------------------------------------------------------

    def test_config_round_trip(self) -> None:
        """A config goes through JSON unchanged, is frozen, and knows its own fields."""
        for config in (self.config, self.configure(self.targets())):
            kind: type[AdapterConfig] = type(config)
            text = config.to_json()
            with promised("a config can be read from its own JSON", "the config class: field types"):
                back = kind.from_dict(json.loads(text))
            check(
                back == config and back.to_json() == text and hash(back) == hash(config),
                "a config read from its own JSON is the config",
                f"{text} became {back.to_json()}",
                "the config class: tuples for sequences, translate, written_if_set",
            )
            for field in kind.model_fields:
                with refused(ConfigError, "configs are frozen", "the config class: model_config"):
                    setattr(config, field, getattr(config, field))
            with refused(ConfigError, "unknown fields are errors", "the config class: model_config"):
                kind(**{**{f: getattr(config, f) for f in kind.model_fields}, "no_such_field": 1})

    def test_config_names_its_method(self) -> None:
        """`peft_type` is the name the method is found under."""
        model = self.adapted()
        name = state(model).record("a").method.name
        check(
            type(self.config).peft_type == name.upper(),
            "`peft_type` is the method's name in upper case",
            f"{type(self.config).peft_type!r} and {name!r}",
            "the config class; the entry point's name",
        )
        check(
            name.isidentifier(),
            "the method's name is an identifier",
            repr(name),
            "the config class's `peft_type`; the entry point's name: it stands in files and on command lines",
        )
