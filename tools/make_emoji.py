"""Write the emoji that ship in the package: python tools/make_emoji.py IMAGES NAMES.

IMAGES and NAMES are the unpacked npm packages emoji-datasource-google (16.0.0) and emojibase-data (16.0.3): `npm pack`
fetches each, `tar xf` unpacks it. The first has Noto's emoji at 32×32 pixels, the second their CLDR names in English.
Written are one sheet, on white, in the order of the source, and each emoji's name and group.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from ddpm_tutorial.words import EMOJI_FOLDER, EMOJI_SIZE

COLUMNS = 44
CELL = EMOJI_SIZE + 2  # of the source, which has a frame of one pixel around each

source, named = Path(sys.argv[1]), Path(sys.argv[2])
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
