"""The parts of pages: tables and texts that no content can break out of, in a file that loads nothing from anywhere."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from remax.untrusted import harmless_json, printable

NOTHING = "\N{EN DASH}"


def safe(text: str) -> str:
    """Returns a text that can neither become markup nor steer what is around it."""
    return escape(printable(text))


def prose(text: str) -> str:
    """Returns a sentence with its flags and `commands` set as code."""
    return re.sub(r"`([^`]+)`|(--\w+)", lambda match: f"<code>{match[1] or match[2]}</code>", safe(text))


def document(title: str, body: str, *, style: str, data: str = "", script: str = "") -> str:
    """Returns a whole page. body must be safe already; data is what `embedded_json` returns.

    The content security policy lets the page load nothing and run no script but this one: even if a text became markup,
    it could neither run nor call home.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"; script-src 'sha256-{digest}'" if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}; base-uri 'none'; form-action 'none'"
    )
    tail = f'\n<script type="application/json" id="data">{data}</script>' if data else ""
    tail += f"\n<script>{script}</script>" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{safe(title)}</title>
<style>{style}</style>
</head>
<body>
{body}{tail}
</body>
</html>
"""


def embedded_json(content: Any) -> str:
    """Returns JSON that can stand in a script element: it has no character that ends the element or is not seen."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return harmless_json(text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    """Returns a table that scrolls by itself on a narrow screen; the texts must be safe already."""
    head = "<thead><tr>" + "".join(f"<th>{text}</th>" for text in heads) + "</tr></thead>" if heads else ""
    body = "\n".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>\n{body}\n</tbody></table></div>'


def pairs(values: Mapping[str, Any]) -> str:
    """Returns a table of names and settings."""
    return table([], [[safe(key), setting(value)] for key, value in values.items()], kind="text")


def folded(title: str, content: str) -> str:
    """Returns content that is shown when its title is clicked; the content must be safe already."""
    return f"<details><summary>{safe(title)}</summary>{content}</details>"


def setting(value: Any) -> str:
    """Returns a setting as it is written in YAML."""
    if value is None:
        return NOTHING
    return safe(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
