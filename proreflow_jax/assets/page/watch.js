"use strict";
const frames = [...document.querySelectorAll("iframe")];
let before = null;
const reload = (frame) => {
  const window_ = frame.contentWindow, place = window_.scrollY;
  frame.addEventListener("load", () => frame.contentWindow.scrollTo(0, place), { once: true });
  window_.location.reload();
};
const look = async () => {
  try {
    const now = await (await fetch("/versions", { cache: "no-store" })).json();
    if (before) frames.forEach((frame, i) => { if (now[i] !== before[i]) reload(frame); });
    before = now;
    document.title = document.title.replace(/ \(no answer\)$/, "");
  } catch {
    if (!document.title.endsWith("(no answer)")) document.title += " (no answer)";
  }
  setTimeout(look, 2000);
};
look();
