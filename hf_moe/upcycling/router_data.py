# SPDX-License-Identifier: Apache-2.0
"""
Router initialisers that look at what the router will see: `kmeans`, `ridge`, `prompts` and `domain_embedding`.

They run while calibration text passes through the dense model (`calibration.py`), on the hidden states that go into the
feed-forward, which are what a router in its place gets.

Letters: T tokens, N sequences, H hidden size, R rows of the router, C clusters.
"""

import math

import torch
import torch.nn.functional as F

from .errors import UpcycleError
from .feed_forward import LayerContext
from .partition import kmeans_plus_plus
from .ridge import RidgeStatistics
from .router_init import Seen, router_initializer


KMEANS_STARTS = 5
KMEANS_ITERATIONS = 100


@router_initializer("kmeans", paper="https://huggingface.co/papers/2411.15708", needs="text")
def kmeans(num_rows: int, seen: Seen, context: LayerContext) -> torch.Tensor:
    """
    Spherical k-means of the router's inputs: row e points to the centroid of cluster e.

    What all tokens have in common, the direction of their mean, is taken out first: it is most of a hidden state, and
    says nothing about the token. A token's largest logit then is that of the centroid nearest in angle.
    """
    centroids_RH, _ = spherical_kmeans(_without_mean(seen.inputs_TH), num_rows, context)
    return with_logit_std(centroids_RH, seen.inputs_TH, context.recipe.router_logit_std)


@router_initializer("ridge", paper="https://huggingface.co/papers/2603.29765", needs="domains")
def ridge(num_rows: int, seen: Seen, context: LayerContext) -> torch.Tensor:
    """
    Ridge regression from the router's inputs to the domain of the text, expert e being that of domain e.

    The sums it needs are kept with the result. Give their folder as `router_statistics` to add domains later, without the
    text of the old ones.
    """
    recipe = context.recipe
    statistics = RidgeStatistics.of(seen.inputs_TH, seen.domain_T, seen.num_domains)
    if recipe.router_statistics is not None:
        earlier = RidgeStatistics.load(recipe.router_statistics, context.layer_index, seen.inputs_TH.shape[1])
        statistics = earlier.with_domains_of(statistics)
    if len(statistics.sums) != num_rows:
        raise UpcycleError(
            f"router_init='ridge' needs one domain per row of the router ({num_rows}), but there are {len(statistics.sums)}: "
            "`calibration_text` has one file per domain, behind those that `router_statistics` knows."
        )
    if seen.folder is not None:
        statistics.save(seen.folder, context.layer_index)
    rows_RH = statistics.solve(recipe.ridge_penalty).float()
    return with_logit_std(rows_RH, seen.inputs_TH, recipe.router_logit_std)


@router_initializer("prompts", needs="prompts")
def prompts(num_rows: int, seen: Seen, context: LayerContext) -> torch.Tensor:
    """
    Row e points from the mean router input of expert e's negative prompts to that of its positive ones.

    Every prompt is the mean over its tokens. An expert without negative prompts points away from the mean of all prompts.
    """
    prompt_PH = sequence_means(seen)
    everything_H = prompt_PH.mean(dim=0)

    def mean_of(expert_index: int, is_negative: bool) -> torch.Tensor:
        chosen_T = (seen.domain_T == expert_index) & (seen.is_negative_T == is_negative)
        chosen = seen.sequence_T[chosen_T].unique()
        return prompt_PH[chosen].mean(dim=0) if len(chosen) else everything_H

    rows_RH = torch.stack([mean_of(e, False) - mean_of(e, True) for e in range(num_rows)])
    return with_logit_std(F.normalize(rows_RH, dim=-1), seen.inputs_TH, context.recipe.router_logit_std)


