/* Chapter 11: an emoji drawn from words, with the guidance scale under the reader's hand. */

import { classifier_free, generator } from "./samplers.js";
import { button, choice, el, explain, job, new_seed, row, slider } from "./ui.js";
import { STEPS, watch } from "./watch.js";

const EMOJI = { channels: 3, side: 32 };
const WISHES = [
  "red heart", "green heart", "cat face", "smiling face", "blue circle", "person running", "blue apple", "no words",
];

/** A text as a row of word numbers, each word once; the null label alone where there is none. words.py's captions_of. */
export function caption_of(text, vocabulary) {
  const count = vocabulary.length;
  const words = [...new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu))];
  for (const word of words.filter((word) => !vocabulary.includes(word))) {
    const near = vocabulary.filter((known) => known.startsWith(word.slice(0, 3))).slice(0, 5).join(", ") || "none";
    throw new Error(`“${word}” is not one of the ${count} words known, which are listed below; near ones: ${near}`);
  }
  return words.length ? words.map((word) => vocabulary.indexOf(word)) : [count];
}

export default function words() {
  const wish = (i) => (i === WISHES.length - 1 ? "" : WISHES[i]);
  const example = choice("Examples", WISHES, { change: (i) => ((text.value = wish(i)), again()) });
  const text = el("input", { type: "text", value: wish(0), maxlength: 80, spellcheck: "false", autocapitalize: "off",
    keydown: ({ key }) => key === "Enter" && begin() });
  const scale = slider("s =", { min: 0, max: 8, step: 0.5, value: 3, format: (v) => v.toFixed(1), settle: () => again() });
  const known = el("p");
  const list = el("details", { hidden: true }, el("summary", {}, "The words that it knows"), known);
  const view = watch("an emoji", EMOJI);
  let x_T;

  const { press, bar, status, begin, again } = job("Draw", async (signal, { model, class_names, null_label, diffusion }) => {
    [known.textContent, list.hidden] = [class_names.join(", "), false];
    const caption = caption_of(text.value, class_names);
    const guided = classifier_free(model, [caption], caption.map(() => null_label), scale.value);
    await view.run(x_T, guided, diffusion, signal);
    return `Drawn: ${text.value.trim() || "no words"}, s = ${scale.value.toFixed(1)}.`;
  }, "emoji");

  function renew() {
    x_T = generator(x_T ? new_seed() : 11)(EMOJI.channels * EMOJI.side ** 2);
    view.begin(x_T);
    again();
  }
  renew();
  return [
    row(example.label, el("label", {}, el("span", {}, "Words"), text)),
    row(press, button("Another noise", renew), bar),
    row(scale.label),
    view.shown,
    status,
    view.back,
    list,
    explain(`The network of this chapter, in your browser; it is loaded when you press Draw, 6 to 7 MB, once. The words
      become one vector, the mean of theirs (11.3). In each of ${STEPS} steps the network is asked with the words and without, and the guided
      noise (7.1) goes <i>s</i> times the way from the second answer to the first; without that noise the right image is
      left (6.8), and a little of the way there is gone. The same noise, words and <i>s</i> draw the same.`),
  ];
}
