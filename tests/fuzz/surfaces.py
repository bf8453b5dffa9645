"""What the fuzzer feeds: kinds of outside input, good examples of each, and the call that reads a damaged one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import timm
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.frozen.toys import images, vit
from tests.fuzz.examples import pixels, write_images, write_photos
from tests.fuzz.mutate import WORDS, damaged_bytes, damaged_file, damaged_folder, damaged_text, damaged_value
from tests.predict.calibrations import KITTI, MIDDLEBURY, OPENCV
from visionattn import load
from visionattn.cli import main
from visionattn.data.labels import read_labels
from visionattn.data.matching.disparity import read_disparity, read_flow, write_disparity, write_flow
from visionattn.data.segment.layouts import read_segmentation
from visionattn.data.segment.masks import check_labels, read_mask
from visionattn.errors import InputError
from visionattn.export import OnnxModel
from visionattn.export.inspect.structure import read_structure
from visionattn.export.inspect.targets import find_targets
from visionattn.export.spec import ExportSpec
from visionattn.frozen import make_plan, using
from visionattn.predict.calibration import read_calibration
from visionattn.train.cli import find_recipe
from visionattn_runtime import Model as OnnxRunner
from visionattn_runtime import RunError, verify

SR, STEREO, VIT = "va_span_ch26_x2", "va_match_stereo_nano", "va_minimal_vit_micro_patch4_32"
NANO = "va_minimal_vit_nano_patch7_28_minimum"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Surface:
    """A kind of outside input.

    Attributes:
        name: For messages and `--surface`.
        cases: How many `make test` runs.
        prepare: Write good examples into a folder.
        damage: Given a random generator, the folder of examples and the case's own, write a damaged one there and give
            the call that reads it: an exit code, or None for a good result.
    """

    name: str
    cases: int
    prepare: Callable[[Path], Any]
    damage: Callable[[Random, Path, Path], Call]


def _pick(rng: Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def _upscale(rng: Random, seeds: Path, case: Path) -> Call:
    path = damaged_file(rng, _pick(rng, seeds), case)

    def call() -> int:
        code = main(["upscale", str(path), "out.png", "--model", SR, "--engine", "torch"])
        assert (code == 0) == Path("out.png").exists()
        if code == 0:
            Image.open("out.png").load()
        return code

    return call


def _checkpoint() -> dict[str, Any]:
    state = timm.create_model(NANO).state_dict()
    hyper_parameters = {"name": NANO, "num_classes": 10, "in_chans": 1, "model_args": {}, "lr": 0.1}
    lightning = {"pytorch-lightning_version": "2.6.4", "epoch": 1, "global_step": 9, "loops": {}, "callbacks": {}}
    return {
        **lightning,
        "state_dict": {f"net.{key}": tensor for key, tensor in state.items()},
        "hyper_parameters": hyper_parameters,
        "optimizer_states": [],
    }


def _checkpoints(folder: Path) -> None:
    state = timm.create_model(NANO).state_dict()
    torch.save(_checkpoint(), folder / "training.ckpt")
    torch.save(state, folder / "bare.pth")
    torch.save({"state_dict_ema": state, "epoch": 3}, folder / "wrapped.pth")
    save_file(state, folder / "bare.safetensors")


def _load(rng: Random, seeds: Path, case: Path) -> Call:
    source = _pick(rng, seeds)
    if source.suffix == ".safetensors" or rng.random() < 0.3:
        path = damaged_file(rng, source, case)
    else:
        path = case / source.name
        torch.save(damaged_value(rng, torch.load(source, weights_only=True)), path)
    name = None if source.suffix == ".ckpt" else NANO

    def call() -> None:
        images = torch.zeros(1, 1, 28, 28)
        model = load(path, name)
        assert model.pretrained_cfg["input_size"][0] != 1 or model(images).isfinite().all()

    return call


def _tables(folder: Path) -> None:
    rows = [f"{n}.png,{'train' if n > 3 else 'test'},,{'red' if n % 2 else 'blue'},{n % 3}" for n in range(6)]
    (folder / "table.csv").write_text("\n".join(["id,split,role,colour,kind", *rows]))
    write_photos(folder / "photos")


def _retrieve(rng: Random, seeds: Path, case: Path) -> Call:
    path, text = case / "table.csv", (seeds / "table.csv").read_text()
    if rng.random() < 0.3:
        path.write_bytes(damaged_bytes(rng, text.encode()))
    else:
        path.write_text(damaged_text(rng, text, rng.choice(",\n")))
    return lambda: main(["evaluate", "retrieval", "--data", str(path), "--images", str(seeds / "photos")])


def _recipes(folder: Path) -> None:
    shutil.copy(find_recipe("minimal_vit_digits"), folder / "recipe.yaml")


def _fit(rng: Random, seeds: Path, case: Path) -> Call:
    path = damaged_file(rng, seeds / "recipe.yaml", case)
    if rng.random() < 0.1:
        path.write_bytes(path.read_text(errors="replace").encode("utf-16"))
    return lambda: main(["fit", "--config", str(path), "--trainer.fast_dev_run", "1"])


def _truth(folder: Path) -> None:
    disparity = np.random.default_rng(0).uniform(0, 50, (12, 16)).astype(np.float32)
    for suffix in ("pfm", "png", "npy", "npz"):
        write_disparity(folder / f"a.{suffix}", disparity)
    flow = np.stack([disparity, -disparity])
    for layout in (flow, np.moveaxis(flow, 0, -1)):
        try:
            write_flow(folder / "flow.flo", layout)
            write_flow(folder / "flow.png", layout)
            return
        except Exception:  # whichever layout the writer takes
            continue


def _read_truth(rng: Random, seeds: Path, case: Path) -> Call:
    path = damaged_file(rng, _pick(rng, seeds), case)
    read, axes = (read_flow, 3) if path.name.startswith("flow") else (read_disparity, 2)

    def call() -> None:
        found = read(path)
        assert found.dtype == np.float32
        assert found.ndim == axes

    return call


def _labelled(folder: Path) -> None:
    root = folder / "labelled"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(5):
        Image.fromarray(pixels(12, 16, 3)).save(root / "images" / f"{number}.png")
        Image.fromarray(pixels(12, 16) % np.uint8(3)).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("ground\ndisc\nsquare\n")
    files = [f"images/{number}.png" for number in range(5)]
    (root / "labels.csv").write_text("file,cat,dog\n" + "".join(f"{file},1,0\n" for file in files))
    (root / "labels.json").write_text(json.dumps({file: ["cat", "dog"] for file in files}))


def _read_labelled(rng: Random, seeds: Path, case: Path) -> Call:
    root = damaged_folder(rng, seeds / "labelled", case)

    def call() -> None:
        found = read_segmentation(root)
        for pair in [*found.train, *found.test]:
            check_labels(read_mask(pair.mask), pair.mask, found.classes or range(255))
        for name in ("labels.csv", "labels.json"):
            if (root / name).exists():
                labels = read_labels(root / name, multilabel=True)
                assert np.isfinite(np.concatenate(labels.values)).all()

    return call


def _onnx(folder: Path) -> None:
    model = torch.nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.num_classes = 3
    spec = ExportSpec.of(model, None, True, 20, "none", None)
    axes = ["batch", 3, "height", "width"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["y"]), helper.make_node("GlobalAveragePool", ["y"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 1, 1])],
        [onnx.numpy_helper.from_array(np.ones((3, 3, 3, 3), np.float32), "w")],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(file, spec.to_metadata())
    onnx.save(file, folder / "a.onnx")


def _run_onnx(rng: Random, seeds: Path, case: Path) -> Call:
    path = case / "a.onnx"
    if rng.random() < 0.5:
        path = damaged_file(rng, seeds / "a.onnx", case)
    else:
        file = onnx.load(seeds / "a.onnx")
        properties = {entry.key: entry.value for entry in file.metadata_props}
        damaged = damaged_value(rng, properties)
        del file.metadata_props[:]
        props = damaged.items() if isinstance(damaged, dict) else ()
        helper.set_model_props(file, {str(key): str(value) for key, value in props})
        onnx.save(file, path)

    def call() -> None:
        model = OnnxModel(path)
        channels, height, width = model.spec.input_size
        if channels * height * width < 2**20:
            model(
                *[np.zeros((model.spec.batch or 1, channels, height, width), np.float32)] * len(model.spec.input_names)
            )

    return call


def _check_onnx(rng: Random, seeds: Path, case: Path) -> Call:
    path = damaged_file(rng, seeds / "a.onnx", case)

    def call() -> None:
        read_structure(path)
        find_targets(path, True)

    return call


def _bundle(folder: Path) -> None:
    bundle = folder / "bundle"
    bundle.mkdir()
    _onnx(bundle)
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(bundle / "input.png")
    model = OnnxRunner(bundle / "a.onnx")
    np.save(bundle / "expected.npy", np.zeros((1, 3), np.float32))
    card = {
        "format": 1,
        "files": {"a.onnx": {"sha256": "0"}, "input.png": {"sha256": "0"}},
        "sample": {"images": ["input.png"], "expected": "expected.npy"},
        "variants": [{"file": "a.onnx", "metadata": model.texts, "allowed": 1.0}],
    }
    (bundle / "card.json").write_text(json.dumps(card))


def _verify(rng: Random, seeds: Path, case: Path) -> Call:
    bundle = damaged_folder(rng, seeds / "bundle", case)

    def call() -> None:
        try:
            verify(bundle)
        except RunError as error:
            raise InputError(str(error)) from error

    return call


def _indexes(folder: Path) -> None:
    write_photos(folder / "photos")
    assert main(["index", str(folder / "photos"), str(folder / "index"), "--model", VIT, "--nearest", "ivf"]) == 0


def _search(rng: Random, seeds: Path, case: Path) -> Call:
    index = damaged_folder(rng, seeds / "index", case)
    if rng.random() < 0.3:
        return lambda: main(["duplicates", str(index), "--output", "found.html", "--device", "cpu"])
    query = str(seeds / "photos" / "1.png")
    return lambda: main(["search", str(index), query, "--attribute", "image", "--output", "found.png"])


def _calibrations(folder: Path) -> None:
    for number, text in enumerate((MIDDLEBURY, KITTI, OPENCV)):
        (folder / f"{number}.txt").write_text(text)


def _read_calibration(rng: Random, seeds: Path, case: Path) -> Call:
    text = rng.choice(sorted(seeds.glob("*.txt"))).read_text()
    path = case / "calib.txt"
    if rng.random() < 0.5:
        path.write_bytes(damaged_bytes(rng, text.encode()))
    else:
        path.write_text(damaged_text(rng, text, " "))

    def call() -> None:
        found = read_calibration(path)
        found.at(*(found.size or (480, 640)))

    return call


def _stores(folder: Path) -> None:
    from tests.probe.stores import store

    store(folder / "store")


def _open_store(rng: Random, seeds: Path, case: Path) -> Call:
    path = damaged_folder(rng, next(seeds.rglob("meta.json")).parent, case)

    def call() -> None:
        from visionattn.probe.tokens.features import StoredFeatures

        store = StoredFeatures(path)
        rows = torch.arange(len(store))
        assert sum(len(some) for some, _ in store.batches(rows, 8)) == len(store)

    return call


def _reports(folder: Path) -> None:
    from tests.probe.runs import pictures

    data = pictures(folder / "data", {part: {"none": 8, "one": 8} for part in ("train", "test")})
    few = ["--random", *data, "--heads", "gap", "--lrs", "0.1", "--epochs", "1", "--few-shot", ""]
    for name in ("va_minimal_vit_nano_patch7_28", NANO):
        words = ["probe", name, *few, "--no-knn", "--no-pixels", "--maps", "0", "--output", str(folder / "run" / name)]
        assert main(words) == 0
        kept = folder / "reports" / name
        kept.mkdir(parents=True)
        for file in ("results.json", "predictions.csv"):
            shutil.copy(folder / "run" / name / file, kept)
    shutil.rmtree(folder / "run")


def _heads(folder: Path) -> None:
    from tests.probe.runs import pictures, tiny
    from tests.probe.scenes import write_scenes

    pictures(folder / "photos", {part: {"none": 8, "one": 8} for part in ("train", "test")})
    write_scenes(folder / "scenes", {"train": 8, "val": 2})
    assert main(tiny(folder / "photos", folder / "run", "--no-knn", "--no-pixels")) == 0
    few = ["--random", "--task", "segmentation", "--epochs", "1", "--lrs", "0.01", "--no-pixels", "--maps", "0"]
    assert main(["probe", NANO, "--data", str(folder / "scenes"), *few, "--output", str(folder / "dense")]) == 0
    (folder / "heads").mkdir()
    for run in ("run", "dense"):
        for head in (folder / run / "heads").glob("*.safetensors"):
            shutil.move(head, folder / "heads")
        shutil.rmtree(folder / run)


def _compare(rng: Random, seeds: Path, case: Path) -> Call:
    first, second = sorted((seeds / "reports").iterdir())
    damaged = damaged_folder(rng, first, case)
    return lambda: main(["probe", "--compare", str(damaged), str(second), "--output", "comparison", "--device", "cpu"])


def _apply_head(rng: Random, seeds: Path, case: Path) -> Call:
    source, target = rng.choice(sorted((seeds / "heads").iterdir())), case / "head.safetensors"
    if rng.random() < 0.5:
        target.write_bytes(damaged_bytes(rng, source.read_bytes()))
    else:
        with safe_open(source, "pt") as content:
            facts = json.loads(content.metadata()["visionattn_head"])
            state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        save_file(state, target, {"visionattn_head": json.dumps(damaged_value(rng, facts))})
    return lambda: main(["predict", str(seeds / "photos" / "test"), "--head", str(target), "--device", "cpu"])


LINES = [
    f"show {SR}",
    f"export {SR} --output a.txt --opset 20 --batch 1 --image-size 8 8 --num-classes 3",
    f"upscale good.png out.png --model {SR} --memory 100 --overlap 4 --scale 2 --engine torch --dtype float32",
    "stereo good.png good.png out.pfm --focal 100 --baseline 0.1 --doffs 0 --enlarge 1 --principal-point 8 8",
    "stereo good.png good.png --calibration good.png --right --format color",
    f"upscale photos out --model {SR} --width 40 --height 30 --format jpg --quality 80",
    "duplicates photos --threshold 0.9 --output found.html",
    f"evaluate sr {SR} --data photos --scale 2 --dtype float32 --device cpu --output rows.csv",
    f"evaluate stereo {STEREO} --data photos --layout pairs --enlarge 1 --dtype float32",
    f"index photos index --model {VIT} --image-size 32 32",
    "search photos good.png --attribute image=1 --top 3 --output found.png",
    f"probe {VIT} --data lost --layers last --lrs 0.1 --epochs 3 --draws 5 --few-shot 1,5",
    f"probe {VIT} {NANO} --random --data lost --embed vectors.npz --top 3",
    "predict photos --head lost.safetensors --top 3 --output found.csv --device cpu",
    "quickstart moon --output tour",
    "test --ckpt_path absent.ckpt --data.root photos",
]


def _command(rng: Random, seeds: Path, case: Path) -> Call:
    write_photos(case / "photos")
    shutil.copy(case / "photos" / "1.png", case / "good.png")
    words = rng.choice(LINES).split()
    for _ in range(rng.choice((1, 1, 2))):
        # Rarely the name of an option: the parser alone would see it.
        values = [at for at, word in enumerate(words) if at and not word.startswith("--")]
        at = rng.choice(values) if values and rng.random() < 0.9 else rng.randrange(1, len(words))
        words[at] = rng.choice([*WORDS, "n\0ul", "n" * 300, "\udcff", "good.png", "photos", "/dev/full", "é.png"])
    return lambda: main(words)


def _plans(folder: Path) -> None:
    for name in ("reuse", "heads"):
        make_plan(vit(), images(), name, query_tile=4, key_tile=2).save(folder / f"{name}.json")


def _use_plan(rng: Random, seeds: Path, case: Path) -> Call:
    path = damaged_file(rng, rng.choice(sorted(seeds.glob("*.json"))), case)

    def call() -> None:
        model = vit()
        with torch.no_grad(), using(model, path):
            model(images())

    return call


SURFACES = [
    Surface("images", 16, write_images, _upscale),
    Surface("checkpoints", 25, _checkpoints, _load),
    Surface("tables", 16, _tables, _retrieve),
    Surface("recipes", 5, _recipes, _fit),
    Surface("ground-truth", 60, _truth, _read_truth),
    Surface("labelled", 40, _labelled, _read_labelled),
    Surface("onnx", 25, _onnx, _run_onnx),
    Surface("checked-onnx", 8, _onnx, _check_onnx),
    Surface("bundles", 12, _bundle, _verify),
    Surface("indexes", 8, _indexes, _search),
    Surface("calibrations", 60, _calibrations, _read_calibration),
    Surface("stores", 25, _stores, _open_store),
    Surface("reports", 8, _reports, _compare),
    Surface("heads", 16, _heads, _apply_head),
    Surface("plans", 40, _plans, _use_plan),
    Surface("arguments", 16, lambda folder: None, _command),
]
