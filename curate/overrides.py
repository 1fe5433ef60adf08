"""`--set a.b=c`: one value of a recipe, before anything is validated.

A path goes through sections and, by number, through lists; it refuses to make a list longer, or a value a section.
"""

from typing import Any

import yaml

from curate.errors import ConfigError


def apply(tree: dict[str, Any], override: str) -> None:
    """Put the value of `a.b=c` into the tree; sections that are not there are made. Raises ConfigError."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. --set emit.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key, override)
        if node is None or not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: depth + 1])} is not a section")
    last = keys[-1]
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"--set {override}: {key!r} is not a place in a list of {len(node)}")
    return int(key)
