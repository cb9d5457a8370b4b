// What the page of the studio does in the browser itself: tooltips, keys, and a warning before work is lost.
(tips, keys, leaving) => {
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
