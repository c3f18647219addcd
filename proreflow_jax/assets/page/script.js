"use strict";
for (const stage of document.querySelectorAll(".pictures")) {
  const compare = stage.querySelector(".compare"), shots = [...stage.querySelectorAll("button.shot")];
  if (!compare) continue;
  const stack = compare.querySelector(".stack"), over = stack.querySelector(".over");
  stack.querySelector(".under").src = stage.querySelector(".teacher img").src;
  const choose = (shot) => {
    shots.forEach((other) => other.classList.toggle("chosen", other === shot));
    over.src = shot.querySelector("img").src;
    compare.querySelector(".which").textContent = shot.querySelector("span").textContent;
  };
  shots.forEach((shot) => shot.addEventListener("click", () => choose(shot)));
  choose(shots[shots.length - 1]);
  compare.querySelector("[type=range]").addEventListener("input", (event) => stack.style.setProperty("--cut", event.target.value + "%"));
  compare.querySelector(".difference").addEventListener("change", (event) => stack.classList.toggle("minus", event.target.checked));
}
const ago = (seconds) => {
  const units = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
  const [size, unit] = units.find(([size]) => seconds >= size) || [1, "second"], count = Math.floor(seconds / size);
  return `${count} ${unit}${count === 1 ? "" : "s"} ago`;
};
const tell = () => {
  for (const time of document.querySelectorAll("time[data-at]")) {
    const at = Number(time.dataset.at);
    time.textContent = `written ${ago(Math.max(Date.now() / 1000 - at, 0))}`;
    time.title = new Date(at * 1000).toLocaleString();
  }
};
tell();
setInterval(tell, 10000);
