// What a reader with normal eyes needs, measured on the page as it is laid out: gives {small, faint, wide, over}, lists of complaints.
document.head.insertAdjacentHTML("beforeend", "<style>*, *::before, *::after { transition: none !important; animation: none !important }</style>");
const seen = [], out = { small: [], faint: [], wide: [], over: [] };
const rgba = (text) => { const v = (text.match(/[\d.]+/g) || []).map(Number); return text.startsWith("color(srgb") ? [255 * v[0], 255 * v[1], 255 * v[2], v[3] ?? 1] : [v[0], v[1], v[2], v[3] ?? 1]; };
const hex = (text) => { const c = document.createElement("canvas").getContext("2d"); c.fillStyle = text; c.fillRect(0, 0, 1, 1); const d = c.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255]; };
const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3]));
const light = (c) => [0.2126, 0.7152, 0.0722].reduce((s, w, k) => { const v = c[k] / 255; return s + w * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const ground = (e) => {  // colours of the boxes behind an element, blended from the last opaque one
  const layers = [];
  for (let p = e; p; p = p.parentElement) { const c = rgba(getComputedStyle(p).backgroundColor); if (c[3] > 0) layers.push(c); if (c[3] >= 1) break; }
  return layers.reverse().reduce((below, c) => over(c, below), rgba(getComputedStyle(document.body).backgroundColor).slice(0, 3));
};
const clear = (e) => { let o = 1; for (let p = e; p; p = p.parentElement) o *= +getComputedStyle(p).opacity; return o; };
const scrolls = (e) => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true; return false; };
const hidden = (r, e) => {  // scrolled out of the box that it lies in
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) {
    if (getComputedStyle(p).overflowY === "visible" || p.closest("svg")) continue;
    const b = p.getBoundingClientRect();
    if (r.bottom < b.top + 2 || r.top > b.bottom - 2 || r.left > b.right - 2 || r.right < b.left + 2) return true;
  }
  return false;
};
const behind = (text, base) => {  // tiles and bars of the same chart under a word
  const box = text.getBoundingClientRect(), x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
  let now = base;
  for (const m of text.closest("svg").querySelectorAll(".mark-rect path, .mark-area path, .mark-arc path, rect")) {
    const b = m.getBoundingClientRect(), fill = m.getAttribute("fill");
    if (!(m.compareDocumentPosition(text) & 4) || !fill || fill === "none" || fill === "transparent" || x < b.left || x > b.right || y < b.top || y > b.bottom) continue;
    const c = hex(fill); c[3] *= +(m.getAttribute("fill-opacity") ?? 1) * +(m.getAttribute("opacity") ?? 1);
    now = over(c, now);
  }
  return now;
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement;
  if (!node.data.trim() || e.closest("script, style, noscript, math, title, desc, template, option, .visually-hidden, [hidden]") || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
  const range = document.createRange(); range.selectNodeContents(node);
  const boxes = Array.from(range.getClientRects()).filter((r) => r.width > 1 && r.height > 1 && !hidden(r, e));
  if (!boxes.length || boxes[0].right < 1 || boxes[0].bottom + scrollY < 1) continue;
  const style = getComputedStyle(e), said = node.data.trim().slice(0, 40), svg = e.closest("svg");
  const name = `${said} <${e.tagName.toLowerCase()}.${(e.getAttribute("class") || "").split(" ")[0]}>`;
  const view = svg && svg.viewBox.baseVal.width ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = parseFloat(style.fontSize) * view;
  if (size < 11.95 && !e.closest("sub, sup")) out.small.push(`${name} ${size.toFixed(1)} px`);
  const base = ground(e), fill = svg ? style.fill : style.color, ink = fill === "none" ? null : rgba(fill);
  if (ink) {
    const back = svg ? behind(e, base) : base;
    ink[3] *= clear(e) * (svg ? +(e.getAttribute("fill-opacity") ?? 1) : 1);
    const c = contrast(over(ink, back), back), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    if (c < (large ? 3 : 4.5) - 0.005) out.faint.push(`${name} ${c.toFixed(2)}:1`);
  }
  for (const r of boxes) {
    if (r.right > innerWidth + 1 && !scrolls(e)) { out.wide.push(name); break; }
    seen.push([r, e, name]);
  }
}
seen.sort((a, b) => a[0].top - b[0].top);
for (let i = 0; i < seen.length; i++) for (let j = i + 1; j < seen.length && seen[j][0].top < seen[i][0].bottom - 3; j++) {
  const [a, e] = seen[i], [b, f] = seen[j];
  if (e === f || e.contains(f) || f.contains(e) || getComputedStyle(e).position === "fixed" || e.closest("#quarto-header, #quarto-sidebar, .fixed-top") || f.closest("#quarto-header, #quarto-sidebar, .fixed-top")) continue;
  if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4 && !(scrolls(e) && scrolls(f) && e.closest("table") !== f.closest("table"))) out.over.push(`${seen[i][2]} on ${seen[j][2]}`);
}
for (const k of Object.keys(out)) out[k] = Array.from(new Set(out[k]));
return out;
