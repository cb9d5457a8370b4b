// What the page of the studio does in the browser itself: tooltips, keys, and a warning before work is lost.
() => {
  // Tooltip of each control, by its id.
  const tips = {
    class: "The class to draw; type to search by name or id.",
    seed: "Another seed gives another picture; the same one gives the same.",
    steps: "Network evaluations for each level, 1 to 1,000; more take longer.",
    temperature: "Factor of the noise: below 1, pictures are cleaner and more alike.",
    generate: "Draw a new trajectory of this class and seed (key g).",
    stop: "End what you are drawing (key Esc).",
    pick: "What a click on the board selects.",
    join: "How a new selection is combined with the one before.",
    cosine: "For 'similar tokens': least cosine with the clicked token.",
    "invert-selection": "Select all tokens of the level that are not selected.",
    "grow-selection": "Add one token on all sides.",
    "shrink-selection": "Remove one token on all sides.",
    "clear-selection": "Select nothing.",
    undo: "Take back the last edit, drawing or opening (key u).",
    redo: "Repeat what was undone last (key y).",
    "at-level": "Level of the token, 0 is the coarsest.",
    "at-row": "Row of the token, from above.",
    "at-column": "Column of the token, from the left.",
    "select-token": "Does what a click on this token would do.",
    take: "Remember the mean of the selected tokens (key t).",
    "take-tokens": "Remember the selected tokens one by one.",
    prototype: "Number of a prototype, as on the page of the vocabulary.",
    "take-prototype": "Remember the features of this prototype.",
    strength: "How far tokens move to the taken features; below 0 they move away.",
    apply: "Put the taken features into the selected tokens (key a).",
    give: "Merge each selected token into the region next to it.",
    "grow-region": "Move the border of the selected region outwards by one token.",
    "shrink-region": "Move the border of the selected region inwards by one token.",
    keep: "This level and coarser ones stay; the finer ones are drawn again.",
    "resume-seeds": "One seed for all finer levels, or one for each.",
    resume: "Draw the finer levels again from the kept ones (key r).",
    "paint-level": "The level whose tokens are painted.",
    "use-painting": "Select the tokens under the paint.",
    pin: "Compare with the trajectory as it is now from here on.",
    compare: "Show what changed since the pinned trajectory.",
    "sweep-kind": "Change features, or grow the region.",
    "sweep-seeds": "Such as 0-3 or 0,5,9.",
    "sweep-levels": "Levels that are edited, one after the other.",
    "sweep-strengths": "Strengths of the edit, such as 0.5,1.",
    "run-sweep": "Draw and measure all of them; Stop ends it.",
    "file-name": "Name of the files, without folder and ending.",
    save: "Write a file to load again.",
    export: "Write a page that opens in any browser.",
    report: "Write its edits and numbers.",
    download: "Copy the file that was written or chosen last to your own machine.",
    saved: "Trajectories in the folder of the studio.",
    load: "Open the chosen trajectory in place of the one on the board.",
    refresh: "Read the folder again.",
  };
  // Key → the button that it presses, by its id; not while a text is typed.
  const keys = { g: "generate", t: "take", a: "apply", r: "resume", u: "undo", y: "redo", Escape: "stop" };
  const leaving = "The edits of this trajectory are not saved. Go on without them?";
  if (window.studioIsReady) return;
  window.studioIsReady = true;
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
    if (!event.target.closest("#generate, #load") || !unsaved() || confirm(leaving)) return;
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
}
