"""What an adapter has on a mixture's experts and routers, in either form that PEFT writes.

* **A projection of one expert**, where each is a module: `experts.3.gate_proj.lora_A.weight` [r, in] and
  `lora_B.weight` [out, r], of any rank for each.
* **A parameter of all experts** (`target_parameters`): A is [E r, in], expert after expert; B is [out, r E],
  whose columns are the first rank of every expert, then the second one, and so on. `gate_up_proj` and
  `down_proj` are of one module, which PEFT wraps once for each: where both are targeted, gate_up's keys have
  `base_layer`.

The router is targeted as a module, or as the parameter `gate.weight`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import EXPERT_MODULES, ROUTER, BaseShapes, expert_name
from toppings.adapters.peft_config import PeftConfig, shorten
from toppings.adapters.peft_kinds import KINDS
from toppings.adapters.peft_matches import PeftMatches
from toppings.adapters.stored_tensors import FLOATS, StoredTensor

if TYPE_CHECKING:
    import torch

GATE, UP, DOWN, GATE_UP = range(len(EXPERT_MODULES))
ROUTER_MODULE = len(EXPERT_MODULES)
_WRAPPED = "mlp.experts"  # as transformers calls the module that has the parameters, in all families
_KEY = re.compile(
    r"base_model\.model\.(?P<stem>model\.layers\.\d{1,6}\.[\w.]{1,99}?)\.lora_(?P<half>[AB])(?:\.default)?\.weight",
    re.ASCII,
)

Keys: TypeAlias = dict[str, str]
"""Of one site, by half: "A", "B"."""
Extras: TypeAlias = "dict[int, dict[str, torch.Tensor]]"


@dataclass(frozen=True)
class Site:
    """What a LoRA may be on, by the name that PEFT's patterns see. `module`: an index into `EXPERT_MODULES`,
    or `ROUTER_MODULE`; `expert`: None for all of them."""

    name: str
    layer: int
    module: int
    expert: int | None = None


def module_sites(shapes: BaseShapes) -> Iterator[Site]:
    """Routers, and every projection of every expert, where these are modules."""
    if (mixture := shapes.mixture) is None or (names := mixture.names).are_stacked:
        return
    for layer in range(shapes.num_layers):
        prefix = f"model.layers.{layer}."
        yield Site(prefix + names.router, layer, ROUTER_MODULE)
        for expert in range(mixture.num_experts):
            for module, name in ((GATE, names.gate), (UP, names.up), (DOWN, names.down)):
                yield Site(prefix + name.format(expert), layer, module, expert)


def _parameters(shapes: BaseShapes) -> dict[str, int]:
    """Those of a layer that hold all experts, and its router's weight, by name: what they are."""
    if (mixture := shapes.mixture) is None:
        return {}
    names = {f"{_WRAPPED}.gate_up_proj": GATE_UP, f"{_WRAPPED}.down_proj": DOWN}
    return {**names, mixture.names.router_parameter: ROUTER_MODULE}


def parameter_sites(shapes: BaseShapes) -> Iterator[Site]:
    for layer in range(shapes.num_layers):
        for name, module in _parameters(shapes).items():
            yield Site(f"model.layers.{layer}.{name}", layer, module)


