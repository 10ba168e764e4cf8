"""Style sheet of the page, in light and dark."""

CSS = """
:root {
  --ink: #1c2330; --soft: #667085; --rule: #e4e7ec; --paper: #f6f7f9; --card: #fff; --accent: #3457d5; --yes: #12805c;
  --no: #c4320a;
}
@media(prefers-color-scheme:dark) {
  :root {
    --ink: #e6e9ef; --soft: #98a2b3; --rule: #2b3342; --paper: #10141c; --card: #181e29; --accent: #8aa4ff;
    --yes: #4cc38a; --no: #ff8b66;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 20px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 18px 0 4px; }
h4 { font-size: 13px; margin: 12px 0 0; color: var(--soft); font-weight: 500; }
h3 small { color: var(--soft); font-weight: 400; margin-left: 6px; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(190px,1fr)); gap: 12px; margin-bottom: 16px;
}
.tile {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; display: flex;
  flex-direction: column;
}
.tile span { color: var(--soft); font-size: 13px; }
.tile b { font-size: 20px; white-space: nowrap; letter-spacing: -.02em; }
.tile small { color: var(--soft); }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px;
  margin-bottom: 16px;
}
.wide { display: grid; grid-template-columns: 1fr 1fr; gap: 0 24px; }
.wide h2 { grid-column: 1/-1; }
@media(max-width:760px) {
  .wide { grid-template-columns: 1fr; }
}
figure { margin: 0 0 12px; }
figcaption { color: var(--soft); font-size: 13px; margin-bottom: 4px; }
svg { width: 100%; max-width: 720px; height: auto; display: block; font: 12px system-ui,sans-serif; }
svg text { fill: var(--soft); }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke: var(--accent); stroke-width: 2.2; stroke-linejoin: round; }
svg .pale { opacity: .3; stroke-width: 1.3; }
svg circle,svg rect { fill: var(--accent); }
svg .interval { stroke: var(--accent); stroke-width: 3; opacity: .45; }
table { border-collapse: collapse; margin: 10px 0; width: 100%; }
td,th { border-top: 1px solid var(--rule); padding: 7px 10px 7px 0; text-align: left; vertical-align: top; }
tr:first-child>td,tr:first-child>th { border-top: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
td { font-variant-numeric: tabular-nums; }
code,pre { font: 13px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace; }
code { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.samples td { width: 26%; }
.samples td:nth-child(2) { width: 12%; }
.yes,.no { font-style: normal; font-weight: 700; float: left; margin-right: 8px; }
.yes { color: var(--yes); }
.no { color: var(--no); }
.gauge {
  height: 10px; border-radius: 5px; background: var(--rule); overflow: hidden; margin: 0 0 14px; max-width: 720px;
}
.gauge i { display: block; height: 100%; background: var(--accent); }
.preview {
  border: 1px solid var(--rule); border-radius: 8px; padding: 12px; margin-top: 10px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.6 ui-monospace,SFMono-Regular,Menlo,monospace;
}
.warning {
  background: #fff4e5; color: #7a4100; border: 1px solid #ffd8a8; border-radius: 8px; padding: 8px 12px;
}
.preview .trained { color: #111; border-radius: 3px; }
details summary { cursor: pointer; color: var(--accent); margin-top: 8px; }
.none { color: var(--soft); }
"""
