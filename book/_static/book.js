/* Small things that a page needs a script for. Without one all of it can still be read. */

const each = (selector, act, root = document) => root.querySelectorAll(selector).forEach(act);

/* What scrolls sideways can be reached by the keyboard. */
function reachable() {
  each("article pre, article div.math, article .pst-scrollable-table-container, article .text_html", (box) => {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  });
}

/* A picture that the page shows smaller than it is opens in its own size: by a tap, or by Enter or the space bar. */
function enlargeable() {
  each("article img[width]:not(.film img, .live img, a img)", (image) => {
    if (image.clientWidth && image.clientWidth < 0.95 * image.getAttribute("width")) {
      image.tabIndex = 0;
      image.setAttribute("role", "button");
      image.setAttribute("aria-haspopup", "dialog");
    } else if (image.clientWidth) {
      for (const name of ["tabindex", "role", "aria-haspopup"]) image.removeAttribute(name);
    }
  });
}

function enlarge(event) {
  const image = event.target.closest("img[aria-haspopup]");
  if (!image || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  const dialog = document.createElement("dialog");
  dialog.className = "large-picture";
  dialog.setAttribute("aria-label", "The figure in its own size");
  dialog.innerHTML = '<button type="button">Close</button><div tabindex="0"></div>'; // the box scrolls, by arrow keys too
  dialog.lastChild.append(Object.assign(new Image(), { src: image.src, alt: image.alt, width: image.getAttribute("width") }));
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

/* A question is a group with its text as its name, and what is said of an answer is read out. */
function quizzes() {
  each(".Quiz", (quiz, i) => {
    if (quiz.getAttribute("role")) return;
    const asked = quiz.querySelector(".QuizQn, [id^=QuizQn]") || quiz.firstElementChild;
    if (!asked) return;
    asked.id ||= `question-${i}`;
    quiz.setAttribute("role", "group");
    quiz.setAttribute("aria-labelledby", asked.id);
    each("input:not([type=radio]):not([type=checkbox])", (field) => field.setAttribute("aria-labelledby", asked.id), quiz);
    each(".Feedback", (says) => says.setAttribute("role", "status"), quiz);
  });
}

/* On paper every fold is open, and the page is light. */
let opened = [];
let theme;
const page = document.documentElement;
addEventListener("beforeprint", () => {
  theme = page.dataset.theme;
  page.dataset.theme = "light";
  opened = [...document.querySelectorAll("article details:not([open])")];
  opened.forEach((fold) => (fold.open = true));
});
addEventListener("afterprint", () => {
  page.dataset.theme = theme;
  opened.forEach((fold) => (fold.open = false));
});

addEventListener("DOMContentLoaded", () => {
  quizzes();
  reachable();
  enlargeable();
  const article = document.querySelector("article");
  if (!article) return;
  new MutationObserver(quizzes).observe(article, { childList: true, subtree: true });
  const resized = new ResizeObserver(() => requestAnimationFrame(() => (reachable(), enlargeable())));
  resized.observe(article);
  article.addEventListener("toggle", () => (reachable(), enlargeable()), true);
  article.addEventListener("click", enlarge);
  article.addEventListener("keydown", enlarge);
});
