"""Images whose last part was never written: copy tools and file systems leave zeros there after a power loss."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.watch.factory import Work
from yolov12.watch.samples import UnusableError, check_image

PICTURE = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8), (0, 0), 1.2)
KEPT = (0.2, 0.5, 0.9)  # fractions of the file


def encoded(kind="JPEG", mode="RGB", **options):
    data = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(data, kind, **options)
    return data.getvalue()


def zeros_at_end(data, fraction):
    kept = int(len(data) * fraction)
    return data[:kept] + bytes(len(data) - kept)


def with_segment(data, content):
    """Put an APP1 segment after the start marker, as cameras do with their EXIF data."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


def thumbnail():
    data = io.BytesIO()
    Image.fromarray(PICTURE[:60, :80]).save(data, "JPEG")
    return data.getvalue()


def restarts():
    return cv2.imencode(".jpg", PICTURE, [cv2.IMWRITE_JPEG_RST_INTERVAL, 4, cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def fill_bytes():
    data = encoded(quality=95)
    table = data.index(b"\xff\xdb")
    scan = data.index(b"\xff\xda")
    return data[:table] + b"\xff\xff\xff" + data[table:scan] + b"\xff" + data[scan:-2] + b"\xff" + data[-2:]


JPEGS = {
    **{f"quality {quality}": encoded(quality=quality) for quality in (50, 95, 100)},
    "progressive": encoded(quality=95, progressive=True),
    "grey": encoded(mode="L", quality=95),
    "CMYK": encoded(mode="CMYK", quality=95),
    "progressive CMYK": encoded(mode="CMYK", progressive=True),
    "restart markers": restarts(),
    "fill bytes": fill_bytes(),
    "thumbnail": with_segment(encoded(quality=95), b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail()),
    "comment": with_segment(encoded(quality=95), b"\xff\xda\xff\xd9"),
    "several images": encoded("MPO", save_all=True, append_images=[Image.fromarray(PICTURE[:60, :80])]),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_is_taken_if_it_is_whole(name):
    data = JPEGS[name]
    for trailer in (b"", b"maker note", bytes(100_000)):
        check_image(data + trailer)
    for kept in KEPT:
        for part in (zeros_at_end(data, kept), data[: int(len(data) * kept)]):
            if name == "several images" and part.startswith(data[: data.index(b"\xff\xd9", data.index(b"\xff\xda"))]):
                continue  # its first image, which a training reads, is whole
            with pytest.raises(UnusableError, match="the image is incomplete: its JPEG data have no end marker"):
                check_image(part)


def test_decoders_see_nothing_wrong_in_a_jpeg_that_ends_in_zeros():
    part = zeros_at_end(encoded(quality=95), 0.5)
    with Image.open(io.BytesIO(part)) as image:
        image.load()
    assert cv2.imdecode(np.frombuffer(part, np.uint8), cv2.IMREAD_COLOR) is not None


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "TIFF", "compression": "tiff_lzw"}], ids=["PNG", "TIFF"])
def test_checksums_and_directories_show_zeros_at_the_end_of_other_formats(options):
    check_image(encoded(**options))
    for kept in KEPT:
        with pytest.raises(UnusableError, match="cannot be decoded"):
            check_image(zeros_at_end(encoded(**options), kept))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "WEBP"])
def test_zeros_at_the_end_of_formats_without_checksums_cannot_be_told_from_an_image(kind):
    for kept in KEPT:  # a TIFF without compression is meant
        check_image(zeros_at_end(encoded(kind), kept))
    with pytest.raises(UnusableError, match="cannot be decoded"):
        check_image(encoded(kind)[:-2])  # a file that was cut is known by its size


def test_a_jpeg_that_ends_in_zeros_is_set_aside_and_taken_when_it_is_sent_whole(factory):
    whole = encoded(quality=95)
    watch = factory.watch(Work())
    for data in (zeros_at_end(whole, 0.5), whole):
        (factory.inbox / "a.jpg").write_bytes(data)
        (factory.inbox / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
        watch.step()
    (note,) = (factory.work / "rejected").glob("*.reason.txt")
    assert note.read_text().startswith("a.jpg: the image is incomplete: ")
    (image,) = (factory.work / "dataset" / "images").rglob("*.jpg")
    assert image.read_bytes() == whole
