# SPDX-License-Identifier: Apache-2.0
"""
Dealing the neurons of a feed-forward out to experts of equal size, for method `split`.

`partition_neurons` is what the method calls; `balanced_kmeans` and `balanced_assignment` are the parts it is made of.
"""

import torch
import torch.nn.functional as F

from .feed_forward import FeedForward, LayerContext


NEURON_EXPERT = "neuron_expert"
SHARED = -1


def partition_neurons(dense: FeedForward, context: LayerContext) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Which neurons each expert gets.

    With `split_by="random"` they are drawn, with `"kmeans"` they are clustered by the direction of their rows of the
    gate, or of up where there is no gate. For `"activation"` and `"gradient"` the calibration pass has decided already.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: the indices of every expert's neurons and of the shared ones, ascending.
    """
    recipe, count = context.recipe, context.num_experts
    if recipe.split_by == "random":
        order = torch.randperm(dense.intermediate_size, generator=context.generator(0, "split"))
        labels = torch.empty_like(order)
        labels[order] = torch.arange(len(order)) % count
    elif recipe.split_by == "kmeans":
        rows = dense.gate_proj if dense.gate_proj is not None else dense.up_proj
        points = F.normalize(rows.detach().float().cpu(), dim=-1)
        labels, _ = balanced_kmeans(points, count, context.generator(0, "split"))
    else:
        labels = context.observations[NEURON_EXPERT]
    groups = [torch.where(labels == expert_index)[0] for expert_index in range(count)]
    return groups, torch.where(labels == SHARED)[0]


def balanced_kmeans(
    points_ND: torch.Tensor, num_clusters: int, generator: torch.Generator, num_iterations: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    K-means in which every cluster has the same number of points.

    Args:
        points_ND (`torch.Tensor` of shape `(N, D)`): `num_clusters` must divide N.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the cluster of each point `(N,)`, and the centroids `(num_clusters, D)`.
    """
    centroids_CD = kmeans_plus_plus(points_ND, num_clusters, generator)
    labels_N = torch.full((len(points_ND),), -1)
    for _ in range(num_iterations):
        previous_N, labels_N = labels_N, balanced_assignment(-torch.cdist(points_ND, centroids_CD).square())
        if torch.equal(labels_N, previous_N):
            break
        centroids_CD = torch.stack([points_ND[labels_N == cluster].mean(dim=0) for cluster in range(num_clusters)])
    return labels_N, centroids_CD


def kmeans_plus_plus(points_ND: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """First centroids: points drawn with a probability proportional to their squared distance from those drawn before."""
    first = torch.randint(len(points_ND), (1,), generator=generator).item()
    centroids = [points_ND[first]]
    distance_N = (points_ND - centroids[0]).square().sum(dim=-1)
    for _ in range(num_clusters - 1):
        # Where all points are one of those drawn before, any will do.
        weights_N = distance_N if distance_N.sum() > 0 else torch.ones_like(distance_N)
        drawn = torch.multinomial(weights_N, 1, generator=generator).item()
        centroids.append(points_ND[drawn])
        distance_N = torch.minimum(distance_N, (points_ND - centroids[-1]).square().sum(dim=-1))
    return torch.stack(centroids)


def balanced_assignment(affinity_NC: torch.Tensor) -> torch.Tensor:
    """
    Give every one of C clusters N / C points, the pairs with the largest affinity first.

    Greedy: the optimal assignment takes time cubic in N, minutes for the 14,336 neurons of a 7B model.
    """
    num_points, num_clusters = affinity_NC.shape
    room = [num_points // num_clusters] * num_clusters
    labels = [-1] * num_points
    for pair in affinity_NC.flatten().argsort(descending=True, stable=True).tolist():
        point, cluster = divmod(pair, num_clusters)
        if labels[point] == -1 and room[cluster]:
            labels[point] = cluster
            room[cluster] -= 1
    return torch.tensor(labels)
