"""How a report looks: one stylesheet, light, dark and on paper, from 390 pixels up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Give each method a colour and a marker; the base is drawn in ink, sweeps in grey dashes."""
    drawn = [name for name in methods if name not in ("base", "line")]
    result = {name: Look(i % SERIES, MARKERS[i % len(MARKERS)]) for i, name in enumerate(drawn)}
    return {"base": Look("ink"), "line": Look("soft"), **result}


_PAGE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 FONT}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:21px;line-height:1.3;margin:52px 0 6px;letter-spacing:-.005em}
h3{font-size:16px;margin:22px 0 4px}
p{margin:6px 0 12px;max-width:50em}
header p{max-width:none}
.quiet,figcaption,caption{color:var(--soft);font-size:14.5px}
figcaption{max-width:54em;margin-top:6px}
.warning{border-left:4px solid var(--s1);padding:8px 14px;margin:16px 0}
nav{margin-top:12px;font-size:14.5px}
nav a{margin-right:16px;white-space:nowrap}
a{color:var(--s0)}
figure{margin:14px 0}
svg{display:block;max-width:100%;height:auto;overflow:visible}
.narrow{display:none}
.cards{display:grid;gap:6px 36px;margin:18px 0 8px;
 grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr))}
.card{border-top:3px solid var(--c);padding:10px 0 14px}
.card h3{margin:0;color:var(--c)}
.card dl{display:grid;grid-template-columns:1fr 1fr;gap:0 14px;margin:4px 0 0}
.card dt{color:var(--soft);font-size:13.5px;grid-row:1}
.card dd{margin:0;font-size:27px;line-height:1.2;font-variant-numeric:tabular-nums}
.card dd small{display:block;font-size:13.5px;line-height:1.45;color:var(--soft)}
.panels{display:grid;gap:22px 16px;margin:14px 0;
 grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr))}
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
.bar{display:inline-flex;width:180px;height:14px;margin-top:4px;background:var(--faint)}
.bar i{background:var(--c);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key{display:inline-block;white-space:nowrap;margin-left:.9em}
.key::before{content:"";display:inline-block;width:.8em;height:.8em;margin-right:.35em;background:var(--c)}
details{margin:8px 0;border-bottom:1px solid var(--faint);padding-bottom:8px}
summary{cursor:pointer;padding:3px 0;overflow-wrap:anywhere}
summary:focus-visible,a:focus-visible,.scroll:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:8px 0;padding:10px 14px;
 border-left:3px solid var(--faint);white-space:pre-wrap;overflow-wrap:anywhere}
.yes{color:var(--s2);font-weight:600}
.no{color:var(--s1);font-weight:600}
.tree details details,.leaf{margin:2px 0 2px 12px;padding:0 0 0 8px;border-bottom:0;border-left:1px solid var(--faint)}
.leaf{max-width:none;overflow-wrap:anywhere}
.tree small{color:var(--soft);white-space:normal}
footer{color:var(--soft);font-size:13.5px;padding-top:40px;padding-bottom:40px}
@media (max-width:720px){
 .wide{display:none}
 .narrow{display:block}
 h1{font-size:25px}
 h2{margin-top:40px}
 .cards{grid-template-columns:1fr}
 th,td{padding-right:11px}
 table{font-size:13.5px}
}
@media print{
 body{font-size:11pt}
 nav{display:none}
 main,header,footer{max-width:none;padding:0}
 h2{break-after:avoid}
 figure,.card,tr,.panels svg{break-inside:avoid}
 .scroll{overflow:visible}
 details::details-content{content-visibility:visible;block-size:auto}
}
"""


def css() -> str:
    """Write the report's stylesheet. Paper is always light."""
    dark = "@media screen and (prefers-color-scheme:dark){" + variables(DARK) + "}"
    return "\n".join([variables(LIGHT), dark, rules(), _PAGE.replace("FONT", FONT).strip()])
