# SPDX-License-Identifier: Apache-2.0
"""
`evaluate` metric: how far the routers of two models choose the same experts for the same tokens.

`evaluate` keeps what it is given in Arrow files of fixed columns until `compute`; here an example is one layer of one batch,
so `add_batch` can be called batch by batch.
"""

from collections.abc import Mapping

import datasets
import evaluate
import torch

# A module, not a class: `evaluate` takes the first metric class that it finds in here. It runs a copy of this file, so the
# import is absolute.
import hf_moe.training.agreement as agreement


_DESCRIPTION = """
How far two models choose the same experts for the same tokens, in each sparse layer. Between a model and the same model
later in training it is the router saturation of OLMoE (Muennighoff et al., 2024).

- `overlap`: mean share of a token's experts that both models choose; K/E for random choices of K of E experts;
- `exact`: share of the tokens for which both choose the same experts, in whatever order;
- `first_choice`: share of the tokens whose expert with the largest logit is the same.

Experts are compared by their number, so the models have to be of one origin.
"""

_CITATION = """\
@article{muennighoff2024olmoe,
    title={OLMoE: Open Mixture-of-Experts Language Models},
    author={Niklas Muennighoff and Luca Soldaini and Dirk Groeneveld and Kyle Lo and others},
    journal={arXiv preprint arXiv:2409.02060},
    year={2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`dict[str, torch.Tensor]`): What `RoutingRecorder(model, keep_choices=True).choices()` gives for one model: by
        the name of the router, `(num_tokens, K)` experts, the first choice in front and -1 for none.
    references (`dict[str, torch.Tensor]`): The same of the other model for the same tokens. Layers are compared in their
        order.

Returns:
    overlap (`float`), exact (`float`), first_choice (`float`): Means over layers, from 0 to 1.
    layers (`dict`): The same and `num_tokens`, by the name of the first model's router.

Example:

    >>> import evaluate, hf_moe
    >>> router_agreement = evaluate.load(hf_moe.metric_path("router_agreement"))
    >>> with hf_moe.RoutingRecorder(model, keep_choices=True) as recorder:
    ...     model(**batch)
    >>> with hf_moe.RoutingRecorder(tuned, keep_choices=True) as tuned_recorder:
    ...     tuned(**batch)
    >>> router_agreement.compute(predictions=recorder.choices(), references=tuned_recorder.choices())["overlap"]
"""

# One example; the `(num_tokens, K)` experts are flat, which Arrow takes several times faster than rows.
CHOICES = {"layer": datasets.Value("string"), "experts": [datasets.Value("int64")], "top_k": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RouterAgreement(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": CHOICES, "references": CHOICES}),
            reference_urls=["https://huggingface.co/papers/2409.02060"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add what both models chose for a batch."""
        for choices in (predictions, references):
            if not isinstance(choices, Mapping):
                raise ValueError(
                    f"Got a {type(choices).__name__} for the choices of a model. Give `recorder.choices()` of a "
                    "RoutingRecorder with `keep_choices=True`, as predictions and as references."
                )
        # Batches that differ in their numbers of layers or tokens must not be added: later they could no longer be told apart.
        agreement.RouterAgreement(predictions, references)
        super().add_batch(predictions=_to_rows(predictions), references=_to_rows(references), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add what both models chose for a batch, as `add_batch` does."""
        self.add_batch(**{"predictions": prediction, "references": reference, **kwargs})

    def _compute(self, predictions, references):
        chosen = _merge_rows(predictions, [row["layer"] for row in predictions])
        reference = _merge_rows(references, [row["layer"] for row in predictions])
        return agreement.RouterAgreement(chosen, reference).to_dict()


def _to_rows(choices):
    return [
        {"layer": name, "experts": experts_TK.flatten().tolist(), "top_k": experts_TK.shape[-1]}
        for name, experts_TK in choices.items()
    ]


def _merge_rows(rows, names):
    batches: dict[str, list[torch.Tensor]] = {}
    for name, row in zip(names, rows, strict=True):
        batches.setdefault(name, []).append(torch.tensor(row["experts"]).view(-1, row["top_k"]))
    return {name: torch.cat(parts) for name, parts in batches.items()}
