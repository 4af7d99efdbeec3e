import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.artifact import Artifact
from qat_tricks.jobs.sensitivity import IMAGES, check_sensitivity, measure_artifact
from tests.helpers.image_data import batches, ready
from tests.helpers.nets import images, small_net


def artifact_of(network, path, **more):
    data = ready("fake")
    described = {"recipe": "int8_ptq", "model": {"name": "small"}, "data": {"name": "fake"}}
    return data, Artifact(
        path=path / "model.ckpt",
        preprocessing=data.preprocessing,
        simulated=network,
        **described,
        **more,
    )


def test_calibration_images_are_measured_as_the_network_takes_them(tmp_path, capsys):
    net = small_net(in_channels=3, num_classes=4)
    quantized = qat_tricks.quantize(net, [images(32, channels=3, size=16)])
    data, artifact = artifact_of(quantized, tmp_path, inputs=lambda batch: batch[0] * 2)
    check_sensitivity(artifact)
    found = measure_artifact(artifact, data, tmp_path)
    assert (tmp_path / "sensitivity.png").is_file()
    assert found["images"] == IMAGES
    assert len(found["parts"]) > len(list(net.modules())) / 2
    assert "block.conv1" in capsys.readouterr().out
    inputs = batches(data.calibration_loader(IMAGES))[0] * 2
    with torch.no_grad():
        agree = (quantized(inputs).argmax(1) == net(inputs).argmax(1)).double().mean()
    assert found["together"]["agreement"] == pytest.approx(float(agree), abs=1 / IMAGES)


def test_a_file_or_a_float_network_is_refused(tmp_path):
    for network in (None, small_net()):
        _, artifact = artifact_of(network, tmp_path)
        with pytest.raises(QatTricksError, match=r"and .*model\.ckpt is none"):
            check_sensitivity(artifact)
