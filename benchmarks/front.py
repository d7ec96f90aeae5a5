"""The front of speed against KL, from documents of `flashrl bench`: one table, one picture, one sentence a batch.

    python -m benchmarks.front --kl KL.json … --speed 7B.json 32B.json [--out FILE.json] [--png FILE.png]

KL needs a model that was trained, speed one of the size that is trained. The KL of all variants is that of one model
with the same settings, in one document or several; the speeds of a model are those of a single run. Variants without a
KL or a speed are named and left out.
`flashrl bench --mismatch` does the same for a single model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import code, markdown

from flashrl_cli import files
from flashrl_cli.bench.front import Front, fronts
from flashrl_cli.render import figure

OUT = Path("benchmarks/results/front.json")


def mismatches(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mismatch by variant.

    Raises ValueError for a model that knows nothing, and for documents of several models or settings.
    """
    first, *others = ((one["model"]["fingerprint"], one["device"], one["settings"]["mismatch"]) for one in documents)
    if any(other != first for other in others):
        raise ValueError("the documents of --kl differ in model, device or settings of the mismatch")
    found = {
        one["rollout"]: one["mismatch"] for document in documents for one in document["variants"] if one["mismatch"]
    }
    if not found or any(one["knows_nothing"] for one in found.values()):
        raise ValueError(f"{documents[0]['model']['name']} gave no mismatch, or is a random policy")
    return found


def speeds(document: Mapping[str, Any]) -> dict[str, dict[int, list[float]]]:
    """Tokens per second of each repeat by variant and batch."""
    return {one["rollout"]: {point["batch"]: point["values"] for point in one["speed"]} for one in document["variants"]}


def about(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a document was measured on, and the block of each variant's rotation."""
    engines = {one["rollout"]: one["engine"] for one in document["variants"] if one["engine"]}
    blocks = {name: engine["holds"][0].get("rotation", 0) for name, engine in engines.items()}
    kept = {key: document[key] for key in ("command", "device", "versions", "settings")}
    return {"model": document["model"]["name"], **kept, "rotation": blocks}


def combined(kl: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fronts of each model and batch, as plain data."""
    distances = mismatches(kl)
    models: list[dict[str, Any]] = []
    for document in measured:
        if any(one["model"] == document["model"]["name"] for one in models):
            raise ValueError(f"two documents of {document['model']['name']}: variants are compared within a single run")
        found = speeds(document)
        of_model = fronts(found, distances)
        if not of_model:
            raise ValueError(f"no batch of {document['model']['name']} has two variants with a KL")
        models.append(
            {
                **about(document),
                "fronts": [one.document() for one in of_model],
                "sentences": list(_sentences(document, of_model)),
                "without_speed": [name for name in distances if not found.get(name)],
                "without_kl": [name for name in found if name not in distances],
            }
        )
    return {"kl": [about(one) for one in kl], "models": models}


def _sentences(document: Mapping[str, Any], found: Sequence[Front]) -> Iterator[str]:
    yield from (f"{document['model']['name']}, {one.sentence('bf16')}" for one in found)


def table(document: Mapping[str, Any]) -> str:
    """Markdown: the KL of each variant, and its speed at each model and batch; in bold where no other one beats it."""
    columns = [(one["model"].removeprefix("shape:"), front) for one in document["models"] for front in one["fronts"]]
    points = [{point["rollout"]: point for point in front["points"]} for _, front in columns]
    names = list(dict.fromkeys(name for by_name in points for name in by_name))
    rows = []
    for name in names:
        kl = next(by_name[name] for by_name in points if name in by_name)
        row = [code(name), _number(kl["kl"]) + (f" ± {_number(kl['kl_error'])}" if kl["kl_error"] else "")]
        row += [f"{100 * kl['effective']:.1f} %"]
        rows.append(row + [_cell(by_name.get(name), by_name.get("bf16")) for by_name in points])
    heads = [f"{model}, {front['batch']} sequences" for model, front in columns]
    return markdown(["rollout", "KL ± standard error, nats a token", "effective sample size", *heads], rows)


def _number(kl: float) -> str:
    return f"{kl:.4f}" if kl >= 0.0005 else f"{kl:.1e}"


def _cell(point: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> str:
    if point is None:
        return "–"
    ratio = f" ({point['tokens_s'] / base['tokens_s']:.2f}x)" if base and point is not base else ""
    text = f"{point['tokens_s']:,.0f}{ratio}"
    return text if point["beaten_by"] else f"**{text}**"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw all fronts to a PNG file."""
    panels = {
        f"{one['model'].removeprefix('shape:')}, {front['batch']} sequences": front
        for one in document["models"]
        for front in one["fronts"]
    }
    devices = " and ".join(dict.fromkeys(one["device"] for one in (*document["kl"], *document["models"])))
    figure.write_fronts_png(panels, path, about=f"KL of {Path(document['kl'][0]['model']).name}, {devices}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=Path, nargs="+", required=True)
    parser.add_argument("--speed", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args(words)
    kl, measured = (
        [json.loads(file.read_text(encoding="utf-8")) for file in given] for given in (arguments.kl, arguments.speed)
    )
    try:
        document = combined(kl, measured)
    except ValueError as error:
        parser.error(str(error))
    given = [Path(word).name for word in (sys.argv[1:] if words is None else words)]
    files.write_json(arguments.out, {"command": " ".join(["python -m benchmarks.front", *given]), **document})
    if arguments.png:
        draw(document, arguments.png)
    print(table(document))
    for one in document["models"]:
        print("\n".join(one["sentences"]))
        for what in ("speed", "KL"):
            if names := one[f"without_{what.lower()}"]:
                print(f"{one['model']}: without a {what}, and left out: {', '.join(names)}")


if __name__ == "__main__":
    main()
