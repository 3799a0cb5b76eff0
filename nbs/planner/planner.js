// Draws the form and the answers. Everything that is computed comes from the package, in worker.js.
const begun = performance.now();
const worker = new Worker(new URL(`./worker.js${location.search}`, import.meta.url), { type: "module" });
const waiting = new Map();
let count = 0, turn = 0, form = null, kept = new URLSearchParams(location.hash.slice(1)).get("kept") || "";

worker.onmessage = ({ data }) => { waiting.get(data.id)?.(data); waiting.delete(data.id); };
worker.onerror = (event) => { $("state").textContent = `Python could not be started: ${event.message || "see the browser's console"}`; };
const ask = (call, address = "") => new Promise((resolve) => { waiting.set(++count, resolve); worker.postMessage({ id: count, call, address }); });

const $ = (id) => document.getElementById(id);
const GIB = 2 ** 30;
const gib = (bytes) => bytes / GIB >= 99.95 ? Math.round(bytes / GIB).toString() : (bytes / GIB).toFixed(1);
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child != null));
  return made;
}

// --- the form
function widget(field) {
  if (field.name === "use") {
    return element("fieldset", {}, ...field.options.map(([value, label]) =>
      element("label", {}, element("input", { type: "radio", name: "use", value, checked: value === field.default }), label)));
  }
  const input = field.options
    ? element("select", { name: field.name }, ...field.options.map(([value, label]) => element("option", { value, textContent: label })))
    : element("input", field.most ? { name: field.name, type: "number", min: 1, max: field.most } : { name: field.name, type: "text", spellcheck: false });
  if (field.name === "model") input.setAttribute("list", "models");
  input.value = field.default;
  const label = element("label", { className: ["model", "gpu", "method"].includes(field.name) ? "wide" : "" }, field.label, input);
  label.dataset.use = field.use;
  return label;
}

const input = (name) => $("form").elements[name];
const value = (field) => field.name === "use" ? $("form").elements.use.value : input(field.name).value.trim();

function address() {
  const use = $("form").elements.use.value;
  const counts = form.fields.filter((field) => (!field.use || field.use === use) && value(field) !== field.default);
  return new URLSearchParams(counts.map((field) => [field.name, value(field)])).toString();
}

function fill(text) {
  const given = new URLSearchParams(text);
  for (const field of form.fields) {
    const wanted = given.get(field.name);
    if (field.name === "use") $("form").elements.use.value = field.options.some(([v]) => v === wanted) ? wanted : field.default;
    else { input(field.name).value = wanted ?? field.default; if (!input(field.name).value && field.options) input(field.name).value = field.default; }
  }
}

function showFields() {
  const use = $("form").elements.use.value;
  for (const label of $("form").querySelectorAll("label[data-use]")) label.hidden = label.dataset.use !== "" && label.dataset.use !== use;
  for (const label of $("form").querySelectorAll("label[data-use]")) label.style.display = label.hidden ? "none" : "";
}

// --- the answers
const WORDS = { yes: "It fits", tight: "It is tight", no: "It does not fit" };
const COLOURS = { parameters: 0, optimizer: 1, gradients: 2, activations: 3, loss: 4, "KV cache": 5, communication: 6, runtime: 7 };
const MEANING = { reserve: "held by the allocator beside what is in use", runtime: "CUDA context, libraries and communicators", loss: "logits and the loss" };
const colour = (part) => `var(--c${COLOURS[part] ?? 8})`;

function drawn(found, title) {
  if (found.error) return [element("div", { className: "verdict error" }, element("strong", { textContent: "No answer" }), found.error)];
  const { fits, needs_bytes: needs, limit_bytes: limit, parts, requests, command } = found.value;
  const whole = Math.max(limit, needs.high) * 1.02;
  const share = (bytes) => `${(100 * bytes / whole).toFixed(2)}%`;
  const sum = Object.values(parts).reduce((a, b) => a + b, 0);
  const verdict = element("div", { className: `verdict ${fits}` }, element("strong", { textContent: WORDS[fits] }),
    `${gib(needs.value)} GiB of ${gib(limit)} GiB (between ${gib(needs.low)} and ${gib(needs.high)} GiB)`,
    requests ? element("div", { textContent: requests }) : null,
    found.value.host_bytes ? element("div", { textContent: `${gib(found.value.host_bytes)} GiB of host memory per GPU` }) : null);
  const bar = element("div", { className: "bar", role: "img", ariaLabel: `${gib(needs.value)} GiB of ${gib(limit)} GiB` });
  for (const [part, size] of Object.entries(parts)) {
    const span = element("span", { title: `${part}: ${gib(size)} GiB` });
    span.style.cssText = `width:${share(size * needs.value / sum)};background:${colour(part)}`;
    bar.append(span);
  }
  const mark = element("div", { className: "limit", title: `usable: ${gib(limit)} GiB` });
  mark.style.left = share(limit);
  bar.append(mark);
  const list = element("ul", { className: "parts" }, ...Object.entries(parts).map(([part, size]) => {
    const swatch = element("i"); swatch.style.background = colour(part);
    return element("li", { title: MEANING[part] || "" }, swatch, part, element("b", { textContent: `${size >= 0.05 * GIB ? gib(size) + " GiB" : Math.max(1, Math.round(size / 2 ** 20)) + " MiB"}` }));
  }));
  const scale = element("div", { className: "scale" }, element("span", { textContent: "0" }), element("span", { textContent: `▏usable ${gib(limit)} GiB` }));
  return [title ? element("h2", { textContent: title }) : null, verdict, bar, scale, list, element("p", { className: "speed" }), element("code", { textContent: command })].filter(Boolean);
}

