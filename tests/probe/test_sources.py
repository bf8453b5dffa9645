"""What is given as a backbone: weights, names in reports, names of folders."""

import timm

from visionattn.probe.settings import ProbeSettings
from visionattn.probe.sources import Source, backbone_name, find_sources, folder_names, open_source
from visionattn.probe.tokens.backbone import Backbone


def test_each_backbone_has_its_own_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    given = ["test_vit=w.pt", "test_vit", "w.pt", "a=b"]
    assert find_sources(given, ProbeSettings(random=True)) == [
        Source("test_vit", "w.pt", False),
        Source("test_vit", None, True),
        Source("w.pt", None, False),
        Source("a=b", None, False),
    ]


def test_folders_have_distinct_names(tmp_path):
    (tmp_path / "net.v2.pt").touch()
    assert folder_names(["hf-hub:a/b", "hf-hub:a b", str(tmp_path / "net.v2.pt")]) == [
        "hf-hub-a-b-1",
        "hf-hub-a-b-2",
        "net.v2",
    ]
    assert folder_names(["x" * 120]) == ["x" * 100]


def test_a_module_is_copied_and_named_by_its_class():
    net = timm.create_model("test_vit", num_classes=0)
    reading = Backbone(net, image_size=160)
    assert backbone_name(net) == backbone_name(reading) == "VisionTransformer"
    opened = open_source(reading, None, False, None)
    assert opened.source == "as given"
    assert opened.model is not net
    assert opened.model.cls_token.equal(net.cls_token)
    named = Backbone.from_callable(lambda images: images.mean((2, 3)), image_size=8, name="mean")
    assert backbone_name(named) == "mean"
