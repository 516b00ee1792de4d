# SPDX-License-Identifier: Apache-2.0
"""`upcycle_model`: the conversion of a model that is in memory already, equal to the streamed one to the bit."""

import copy

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .calibration import Observations, calibrate, needs_calibration, read_calibration
from .checkpoint import is_finite
from .convert import DenseTensors, plan_steps
from .errors import UpcycleError
from .layouts import FusedLayout
from .plan import plan_upcycle
from .recipe import UpcycleConfig
from .targets import dense_class, find_family, layer_prefix


logger = logging.get_logger(__name__)


@torch.no_grad()
def upcycle_model(
    model: PreTrainedModel, config: UpcycleConfig | None = None, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    r"""
    Convert a dense model in memory into a mixture of experts; the dense model is left as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model, on one device.
        config (`UpcycleConfig`, *optional*): The recipe. The default one if None. `verify` is not looked at: both models
            are at hand to be compared.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The model's; recipes that look at text or
            prompts need it.

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
    for warning in plan.warnings:
        logger.warning(warning)
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if not is_finite(tensor):
            raise UpcycleError(f"Tensor {name!r} holds NaN or infinite values.")
    info = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state_dict.items()}
    dense = DenseTensors(info, state_dict.__getitem__)

    observations: Observations = {index: {} for index in plan.experts_in_layer}
    if needs_calibration(recipe):
        family = find_family(dense_config)
        layers = layer_prefix(family, model)
        calibration = read_calibration(recipe, plan, tokenizer, getattr(dense_config, "max_position_embeddings", 0))
        observations = calibrate(
            model,
            calibration,
            family,
            plan,
            recipe,
            lambda index: family.feed_forward.read(f"{layers}{index}.", state_dict),
        )

    with no_init_weights(), torch.device(model.device):
        result = plan.model_class._from_config(
            plan.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    parameters = dict(result.named_parameters())
    for step in plan_steps(dense, dense_config, plan, recipe, FusedLayout(plan.target.block), observations):
        for name, (dtype, _) in step.tensors.items():
            parameters[name].data = parameters[name].data.to(dtype)
        for piece in step.pieces():
            target = parameters[piece.name].data.view(-1)
            target[piece.offset : piece.offset + piece.tensor.numel()].copy_(piece.tensor.reshape(-1))
    result.tie_weights()
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)
