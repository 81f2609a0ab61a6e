"""Docstrings as the API reference has them: what `help()` shows, in Google's form and Markdown."""

import re

import griffe

# Sphinx's roles become links, where the reference has an entry, or code.
ROLE = re.compile(r":(?:func|class|meth|mod):`(?P<name>[\w.]+)`")
LINKED = re.compile(r"(?:attn_ext\.)?((?:[Aa]dditive_?[A-Z_a-z]+|AttentionMemory)(?:\.\w+)?)")
# Entries for several arguments, "name, name: text", become one for each, with type and default.
SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+): (?P<text>.+(?:\n(?P=indent) +.*)*)", re.M
)


def as_markdown(role: re.Match) -> str:
    name = role["name"]
    entry = LINKED.fullmatch(name)
    return f"[`{name}`][attn_ext.{entry[1]}]" if entry else f"`{name}`"


def one_by_one(entry: re.Match) -> str:
    names = re.split(r",\s+", entry["names"])
    return "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in names)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = ROLE.sub(as_markdown, obj.docstring.value)
            text = SHARED.sub(one_by_one, text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