@router_initializer(
    "domain_embedding", needs="domains", of_layer=False, paper="https://huggingface.co/papers/2507.07024"
)
def domain_embedding(num_rows: int, seen: Seen, context: LayerContext) -> torch.Tensor:
    """
    Row e is the embedding of domain e's text, the mean of the model's last hidden states, less the mean of the domains.

    The rows are the same in all layers but for their length, which follows each layer's inputs.
    """
    document_NH = sequence_means(seen)
    domain_N = torch.zeros(len(document_NH), dtype=torch.long).index_copy(0, seen.sequence_T, seen.domain_T)
    domain_RH = torch.stack([document_NH[domain_N == domain].mean(dim=0) for domain in range(num_rows)])
    return F.normalize(domain_RH - domain_RH.mean(dim=0), dim=-1)


def spherical_kmeans(
    points_TH: torch.Tensor, num_clusters: int, context: LayerContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    K-means by angle, the best of several starts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: centroids `(num_clusters, H)` of length 1, and the cluster of each point `(T,)`.
    """
    directions_TH = F.normalize(points_TH, dim=-1)
    best_similarity, best = -math.inf, (directions_TH[:num_clusters], torch.zeros(len(points_TH), dtype=torch.long))
    for start in range(KMEANS_STARTS):
        centroids_CH = kmeans_plus_plus(directions_TH, num_clusters, context.generator(start, "kmeans"))
        for _ in range(KMEANS_ITERATIONS):
            similarity_T, cluster_T = (directions_TH @ centroids_CH.T).max(dim=-1)
            sums_CH = torch.zeros_like(centroids_CH).index_add(0, cluster_T, directions_TH)
            # A cluster that lost all its points keeps its centroid.
            moved_CH = torch.where(sums_CH.any(dim=-1, keepdim=True), F.normalize(sums_CH, dim=-1), centroids_CH)
            if torch.equal(moved_CH, centroids_CH):
                break
            centroids_CH = moved_CH
        if similarity_T.sum().item() > best_similarity:
            best_similarity, best = similarity_T.sum().item(), (centroids_CH, cluster_T)
    return best


def cluster_sequences(seen: Seen, context: LayerContext) -> torch.Tensor:
    """A cluster for every sequence `(N,)`, as many as the layer has experts, by the mean of its hidden states."""
    means_NH = sequence_means(seen)
    if len(means_NH) < context.num_experts:
        raise UpcycleError(
            f"The calibration text makes {len(means_NH)} sequences, too few to form {context.num_experts} clusters. Give more "
            f"text, raise `calibration_tokens` ({context.recipe.calibration_tokens}), or give one file per expert."
        )
    return spherical_kmeans(means_NH - means_NH.mean(dim=0), context.num_experts, context)[1]


def sequence_means(seen: Seen) -> torch.Tensor:
    """The mean hidden state of every sequence, `(N, H)`."""
    count = int(seen.sequence_T.max()) + 1
    sums_NH = torch.zeros(count, seen.inputs_TH.shape[1]).index_add(0, seen.sequence_T, seen.inputs_TH)
    return sums_NH / seen.sequence_T.bincount(minlength=count)[:, None]


def with_logit_std(rows_RH: torch.Tensor, inputs_TH: torch.Tensor, std: float) -> torch.Tensor:
    """Scale the rows so that a token's logits have this standard deviation over the rows, in the mean square over tokens."""
    logits_TR = inputs_TH @ rows_RH.T
    spread = (logits_TR - logits_TR.mean(dim=-1, keepdim=True)).square().mean().sqrt().item()
    if not math.isfinite(spread):
        raise UpcycleError(
            "The hidden states of the calibration text or prompts hold values that are not finite, so no router can be made of "
            "them. Does the dense model overflow in its data type?"
        )
    if not spread:
        raise UpcycleError(
            "All rows of the router would be equal: the calibration text or prompts do not tell the experts apart. Give each "
            "expert text of its own, or use router_init='normal'."
        )
    return rows_RH * (std / spread)


def _without_mean(inputs_TH: torch.Tensor) -> torch.Tensor:
    mean_H = F.normalize(inputs_TH.mean(dim=0), dim=0)
    return inputs_TH - (inputs_TH @ mean_H)[:, None] * mean_H
