"""Trans-Encoder for images against its controls: re-ranking by a pair encoder, and the embedding that it teaches.

    python -m benchmarks.retrieval.rerank --data FOLDER --weights FILE

FOLDER holds attributes.csv and images.zip of fashion products, FILE the weights of EfficientNet-Lite0. A small trial
for two CPU cores: the backbone is frozen, its last maps (320 x 4 x 4 at 128 pixels: 16 patches) are computed once and
kept in --cache, and the network that embeds is a linear map of their mean. Two starts:

    pretrained   the mean of the map itself; nobody trained it on these data
    trained      128 numbers, 5 epochs of triplets (semi-hard, margin 0.2) on the three judged attributes in one space

From each `RerankTask` runs 3 cycles on --images training images, without their labels, each paired with --partners
nearest ones and as many at random. Then the queries of the test part rank its gallery:

    none           by cosine
    late           the 50 nearest by late interaction of patches, as they are; nothing is trained
    late, std      the same on channels standardised over the training images
    k-reciprocal   the 50 nearest by arXiv 1701.08398 (k1 20, k2 6, lambda 0.3)
    pair encoder   the 50 nearest by the pair encoder of each cycle
    distilled      all by cosine of the embedding of each cycle, no re-ranking
    more epochs    of `trained`: all by cosine after as many further steps of triplets as the three cycles distil

Seeds change the images trained on, the start, the pairs and the pair encoder. `map` is the mean over subCategory,
articleType and baseColour in percent, of the whole ranking; `precision_at_10` the share of the ten first that have the
query's value. Rows go to results/rerank.csv.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.report import RESULTS, environment, write_rows
from benchmarks.retrieval.retrieval_heads import normalise, read_images, train
from visionattn.blocks.rerank import late_interaction
from visionattn.data.retrieval.catalogue import MISSING, Part
from visionattn.data.retrieval.catalogue_files import read_catalogue
from visionattn.data.retrieval.embedding import input_config
from visionattn.data.retrieval.pairs import choose_pairs
from visionattn.data.retrieval.patches import read_patches
from visionattn.files import atomic_path
from visionattn.metrics.ranking import rank
from visionattn.search.reranking import RERANKED
from visionattn.train.rerank import RerankTask

JUDGED = ("subCategory", "articleType", "baseColour")
CHANNELS, SIDE, EMBED_DIM = 320, 4, 128
CYCLES, FIRST_EPOCHS, PAIRS_PER_BATCH = 3, 5, 64
KEY = ("start", "method", "cycle", "seed", "images", "partners", "width", "depth")


class MapEmbedding(nn.Module):
    """Maps (B, 320, 4, 4), in place of images -> embeddings (B, E): a linear map of the mean patch."""

    num_classes = 0

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(CHANNELS, embed_dim, bias=False)
        if embed_dim == CHANNELS:
            nn.init.eye_(self.projection.weight)
        self.pretrained_cfg = {
            "architecture": "benchmark_map_embedding",
            "input_size": (CHANNELS, SIDE, SIDE),
            "mean": (0.0,) * CHANNELS,
            "std": (1.0,) * CHANNELS,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    def forward(self, maps: Tensor) -> Tensor:
        return self.projection(maps.mean(dim=(2, 3)))

    def forward_intermediates(self, maps: Tensor, **_: Any) -> list[Tensor]:
        return [maps]


@register_model
def benchmark_map_embedding(pretrained=False, embed_dim=EMBED_DIM, num_classes=0, **_):
    """The model, by its name in timm's registry."""
    return MapEmbedding(embed_dim)


class MapData(LightningDataModule):
    """Pairs of maps that are held in memory, as `PairData` gives them of images."""

    def __init__(self, maps: Tensor, partners: int, seed: int) -> None:
        super().__init__()
        self.maps, self.partners, self.seed = maps, partners, seed
        self.pairs = torch.zeros(2 * partners * len(maps), 2, dtype=torch.int64)

    def choose(self, embeddings: Tensor) -> None:
        self.pairs.copy_(choose_pairs(embeddings, self.partners, self.partners, self.seed))

    def train_images(self) -> list[tuple[Tensor, None, None]]:
        return [(maps.float(), None, None) for maps in self.maps.split(512)]

    def train_dataloader(self) -> DataLoader:
        def collate(numbers: list[int]) -> tuple[Tensor, Tensor]:
            chosen = torch.tensor(numbers)
            return self.maps[self.pairs[chosen].flatten()].float(), chosen

        numbers: Any = range(len(self.pairs))
        return DataLoader(numbers, PAIRS_PER_BATCH, shuffle=True, collate_fn=collate)


