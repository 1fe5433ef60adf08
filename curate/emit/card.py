"""The dataset card of a release: Markdown with the front matter of Hugging Face, written from `release.json` alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


class _Plain(yaml.SafeDumper):
    """YAML without anchors: the Hub's parser does not know them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_CARD = """{front}
# {title}

{total:,} samples in {subsets}, written by `curate` {version} from a pool of {rows:,}
rows. The release is immutable: `release.json` holds the recipe, the resolved thresholds, the fingerprint of every table
behind it and the sha256 of every tar; `curate verify` reads all of it again.

## Composition
| subset | samples | tars | GB | condition | best share | threshold |
|---|---|---|---|---|---|---|
{composition}

A sample is `<key>.jpg`, {texts} and `<key>.json`; the image's bytes are as they
were stored, so some may be PNG or WebP under the name jpg (readers go by content). `manifest.parquet` has one row per
sample with URL, caption, all scores and the place of its image. Samples are shuffled with seed {seed}.

## Funnel
{funnel}

## Scores
{scores}

## Load it
{load}

## How the columns were made
| table | fingerprint | settings |
|---|---|---|
{tables}

{weights}## Known limits
- Images and captions come from the open web; scores are models' opinions. Null scores are never selected.
- Rows whose image could not be fetched are not here; which ones can be had differs from day to day.
{limits}
## Licence and removal
The images belong to their owners; this release grants no right to them. Look at the terms of the source tables before
you publish it. To have a sample removed, write to {contact} with its URL or key.
"""


def card(release: Mapping[str, Any], features: Sequence[Mapping[str, Any]] | None) -> str:
    """README.md of a release; `features` are the types of a sample's members, where they are known."""
    recipe, subsets = release["recipe"], release["subsets"]
    aside = release["set_aside"]
    taken = f"- Samples were taken back from {release.get('predecessor')}; this release is what is left of it.\n"
    limits = f"- {len(aside)} shards of the pool were set aside after three failed tries; release.json names them.\n"
    captions = release["emit"]["captions"]
    return _CARD.format(
        front=_front(release, features),
        title=f"Release {release['fingerprint'][:8]}",
        total=sum(facts["samples"] for facts in subsets.values()),
        subsets=f"{len(subsets)} subset{'s' * (len(subsets) != 1)}",
        version=release["versions"].get("curate", ""),
        rows=release["pool"]["rows"],
        composition="\n".join(_row(name, facts) for name, facts in subsets.items()),
        texts="`<key>.txt` (missing where there is no caption)" if captions else "no `<key>.txt`",
        seed=release["emit"]["seed"],
        funnel="\n".join(_funnel(name, facts, release["pool"]["rows"]) for name, facts in subsets.items()),
        scores="\n".join(_scores(name, facts) for name, facts in subsets.items() if facts["samples"]),
        load="\n".join(_load(name, facts, captions) for name, facts in subsets.items() if facts["tars"]),
        tables="\n".join(
            f"| {name} | {facts['fingerprint']} | `{_cell(json.dumps(facts['settings'], sort_keys=True))}` |"
            for name, facts in release["tables"].items()
        ),
        weights=_weights(release.get("weights") or []),
        limits=(limits if aside else "") + _recall(release) + (taken if "predecessor" in release else ""),
        contact=(recipe.get("fetch") or {}).get("contact") or "whoever gave you this release",
    )


def tar_span(tars: int) -> str:
    """`{00000..00012}.tar` as shells and trainers expand it."""
    return f"{{00000..{tars - 1:05d}}}.tar" if tars > 1 else "00000.tar"


def _front(release: Mapping[str, Any], features: Sequence[Mapping[str, Any]] | None) -> str:
    filled = {name: facts for name, facts in release["subsets"].items() if facts["tars"]}
    matter = {
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.tar"}]} for name in filled
        ],
        **({"dataset_info": [{"config_name": name, "features": features} for name in filled]} if features else {}),
        "tags": ["webdataset", "curate"],
        "pretty_name": f"curate release {release['fingerprint'][:8]}",
    }
    return f"---\n{yaml.dump(matter, Dumper=_Plain, sort_keys=False)}---"


