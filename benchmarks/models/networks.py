"""Whole networks on a GPU compared with what users would run instead.

    python -m benchmarks.models.networks [--parts NAME ...] [--reference FOLDER] [--repeats 20]

Without a GPU, and with `--device cpu`, sizes are small and dtypes float32: to see that it runs. Forms whose names end
in "compiled" are under torch.compile. `error` is the median difference of a form's output from the first one's, as a
share of the spread of that; a form that is off by more than a twentieth is not timed. Peak memory is what a call needs
above what was held before it. Writes results/networks.csv, part by part; rows of other parts and devices stay.

Parts:
    halonet       training steps of va_halonet_h1 and of timm's halonet_h1, whose outputs are not compared
    accelerate    timm's halonet50ts before and after `visionattn.accelerate`, inference and training steps
    match_stereo  va_match_stereo_tiny on one pair, compared with the authors' form if FOLDER is a checkout of their
                  repository, and their CUDA operator if it was built there; then ours over growing pairs
    span          va_span_ch28_x4 on one image; plain: as it is exported, which compilers can fuse: the
                  definition instead of the gate; and its gates alone
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

import visionattn
from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from benchmarks.runner import arguments
from benchmarks.stereo import match_stereo_authors
from benchmarks.stereo.match_stereo_speed import TINY, decided, pair
from visionattn.blocks import SPAB
from visionattn.kernels import decompositions

TOLERANCE = 5e-2
Call = Callable[[], Tensor]


class Setting(NamedTuple):
    """Where networks run and over what.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        dtype: Of networks that are not under autocast.
        batch: Images of classifiers, of 256 x 256.
        pairs: Width and height of stereo pairs, all forms beside each other.
        growing: Those of ours alone.
        picture: Of super-resolution.
        repeats: Rounds.
        reference: Checkout of MatchStereo's repository.
    """

    device: str
    dtype: torch.dtype
    batch: int
    pairs: list[tuple[int, int]]
    growing: list[tuple[int, int]]
    picture: tuple[int, int]
    repeats: int = 20
    reference: Path | None = None


SETTINGS = {
    "cuda": Setting(
        "cuda",
        torch.float16,
        batch=64,
        pairs=[(1536, 1536), (3840, 2176)],
        growing=[(1536, 512), (1536, 1024), (1536, 2048), (1536, 4096)],
        picture=(1280, 720),
    ),
    "cpu": Setting("cpu", torch.float32, batch=1, pairs=[(224, 192)], growing=[(224, 192)], picture=(64, 48)),
}


def compare(calls: dict[str, Call], baseline: str, setting: Setting, same: bool = True) -> list[dict]:
    """Rows of calls that do the same, each checked against the first; or of calls that need not."""
    kept, peaks, errors = {}, {}, {}
    expected = None
    for name, call in calls.items():
        try:
            output = call().float()  # a first call compiles
            peaks[name] = peak_mib(call, setting.device)
        except torch.OutOfMemoryError:
            print(f"without {name}: memory does not suffice", flush=True)
            continue
        expected = output if expected is None else expected
        errors[name] = ""
        if same and output.shape == expected.shape:
            error = ((output - expected).abs().median() / (expected.max() - expected.min())).item()
            errors[name] = f"{error:.1e}"
            if not error <= TOLERANCE:
                print(f"without {name}: it is off by {error:.1e}", flush=True)
                continue
        kept[name] = call
    if baseline not in kept:
        raise SystemExit(f"Nothing is timed without {baseline}.")
    times = paired_milliseconds(kept, setting.device, setting.repeats, warm_up=2)
    columns = summarize(times, baseline)
    return [
        {"form": name, **columns[name], "ratio_to": baseline, "peak_mib": peaks[name], "error": errors[name]}
        for name in kept
    ]


def peak_mib(call: Call, device: str) -> str:
    if device != "cuda":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


def inference(model: nn.Module, *inputs: Tensor, mixed: bool = False) -> Call:
    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=mixed):
            return model(*inputs)

    return call


def training_step(model: nn.Module, images: Tensor) -> Call:
    """Outputs and all gradients, under autocast in bfloat16."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def call() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            out = model(images)
        torch.autograd.grad(out.float().square().mean(), parameters)
        return out.detach()

    return call


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, dynamic=False)


def halonet(setting: Setting) -> list[dict]:
    images = torch.randn(setting.batch, 3, 256, 256, device=setting.device)
    models = {name: timm.create_model(name).to(setting.device).train() for name in ("halonet_h1", "va_halonet_h1")}
    calls = {name: training_step(model, images) for name, model in models.items()}
    if setting.device == "cuda":
        calls |= {f"{name} compiled": training_step(compiled(model), images) for name, model in models.items()}
    rows = compare(calls, "halonet_h1", setting, same=False)
    return [classifier("halonet_h1", images, "training step") | row for row in rows]


def classifier(name: str, images: Tensor, step: str) -> dict:
    return {"network": name, "input": "x".join(map(str, images.shape)), "pass": step, "dtype": "bfloat16 autocast"}


