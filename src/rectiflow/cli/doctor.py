"""`rectiflow doctor`: check environment, extras and devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

HELP = """usage: rectiflow doctor [--json]

Checks Python, packages, extras, devices, data and disk. The status is 1 if something that the
command line needs is missing."""

EXTRAS = {
    "app": (
        "accelerate",
        "huggingface_hub",
        "tyro",
        "rich",
        "matplotlib",
        "PIL",
        "sklearn",
        "scipy",
        "tensorboard",
        "jinja2",
    ),
    "data": ("datasets", "pyarrow", "skimage"),
    "ot": ("ot",),
    "diffusers": ("diffusers", "transformers"),
    "lora": ("peft",),
    "fid": ("torch_fidelity",),
    "lpips": ("lpips",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}


def main(words: Sequence[str]) -> int:
    """Run the command."""
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    extra = [word for word in words if word != "--json"]
    if extra:
        raise ValueError(f"doctor takes only --json, got {' '.join(extra)}")
    facts = examine()
    if "--json" in words:
        print(json.dumps(facts, indent=2))
    else:
        for name in ("rectiflow", "python", "system", "device", "cores", "threads", "disk"):
            print(f"{name:<12}{facts[name]}")
        for name, version in facts["packages"].items():
            print(f"{name:<12}{version}")
        for name, missing in facts["extras"].items():
            state = (
                "ready"
                if not missing
                else f"missing {', '.join(missing)}: pip install " + (f"'rectiflow[{name}]'")
            )
            print(f"extra {name:<10}{state}")
        print(f"{'fashion-mnist':<14}{facts['fashion-mnist']}")
    return 1 if facts["extras"]["app"] else 0


def examine() -> dict[str, Any]:
    """What there is, as plain values."""
    from rectiflow.training.data import find_fashion_mnist
    from rectiflow.training.runs import environment

    try:
        fashion = str(find_fashion_mnist())
    except FileNotFoundError as error:
        fashion = str(error)
    disk = shutil.disk_usage(Path.cwd())
    return {
        **environment(),
        "disk": f"{disk.free / 1e9:.0f} GB free",
        "extras": {
            name: [module for module in modules if util.find_spec(module) is None]
            for name, modules in EXTRAS.items()
        },
        "fashion-mnist": fashion,
        "accelerators": _accelerators(),
        "version": metadata.version("rectiflow"),
    }


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
