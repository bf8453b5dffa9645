"""Private names of other packages that this one uses: each is listed here, and is still there."""

import argparse
import ast
import importlib
from pathlib import Path

import pytest
import timm
import torch

import visionattn

ROOT = Path(visionattn.__file__).parent

# What is imported, and what depends on it.
IMPORTED = {
    "jsonargparse._loaders_dumpers": "the reader of recipes (train/configuration.py)",
    "timm.models._efficientnet_builder.decode_arch_def": "the layers of MobileNet (models/mobilenet_ulsam.py)",
    "timm.models._efficientnet_builder.round_channels": "the widths of MobileNet (models/mobilenet_ulsam.py)",
    "torch._library.autograd.Info": "derivatives of every operator (kernels/_operator.py)",
    "torch._library.autograd.make_autograd_impl": "derivatives of every operator (kernels/_operator.py)",
    "torch._ops.OpOverload": "the tables of operators (kernels)",
    "torch.utils._python_dispatch.TorchDispatchMode": "the memory that a tile takes (predict/tiles.py)",
    "torch.utils._pytree.tree_leaves": "the memory that a tile takes (predict/tiles.py)",
}

# Attributes that only other packages define. Those of named tuples, and `os._exit`, are documented ones.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}
# What depends on the others.
ATTRIBUTES = {
    "_SubParsersAction": "completion of the command line (cli.py)",
    "_forward_hooks": "the image grid of swapped layers, by one hook on the patch embedding (swapping.py)",
    "_actions": "completion of the command line (cli.py)",
    "_option_string_actions": "old spellings of options (arguments.py)",
    "_cdata": "the memory that a tile takes (predict/tiles.py)",
    "_current_level": "derivatives of dual tensors (kernels/_operator.py)",
    "_experiment": "the files of a run (train/run_logger.py)",
    "_foreach_zero_": "heads that are trained together (probe/heads/banks.py)",
    "_is_avx512_bf16_supported": "operators in bfloat16 on CPUs (kernels/_plain/processor.py)",
    "_get": "the training commands (train/cli.py)",
    "_schema": "the names of operators (kernels/_operator.py)",
    "_softmax_backward_data": "backward passes on the CPU (kernels/_plain)",
    "_tasks": "the time that a probe still takes (probe/progress.py)",
    "_trainer": "whether a task trains (train/optimization.py)",
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))]


def imported(tree: ast.Module) -> list[str]:
    """The full names of what a file imports from other packages."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.split(".")[0] not in ("visionattn", "__future__")]


def test_every_private_import_is_listed():
    found = {name for tree in trees() for name in imported(tree) if any(map(private, name.split(".")))}
    assert found == set(IMPORTED)


def test_every_private_attribute_is_listed():
    own, read = set(), set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else read).add(node.attr)
    assert {name for name in read - own if private(name)} == set(ATTRIBUTES) | DOCUMENTED


@pytest.mark.parametrize("name", IMPORTED)
def test_import_exists(name):
    module, _, attribute = name.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    try:
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"{name} is gone ({error}); on it depends: {IMPORTED[name]}")


def owner_of(name: str) -> object:
    if name == "_SubParsersAction":
        return argparse
    if name in ("_actions", "_option_string_actions"):
        return argparse.ArgumentParser()
    if name == "_cdata":
        return torch.zeros(1).untyped_storage()
    if name == "_current_level":
        return torch.autograd.forward_ad
    if name == "_foreach_zero_":
        return torch
    if name == "_forward_hooks":
        return torch.nn.Identity()
    if name == "_is_avx512_bf16_supported":
        return torch.cpu
    if name == "_schema":
        return torch.ops.aten.add.Tensor
    if name == "_softmax_backward_data":
        return torch.ops.aten
    if name == "_tasks":
        return importlib.import_module("rich.progress").Progress()
    pytest.importorskip("lightning")
    if name == "_experiment":
        return importlib.import_module("lightning.pytorch.loggers").CSVLogger("unused")
    if name == "_get":
        return importlib.import_module("lightning.pytorch.cli").LightningCLI
    assert name == "_trainer"
    return importlib.import_module("lightning.pytorch").LightningModule()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_exists(name):
    assert hasattr(owner_of(name), name), f"{name} is gone; on it depends: {ATTRIBUTES[name]}"


def test_what_timm_calls_of_our_models():
    """Names that this package defines, reads and writes itself because timm reads them."""
    net = timm.create_model("vit_tiny_patch16_224", device="meta")
    assert callable(net._pos_embed), "_pos_embed is gone; on it depend models/dcal.py and train/masked.py"
    for name in ("_traits", "_model_args"):
        assert hasattr(net, name), f"{name} is gone; on it depend the cards of saved models (card.py, models/cca.py)"
    assert "fixed_input_size" in timm.models.get_model_input_config(net), "card.py says by it whether a size is fixed"


def test_what_lightning_saves_of_its_loops(tmp_path):
    """The counters that `visionattn.train.resume` corrects."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.demos.boring_classes import BoringModel

    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=1, enable_model_summary=False, limit_val_batches=0, **settings)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loops = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    depends = "exact resuming depends on it (train/resume.py)"
    assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == 1, depends
    for progress in ("epoch_progress", "epoch_loop.batch_progress"):
        for period in ("current", "total"):
            assert {"ready", "started", "processed", "completed"} <= loops[progress][period].keys(), depends
