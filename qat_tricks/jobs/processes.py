"""Whether a trainer's settings start other processes than this one."""

from collections.abc import Mapping
from typing import Any

import torch


def other_processes(trainer: Mapping[str, Any]) -> str:
    """The settings by which a trainer starts other processes; empty where it starts none."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    strategy = str(trainer.get("strategy", "auto"))
    starts = strategy.startswith(("ddp", "fsdp", "deepspeed"))
    if starts or _device_count(devices) != 1 or nodes != 1:
        return f"trainer.strategy={strategy}, devices={devices}, num_nodes={nodes}"
    return ""


def _device_count(devices: Any) -> int:
    """Returns the number of devices that ``trainer.devices`` asks for, in any of its forms."""
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, int) and devices >= 0:
        return devices
    if devices in (-1, "-1", "auto"):
        return max(1, torch.cuda.device_count())
    return int(devices) if isinstance(devices, str) and devices.isdigit() else len(devices)
