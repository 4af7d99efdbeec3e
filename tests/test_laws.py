"""DESIGN's second law: what is plain PyTorch runs without the framework."""

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qat_tricks"


def test_numerics_graph_and_deploy_import_neither_lightning_nor_hydra_nor_wandb():
    files = [
        path
        for folder in ("numerics", "graph", "deploy")
        for path in sorted((PACKAGE / folder).glob("*.py"))
    ]
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in files
    ]
    assert {"qat_tricks.deploy.export", "qat_tricks.graph.fold", "qat_tricks.numerics"} <= set(
        modules
    )
    code = f"""
import sys
import qat_tricks, {", ".join(modules)}
qat_tricks.export_onnx
print(*{{"pytorch_lightning", "lightning_fabric", "hydra", "wandb"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("\n", "")
