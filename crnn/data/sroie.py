"""Line crops from the receipts of ICDAR 2019 SROIE, in the layout they are published in.

The folder holds `img/NAME.jpg` and `box/NAME.csv` (or `.txt`), one `x1,y1,...,x4,y4,TEXT` a line,
and, in some copies, `key/NAME.json` (or `entities/NAME.txt`) with the company that issued it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from crnn.data.check import needed_frames
from crnn.data.images import HEIGHT, decode, fit_line
from crnn.errors import DataError
from crnn.files import write_atomic

MAX_WIDTH = 320
MAX_LENGTH = 24
FRAME = 4

Box = tuple[int, int, int, int]


def convert(folder: Path, target: Path, val_percent: int = 10) -> dict[str, int]:
    """Write one grey crop a line, 32 px high, and train.txt, val.txt and charset.txt.

    A receipt goes to train or val by its company, so that no shop is in both; without company
    files, by its own name.

    Args:
        folder: Holds img/ and box/.
        target: Gets images/ and the label files.
        val_percent: Share of the companies whose receipts go to val, in percent.

    Returns:
        Counts: lines of each split, and of each reason to leave a line out.

    Raises:
        DataError: No receipts in the folder, or one that cannot be read.
    """
    receipts = sorted((folder / "img").glob("*.jpg"))
    if not receipts:
        raise DataError(f"no img/*.jpg in {folder}; it must hold img/ and box/ of SROIE")
    labels: dict[str, list[str]] = {"train": [], "val": []}
    characters: set[str] = set()
    counts: Counter[str] = Counter()
    for receipt in receipts:
        split = _split(_company(folder, receipt.stem), val_percent)
        page = _page(receipt)
        for number, (box, text) in enumerate(_boxes(folder, receipt.stem)):
            crop = _crop(page, box)
            if reason := _reason_to_skip(crop, text):
                counts[f"left out: {reason}"] += 1
                continue
            name = f"images/{receipt.stem}/{number:03d}.jpg"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            fit_line(crop, MAX_WIDTH).save(target / name, quality=95)
            labels[split].append(f"{name}\t{text}\n")
            characters.update(text)
            counts[split] += 1
    for split, entries in labels.items():
        write_atomic(target / f"{split}.txt", "".join(entries).encode())
    write_atomic(target / "charset.txt", "".join(sorted(characters)).encode())
    return dict(counts)


def _page(receipt: Path) -> Image.Image:
    try:
        return decode(receipt.read_bytes()).convert("L")
    except DataError as error:
        raise DataError(f"{receipt}: {error}") from error


def _boxes(folder: Path, name: str) -> Iterator[tuple[Box, str]]:
    """Bounding box (left, top, right, bottom) and text of each line of a receipt."""
    found = [p for s in ("csv", "txt") if (p := folder / "box" / f"{name}.{s}").exists()]
    if not found:
        raise DataError(f"no box/{name}.csv or .txt in {folder}")
    for line in found[0].read_text(encoding="utf-8-sig", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            *corners, text = line.split(",", 8)
            x1, y1, x2, y2, x3, y3, x4, y4 = (int(corner) for corner in corners)
        except ValueError as error:
            raise DataError(f"{found[0]}: not eight numbers and a text: {line!r}") from error
        xs, ys = (x1, x2, x3, x4), (y1, y2, y3, y4)
        yield (min(xs), min(ys), max(xs), max(ys)), " ".join(text.split())


def _crop(page: Image.Image, box: Box) -> Image.Image:
    left, right = (min(max(0, x), page.width) for x in (box[0], box[2]))
    top, bottom = (min(max(0, y), page.height) for y in (box[1], box[3]))
    return page.crop((left, top, right, bottom))


def _reason_to_skip(crop: Image.Image, text: str) -> str | None:
    if not crop.width or not crop.height:
        return "empty box"
    if not text or not text.isascii():
        return "no text, or not ASCII"
    if len(text) > MAX_LENGTH:
        return f"over {MAX_LENGTH} characters"
    width = round(crop.width * HEIGHT / crop.height)
    if width > MAX_WIDTH:
        return f"over {MAX_WIDTH} px wide"
    if width // FRAME < needed_frames(text):
        return "too narrow for CTC"
    return None


def _company(folder: Path, name: str) -> str:
    for path in (folder / "key" / f"{name}.json", folder / "entities" / f"{name}.txt"):
        if path.exists():
            try:
                entities = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
                return str(entities["company"]).upper()
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: not JSON with a company") from error
    return name


def _split(company: str, val_percent: int) -> str:
    number = int(hashlib.sha256(company.encode()).hexdigest(), 16) % 100
    return "val" if number < val_percent else "train"
