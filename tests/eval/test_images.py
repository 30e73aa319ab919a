"""The reader: every rule about a source, an order or a pixel."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_nets import Pooled, coloured
from PIL import Image

from diffaccel.errors import OptionError
from diffaccel.eval import fid, open_images
from diffaccel.eval.features import extract, get
from diffaccel.eval.images import natural
from diffaccel.eval.pixels import ImageError, from_item, from_pil

X = coloured(12, seed=3)


def folder(path: Path, images: np.ndarray = X, suffix: str = "png", **options: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(images):
        Image.fromarray(x).save(path / f"{i}.{suffix}", **options)
    return path


def everything(images) -> np.ndarray:
    return np.stack(list(images))


def sources(tmp: Path) -> dict[str, object]:
    """The same images in every accepted form."""
    f = folder(tmp / "f")
    with zipfile.ZipFile(tmp / "z.zip", "w") as z:
        for file in sorted(f.iterdir(), reverse=True):
            z.write(file, f"inside/{file.name}")
        z.writestr("inside/notes.txt", "no image")
    np.savez(tmp / "arr_0.npz", X)
    np.savez(tmp / "named.npz", images=X, labels=np.arange(12))
    np.save(tmp / "nhwc.npy", X)
    np.save(tmp / "nchw.npy", X.transpose(0, 3, 1, 2))
    chw = torch.from_numpy(X).permute(0, 3, 1, 2)
    return {
        "folder": f,
        "zip": tmp / "z.zip",
        "npz": str(tmp / "arr_0.npz"),
        "npz, one 4-D array": tmp / "named.npz",
        "npy": tmp / "nhwc.npy",
        "npy, channels first": tmp / "nchw.npy",
        "array": X,
        "PIL": [Image.fromarray(x) for x in X],
        "uint8 tensor": chw,
        "float tensor": chw.float() / 255,
        "float array, as diffusers' output_type='np'": X.astype(np.float32) / 255,
        "tuples": [(Image.fromarray(x), i) for i, x in enumerate(X)],
        "dicts": [{"image": t, "label": 0} for t in chw],
        "data set": torch.utils.data.TensorDataset(chw),
        "arrays": list(X),
        "files": [f / f"{i}.png" for i in range(12)],
    }


def test_the_same_images_in_every_form(tmp_path: Path) -> None:
    """Acceptance 8: identical features, whatever the images come in."""
    want = extract(open_images(X), get(Pooled())).values
    for name, source in sources(tmp_path).items():
        images = open_images(source)
        assert len(images) == 12, name
        assert (everything(images) == X).all(), name
        assert torch.equal(extract(images, get(Pooled()), batch=5, workers=2).values, want), name


def test_order(tmp_path: Path) -> None:
    """Relative POSIX path, numbers by value; the suffix in any case; other files do not count."""
    names = ["10.png", "2.PNG", "a/1.jpeg", "a/01.jpeg", "a-b/3.webp", "b.bmp", "c.tiff", "d.ppm", "x.txt", "y.gif"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(("txt", "gif")):
            (tmp_path / name).write_bytes(b"x")
        else:
            Image.fromarray(X[0]).save(tmp_path / name)
    images = open_images(tmp_path)
    assert images.names == ["2.PNG", "10.png", "a-b/3.webp", "a/01.jpeg", "a/1.jpeg", "b.bmp", "c.tiff", "d.ppm"]
    assert images.jpeg == 2
    assert sorted(["img12", "img2", "img1"], key=natural) == ["img1", "img2", "img12"]


def test_numbers_are_those_of_ascii() -> None:
    assert sorted(["1\u00b22.png", "10.png", "2.png"], key=natural) == ["1\u00b22.png", "2.png", "10.png"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere", X[:2])
    f = folder(tmp_path / "f", X[:1])
    (f / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(f)
    (f / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert open_images(f).names == ["0.png", "linked/0.png", "linked/1.png"]


def test_float_is_rounded_as_diffusers_does() -> None:
    from diffusers.image_processor import VaeImageProcessor

    x = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    x[0, 0, 0, :4] = torch.tensor([128 / 255 - 1e-7, 0.999, 0.5 / 255, 1.5 / 255])
    want = VaeImageProcessor.numpy_to_pil(x.permute(0, 2, 3, 1).numpy())[0]
    got = open_images(x)[0]
    assert (got == np.asarray(want)).all()
    assert got[0, :4, 0].tolist() == [128, 255, 0, 2]  # half to even; truncation gives 127 and 254
    assert (open_images(x.half())[0] == open_images(x.half().float())[0]).all()
    assert (open_images(x.bfloat16())[0] == open_images(x.bfloat16().float())[0]).all()
    assert open_images(x + 9e-4)[0].max() == 255


def test_a_saved_png_gives_the_same_fid(tmp_path: Path) -> None:
    x = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    from diffusers.image_processor import VaeImageProcessor

    for i, image in enumerate(VaeImageProcessor.numpy_to_pil(x.permute(0, 2, 3, 1).numpy())):
        image.save(tmp_path / f"{i}.png")
    one, two = (fid(s, coloured(30), features=Pooled()) for s in (x, tmp_path))
    assert (one.value, one.raw, one.low) == (two.value, two.raw, two.low)


def test_wrong_ranges_are_named() -> None:
    x = torch.rand(3, 3, 8, 8)
    x[1] = x[1] * 2 - 1
    with pytest.raises(ImageError, match=r"image 1 of Tensor\(3, 3, 8, 8\).*\[-1, 1\]: pass \(x \+ 1\) / 2"):
        list(open_images(x))
    with pytest.raises(ImageError, match="NaN"):
        open_images(torch.full((1, 3, 8, 8), float("nan")))[0]
    with pytest.raises(ImageError, match=r"from 0 to 255"):
        open_images(torch.tensor([0.0, 255.0]).repeat(1, 3, 8, 4))[0]
    with pytest.raises(ImageError, match=r"uint8, or float.*int64"):
        open_images(torch.ones(1, 3, 8, 8, dtype=torch.int64))[0]
    with pytest.raises(ImageError, match="1 or 3 channels"):
        open_images(torch.rand(1, 4, 8, 8))[0]


def test_grayscale_palette_cmyk_and_sixteen_bits(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    want = np.repeat(grey[..., None], 3, 2)
    assert (from_pil(Image.fromarray(grey)) == want).all()
    assert (open_images(torch.from_numpy(grey)[None, None])[0] == want).all()
    assert (from_item(grey) == want).all()
    colour = Image.fromarray(X[0])
    palette = colour.convert("P")
    assert (from_pil(palette) == np.asarray(palette.convert("RGB"))).all()
    assert (from_pil(colour.convert("CMYK")) == np.asarray(colour.convert("CMYK").convert("RGB"))).all()
    deep = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (open_images(tmp_path)[0] == want).all()  # Pillow's own convert gives white from 256 on
    assert (from_pil(Image.fromarray(deep.astype(np.int32))) == want).all()
    assert (from_pil(Image.fromarray(grey.astype(np.float32) / 255)) == want).all()
    with pytest.raises(ImageError, match="70000"):
        from_pil(Image.fromarray(np.full((4, 4), 70000, np.int32)))


def test_alpha(tmp_path: Path) -> None:
    rgba = np.concatenate([np.full((8, 8, 3), 100, np.uint8), np.full((8, 8, 1), 255, np.uint8)], 2)
    assert (from_pil(Image.fromarray(rgba)) == 100).all()  # opaque: nothing to decide
    rgba[:4, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "t.png")
    with pytest.raises(ImageError, match=r"t\.png.*transparent.*alpha="):
        open_images(tmp_path)[0]
    for alpha, top in (("white", 255), ("black", 0), ("drop", 100)):
        got = open_images(tmp_path, alpha=alpha)[0]
        assert (got[:4] == top).all() and (got[4:] == 100).all()
    indexed = Image.fromarray(X[0]).convert("P")
    indexed.info["transparency"] = indexed.getpixel((0, 0))
    with pytest.raises(ImageError, match="transparent"):
        from_pil(indexed)
    with pytest.raises(OptionError, match="drop, white"):
        open_images(tmp_path, alpha="grey")


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(X[0][:8])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "r.png", exif=exif)
    assert (open_images(tmp_path)[0] == np.rot90(X[0][:8], -1)).all()


def test_unreadable_files(tmp_path: Path) -> None:
    f = folder(tmp_path, coloured(20))
    good = (f / "0.png").read_bytes()
    for i in range(3, 16):
        (f / f"{i}.png").write_bytes(good[: len(good) // 2] if i % 2 else b"nonsense")
    with pytest.raises(ImageError) as error:
        list(open_images(f).batches(4))
    text = str(error.value)
    assert text.startswith("13 images cannot be used") and text.endswith("and 3 more")
    assert text.count(".png") - text.count("cannot identify") >= 10 and "12.png" in text and "13.png" not in text
    kept = open_images(f, unreadable="skip")
    assert len(kept) == 7 and len(kept.skipped) == 13
    score = fid(f, X, features=Pooled(), unreadable="skip")
    assert any("13 unreadable images skipped" in w for w in score.warnings)
    for i in (*range(3), *range(16, 20)):
        (f / f"{i}.png").unlink()
    with pytest.raises(ImageError, match="13 images"):
        open_images(f, unreadable="skip")


def test_sources_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(ImageError, match="no file or folder"):
        open_images(tmp_path / "absent")
    with pytest.raises(OptionError, match="cannot read images from int"):
        open_images(3)
    with pytest.raises(ImageError, match="4-D"):
        open_images(torch.rand(3, 8, 8))
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(OptionError, match="statistics"):
        open_images(tmp_path / "s.npz")
    np.savez(tmp_path / "two.npz", a=X, b=X)
    with pytest.raises(ImageError, match="exactly one 4-D array; it holds a, b"):
        open_images(tmp_path / "two.npz")
    for name in ("cut.zip", "cut.npz", "cut.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nonsense")
        with pytest.raises(ImageError, match=f"cannot read .*{name}"):
            open_images(tmp_path / name)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.mp4"):
        open_images(tmp_path / "a.mp4")
    with pytest.raises(ImageError, match='key "image"'):
        open_images([{"picture": X[0]}])[0]
    with pytest.raises(ImageError, match="not an image: int"):
        from_item(3)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    file = folder(tmp_path / "f", X[:1]) / "0.png"
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.write(file, "0.png")
    data = bytearray((tmp_path / "z.zip").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag in the list of contents
    (tmp_path / "z.zip").write_bytes(data)
    with pytest.raises(ImageError, match=r"z\.zip is encrypted: unpack it"):
        open_images(tmp_path / "z.zip")


def test_mixed_sizes(tmp_path: Path) -> None:
    """Allowed with a note where the features resize; an error that names the sizes where they do not."""
    f = folder(tmp_path / "f", X)
    Image.fromarray(coloured(1, size=32)[0]).save(f / "z.png")
    with pytest.raises(OptionError, match=r"16x16, 32x32"):
        fid(f, X, features=Pooled())
    network = get(Pooled())
    resizing = type(network)("resized", 12, lambda x: network.prepare(x[:16, :16]), network.net)
    score = fid(f, X, features=resizing)
    assert any("2 image sizes (12 of 16x16, 1 of 32x32)" in note for note in score.notes)


def test_jpeg_on_one_side_duplicates_and_too_few(tmp_path: Path) -> None:
    png, jpeg = folder(tmp_path / "png"), folder(tmp_path / "jpg", suffix="jpg", quality=90)
    warned = fid(jpeg, png, features=Pooled()).warnings
    assert "12 JPEG files" in warned[0]
    many = folder(tmp_path / "many", coloured(24), suffix="jpg", quality=90)
    assert "JPEG" not in " ".join(fid(many, many, features=Pooled()).warnings)
    score = fid(np.concatenate([X, X[:3]]), X, features=Pooled(), expected=20)
    assert any("3 of 15 images are duplicates" in w for w in score.warnings)
    assert any("15 images where 20 were expected" in w for w in score.warnings)
    enough = coloured(24)
    assert fid(enough, coloured(24, 1), features=Pooled(), expected=24).warnings == ()


def test_zip_may_hold_a_file_that_is_no_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(X[0]).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("a.png", buffer.getvalue())
        z.writestr("b.png", b"nonsense")
    with pytest.raises(ImageError, match=r"b\.png of .*z\.zip"):
        list(open_images(tmp_path / "z.zip").batches())
