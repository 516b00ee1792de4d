# SPDX-License-Identifier: Apache-2.0
"""The tables of the guide on routers, made of what the classes declare."""

from dataclasses import fields

from hf_moe.models.capacity import CAPACITY_POLICIES
from hf_moe.models.configuration_routing import RoutingConfigMixin
from hf_moe.models.router_base import CAPACITY_OPTIONS, ZERO_EXPERT_OPTIONS
from hf_moe.models.routers import ROUTERS
from hf_moe.upcycling.routing import UNROUTED_OPTIONS


SHARED = {"capacity": CAPACITY_OPTIONS, "zero-computation experts": ZERO_EXPERT_OPTIONS}


def render() -> str:
    """Router, paper, what it changes, when to use it."""
    lines = [
        "| `router_type` | system | score | chooses | weight | use it for |",
        "|---|---|---|---|---|---|",
    ]
    for name, router in ROUTERS.items():
        contract = router.contract
        papers = " ".join(f"[{paper}](https://huggingface.co/papers/{paper})" for paper in contract.papers)
        cells = [contract.score, contract.selection, contract.weight, contract.use_when]
        row = [f"`{name}`", f"{contract.system} {papers}".strip(), *(cell.replace("|", "\\|") for cell in cells)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def render_training() -> str:
    """What differs in training, which loss `aux_loss` is, what is saved, and which fields are read."""
    lines = [
        "| `router_type` | training differs in | `aux_loss` | state besides `weight` | fields that it reads |",
        "|---|---|---|---|---|",
    ]
    for name, router in ROUTERS.items():
        contract, options = router.contract, list(router.options)
        groups = []
        for group, members in SHARED.items():
            if set(members) <= set(options):
                groups.append(group)
                options = [option for option in options if option not in members]
        read = ", ".join([*(f"`{option}`" for option in options), *groups]) or "none"
        lines.append(f"| `{name}` | {contract.training_differs} | {contract.balance} | {contract.state} | {read} |")
    of_block = ", ".join(f"`{option}`" for option in UNROUTED_OPTIONS)
    router_alone = ", ".join(f"`{name}`" for name, router in ROUTERS.items() if not router.jitters_block)
    lines += [
        "",
        f"Besides, a block reads {of_block}, whatever its router. The jitter is that of the block's input, with {router_alone} of the router's alone.",
    ]
    return "\n".join(lines)


def render_policies() -> str:
    """The capacity policies, and the routers that have one by default."""
    lines = ["| `capacity_policy` | |", "|---|---|"]
    for policy, what in CAPACITY_POLICIES.items():
        by_default = [f"`{name}`" for name, router in ROUTERS.items() if router.capacity_policy == policy]
        suffix = f"; the default of {' and '.join(by_default)}" if by_default and policy != "none" else ""
        lines.append(f"| `{policy}` | {what}{suffix} |")
    defaults = {field.name: field.default for field in fields(RoutingConfigMixin)}
    shown = ", ".join(f"`{name}={defaults[name]!r}`" for name in CAPACITY_OPTIONS if name != "capacity_policy")
    return "\n".join([*lines, "", f"The defaults are {shown}."])
