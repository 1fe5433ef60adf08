"""The small web: deterministic, honest about what is planted, and misbehaving exactly as planned."""

import http.client
import io
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import imagehash
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.demo.canvas import KINDS
from curate.demo.drawing import draw, encoded
from curate.demo.planting import COUNTS, EXPECTED, SEEDS_PER_WEB, plan
from curate.demo.server import WebServer
from curate.demo.web import COYO_SCHEMA, build
from curate.errors import PlanError
from curate.schema import STATUSES, key_of

Site = tuple[WebServer, list[dict[str, object]]]


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    """A running server, and the truth as rows."""
    with WebServer(folder, hang_s=0.3) as server:
        yield server, pq.read_table(folder / "truth.parquet").to_pylist()


class Unmoved(urllib.request.HTTPRedirectHandler):
    """Makes urllib show redirects and not follow them."""

    def redirect_request(self, *args: object) -> None:
        return None


def get(url: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request, whatever the status."""
    opener = urllib.request.build_opener(Unmoved)
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def urls_of(site: Site, kind: str) -> list[str]:
    """The planted URLs of a kind."""
    urls = [str(row["url"]) for row in site[1] if row["kind"] == kind]
    assert len(urls) == COUNTS[kind]
    return urls


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes(kind: str) -> None:
    """Guards against hidden randomness: the demo's second run must find the same bytes."""
    first, again, other = draw(kind, 7), draw(kind, 7), draw(kind, 8)
    assert encoded(first.image, "JPEG") == encoded(again.image, "JPEG") and first.caption == again.caption
    assert first.image.tobytes() != other.image.tobytes()
    assert min(first.image.size) >= 200 and max(first.image.size) <= 760


def test_distinct_drawings_have_distinct_phashes(folder: Path) -> None:
    """Guards the demo's duplicates against false ones: flat drawings would share a pHash."""
    table, truth = pq.read_table(folder / "urls.parquet"), pq.read_table(folder / "truth.parquet")
    groups: dict[str, set[str]] = {}
    for phash, group, key in zip(
        table["image_phash"].to_pylist(),
        truth["duplicate_group"].to_pylist(),
        truth["key"].to_pylist(),
        strict=True,
    ):
        groups.setdefault(phash, set()).add(group or key)
    assert [group for group in groups.values() if len(group) > 1] == []


def test_plan_is_counted_and_expects_known_statuses(folder: Path) -> None:
    """Guards against a truth that the status vocabulary cannot express, and against uncounted pages."""
    truth = pq.read_table(folder / "truth.parquet").to_pylist()
    assert Counter(row["kind"] for row in truth) == COUNTS
    assert {status for row in truth for status in row["expected_status"]} <= set(STATUSES)
    assert set(EXPECTED) <= set(COUNTS)
    distinct = {row["key"] for row in truth}
    assert len(distinct) == len(truth) - COUNTS["repeated_row"]
    assert all(row["key"] == key_of(row["url"] or None, row["text"]) for row in truth)
    copies = [row for row in truth if row["kind"].endswith("_copy")]
    assert all(row["phash_distance"] == 0 for row in copies if row["kind"] == "exact_copy")
    assert all(row["phash_distance"] <= 6 for row in copies)


def test_table_has_coyos_columns_and_honest_sizes(folder: Path, site: Site) -> None:
    """Guards the recognition of COYO's schema, and that recorded sizes and pHashes are those of the served pictures."""
    table = pq.read_table(folder / "urls.parquet")
    assert table.schema.equals(COYO_SCHEMA) and table.num_columns == 17
    rows = {row["url"]: row for row in table.to_pylist()}
    for kind in ("scene", "document", "tiny", "exact_copy", "watermarked"):
        for url in urls_of(site, kind)[:5]:
            status, _, body = get(url)
            with Image.open(io.BytesIO(body)) as picture:
                assert (status, *picture.size) == (200, rows[url]["width"], rows[url]["height"])
                assert str(imagehash.phash(picture)) == rows[url]["image_phash"]
    assert table["clip_similarity_vitb32"].null_count == table.num_rows


def test_second_build_changes_nothing(folder: Path) -> None:
    """Guards against a second demo run that sees new files and so computes everything again."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    build(folder, port=WebServer(folder).port)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_seeds_of_trained_drawings_are_refused() -> None:
    """Guards the split between webs and training: no web may show a drawing that the demo's CLIP was trained on."""
    assert sum(COUNTS.values()) < SEEDS_PER_WEB
    with pytest.raises(ValueError, match="0 to 99"):
        plan(100)


def test_failing_pages_fail_as_planned(site: Site) -> None:
    """Guards each misbehaviour: a kind that quietly served its picture would make the demo's comparison a lie."""
    assert {get(url)[0] for url in urls_of(site, "http_404")} == {404}
    assert {get(url)[0] for url in urls_of(site, "http_500")} == {500}
    assert get(urls_of(site, "hang")[0])[0] == 504  # after hang_s, here 0.3 s
    for url in urls_of(site, "truncated"):
        with pytest.raises(http.client.IncompleteRead):
            get(url)
    for url in urls_of(site, "html"):
        status, headers, body = get(url)
        assert (status, headers["Content-Type"]) == (200, "image/jpeg") and body.startswith(b"<!doctype html>")
    assert all(
        "noai" in get(url)[1]["X-Robots-Tag"] or "noimageai" in get(url)[1]["X-Robots-Tag"]
        for url in urls_of(site, "opted_out")
    )
    assert b"Disallow: /members/" in get(f"{site[0].url}/robots.txt")[2]
    assert all("/members/" in url for url in urls_of(site, "robots"))


def test_redirects_lead_where_planned(site: Site) -> None:
    """Guards the three redirects: one that arrives, one that never does, one that points at a forbidden address."""
    for url in urls_of(site, "redirected"):
        status, headers, _ = get(url)
        assert status in (301, 302)
        assert get(site[0].url + headers["Location"])[0] == 200
    for url in urls_of(site, "redirect_loop"):
        back = site[0].url + get(url)[1]["Location"]
        assert site[0].url + get(back)[1]["Location"] == url
    for url in urls_of(site, "redirect_private"):
        target = get(url)[1]["Location"]
        assert target.startswith("http://127.0.0.2:")
        if site[0].private_hits is not None:
            assert get(target)[0] == 200
            assert site[0].private_hits["/secret.jpg"] > 0
            site[0].private_hits.clear()


def test_bombs_are_small_to_send_and_huge_to_open(site: Site) -> None:
    """Guards the bombs: both must be dangerous to a careless client, and valid files."""
    _, _, pixels = get(urls_of(site, "bomb_pixels")[0])
    assert len(pixels) < 200_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(pixels))
    _, headers, zipped = get(urls_of(site, "bomb_gzip")[0])
    assert headers["Content-Encoding"] == "gzip" and len(zipped) < 400_000


def test_taken_port_is_explained(site: Site, folder: Path) -> None:
    """Guards against a bare OSError where a second demo runs beside the first."""
    with pytest.raises(PlanError, match="another port"), WebServer(folder):
        pass


def test_repeated_rows_have_their_twin(site: Site) -> None:
    """Guards the planted duplicate rows: each must have a row with equal URL and text."""
    pairs = sorted((str(row["url"]), str(row["text"])) for row in site[1] if row["url"])
    assert sum(a == b for a, b in pairwise(pairs)) == COUNTS["repeated_row"]
    assert pa.table({"kind": [row["kind"] for row in site[1]]}).num_rows == sum(COUNTS.values())
