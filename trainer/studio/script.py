"""What the page of the studio does in the browser itself: tooltips, keys, and a warning before work is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping

KEYS = {
    "g": "generate",
    "t": "take",
    "a": "apply",
    "r": "resume",
    "u": "undo",
    "y": "redo",
    "Escape": "stop",
}
"""Key → the button that it presses, by its id; not while a text is typed."""
KEYS_TEXT = (
    "**g** generate · **t** take mean · **a** apply features · **r** resume · **u** undo · **y** redo · **Esc** stop. "
    "The boxes below select a token without a mouse; the choices above say how."
)
LEAVING = "The edits of this trajectory are not saved. Go on without them?"
SCRIPT = """() => {
  if (window.studioIsReady) return;
  window.studioIsReady = true;
  const tips = %(tips)s, keys = %(keys)s;
  const unsaved = () => Boolean(document.querySelector("#unsaved")?.textContent.trim());
  const dress = () => {
    for (const [id, text] of Object.entries(tips)) {
      const place = document.getElementById(id);
      if (!place || place.title === text) continue;
      place.title = text;
      const controls = place.matches("button") ? [place] : place.querySelectorAll("input, textarea");
      controls.forEach((control) => control.setAttribute("aria-description", text));
    }
    const status = document.getElementById("status");
    if (!status) return;
    status.setAttribute("role", "status");
    status.classList.toggle("warning", status.textContent.trim().startsWith("⚠"));
  };
  let planned = false;
  const plan = () => {
    if (planned) return;
    planned = true;
    requestAnimationFrame(() => { planned = false; dress(); });
  };
  new MutationObserver(plan).observe(document.body, { childList: true, subtree: true, characterData: true });
  dress();
  addEventListener("beforeunload", (event) => { if (unsaved()) event.preventDefault(); });
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#generate, #load") || !unsaved() || confirm(%(leaving)s)) return;
    event.stopPropagation();
    event.preventDefault();
  }, true);
  const typed = "textarea, select, [contenteditable=true], input:not([type=radio], [type=checkbox], [type=range])";
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys) || event.target.closest(typed)) return;
    const button = document.getElementById(keys[event.key]);
    if (!button) return;
    event.preventDefault();
    button.click();
  });
}"""
CSS = """
#board img {cursor: crosshair}
#board, #comparison, #slider {min-width: 0}
.gradio-container {padding-bottom: 120px !important}
@media (max-width: 480px) {.tab-container > button {padding-inline: 9px}}
.gradio-container input[type=range] {min-width: 0; max-width: 100%}
.gradio-container input[type=number] {min-width: 3.5rem}
#header h1 {margin: 0; font-size: 1.5rem; letter-spacing: -0.015em}
#header p {margin: 0.15rem 0 0; overflow-wrap: anywhere}
#unsaved {position: absolute; top: 2px; right: 12px; width: max-content; color: #b45309; font-weight: 600}
.dark #unsaved {color: #fbbf24}
#unsaved * {color: inherit !important}
#status {position: fixed; inset: auto 0 0 0; z-index: 1000; padding: 8px 24px; background: #1d1f25; color: #f5f5f2;
  text-align: center; pointer-events: none; overflow-wrap: anywhere}
#status.warning {background: #7c2412}
#status * {color: inherit !important; background: none !important}
#drawing, #typed {align-items: flex-end}
.narrow {align-items: stretch}
.narrow > button {min-width: 100px !important; padding-inline: 6px; font-size: 14px}
#comparison .icon-button-wrapper {inset: auto 0 0 auto}
#scores, #swept {--paper: var(--background-fill-primary) 30%, transparent; --dark: rgb(0 0 0 / 0.28), transparent;
  overflow-x: auto; font-size: 12.5px;
  background: linear-gradient(to right, var(--paper)) 0 / 40px 100% no-repeat local,
  linear-gradient(to left, var(--paper)) 100% / 40px 100% no-repeat local,
  linear-gradient(to right, var(--dark)) 0 / 14px 100% no-repeat scroll,
  linear-gradient(to left, var(--dark)) 100% / 14px 100% no-repeat scroll}
#scores :is(th, td), #swept :is(th, td) {padding: 3px 6px; text-align: left; overflow-wrap: normal; word-break: normal;
  border: 0; border-bottom: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums}
:is(#scores, #swept) :is(table, tr) {border: 0 !important}
#swept :is(th, td):nth-child(2) {min-width: 130px}
#swept td:nth-child(n + 5) {white-space: nowrap}
#status p {margin: 0}
:focus-visible {outline: 2px solid #4f6bed !important; outline-offset: 2px}
"""
"""Messages are a bar along the lower edge of the window, so they are in view wherever one has scrolled; the page ends
with as much room. On a phone all tabs fit without Gradio's menu of further tabs. The shadows at the sides of a table
say that it goes on there."""


def script(tips: Mapping[str, str]) -> str:
    """The function that the page calls when it is loaded. tips: tooltip of each control by its id."""
    return SCRIPT % {"tips": json.dumps(tips), "keys": json.dumps(KEYS), "leaving": json.dumps(LEAVING)}
