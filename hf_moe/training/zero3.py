# SPDX-License-Identifier: Apache-2.0
"""`set_zero3_leaf_modules`: lets DeepSpeed's ZeRO-3 gather a sparse block as one, whatever experts its tokens choose."""

from torch import nn

from .routers import find_routers, without_wrappers


def set_zero3_leaf_modules(model: nn.Module) -> list[type]:
    """
    Mark the sparse blocks of a model as leaf modules of ZeRO-3.

    Where experts are modules of their own, a process whose tokens miss one does not gather its weights, while the others wait
    for it. As leaves the blocks are gathered whole. The blocks are found by their routers, not by a list of models.
    [`add_moe_callbacks`] does this when the trainer runs ZeRO-3.

    Args:
        model (`torch.nn.Module`): A mixture of experts, before DeepSpeed wraps it.

    Returns:
        `list[type]`: The classes that are leaves now.

    Raises:
        ValueError: if the model has no routers.
        ImportError: if DeepSpeed is not installed.
    """
    try:
        from deepspeed.utils import set_z3_leaf_modules
    except ImportError as error:
        raise ImportError(
            "set_zero3_leaf_modules is for DeepSpeed, which is not installed: `pip install deepspeed`."
        ) from error
    blocks = {type(model.get_submodule(without_wrappers(name).rpartition(".")[0])) for name in find_routers(model)}
    classes = sorted(blocks, key=lambda block: block.__name__)
    set_z3_leaf_modules(model, classes)
    return classes
