"""Ask each address that the book and the README name whether it is still there: python tools/links.py

Prints the dead ones (404 and 410, or no such host) and ends with 1 if there are any. Other answers are no proof: some
sites turn programs away.
"""

import http.client
import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.md"), *ROOT.glob("book/*.md"), *ROOT.glob("book/*.ipynb")]


def dead(address: str) -> str:
    """Why it is dead, or nothing."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        return str(error.code) if error.code in (404, 410) else ""
    except OSError as error:
        return str(error) if "Name or service" in str(error) else ""
    except http.client.HTTPException:  # an answer, though a malformed one
        return ""
    return ""


def main() -> int:
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    addresses = sorted(set(re.findall(r"(?:\]\(|href=\\?\")(https?://[^)\s#\"\\]+)", text)))
    with ThreadPoolExecutor(8) as pool:
        answers = list(zip(addresses, pool.map(dead, addresses), strict=True))
    for address, why in answers:
        if why:
            print(f"{address}: {why}")
    print(f"{len(addresses)} addresses, {sum(bool(why) for _, why in answers)} dead")
    return any(why for _, why in answers)


if __name__ == "__main__":
    sys.exit(main())
