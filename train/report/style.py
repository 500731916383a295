"""How a report looks: one stylesheet, light, dark and on paper, from 390 pixels up."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxmerge.files.inspect.canvas import DARK, FONT, LIGHT, SERIES, rules, variables

MARKERS = ("o", "s", "D", "^", "h")
"""Their number is coprime with that of the colours: 35 different pairs."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How one method is drawn, everywhere in a report."""

    fill: str | int
    """The name of a colour, or the number of a series."""
    marker: str = "o"

    @property
    def css(self) -> str:
        return f"var(--s{self.fill % SERIES})" if isinstance(self.fill, int) else f"var(--{self.fill})"


def looks(methods: Sequence[str], swept: Collection[str] = ()) -> dict[str, Look]:
    """Give each method a colour and a marker; the base is drawn in ink, sweeps (`line`, `swept`) in grey dashes."""
    grey = {"line", *swept}
    drawn = [name for name in methods if name != "base" and name not in grey]
    result = {name: Look(i % SERIES, MARKERS[i % len(MARKERS)]) for i, name in enumerate(drawn)}
    return {"base": Look("ink"), **dict.fromkeys(grey, Look("soft")), **result}


# What is of no method has no method's colour: shares in bars are grey, the third of them hatched.
_HATCHED = "repeating-linear-gradient(45deg,var(--n0) 0 2px,transparent 2px 5px)"
_GREY_LIGHT = {"n0": "#4a5561", "n1": "#98a2ae", "n2": _HATCHED}
_GREY_DARK = {"n0": "#b4bec9", "n1": "#727d89", "n2": _HATCHED}


_PAGE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 FONT}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:30px;line-height:1.2;margin:0 0 10px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:21px;line-height:1.3;margin:52px 0 6px;letter-spacing:-.005em}
h3{font-size:16px;margin:22px 0 4px}
p{margin:6px 0 12px;max-width:50em}
.lead{font-size:19px;line-height:1.5;max-width:46em;overflow-wrap:anywhere}
ul.lead{padding-left:1.1em;margin:6px 0 12px}
.quiet,figcaption,caption{color:var(--soft);font-size:14.5px}
figcaption{max-width:54em;margin-top:6px}
.warning{border-left:4px solid var(--n0);padding:8px 14px;margin:16px 0}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:14px 0;font-size:14.5px}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
.whole .bar{display:flex;width:100%;height:10px;margin:0 0 4px}
nav{margin-top:12px;font-size:14.5px}
nav a{margin-right:16px;white-space:nowrap}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.15em}
figure{margin:14px 0}
svg{display:block;max-width:100%;height:auto;overflow:visible}
.narrow{display:none}
.cards{display:grid;gap:6px 36px;margin:18px 0 8px;
 grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr))}
.card{border-top:3px solid var(--c);padding:10px 0 14px}
.card h3{margin:0;color:var(--c);overflow-wrap:anywhere}
.card dl{display:grid;grid-template-columns:1fr 1fr;gap:0 14px;margin:4px 0 0}
.card dt{color:var(--soft);font-size:13.5px;grid-row:1}
.card dd{margin:0;font-size:27px;line-height:1.2;font-variant-numeric:tabular-nums}
.card dd small{display:block;font-size:13.5px;line-height:1.45;color:var(--soft)}
.panels{display:grid;gap:22px 16px;margin:14px 0;
 grid-template-columns:repeat(auto-fill,minmax(min(var(--w,330px),100%),1fr))}
.answers{display:grid;gap:4px 24px;margin:4px 0 22px;
 grid-template-columns:repeat(auto-fill,minmax(min(240px,100%),1fr))}
.answer{border-top:2px solid var(--c);padding:6px 0 2px;min-width:0}
.answer h4{margin:0;font-size:14.5px;color:var(--c);overflow-wrap:anywhere}
.answer h4 span{color:var(--ink);float:right;padding-left:8px}
.answer pre{margin:4px 0;padding:0;border:0}
.asked{margin-top:20px;overflow-wrap:anywhere;white-space:pre-wrap}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;font-size:14.5px;font-variant-numeric:tabular-nums;min-width:min(100%,420px)}
caption{text-align:left;padding-bottom:6px}
caption>span{display:block;position:sticky;left:0;max-width:min(54em,calc(100vw - 40px))}
th,td{padding:5px 18px 5px 0;text-align:right;vertical-align:top;white-space:nowrap;
 border-top:1px solid var(--faint)}
