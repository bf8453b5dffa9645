"""What every mixer promises; `MixerContract` walks `MIXERS`, so that a mixer is tested because it exists."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

from visionattn.errors import InputError
from visionattn.mixers import FEATURES, MIXERS, Mixer

DIM, HEADS, GRID = 12, 3, (3, 5)
# Settings that show a mechanism on a small grid; one row per case.
SETTINGS: dict[str, list[dict]] = {
    "window": [{"kernel": 3}, {"kernel": (2, 3), "dilation": (1, 2), "border": "zero", "trained_tokens": 9}],
    "hsa": [{"windows": 2}, {"windows": (2, 2)}],
    "dma": [{"reduction": 4}],
    "agent": [{"num_agents": 4, "grid_size": GRID}],
    "moh": [{}, {"shared_heads": 0, "routed_heads": 2, "form": "paper"}],
    "random_qk": [{"grid_size": GRID}],
    "fixed_qk": [{"grid_size": GRID}],
    "taylor": [{}, {"orders": "separate"}],
    "halo": [{"block_size": 2, "halo_size": 1}],
    "lssa": [{}, {"power": 15.0}],
}
# Settings of the limit in which a mixer equals softmax attention, on a grid of GRID, as it starts.
LIMITS: dict[str, dict] = {
    "softmax": {},
    "softmax_conv": {},
    "window": {"kernel": 5},
    "hsa": {"windows": 1},
    "moh": {"shared_heads": 1, "routed_heads": 2},
    "gated_heads": {},
    "parallax": {},
    "local_linear": {"regularisation": 1e12},
    "static_qk": {},
    "halo": {"block_size": 5, "halo_size": 0},
}
CASES = [(name, settings) for name in MIXERS for settings in SETTINGS.get(name, [{}])]


def randomise(module: nn.Module) -> nn.Module:
    """Give parameters and buffers small random values, so that no branch is hidden by a zero."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return module


def make(name: str, settings: dict, **kwargs) -> Mixer:
    torch.manual_seed(0)
    return randomise(MIXERS[name](DIM, HEADS, **settings, **kwargs)).eval()


def prefix_of(mixer: Mixer) -> int:
    return 2 if "prefix" in mixer.supports else 0


def tokens(mixer: Mixer, batch: int = 2, grid: tuple[int, int] = GRID, dtype=None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, prefix_of(mixer) + grid[0] * grid[1], DIM)
    return torch.randn(shape, generator=generator, dtype=dtype)


def peak_memory(mixer: Mixer, x: Tensor, grid: tuple[int, int]) -> int:
    """Most bytes that a forward pass on the CPU has allocated at a time."""
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        mixer(x, grid)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most


