"""Several threads of one process: tracing patches PyTorch for all of them."""

import copy
import threading

import torch
from torch import nn

import qat_tricks
from tests.helpers.nets import images, small_net


def test_networks_are_quantized_in_threads_as_alone():
    net, data = small_net(), [images(64)]
    call = nn.Module.__call__
    expected = qat_tricks.quantize(net, data)(images())
    found, errors = [], []

    def quantize(own):
        try:
            found.append(qat_tricks.quantize(own, data))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=quantize, args=(copy.deepcopy(net),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert nn.Module.__call__ is call
    assert all(torch.equal(network(images()), expected) for network in found)
