"""The style sheet of an HTML report, and its colours.

Colours are rows of a table: a name, what it is by day and what it is by night. Text in any of `TEXTS` has a contrast of
at least 4.5 to 1 on both grounds (WCAG 2.2, AA); a colour never says anything that a word beside it does not.

On a narrow screen the rows of a table with the class ``cards`` become cards, each cell under its column's name
(``data-label``); a table with the class ``wide`` keeps its columns and is moved sideways within its frame, its first
column staying. On paper the day's colours are used and whatever is folded away is shown.
"""

from __future__ import annotations

from collections.abc import Mapping

# name: (day, night)
COLOURS: Mapping[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#12161c"),
    "panel": ("#f5f6f8", "#1a2029"),
    "line": ("#dde1e7", "#2e3743"),
    "ink": ("#1a212c", "#e3e8ef"),
    "quiet": ("#566172", "#9da9b8"),
    "accent": ("#2458b0", "#8db6ff"),
    "good": ("#14713a", "#6fd598"),
    "bad": ("#b3261e", "#ff8a80"),
    "unsure": ("#805300", "#f2c14e"),
}
GROUNDS = ("paper", "panel")
TEXTS = ("ink", "quiet", "accent", "good", "bad", "unsure")


def _palette(place: int) -> str:
    return " ".join(f"--{name}: {pair[place]};" for name, pair in COLOURS.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_palette(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_palette(1)} }} }}
@media print {{ :root {{ color-scheme: light; {_palette(0)} }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: .9375rem/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
header, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 1.75rem; } footer { padding-bottom: 2rem; color: var(--quiet); font-size: .85rem; }
h1, h2, h3, p, dl, dd, figure, ul { margin: 0; }
h1 { font-size: 1.65rem; line-height: 1.25; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3, figcaption, summary { font-size: .9rem; font-weight: 600; } h3 { margin: 1.1rem 0 .3rem; }
p { max-width: 46rem; } p + p { margin-top: .4rem; }
ul { padding-left: 1.2rem; } li { margin: .15rem 0; max-width: 46rem; }
code { font: .92em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
.quiet, small { color: var(--quiet); } small { font-size: .85em; font-weight: 400; }
.good { color: var(--good); } .bad { color: var(--bad); } .unsure { color: var(--unsure); }
.what { color: var(--quiet); font-size: .9rem; margin-bottom: .9rem; }
.verdict { border-left: 4px solid currentColor; padding-left: .9rem; }
.verdict + p, .verdict + p ~ p { padding-left: calc(.9rem + 4px); margin-top: .5rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin-top: 1.4rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.facts > div { padding: .6rem .8rem; border: solid var(--line); border-width: 0 1px 1px 0; margin: 0 -1px -1px 0; }
.facts dt { font-size: .8rem; color: var(--quiet); } .facts dd { font-size: 1.2rem; font-weight: 600; }
.facts dd small { display: block; font-size: .8rem; }
.pairs { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: .15rem 1.2rem; font-size: .9rem; }
.pairs dt { color: var(--quiet); }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; vertical-align: top; font-weight: 400;
  border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-size: .8rem; line-height: 1.3; vertical-align: bottom; }
.n { text-align: right; white-space: nowrap; }
th.group { padding-top: .9rem; font-weight: 600; } th.group small { margin-left: .5rem; }
td.why { font-size: .82rem; } td strong { white-space: nowrap; }
td:empty::before { content: "–"; color: var(--quiet); }
tbody th { min-width: 6rem; } td:not(.n) { min-width: 5.6rem; }
tbody th small { display: block; } th.group small { display: inline-block; } .snug table { width: auto; }
.frame { overflow-x: auto; max-width: 100%; }
.frame:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.wide table { min-width: 56rem; } .wide td.text { min-width: 12rem; }
.wide td span { white-space: nowrap; }
.wide tbody th { position: sticky; left: 0; background: var(--paper); min-width: 9.5rem; max-width: 15rem; }
details { margin-top: .8rem; } summary { cursor: pointer; padding: .3rem 0; }
details[open] > summary { margin-bottom: .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem 2rem; }
figcaption small { display: block; } figcaption { margin-bottom: .4rem; }
svg { display: block; width: 100%; overflow: visible; }
svg text { font: 11px system-ui, sans-serif; fill: var(--quiet); unicode-bidi: isolate; stroke: var(--paper);
  stroke-width: 3px; stroke-linejoin: round; paint-order: stroke; }
svg .axis { stroke: var(--line); stroke-width: 1; } svg .mark { stroke: var(--quiet); stroke-dasharray: 2 3; }
svg .fill { fill: var(--accent); } svg .bar { fill: var(--accent); opacity: .85; }
svg .stroke { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg .own { fill: none; stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 5 3;
  vector-effect: non-scaling-stroke; }
svg .dots { fill: none; stroke: var(--accent); stroke-width: 6; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
svg .wrong { stroke: var(--bad); } svg .jump { stroke: var(--bad); stroke-width: 1.5; }
svg text.jumped { fill: var(--bad); font-weight: 600; }
.depth { padding-left: 3.4rem; padding-right: .4rem; }
.key { font-size: .8rem; color: var(--quiet); margin-bottom: .2rem; }
.key span { white-space: nowrap; margin-right: 1.1rem; }
.key svg { display: inline-block; width: 1.6rem; height: .6rem; margin-right: .4rem; }
td.plot { min-width: 8rem; } td.plot svg { margin-top: .25rem; }
@media (max-width: 48rem) {
  header, main, footer { padding-left: 1rem; padding-right: 1rem; } header { padding-top: 1.2rem; }
  h1 { font-size: 1.4rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  .facts > div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .cards table, .cards tbody { display: block; width: 100%; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .35rem .8rem; padding: .6rem 0;
    border-bottom: 1px solid var(--line); }
  .cards th, .cards td { display: block; border: 0; padding: 0; text-align: left; white-space: normal; min-width: 0; }
  .cards td:empty { display: none; }
  .cards td[data-label]::before { content: attr(data-label); display: block; font-size: .78rem; color: var(--quiet); }
  .cards tbody th, .cards td.text, .cards td.plot, .cards td.why { grid-column: 1 / -1; }
  .cards tbody th { font-weight: 600; } th.group small { margin-left: 0; }
  .cards tr:has(> th.group) { border-bottom: 0; padding-bottom: 0; }
  .pairs { grid-template-columns: 6rem minmax(0, 1fr); gap: .15rem .8rem; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 10.5px; } svg text { font-size: 9px; } header, main, footer { max-width: none; padding: 0; }
  tr, figure, .facts > div { break-inside: avoid; } h2, h3, summary { break-after: avoid; }
  thead { display: table-header-group; } .frame { overflow: visible; } .wide table { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
