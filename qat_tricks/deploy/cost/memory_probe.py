"""Runs one network in a process of its own and prints the peak resident memory in bytes.

It imports only numpy and ONNX Runtime, so that the figure is the network's and not this package's.
Usage: ``python -P memory_probe.py JOB``, JOB being JSON with path, inputs ({name:
[shape, dtype]}), threads, config and runs.
"""

import json
import sys

import numpy as np
import onnxruntime as ort


def peak_bytes() -> int:
    """Returns the peak resident memory of this process, in bytes.

    On Linux from ``VmHWM``: ``ru_maxrss`` survives exec, so it would report a large parent's
    memory.
    """
    if sys.platform.startswith("linux"):
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        # Windows has neither /proc nor the module resource.
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, other systems in KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def main(job: dict) -> None:
    """Runs the network ``job["runs"]`` times on zeros and prints the peak."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    # Set as in ``runtimes.session``, whose import would load this package.
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in job["config"].items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(job["path"], options, providers=["CPUExecutionProvider"])
    feed = {name: np.zeros(shape, dtype=dtype) for name, (shape, dtype) in job["inputs"].items()}
    for _ in range(job["runs"]):
        session.run(None, feed)
    print(peak_bytes())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
