"""Where we connect to: public http(s) addresses and nothing else.

A table of URLs is written by strangers. Without this module a row could read a file, a cloud's metadata service or a
database on the cluster's network. Every address is judged after resolution, and the socket is opened to that very
address (`open_socket` sees each one last), so that a name that changes its mind between two lookups gains nothing.
Refuses: other schemes, credentials in URLs, private and special ranges unless `allow_networks` names them.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from yarl import URL

from curate.errors import ConfigError
from curate.fetch.outcome import Refusal, brief

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
SocketInfo = tuple[int, int, int, str, Any]  # as `getaddrinfo` gives it

URL_CHARS = 8_192  # longer ones are data, not addresses; servers refuse them as well

# IANA special-purpose registries (RFC 6890 and after), spelled out: `is_global` differs between Python versions.
_SPECIAL_V4 = tuple(ipaddress.IPv4Network(text) for text in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4",
    "168.63.129.16/32",  # a public address by number, Azure's host agent by use
))  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all else is special, local or unassigned
_SPECIAL_V6 = tuple(ipaddress.IPv6Network(text) for text in (
    "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # Teredo and kin, documentation, 6to4
))  # fmt: skip
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits; judged as that one

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# libcurl decodes `%2e` in a host and takes `*` for any: what was judged here would not be what is connected to.
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)
_NUMERIC_HOST = re.compile(r"(.*\.)?(0[xX][0-9a-fA-F]*|[0-9]+)")  # ends in a number: an address (WHATWG URL, 3.5)


class BlockedAddress(OSError):
    """Raised inside the client where a connection would go to a forbidden address; becomes `blocked_address`."""


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """CIDR texts to networks. Raises ConfigError on a malformed one."""
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"fetch.allow_networks: {error}; write e.g. 127.0.0.0/8") from None


@lru_cache(maxsize=100_000)
def _numeric(host: str) -> Address | None:
    """The address that a host is spelled as; None for a name. Cached: a table asks for each host many times."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_address(host: str) -> bool:
    """Whether a URL's host is a numeric address and no name."""
    return _numeric(host) is not None


def _innermost(address: Address) -> Address:
    """The IPv4 address inside an IPv4-mapped or NAT64 one, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


class Guard:
    """Decides about URLs and addresses; holds no connection."""

    def __init__(self, allow_networks: Iterable[str] = (), *, public: bool = True) -> None:
        """`allow_networks` (CIDR) are open although special; without `public` nothing but them is."""
        self._allowed, self._public = parse_networks(allow_networks), public

    def allows(self, text: str) -> bool:
        """Whether a numeric address (as `getaddrinfo` gives it) may be connected to."""
        numeric = _numeric(text.partition("%")[0])
        if numeric is None:
            return False
        address = _innermost(numeric)
        if any(address in network for network in self._allowed):
            return True
        if not self._public:
            return False
        if isinstance(address, ipaddress.IPv4Address):
            return not any(address in network for network in _SPECIAL_V4)
        return address in _GLOBAL_V6 and not any(address in network for network in _SPECIAL_V6)

    def open_socket(self, info: SocketInfo) -> socket.socket:
        """The client's only way to a socket. Raises BlockedAddress for a forbidden address."""
        family, kind, protocol, _, target = info
        if not self.allows(str(target[0])):
            raise BlockedAddress(f"{target[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    def parse(self, text: str | None, base: URL | None = None) -> URL:
        """A URL that may be asked for; relative to `base` for a redirect. Raises Refusal.

        Literal addresses in any spelling that a resolver would take (decimal, octal, hex, short) are judged here;
        names are judged when they are resolved.
        """
        if text is None or not text.strip():
            raise Refusal("bad_url", "no URL")
        text = text.strip()
        if len(text) > URL_CHARS:
            raise Refusal("bad_url", f"longer than {URL_CHARS} characters")
        if _CONTROL.search(text):
            raise Refusal("bad_url", "control characters in the URL")
        try:
            url = URL(text) if base is None else base.join(URL(text))
            host, port, scheme = url.raw_host, url.port, url.scheme
        except (ValueError, TypeError, UnicodeError) as error:
            raise Refusal("bad_url", brief(error)) from None
        if scheme not in ("http", "https"):
            raise Refusal("bad_url", f"scheme {brief(scheme) or 'missing'}; only http and https are fetched")
        if not host or port is None or not 0 < port < 65_536:
            raise Refusal("bad_url", "no host or no valid port")
        if url.raw_user is not None or url.raw_password is not None:
            raise Refusal("bad_url", "credentials in the URL")
        return self._canonical(url, host)

    def _canonical(self, url: URL, host: str) -> URL:
        numeric = _numeric(host)
        address = None if numeric is None else str(numeric)
        if address is None:
            if not _NAME.fullmatch(host):
                raise Refusal("bad_url", f"{brief(host)} is no host name")
            bare = host.rstrip(".")
            if _NUMERIC_HOST.fullmatch(bare):
                try:
                    address = socket.inet_ntoa(socket.inet_aton(bare))
                except OSError:
                    raise Refusal("bad_url", f"{host} is not an address") from None
        if address is not None and not self.allows(address):
            raise Refusal("blocked_address", f"{address} is not a public address")
        if address is not None and address != host:
            url = url.with_host(address)
        return url.with_fragment(None)
