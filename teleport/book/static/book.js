// Equations that are wider than the page can be scrolled; then the keyboard must reach them, too.
function reachWideEquations() {
  for (const equation of document.querySelectorAll('mjx-container[display="true"]')) {
    if (equation.scrollWidth > equation.clientWidth) {
      equation.setAttribute("tabindex", "0");
    } else {
      equation.removeAttribute("tabindex");
    }
  }
}

window.addEventListener("load", () => {
  if (window.MathJax && window.MathJax.startup && window.MathJax.startup.promise) {
    window.MathJax.startup.promise.then(reachWideEquations);
    window.addEventListener("resize", reachWideEquations);
  }
});
