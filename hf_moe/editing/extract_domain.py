# SPDX-License-Identifier: Apache-2.0
"""`extract_domain`: the model of one domain out of one whose experts are divided by domain."""

import copy
from numbers import Integral

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..models.configuration_moe import MoeConfigMixin
from ..upcycling.errors import UpcycleError


@torch.no_grad()
def extract_domain(model: PreTrainedModel, domain: int) -> PreTrainedModel:
    r"""
    Cut the experts of one domain out of a model with `router_type="hash"` and several domains
    (https://huggingface.co/papers/2303.10845).

    What it computes for texts of this domain stays the same; it needs no `domain_ids` any more and has
    `num_experts / num_hash_domains` experts. The model that is given stays as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of hf_moe.
        domain (`int`): The domain, as in `domain_ids`.

    Returns:
        [`~transformers.PreTrainedModel`]: On the same device, of the same data type and in the same mode.

    Raises:
        UpcycleError: if the model has no experts by domain, or not this domain.

    Example:

    ```python
    >>> from hf_moe import extract_domain

    >>> extract_domain(model, 2).save_pretrained("model-of-domain-2")
    ```
    """
    config = model.config
    num_domains = config.router_class.count_domains(config) if isinstance(config, MoeConfigMixin) else 1
    if num_domains == 1:
        kind = getattr(config, "router_type", None)
        raise UpcycleError(
            f"{type(model).__name__} has no experts by domain (router_type={kind!r}, num_hash_domains="
            f"{getattr(config, 'num_hash_domains', None)}). Those with router_type='hash' and `num_hash_domains` above 1 have."
        )
    if not isinstance(domain, Integral) or isinstance(domain, bool) or not 0 <= domain < num_domains:
        raise UpcycleError(
            f"`domain` must be one of the {num_domains} domains, a whole number from 0 to {num_domains - 1}, got {domain!r}."
        )
    config = copy.deepcopy(config)
    config.num_experts //= num_domains
    if config.num_experts_per_layer is not None:
        config.num_experts_per_layer = [count // num_domains for count in config.num_experts_per_layer]
    config.num_hash_domains = 1
    with no_init_weights(), torch.device(model.device):
        result = type(model)._from_config(config, dtype=model.dtype)
    own = result.state_dict()
    values = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(".expert_of_token"):
            size = own[name.removesuffix("gate.expert_of_token") + "experts.down_proj"].shape[0]
            values[name] = tensor[domain : domain + 1] - domain * size
        elif ".experts." in name:
            size = len(own[name])
            values[name] = tensor[domain * size : (domain + 1) * size]
        else:
            values[name] = tensor
    result.load_state_dict(values)
    result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)
