"""Images with attributes, and triplets and pairs of images, for retrieval."""

from visionattn.lazy import lazily

__all__ = ["EmbeddingData", "PairData", "PartImages", "RetrieveData", "TripletData", "TripletImages"]

__getattr__ = lazily(
    __name__,
    {
        "EmbeddingData": "visionattn.data.retrieval.datamodule",
        "PairData": "visionattn.data.retrieval.pairs",
        "PartImages": "visionattn.data.retrieval.datamodule",
        "RetrieveData": "visionattn.data.retrieval.datamodule",
        "TripletData": "visionattn.data.retrieval.triplets",
        "TripletImages": "visionattn.data.retrieval.triplets",
    },
)