th{font-weight:600}
thead th{border-top:0}
thead+tbody tr:first-child>*,tr.first>*{border-top-color:var(--soft)}
th.l,td.l{text-align:left}
td small,th small{display:block;color:var(--soft);font-size:12.5px;font-weight:400}
.bar{display:inline-flex;width:160px;height:14px;margin-top:4px;background:var(--faint)}
.bar i{background:var(--c);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key{display:inline-block;white-space:nowrap;margin-left:.9em}
.key::before{content:"";display:inline-block;width:.8em;height:.8em;margin-right:.35em;background:var(--c);
 print-color-adjust:exact;-webkit-print-color-adjust:exact}
details{margin:8px 0;border-bottom:1px solid var(--faint);padding-bottom:8px}
summary{cursor:pointer;padding:3px 0;overflow-wrap:anywhere}
summary:focus-visible,a:focus-visible,.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--ink);
 outline-offset:2px}
pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:8px 0;padding:10px 14px;
 border-left:3px solid var(--faint);white-space:pre-wrap;overflow-wrap:anywhere}
.copy{-webkit-user-select:all;user-select:all}
.yes,.no{font-weight:600}
.yes::before{content:"✓ "}
.no::before{content:"✗ "}
.tree details details,.leaf{margin:2px 0 2px 12px;padding:0 0 0 8px;border-bottom:0;border-left:1px solid var(--faint)}
.leaf{max-width:none;overflow-wrap:anywhere}
.tree small{color:var(--soft);white-space:normal}
footer{color:var(--soft);font-size:13.5px;padding-top:40px;padding-bottom:40px}
@media screen and (max-width:720px){
 .wide{display:none}
 .narrow{display:block}
 h1{font-size:25px}
 h2{margin-top:40px}
 .lead{font-size:17.5px}
 .cards{grid-template-columns:1fr}
 .facts{grid-template-columns:1fr;gap:0}
 .facts dd{margin-bottom:6px}
 th,td{padding-right:11px}
 table{font-size:13.5px}
 .stack,.stack caption,.stack tbody{display:block}
 .stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
 .stack tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:2px 12px;padding:7px 0 9px;
  border-top:1px solid var(--faint)}
 .stack tbody tr:first-child,.stack tr.first{border-top-color:var(--soft)}
 .stack tbody th,.stack td{display:block;border:0;padding:0;text-align:left;white-space:normal;overflow-wrap:anywhere}
 .stack tbody th{grid-column:span 2;align-self:end}
 .stack .across{grid-column:1/-1}
 .stack td::before{content:attr(data-l);display:block;color:var(--soft);font-size:12px;line-height:1.3}
 .stack td.across::before{content:none}
 .stack .bar{display:flex;width:100%}
}
@media print{
 body{font-size:11pt}
 nav{display:none}
 main,header,footer{max-width:none;padding:0}
 h2,.asked{break-after:avoid}
 figure,.card,.answer,tr,.panels svg{break-inside:avoid}
 .scroll{overflow:visible}
 details::details-content{content-visibility:visible;block-size:auto}
}
"""


def css(methods: int = 0) -> str:
    """Write the report's stylesheet. Paper is always light.

    Args:
      methods: how many colours of the series mean a method on this page; those that an analysis gives to domains and
        models begin after them.
    """
    light, dark = _colours(LIGHT, _GREY_LIGHT, methods), _colours(DARK, _GREY_DARK, methods)
    dark = "@media screen and (prefers-color-scheme:dark){" + dark + "}"
    return "\n".join([light, dark, rules(), _PAGE.replace("FONT", FONT).strip()])


def _colours(palette: Mapping[str, Any], grey: Mapping[str, str], methods: int) -> str:
    written = variables(palette) + ":root{" + ";".join(f"--{name}:{value}" for name, value in grey.items()) + "}"
    if methods % SERIES:
        turned = {f"s{i}": palette["series"][(i + methods) % SERIES] for i in range(SERIES)}
        written += "#analysis{" + ";".join(f"--{name}:{value}" for name, value in turned.items()) + "}"
    return written