const show = (id, shown) => { $(id).hidden = !shown; };

async function update() {
  const mine = ++turn, here = address(), stale = () => mine !== turn;
  showFields();
  const shared = new URLSearchParams(here);
  if (kept) shared.set("kept", kept);
  history.replaceState(null, "", shared.size ? `#${shared}` : location.pathname + location.search);
  const asked = performance.now(), found = await ask("answer", here);
  if (stale()) return;
  const titles = kept ? [`Kept: ${titled(kept)}`, `Now: ${titled(here)}`] : ["", ""];
  $("now").replaceChildren(...drawn(found, titles[1]));
  show("now", true); show("state", false); show("actions", true);
  $("took").textContent = `answered in ${Math.round(performance.now() - asked)} ms`;
  document.body.dataset.woken = found.woken ?? "";
  document.body.dataset.answered = Math.round(performance.now() - asked);
  show("drop", kept);
  show("notes", !found.error);
  if (!found.error) $("notes").querySelector("ul").replaceChildren(...found.value.assumptions.map((note) => element("li", { textContent: note })));
  show("kept", kept);
  if (kept) $("kept").replaceChildren(...drawn(await ask("answer", kept), titles[0]));
  if (stale()) return;
  if (kept) $("kept").querySelector(".speed")?.append(sentence(await ask("speed", kept)));
  if (stale()) return;
  if (found.error) { show("remedies", false); show("machines", false); return; }
  const speed = await ask("speed", here);
  if (stale()) return;
  $("now").querySelector(".speed").textContent = sentence(speed);
  const remedies = found.value.fits === "yes" ? [] : (await ask("remedies", here)).value || [];
  if (stale()) return;
  show("remedies", remedies.length);
  $("remedies").querySelector("ol").replaceChildren(...remedies.map((line) => {
    const [name, command] = line.split(/: (?=fsdl-devinfra )/);
    return element("li", {}, name, command ? element("code", { textContent: command }) : null);
  }));
  const rows = (await ask("machines", here)).value || [];
  if (stale()) return;
  table(rows);
  document.body.dataset.complete = here || "start";
}

const sentence = (speed) => speed.value ? `Speed, if it fits: ${speed.value}` : "";
const titled = (text) => { const v = new URLSearchParams(text), usual = (name) => form.fields.find((f) => f.name === name).default; return `${v.get("model") ?? usual("model")}, ${v.get("use") === "serve" ? v.get("engine") ?? usual("engine") : v.get("method") ?? usual("method")}, on ${v.get("gpus") ?? "1"} × ${v.get("gpu") ?? usual("gpu")}`; };

function table(rows, by = null, down = false) {
  show("machines", true);
  const heads = rows.length ? Object.keys(rows[0]) : ["No GPU of the table can run it: use more GPUs, fewer bits or shorter sequences"];
  const sorted = by ? [...rows].sort((a, b) => ((a[by] ?? Infinity) > (b[by] ?? Infinity) ? 1 : -1) * (down ? -1 : 1)) : rows;
  $("machines").querySelector("thead").replaceChildren(element("tr", {}, ...heads.map((head) =>
    element("th", { scope: "col", className: /GiB$|^\$/.test(head) ? "n" : "", textContent: head + (head === by ? (down ? " ▾" : " ▴") : ""), onclick: () => table(rows, head, head === by && !down) }))));
  $("machines").querySelector("tbody").replaceChildren(...sorted.map((row) => element("tr", {}, ...heads.map((head) =>
    element("td", { className: head === "fits" ? row[head] : /GiB$|^\$/.test(head) ? "n" : "", textContent: row[head] == null ? "–" : typeof row[head] === "number" ? row[head].toFixed(head.startsWith("$") ? 2 : 1) : row[head] })))));
}

async function begin() {
  const described = await ask("describe");
  if (described.error) { $("state").textContent = `Python could not be started: ${described.error}`; return; }
  form = described.value;
  $("form").append(...form.fields.map(widget));
  $("models").append(...form.models.map((name) => element("option", { value: name })));
  fill(location.hash.slice(1));
  await update();
  document.body.dataset.ready = Math.round(performance.now() - begun);
}

let timer = 0;
$("form").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(update, 120); });
$("form").addEventListener("submit", (event) => event.preventDefault());
$("keep").onclick = () => { kept = address() || "use=train"; update(); };
$("drop").onclick = () => { kept = ""; update(); };
$("copy").onclick = async () => { await navigator.clipboard.writeText(location.href); $("copy").textContent = "Copied"; setTimeout(() => { $("copy").textContent = "Copy link"; }, 1500); };
addEventListener("hashchange", () => { kept = new URLSearchParams(location.hash.slice(1)).get("kept") || ""; fill(location.hash.slice(1)); update(); });
begin();
