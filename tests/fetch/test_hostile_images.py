"""More than three hundred broken or hostile files through the decoding processes, and processes that die."""

import asyncio
import contextlib
import fcntl
import io
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Sequence

import psutil
import pytest
from PIL import Image

from curate.errors import StageError
from curate.fetch.decoder_pool import DecoderPool
from curate.fetch.images import ImageSettings, process
from curate.fetch.outcome import Picture
from tests.fetch.conftest import encoded, scene

SETTINGS = ImageSettings(64, max_pixels=50_000_000)
BROKEN = ("decode_error", "not_image", "too_many_pixels", "ok")  # a flipped bit may leave a picture
DAMAGE = {  # and what may come of it
    "cut": ("decode_error",), "changed": BROKEN, "changed header": BROKEN,
    "removed": ("decode_error", "too_many_pixels", "ok"), "repeated": ("decode_error", "ok"),
}  # fmt: skip
WHOLE_WHEN_CUT = ("animation", "palette")  # the cut lies behind the first frame, or in a chunk that nobody needs
Files = list[tuple[str, bytes, tuple[str, ...]]]


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG with this header and this compressed data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_sized(width: int, height: int) -> bytes:
    """A real JPEG whose frame header claims another size."""
    data = bytearray(encoded(scene()))
    at = data.find(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def bombs() -> Files:
    """Small files that claim, or become, very large pictures."""
    huge = ("too_many_pixels",)
    zeros = zlib.compress(bytes(30_000_000), 9)
    gif = bytearray(encoded(scene(), "GIF"))
    struct.pack_into("<HH", gif, 6, 65_500, 65_500)
    frame = bytearray(encoded(scene(), "GIF"))
    at = frame.find(b"\x2c", 13 + 3 * 256 if frame[10] & 0x80 else 13)
    struct.pack_into("<HH", frame, at + 5, 65_500, 65_500)
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16_382).to_bytes(3, "little") * 2
    vp8 = bytearray(encoded(scene(), "WEBP"))
    at = vp8.find(b"VP8 ")
    struct.pack_into("<HH", vp8, at + 14, 16_383, 16_383)
    vp8l = bytearray(encoded(scene(), "WEBP", lossless=True))
    struct.pack_into("<I", vp8l, vp8l.find(b"VP8L") + 9, 0x0FFFFFFF)
    bmp = bytearray(encoded(scene(), "BMP"))
    struct.pack_into("<ii", bmp, 18, 65_500, -65_500)
    tiff = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(tiff, "TIFF", compression="group4")
    avif = bytearray(encoded(scene(), "AVIF"))
    struct.pack_into(">II", avif, avif.find(b"ispe") + 8, 65_500, 65_500)
    return [
        ("png 65500", png(65_500, 65_500, 8, 2, zeros), huge),
        ("png 1 bit", png(60_000, 60_000, 1, 0, zeros), huge),
        ("png 20000 real", png(20_000, 20_000, 1, 0, zlib.compress(bytes(20_000 * 2501), 9)), huge),
        ("png max", png(2**31 - 1, 2**31 - 1, 16, 6, zeros), huge),
        ("png beyond", png(2**32 - 1, 2**32 - 1, 16, 6, zeros), huge),
        ("png zero", png(0, 10, 8, 2, zeros), ("decode_error",)),
        ("png too much data", png(8, 8, 8, 2, zeros), ("ok", "decode_error")),
        ("png too little data", png(4000, 4000, 8, 2, zlib.compress(b"\0" * 100)), ("decode_error",)),
        ("png no data", png(64, 64, 8, 2, b""), ("decode_error",)),
        ("png no palette", png(64, 64, 8, 3, zlib.compress(bytes(65 * 64))), ("ok", "decode_error")),
        ("png text bomb", png(8, 8, 8, 0, zlib.compress(bytes(72)), chunk(b"zTXt", b"a\0\0" + zeros) * 40), ("ok",)),
        ("png profile bomb", png(8, 8, 8, 0, zlib.compress(bytes(72)), chunk(b"iCCP", b"a\0\0" + zeros)), ("ok",)),
        ("jpeg 65500", jpeg_sized(65_500, 65_500), huge),
        ("jpeg wide", jpeg_sized(65_500, 8), ("ok", "decode_error")),
        ("jpeg no height", jpeg_sized(100, 0), ("decode_error",)),
        ("jpeg larger than its data", jpeg_sized(6000, 6000), ("ok", "decode_error")),
        ("gif 65500 screen", bytes(gif), huge),
        ("gif 65500 frame", bytes(frame), (*huge, "decode_error")),
        ("webp canvas", b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x, (*huge, "decode_error")),
        ("webp lossy", bytes(vp8), (*huge, "decode_error")),
        ("webp lossless", bytes(vp8l), (*huge, "decode_error")),
        ("bmp 65500", bytes(bmp), huge),
        ("tiff fax", tiff.getvalue(), huge),
        ("avif 65500", bytes(avif), (*huge, "decode_error")),
    ]


