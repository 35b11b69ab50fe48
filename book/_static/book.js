/* Small things that a page needs a script for. Without one all of it can still be read. */

const each = (selector, act, root = document) => root.querySelectorAll(selector).forEach(act);

/* What scrolls sideways can be reached by the keyboard. */
function reachable() {
  each("article pre, article div.math, article .pst-scrollable-table-container, article .text_html", (box) => {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  });
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

/* On paper every fold is open. */
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("article details:not([open])")];
  opened.forEach((fold) => (fold.open = true));
});
addEventListener("afterprint", () => opened.forEach((fold) => (fold.open = false)));

addEventListener("DOMContentLoaded", () => {
  quizzes();
  reachable();
  const article = document.querySelector("article");
  if (!article) return;
  new MutationObserver(quizzes).observe(article, { childList: true, subtree: true });
  const resized = new ResizeObserver(() => requestAnimationFrame(reachable));
  resized.observe(article);
  article.addEventListener("toggle", reachable, true);
});
