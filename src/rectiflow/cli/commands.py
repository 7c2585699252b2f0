"""The table of commands: what each does and which module runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        summary: one line for `--help`.
        module: the module with its `Settings` dataclass and `run(settings)`.
    """

    summary: str
    module: str


COMMANDS = {
    "demo": Command("data in, a one-step generator out: the whole chain", "rectiflow.cli.demo"),
    "train": Command("train a flow on images", "rectiflow.cli.train"),
    "pairs": Command("generate noise-image pairs with a trained flow", "rectiflow.cli.pairs"),
    "reflow": Command("straighten a flow on its own pairs", "rectiflow.cli.reflow"),
    "distill": Command("distil a straightened flow to one or few steps", "rectiflow.cli.distill"),
    "align": Command("fine-tune a model toward a reward", "rectiflow.cli.align"),
    "sample": Command("generate images with a model", "rectiflow.cli.sample"),
    "invert": Command("follow images to their noises and back", "rectiflow.cli.invert"),
    "edit": Command("change what images show, not how they are built", "rectiflow.cli.edit"),
    "inverse": Command(
        "fill in, enlarge, sharpen or colour images with a model", "rectiflow.cli.inverse"
    ),
    "anagram": Command(
        "pictures that show something else when they are turned", "rectiflow.cli.anagram"
    ),
    "sds": Command("paint a picture by score distillation", "rectiflow.cli.sds"),
    "relations": Command(
        "teach a text model who does what to whom, by a few pictures", "rectiflow.cli.relations"
    ),
    "evaluate": Command("score a model against its data", "rectiflow.cli.evaluate"),
    "compare": Command("models side by side on one page", "rectiflow.cli.compare"),
    "grid": Command("fit a model's times to where its trajectories bend", "rectiflow.cli.grid"),
    "info": Command("what a model folder is and how it was made", "rectiflow.cli.info"),
    "export": Command("write a sampler as ONNX or torch.export program", "rectiflow.cli.export"),
    "list": Command("the 41 systems and their recipes", "rectiflow.cli.listing"),
    "run": Command("run a recipe: a paper's claim against measurement", "rectiflow.cli.run"),
    "cite": Command("the papers that a run used", "rectiflow.cli.cite"),
    "doctor": Command("check environment, extras and devices", "rectiflow.cli.doctor"),
}
