r"""A Sphinx extension: plain words of the notebooks become links on the site.

"(2.13)" leads to the formula with \tag{2.13}, whose anchor is #eq-2-13; "chapter 4", "sections 2.10 and 2.11" and
"equation 1.1" lead where they say, "cell 02-027" to the code cell with that id. So the notebooks need no syntax that
Colab and GitHub do not know. Numbers that name nothing in the book stay as they are, and so does what is said of
another text: a section after a paper's link in the same sentence, "DDPM section 4.3", "section 4.3 there".
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

NUMBER = r"(?:\d\d-\d+\w*|\d+\.\d+[a-z]?|\d+)"
MENTION = re.compile(
    rf"\((?P<equation>\d+\.\d+[a-z]?)\)"
    rf"|\b(?P<word>chapter|section|equation|eq\.|cell)\s(?P<one>{NUMBER})"
    rf"|\b(?P<words>chapter|section|equation|eq|cell)s\.?\s(?P<list>{NUMBER}(?:(?:,|,? and|,? or| to|–)\s?{NUMBER})*)",
    re.IGNORECASE,
)
FOREIGN = "\0"  # stands for a link to another site in the text before a mention
NOT_TEXT = (nodes.literal, nodes.math, nodes.raw, nodes.reference, nodes.image)


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Give the equations and cells of one page their anchors, and note what can be named of it."""
    env, docname = app.env, app.env.docname
    found = {}
    for formula in doctree.findall(nodes.math_block):
        for tag in re.findall(r"\\tag\{([^}]*)\}", formula.astext()):
            formula["ids"].append(anchor := "eq-" + tag.replace(".", "-"))
            if f"equation {tag}" in {**targets(env), **found}:
                logging.getLogger(__name__).warning("equation (%s) is there twice", tag, location=formula)
            found[f"equation {tag}"] = anchor
    for section in doctree.findall(nodes.section):
        if number := re.match(r"(\d+)\. |(\d+\.\d+) ", section[0].astext()):
            found |= {f"chapter {number[1]}": ""} if number[1] else {f"section {number[2]}": section["ids"][0]}
    cells = list(doctree.findall(lambda node: node.get("nb_element") == "cell_code" if hasattr(node, "get") else False))
    if cells:
        ids = [cell["id"] for cell in json.loads(Path(env.doc2path(docname)).read_text(encoding="utf-8"))["cells"]]
        for cell in cells:
            cell["ids"].append(anchor := f"cell-{ids[cell['cell_index']]}")
            found[f"cell {ids[cell['cell_index']]}"] = anchor
    env.book_links = getattr(env, "book_links", {}) | {docname: found}


def targets(env: BuildEnvironment) -> dict[str, tuple[str, str]]:
    """What can be named, "equation 2.13": its page and its anchor there."""
    places = getattr(env, "book_links", {})
    return {name: (page, anchor) for page, found in places.items() for name, anchor in found.items()}


def forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    getattr(env, "book_links", {}).pop(docname, None)


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put links into the paragraphs of one page; those of lists, tables and quotes are among them."""
    if app.builder.format != "html":
        return
    known = targets(app.env)

    def link(name: str, text: str) -> nodes.Node:
        page, anchor = known.get(name, (docname, ""))
        if (page, anchor) == (docname, ""):  # not known, or this very chapter
            return nodes.Text(text)
        address = "" if page == docname else app.builder.get_relative_uri(docname, page)
        return nodes.reference("", text, internal=True, refuri=address + (anchor and f"#{anchor}"))

    for block in doctree.findall(lambda node: isinstance(node, nodes.paragraph | nodes.caption)):
        before = ""
        for text in list(block.findall(nodes.Text)):
            above = list(ancestors(text, block))
            if not any(isinstance(node, NOT_TEXT) for node in above):
                text.parent.replace(text, list(linked(str(text), before, link)))
            outside = any(re.match("https?:", node.get("refuri", "")) for node in above)
            before += FOREIGN if outside else str(text)


def ancestors(node: nodes.Node, last: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not last:
        node = node.parent
        yield node


def linked(text: str, before: str, link) -> Iterator[nodes.Node]:
    """The text in parts, each mention one that ``link(name, text)`` made."""
    done = 0
    for found in MENTION.finditer(text):
        kind = (found["word"] or found["words"] or "equation").lower().replace("eq.", "equation")
        kind = "equation" if kind == "eq" else kind
        if not found["equation"] and is_of_another_text(kind, before + text[: found.start()], text[found.end() :]):
            continue
        whole = [found] if found["equation"] else list(re.finditer(NUMBER, text[found.start() : found.end()]))
        for i, number in enumerate(whole):
            begin, end = found.span() if found["equation"] else (found.start() + x for x in number.span())
            begin = found.start() if i == 0 else begin  # the word belongs to the first link
            if begin > done:
                yield nodes.Text(text[done:begin])
            yield link(f"{kind} {found['equation'] or number[0]}", text[begin:end])
            done = end
    if done < len(text):
        yield nodes.Text(text[done:])


def is_of_another_text(kind: str, before: str, after: str) -> bool:
    """Whether "section 4.3" is a paper's: by what stands before it in its sentence, and what after it."""
    if kind == "cell":
        return False  # no other text has ours
    before = re.sub(r"arXiv:\d+\.\d+", FOREIGN, before).replace("et al.", "et al")
    sentence = re.split(r"[.!?]\s", before)[-1]
    named = re.search(r"(\0[),]?|\b[A-Z]{2,}\w*|et al|\b\d{4}\)?|[A-Z]\w+'s)[,:;]?\s\(?$", sentence)
    return bool(
        named or (kind == "section" and FOREIGN in sentence) or re.match(r"\s(there\b|(of|in) (the )?[A-Z])", after)
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", collect)
    app.connect("doctree-resolved", resolve)
    app.connect("env-purge-doc", forget)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