def _recall(release: Mapping[str, Any]) -> str:
    """What the searches for near copies measured of themselves."""
    return "".join(
        f"- Near copies by {rule.partition(':')[2]}: {told['found']:,} of {told['true']:,} near pairs of a sample of "
        f"{told['rows']:,} rows were found (recall {told['rate']:.4f}); the rest may be here twice.\n"
        for rule, told in release.get("recall", {}).items()
    )


def _row(name: str, facts: Mapping[str, Any]) -> str:
    top = facts["keep_top"]
    share = f"best {top['fraction']:.4g} by `{_cell(top['by'])}`" if top else ""
    where = f"`{_cell(facts['where'])}`" if facts["where"] else ""
    threshold = "" if facts["threshold"] is None else f"{facts['threshold']:.6g}"
    return (
        f"| {name} | {facts['samples']:,} | {facts['tars']:,} | {facts['bytes'] / 1e9:.3f} | {where} | {share} "
        f"| {threshold} |"
    )


def _funnel(name: str, facts: Mapping[str, Any], rows: int) -> str:
    lines = [f"**{name}**: {rows:,} rows, {facts['samples']:,} chosen; refused first by", ""]
    refused = sorted(facts["refused"].items(), key=lambda item: (-item[1], item[0]))
    lines += [f"- {_cell(reason)}: {count:,}" for reason, count in refused]
    if facts.get("clauses"):
        lines += ["", "Each clause on its own, among rows with an image:", ""]
        lines += [
            f"- `{_cell(one['clause'])}`: true {one['true']:,}, false {one['false']:,}, unknown {one['unknown']:,}"
            for one in facts["clauses"]
        ]
    return "\n".join([*lines, ""])


def _scores(name: str, facts: Mapping[str, Any]) -> str:
    if not facts.get("scores"):
        return f"**{name}**: none\n"
    lines = [f"**{name}**", "", "| column | least | mean | most | unknown |", "|---|---|---|---|---|"]
    for column, noted in facts["scores"].items():
        numbers = ("" if noted[part] is None else f"{noted[part]:.6g}" for part in ("least", "mean", "most"))
        lines.append(f"| {_cell(column)} | {' | '.join(numbers)} | {noted['unknown']:,} |")
    return "\n".join([*lines, ""])


def _weights(weights: Sequence[Mapping[str, Any]]) -> str:
    if not weights:
        return ""
    rows = [
        f"| {one['table']} | {one['name'] or 'a file of their own'} | {one['licence'] or 'unknown'} | {one['sha256']} |"
        for one in weights
    ]
    return "\n".join(["## Models", "| table | model | licence | sha256 |", "|---|---|---|---|", *rows, "", ""])


def _load(name: str, facts: Mapping[str, Any], captions: bool) -> str:
    span = tar_span(facts["tars"])
    pairs = facts["samples"] - facts["without_text"] if captions else 0
    lines = [
        f"### {name}", "```python",
        f'webdataset.WebDataset("{name}/{span}", shardshuffle=False).decode("pil")',
        f'datasets.load_dataset(".", "{name}", split="train", streaming=True)',
        f'curate.torch.ReleaseDataset(".", "{name}", transform=…)  # map-style, images only: DINOv2, Web-SSL',
        "```",
    ]  # fmt: skip
    if pairs:
        lines += [
            "```sh",
            f"python -m open_clip_train.main --dataset-type webdataset --train-data '{name}/{span}' \\",
            f"  --train-num-samples {pairs} --workers {min(8, facts['tars'])} --model ViT-B-32 --batch-size 256",
            "```",
        ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("`", "'")