class ExpertPlan:
    """`taken`: the keys that are of experts and routers. Raises AdapterError for what would not give what
    PEFT gives."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        config: PeftConfig,
        shapes: BaseShapes,
        matches: PeftMatches,
    ) -> None:
        self._config, self._shapes, self._matches = config, shapes, matches
        self._check_parameters()
        sites = self._targeted()
        self._keys: dict[Site, Keys] = {site: {} for site in sites.values()}
        for key in stored:
            if (match := _KEY.fullmatch(key)) is not None and (site := sites.get(match["stem"])) is not None:
                self._add(site, match["half"], key)
        self.taken = {key for keys in self._keys.values() for key in keys.values()}
        if sites:
            self._check(stored)

    def extras(self, tensors: Mapping[str, "torch.Tensor"]) -> Extras:
        """By layer and name (`layout.py`); B with its scale, in fp32."""
        made: Extras = {}
        sites = sorted(self._keys, key=lambda site: (site.layer, site.module))
        for (layer, module), group in groupby(sites, key=lambda site: (site.layer, site.module)):
            a, b = self._product(list(group), tensors)
            named = [
                f"{ROUTER}.{half}" if module == ROUTER_MODULE else expert_name(module, half) for half in "AB"
            ]
            made.setdefault(layer, {}).update(zip(named, (a, b), strict=True))
        return made

    # --- what there is ---

    def _targeted(self) -> dict[str, Site]:
        """By what their keys begin with."""
        matches = self._matches
        found = {site.name: site for site in module_sites(self._shapes) if matches.is_target(site.name)}
        parameters = [s for s in parameter_sites(self._shapes) if matches.is_target_parameter(s.name)]
        names = {site.name for site in parameters}
        for site in parameters:
            stem, _, name = site.name.rpartition(".")
            if name == "gate_up_proj" and f"{stem}.down_proj" in names:
                stem += ".base_layer"
            if stem not in found:  # a router may be targeted by both of its names
                found[stem] = site
        return found

    def _add(self, site: Site, half: str, key: str) -> None:
        keys = self._keys[site]
        if half in keys:
            raise AdapterError(f"keys {keys[half]!r} and {key!r} are the same weight")
        keys[half] = key

    # --- checks ---

    def _check_parameters(self) -> None:
        known = [site.name for site in parameter_sites(self._shapes)]
        for target in self._config.target_parameters:
            if target == "weight" or not any(name == target or name.endswith(f".{target}") for name in known):
                served = ", ".join(_parameters(self._shapes)) or "none, as the base model has no experts"
                raise AdapterError(f"target_parameters names {shorten(target)}; served are {served}")

    def _check(self, stored: Mapping[str, StoredTensor]) -> None:
        config = self._config
        options = {
            config.kind.title: config.kind is not KINDS["LORA"],
            "use_dora": config.use_dora,
            "lora_bias": config.has_bias,
            f"init_lora_weights {config.start!r}": bool(config.start),
            "alora_invocation_tokens": bool(config.invocation_tokens),
        }
        for option, is_on in options.items():
            if is_on:
                raise AdapterError(
                    f"{option} of experts or routers is not supported, and {self._first} is targeted"
                )
        whole = {(site.layer, site.module) for site in self._keys if site.expert is None}
        for site, keys in self._keys.items():
            for half, shape in self._shapes_of(site).items():
                if half not in keys:
                    raise AdapterError(f"{site.name} is targeted, but the file has no lora_{half} of it")
                _check_stored(stored[keys[half]], shape)
            is_twice = (site.layer, site.module) in whole or (
                site.module != DOWN and (site.layer, GATE_UP) in whole
            )
            if site.expert is not None and is_twice:
                raise AdapterError(f"{site.name} is targeted by target_modules and by target_parameters")

    @property
    def _first(self) -> str:
        return next(iter(self._keys)).name

    def _size(self, site: Site) -> tuple[int, int]:
        """Inputs and outputs, of one expert or of the router."""
        mixture, (gate, up, down) = self._shapes.mixture, self._shapes.sizes[4:]
        assert mixture is not None
        sizes = (gate, up, down, (gate[0], gate[1] + up[1]), (gate[0], mixture.num_experts))
        return sizes[site.module]

    def _count(self, site: Site) -> int:
        """Experts that its tensors hold."""
        mixture = self._shapes.mixture
        assert mixture is not None
        return 1 if site.expert is not None or site.module == ROUTER_MODULE else mixture.num_experts

    def _shapes_of(self, site: Site) -> dict[str, tuple[int, int]]:
        (num_in, num_out), rank = self._size(site), self._matches.rank_of(site.name) * self._count(site)
        return {"A": (rank, num_in), "B": (num_out, rank)}

    # --- what is served ---

    def _product(
        self, sites: list[Site], tensors: Mapping[str, "torch.Tensor"]
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """A and B of all experts, or of the router, as extras have them."""
        import torch

        first, mixture = sites[0], self._shapes.mixture
        assert mixture is not None
        if first.expert is None:
            (num_in, num_out), count = self._size(first), self._count(first)
            a, b = (tensors[self._keys[first][half]] for half in "AB")
            b = b.view(num_out, -1, count).permute(2, 1, 0).float() * self._matches.scale_of(first.name)
            return (a, b[0]) if first.module == ROUTER_MODULE else (a.view(count, -1, num_in), b)
        rank, sizes = max(self._matches.rank_of(site.name) for site in sites), self._size(first)
        a, b = (torch.zeros(mixture.num_experts, rank, size) for size in sizes)
        for site in sites:
            own_a, own_b = (tensors[self._keys[site][half]] for half in "AB")
            assert site.expert is not None
            a[site.expert, : own_a.shape[0]] = own_a
            b[site.expert, : own_a.shape[0]] = own_b.float().t() * self._matches.scale_of(site.name)
        return a, b


def _check_stored(stored: StoredTensor, shape: tuple[int, int]) -> None:
    if stored.shape != shape or stored.dtype not in FLOATS:
        raise AdapterError(
            f"key {stored.key!r} has shape {list(stored.shape)} and type {stored.dtype[:32]}; the base model "
            f"and the configured rank need {list(shape)} and a float of 8 to 64 bits"
        )