def strangers(jpeg: bytes) -> Files:
    """Other formats, polyglots, and things that only look like pictures."""
    icc = b"\xff\xe2" + struct.pack(">H", 40) + b"ICC_PROFILE\0\x01\x01" + b"\xff" * 24
    exif_loop = b"\xff\xe1\x00\x24Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x04\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0"
    not_image: Files = [
        (name, data, ("not_image",)) for name, data in {
            "html": b"<!DOCTYPE html><html></html>", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "svg entity": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'aaaa'>]><svg>&a;</svg>", "pdf": b"%PDF-1.7\n",
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n", "zip": b"PK\x03\x04" + bytes(40), "psd": b"8BPS" + bytes(40),
            "ico": b"\0\0\x01\0\x01\0" + bytes(40), "mp4": b"\0\0\0\x18ftypmp42" + bytes(40), "elf": b"\x7fELF",
            "jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "fli": bytes(4) + b"\x12\xaf" + bytes(200), "one": b"\xff",
            "ppm": b"P6\n9999 9999\n255\n", "xbm": b"#define x_width 9999\n", "bm": b"BM", "script": b"#!/bin/sh\nid\n",
            "heic": b"\0\0\0\x18ftypheic" + bytes(40), "wav": b"RIFF\x24\0\0\0WAVEfmt ",
            "tar": bytes(600), "sgi": b"\x01\xda",
        }.items()
    ]  # fmt: skip
    return [
        *not_image,
        ("jpeg + zip", jpeg + b"PK\x03\x04" + bytes(5000), ("ok",)),
        ("jpeg + html", jpeg + b"<script>alert(1)</script>", ("ok",)),
        ("gif with script", b"GIF89a/*" + bytes(30) + b"*/=1;alert(1)", BROKEN),
        ("jpeg broken profile", jpeg[:2] + icc + jpeg[2:], ("ok",)),
        ("jpeg looping exif", jpeg[:2] + exif_loop + jpeg[2:], ("ok", "decode_error")),
        ("jpeg many segments", jpeg[:2] + b"\xff\xfe\x00\x02" * 200_000 + jpeg[2:], ("ok",)),
        ("jpeg only head", jpeg[:20], ("decode_error",)),
        ("jpeg without end", jpeg[:-2], ("ok", "decode_error")),
        ("jpeg half", jpeg[: len(jpeg) // 2], ("decode_error",)),
        ("jpeg half with end", jpeg[: len(jpeg) // 2] + b"\xff\xd9", ("decode_error",)),
        ("jpeg no tables", jpeg.replace(b"\xff\xc4", b"\xff\xfe"), ("ok", "decode_error")),
        ("arithmetic", jpeg.replace(b"\xff\xc0", b"\xff\xc9"), ("ok", "decode_error")),
        ("lossless", jpeg.replace(b"\xff\xc0", b"\xff\xc3"), ("decode_error",)),
        ("gif header", b"GIF89a", ("decode_error",)),
        ("gif no frame", b"GIF89a\x0a\0\x0a\0\0\0\0;", ("decode_error",)),
        ("tiff header", b"II*\0\x08\0\0\0", ("decode_error",)),
        ("tiff loop", b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + bytes(12) + struct.pack("<I", 8), ("decode_error",)),
        ("bmp header", b"BM" + bytes(12) + struct.pack("<I", 40) + bytes(8), ("decode_error",)),
        ("webp header", b"RIFF\x04\0\0\0WEBP", ("decode_error",)),
        ("avif header", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(30), ("decode_error",)),
        ("png signature", b"\x89PNG\r\n\x1a\n", ("decode_error",)),
    ]  # fmt: skip


def mutants() -> Files:
    """Valid files with bytes changed, removed, repeated or cut, from fixed seeds."""
    image = scene(60, 40)
    sound = {
        "jpeg": encoded(image), "progressive": encoded(image, progressive=True), "cmyk": encoded(image.convert("CMYK")),
        "png": encoded(image, "PNG"), "palette": encoded(image.quantize(16), "PNG"), "gif": encoded(image, "GIF"),
        "webp": encoded(image, "WEBP"), "lossless": encoded(image, "WEBP", lossless=True), "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"), "lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "avif": encoded(image, "AVIF"),
        "animation": encoded(image, "GIF", save_all=True, append_images=[scene(60, 40, 1)]),
    }  # fmt: skip
    files: Files = []
    for kind, data in sound.items():
        for seed in range(26):
            rng = random.Random(f"{kind}{seed}")
            changed = bytearray(data)
            how = list(DAMAGE)[seed % len(DAMAGE)]
            if how == "cut":
                changed = changed[: rng.randrange(4, len(changed))]
            elif how == "changed":
                for _ in range(rng.randrange(1, 20)):
                    changed[rng.randrange(4, len(changed))] = rng.randrange(256)
            elif how == "changed header":  # where sizes and offsets are
                for _ in range(rng.randrange(1, 6)):
                    changed[rng.randrange(4, min(64, len(changed)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif how == "removed":
                at = rng.randrange(4, len(changed))
                del changed[at : at + rng.randrange(1, 40)]
            else:
                at = rng.randrange(4, len(changed))
                changed[at:at] = changed[at : at + 200] * rng.randrange(1, 5)
            whole = ("ok",) if how == "cut" and kind in WHOLE_WHEN_CUT else ()
            files.append((f"{kind} {how} {seed}", bytes(changed), (*DAMAGE[how], *whole)))
    return files


def decoders() -> list[psutil.Process]:
    """The decoder processes of this one; it may have other children, such as the Ray cluster of other tests."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("curate.fetch.decoder" in word for word in child.cmdline()):
                found.append(child)
    return found


def decode_all(
    bodies: Sequence[bytes], settings: ImageSettings = SETTINGS, count: int = 2
) -> tuple[list[Picture], float]:
    """Through real processes; also their peak memory in MB."""

    async def go() -> tuple[list[Picture], float]:
        pool = DecoderPool(settings, count, 5_000_000)
        peak = 0.0

        async def watch() -> None:
            nonlocal peak
            while True:
                for child in decoders():
                    peak = max(peak, child.memory_info().rss / 1e6)
                await asyncio.sleep(0.02)

        watcher = asyncio.create_task(watch())
        try:
            return await asyncio.gather(*(pool.process(body) for body in bodies)), peak
        finally:
            watcher.cancel()
            await pool.close()

    return asyncio.run(go())


def test_every_hostile_file_gets_its_status(jpeg: bytes) -> None:
    """A bomb fills memory, a mutant crashes or hangs the shard, a polyglot is kept with its passenger."""
    files = [*bombs(), *strangers(jpeg), *mutants()]
    assert len(files) >= 300
    start = time.monotonic()
    pictures, peak = decode_all([data for _, data, _ in files])
    assert time.monotonic() - start < 60
    wrong = [
        (name, picture.status, picture.error)
        for (name, _, statuses), picture in zip(files, pictures, strict=True)
        if picture.status not in statuses
    ]
    assert not wrong
    assert peak < 600, "a decoder used more memory than a worker may"
    counts = Counter(picture.status for picture in pictures)
    assert counts["decode_error"] > 150, counts
    for (name, _, _), picture in zip(files, pictures, strict=True):
        if picture.status == "ok":
            assert Image.open(io.BytesIO(picture.data)).size == (picture.width, picture.height), name
            assert b"PK\x03\x04" not in picture.data and b"<script>" not in picture.data, name


def test_a_crash_costs_one_sample(jpeg: bytes) -> None:
    """A decoder's segmentation fault ends the shard, or is blamed on the pictures around it."""

    async def go() -> tuple[Picture, list[Picture]]:
        pool = DecoderPool(SETTINGS, 1, 50_000_000)
        await pool.process(jpeg)
        decoders()[0].suspend()  # holds the sample until it is killed below
        hostile = asyncio.create_task(pool.process(jpeg + b"the one that crashes"))
        await asyncio.sleep(0.1)
        while not hostile.done():  # as a hostile file would: in the second try as well
            for child in decoders():
                child.kill()
            await asyncio.sleep(0.01)
        others = [await pool.process(jpeg) for _ in range(3)]
        await pool.close()
        return await hostile, others

    crashed, others = asyncio.run(go())
    assert (crashed.status, [other.status for other in others]) == ("decode_crash", ["ok"] * 3)
    assert "signal" in (crashed.error or "")


def test_a_decoder_that_hangs_is_ended(jpeg: bytes) -> None:
    """A file that decodes for hours holds a slot for hours."""

    async def go() -> list[str]:
        pool = DecoderPool(SETTINGS, 1, 50_000_000, decode_s=0.4)
        await pool.process(jpeg)
        (child,) = decoders()
        child.suspend()
        statuses = [(await pool.process(jpeg)).status, (await pool.process(jpeg)).status]
        await pool.close()
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        return statuses

    assert asyncio.run(go()) == ["decode_crash", "ok"]


def test_decoders_that_cannot_start_are_an_error(jpeg: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation marks every sample of the web as a crash."""
    monkeypatch.setattr("sys.path", ["/nonexistent"])

    async def go() -> None:
        pool = DecoderPool(SETTINGS, 1, 1_000_000)
        for _ in range(10):
            await pool.process(jpeg)

    with pytest.raises(StageError, match="before their first picture"):
        asyncio.run(go())


def test_large_pictures_are_decoded_one_after_another(jpeg: bytes) -> None:
    """Every decoder of a worker fills its memory at the same moment; or small pictures wait for the large ones."""
    large = encoded(Image.new("RGB", (3000, 2500)), "PNG")

    async def go() -> None:
        pool = DecoderPool(SETTINGS, 2, 1_000_000)
        try:
            assert (await pool.process(large)).status == "ok"
            fcntl.lockf(pool._lock, fcntl.LOCK_EX)  # as another decoder would hold it
            waiting = asyncio.create_task(pool.process(large))
            for _ in range(3):
                assert (await pool.process(jpeg)).status == "ok"
            await asyncio.sleep(0.3)
            assert not waiting.done()
            fcntl.lockf(pool._lock, fcntl.LOCK_UN)
            assert (await waiting).status == "ok"
        finally:
            await pool.close()

    asyncio.run(go())


def test_no_process_outlives_its_pool(jpeg: bytes) -> None:
    """Decoders pile up on the node."""
    decode_all([jpeg] * 4)
    assert not decoders()


def test_a_jpeg_of_thousands_of_scans_is_refused_unread() -> None:
    """100 kB of empty scans hold a decoder for 30 seconds, and a table of such files for days."""
    whole = encoded(Image.new("L", (3000, 2000), 128), "JPEG", progressive=True)
    assert process(whole, ImageSettings()).status == "ok"
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    start = time.process_time()
    picture = process(whole[:-2] + scan * 2000 + whole[-2:], ImageSettings())
    assert picture.status == "decode_error" and "scans" in (picture.error or "")
    assert time.process_time() - start < 0.5
