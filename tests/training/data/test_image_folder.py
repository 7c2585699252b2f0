"""Pictures and folders of them: exact pixels, bad files, captions, caches."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.data.pictures import coloured, encoded, solid, write_folder

from rectiflow.training.data import load
from rectiflow.training.data.pictures import BadPictureError, read_header, read_picture


def oriented():
    """A JPEG of 16x8 whose left half is black, tagged to be turned 90 degrees clockwise."""
    picture = Image.new("L", (16, 8), 255)
    picture.paste(0, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, "JPEG", exif=exif, quality=95)


def palette():
    picture = Image.new("P", (6, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    return picture


GOOD = {
    "alpha.png": encoded(solid((255, 0, 0, 128), "RGBA")),
    "cmyk.jpg": encoded(solid((0, 255, 255, 0), "CMYK"), "JPEG", quality=100),
    "first.gif": encoded(
        solid((0, 0, 255)), "GIF", save_all=True, append_images=[solid((0, 255, 0))]
    ),
    "grey16.png": encoded(Image.fromarray(np.full((4, 6), 32896, np.uint16))),
    "palette.png": encoded(palette()),
}
BAD = {
    "empty.png": b"",
    "renamed.png": b"Dear diary,\n",
    "truncated.png": encoded(Image.effect_noise((64, 64), 90))[:1500],
}


@pytest.fixture
def zoo(tmp_path):
    """Five good files of odd modes, three bad ones, and what must be ignored."""
    write_folder(tmp_path / "zoo", GOOD | BAD)
    other = {"readme.txt": b"hello", ".hidden.png": b"x", ".git/a.png": b"x"}
    return write_folder(tmp_path / "zoo", other)


@pytest.mark.parametrize(
    "content, expected",
    [
        (encoded(solid((7, 8, 9))), (7, 8, 9)),
        # red at alpha 128/255 over white: 255 * (1 - 128/255) = 127 of green and blue
        (GOOD["alpha.png"], (255, 127, 127)),
        (encoded(solid((40, 0), "LA")), (255, 255, 255)),
        (encoded(palette(), transparency=1), (255, 255, 255)),
        (encoded(palette()), (10, 200, 30)),
        # 32896 = 128 * 257; clipping would give 255
        (GOOD["grey16.png"], (128, 128, 128)),
        (encoded(Image.fromarray(np.full((4, 6), 65535, np.uint16)), "TIFF"), (255, 255, 255)),
        # v / 257 rounds at 128.5: 128 -> 0, 129 -> 1
        (encoded(Image.fromarray(np.full((4, 6), 128, np.uint16))), (0, 0, 0)),
        (encoded(Image.fromarray(np.full((4, 6), 129, np.uint16))), (1, 1, 1)),
        (encoded(solid(1, "1")), (255, 255, 255)),
        (encoded(solid((0, 255, 255, 0), "CMYK"), "TIFF"), (255, 0, 0)),
        (encoded(solid((0, 0, 0, 255), "CMYK"), "TIFF"), (0, 0, 0)),
        (GOOD["first.gif"], (0, 0, 255)),
    ],
)
def test_every_mode_becomes_the_right_colour(content, expected):
    pixels = read_picture(content)
    assert pixels.shape == (3, 4, 6)
    assert pixels.dtype == np.uint8
    assert (pixels == np.array(expected).reshape(3, 1, 1)).all()


def test_luma_is_itu_601():
    # 0.299 * 255 = 76.2, 0.587 * 255 = 149.7, 0.114 * 255 = 29.1
    for colour, grey in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)):
        pixels = read_picture(encoded(solid(colour)), channels=1)
        assert pixels.shape == (1, 4, 6)
        assert (pixels == grey).all()


def test_exif_orientation_turns_pixels_and_header():
    header = read_header(oriented())
    pixels = read_picture(oriented(), channels=1)
    assert (header.width, header.height, header.grey) == (8, 16, True)
    assert pixels.shape == (1, 16, 8)
    # turned clockwise, the left half is on top; 4 rows off the edge JPEG is exact within 3
    assert pixels[0, :4].max() <= 3
    assert pixels[0, 12:].min() >= 252


def test_size_crops_the_centre_and_smooths():
    stripes = np.zeros((8, 16, 3), np.uint8)
    stripes[:, ::2] = 254
    stripes[:, :4] = stripes[:, 12:] = (255, 0, 0)  # outside of the centred 8x8 square
    pixels = read_picture(encoded(Image.fromarray(stripes)), size=2)
    assert pixels.shape == (3, 2, 2)
    # the mean of one-pixel stripes is 127 (13 off by the kernel's edge); without antialiasing it
    # would be 0 or 254, and the red borders would part the channels
    assert np.abs(pixels.astype(int) - 127).max() <= 16
    assert (pixels[0] == pixels[1]).all()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"no picture at all", "not an image"),
        (BAD["truncated.png"], "truncated"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
        (encoded(solid(0.5, "F"), "TIFF"), "floating-point pixels"),
        (encoded(Image.fromarray(np.full((4, 6), 70000, np.int32)), "TIFF"), "outside 0..65535"),
        (None, "no picture"),
    ],
)
def test_bad_pictures_say_why(content, reason):
    with pytest.raises(BadPictureError, match=reason):
        read_picture(content)


@pytest.mark.parametrize("times", [1.5, 3])  # Pillow itself only warns up to twice the limit
def test_decompression_bomb_is_refused(monkeypatch, times):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(24 / times))
    with pytest.raises(BadPictureError, match="decompression bomb"):
        read_header(encoded(solid((1, 2, 3))))


def test_zoo_keeps_the_good_and_names_the_bad(zoo):
    with pytest.warns(UserWarning, match=r"skipped 3 in folder:zoo: .*empty\.png \(empty file\)"):
        data = load(f"folder:{zoo}", split="all")
    reasons = dict(data.skipped)
    assert reasons.keys() == BAD.keys()
    assert reasons["empty.png"] == "empty file"
    assert reasons["renamed.png"] == "not an image"
    assert "truncated" in reasons["truncated.png"]
    assert data.shape == (3, 4, 6)
    assert len(data) == 5
    assert data.images[:, :, 0, 0].tolist().count([128, 128, 128]) == 1
    assert data.slug == "folder-zoo"


def test_warning_names_five_and_counts_the_rest(tmp_path):
    files = coloured(1) | {f"bad{i}.png": b"" for i in range(8)}
    with pytest.warns(UserWarning, match=r"skipped 8 .*bad4\.png \(empty file\) and 3 more$"):
        load(f"folder:{write_folder(tmp_path, files)}", split="all")


@pytest.mark.parametrize(
    "files, error, message",
    [
        (None, FileNotFoundError, r"no folder .*/missing/"),
        ({"a.txt": b"x", "b/c/d.md": b"x"}, FileNotFoundError, r"no images in .*/ \(looked for "
         r"\.png, \.jpg, .* in 3 folders\)"),
        (BAD, ValueError, r"no readable image in folder:missing: all 3 files are bad"),
        ({"a.png": encoded(solid(0, "L")), "b.png": encoded(solid(0, "L", (9, 9)))},
         ValueError, r"mixed sizes: 6x4 \(1\), 9x9 \(1\); pass --size"),
        ({"a.png": encoded(solid(0, "L")), "metadata.csv": b"file,caption\na.png,x\n"},
         ValueError, r"metadata\.csv needs the columns file_name and text, found: file, caption"),
        ({"a.png": encoded(solid(0, "L")), "metadata.csv": b"file_name,text\nz.png,x\n"},
         ValueError, r"no row of .*metadata\.csv gives a text to any of the 1 images"),
        ({"a.png": encoded(solid(0, "L")), "metadata.csv": b"file_name,text\na.png,\xff\xfe\n"},
         ValueError, r"metadata\.csv is not a UTF-8"),
    ],
)  # fmt: skip
def test_unusable_folders_fail_in_one_sentence(tmp_path, files, error, message):
    folder = tmp_path / "missing"
    if files is not None:
        write_folder(folder, files)
    with pytest.raises(error, match=message) as caught:
        load(f"folder:{folder}")
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load(f"folder:{tmp_path / 'a.zip'}")


def test_mixed_sizes_with_size_and_a_damaged_one_has_no_say(tmp_path):
    mixed = {"a.png": encoded(solid((1, 2, 3))), "b.png": encoded(solid((1, 2, 3), size=(9, 5)))}
    data = load(f"folder:{write_folder(tmp_path / 'mixed', mixed)}", size=5, split="all")
    assert data.shape == (3, 5, 5)
    assert (data.images == np.array([1, 2, 3]).reshape(3, 1, 1)).all()
    # a truncated colour picture of another size neither makes the rest mixed nor coloured
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    one = {"a.png": encoded(solid(9, "L")), "b.png": encoded(Image.fromarray(noise))[:2000]}
    with pytest.warns(UserWarning, match=r"skipped 1"):
        data = load(f"folder:{write_folder(tmp_path / 'one', one)}", split="all")
    assert data.shape == (1, 4, 6)


def test_mixed_grey_and_colour_is_colour_unless_told(tmp_path):
    folder = write_folder(tmp_path, {"a.png": encoded(solid(9, "L")), **coloured(1)})
    assert load(f"folder:{folder}", split="all").shape == (3, 4, 6)
    assert load(f"folder:{folder}", split="all", channels=1).shape == (1, 4, 6)


def test_class_folders(tmp_path):
    files = {f"{c}/{n}": b for c in ("cat", "dog") for n, b in coloured(5).items()}
    data = load(f"folder:{write_folder(tmp_path, files)}", split="all")
    assert data.classes == ("cat", "dog")
    # the red value is the number within the class, so labels follow the pixels
    assert sorted(zip(data.labels.tolist(), data.images[:, 0, 0, 0].tolist())) == [
        (c, i) for c in range(2) for i in range(5)
    ]
    (tmp_path / "loose.png").write_bytes(encoded(solid((1, 1, 1))))
    assert load(f"folder:{tmp_path}").labels is None


def test_own_train_and_test_folders(tmp_path):
    images = list(coloured(4).values())
    files = {"train/x/a.png": images[0], "train/y/b.png": images[1],
             "test/x/c.png": images[2], "test/y/d.png": images[3]}  # fmt: skip
    write_folder(tmp_path, files)
    train, test = (load(f"folder:{tmp_path}", split=split) for split in ("train", "test"))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1]
    assert test.images[:, 0, 0, 0].tolist() == [2, 3]
    assert train.classes == test.classes == ("x", "y")
    assert test.labels.tolist() == [0, 1]


def test_captions_with_missing_unknown_and_repeated_rows(tmp_path):
    rows = 'file_name,text\n./00.png,zero\n01.png,"one, or so"\n01.png,again\n77.png,who\n02.png,\n'
    folder = write_folder(tmp_path, coloured(4) | {"metadata.csv": rows.encode("utf-8-sig")})
    with pytest.warns(UserWarning, match="skipped 4"):
        data = load(f"folder:{folder}", split="all")
    by_red = dict(zip(data.images[:, 0, 0, 0].tolist(), data.captions))
    assert by_red == {0: "zero", 1: "one, or so"}
    assert dict(data.skipped) == {
        "01.png": "repeated in metadata.csv; the first row is used",
        "02.png": "no text in metadata.csv",
        "03.png": "no text in metadata.csv",
        "77.png": "in metadata.csv, but there is no such image",
    }


def test_links_are_followed_once(tmp_path):
    write_folder(tmp_path / "images", coloured(2))
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"skipped 1 in folder:images: gone\.png"):
        assert len(load(f"folder:{tmp_path / 'images'}", split="all")) == 2


def test_cache_is_a_reused_memory_map(zoo, tmp_path, monkeypatch):
    cache, calls = tmp_path / "cache", []
    with pytest.warns(UserWarning, match="skipped 3"):
        plain = load(f"folder:{zoo}", split="all")
    with pytest.warns(UserWarning, match="skipped 3"):
        first = load(
            f"folder:{zoo}", split="all", cache=cache, progress=lambda *at: calls.append(at)
        )
    assert calls == [(i, 8) for i in range(1, 9)]
    (kept,) = cache.iterdir()
    assert sorted(p.name for p in kept.iterdir()) == ["images.npy", "index.json"]
    monkeypatch.setattr("rectiflow.training.data.decoding.read_header", None)  # not to be called
    with pytest.warns(UserWarning, match="skipped 3"):
        second = load(f"folder:{zoo}", split="all", cache=cache)
    for data in (first, second):
        assert isinstance(data.images.base, np.memmap) or isinstance(data.images, np.memmap)
        assert not data.images.flags.writeable
        assert (data.images == plain.images).all()
        assert data.skipped == plain.skipped
    assert torch.equal(second.batch([4, 0]), plain.batch([4, 0]))


def test_cache_follows_changes(tmp_path):
    folder, cache = write_folder(tmp_path / "images", coloured(5)), tmp_path / "cache"

    def red(**options):
        return load(f"folder:{folder}", split="all", cache=cache, **options).images[:, 0, 0, 0]

    assert sorted(red()) == [0, 1, 2, 3, 4]
    before = (folder / "03.png").stat()
    (folder / "03.png").write_bytes(encoded(solid((99, 0, 0))))
    os.utime(folder / "03.png", ns=(0, before.st_mtime_ns + 1))
    assert sorted(red()) == [0, 1, 2, 4, 99]
    (folder / "00.png").unlink()
    assert sorted(red()) == [1, 2, 4, 99]
    red(size=4)
    red(channels=1)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damaged", ["images.npy", "index.json"])
def test_damaged_cache_is_made_again(tmp_path, damaged):
    folder, cache = write_folder(tmp_path / "images", coloured(5)), tmp_path / "cache"
    load(f"folder:{folder}", cache=cache)
    (file,) = cache.glob(f"*/{damaged}")
    file.write_bytes(file.read_bytes()[:100])
    assert sorted(load(f"folder:{folder}", cache=cache, split="all").images[:, 0, 0, 0]) == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_large_folders_are_mapped_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr("rectiflow.training.data.decoding.IN_MEMORY", 100)
    monkeypatch.delenv("RECTIFLOW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data = load(f"folder:{write_folder(tmp_path / 'images', coloured(5))}")
    assert not data.images.flags.writeable
    assert list((tmp_path / "home").rglob("folder-images-*/images.npy"))


def test_failure_while_decoding_leaves_no_cache(tmp_path):
    folder, cache = write_folder(tmp_path / "images", coloured(5)), tmp_path / "cache"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(f"folder:{folder}", cache=cache, progress=stop)
    assert list(cache.iterdir()) == []


def test_two_processes_may_decode_at_once(tmp_path, monkeypatch):
    folder, cache = write_folder(tmp_path / "images", coloured(5)), tmp_path / "cache"
    real = os.replace

    def slower(source, target):
        if os.path.isdir(source):
            # The other process is done in the moment before this one puts its folder there.
            monkeypatch.setattr(os, "replace", real)
            load(f"folder:{folder}", split="all", cache=cache)
        real(source, target)

    monkeypatch.setattr(os, "replace", slower)
    found = load(f"folder:{folder}", split="all", cache=cache)
    assert sorted(found.images[:, 0, 0, 0]) == [0, 1, 2, 3, 4]
    assert len(list(cache.iterdir())) == 1


def test_a_full_disk_is_no_other_process(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", coloured(5))

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        load(f"folder:{folder}", cache=tmp_path / "cache")
