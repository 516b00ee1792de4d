# SPDX-License-Identifier: Apache-2.0
"""
Dealing the neurons of a feed-forward out to experts of equal size, for method `split`.

`partition_neurons` is what the method calls; `co_activation_partition` and `importance_partition` decide on what a
calibration pass has seen; `balanced_kmeans` and `balanced_assignment` are the parts they are made of.

Letters: T tokens, N sequences, I neurons, E experts, C clusters.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .feed_forward import FeedForward, LayerContext


NEURON_EXPERT = "neuron_expert"
SHARED = -1
TOKENS_AT_ONCE = 1024


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


def co_activation_partition(
    dense: FeedForward,
    inputs_TH: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    context: LayerContext,
    active_share: float = 0.1,
) -> torch.Tensor:
    """
    Deal neurons out by the tokens that they answer to (CMoE, https://huggingface.co/papers/2502.04416).

    Each token marks the `active_share` of the neurons that answer it most, measured on inputs and rows of length 1 and
    without biases, which have no length to be measured by. The `num_shared_neurons` that are marked most often are shared;
    the others go to the expert whose first neuron, one of the most often marked, is marked by the most similar set of
    tokens.

    Returns:
        `torch.Tensor` of shape `(I,)`: the expert of each neuron, `SHARED` for the shared ones.
    """
    dense = dense.map(lambda name, tensor: tensor.float())
    unit = FeedForward(
        None if dense.gate_proj is None else F.normalize(dense.gate_proj, dim=-1),
        F.normalize(dense.up_proj, dim=-1),
        dense.down_proj,
    )
    size = dense.intermediate_size
    marked_TI = torch.zeros(len(inputs_TH), size, dtype=torch.bool)
    for start in range(0, len(inputs_TH), TOKENS_AT_ONCE):
        neurons, _ = unit.forward(F.normalize(inputs_TH[start : start + TOKENS_AT_ONCE], dim=-1), activation)
        best = neurons.abs().topk(max(round(active_share * size), 1), dim=-1).indices
        marked_TI[start : start + TOKENS_AT_ONCE].scatter_(1, best, True)
    count_I = marked_TI.sum(dim=0)
    labels_I = torch.full((size,), SHARED)
    by_count = count_I.argsort(descending=True, stable=True)
    routed = by_count[context.recipe.num_shared_neurons :].sort().values
    seeds = by_count[context.recipe.num_shared_neurons :][: context.num_experts]
    common_IC = torch.zeros(size, context.num_experts)
    for start in range(0, len(inputs_TH), TOKENS_AT_ONCE):
        marked = marked_TI[start : start + TOKENS_AT_ONCE].float()
        common_IC += marked.T @ marked[:, seeds]
    # The number of tokens that mark one of the two and not the other.
    distance_IC = count_I[:, None] + count_I[seeds][None] - 2 * common_IC
    labels_I[routed] = balanced_assignment(-distance_IC[routed])
    return labels_I


def importance_partition(importance_NI: torch.Tensor, domain_N: torch.Tensor, context: LayerContext) -> torch.Tensor:
    """
    Deal neurons out by the text for which they matter (LLaMA-MoE, https://huggingface.co/papers/2406.16554).

    Expert e gets the neurons that matter most for domain e, as far as another one does not need them more; the
    `num_shared_neurons` that matter most for all domains together are shared.

    Args:
        importance_NI (`torch.Tensor` of shape `(N, I)`): Importance of each neuron for each of N sequences.
        domain_N (`torch.Tensor` of shape `(N,)`): The domain of each sequence, one of as many as there are experts.

    Returns:
        `torch.Tensor` of shape `(I,)`: the expert of each neuron, `SHARED` for the shared ones.
    """
    by_domain_EI = torch.zeros(context.num_experts, importance_NI.shape[1]).index_add(0, domain_N, importance_NI)
    share_IE = F.normalize(by_domain_EI, p=1, dim=1).T
    order = share_IE.sum(dim=1).argsort(descending=True, stable=True)
    routed = order[context.recipe.num_shared_neurons :].sort().values
    labels_I = torch.full((len(share_IE),), SHARED)
    labels_I[routed] = balanced_assignment(share_IE[routed])
    return labels_I


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
