"""Texts of a run's page, each token coloured by its loss: see `snapshots` for what is shown."""

import html
import unicodedata
from typing import Any

from infctx.tokentext import HIDDEN

EDGES = (0.1, 0.5, 1.0, 2.0, 3.0, 4.5, 6.5)  # nats between two colours
_LIGHT = ("#ffffff", "#fff1e2", "#ffe2c4", "#ffd0a0", "#ffbb78", "#ffa352", "#f98a3c", "#ee7038")
_DARK = ("#16181c", "#261d15", "#362212", "#47270f", "#592d0c", "#6c330a", "#7f390b", "#933f10")


def style() -> str:
    """CSS of the colours, which readable text lies on, and of the line that says a token's loss."""
    light, dark = (
        "".join(f"--loss{i}:{x};" for i, x in enumerate(colours)) for colours in (_LIGHT, _DARK)
    )  # dark ones are for a dark page
    levels = "".join(f".l{i}{{background:var(--loss{i})}}" for i in range(len(_LIGHT)))
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{levels}"
        ".text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;margin:.5rem 0;font-size:.95rem}"
        ".text span,.key span{padding:.15em 0;outline-offset:-1px}"
        ".key{line-height:2}.key span{display:inline-block;line-height:1.4;padding:0 .5em;border:1px solid var(--grid)}"
        ".none{color:var(--soft);text-decoration:underline dotted}"
        ".text span:hover,.text span:focus{outline:2px solid currentColor}"
        ".text span:hover::after,.text span:focus::after{content:attr(data-l);position:fixed;left:0;right:0;bottom:0;"
        "padding:.6rem 1rem;background:var(--ink);color:var(--paper);text-align:center;font:1rem system-ui,sans-serif}"
    )


def section(samples: list[dict[str, Any]]) -> str:
    """The texts with a key of the colours. Args: samples: what samples.json holds."""
    texts = "".join(_sample(x) for x in samples)
    return (
        "<p>What the trained model made of the beginning of "
        f"{'held-out documents' if samples[0]['held_out'] else 'documents that it learnt from: none is held out'}, "
        "read in segments with the state carried on. Hover over a token, or tap it, for its loss.</p>"
        f"{_key()}{texts}"
    )


def _key() -> str:
    names = [f"below {EDGES[0]:g}", *(f"{a:g}" for a in EDGES)]
    cells = "".join(f'<span class="l{i}">{name}</span>' for i, name in enumerate(names))
    return f'<p class="key">Loss in nats, from: {cells} <span class="none">not learnt</span></p>'


def _sample(sample: dict[str, Any]) -> str:
    head = f"<h3>{html.escape(sample['source'])}, a document of {sample['tokens']:,} tokens</h3>"
    out, end = [head], 0
    for part in sample["parts"]:
        if part["begin"] > end:
            out.append(f"<p><em>{part['begin'] - end:,} tokens later, in segment "
                       f"{part['begin'] // sample['segment_length'] + 1}:</em></p>")  # fmt: skip
        pieces = "".join(_piece(text, losses) for text, losses in part["pieces"])
        out.append(f'<p class="text" dir="auto">{pieces}</p>')
        end = part["begin"] + sum(len(losses) for _, losses in part["pieces"])
    return "".join(out)


def _piece(text: str, losses: list[float | None]) -> str:
    known = [x for x in losses if x is not None]
    if not known:
        kind, said = "none", "not learnt, or the first token"
    else:
        mean = sum(known) / len(known)
        kind = f"l{sum(mean >= edge for edge in EDGES)}"
        said = f"{mean:.2f} nats" if len(losses) == 1 else f"{len(losses)} tokens, {sum(known):.2f} nats"
    return f'<span class="{kind}" tabindex="-1" data-l="{said}">{_visible(text)}</span>'


def _visible(text: str) -> str:
    """Line breaks with a sign, other control characters as signs, the end of a document as one."""
    if not text:
        return "∎"
    return html.escape("".join(_shown(x) for x in text)).replace("\n", "↵\n")


def _shown(x: str) -> str:
    if x in "\n\t" or unicodedata.category(x) not in HIDDEN:
        return x
    return chr(0x2400 + ord(x)) if ord(x) < 32 else x.encode("unicode_escape").decode()
