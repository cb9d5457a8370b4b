"use strict";
(() => {
  document.documentElement.classList.add("js");
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function fill(range) {
    const span = range.max - range.min;
    range.style.setProperty("--done", `${span ? (100 * (range.value - range.min)) / span : 0}%`);
  }

  function setLevel(card, level) {
    const items = card.querySelectorAll(".levels li");
    const own = card.querySelector(".own-level");
    level = clamp(level, 0, items.length - 1);
    // Coarser layers stay lit below the finest one shown, so that a step fades between two levels, not to nothing.
    for (const stack of card.querySelectorAll(".stack"))
      [...stack.children].forEach((image, i) => image.classList.toggle("on", i <= level));
    items.forEach((item, i) => item.classList.toggle("on", i === level));
    card.dataset.level = level;
    if (!own) return; // one level has no slider
    own.value = level;
    own.setAttribute("aria-valuetext", items[level].textContent.trim());
    fill(own);
  }

  function setReveal(card, percent) {
    percent = clamp(percent, 0, 100);
    card.style.setProperty("--cut", `${percent}%`);
    card.classList.toggle("open", percent > 0 && percent < 100);
    const source = card.querySelector(".source img") ?? card.querySelector(".view:last-child .stack img:last-child");
    for (const under of card.querySelectorAll(".under")) if (percent > 0 && !under.src) under.src = source.src;
    for (const grip of card.querySelectorAll(".grip")) grip.setAttribute("aria-valuenow", Math.round(percent));
    card.dataset.reveal = percent;
  }

  function addDivider(card, frame, isFirst, name) {
    const under = new Image();
    under.className = "under";
    under.alt = "";
    frame.prepend(under);
    frame.insertAdjacentHTML("beforeend", '<div class="divider"></div><div class="grip"></div>');
    const grip = frame.querySelector(".grip");
    if (isFirst) {
      // One stop for the keyboard per card: every divider of a card moves with it.
      const attributes = { role: "slider", tabindex: 0, "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": `Reveal the ${name}` };
      for (const [key, value] of Object.entries(attributes)) grip.setAttribute(key, value);
      grip.addEventListener("keydown", (event) => onKey(event, card));
    }
    followPointer(card, frame);
  }

  function onKey(event, card) {
    const now = Number(card.dataset.reveal);
    const steps = { ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, PageDown: -20, PageUp: 20, Home: -100, End: 100 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    setReveal(card, now + steps[event.key]);
  }

  function followPointer(card, frame) {
    let start = null;
    const follow = (event) => {
      const box = frame.getBoundingClientRect();
      setReveal(card, (100 * (event.clientX - box.left)) / box.width);
    };
    frame.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !frame.closest(".gallery.one")) return;
      start = { x: event.clientX, reveal: Number(card.dataset.reveal), moved: event.pointerType === "mouse" };
      frame.setPointerCapture(event.pointerId);
      if (start.moved) follow(event);
    });
    frame.addEventListener("pointermove", (event) => {
      if (!start) return;
      // A finger may be about to scroll: the divider waits until it has gone sideways.
      start.moved ||= Math.abs(event.clientX - start.x) > 6;
      if (start.moved) follow(event);
    });
    frame.addEventListener("pointerup", (event) => {
      if (start) follow(event);
      start = null;
    });
    frame.addEventListener("pointercancel", () => {
      if (start) setReveal(card, start.reveal);
      start = null;
    });
  }

  function setUp(gallery) {
    const cards = [...gallery.querySelectorAll(".card")];
    const allLevels = gallery.querySelector(".all-levels");
    const allReveal = gallery.querySelector(".all-reveal");
    const ticks = [...gallery.querySelectorAll(".ticks button")];
    const modes = [...gallery.querySelectorAll("[data-mode]")];

    const sweep = (level) => {
      cards.forEach((card) => setLevel(card, level));
      if (!allLevels) return;
      allLevels.value = level;
      allLevels.setAttribute("aria-valuetext", ticks[level].textContent);
      ticks.forEach((tick, i) => tick.classList.toggle("on", i === level));
      fill(allLevels);
    };
    const show = (mode) => {
      gallery.classList.toggle("one", mode === "one");
      gallery.classList.toggle("all", mode === "all");
      modes.forEach((button) => button.setAttribute("aria-pressed", button.dataset.mode === mode));
    };

    for (const card of cards) {
      if (card.classList.contains("has-reveal")) {
        const frames = card.querySelectorAll(".view .frame");
        frames.forEach((frame, i) => addDivider(card, frame, i === 0, gallery.dataset.reveal));
        setReveal(card, 0);
      }
      card.querySelector(".own-level")?.addEventListener("input", (event) => setLevel(card, Number(event.target.value)));
    }
    allLevels?.addEventListener("input", () => sweep(Number(allLevels.value)));
    ticks.forEach((tick, i) => tick.addEventListener("click", () => sweep(i)));
    modes.forEach((button) => button.addEventListener("click", () => show(button.dataset.mode)));
    allReveal?.addEventListener("input", () => {
      fill(allReveal);
      for (const card of cards) if (card.dataset.reveal !== undefined) setReveal(card, Number(allReveal.value));
    });

    const start = Number(gallery.dataset.start);
    show(modes.length ? "all" : "one"); // a gallery of one level has no choice of a view
    sweep(start < 0 ? ticks.length + start : clamp(start, 0, ticks.length - 1));
  }

  // The hint above a table is shown while some of its columns are out of sight.
  const sideways = new ResizeObserver((entries) => {
    for (const { target } of entries) target.previousElementSibling.hidden = target.scrollWidth <= target.clientWidth + 1;
  });
  document.querySelectorAll(".scroll").forEach((box) => sideways.observe(box));
  document.querySelectorAll(".gallery").forEach(setUp);
})();
