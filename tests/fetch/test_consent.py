"""Headers and robots.txt: who said no."""

import pytest

from curate.fetch.consent import opted_out, parse_robots


@pytest.mark.parametrize(("values", "found"), [
    (["noai"], "noai"), (["noimageai"], "noimageai"), (["noindex"], "noindex"), (["noimageindex"], "noimageindex"),
    (["noml"], "noml"), (["none"], "none"), (["NoAI"], "noai"), (["all, noai"], "noai"), (["index", "noai"], "noai"),
    (["curate: noai"], "noai"), (["Curate:noindex, nofollow"], "noindex"), (["img2dataset: noimageai"], "noimageai"),
    (["*: noai"], "noai"), (["googlebot: noindex, curate: noai"], "noai"),
    (["unavailable_after: 25 Jun 2010 15:00:00 PST", "noai"], "noai"),
    (["max-image-preview: large, noai"], "noai"),
    (["unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, noai"], "noai"), (["noarchive; noai"], "noai"),
    (["noarchive noai"], "noai"), (['"noai"'], "noai"),
])  # fmt: skip
def test_opt_outs_are_seen_in_all_their_forms(values: list[str], found: str) -> None:
    """A directive in a second header, in capitals, or for our agent only is overlooked."""
    assert found in (opted_out(values, []) or "")


@pytest.mark.parametrize("values", [
    [], [""], ["all"], ["nofollow"], ["googlebot: noindex"], ["googlebot: noindex, noai"], ["max-image-preview: none"],
    ["unavailable_after: 25 Jun 2010 15:00:00 PST"], ["noaip"], ["noarchive, nosnippet"],
])  # fmt: skip
def test_what_is_not_meant_for_us_is_no_opt_out(values: list[str]) -> None:
    """Another agent's directive, or one that does not concern images, empties the data set."""
    assert opted_out(values, []) is None


def test_tdm_reservation() -> None:
    """W3C TDMRep is ignored."""
    assert opted_out([], ["1"]) == "tdm-reservation: 1"
    assert opted_out([], [" 1 "]) and not opted_out([], ["0"]) and not opted_out([], [""])


# RFC 9309 2.2.1-2.2.3 and the cases of Google's open-source parser's tests, restated.
@pytest.mark.parametrize(("text", "path", "allowed"), [
    ("", "/x", True),
    ("User-agent: *\nDisallow: /", "/x", False),
    ("User-agent: *\nDisallow:", "/x", True),
    ("user-agent: *\ndisallow: /img", "/img/x.jpg", False),
    ("user-agent: *\ndisallow: /img/", "/img", True),
    ("User-agent: *\nDisallow: /\nAllow: /pub", "/pub/x.jpg", True),
    ("User-agent: *\nAllow: /pub\nDisallow: /", "/pub/x.jpg", True),
    ("User-agent: *\nDisallow: /x\nAllow: /x", "/x", True),
    ("User-agent: *\nDisallow: /*.jpg$", "/a/b.jpg", False),
    ("User-agent: *\nDisallow: /*.jpg$", "/a/b.jpg?x", True),
    ("User-agent: *\nDisallow: /*.jpg", "/a/b.jpg?x", False),
    ("User-agent: *\nDisallow: /a*b*c", "/aXXbYYc", False),
    ("User-agent: *\nDisallow: /a*b*c$", "/aXXbYYcZ", True),
    ("User-agent: *\nDisallow: /$", "/", False),
    ("User-agent: *\nDisallow: /$", "/x", True),
    ("User-agent: other\nDisallow: /", "/x", True),
    ("User-agent: other\nUser-agent: curate\nDisallow: /", "/x", False),
    ("User-agent: Curate/2.0 (x)\nDisallow: /", "/x", False),
    ("User-agent: *\nDisallow: /\n\nUser-agent: curate\nAllow: /", "/x", True),
    ("User-agent: curate\nDisallow: /a\nUser-agent: *\nDisallow: /b", "/b", True),
    ("User-agent: curate\nDisallow: /a\n\nUser-agent: curate\nDisallow: /b", "/b", False),
    ("User-agent: img2dataset\nDisallow: /", "/x", False),
    ("\ufeffUser-agent: *\nDisallow: /", "/x", False),
    ("User-agent: *\r\nDisallow: /x # comment\r\n", "/x", False),
    ("Sitemap: http://h/s.xml\nUser-agent: *\nCrawl-delay: 10\nDisallow: /x", "/x", False),
    ("<html>not found</html>", "/x", True),
    ("Disallow: /", "/x", True),
    ("User-agent: *\nDisallow: /b%c3%bccher", "/b%C3%BCcher/1.jpg", False),
    ("User-agent: *\nDisallow: /bücher", "/b%C3%BCcher/1.jpg", False),
])  # fmt: skip
def test_robots_rules(text: str, path: str, allowed: bool) -> None:
    """A site's wish is misread: the wrong group, the wrong precedence, no wildcards (as in urllib.robotparser)."""
    assert (parse_robots(text.encode()).refuses(path) is None) == allowed


def test_hostile_robots_cost_no_time() -> None:
    """A pattern made to explode a regular expression, or a file without end, holds the shard."""
    pattern = "Disallow: /" + "*a" * 5000 + "b$"
    robots = parse_robots(("User-agent: *\n" + (pattern + "\n") * 40).encode() + b"\xff\xfe\x00" * 400_000)
    assert robots.refuses("/" + "a" * 20_000) is None
