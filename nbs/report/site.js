// The report's behaviour: charts in the reader's theme, downloads, the runs table, search without a server. No network.
(() => {
  "use strict";
  const $$ = (sel, root = document) => Array.from(root.querySelectorAll(sel));
  const dark = () => document.documentElement.dataset.scheme === "alternate" || document.body.classList.contains("quarto-dark");
  const ready = (f) => (document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", f) : f());
  const load = (name) => new Promise((done, fail) => {
    const s = document.createElement("script");
    s.src = window.vfmAssets + name; s.onload = done; s.onerror = fail;
    document.head.append(s);
  });

  // ---- search: a page opened from a file may not fetch, so the index also comes as a script
  if (location.protocol === "file:") {
    const fetched = window.fetch;
    window.fetch = async (url, ...rest) => {
      if (!String(url).endsWith("search.json")) return fetched(url, ...rest);
      if (!window.vfmSearch) await load("search.js");
      return new Response(JSON.stringify(window.vfmSearch));
    };
  }

  const headsOf = (table) => (table.tHead ? $$("th", table.tHead).map((th) => th.textContent.trim()) : []);

  // ---- search: both renderers ask Fuse, which finds "Device" for "Dice"; this answers with whole words and beginnings of words
  const plainWords = (t) => " " + String(t || "").toLowerCase().normalize("NFKD").replace(/[\u0300-\u036f]/g, "").replace(/[^\p{L}\p{N}]+/gu, " ").trim() + " ";
  const kindOf = (e) => (/(^|\/)reference\//.test(e.href) ? 2 : /(^|\/)run-[^/]*$/.test(e.href.split("#")[0]) ? 1 : 0);  // pages, runs, library
  class WordSearch {
    constructor(entries) { this.entries = []; for (const e of entries || []) this.add(e); }
    add(entry) { this.entries.push({ item: entry, kind: kindOf(entry), aside: /^(log|methods|phantom|guide_)/.test(entry.href), title: null }); }
    remove() { this.entries = []; return []; }
    score(e, words, mark) {  // a word in a title counts more than one in a heading, and that more than one in the text
      let sum = 0;
      for (const w of words) {
        const part = ["title", "section", "text"].findIndex((k) => e[k].includes(mark + w));
        if (part < 0) return 0;
        sum += [6, 4, 1][part] + (["title", "section", "text"].some((k) => e[k].includes(" " + w + " ")) ? 1 : 0);
      }
      return e.aside ? sum / 2 : sum;
    }
    search(query, options) {
      const words = plainWords(query).trim().split(" ").filter(Boolean), most = (options && options.limit) || 20;
      if (!words.length) return [];
      for (const e of this.entries) if (e.title === null) Object.assign(e, { title: plainWords(e.item.title), section: plainWords(e.item.section), text: plainWords(e.item.text) });
      const found = (mark) => this.entries.map((e, i) => [this.score(e, words, mark), i, e]).filter(([s]) => s);
      let hits = found(" ");
      if (!hits.length) hits = found("");  // inside of words, before there is nothing to show
      hits.sort((a, b) => a[2].kind - b[2].kind || b[0] - a[0] || a[1] - b[1]);
      const pages = new Map(), kinds = [0, 0, 0], room = [0.5, 0.3, 1].map((s) => Math.ceil(s * most)), out = [], rest = [];
      for (const h of hits) {  // at most four of a page, and room for every kind
        const page = h[2].item.href.split("#")[0], n = pages.get(page) || 0, k = h[2].kind;
        if (n >= 4) continue;
        pages.set(page, n + 1);
        (kinds[k]++ < room[k] ? out : rest).push(h);
      }
      return out.concat(rest).slice(0, most).sort((a, b) => a[2].kind - b[2].kind || b[0] - a[0] || a[1] - b[1])
        .map(([s, i, e]) => ({ item: e.item, refIndex: i, score: 1 / (1 + s) }));
    }
  }
  try { Object.defineProperty(window, "Fuse", { get: () => WordSearch, set: () => {}, configurable: true }); } catch (e) { window.Fuse = WordSearch; }

  // ---- Quarto's pages opened from files: its search warns once before it looks, and its choice of light or dark is not kept
  if (location.protocol === "file:") ready(() => {
    if (window.readSearchData) {
      const said = window.alert;
      window.alert = () => {};
      window.readSearchData();
      window.alert = said;
    }
    const toggle = window.quartoToggleColorScheme, kept = "vfm-scheme";
    if (toggle) {
      const wanted = localStorage.getItem(kept);
      if (wanted && (wanted === "dark") !== dark()) toggle();
      window.quartoToggleColorScheme = () => { toggle(); localStorage.setItem(kept, dark() ? "dark" : "light"); };
    }
    const footer = document.querySelector("footer .nav-footer");
    if (footer && document.querySelector('script[type="module"]')) footer.insertAdjacentHTML("beforeend", '<p class="vfm-from-file">Opened from a file: “On this page” does not follow the reading. It does when a server shows the folder, e.g. python -m http.server.</p>');
  });

  // ---- a cell of the matrix leads to its drawer, which opens
  const openDrawer = () => {
    const drawer = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!drawer || !drawer.matches("details.vfm-drawer")) return;
    for (let d = drawer; d; d = d.parentElement.closest("details")) d.open = true;
    drawer.scrollIntoView();
  };
  window.addEventListener("hashchange", openDrawer);
  ready(openDrawer);

  // ---- downloads
  const save = (name, href) => { const a = document.createElement("a"); a.download = name; a.href = href; a.click(); };
  const saveText = (name, text, kind) => { const url = URL.createObjectURL(new Blob([text], { type: kind })); save(name, url); setTimeout(() => URL.revokeObjectURL(url), 5000); };
  const harmless = (t) => (/^(\s*[=+\-@＝＋－＠]|[\t\r\n])/.test(t) && !/^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/.test(t) ? "'" + t : t);  // no cell is a formula, as in foundation.sheets
  const csv = (rows) => {
    const keys = Array.from(new Set(rows.flatMap(Object.keys)));
    const quoted = (t) => (/[",\r\n]/.test(t) ? '"' + t.replaceAll('"', '""') + '"' : t);
    const cell = (v) => (v === null || v === undefined ? "" : quoted(harmless(String(v))));
    return [keys.map(cell).join(",")].concat(rows.map((r) => keys.map((k) => cell(r[k])).join(","))).join("\n") + "\n";
  };
  const tools = (box, buttons) => {
    const bar = document.createElement("div");
    bar.className = "vfm-tools";
    for (const [text, label, act] of buttons) {
      const b = document.createElement("button");
      b.type = "button"; b.textContent = text; b.title = label; b.setAttribute("aria-label", label); b.onclick = act;
      bar.append(b);
    }
    box.append(bar);
  };

  // ---- what is wider than its box scrolls, and must be reached without a mouse
  const boxes = () => $$(".vfm-scroll, .vfm-slices, .vfm-view, .vfm-equation, .dataframe, main pre");
  const reachable = () => {
    for (const box of boxes()) {
      if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };

  // ---- every number leads to its notebook: of a task and a backbone, else to the runs that it comes from
  const cells = window.vfmCells || { notebooks: {}, tasks: [], backbones: [], rows: {} };
  const readable = (t) => String(t).replaceAll("_", " ");
  const runsOf = (d) => "runs.html" + (Object.keys(d).length ? "?" + new URLSearchParams(Object.entries(d).map(([k, v]) => [`1.${k}`, v])) : "");
  const leadsTo = (d) => {  // d: task, backbone, n_train, as far as they are known
    if (!d) return "";
    const task = cells.tasks.includes(readable(d.task)) ? readable(d.task) : "", backbone = cells.backbones.includes(d.backbone) ? d.backbone : "";
    const found = Object.entries(cells.notebooks[`${task}|${backbone}`] || {});
    const own = found.find(([n]) => n === String(d.n_train)) || (found.length === 1 ? found[0] : null);
    if (own) return own[1];
    return task || backbone ? runsOf({ ...(task && { task }), ...(backbone && { backbone }) }) : "";
  };
  const linked = (box, to) => {  // what stands in a box becomes a link
    if (!to || box.querySelector("a, button") || !box.textContent.trim()) return null;
    const a = document.createElement("a");
    a.href = to; a.className = "vfm-cell";
    a.append(...box.childNodes); box.append(a);
    return a;
  };
  const linkRows = (table) => {
    const heads = headsOf(table), at = (...names) => names.map((n) => heads.indexOf(n)).find((i) => i >= 0) ?? -1;
    const task = at("task"), backbone = at("backbone", "weights", "tuned with"), n = at("n_train", "training cases");
    const of = (table.closest("[data-task]") || { dataset: {} }).dataset;  // what stands around a table holds for all of its rows
    if (task < 0 && backbone < 0 && !of.task) return;
    for (const row of table.tBodies[0].rows) {
      const said = (i) => (i < 0 || !row.cells[i] ? undefined : row.cells[i].textContent.trim());
      const to = leadsTo({ task: said(task) || of.task, backbone: said(backbone) || of.backbone, n_train: said(n) || of.n });
      const first = backbone >= 0 && said(backbone) ? backbone : task;
      Array.from(row.cells).forEach((c, i) => {
        if (i !== first && !/^[<>≈~±+−-]?\s?\d/.test(c.textContent.trim())) return;
        const a = linked(c, to);
        if (a && i !== first) { a.tabIndex = -1; a.classList.add("vfm-quiet"); }  // one stop for the keyboard in each row
      });
    }
  };
  const linkNames = (box) => {  // backbones that a sentence names
    const names = cells.backbones.filter((b) => box.textContent.includes(b)).sort((a, b) => b.length - a.length);
    if (!names.length) return;
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), found = [];
    while (walker.nextNode()) if (!walker.currentNode.parentElement.closest("a, button, code")) found.push(walker.currentNode);
    const task = cells.tasks.filter((t) => new RegExp("\\b" + t + "\\b", "i").test(box.textContent));
    for (const node of found) {
      const parts = node.data.split(new RegExp("(?<![\\w.])(" + names.map((b) => b.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|") + ")(?![\\w])"));
      if (parts.length < 2) continue;
      node.replaceWith(...parts.map((p, i) => {
        if (i % 2 === 0) return p;
        const a = document.createElement("a");
        a.href = leadsTo({ backbone: p, task: task.length === 1 ? task[0] : undefined }); a.textContent = p;
        return a;
      }));
    }
  };
  const SOURCES = [[/^Convergence\b/, "convergence.html"], [/^Distance\b/, "alignment.html"], [/^Known before\b/, "prediction.html"]];
  const linkFinding = (li) => {  // a finding that names no backbone leads to the page of its numbers, there to the runs
    if (li.querySelector("a") || !/\d/.test(li.textContent)) return;
    const said = li.textContent.trim(), page = (SOURCES.find(([r, p]) => r.test(said) && !location.pathname.endsWith(p)) || [])[1];
    const task = cells.tasks.filter((t) => new RegExp("\\b" + t + "\\b", "i").test(said)), a = document.createElement("a");
    a.href = page || runsOf(task.length === 1 ? { task: task[0] } : {});
    a.textContent = page ? "Numbers" : "Runs";
    (li.querySelector("div") || li).append(" ", a);
  };
  ready(() => {  // on the page of runs a result leads to the notebook of its row
    if (!/\/runs\.html$/.test(location.pathname)) return;
    for (const table of $$("table.vfm-table")) {
      const i = headsOf(table).indexOf("result"), j = headsOf(table).indexOf("notebook");
      if (i >= 0 && j >= 0) for (const row of table.tBodies[0].rows) linked(row.cells[i], (row.cells[j].querySelector("a") || {}).href);
    }
  });
  ready(() => {
    if (!cells.backbones.length || /\/(runs|run-[^/]*)\.html$/.test(decodeURIComponent(location.pathname))) return;
    $$("table.vfm-table").forEach(linkRows);
    $$(".vfm-lead, .vfm-findings > li").forEach(linkNames);
    if (!document.querySelector(".vfm-shipped")) $$(".vfm-findings > li").forEach(linkFinding);
  });

  // ---- words of the glossary: what they mean, when pointed at or reached
  ready(() => {
    const words = $$("[data-tip]");
    if (!words.length) return;
    const tip = document.createElement("div");
    tip.className = "vfm-tip"; tip.id = "vfm-tip"; tip.setAttribute("role", "tooltip"); tip.hidden = true;
    document.body.append(tip);
    let timer = null;
    const hide = () => { timer = setTimeout(() => { tip.hidden = true; $$("[aria-describedby=vfm-tip]").forEach((w) => w.removeAttribute("aria-describedby")); }, 120); };
    const show = (w) => {
      clearTimeout(timer);
      $$("[aria-describedby=vfm-tip]").forEach((o) => o.removeAttribute("aria-describedby"));
      tip.textContent = w.dataset.tip; tip.hidden = false; w.setAttribute("aria-describedby", "vfm-tip");
      const r = w.getBoundingClientRect(), s = tip.getBoundingClientRect();
      tip.style.left = Math.max(8, Math.min(r.left, innerWidth - s.width - 8)) + scrollX + "px";
      tip.style.top = (r.top > s.height + 12 ? r.top - s.height - 6 : r.bottom + 6) + scrollY + "px";
    };
    for (const w of words) {
      w.addEventListener("mouseenter", () => show(w)); w.addEventListener("focus", () => show(w));
      w.addEventListener("mouseleave", hide); w.addEventListener("blur", hide);
    }
    tip.addEventListener("mouseenter", () => clearTimeout(timer)); tip.addEventListener("mouseleave", hide);
    document.addEventListener("keydown", (e) => { if (e.key === "Escape") hide(); });
  });

  // ---- cite this
  ready(() => {
    const footer = document.querySelector("footer .nav-footer"), entry = window.vfmCite;
    if (!footer || !entry) return;
    const box = document.createElement("details"), pre = document.createElement("pre"), head = document.createElement("summary");
    box.className = "vfm-cite"; head.textContent = "Cite this report"; pre.textContent = entry; pre.tabIndex = 0;
    box.append(head, pre); footer.append(box);
    tools(box, [
      ["Copy", "Copy the BibTeX entry", () => navigator.clipboard && navigator.clipboard.writeText(entry)],
      ["BibTeX", "Save the entry as a file", () => saveText("report.bib", entry, "application/x-bibtex")],
    ]);
  });

  // ---- on paper everything is open, and what was drawn for the screen fits the sheet
  window.addEventListener("beforeprint", () => $$("main details:not(.code-fold):not([open])").forEach((d) => { d.open = true; d.dataset.shut = "1"; }));
  window.addEventListener("afterprint", () => $$("main details[data-shut]").forEach((d) => { d.open = false; delete d.dataset.shut; }));

  // ---- charts: visible ones first, then the rest; drawn again when the theme changes
  let vega = null;
  const charts = new Map();
  const wrap = (text, width, size) => {  // a title in as many lines as it needs
    const words = [].concat(text).join(" ").split(" "), most = Math.max(20, Math.floor(width / (size * 0.61))), lines = [""];
    for (const w of words) {
      if (lines.at(-1) && (lines.at(-1) + " " + w).length > most) lines.push(w);
      else lines[lines.length - 1] += (lines.at(-1) ? " " : "") + w;
    }
    return lines;
  };
  const fit = (spec, width) => {  // titles wrap; small multiples take as many columns as there is room; what needs more than there is scrolls
    const out = structuredClone(spec), panel = (spec.usermeta || {}).panel;
    if (out.width === "container") Object.assign(out, { width: Math.max(width, (panel && panel.least) || 0), autosize: { type: "fit-x", contains: "padding" } });
    if (out.title) {
      const t = typeof out.title === "object" && !Array.isArray(out.title) ? out.title : { text: out.title };
      out.title = { ...t, text: wrap(t.text, width, 14) };
      if (t.subtitle) out.title.subtitle = wrap(t.subtitle, width, 12);
    }
    if (width < 560) {  // on a phone legends stand below each other, and panels have two lines above them
      const narrow = (s) => {
        if (!s || typeof s !== "object") return;
        if (s.legend && s.legend.columns) s.legend.columns = Math.min(s.legend.columns, ((s.scale && s.scale.domain) || []).some((d) => String(d).length > 18) ? 1 : 2);
        if (s.axis && s.axis.labelLimit && !(panel && panel.least)) {  // long names are cut (the pointer tells them whole), and short ones stand upright
          if (s.axis.labelLimit > 200) s.axis.labelLimit = 150;
          if (s.axis.labelLimit <= 90) s.axis.labelAngle = -60;
        }
        if (s.header && s.header.labelAnchor === "start") s.header.labelExpr = "split(datum.label, ', ')";
        Object.values(s).forEach((v) => typeof v === "object" && narrow(v));
      };
      for (const key of ["encoding", "layer", "concat", "vconcat", "spec", "facet"]) narrow(out[key]);
    }
    if (panel && panel.columns) {
      const n = Math.max(1, Math.min(panel.columns, Math.floor((width - panel.left) / (panel.min + panel.gap))));
      const gap = width < 560 ? Math.min(panel.gap, 185) : panel.gap, each = Math.floor((width - panel.left) / n - gap);
      const walk = (s) => {
        if (s.facet && s.spec) { s.columns = n; s.spec.width = each; }
        for (const part of s.vconcat || s.concat || []) walk(part);
        if (s.concat) { s.columns = n; s.concat.forEach((c) => { if (!c.facet) c.width = each; }); }
      };
      walk(out);
    }
    return out;
  };
  const rowsOf = (spec) => Object.values(spec.datasets || {}).flat().concat((spec.data && spec.data.values) || []);
  const stacked = (config) => ({ ...config, legend: { ...config.legend, layout: { top: { direction: "vertical", anchor: "start", margin: 4 } } } });
  const embed = (box, view, config, width) => window.vegaEmbed(view, fit(charts.get(box).spec, width), { mode: "vega-lite", actions: false, renderer: "svg", config: stacked(config), tooltip: { theme: "custom" } });
  const named = (view, spec) => {  // for a screen reader a chart is one picture with its sentence; its numbers are in the CSV
    const title = spec.title && typeof spec.title === "object" && !Array.isArray(spec.title) ? spec.title : { text: spec.title || "chart" };
    view.setAttribute("role", "img");
    view.setAttribute("aria-label", [].concat(title.text, title.subtitle || []).join(" "));
    view.querySelector("svg").setAttribute("aria-hidden", "true");
  };
  const draw = async (box) => {
    const one = charts.get(box), view = box.querySelector(".vfm-view"), width = view.clientWidth, theme = dark() ? "dark" : "light";
    if (one.busy || (one.theme === theme && Math.abs(one.width - width) < 30)) return;
    one.busy = true;
    try {
      vega = vega || load("vega.js");
      await vega;
      if (one.view) one.view.finalize();
      one.view = await embed(box, view, window.vfmThemes[theme], width);
      if (one.leads) {
        const to = (item) => (item && item.mark && item.mark.marktype !== "group" ? leadsTo(item.datum) : "");
        one.view.view.addEventListener("click", (_, item) => { const there = to(item); if (there) location.href = there; });
        one.view.view.addEventListener("mousemove", (_, item) => { view.style.cursor = to(item) ? "pointer" : ""; });
      }
      Object.assign(one, { theme, width });
      named(view, one.spec);
      reachable();
      box.dataset.drawn = theme;
    } finally { one.busy = false; }
    if (theme !== (dark() ? "dark" : "light")) draw(box);
  };
  const drawAll = async () => { for (const box of charts.keys()) await draw(box); };
  const printed = async (box, act) => {  // downloads are dark on white, whatever the reader's theme
    const hidden = document.createElement("div");
    hidden.style.cssText = "position:absolute;left:-9999px;width:800px";
    document.body.append(hidden);
    const made = await embed(box, hidden, { ...window.vfmThemes.light, background: "#fff" }, 800);
    await act(made.view);
    made.finalize(); hidden.remove();
  };
  ready(() => {
    for (const box of $$(".vfm-chart")) {
      const spec = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
      const leads = cells.backbones.length > 0 && rowsOf(spec).some((r) => leadsTo(r));
      charts.set(box, { spec, leads });
      const name = box.id;
      tools(box, [
        ["PNG", "Save this chart as PNG", () => printed(box, async (v) => save(name + ".png", await v.toImageURL("png", 2)))],
        ["SVG", "Save this chart as SVG", () => printed(box, async (v) => saveText(name + ".svg", await v.toSVG(), "image/svg+xml"))],
        ["CSV", "Save this chart's data as CSV", () => saveText(name + ".csv", csv(rowsOf(spec)), "text/csv")],
      ]);
      if (leads) box.querySelector(".vfm-tools").insertAdjacentHTML("beforeend", "<span>A mark leads to its notebook.</span>");
    }
    if (charts.size) {
      const seen = new IntersectionObserver((es) => es.forEach((e) => { if (e.isIntersecting) { seen.unobserve(e.target); draw(e.target); } }), { rootMargin: "300px" });
      for (const box of charts.keys()) seen.observe(box);
      (window.requestIdleCallback || setTimeout)(() => setTimeout(drawAll, 400));
      new MutationObserver(() => drawAll()).observe(document.documentElement, { attributes: true, attributeFilter: ["class", "data-scheme"] });
      new MutationObserver(() => drawAll()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
      let timer = null;
      window.addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(drawAll, 250); });
    }
  });

  // ---- image figures
  ready(() => $$(".vfm-slices").forEach((box, i) => {
    const svg = box.querySelector("svg");
    if (!svg) return;
    const file = () => {
      const copy = svg.cloneNode(true), [, , w, h] = svg.getAttribute("viewBox").split(" ");
      copy.setAttribute("width", w); copy.setAttribute("height", h); copy.removeAttribute("style");
      copy.setAttribute("font-family", "sans-serif"); copy.style.color = "#1a1a1a";
      copy.insertAdjacentHTML("afterbegin", '<rect width="100%" height="100%" fill="#fff"/>');
      return [new XMLSerializer().serializeToString(copy), +w, +h];
    };
    const name = (document.title.split(" ")[0] + "-case-" + (i + 1)).toLowerCase();
    tools(box, [
      ["PNG", "Save this figure as PNG", () => {
        const [text, w, h] = file(), img = new Image(), canvas = document.createElement("canvas");
        img.onload = () => { canvas.width = w * 2; canvas.height = h * 2; canvas.getContext("2d").drawImage(img, 0, 0, w * 2, h * 2); save(name + ".png", canvas.toDataURL("image/png")); };
        img.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
      }],
      ["SVG", "Save this figure as SVG", () => saveText(name + ".svg", file()[0], "image/svg+xml")],
    ]);
  }));

  ready(() => {
    const sizes = new ResizeObserver(reachable);
    for (const box of boxes()) for (const part of [box, ...box.children]) sizes.observe(part);
    const file = (to) => to.split(/[?#]/)[0].replace(/\/$/, "/index.html"), here = file(location.href);
    $$("#quarto-header .navbar a.nav-link[href]:not([href=''], [href^='#'])").forEach((a) => {  // Quarto marks the first link that is in the sidebar, too
      a.classList.toggle("active", file(a.href) === here);
      if (file(a.href) === here) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current");
    });
    $$(".sidebar-item-toggle[role=navigation]").forEach((a) => a.setAttribute("role", "button"));
  });

  // ---- one case: a slider over the epochs whose answers were kept; a network without that epoch shows the one before
  ready(() => $$(".vfm-gallery").forEach((box) => {
    const task = box.dataset.task, frames = $$("figure svg", box).map((svg) => $$("g[data-epoch]", svg));
    const epochs = Array.from(new Set(frames.flat().map((g) => g.dataset.epoch).filter(Boolean).map(Number))).sort((a, b) => a - b);
    if (epochs.length < 2) return;
    const label = document.createElement("label"), slider = document.createElement("input"), out = document.createElement("output");
    Object.assign(slider, { type: "range", min: 0, max: epochs.length - 1, step: 1 });
    label.append("epoch ", slider, out);
    label.className = "vfm-epochs";
    box.prepend(label);
    const show = () => {
      const epoch = epochs[slider.value];
      for (const own of frames) {
        const until = own.filter((g) => g.dataset.epoch === "" || +g.dataset.epoch <= epoch), seen = until.at(-1) || own[0];
        for (const g of own) g.style.display = g === seen ? "" : "none";
      }
      out.textContent = `${epoch} of ${epochs.at(-1)}`;
      slider.setAttribute("aria-valuetext", "epoch " + out.textContent);
    };
    const said = new URLSearchParams(location.search).get(`${task}.epoch`), at = epochs.indexOf(Number(said));
    slider.value = said !== null && at >= 0 ? at : epochs.length - 1;
    slider.addEventListener("input", () => {
      show();
      const query = new URLSearchParams(location.search);
      if (+slider.value === epochs.length - 1) query.delete(`${task}.epoch`); else query.set(`${task}.epoch`, epochs[slider.value]);
      try { history.replaceState(history.state, "", location.pathname + (String(query) ? "?" + query : "") + location.hash); } catch (e) { /* a page from a file */ }
    });
    show();
  }));

  // ---- tables: sort by a click on a heading, filter by words and menus, save as CSV
  const value = (row, i) => { const c = row.cells[i]; return c.dataset.value ?? c.textContent.trim(); };
  const fits = (row, i, wanted, most) => {  // one of several words, a number that is small enough, or the very value
    const said = value(row, i), words = row.cells[i].dataset.values;
    if (most) return said !== "" && said !== "nan" && +said <= +wanted;
    return words === undefined ? said === wanted : words.split("|").includes(wanted);
  };
  const sortBy = (table, i, th, shorten) => {
    const down = th.getAttribute("aria-sort") === "ascending";
    $$("th", table).forEach((h) => h.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(table.tBodies[0].rows), empty = (v) => v === "" || v === "nan";
    rows.sort((a, b) => {
      const x = value(a, i), y = value(b, i);
      if (empty(x) || empty(y)) return empty(x) - empty(y);
      const d = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -d : d;
    });
    table.tBodies[0].append(...rows);
    shorten();
  };
  const address = (filters, n, heads) => {  // what was chosen stands in the address: ?1.task=segmentation&1.q=word
    if (!filters) return null;
    const fields = [["q", filters.querySelector("input")], ...$$("select", filters).map((s) => [heads[+s.dataset.column], s])];
    return {
      read: () => { const said = new URLSearchParams(location.search); for (const [k, f] of fields) { f.dataset.first = f.value; if (said.has(`${n}.${k}`)) f.value = said.get(`${n}.${k}`); if (f.selectedIndex === -1) f.value = ""; } },
      write: () => {
        const said = new URLSearchParams(location.search);
        for (const [k, f] of fields) { if (f.value === f.dataset.first) said.delete(`${n}.${k}`); else said.set(`${n}.${k}`, f.value); }
        const query = String(said);
        try { history.replaceState(history.state, "", location.pathname + (query ? "?" + query : "") + location.hash); } catch (e) { /* a page from a file, in a browser that keeps its address as it is */ }
      },
    };
  };
  const folding = (table, read) => {  // of a long table the first rows are shown; on paper all are
    const button = document.createElement("button");
    let all = false;
    button.type = "button"; button.className = "vfm-all";
    table.parentElement.after(button);
    const show = () => {
      const rows = read(), few = matchMedia("(max-width: 767.98px)").matches ? 6 : 15, long = rows.length > few + 3;
      for (const r of table.tBodies[0].rows) r.classList.remove("vfm-more");
      if (!all && long) rows.slice(few).forEach((r) => r.classList.add("vfm-more"));
      button.hidden = !long;
      button.setAttribute("aria-expanded", String(all));
      button.textContent = all ? "Show fewer rows" : `Show all ${rows.length} rows`;
    };
    button.onclick = () => { all = !all; show(); };
    return show;
  };
  const cards = (table) => {  // on a phone a row is a card: every value behind its heading
    const heads = headsOf(table);
    if (heads.length < 3 || table.tHead.rows.length !== 1) return;
    table.classList.add("vfm-cards");
    table.setAttribute("role", "table");
    for (const part of $$("thead, tbody", table)) part.setAttribute("role", "rowgroup");
    for (const row of $$("tr", table)) {
      row.setAttribute("role", "row");
      Array.from(row.cells).forEach((c, i) => {
        c.setAttribute("role", c.tagName === "TH" ? (c.closest("thead") ? "columnheader" : "rowheader") : "cell");
        if (c.tagName === "TD" && heads[i]) c.dataset.head = heads[i];
      });
    }
  };
  ready(() => $$("table.vfm-table, table.dataframe").forEach(cards));
  ready(() => $$("table.vfm-table").forEach((t) => t.classList.toggle("vfm-dense", headsOf(t).length > 9)));
  ready(() => $$("table.vfm-table").forEach((table) => {
    const box = table.closest(".vfm-box");
    if (!box) return;
    const filters = box.querySelector(".vfm-filters"), count = box.querySelector(".vfm-count");
    const read = () => Array.from(table.tBodies[0].rows).filter((r) => !r.hidden);
    const shorten = folding(table, read);
    $$("thead th", table).forEach((th, i) => { const b = th.querySelector("button"); if (b) b.onclick = () => sortBy(table, i, th, shorten); });
    const keep = address(filters, $$(".vfm-box").indexOf(box) + 1, headsOf(table));
    const apply = () => {
      const words = filters.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
      const picks = $$("select", filters).filter((s) => s.value).map((s) => [+s.dataset.column, s.value, s.dataset.most]);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase() + " " + (row.dataset.text || "").toLowerCase();
        row.hidden = !(words.every((w) => text.includes(w)) && picks.every(([i, v, most]) => fits(row, i, v, most)));
      }
      count.textContent = read().length + " of " + table.tBodies[0].rows.length;
      shorten();
    };
    if (filters) { keep.read(); filters.addEventListener("input", () => { apply(); keep.write(); }); apply(); } else shorten();
    const heads = headsOf(table);
    if (box.dataset.csv) tools(box, [["CSV", "Save the rows shown as CSV", () => saveText("table.csv", csv(read().map((r) => Object.fromEntries(heads.map((h, i) => [h, value(r, i)])))), "text/csv")]]);
  }));
})();
