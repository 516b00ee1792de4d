# SPDX-License-Identifier: Apache-2.0
"""`evaluate` metric: how much the experts of a mixture of experts tell about the domain of a text."""

import datasets
import evaluate

# Modules, not classes: `evaluate` takes the first metric class that it finds in here. It runs a copy of this file, so the
# imports are absolute.
import hf_moe.metrics.routing_rows as routing_rows
import hf_moe.training.specialization as specialization


_DESCRIPTION = """
The mutual information of a slot's expert and the domain of its text, for each sparse layer, after Mod-Squad (Chen et al.,
2022). Divided by the entropy of the domains it is the `specialization`: 0 if experts and domains are independent, 1 if
every expert serves a single domain.

The estimate is too large where counts are small: if the experts tell nothing, it still is (E - 1)(D - 1) / 2N nats on
average, with E experts, D domains and N independent slots (Miller, 1955). That value is given as `bias`; the slots of
running text are not independent, so the true one is rather more.
"""

_CITATION = """\
@inproceedings{chen2023modsquad,
    title={Mod-Squad: Designing Mixtures of Experts As Modular Multi-Task Learners},
    author={Zitian Chen and Yikang Shen and Mingyu Ding and Zhenfang Chen and Hengshuang Zhao and Erik Learned-Miller and Chuang Gan},
    booktitle={Conference on Computer Vision and Pattern Recognition},
    year={2023},
    url={https://arxiv.org/abs/2212.08066}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`dict` from domains to `RoutingStatistics`, or a list of them): What `RoutingRecorder.statistics()` gives for
        the text of each domain, or its `to_dict()`.
    references (`list[str]`, *optional*): The domains, where `predictions` is a list. Counts of one domain are added.
    weighting (`str`, *optional*, defaults to `"equal"`): `"equal"` weighs all domains alike, `"tokens"` each by the slots of
        its tokens.

Returns:
    specialization (`float`): From 0 to 1, mean over layers.
    mutual_information (`float`), bias (`float`): In nats, means over layers.
    layers (`dict`): The same by the name of the layer's router.
    top_experts (`dict`): By the domain, the three experts that stand out most, with the share of the domain's slots that
        they serve and the mean of that in the other domains.

Example:

    >>> import evaluate, hf_moe
    >>> expert_specialization = evaluate.load(hf_moe.metric_path("expert_specialization"))
    >>> for domain, batches in domains.items():
    ...     with hf_moe.RoutingRecorder(model) as recorder:
    ...         for batch in batches:
    ...             model(**batch)
    ...     expert_specialization.add(prediction=recorder.statistics(), reference=domain)
    >>> expert_specialization.compute()["specialization"]
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpertSpecialization(routing_rows.RoutingMetric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": routing_rows.ROUTING, "references": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/papers/2212.08066"],
        )

    def _compute(self, predictions, references, weighting="equal"):
        rows: dict[str, list] = {}
        for domain, row in zip(references, predictions, strict=True):
            rows.setdefault(domain, []).append(row)
        statistics = {domain: routing_rows.merge_rows(rows[domain]) for domain in rows}
        return specialization.ExpertSpecialization(statistics, weighting).to_dict()
