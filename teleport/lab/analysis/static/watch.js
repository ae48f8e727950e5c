// The page says everything without scripts, and switches arms and axes by CSS alone. Here it learns
// to show the values at any step, to remember what was switched, and to reload itself.
const remembered = JSON.parse(sessionStorage.getItem(location.pathname) || "{}");

document.querySelectorAll("fieldset input").forEach((input, number) => {
  if (number in remembered) input.checked = remembered[number];
  input.addEventListener("change", () => {
    document.querySelectorAll("fieldset input").forEach((each, i) => { remembered[i] = each.checked; });
    sessionStorage.setItem(location.pathname, JSON.stringify(remembered));
  });
});

document.querySelectorAll("section").forEach((section) => {
  const { steps, texts } = JSON.parse(section.querySelector("script").textContent);
  const last = steps.length - 1, first = steps[0], span = steps[last] - first || 1;
  if (last < 1) return;
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: last, value: last });
  const label = document.createElement("label"), said = document.createElement("output");
  label.append("Values at step ", slider, said);
  section.querySelector(".at").append(label);
  const show = (number) => {
    slider.value = number;
    slider.setAttribute("aria-valuetext", said.textContent = steps[number]);
    section.querySelectorAll("figure").forEach((figure, panel) => {
      figure.querySelectorAll("b").forEach((b, arm) => { b.textContent = texts[panel][arm][number]; });
      figure.querySelectorAll(".cursor").forEach((cursor) => {
        const box = cursor.parentNode, x = box.width.baseVal.value * (steps[number] - first) / span;
        cursor.setAttribute("x1", x);
        cursor.setAttribute("x2", x);
        cursor.style.visibility = "visible";
      });
    });
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  section.querySelectorAll("figure > svg > svg").forEach((box) => box.parentNode.addEventListener("pointermove", (event) => {
    const { left, width } = box.querySelector("rect").getBoundingClientRect();
    const wanted = first + span * (event.clientX - left) / width;
    const distance = steps.map((step) => Math.abs(step - wanted));
    show(distance.indexOf(Math.min(...distance)));
  }));
});

const following = document.querySelector(".following");
if (following) {
  const pause = Object.assign(document.createElement("input"), { type: "checkbox" });
  const label = document.createElement("label");
  label.append(pause, " pause");
  following.append(" ", label);
  setInterval(() => { if (!pause.checked) location.reload(); }, 1000 * following.dataset.seconds);
}
