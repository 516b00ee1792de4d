# SPDX-License-Identifier: Apache-2.0
"""`evaluate` metric: how evenly the experts of a mixture of experts are used."""

import datasets
import evaluate

# Modules, not classes: `evaluate` takes the first metric class that it finds in here. It runs a copy of this file, so the
# imports are absolute.
import hf_moe.metrics.routing_rows as routing_rows


# Those of `RoutingStatistics.summary()` that are about what the routers want: the rows do not say what was served.
FIGURES = ("entropy", "max_violation", "coefficient_of_variation", "dead_fraction")

_DESCRIPTION = """
How evenly the experts of each sparse layer are used, from counts of the slots that the router gave them:

- `coefficient_of_variation`: standard deviation of the counts divided by their mean, 0 if balanced (its square is the load
  term of Shazeer et al., 2017);
- `max_violation`: how far the busiest expert is above the mean, divided by the mean, 0 if balanced (Wang et al., 2024);
- `entropy` of the load divided by its maximum, 1 if balanced;
- `dead_fraction`: share of experts that got no token.
"""

_CITATION = """\
@inproceedings{shazeer2017outrageously,
    title={Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer},
    author={Noam Shazeer and Azalia Mirhoseini and Krzysztof Maziarz and Andy Davis and Quoc Le and Geoffrey Hinton and Jeff Dean},
    booktitle={International Conference on Learning Representations},
    year={2017},
    url={https://arxiv.org/abs/1701.06538}
}
@article{wang2024auxiliary,
    title={Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts},
    author={Lean Wang and Huazuo Gao and Chenggang Zhao and Xu Sun and Damai Dai},
    journal={arXiv preprint arXiv:2408.15664},
    year={2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`RoutingStatistics`, its `to_dict()`, a list or a dictionary of them): What `RoutingRecorder.statistics()`
        gives. The counts of several are added.

Returns:
    coefficient_of_variation (`float`), max_violation (`float`), entropy (`float`): Means over layers.
    dead_fraction (`float`): Over all experts of all layers.
    layers (`dict`): The same by the name of the layer's router.

Example:

    >>> import evaluate, hf_moe
    >>> expert_load = evaluate.load(hf_moe.metric_path("expert_load"))
    >>> with hf_moe.RoutingRecorder(model) as recorder:
    ...     model(**batch)
    >>> expert_load.compute(predictions=recorder.statistics())["max_violation"]
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpertLoad(routing_rows.RoutingMetric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": routing_rows.ROUTING}),
            reference_urls=["https://huggingface.co/papers/1701.06538", "https://huggingface.co/papers/2408.15664"],
        )

    def _compute(self, predictions):
        statistics = routing_rows.merge_rows(predictions)
        layers = {
            name: {
                "coefficient_of_variation": layer.coefficient_of_variation,
                "max_violation": layer.max_violation,
                "entropy": layer.entropy,
                "dead_fraction": len(layer.dead_experts) / len(layer.counts),
            }
            for name, layer in statistics.layers.items()
        }
        summary = statistics.summary()
        return {**{name: summary[name] for name in FIGURES}, "layers": layers}
