"""An exported file, ready to predict from images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from visionattn_runtime.errors import RunError, short
from visionattn_runtime.images import cut, eight_bits, fit_image, pad, read_image, resize_map, unit
from visionattn_runtime.metadata import read_metadata

__all__ = ["Model", "Pair", "load"]

MOST_AT_ONCE = 32  # images per pass of a file with dynamic batch size
MOST_CLASSES = 256  # of a mask of uint8
OVERLAP = 32  # pixels, if a file does not state its radius
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def load(path: str | Path, threads: int = 0) -> Model | Pair:
    """Open an exported file, or the two files of a model for attribute retrieval by their common name.

    Args:
        path: `model.onnx`, of any precision, with or without built-in preprocessing.
        threads: Number of threads; 0: ONNX Runtime's default.

    Raises:
        RunError: The file does not exist, cannot be loaded, or was not written by `visionattn export`.
    """
    path = Path(path)
    tower, head = path.with_suffix(".tower.onnx"), path.with_suffix(".head.onnx")
    if not path.exists() and tower.exists():
        return Pair(Model(tower, threads), Model(head, threads))
    return Model(path, threads)


class Model:
    """An exported file.

    Args:
        path: The file.
        threads: Number of threads; 0: ONNX Runtime's default.

    Attributes:
        spec: Metadata, as `visionattn_runtime.metadata.read_metadata` returns them.
        texts: All metadata of the file, as strings.

    Raises:
        RunError: The file does not exist, cannot be loaded, or was not written by `visionattn export`.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        path = Path(path)
        if not path.is_file():
            raise RunError(f"There is no file {short(path)}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they are raised as well
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.texts: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            reason = short(error).rstrip(".")
            raise RunError(f"ONNX Runtime {onnxruntime.__version__} cannot load {short(path)}: {reason}.") from error
        try:
            self.spec = read_metadata(self.texts)
        except RunError as error:
            raise RunError(f"{short(path)} lacks the metadata of `visionattn export`: {error}.") from error
        self._types = {value.name: value.type for value in self.session.get_inputs()}
        outputs = {value.name for value in self.session.get_outputs()}
        if set(self.spec["input_names"]) != set(self._types) or not outputs.issuperset(self.spec["output_names"]):
            names = short(", ".join([*self._types, *outputs]))
            raise RunError(f"{short(path)} has inputs or outputs that differ from its metadata: {names}.")

    @property
    def channels(self) -> int:
        """Channels of an image: 3 is RGB, 1 is grey."""
        return self.spec["input_size"][0]

    @property
    def dynamic(self) -> bool:
        """Whether the file accepts images of different sizes."""
        return "height" in self.spec["dynamic_axes"]

    @property
    def output_kind(self) -> str:
        """Kind of the first output: "logits", "probabilities", "features", "image", "disparity" or "flow"."""
        return self.spec["output_kind"] or self.spec["output_names"][0]

    @property
    def has_classes(self) -> bool:
        """Whether the file gives images probabilities of classes, of one or of several per image."""
        return self.spec["task"] in ("classify", "multilabel") and self.output_kind in ("logits", "probabilities")

    def predict(self, *images: Any) -> np.ndarray:
        """Apply the method of the file's task to one image or more.

        Returns:
            Probabilities (B, K) of a classifier; an image in 0..1; disparity; flow; otherwise the raw output, such as
            features, the numbers of a regression, or the logits of a segmentation.
        """
        task = self.spec["task"]
        if task in ("restore", "stereo", "flow"):
            count = len(self.spec["input_names"])
            if len(images) != count:
                raise RunError(f"{self.spec['model']} requires {count} image{'s' * (count > 1)}; got {len(images)}.")
            methods: dict[str, Any] = {"restore": self.enlarge, "stereo": self.stereo, "flow": self.flow}
            return methods[task](*images)
        return self.probabilities(*images) if self.has_classes else self.features(*images)

    def features(self, *images: Any) -> np.ndarray:
        """Compute the raw output of the file: (B, D) features, logits or numbers, (B, N, D) tokens, or maps."""
        self._expect("classify", "features", "retrieve", "segment", "multilabel", "regress")
        return self.compute([fit_image(read_image(image, self.channels), self.spec) for image in images])

    def probabilities(self, *images: Any) -> np.ndarray:
        """Compute the probabilities (B, K) of K classes; those of several labels do not sum to 1."""
        self._expect("classify", "multilabel")
        if not self.has_classes:
            raise RunError(f"{self.spec['model']} has no classes: use features() instead.")
        found = self.features(*images)
        if self.output_kind == "logits":
            found = np.exp(found.astype(np.float64) - found.max(axis=1, keepdims=True))
            found /= found.sum(axis=1, keepdims=True)
        return found.astype(np.float32)

    def classify(self, *images: Any, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the `top` most probable classes of each image, with their probabilities."""
        found = self.probabilities(*images)
        names = self._names(found.shape[1])
        orders = np.argsort(-found, axis=1, kind="stable")[:, :top]
        return [[(names[k], float(row[k])) for k in order] for row, order in zip(found, orders)]

    def measure(self, *images: Any) -> list[dict[str, float]]:
        """Return the numbers of a regression for each image, by the names of the targets."""
        self._expect("regress")
        found = self.features(*images)
        return [dict(zip(self._names(found.shape[1]), row)) for row in found.tolist()]

    def segment(self, image: Any) -> np.ndarray:
        """Return the class of each pixel at the image's own size: (H, W) of uint8.

        The logits of the file, at its input size, are interpolated bilinearly.
        """
        self._expect("segment")
        pixels = read_image(image, self.channels)
        logits = self.features(pixels)[0]
        if len(logits) > MOST_CLASSES:
            raise RunError(f"Masks of at most {MOST_CLASSES} classes can be made; this file has {len(logits)}.")
        height, width = pixels.shape[:2]
        highest, mask = np.full((height, width), -np.inf, np.float32), np.zeros((height, width), np.uint8)
        for label, values in enumerate(logits):  # one class at a time: the image may be large
            values = resize_map(values, height, width)
            mask[values > highest] = label
            np.maximum(values, highest, out=highest)
        return mask

    def _names(self, count: int) -> list[str]:
        """Names of the classes, or numbers if the file does not state them."""
        labels = self.spec["labels"]
        return labels if labels and len(labels) == count else list(map(str, range(count)))

    def upscale(self, image: Any, tile: int = 256) -> np.ndarray:
        """Upscale an image of any size.

        Tiles overlap by the network's receptive field, so that there are no seams.

        Args:
            image: The image.
            tile: Height and width of a tile in pixels; a file of fixed size uses its own.

        Returns:
            (r H, r W, C) of uint8.
        """
        return np.floor(self.enlarge(image, tile) * 255 + np.float32(0.5)).astype(np.uint8)

    def enlarge(self, image: Any, tile: int = 256) -> np.ndarray:
        """Compute `upscale` without rounding: float32 in 0..1."""
        self._expect("restore")
        if tile < 1:
            raise RunError(f"The tile must be at least 1 pixel; got {tile}.")
        pixels, scale = read_image(image, self.channels), self.spec["scale"] or 1
        overlap = OVERLAP if self.spec["radius"] is None else self.spec["radius"]
        window = (tile + 2 * overlap,) * 2 if self.dynamic else self.spec["input_size"][1:]
        sides = [side if self.dynamic else max(side, own) for side, own in zip(pixels.shape, window)]
        padded = pad(pixels, *sides)
        rows, columns = (cut(side, own, overlap, not self.dynamic) for side, own in zip(sides, window))
        result = np.empty((scale * sides[0], scale * sides[1], self.channels), np.float32)
        for read_rows, kept_rows in rows:
            for read_columns, kept_columns in columns:
                part = self._image(self.compute([padded[read_rows, read_columns]]))
                inside = _moved(kept_rows, read_rows, scale), _moved(kept_columns, read_columns, scale)
                result[_moved(kept_rows, slice(0, 0), scale), _moved(kept_columns, slice(0, 0), scale)] = part[inside]
        return result[: scale * pixels.shape[0], : scale * pixels.shape[1]]

    def stereo(self, left: Any, right: Any) -> np.ndarray:
        """Compute the left view's disparity (H, W) in pixels; NaN where it is unknown (not above 0)."""
        self._expect("stereo")
        found = self._match(left, right)[0]
        return np.where(found > 0, found, np.float32(np.nan))

    def flow(self, first: Any, second: Any) -> np.ndarray:
        """Compute the flow (H, W, 2) from the first image to the second: x and y in pixels."""
        self._expect("flow")
        return np.moveaxis(self._match(first, second)[:2], 0, -1)

    def _match(self, *images: Any) -> np.ndarray:
        """Result (C, H, W) for two images of equal size; too small images are padded below and on the right."""
        views = [read_image(image, self.channels) for image in images]
        (height, width), other = (view.shape[:2] for view in views)
        if (height, width) != other:
            raise RunError(
                f"The images must have the same size; got {height} x {width} and {other[0]} x {other[1]}: crop one."
            )
        multiple, least = self.spec["size_multiple"] or 1, self.spec["size_minimum"] or 1
        wanted = [-(-max(side, least) // multiple) * multiple for side in (height, width)]
        if not self.dynamic:
            wanted = self.spec["input_size"][1:]
            if height > wanted[0] or width > wanted[1]:
                raise RunError(
                    f"The images are {height} x {width}; this file accepts at most {wanted[0]} x {wanted[1]}: reduce "
                    "them, or export it without --static-size."
                )
        found = self.compute(*([pad(view, *wanted)] for view in views))[0]
        return (found if found.ndim == 3 else found[None])[:, :height, :width].astype(np.float32)

    def _image(self, output: np.ndarray) -> np.ndarray:
        """First image of a batch, as (H, W, C) of float32 in 0..1."""
        image = output[0] if self.spec["input_layout"] == "NHWC" else np.moveaxis(output[0], 0, -1)
        return np.clip(unit(image), 0, 1)

    def compute(self, *batches: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the first output for images of equal size.

        Args:
            batches: One list of images per input: (H, W, C) of uint8, uint16 or floats in 0..1.

        Returns:
            The output; half precision is converted to float32.

        Raises:
            RunError: The file does not accept the size, or the result is not finite.
        """
        if not batches[0]:
            raise RunError("No image was given.")
        count, step, found = len(batches[0]), self.spec["batch"] or MOST_AT_ONCE, []
        for start in range(0, count, step):
            parts = [list(images[start : start + step]) for images in batches]
            taken = len(parts[0])
            if self.spec["batch"]:  # the batch size is fixed
                parts = [part + part[-1:] * (step - taken) for part in parts]
            feeds = {name: self._array(part, name) for name, part in zip(self.spec["input_names"], parts)}
            found.append(self.run(feeds)[:taken])
        return np.concatenate(found)

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Compute the first output for prepared arrays (see `compute`)."""
        try:
            found = self.session.run(self.spec["output_names"][:1], feeds)[0]
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            raise RunError(f"ONNX Runtime cannot run {self.spec['model']}: {short(error).rstrip('.')}.") from error
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise RunError(f"The result of {self.spec['model']} is not finite: the file is broken.")
        return found.astype(np.float32) if found.dtype == np.float16 else found

    def _array(self, images: Sequence[np.ndarray], name: str) -> np.ndarray:
        """Images -> the batch that an input takes."""
        spec, (height, width) = self.spec, images[0].shape[:2]
        own, least = spec["input_size"][1:], spec["size_minimum"] or 1
        if not self.dynamic and [height, width] != own:
            raise RunError(f"The image is {height} x {width}; this file requires {own[0]} x {own[1]}: resize it.")
        if min(height, width) < least:
            raise RunError(f"The image is {height} x {width}; its sides must be at least {least}: enlarge it.")
        dtype = TYPES.get(self._types[name], np.float32)
        if dtype == np.uint8:
            batch = np.stack([eight_bits(image) for image in images])
        else:
            low, high = spec["input_range"]
            batch = np.stack([unit(image) for image in images]) * np.float32(high - low) + np.float32(low)
            batch = (batch - np.float32(spec["mean"] or 0)) / np.float32(spec["std"] or 1)
        return np.ascontiguousarray(batch if spec["input_layout"] == "NHWC" else np.moveaxis(batch, 3, 1), dtype)

    def _expect(self, *tasks: str) -> None:
        if self.spec["task"] not in tasks:
            raise RunError(f"{self.spec['model']} is for the task {short(self.spec['task'], 40)!r}, not {tasks[0]!r}.")


def _moved(part: slice, window: slice, scale: int) -> slice:
    """Slice of a window's result that corresponds to an interval of the image."""
    return slice(scale * (part.start - window.start), scale * (part.stop - window.start))


class Pair:
    """The two files of a model for attribute retrieval: a tower, image to tokens, and a head, tokens to embeddings.

    Attributes:
        tower: File that maps images to tokens.
        head: File that maps tokens to embeddings.
        attributes: Names of the attributes.

    Raises:
        RunError: The two files are of different models.
    """

    def __init__(self, tower: Model, head: Model) -> None:
        self.tower, self.head = tower, head
        self.spec, self.texts = tower.spec, tower.texts
        self.attributes: list[str] = list(tower.spec["attributes"] or [])
        if not tower.spec["pair"] or tower.spec["pair"] != head.spec["pair"]:
            raise RunError("Tower and head are of different models: export both again.")

    def embed(self, *images: Any, attributes: Sequence[str] | None = None) -> np.ndarray:
        """Compute one embedding of length 1 per image and attribute: (B, A, E).

        Args:
            images: The images.
            attributes: Names of attributes. Default: all.

        Raises:
            RunError: An attribute does not exist.
        """
        names = self.attributes if attributes is None else list(attributes)
        unknown = [name for name in names if name not in self.attributes]
        if unknown:
            known = ", ".join(map(repr, self.attributes))
            raise RunError(f"There is no attribute {short(unknown[0], 40)!r}; it must be one of {short(known)}.")
        ids = np.array([self.attributes.index(name) for name in names], np.int64)
        tokens = self.tower.features(*images)
        step, found = self.head.spec["batch"] or MOST_AT_ONCE, []
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            missing = (self.head.spec["batch"] or 0) - len(part)
            filled = np.concatenate([part, np.repeat(part[-1:], max(missing, 0), axis=0)])
            found.append(self.head.run({"tokens": filled, "conditions": ids})[: len(part)])
        return np.concatenate(found)

    predict = embed
