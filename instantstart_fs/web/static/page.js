// Keeps <main> equal to what the daemon draws: each event holds the whole live part as HTML. Nodes that are the same
// stay, so that focus, selection and scrolling do.
"use strict";

const live = document.getElementById("live");
const state = document.getElementById("live-state");
const key = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null);

function morph(old, wanted) {
  if (old.isEqualNode(wanted)) return;
  if (old.nodeType !== wanted.nodeType || old.nodeName !== wanted.nodeName || key(old) !== key(wanted)) {
    old.replaceWith(wanted);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.nodeValue = wanted.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) if (!wanted.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of [...wanted.attributes]) {
    // What somebody is typing is theirs.
    if (old.getAttribute(name) !== value && !(name === "value" && old === document.activeElement)) old.setAttribute(name, value);
  }
  morphChildren(old, wanted);
}

function morphChildren(old, wanted) {
  const keyed = new Map([...old.childNodes].filter(key).map((node) => [key(node), node]));
  let at = old.firstChild;
  for (const node of [...wanted.childNodes]) {
    const known = key(node) ? keyed.get(key(node)) : null;
    if (known) {
      if (known === at) at = at.nextSibling;
      else old.insertBefore(known, at);
      morph(known, node);
    } else if (at && !key(at) && !key(node)) {
      const next = at.nextSibling;
      morph(at, node);
      at = next;
    } else {
      old.insertBefore(node, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function say(name, words) {
  if (state.dataset.state === name) return;
  state.dataset.state = name;
  state.textContent = words;
}

function show(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  morphChildren(live, template.content);
}

let source = null;
function listen() {
  source = new EventSource(live.dataset.events);
  source.onopen = () => say("on", "live");
  source.onmessage = (event) => show(event.data);
  source.onerror = () => {
    say("lost", "reconnecting");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
}

// A page that nobody looks at asks for nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    source?.close();
    source = null;
    say("off", "paused");
  } else if (!source) {
    listen();
  }
});
if (!document.hidden) listen();
