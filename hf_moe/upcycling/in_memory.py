# SPDX-License-Identifier: Apache-2.0
"""`upcycle_model`: the conversion of a model that is in memory already, equal to the streamed one to the bit."""

import copy

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .convert import DenseTensors, in_memory_names, plan_steps
from .errors import UpcycleError
from .layouts import FusedLayout
from .plan import plan_upcycle
from .recipe import UpcycleConfig
from .targets import dense_class, find_family, find_head, target_class


@torch.no_grad()
def upcycle_model(model: PreTrainedModel, config: UpcycleConfig | None = None) -> PreTrainedModel:
    r"""
    Convert a dense model in memory into a mixture of experts; the dense model is left as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model, on one device.
        config (`UpcycleConfig`, *optional*): The recipe. The default one if None. `verify` is not looked at: both models
            are at hand to be compared.

    Returns:
        [`~transformers.PreTrainedModel`]: On the same device and in the same mode as `model`.

    Raises:
        UpcycleError: if the conversion cannot be done.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_moe import UpcycleConfig, upcycle_model

    >>> dense = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    >>> moe = upcycle_model(dense, UpcycleConfig(num_experts=4))
    ```
    """
    recipe = config or UpcycleConfig()
    dense_config = copy.deepcopy(model.config)
    find_family(dense_config)
    dense_config.architectures = [type(model).__name__]
    if not isinstance(model, dense_class(dense_config)):
        raise UpcycleError(f"Only transformers' own {dense_class(dense_config).__name__} can be converted.")
    dense_config.dtype = model.dtype
    plan = plan_upcycle(dense_config, recipe)
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if not torch.isfinite(tensor).all():
            raise UpcycleError(f"Tensor {name!r} holds NaN or infinite values.")
    info = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state_dict.items()}
    dense = DenseTensors(info, state_dict.__getitem__)

    cls = target_class(plan.target, find_head(dense_config))
    attention = model.config._attn_implementation
    if attention == "sdpa" and not cls._supports_sdpa:
        attention = "eager"
    with no_init_weights(), torch.device(model.device):
        result = cls._from_config(plan.config, dtype=model.dtype, attn_implementation=attention)
    layout = FusedLayout(plan.target.block, router=plan.target.layout.router)
    steps = plan_steps(dense, dense_config, plan, recipe, layout)
    name_in_memory = in_memory_names([name for step in steps for name in step.tensors], result)
    tensors = result.state_dict(keep_vars=True)
    for step in steps:
        for name, (dtype, _) in step.tensors.items():
            tensor = tensors[name_in_memory[name]]
            tensor.data = tensor.data.to(dtype)
        for piece in step.pieces():
            target = tensors[name_in_memory[piece.name]].data.view(-1)
            target[piece.offset : piece.offset + piece.tensor.numel()].copy_(piece.tensor.reshape(-1))
    result.tie_weights()
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)