class OnMaps(nn.Module):
    """A mixer for maps (B, C, H, W), whose size is then the grid, with a constant prefix."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.prefix = prefix_of(mixer)

    def forward(self, x: Tensor) -> Tensor:
        first = x.mean(dim=(2, 3))[:, None].expand(-1, self.prefix, -1)
        y = self.mixer(torch.cat([first, x.flatten(2).transpose(1, 2)], dim=1), (x.shape[2], x.shape[3]))
        return y[:, self.prefix :].transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))


class OnGrid(nn.Module):
    """A mixer with its grid, as a layer of a network."""

    def __init__(self, mixer: Mixer, grid: tuple[int, int]) -> None:
        super().__init__()
        self.mixer = mixer
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.grid)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{'-'.join(map(str, s.values()))}" for n, s in CASES])
class MixerContract:
    """Checks that hold for any mixer; a test file with the name of the mixer has its mathematics."""

    def test_facts(self, name, settings):
        mixer = make(name, settings)
        assert mixer.supports <= set(FEATURES)
        assert mixer.limit
        n = prefix_of(mixer) + 15
        assert mixer.macs(n) >= 0
        assert isinstance(mixer.extra_parameters(), int)

    @pytest.mark.parametrize("grid", [(1, 1), (2, 7), (6, 5)])
    def test_any_grid(self, name, settings, grid):
        mixer = make(name, settings)
        x = tokens(mixer, grid=grid)
        y = mixer(x, grid)
        assert y.shape == x.shape
        assert y.isfinite().all()

    def test_gradients_in_float64(self, name, settings):
        mixer = make(name, settings, dtype=torch.float64)
        names, values = zip(*mixer.named_parameters()) if list(mixer.parameters()) else ((), ())
        x = tokens(mixer, dtype=torch.float64).requires_grad_()

        def function(x, *values):
            return torch.func.functional_call(mixer, dict(zip(names, values)), (x, GRID))

        leaves = [value.detach().requires_grad_() for value in values]
        assert torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)

    def test_device_and_dtype_reach_every_tensor(self, name, settings):
        mixer = MIXERS[name](DIM, HEADS, **settings, device="meta", dtype=torch.bfloat16)
        tensors = [*mixer.parameters(), *mixer.buffers()]
        assert {t.device.type for t in tensors} <= {"meta"}
        assert {t.dtype for t in mixer.parameters()} <= {torch.bfloat16}

    def test_half_precision(self, name, settings):
        if "onnx" not in MIXERS[name].supports:
            pytest.skip("a reference for full precision")
        mixer = make(name, settings)
        x = tokens(mixer)
        expected = mixer(x, GRID)
        found = copy.deepcopy(mixer).bfloat16()(x.bfloat16(), GRID).float()
        if name == "taylor" and mixer.separate:
            return  # divides by sums that cancel
        assert (found - expected).abs().max() < 0.1 * expected.abs().max().clamp(min=0.1)

    def test_samples_do_not_mix(self, name, settings):
        mixer = make(name, settings)
        x = tokens(mixer, batch=3)
        torch.testing.assert_close(mixer(x, GRID)[1:2], mixer(x[1:2], GRID))

    def test_permutation(self, name, settings):
        mixer = make(name, settings, dtype=torch.float64)
        x = tokens(mixer, dtype=torch.float64)
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
        equal = torch.allclose(mixer(x[:, order], GRID), mixer(x, GRID)[:, order], rtol=0, atol=1e-10)
        assert equal == mixer.equivariant

    def test_context(self, name, settings):
        mixer = make(name, settings, dtype=torch.float64)
        x, context = tokens(mixer, dtype=torch.float64), torch.randn(2, 7, DIM, dtype=torch.float64)
        if "cross" not in mixer.supports:
            with pytest.raises(InputError, match="cross-attention"):
                mixer(x, GRID, context)
            return
        y = mixer(x, GRID, context)
        assert y.shape == x.shape
        order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
        torch.testing.assert_close(mixer(x, GRID, context[:, order]), y, rtol=0, atol=1e-10)
        mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1]] * 2).bool()
        kept = mixer(x, GRID, context[:, mask[0]])
        torch.testing.assert_close(mixer(x, GRID, context, mask), kept, rtol=0, atol=1e-10)

    def test_mask(self, name, settings):
        mixer = make(name, settings, dtype=torch.float64)
        x = tokens(mixer, dtype=torch.float64)
        mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(5)) < 0.7
        if "mask" not in mixer.supports:
            with pytest.raises(InputError, match="mask"):
                mixer(x, GRID, mask=mask)
            return
        torch.testing.assert_close(mixer(x, GRID, mask=torch.ones_like(mask)), mixer(x, GRID), rtol=0, atol=1e-10)
        assert mixer(x, GRID, mask=mask).isfinite().all()

    def test_prefix(self, name, settings):
        mixer = make(name, settings)
        x = torch.randn(2, 1 + 15, DIM)
        if "prefix" in mixer.supports:
            assert mixer(x, GRID).shape == x.shape
            assert mixer(x[:, 1:], GRID).shape == (2, 15, DIM)
            with pytest.raises(InputError, match="0 prefix tokens do not match 16 tokens"):
                MIXERS[name](DIM, HEADS, **settings, num_prefix_tokens=0)(x, GRID)
        else:
            with pytest.raises(InputError, match="0 prefix tokens do not match 16 tokens"):
                mixer(x, GRID)
            with pytest.raises(InputError, match="does not support prefix tokens"):
                MIXERS[name](DIM, HEADS, **settings, num_prefix_tokens=1)

    def test_bad_inputs(self, name, settings):
        mixer = make(name, settings)
        x = tokens(mixer)
        with pytest.raises(InputError, match="6 x 6 needs at least as many tokens"):
            mixer(x, (6, 6))
        with pytest.raises(InputError, match="12 channels; got 11"):
            mixer(x[..., :-1], GRID)
        with pytest.raises(InputError, match=r"shape \(B, P \+ H W, C\)"):
            mixer(x[0], GRID)
        with pytest.raises(InputError, match=r"dim \(12\) must be divisible by num_heads \(5\)"):
            MIXERS[name](DIM, 5, **settings)
        if "mask" in mixer.supports:
            with pytest.raises(InputError, match="mask must be a bool tensor"):
                mixer(x, GRID, mask=torch.ones(2, 3).bool())
        if "cross" in mixer.supports:
            with pytest.raises(InputError, match="context must have the shape"):
                mixer(x, GRID, torch.randn(2, 7, DIM + 1))

    def test_fx(self, name, settings):
        layer = OnGrid(make(name, settings), GRID)
        x = tokens(layer.mixer)
        torch.testing.assert_close(fx.symbolic_trace(layer)(x), layer(x))

    def test_script(self, name, settings):
        mixer = make(name, settings)
        if "script" not in mixer.supports:
            pytest.skip("not supported")
        x = tokens(mixer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            scripted = torch.jit.script(mixer)
        torch.testing.assert_close(scripted(x, GRID), mixer(x, GRID))
        torch.testing.assert_close(scripted(x, (5, 3)), mixer(x, (5, 3)))

    def test_compiles_whole(self, name, settings):
        layer = OnGrid(make(name, settings), GRID)
        x = tokens(layer.mixer)
        torch.compiler.reset()
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        x.requires_grad_()
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        found.sum().backward()

    def test_export_keeps_sizes_open(self, name, settings):
        layer = OnMaps(make(name, settings))
        if "onnx" not in layer.mixer.supports:
            pytest.skip("not supported")
        axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        program = torch.export.export(layer, (torch.randn(2, DIM, 9, 19),), dynamic_shapes=(axes,)).module()
        for size in [(1, DIM, 11, 23), (3, DIM, 13, 18)]:
            x = torch.randn(size)
            torch.testing.assert_close(program(x), layer(x))
