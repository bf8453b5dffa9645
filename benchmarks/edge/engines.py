"""One runtime on one network, in the runtime's own environment: converted, loaded, compared and timed.

    python engines.py RUNTIME FOLDER CASE [--rounds 20]      # prints one line of JSON

`benchmarks.edge.runtimes` starts it with an interpreter that has the runtime. FOLDER holds what
`benchmarks.edge.cases.write_case` wrote. Runtimes that read ONNX files need neither PyTorch nor this package;
the others trace the network CASE.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Call = Callable[[], np.ndarray]
PNNX = "import pathlib, sys; print(next(p for d in sys.path for p in pathlib.Path(d).glob('pnnx/pnnx')))"


class Engine:
    """A runtime: `convert` gives the files that a device needs, `load` a call of them on one thread."""

    packages: tuple[str, ...] = ()

    def convert(self, folder: Path, case: str) -> list[Path]:
        raise NotImplementedError

    def load(self, files: list[Path], inputs: Arrays) -> Call | None:
        raise NotImplementedError


class OpenVino(Engine):
    packages = ("openvino",)

    def convert(self, folder: Path, case: str) -> list[Path]:
        import openvino

        openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
        return [folder / "model.xml", folder / "model.bin"]

    def load(self, files: list[Path], inputs: Arrays) -> Call:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().compile_model(files[0], "CPU", settings)
        arrays = list(inputs.values())
        return lambda: model(arrays)[0]


class Ncnn(Engine):
    packages = ("ncnn", "pnnx")

    def convert(self, folder: Path, case: str) -> list[Path]:
        # The package's command imports PyTorch, the program in it does not.
        program = subprocess.run([sys.executable, "-c", PNNX], capture_output=True, text=True, check=True).stdout
        done = subprocess.run([program.strip(), "model.onnx", "fp16=0"], cwd=folder, capture_output=True, text=True)
        param = folder / "model.ncnn.param"
        if not param.exists():
            raise RuntimeError(f"pnnx exited with code {done.returncode} and wrote no file")
        kinds = {line.split()[0] for line in param.read_text().splitlines()[2:]}
        unknown = sorted(kind for kind in kinds if "." in kind or kind.startswith("aten"))
        if unknown:
            raise RuntimeError(f"pnnx leaves {', '.join(unknown)}, which ncnn does not know")
        return [param, folder / "model.ncnn.bin"]

    def load(self, files: list[Path], inputs: Arrays) -> Call:
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = 1
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        if net.load_param(str(files[0])) or net.load_model(str(files[1])):
            raise RuntimeError("ncnn does not load the file")
        images = [np.ascontiguousarray(image[0]) for image in inputs.values()]

        def call() -> np.ndarray:
            extractor = net.create_extractor()
            for index, image in enumerate(images):
                extractor.input(f"in{index}", ncnn.Mat(image))
            code, out = extractor.extract("out0")
            if code:
                raise RuntimeError(f"ncnn ends with code {code}")
            return np.array(out)

        return call


class Mnn(Engine):
    packages = ("MNN",)

    def convert(self, folder: Path, case: str) -> list[Path]:
        # The command `mnnconvert` also reports its use to a server, for which it installs packages: call what it calls.
        convert = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
        options = ["-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", "model.mnn", "--bizCode", "visionattn"]
        subprocess.run([sys.executable, "-c", convert, *options], cwd=folder, capture_output=True)
        if not (folder / "model.mnn").exists():
            raise RuntimeError("mnnconvert writes no file")
        return [folder / "model.mnn"]

    def load(self, files: list[Path], inputs: Arrays) -> Call:
        import MNN
        import onnxruntime

        session = onnxruntime.InferenceSession(files[0].with_suffix(".onnx"), providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": 1, "precision": "high"},))
        net = MNN.nn.load_module_from_file(str(files[0]), list(inputs), outputs, runtime_manager=manager)

        def call() -> np.ndarray:
            images = [MNN.expr.const(image, list(image.shape), MNN.expr.NCHW) for image in inputs.values()]
            found = net.forward(images)
            if not found:
                raise RuntimeError("MNN computes no output")
            return np.array(MNN.expr.convert(found[0], MNN.expr.NCHW).read())

        return call


class LiteRt(Engine):
    packages = ("litert-torch", "ai-edge-litert", "torch")

    def convert(self, folder: Path, case: str) -> list[Path]:
        import litert_torch

        program, images = traced(case)
        litert_torch.convert(program.module(), images).export(str(folder / "model.tflite"))
        return [folder / "model.tflite"]

    def load(self, files: list[Path], inputs: Arrays) -> Call:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(files[0]), num_threads=1)
        interpreter.allocate_tensors()
        places, out = interpreter.get_input_details(), interpreter.get_output_details()[0]["index"]

        def call() -> np.ndarray:
            for place, image in zip(places, inputs.values(), strict=True):
                interpreter.set_tensor(place["index"], image)
            interpreter.invoke()
            return interpreter.get_tensor(out)

        return call


class ExecuTorch(Engine):
    packages = ("executorch", "torch")

    def convert(self, folder: Path, case: str) -> list[Path]:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(traced(case)[0], partitioner=[XnnpackPartitioner()])
        (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)
        return [folder / "model.pte"]

    def load(self, files: list[Path], inputs: Arrays) -> Call:
        import torch
        from executorch.runtime import Runtime

        torch.set_num_threads(1)
        program = Runtime.get().load_program(files[0])  # the method reads from it
        method, images = program.load_method("forward"), [torch.from_numpy(image) for image in inputs.values()]
        return lambda: (program, method.execute(images)[0].numpy())[1]


class CoreMl(Engine):
    packages = ("coremltools", "torch")

    def convert(self, folder: Path, case: str) -> list[Path]:
        import coremltools

        program, _ = traced(case)
        precision = coremltools.precision.FLOAT32
        model = coremltools.convert(program, compute_precision=precision, skip_model_load=True)
        model.save(str(folder / "model.mlpackage"))
        return [path for path in (folder / "model.mlpackage").rglob("*") if path.is_file()]

    def load(self, files: list[Path], inputs: Arrays) -> None:
        """Core ML runs on Apple's systems only."""