def accelerate(setting: Setting) -> list[dict]:
    name, rows = "halonet50ts", []
    images = torch.randn(setting.batch, 3, 256, 256, device=setting.device)
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False).to(setting.device)
    forms = {"timm": model, "accelerated": visionattn.accelerate(timm.create_model(name).to(setting.device))}
    forms["accelerated"].load_state_dict(model.state_dict())
    if setting.device == "cuda":
        forms |= {f"{form} compiled": compiled(network) for form, network in forms.items()}
    for step in ("inference", "training step"):
        calls: dict[str, Call] = {}
        for form, network in forms.items():
            network.train(step == "training step")
            if network.training:
                calls[form] = training_step(network, images)
            else:
                calls[form] = inference(network, images, mixed=True)
        rows += [classifier(name, images, step) | row for row in compare(calls, "timm", setting)]
    return rows


def match_stereo(setting: Setting) -> list[dict]:
    device, dtype, rows = setting.device, setting.dtype, []
    torch.manual_seed(0)
    ours = decided(timm.create_model(TINY), "start").requires_grad_(False)
    theirs = {}
    if setting.reference:
        match_stereo_authors.use(setting.reference)
        theirs["authors"] = decided(match_stereo_authors.network(), "init_correlation_volume")
        ours.load_state_dict(theirs["authors"].state_dict())
        if match_stereo_authors.cuda_operator_built():
            theirs["authors, their CUDA operator"] = match_stereo_authors.network("cuda").eval()
            theirs["authors, their CUDA operator"].load_state_dict(theirs["authors"].state_dict())
    ours, theirs = ours.to(device, dtype), {name: model.to(device, dtype) for name, model in theirs.items()}
    for width, height in setting.pairs:
        torch.compiler.reset()
        views = [view.to(device, dtype) for view in pair(width, height)]
        calls = {"ours": inference(ours, *views)}
        calls |= {name: disparities(model, views) for name, model in theirs.items()}
        if device == "cuda":
            calls["ours compiled"] = inference(compiled(ours), *views)
            calls |= {f"{name} compiled": disparities(compiled(model), views) for name, model in theirs.items()}
        baseline = "authors compiled" if "authors compiled" in calls else "ours"
        rows += [stereo_row(width, height, dtype) | row for row in compare(calls, baseline, setting)]
    for width, height in setting.growing:
        views = [view.to(device, dtype) for view in pair(width, height)]
        (row,) = compare({"ours, growing": inference(ours, *views)}, "ours, growing", setting)
        rows.append(stereo_row(width, height, dtype) | row)
    return rows


def stereo_row(width: int, height: int, dtype: torch.dtype) -> dict:
    kind = str(dtype).removeprefix("torch.")
    return {"network": TINY, "input": f"{height}x{width}", "pass": "inference", "dtype": kind}


def disparities(model: nn.Module, views: list[Tensor]) -> Call:
    """The authors' network as a function of the same views."""
    left, right = (255 * view for view in views)

    def call() -> Tensor:
        with torch.inference_mode():
            x = model(left, right, stereo=True)["field_up"][..., 0]
        return torch.stack([-x[:1], x[1:]], 1).clamp(min=0)

    return call


def span(setting: Setting) -> list[dict]:
    (width, height), device, dtype = setting.picture, setting.device, setting.dtype
    x = torch.rand(1, 3, height, width).to(device, dtype, memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = timm.create_model("va_span_ch28_x4").eval().requires_grad_(False)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    plain = torch.export.export(model, (x,)).run_decompositions(decompositions()).module()
    gates = sum(isinstance(module, SPAB) for module in model.modules())
    maps = [torch.randn(1, 28, height, width).to(x).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    calls = {"plain": inference(plain, x), "ours": inference(model, x)}
    if device == "cuda":
        calls |= {"plain compiled": inference(compiled(plain), x), "ours compiled": inference(compiled(model), x)}
    calls["gates alone"] = inference(Gates(gates), *maps)
    baseline = "plain compiled" if "plain compiled" in calls else "plain"
    kind = str(dtype).removeprefix("torch.")
    common = {"network": "va_span_ch28_x4", "input": f"{height}x{width}", "pass": "inference", "dtype": kind}
    return [common | row for row in compare(calls, baseline, setting)]


class Gates(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return reduce(lambda h, _: torch.ops.visionattn.symmetric_gate(h, x), range(self.count), h)


PARTS = {"halonet": halonet, "accelerate": accelerate, "match_stereo": match_stereo, "span": span}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="checkout of MatchStereo's repository")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    options = parser.parse_args()
    setting = SETTINGS[options.device]._replace(repeats=options.repeats, reference=options.reference)
    for part in options.parts:
        rows = [{"part": part, **row, **environment(options.device), "seed": 0} for row in PARTS[part](setting)]
        for row in rows:
            print(*list(row.values())[:12], sep=" | ", flush=True)
        if not options.dry:
            write_rows(RESULTS / "networks.csv", rows, key=("part", "device"))


if __name__ == "__main__":
    main()
