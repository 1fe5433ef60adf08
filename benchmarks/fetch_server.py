"""A small, fast image server for `bench_fetch.py`: photo-like JPEGs of 100-400 kB over HTTP and TLS, and bad hosts.

`/<number>.jpg` gives one of the pictures; everything else, robots.txt too, is a 404. On the port `hang` connections are
accepted and never answered, the port `h2` speaks HTTP/2 over TLS where hypercorn is installed. It is a process of its
own, so that the clients' CPU seconds are theirs alone.
"""

import argparse
import asyncio
import datetime
import ipaddress
import json
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np

PICTURES = 240


def photo_like(seed: int) -> bytes:
    """A JPEG with the spectrum of photographs (amplitude ~ 1/f), smooth regions and edges; 100-400 kB."""
    rng = np.random.default_rng(seed)
    width, height = [(1280, 853), (1024, 768), (1600, 1067), (960, 1280), (1200, 1200)][seed % 5]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    planes = []
    for strength in (1.0, 0.35, 0.35):  # luma, and two weaker chromas
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phases / frequency**1.3, s=(height, width))
        planes.append(strength * plane / plane.std())
    luma, red, blue = planes
    rows, columns = np.mgrid[0:height, 0:width]
    for _ in range(12):  # objects: what makes edges
        x, y, size = rng.integers(width), rng.integers(height), rng.integers(40, 300)
        luma = luma + rng.normal() * ((rows - y) ** 2 + (columns - x) ** 2 < size**2)
    rgb = np.stack([luma + blue, luma - 0.3 * (red + blue), luma + red], axis=-1)
    pixels = (127 + 45 * rgb).clip(0, 255).astype(np.uint8)
    most = int(rng.integers(130_000, 400_000))
    for quality in (95, 92, 88, 84, 78, 70, 60, 50, 40):
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= most:
            break
    return data


def make_certificate(folder: Path, addresses: list[str]) -> None:
    """A self-made CA (`ca.pem`) and a server certificate (`server.pem`) for these addresses."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    start = datetime.datetime(2020, 1, 1)
    end = start + datetime.timedelta(days=20_000)

    def build(name: str, issuer: str, public, signer, extensions) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        builder = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer)).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = build("bench CA", "bench CA", ca_key.public_key(), ca_key,
               [(x509.BasicConstraints(True, None), True), (ca_id, False), (usage, True)])  # fmt: skip
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(text)) for text in addresses])
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    server = build("bench", "bench CA", key.public_key(), ca_key,
                   [(names, False), (issued_by, False), (x509.BasicConstraints(False, None), True)])  # fmt: skip
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(private + server.public_bytes(pem))


class Images(asyncio.Protocol):
    """Just enough HTTP/1.1: keep-alive, GET, Connection: close."""

    answers: ClassVar[list[tuple[bytes, bytes]]] = []
    asked: ClassVar[dict[str, int]] = {}
    small = cv2.imencode(".jpg", np.full((64, 96, 3), 127, np.uint8))[1].tobytes()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            path = head.split(b" ", 2)[1]
            number = path[1:-4]
            if path.startswith(b"/tiny/"):
                self.tiny(path)
            elif path.endswith(b".jpg") and number.isdigit():
                first, body = self.answers[int(number) % len(self.answers)]
                self.transport.writelines([first, body])
            else:
                self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            if b"connection: close" in head.lower():
                self.transport.close()

    def tiny(self, path: bytes) -> None:
        """`/tiny/<number>.jpg`: a small picture, with faults for some; `/tiny/counts`: how often each was asked for."""
        if path == b"/tiny/counts":
            body = json.dumps(self.asked).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        number = int(path[6:-4])
        self.asked[str(number)] = self.asked.get(str(number), 0) + 1
        if number % 10 == 3:
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif number % 10 == 7:
            self.transport.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
        elif number % 50 == 11:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + self.small[:300])
            self.transport.close()
        else:
            self.transport.writelines([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.small), self.small])


class Silence(asyncio.Protocol):
    """Accepts, and never answers."""


async def http2(scope: dict, receive: Callable, send: Callable) -> None:
    """The pictures as an ASGI application."""
    if scope["type"] == "http":
        _, body = Images.answers[int(scope["path"][1:-4]) % len(Images.answers)]
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})


async def serve(folder: Path) -> None:
    Images.answers = []
    for path in sorted(folder.glob("*.jpg")):
        body = path.read_bytes()
        Images.answers.append(
            (b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body), body)
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    loop = asyncio.get_running_loop()
    ports = {}
    for name, protocol, tls in (("http", Images, None), ("https", Images, context), ("hang", Silence, None)):
        server = await loop.create_server(protocol, "0.0.0.0", 0, ssl=tls, backlog=4096)
        ports[name] = server.sockets[0].getsockname()[1]
    try:
        from hypercorn.asyncio import serve as serve_asgi
        from hypercorn.config import Config
    except ImportError:
        print(json.dumps(ports), flush=True)
        await asyncio.Event().wait()
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        ports["h2"] = probe.getsockname()[1]
    config = Config.from_mapping(
        bind=f"0.0.0.0:{ports['h2']}", certfile=str(folder / "server.pem"), keyfile=str(folder / "server.pem"),
        alpn_protocols=["h2"], h2_max_concurrent_streams=100, keep_alive_max_requests=10**9,
    )  # fmt: skip
    print(json.dumps(ports), flush=True)
    await serve_asgi(http2, config)


def make(folder: Path) -> None:
    """Draw the pictures and certificates once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "server.pem").exists():
        make_certificate(folder, [f"127.0.0.{last}" for last in range(1, 60)])
    for seed in range(PICTURES):
        path = folder / f"{seed:04d}.jpg"
        if not path.exists():
            path.write_bytes(photo_like(seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    make(folder)
    try:
        import uvloop

        uvloop.run(serve(folder))
    except ImportError:
        asyncio.run(serve(folder))
    sys.exit()
