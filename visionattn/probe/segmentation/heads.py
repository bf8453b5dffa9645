r"""Heads that compute a logit per class for each patch token; between tokens, logits are interpolated bilinearly.

With the tokens x_n (D,) of an image, batch-normalised without scale and shift, and the classes k = 1 .. K:

    linear      l_nk = w_k . x_n + b_k
    attentive   l_nk = (w_k + V z_k) . x_n + b_k,    z_k = sum over n of softmax_n(q_k . x_n / sqrt(D)) x_n

The linear head is DINOv2's: a batch norm and a 1 x 1 convolution. In the attentive head, one query per class attends to
the image, as in efficient probing. Its result is added to the embedding of the class, whose dot products with the
tokens are the logits, as in MaskFormer. V (D, D) is initialised with 0, which makes the head equal to the linear one.

Sources: DINOv2, arXiv 2304.07193; Efficient Probing, arXiv 2506.10178; MaskFormer, arXiv 2107.06278.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UnknownNameError

__all__ = [
    "SEGMENTERS",
    "AttentiveSegmenter",
    "LinearSegmenter",
    "create_segmenter",
    "interpolate",
    "predict_masks",
]


class LinearSegmenter(nn.Module):
    """Batch norm and a linear classifier of each token (see the module).

    Args:
        dim: Width D of the tokens.
        num_classes: Classes K.

    Attributes:
        tokens: Kind of the tokens that it reads, as of the heads of classification.

    Shape:
        (B, N, D) -> (B, N, K).
    """

    tokens = "patches"

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K)."""
        return self.classifier(self._normalized(tokens))

    def _normalized(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.flatten(0, 1)).view_as(tokens)


class AttentiveSegmenter(LinearSegmenter):
    """Class embeddings that attend to the image first (see the module).

    Args:
        dim: Width D of the tokens.
        num_classes: Classes K.

    Shape:
        (B, N, D) -> (B, N, K).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        self.queries = nn.Parameter(torch.empty(num_classes, dim))
        self.value = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.queries, std=0.02)
        nn.init.zeros_(self.value.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K)."""
        x = self._normalized(tokens)
        found, _ = torch.ops.visionattn.multi_query_pool(x, self.queries, None)  # (B, K, D)
        embeddings = self.classifier.weight + self.value(found)  # (B, K, D)
        return torch.baddbmm(self.classifier.bias, x, embeddings.transpose(1, 2))


SEGMENTERS: dict[str, type[LinearSegmenter]] = {"linear": LinearSegmenter, "attentive": AttentiveSegmenter}


def create_segmenter(name: str, dim: int, num_classes: int, seed: int = 0) -> LinearSegmenter:
    """Create a head with the initial weights of a seed.

    Raises:
        UnknownNameError: The head does not exist.
    """
    if name not in SEGMENTERS:
        raise UnknownNameError(f"A segmentation head must be one of {', '.join(map(repr, SEGMENTERS))}; got {name!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SEGMENTERS[name](dim, num_classes)


def interpolate(logits: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits of pixels from those of tokens: (B, N, K), row by row of the grid -> (B, K, H, W)."""
    maps = logits.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def predict_masks(
    head: LinearSegmenter, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int], numbers: int = 2**26
) -> Tensor:
    """Classes of the pixels of one image.

    Args:
        head: A head in evaluation mode.
        tokens: Tokens of the image, (1, N, D).
        grid: Height and width of the grid of patches.
        size: H and W of the mask.
        numbers: Maximum number of logits in memory, a bound for large masks with many classes.

    Returns:
        int64 (H, W).
    """
    weight = head.classifier.weight
    logits = head(tokens.to(weight.device, weight.dtype))
    step = max(1, numbers // (size[0] * size[1]))
    highest, found = interpolate(logits[:, :, :step], grid, size)[0].max(0)
    for first in range(step, logits.shape[2], step):
        values, classes = interpolate(logits[:, :, first : first + step], grid, size)[0].max(0)
        found = torch.where(values > highest, classes + first, found)
        highest = torch.maximum(values, highest)
    return found