class EachCycle(Callback):
    """Keeps pair encoder and embedding as each cycle leaves them."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, Any]] = []

    def on_train_epoch_end(self, trainer: Trainer, task: Any) -> None:
        if not task.trains_pairs:
            self.kept.append((copy.deepcopy(task.pair_encoder).eval(), copy.deepcopy(task.net).eval()))


@torch.no_grad()
def cached_maps(args: argparse.Namespace, parts: dict[str, Part], catalogue: Any) -> dict[str, Tensor]:
    """Last maps float16 (N, 320, 4, 4) of each part, from the cache or computed now."""
    path = args.cache / f"maps-{args.weights.stem}-128.pt"
    if not path.exists():
        state = {key: value.float() for key, value in timm.models.load_state_dict(str(args.weights)).items()}
        model = timm.create_model("tf_efficientnet_lite0").eval()
        model.load_state_dict(state, strict=False)
        config, found = input_config(model), {}
        for name, images in read_images(SimpleNamespace(pixels=128), catalogue, parts).items():
            batches = (read_patches(model, normalise(batch, config)) for batch in images.split(64))
            found[name] = torch.cat([p.transpose(1, 2).unflatten(2, (SIDE, SIDE)).half() for p in batches])
        with atomic_path(path) as temporary:
            torch.save(found, temporary)
    return torch.load(path, weights_only=True)


def k_reciprocal(vectors: Tensor, k1: int = 20, k2: int = 6, share: float = 0.3) -> Callable[[Tensor, Tensor], Tensor]:
    """Distances of pairs of unit vectors (N, E): of Jaccard between sets of mutual neighbours, and the cosine's."""
    distances = (1 - vectors @ vectors.T).clamp(min=0)
    distances = (distances / distances.amax(dim=0)).T.contiguous()
    order = distances.argsort(dim=1, stable=True)
    count = len(vectors)

    def mutual(k: int) -> Tensor:
        near = torch.zeros(count, count, dtype=torch.bool).scatter_(1, order[:, : k + 1], True)
        return near & near.T

    sets, halves = mutual(k1), mutual(round(k1 / 2)).float()
    common = sets.float() @ halves.T  # how many of j's half set are in i's set
    joined = sets & (common > 2 / 3 * halves.sum(dim=1))
    sets = sets | ((joined.float() @ halves) > 0)
    features = torch.where(sets, (-distances).exp(), 0.0)
    features = features / features.sum(dim=1, keepdim=True)
    features = features[order[:, :k2]].mean(dim=1)

    def compare(first: Tensor, second: Tensor) -> Tensor:
        least = torch.minimum(features[first], features[second]).sum(dim=1)
        return (1 - share) * (1 - least / (2 - least)) + share * distances[first, second]

    return compare


