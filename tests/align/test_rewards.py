"""Rewards: their values, their ranges, their words, what they refuse."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from rectiflow.align.rewards import (
    Aesthetic,
    AestheticHead,
    Brightness,
    Checked,
    Classifier,
    ClipScore,
    Compressibility,
    RewardMix,
    fit_linear,
    parse_reward,
    parse_rewards,
    unit_range,
)
from rectiflow.training.data import load
from rectiflow.vectors.jpeg import cosine_matrix


def images(count: int = 4, shape: tuple[int, ...] = (3, 16, 16), seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blurred(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return x


def test_brightness() -> None:
    x = images()
    torch.testing.assert_close(Brightness()(x), x.flatten(1).mean(1))
    torch.testing.assert_close(Brightness(0.5)(x), -(x.flatten(1).mean(1) - 0.5).abs())


@pytest.mark.parametrize("channels", [1, 3])
def test_compressibility_ranks_images_as_jpeg_does(channels: int) -> None:
    from PIL import Image

    x = images(1, (channels, 32, 32))
    smooth = blurred(x, 40)
    series = torch.cat(
        [smooth * 4 * (1 - a) + blurred(x, b) * a for a in (0.0, 0.3, 0.7, 1.0) for b in (0, 1, 3)]
    ).clamp(-1, 1)
    sizes = []
    for image in ((series + 1) * 127.5).round().byte():
        pixels = image.permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(stream, "JPEG", quality=75, subsampling=0)
        sizes.append(stream.tell())
    bits = -Compressibility(75)(series)
    ranks = [np.argsort(np.argsort(v)) for v in (np.array(sizes), bits.numpy())]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_compressibility_transform_is_orthonormal_and_has_gradient() -> None:
    reward = Compressibility()
    identity = cosine_matrix() @ cosine_matrix().T
    torch.testing.assert_close(identity, torch.eye(8, dtype=torch.float64))
    x = images(2, (1, 10, 9)).double().requires_grad_(True)  # padded to blocks
    assert torch.autograd.gradcheck(reward, (x,), atol=1e-4)
    assert float(reward(torch.zeros(1, 1, 8, 8))) == pytest.approx(0, abs=0.02)


def test_classifier_kinds() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    x, label = torch.zeros(2, 1, 1, 1), torch.tensor([2, 0])
    logs = scores.log_softmax(1)

    def judge(images):
        return scores

    assert torch.equal(Classifier(judge, 1)(x), logs[:, 1])
    own = torch.stack([logs[0, 2], logs[1, 0]])
    assert torch.equal(Classifier(judge, shift=0)(x, label=label), own)
    after = torch.stack([logs[0, 0], logs[1, 1]])  # 2 + 1 wraps round to 0
    assert torch.equal(Classifier(judge, shift=1)(x, label=label), after)
    with pytest.raises(ValueError, match="class must be from 0 to 2, got 3"):
        Classifier(judge, 3)(x)
    with pytest.raises(ValueError, match="the model has none"):
        Classifier(judge, shift=0)(x)
    with pytest.raises(ValueError, match="either label"):
        Classifier(judge)
    with pytest.raises(ValueError, match=r"shape \(2, classes\)"):
        Classifier(lambda x: x, 0)(x)


def test_linear_classifier_knows_digits() -> None:
    train, test = load("digits"), load("digits", split="test")
    judge = fit_linear(train)
    x = test.batch(torch.arange(len(test)))
    found = judge(x).argmax(1)
    assert float((found == torch.as_tensor(test.labels)).float().mean()) > 0.93
    assert not any(p.requires_grad for p in judge.parameters())
    two = fit_linear(train.only(3, 8))
    assert two(x).shape == (len(test), 2)


def test_range_is_changed_once() -> None:
    """Invariant 8."""
    x = images().requires_grad_(True)
    unit = unit_range(x)
    torch.testing.assert_close(unit, (x / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match=r"looks like \[0, 1\]"):
        unit_range(unit)
    with pytest.raises(ValueError, match="values from 0 to 255"):
        unit_range(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2))
    with pytest.raises(ValueError, match="looks like"):
        Compressibility()(unit)
    # Bright images of [-1, 1] may have no dark pixel.
    bright = torch.linspace(0.1, 0.9, 9).view(1, 1, 3, 3)
    torch.testing.assert_close(unit_range(bright), bright / 2 + 0.5)


def test_saturated_pixels_keep_their_gradient() -> None:
    x = torch.tensor([-3.0, 0.0, 3.0]).view(1, 1, 1, 3).requires_grad_(True)
    unit_range(x).sum().backward()
    assert x.grad.flatten().tolist() == [0.5, 0.5, 0.5]


def test_mixture_is_the_weighted_sum() -> None:
    x = images()
    mix = RewardMix({"a": Brightness(), "b": Compressibility()}, {"b": -0.5})
    torch.testing.assert_close(mix(x), Brightness()(x) - 0.5 * Compressibility()(x))
    assert set(mix.parts(x)) == {"a", "b"}
    for rewards, weights, message in (
        ({}, {}, "at least one"),
        ({"a": Brightness()}, {"c": 1.0}, "no reward of this name"),
        ({"a": Brightness()}, {"a": 0.0}, "not all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardMix(rewards, weights)


def test_every_part_of_a_mixture_that_counts_needs_a_gradient() -> None:
    rewards = {"a": Brightness(), "b": lambda x: x.detach().flatten(1).mean(1)}
    x = images().requires_grad_(True)
    with pytest.raises(ValueError, match="the reward has no gradient"):
        RewardMix(rewards)(x)
    assert RewardMix(rewards)(x.detach()).shape == (4,)
    assert RewardMix(rewards, {"b": 0.0})(x).requires_grad


def test_conditions_go_to_those_that_name_them() -> None:
    x, label = images(), torch.tensor([0, 1, 2, 3])
    assert Checked(lambda images: images.flatten(1).mean(1))(x, label=label).shape == (4,)
    assert torch.equal(Checked(lambda images, label: label.float())(x, label=label), label.float())
    assert Checked(lambda images, **more: more["prompt"].float())(x, prompt=label).shape == (4,)
    assert Checked(nn.Sequential(nn.Flatten(), nn.Linear(768, 1), nn.Flatten(0)))(x).shape == (4,)


def test_words() -> None:
    assert parse_reward("brightness:0") == Brightness(0.0)
    assert parse_reward("compressibility:30").quality == 30
    made = []

    def classifier():
        made.append(1)
        return lambda x: x.flatten(1)

    assert parse_reward("classifier:3", classifier=classifier).label == 3
    assert parse_reward("classifier:own", classifier=classifier).shift == 0
    assert parse_reward("classifier:+1", classifier=classifier).shift == 1
    assert made == [1, 1, 1]
    function = parse_reward("python:torch.nn.functional.relu")
    assert function is nn.functional.relu
    assert parse_rewards(["0.5*brightness:0", "classifier:1"], classifier=classifier).weights == {
        "brightness:0": 0.5, "classifier:1": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "word, message",
    [
        ("brightnes", "did you mean 'brightness'"),
        ("brightness:high", "see brightness:NUMBER"),
        ("compressibility:0", "quality must be in 1 to 100"),
        ("classifier:three", "takes a class, own or"),
        ("clip", "needs texts"),
        ("aesthetic", "needs its head"),
        ("python:no.such.thing", "no reward at python:no.such.thing"),
        ("python:plain", "no reward at python:plain"),
    ],
)
def test_wrong_words(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_reward(word, classifier=lambda: nn.Identity())
    with pytest.raises(ValueError, match="is no weight"):
        parse_rewards(["much*brightness"])
    with pytest.raises(ValueError, match="'brightness' is given twice"):
        parse_rewards(["0.5*brightness", "compressibility", "2*brightness"])


@pytest.fixture(scope="module")
def clip():
    from tests.interop.pipelines import clip_tokenizer
    from tests.stirring import stirred
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {
        "vocab_size": len(clip_tokenizer()), "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return stirred(CLIPModel(config)).requires_grad_(False), clip_tokenizer()


def test_clip_score_is_that_of_transformers(clip) -> None:
    network, words = clip
    texts = ["a red fox", "two blue doors"]
    x = images(4).requires_grad_(True)
    rows = torch.tensor([0, 1, 1, 0])
    score = ClipScore(network, words, texts)(x, prompt=rows)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        out = network(
            pixel_values=((x + 1) / 2 - mean) / std,
            **words(texts, padding=True, return_tensors="pt"),
        )
    cosine = out.logits_per_image / network.logit_scale.exp()
    torch.testing.assert_close(score.detach(), cosine[torch.arange(4), rows], atol=1e-5, rtol=1e-5)
    score.sum().backward()
    assert bool(x.grad.flatten(1).any(1).all())
    one = ClipScore(network, words, texts[:1])
    torch.testing.assert_close(one(x).detach(), cosine[:, 0], atol=1e-5, rtol=1e-5)
    grey = images(2, (1, 8, 8))
    torch.testing.assert_close(one(grey), one(grey.expand(-1, 3, -1, -1)))


def test_clip_refuses(clip) -> None:
    network, words = clip
    with pytest.raises(ValueError, match="has 22 tokens and this CLIP takes 16"):
        ClipScore(network, words, ["a" * 20])
    with pytest.raises(ValueError, match="no texts"):
        ClipScore(network, words, [])
    two = ClipScore(network, words, ["a", "b"])
    with pytest.raises(ValueError, match="no condition says which is whose"):
        two(images())
    with pytest.raises(ValueError, match="goes up to 2, texts are 2"):
        two(images(1), label=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"looks like \[0, 1\]"):
        two(unit_range(images()), label=torch.zeros(4).long())


def test_aesthetic_head_reads_both_kinds_of_files(clip, tmp_path) -> None:
    from safetensors.torch import save_file

    network, _ = clip
    head = AestheticHead(8).eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    x = images()
    wanted = Aesthetic(network, head)(x).detach()
    assert wanted.shape == (4,)
    for name in ("head.pth", "head.safetensors"):
        assert torch.equal(Aesthetic(network, AestheticHead.load(tmp_path / name))(x), wanted)
    # The keys of the published file.
    assert [n for n in head.state_dict() if "weight" in n] == [
        f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)
    ]
    (tmp_path / "bad.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no aesthetic head"):
        AestheticHead.load(tmp_path / "bad.pth")
    with pytest.raises(FileNotFoundError, match="no aesthetic head at"):
        AestheticHead.load(tmp_path / "none.pth")
