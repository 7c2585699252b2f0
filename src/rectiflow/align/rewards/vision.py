"""Rewards by CLIP-type models of transformers: how well a text fits, and how pleasing it looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from rectiflow.align.rewards.pixels import unit_range
from rectiflow.errors import require

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# The mean and deviation of the photographs that CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP = "openai/clip-vit-large-patch14"


def load_clip(source: str = CLIP) -> tuple[Any, Any]:
    """A CLIP model of transformers and its tokenizer, frozen.

    Args:
        source: folder or Hub name. Models tuned on human preference in the same form (such as
            HPSv2 or PickScore, converted to transformers) score preference in place of likeness.

    Raises:
        MissingExtraError: transformers is not installed.
        FileNotFoundError: no such model.
    """
    require("diffusers", "transformers")
    from transformers import AutoTokenizer, CLIPModel

    try:
        model, words = CLIPModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"no CLIP model could be read at {source} ({reason})") from None
    return model.eval().requires_grad_(False), words


def embed_images(clip: Any, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Unit vectors of images in [-1, 1] under CLIP's image tower, with gradient.

    They are mapped to [0, 1] once, scaled to the tower's size with antialiasing and normalised;
    grey images stand for three equal channels.
    """
    pixels = unit_range(images)
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    side = int(clip.config.vision_config.image_size)
    pixels = F.interpolate(
        pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    seen = clip.vision_model(pixel_values=((pixels - mean) / std).to(clip.dtype))
    return F.normalize(clip.visual_projection(seen.pooler_output), dim=1)


@torch.no_grad()
def embed_texts(clip: Any, tokenizer: Any, texts: Sequence[str]) -> Float[Tensor, "n d"]:
    """Unit vectors of texts under CLIP's text tower.

    Raises:
        ValueError: no text, or one longer than the tokenizer takes.
    """
    if not texts:
        raise ValueError("there are no texts to compare images with: give one or more")
    most = int(clip.config.text_config.max_position_embeddings)
    words = tokenizer(list(texts), padding=True, return_tensors="pt")
    if words["input_ids"].shape[1] > most:
        longest = max(texts, key=len)
        raise ValueError(
            f"the text {longest[:40]!r}... has {words['input_ids'].shape[1]} tokens and this CLIP "
            f"takes {most}: shorten it"
        )
    found = clip.text_model(
        input_ids=words["input_ids"].to(clip.device),
        attention_mask=words["attention_mask"].to(clip.device),
    )
    return F.normalize(clip.text_projection(found.pooler_output), dim=1)


class ClipScore:
    """The cosine between an image and its text under a CLIP-type model.

    Args:
        clip: a `CLIPModel` of transformers; `load_clip` reads one.
        tokenizer: its tokenizer.
        texts: one text for all images, or the texts that the condition (`prompt`, else `label`)
            numbers: prompts in the order of the model's table, or one text a class.

    Raises:
        ValueError: no text, a text that is too long; (when called) several texts and no condition,
            or a number beyond them.

    Source: arXiv 2310.03739, section 5 (text-image alignment); the model: arXiv 2103.00020.
    """

    def __init__(self, clip: Any, tokenizer: Any, texts: Sequence[str]) -> None:
        self.clip = clip
        self.texts = embed_texts(clip, tokenizer, texts)

    def __call__(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        prompt: Int[Tensor, " b"] | None = None,
        label: Int[Tensor, " b"] | None = None,
        **condition: Any,
    ) -> Float[Tensor, " b"]:
        _follow(self.clip, images)
        found = embed_images(self.clip, images)
        texts = self.texts.to(found)
        rows = prompt if prompt is not None else label
        if len(texts) == 1:
            return found @ texts[0]
        if rows is None:
            raise ValueError(
                f"there are {len(texts)} texts and no condition says which is whose: give one text "
                "for all, or align a model that takes prompts or labels"
            )
        if int(rows.max()) >= len(texts):
            raise ValueError(f"the condition goes up to {int(rows.max())}, texts are {len(texts)}")
        return (found * texts[rows.to(texts.device)]).sum(1)


class AestheticHead(nn.Module):
    """The layers from a CLIP embedding to a mark of about 1 to 10.

    Args:
        width: length of the embedding: 768 for ViT-L/14.

    Source: the aesthetic predictor of LAION (layers of 1024, 128, 64, 16 and 1, without
        activations), whose weight files `load` reads.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        drop = nn.Dropout
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), drop(0.2), nn.Linear(1024, 128), drop(0.2),
            nn.Linear(128, 64), drop(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embedding: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        return self.layers(embedding)[:, 0]

    @classmethod
    def load(cls, file: str | Path) -> AestheticHead:
        """The head of a weight file, safetensors or torch's (read without running code).

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of other weights.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"no aesthetic head at {file}: give its weight file")
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
            head = cls(state["layers.0.weight"].shape[1])
            head.load_state_dict(state)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{file} holds no aesthetic head ({reason})") from None
        return head.eval().requires_grad_(False)


class Aesthetic:
    """The mark that a head on CLIP's unit embedding gives an image.

    Args:
        clip: a `CLIPModel` of transformers.
        head: from unit embeddings to marks `(b,)`; an `AestheticHead`, or any module.

    Source: arXiv 2310.03739, section 5 (aesthetic quality).
    """

    def __init__(self, clip: Any, head: nn.Module) -> None:
        self.clip, self.head = clip, head

    def __call__(self, images: Float[Tensor, "b c h w"], **condition: Any) -> Float[Tensor, " b"]:
        _follow(self.clip, images)
        _follow(self.head, images)
        return self.head(embed_images(self.clip, images).float())


def _follow(module: nn.Module, images: Tensor) -> None:
    """Judges go where the images are; they are moved once."""
    weight = next(module.parameters())
    if weight.device != images.device:
        module.to(images.device)