ENGINES: dict[str, type[Engine]] = {
    "OpenVINO": OpenVino,
    "ncnn": Ncnn,
    "MNN": Mnn,
    "LiteRT": LiteRt,
    "ExecuTorch": ExecuTorch,
    "Core ML": CoreMl,
}


def traced(case: str) -> Any:
    """The program of a network, with plain definitions instead of this package's operators, and its images."""
    import torch

    import visionattn.kernels
    from benchmarks.edge.cases import CASES

    model, images = CASES[case].network(), CASES[case].images()
    program = torch.export.export(model, images).run_decompositions(visionattn.kernels.decompositions())
    for node in program.graph.nodes:
        if node.target == torch.ops.aten.alias.default:  # slices that keep all, which Core ML's converter does not know
            node.replace_all_uses_with(node.args[0])
    program.graph_module.graph.eliminate_dead_code()
    return program, images


def onnx_runtime(path: Path, inputs: Arrays, threads: int = 1) -> Call:
    """A call of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)[0]


def measure(runtime: str, folder: Path, case: str, rounds: int) -> dict[str, Any]:
    """What happens to a network in a runtime: how far it comes, and what was found until then."""
    engine = ENGINES[runtime]()
    versions = [f"{package} {importlib.metadata.version(package)}" for package in engine.packages]
    found: dict[str, Any] = {"versions": ", ".join(versions), "step": "conversion", "reason": ""}
    try:
        start = time.perf_counter()
        files = engine.convert(folder, case)
        found |= {"convert_s": time.perf_counter() - start, "step": "loading"}
        found["bytes"] = sum(path.stat().st_size for path in files)
        inputs = dict(np.load(folder / "inputs.npz"))
        call = engine.load(files, inputs)
        if call is None:
            return found | {"step": "converted"}
        found["step"] = "running"
        expected = np.load(folder / "expected.npz")
        out = call().reshape(expected["float32"].shape)
        found |= {f"error_{name}": float(np.abs(out - expected[name]).max()) for name in ("float32", "float64")}
        found["largest_output"] = float(np.abs(expected["float32"]).max())
        if rounds and importlib.util.find_spec("onnxruntime"):
            calls = {"runtime": call, "onnxruntime": onnx_runtime(folder / "model.onnx", inputs)}
            found |= {"times": paired(calls, rounds), "onnxruntime": importlib.metadata.version("onnxruntime")}
        return found | {"step": "ran"}
    except Exception as error:  # runtimes can raise any error, which is reported
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return found | {"reason": f"{type(error).__name__}: {lines[0] if lines else ''}"}


def paired(
    calls: dict[str, Call], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Milliseconds of calls that take turns in every round, without two warm-up rounds.

    The default clock is the processor time of all threads of the process: of calls on one thread, what they take on a
    machine that has nothing else to do, whatever else it does.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if number >= 2:
                times[name].append(1e3 * (clock() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("case")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(json.dumps(measure(args.runtime, args.folder, args.case, args.rounds)))


if __name__ == "__main__":
    main()
