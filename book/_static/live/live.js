/* Puts a live figure in the place of each <div class="live" data-live="NAME">what stands there without scripts</div>, when
   the reader comes near it. NAME.js builds it; the network is loaded when a button asks for it, not before. */

const NAMES = ["draw", "schedule", "score", "ddim", "slerp", "guidance", "edit", "strength", "words"];

const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      mount(target);
    }
  },
  { rootMargin: "600px" },
);

async function mount(box) {
  const { default: build } = await import(`./${box.dataset.live}.js`);
  const figure = await build();
  box.replaceChildren(...figure);
  box.dataset.mounted = "";
}

for (const box of document.querySelectorAll(".live[data-live]")) {
  if (NAMES.includes(box.dataset.live)) near.observe(box);
}
