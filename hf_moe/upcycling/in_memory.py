# SPDX-License-Identifier: Apache-2.0
"""`upcycle_model`: the conversion of a model that is in memory already, equal to the streamed one to the bit."""

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .calibration import Observations, calibrate, read_calibration
from .checkpoint import is_finite
from .compose import BASE
from .convert import DenseTensors, in_memory_names, plan_steps
from .errors import UpcycleError
from .layouts import FusedLayout
from .parents import Parent, about_expert, compose_parents
from .plan import plan_upcycle
from .recipe import UpcycleConfig
from .targets import dense_class, find_family, layer_prefix


logger = logging.get_logger(__name__)


@torch.no_grad()
def upcycle_model(
    model: PreTrainedModel,
    config: UpcycleConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    experts: Mapping[str, PreTrainedModel] | None = None,
) -> PreTrainedModel:
    r"""
    Convert a dense model in memory into a mixture of experts; the dense model is left as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model, on one device.
        config (`UpcycleConfig`, *optional*): The recipe. The default one if None. Nothing is proved, since both models are
            at hand to be compared: `verify`, and a `calibration_text` that only the proof would read, are not looked at.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The model's; recipes that look at text or
            prompts need it.
        experts (`Mapping[str, PreTrainedModel]`, *optional*): With method `"compose"`, the models by what `config.experts`
            calls them. They are taken to have the tokenizer of `model`.

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
    if recipe.max_kl is not None:
        raise UpcycleError(
            "The noise for `max_kl` is searched on the text of the proof, which `upcycle` makes. Call it, or give `expert_noise`."
        )
    models = {BASE: model, **(experts or {})}
    if mismatch := models.keys() ^ {BASE, *(recipe.experts or [])}:
        raise UpcycleError(
            f"`experts` must have a model for each entry of the recipe's `experts` ({recipe.experts}) but 'base', and no "
            f"other; see to {sorted(mismatch)}."
        )
    parents = {entry: _parent(entry, dense) for entry, dense in models.items()}
    dense_config = parents[BASE].config
    plan = plan_upcycle(
        dense_config, recipe, experts={entry: parents[entry].config for entry in models if entry != BASE}
    )
    for warning in plan.warnings:
        logger.warning(warning)
    composition = compose_parents(parents, recipe)

    observations: Observations = {index: {} for index in plan.experts_in_layer}
    if recipe.looks_at_tokens:
        family = find_family(dense_config)
        layers = layer_prefix(family, model)
        calibration = read_calibration(recipe, plan, tokenizer, getattr(dense_config, "max_position_embeddings", 0))
        observations = calibrate(
            model,
            calibration,
            family,
            plan,
            recipe,
            lambda index: family.feed_forward.read(f"{layers}{index}.", model.state_dict()),
        )

    attention = model.config._attn_implementation
    if attention == "sdpa" and not plan.model_class._supports_sdpa:
        attention = "eager"
    with no_init_weights(), torch.device(model.device):
        result = plan.model_class._from_config(plan.config, dtype=model.dtype, attn_implementation=attention)
    layout = FusedLayout(plan.target.block, router=plan.target.layout.router)
    steps = plan_steps(composition.dense, composition.config, plan, recipe, layout, observations, composition.experts)
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


def _parent(entry: str, model: PreTrainedModel) -> Parent:
    config, state_dict = copy.deepcopy(model.config), model.state_dict()
    with about_expert(entry):
        find_family(config)
        config.architectures = [type(model).__name__]
        if not isinstance(model, dense_class(config)):
            raise UpcycleError(f"Only transformers' own {dense_class(config).__name__} can be converted.")
        for name, tensor in state_dict.items():
            if not is_finite(tensor):
                raise UpcycleError(f"Tensor {name!r} holds NaN or infinite values.")
    config.dtype = model.dtype
    info = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state_dict.items()}
    return Parent(entry, config, DenseTensors(info, state_dict.__getitem__))
