"""Features that lie in memory."""

import torch

from visionattn.probe.tokens.interface import Features, Layer, Tokens


class ArrayFeatures(Features):
    """Patches (n, N, D), and class tokens (n, D), of each layer; `broken` is raised after so many batches."""

    def __init__(self, patches, labels, classes, class_tokens=None, stop_after=None):
        self.patches, self.class_tokens, self.labels = patches, class_tokens, labels
        self.classes = tuple(f"class {number}" for number in range(classes))
        self.layers = tuple(
            Layer(f"layer {number}", layer.shape[2], (1, layer.shape[1]), has_class=class_tokens is not None)
            for number, layer in enumerate(patches)
        )
        self.stop_after, self.read = stop_after, []

    def batches(self, rows, batch_size):
        for part in rows.split(batch_size):
            if self.stop_after is not None and len(self.read) >= self.stop_after:
                raise KeyboardInterrupt
            self.read.append(part)
            yield (
                part,
                [
                    Tokens(layer[part], None if self.class_tokens is None else self.class_tokens[number][part])
                    for number, layer in enumerate(self.patches)
                ],
            )


def clustered(count, classes=3, tokens=6, dim=16, layers=1, seed=0, noise=1.0, dtype=torch.float32, **options):
    """Images whose tokens lie around their class's point."""
    generator = torch.Generator().manual_seed(99)
    points = torch.randn(classes, 1, dim, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    labels = torch.arange(count) % classes
    patches = [
        (points[labels] + noise * torch.randn(count, tokens, dim, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(layers)
    ]
    class_tokens = [layer.mean(1) + 0.1 * layer[:, 0] for layer in patches]
    return ArrayFeatures(patches, labels, classes, class_tokens, **options)
