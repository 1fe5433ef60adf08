"""Who said no: response headers and robots.txt, read as their authors meant them.

Honoured: `X-Robots-Tag` (noai, noimageai, noindex, noimageindex, none, noml; for everyone or for our agents; several
headers, several tokens), `tdm-reservation: 1` (W3C TDMRep), and robots.txt (RFC 9309). Nothing here asks the network.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

AGENTS = ("curate", "img2dataset")  # img2dataset: those who shut out the usual tool mean this kind of use
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})  # none = noindex, nofollow

ROBOTS_BYTES = 500 * 1024  # RFC 9309 2.5: at least this much must be read
_AGENT = re.compile(
    r"\s*\S+\s*"
)  # of two words before a colon it is a date: `unavailable_after: Fri, 25 Jun 2010 15:…`
_WORD = re.compile(r"[^\s\"']+")
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


def opted_out(x_robots_tags: Iterable[str], tdm_reservations: Iterable[str]) -> str | None:
    """The header that refuses the use of this response, as it is recorded; None when there is none."""
    for value in x_robots_tags:
        agent = ""  # nobody named: everyone is meant
        for part in re.split("[,;]", value.lower()):
            name, colon, rest = part.partition(":")
            if colon and name.strip() in _VALUED:
                continue
            if colon and _AGENT.fullmatch(name):
                agent, part = name.strip(), rest  # noqa: PLW2901  # the token holds until the next one
            for directive in _WORD.findall(part):
                if directive in OPT_OUTS and agent in ("", "*", *AGENTS):
                    return f"X-Robots-Tag: {agent + ': ' if agent else ''}{directive}"
    if any(value.strip() == "1" for value in tdm_reservations):
        return "tdm-reservation: 1"
    return None


@dataclass(frozen=True, slots=True)
class Rule:
    """One Allow or Disallow line."""

    pattern: str
    allow: bool

    def matches(self, path: str) -> bool:
        """Whether the pattern (`*` any run, final `$` the end) covers this path. Linear in its length."""
        anchored = self.pattern.endswith("$")
        pieces = (self.pattern[:-1] if anchored else self.pattern).split("*")
        if not path.startswith(pieces[0]):
            return False
        at = len(pieces[0])
        last = len(pieces) - 1
        for number, piece in enumerate(pieces[1:], start=1):
            if anchored and number == last:
                return len(path) - len(piece) >= at and path.endswith(piece)
            found = path.find(piece, at)
            if found < 0:
                return False
            at = found + len(piece)
        return not anchored or at == len(path)


@dataclass(frozen=True)
class Robots:
    """The rules of one host that concern us."""

    rules: tuple[Rule, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """What it takes, about."""
        return 200 + sum(150 + len(rule.pattern) for rule in self.rules)

    def refuses(self, path: str) -> str | None:
        """The line that disallows this path (with query), else None: the longest match decides, Allow on a tie."""
        best: Rule | None = None
        for rule in self.rules:
            if best is not None and (len(rule.pattern), rule.allow) <= (len(best.pattern), best.allow):
                continue
            if rule.matches(path):
                best = rule
        return None if best is None or best.allow else f"Disallow: {best.pattern}"


def parse_robots(data: bytes | bytearray) -> Robots:
    """robots.txt to the rules for our agents, or for `*` where no group names us (RFC 9309 2.2).

    All groups that name one of us are joined. Malformed lines are skipped, as the RFC asks.
    """
    text = data[:ROBOTS_BYTES].decode("utf-8", "replace").removeprefix("\ufeff")
    groups: dict[str, list[Rule]] = {}
    agents: list[str] = []
    in_rules = True
    for line in text.splitlines():
        name, colon, value = line.partition("#")[0].partition(":")
        field, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if field == "user-agent":
            if in_rules:
                agents, in_rules = [], False
            agents.append(_product(value))
            groups.setdefault(agents[-1], [])
        elif field in ("allow", "disallow"):
            in_rules = True
            if value:
                for agent in agents:
                    groups[agent].append(Rule(_normal(value), field == "allow"))
    named = [agent for agent in AGENTS if agent in groups]
    chosen = named or ["*"]
    return Robots(tuple(rule for agent in chosen for rule in groups.get(agent, [])))


def _product(value: str) -> str:
    """`Curate/1.0 (…)` names the product token `curate`."""
    return value.partition("/")[0].partition(" ")[0].strip().lower()


def _normal(pattern: str) -> str:
    """Non-ASCII as percent-encoded UTF-8, escapes in capitals, so that both sides of a comparison are spelled alike."""
    quoted = "".join(c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode("utf-8", "replace")) for c in pattern)
    parts = quoted.split("%")
    return "%".join([parts[0], *(part[:2].upper() + part[2:] for part in parts[1:])])
