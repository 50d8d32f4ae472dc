"""Text of the Python packages that are installed here, to train and to measure on where no hub is reached.

    python benchmarks/installed_python.py runs/text --characters 170e6

Writes `python_train.jsonl` and `python_eval.jsonl`, a file of Python source a row, and prints what was held out. Whole
packages are held out, chosen by a hash of their names, so that two machines with the same packages hold out the same;
of each at most twelve files and 8,000 characters of each. A file that occurs twice is taken once.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from qsparse_hf.errors import UserError, check_writable

SIZES = range(500, 100_001)  # characters of a file: neither a stub nor a table
HELD_OUT, LARGEST, MOST = 500_000, 2_000_000, 12  # characters in all, of a package, and files of each


def packages() -> Iterator[tuple[str, list[Path]]]:
    """Modules and packages of the standard library and of `site-packages`, in the order of their hashes."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    found = {each.name: each for root in reversed(roots) for each in root.iterdir() if "-packages" not in each.name}
    for name in sorted(found, key=_hash):
        place = found[name]
        yield name, sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.suffix == ".py" else []


def _hash(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def texts(files: list[Path], seen: set[str]) -> list[str]:
    """Those not `seen` yet, to which they are added."""
    found = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) in SIZES and text not in seen:
            seen.add(text)
            found.append(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--characters", type=float, default=170e6, help="most to train on (default %(default)g)")
    arguments = parser.parse_args()
    files = [arguments.output / f"python_{part}.jsonl" for part in ("train", "eval")]
    try:
        for file in files:
            check_writable(file)
    except UserError as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    sizes, names = [0, 0], []
    with files[0].open("w", encoding="utf-8") as train, files[1].open("w", encoding="utf-8") as held_out:
        for name, sources in packages():
            rows = texts(sources, seen)
            size = sum(map(len, rows))
            chosen = int(_hash(name), 16) % 8 == 0 and size <= LARGEST and sizes[1] < HELD_OUT
            if chosen and rows:
                names.append(name)
                rows = [row[:8000] for row in rows[:MOST]]
            for row in rows:
                if chosen or sizes[0] < arguments.characters:
                    (held_out if chosen else train).write(json.dumps({"text": row}) + "\n")
                    sizes[chosen] += len(row)
    print(f"{sizes[0]:,} characters to train on, {sizes[1]:,} held out: {', '.join(names)}")


if __name__ == "__main__":
    main()
