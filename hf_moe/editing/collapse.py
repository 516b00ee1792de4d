# SPDX-License-Identifier: Apache-2.0
"""`collapse`: a mixture of experts goes back to a dense model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..upcycling.convert import Step
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward, FeedForwardNames
from ..upcycling.layouts import Piece
from ..upcycling.methods import inexact_because
from ..upcycling.output import OutputFolder
from ..upcycling.targets import layer_prefix
from .dense_feed_forward import COLLAPSES, SparseView, is_silent
from .dense_parent import DenseParent, find_parent, names_on_disk
from .edit import Edit, EditReport, write_edit
from .moe_checkpoint import MoeCheckpoint


def collapse(
    source: str | Path,
    output_dir: str | Path,
    *,
    expert: str | int = "mean",
    revision: str | None = None,
    verify: bool = True,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> EditReport:
    r"""
    Make a dense model of a mixture of experts.

    The class, its configuration and the method by which the experts were made are read in `hf_moe.json`; without it, the
    dense family with the same attention is looked up, and experts count as copies, or as the routed part of `"residual"`
    if there is a shared expert.

    | method | the dense feed-forward |
    |---|---|
    | `copy`, `drop`, `compose` | the mean of the experts, or one of them |
    | `residual` | the shared expert; the mean of the routed experts' down-projections is added where they are as wide |
    | `granular` | the parts of a copy side by side: the mean of the copies, or the one that `expert` is a part of |
    | `split` | the neurons of all experts, in the order that they had if they were dealt out at random |

    A factor that the method put into the weights is taken out again. As long as nothing was trained, `copy`, `residual`,
    `granular` and `split` give the dense model back, to the bit if the factor is a power of two; with `split` by anything
    but chance its neurons come in another order. Such a result computes what the source computes if the source computes
    what its dense parent did, which is checked. In all other cases the error is measured and reported.

    Args:
        source (`str` or `Path`): The mixture of experts, a folder or a Hub id.
        output_dir (`str` or `Path`): The folder to write.
        expert (`str` or `int`, *optional*, defaults to `"mean"`): `"mean"` of the experts, or the index of one of them.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        verify (`bool`, *optional*, defaults to `True`): Whether the outputs of source and result are compared.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`EditReport`]

    Raises:
        UpcycleError: if there is no dense model to go back to, or if the result should be exact and is not.

    Example:

    ```python
    >>> from hf_moe import collapse

    >>> report = collapse("smollm2-moe", "smollm2-dense")
    ```
    """
    if expert != "mean" and (isinstance(expert, str) or expert < 0):
        raise UpcycleError(f"`expert` must be 'mean' or the index of an expert, got {expert!r}.")
    output = OutputFolder(output_dir, [source], overwrite)
    moe = MoeCheckpoint(source, revision)
    parent = find_parent(moe)
    views = {index: SparseView(moe, index, parent, expert) for index in moe.blocks}
    method = _find_method(parent, views)
    _check_expert(method, expert, views)
    model, config = parent.model(moe, COLLAPSES[method].size(next(iter(views.values()))))
    edit = Edit(
        operation="collapse",
        arguments={"expert": expert},
        details={"method": method},
        config=config,
        model_class=type(model),
        steps=_dense_steps(moe, parent, model, config, views, COLLAPSES[method].build),
        inexact_because=_inexact_because(moe, parent, method, views),
        top_k=None,
    )
    return write_edit(moe, output, edit, verify=verify, max_shard_size=max_shard_size, progress=progress)


def _find_method(parent: DenseParent, views: dict[int, SparseView]) -> str:
    """The method that made the experts; without a recipe, what they look like."""
    if parent.recipe is None:
        shared = [view.shared_expert for view in views.values()]
        if all(expert is None or is_silent(expert) for expert in shared):
            return "copy"
        if parent.target.shared_expert is not None and parent.target.shared_expert.gate is not None:
            raise UpcycleError(
                "The shared expert is scaled by a gate, which no dense feed-forward has, so there is no dense model to go "
                "back to."
            )
        return "residual"
    method = parent.recipe.method
    if method not in COLLAPSES:
        raise UpcycleError(
            f"Experts of method {method!r} hold no feed-forward to go back to. What can be collapsed are {sorted(COLLAPSES)}."
        )
    if parent.edited and COLLAPSES[method].needs_all:
        raise UpcycleError(
            f"Method {method!r} made experts that are parts of one feed-forward, but experts were added or removed since. "
            "Collapse the model that was edited."
        )
    return method


def _check_expert(method: str, expert: str | int, views: dict[int, SparseView]) -> None:
    if isinstance(expert, str):
        return
    if not COLLAPSES[method].takes_one:
        raise UpcycleError(
            f"expert={expert}: no expert of method {method!r} is a feed-forward of its own. Use expert='mean'."
        )
    for index, view in views.items():
        if expert >= view.block.num_experts:
            raise UpcycleError(f"expert={expert}: layer {index} has experts 0 to {view.block.num_experts - 1}.")


def _dense_steps(
    moe: MoeCheckpoint,
    parent: DenseParent,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    views: dict[int, SparseView],
    build: Callable[[SparseView], FeedForward],
) -> list[Step]:
    """The steps that write the dense model, in the order of its tensors and by the names that it has on disk."""
    state_dict, on_disk = model.state_dict(), names_on_disk(model)
    layers, feed_forward = layer_prefix(parent.family, model), parent.family.feed_forward
    layer_of = {name: index for index in views for name in feed_forward.tensors(f"{layers}{index}.", state_dict)}
    steps, seen = [], set()
    for name, tensor in state_dict.items():
        if name in model.all_tied_weights_keys:
            continue
        if name not in layer_of:
            parts = [part for part, _ in parent.target.rows_of(name, config)]
            steps.append(_joining_step(moe, parts, on_disk[name], tuple(tensor.shape)))
        elif (index := layer_of[name]) not in seen:
            seen.add(index)
            layer = f"{layers}{index}."
            shapes = {other: tuple(state_dict[other].shape) for other in feed_forward.tensors(layer, state_dict)}
            steps.append(_feed_forward_step(feed_forward, layer, views[index], build, shapes, on_disk))
    return steps


def _joining_step(moe: MoeCheckpoint, parts: list[str], new_name: str, shape: tuple[int, ...]) -> Step:
    """The step that writes a dense tensor, which the mixture of experts may keep in several parts, one below the other."""
    there = {part: moe.info(part) for part in parts if part in moe.name_on_disk}
    rows = sum(info[1][0] for info in there.values())
    if len(there) < len(parts) or any((rows, *info[1][1:]) != shape for info in there.values()):
        raise UpcycleError(
            f"The dense model needs {new_name!r} with shape {shape}, but the mixture of experts has "
            f"{ {part: info[1] for part, info in there.items()} or None }: it cannot go back to this class."
        )

    def pieces() -> Iterator[Piece]:
        offset = 0
        for part in parts:
            tensor = moe.checkpoint.read(moe.name_on_disk[part])
            yield Piece(new_name, offset, tensor)
            offset += tensor.numel()

    return Step.of(new_name, {new_name: (there[parts[0]][0], shape)}, pieces)


def _feed_forward_step(
    names: FeedForwardNames,
    layer: str,
    view: SparseView,
    build: Callable[[SparseView], FeedForward],
    shapes: dict[str, tuple[int, ...]],
    on_disk: dict[str, str],
) -> Step:
    dtype = view.moe.dtype_of(view.block)

    def pieces() -> Iterator[Piece]:
        for name, parts in names.write(layer, build(view)):
            yield Piece(on_disk[name], 0, torch.cat(parts))

    return Step.of(layer, {on_disk[name]: (dtype, shape) for name, shape in shapes.items()}, pieces)


def _inexact_because(moe: MoeCheckpoint, parent: DenseParent, method: str, views: dict[int, SparseView]) -> str | None:
    """Why the result need not compute what the source computes; the weights are looked at as far as that takes."""
    if parent.recipe is not None:
        is_gated = next(iter(moe.blocks.values())).expert.is_gated
        if (reason := inexact_because(parent.recipe, moe.config.dtype, is_gated)) is not None:
            return reason
        if parent.edited and next(iter(views.values())).weight_sum is None:
            return "experts were added or removed, and the weights of the chosen ones do not always sum to the same"
    return next((reason for view in views.values() if (reason := COLLAPSES[method].inexact_because(view))), None)