class Judge:
    """Scores rankings of the test part's gallery by its queries."""

    def __init__(self, part: Part, maps: Tensor) -> None:
        self.part, self.maps = part, maps.float()
        self.patches = self.maps.flatten(2).transpose(1, 2)
        self.queries, self.gallery = (where.nonzero().squeeze(1) for where in (part.is_query, part.is_gallery))

    @torch.no_grad()
    def embed(self, net: nn.Module) -> Tensor:
        return F.normalize(net(self.maps), dim=1)

    @torch.no_grad()
    def reranked(self, vectors: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Cosines (Q, G), above them the 50 nearest in the order of `compare` (places, places) -> (P,)."""
        cosines = vectors[self.queries] @ vectors[self.gallery].T
        nearest = cosines.topk(RERANKED, dim=1).indices
        rows = []
        for query, found in zip(self.queries, nearest):
            rows.append(compare(query.expand(RERANKED), self.gallery[found]))
        places = torch.stack(rows).argsort(dim=1, stable=True).argsort(dim=1)
        return cosines.scatter(1, nearest, 2.0 + places.float())

    def score(self, scores: Tensor) -> dict[str, str]:
        """Percent mAP of each judged attribute and in the mean, and precision at 10 in the mean."""
        everything, found, precisions = torch.eye(len(self.gallery)), {}, []
        for column, name in enumerate(JUDGED):
            labels, offered = self.part.labels[self.queries, column], self.part.labels[self.gallery, column]
            found[name] = 100 * rank(scores, everything, labels, offered).average_precision.mean().item()
            first = scores[labels != MISSING].masked_fill(offered == MISSING, -torch.inf).topk(10, dim=1).indices
            precisions.append(100 * (offered[first] == labels[labels != MISSING, None]).double().mean().item())
        found["map"] = sum(found[name] for name in JUDGED) / len(JUDGED)
        found["precision_at_10"] = sum(precisions) / len(precisions)
        return {name: f"{value:.2f}" for name, value in found.items()}


def first_embedding(start: str, maps: Tensor, labels: Tensor, values: list[int], seed: int, epochs: int) -> Any:
    """The embedding that cycles begin with, or one trained for longer."""
    torch.manual_seed(seed)
    net = MapEmbedding(CHANNELS if start == "pretrained" else EMBED_DIM)
    if start == "trained":

        def embed(places: Tensor) -> Tensor:
            return F.normalize(net(maps[places].float()), dim=1)[:, None].expand(-1, len(values), -1)

        train([{"params": list(net.parameters()), "lr": 1e-3}], embed, labels, values, seed, epochs)
    return net.eval()


def cycles(args: argparse.Namespace, net: Any, maps: Tensor, seed: int) -> list[tuple[Any, Any]]:
    """Pair encoder and embedding after each cycle of `RerankTask`."""
    kept, data = EachCycle(), MapData(maps, args.partners, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.pth"
        torch.save(net.state_dict(), path)
        seed_everything(seed, verbose=False)
        task = RerankTask(
            "benchmark_map_embedding",
            {"embed_dim": len(net.projection.weight), "checkpoint_path": str(path)},
            {name: [] for name in JUDGED},
            width=args.width,
            depth=args.depth,
            lr=args.lr,
        )
        settings: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        Trainer(accelerator="cpu", max_epochs=2 * CYCLES, callbacks=[kept], **settings).fit(task, datamodule=data)
    return kept.kept


def rankings(
    args: argparse.Namespace, judge: Judge, start: str, seed: int, maps: Tensor, more: Any
) -> dict[Any, Tensor]:
    """Method and cycle -> scores (Q, G)."""
    net = more(start, FIRST_EPOCHS)
    vectors, patches = judge.embed(net), judge.patches
    flat = maps.float().flatten(2).transpose(1, 2).flatten(0, 1)
    standard = (patches - flat.mean(0)) / flat.std(0)
    distances = k_reciprocal(vectors)

    def late(of: Tensor) -> Tensor:
        return judge.reranked(
            vectors, lambda a, b: (late_interaction(of[a], of[b]) + late_interaction(of[b], of[a])) / 2
        )

    found = {
        ("none", 0): judge.reranked(vectors, lambda a, b: (vectors[a] * vectors[b]).sum(dim=1)),
        ("late", 0): late(patches),
        ("late, std", 0): late(standard),
        ("k-reciprocal", 0): judge.reranked(vectors, lambda a, b: -distances(a, b)),
    }
    for cycle, (encoder, embedding) in enumerate(cycles(args, net, maps, seed), start=1):
        found["pair encoder", cycle] = judge.reranked(
            vectors, lambda a, b, encoder=encoder: encoder.compare(patches[a], patches[b])
        )
        own = judge.embed(embedding)
        found["distilled", cycle] = own[judge.queries] @ own[judge.gallery].T
    if start == "trained":
        steps = CYCLES * 2 * args.partners * len(maps) // PAIRS_PER_BATCH
        own = judge.embed(more(start, FIRST_EPOCHS + round(steps / (len(maps) / 48))))
        found["more epochs", 0] = own[judge.queries] @ own[judge.gallery].T
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of EfficientNet-Lite0")
    parser.add_argument("--starts", nargs="+", choices=("pretrained", "trained"), default=["pretrained", "trained"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=800, help="training images")
    parser.add_argument("--partners", type=int, default=6, help="nearest and random images each, per image")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the linear map")
    parser.add_argument("--cache", type=Path, default=Path("runs/rerank"))
    parser.add_argument("--output", type=Path, default=RESULTS / "rerank.csv")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    catalogue = read_catalogue("table", args.data / "attributes.csv", attributes=JUDGED, min_count=40)
    parts = {name: catalogue.part(name) for name in ("train", "test")}
    values = [len(found) for found in catalogue.values.values()]
    maps = cached_maps(args, parts, catalogue)
    judge = Judge(parts["test"], maps["test"])
    for seed in args.seeds:
        places = torch.randperm(len(maps["train"]), generator=torch.Generator().manual_seed(seed))[: args.images]
        own, labels = maps["train"][places], parts["train"].labels[places]

        def more(start: str, epochs: int, own=own, labels=labels, seed=seed) -> Any:
            return first_embedding(start, own, labels, values, seed, epochs)

        for start in args.starts:
            begun = time.perf_counter()
            found = rankings(args, judge, start, seed, own, more)
            seconds = f"{time.perf_counter() - begun:.0f}"
            for (method, cycle), scores in found.items():
                case = (start, method, cycle, seed, args.images, args.partners, args.width, args.depth)
                row = {**dict(zip(KEY, case)), **judge.score(scores), "run_seconds": seconds, **environment("cpu")}
                write_rows(args.output, [row], key=KEY)
                print(f"{start}, {method} {cycle}, seed {seed}: {row['map']} {row['precision_at_10']}", flush=True)


if __name__ == "__main__":
    main()
