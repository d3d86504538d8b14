// Making elements, and changing those of the page. What comes from the monitor goes into them as text only, never as markup.

export const byId = (id) => document.getElementById(id);

// All in a box of 16 by 16.
export const SHAPES = {
  circle: "M8 1a7 7 0 1 0 0 14A7 7 0 1 0 8 1z",
  square: "M2 2h12v12H2z",
  triangle: "M8 1l7.6 13.8H.4z",
  diamond: "M8 .3L15.7 8 8 15.7.3 8z",
  cross: "M3 1l5 5 5-5 2 2-5 5 5 5-2 2-5-5-5 5-2-2 5-5-5-5z",
  plus: "M6 1h4v5h5v4h-5v5H6v-5H1V6h5z",
  down: "M.4 1.2h15.2L8 15z",
  star: "M8 .4l2.3 4.9 5.4.7-4 3.7 1 5.3L8 12.4 3.3 15l1-5.3L.3 6l5.4-.7z",
  octagon: "M5 1h6l4 4v6l-4 4H5l-4-4V5z",
  ring: "M8 1a7 7 0 1 0 0 14A7 7 0 1 0 8 1zm0 3a4 4 0 1 1 0 8 4 4 0 1 1 0-8z",
};

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
export const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
export const shape = (name, tone = "") =>
  svg("svg", { class: `shape ${tone}`, viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("path", { d: SHAPES[name] }));

// Makes a node like another by changing only what differs, so that focus, selections and opened details outlive a refresh.
function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== 1 || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    // The policy forbids style attributes, but not setting styles.
    if (name === "style") old.style.cssText = fresh.style.cssText;
    else if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morphChildren(old, [...fresh.childNodes]);
}
export function morphChildren(parent, fresh) {
  const old = [...parent.childNodes];
  fresh.forEach((node, i) => (old[i] ? morph(old[i], node) : parent.append(node)));
  old.slice(fresh.length).forEach((node) => node.remove());
}
export function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}
