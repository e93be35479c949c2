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
        if (s.legend && s.legend.columns) s.legend.columns = 2;
        if (s.header && s.header.labelAnchor === "start") s.header.labelExpr = "split(datum.label, ', ')";
        Object.values(s).forEach((v) => typeof v === "object" && narrow(v));
      };
      for (const key of ["encoding", "layer", "concat", "vconcat", "spec", "facet"]) narrow(out[key]);
    }
    if (panel && panel.columns) {
      const n = Math.max(1, Math.min(panel.columns, Math.floor((width - panel.left) / (panel.min + panel.gap))));
      const each = Math.floor((width - panel.left) / n - panel.gap);
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
  const stacked = (config, width) => (width < 560 ? { ...config, legend: { ...config.legend, layout: { top: { direction: "vertical", anchor: "start", margin: 4 } } } } : config);
  const embed = (box, view, config, width) => window.vegaEmbed(view, fit(charts.get(box).spec, width), { mode: "vega-lite", actions: false, renderer: "svg", config: stacked(config, width), tooltip: { theme: "custom" } });
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
      charts.set(box, { spec });
      const name = box.id;
      tools(box, [
        ["PNG", "Save this chart as PNG", () => printed(box, async (v) => save(name + ".png", await v.toImageURL("png", 2)))],
        ["SVG", "Save this chart as SVG", () => printed(box, async (v) => saveText(name + ".svg", await v.toSVG(), "image/svg+xml"))],
        ["CSV", "Save this chart's data as CSV", () => saveText(name + ".csv", csv(rowsOf(spec)), "text/csv")],
      ]);
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

  // ---- tables: sort by a click on a heading, filter by words and menus, save as CSV
  const value = (row, i) => { const c = row.cells[i]; return c.dataset.value ?? c.textContent.trim(); };
  const sortBy = (table, i, th) => {
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
  };
  ready(() => $$("table.vfm-table").forEach((table) => {
    $$("thead th", table).forEach((th, i) => { const b = th.querySelector("button"); if (b) b.onclick = () => sortBy(table, i, th); });
    const box = table.closest(".vfm-box");
    if (!box) return;
    const filters = box.querySelector(".vfm-filters"), count = box.querySelector(".vfm-count");
    const read = () => Array.from(table.tBodies[0].rows).filter((r) => !r.hidden);
    const apply = () => {
      const words = filters.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
      const picks = $$("select", filters).map((s) => [+s.dataset.column, s.value]).filter(([, v]) => v);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase() + " " + (row.dataset.text || "").toLowerCase();
        row.hidden = !(words.every((w) => text.includes(w)) && picks.every(([i, v]) => value(row, i) === v));
      }
      count.textContent = read().length + " of " + table.tBodies[0].rows.length;
    };
    if (filters) { filters.addEventListener("input", apply); apply(); }
    const heads = $$("thead th", table).map((th) => th.textContent.trim());
    if (box.dataset.csv) tools(box, [["CSV", "Save the rows shown as CSV", () => saveText("table.csv", csv(read().map((r) => Object.fromEntries(heads.map((h, i) => [h, value(r, i)])))), "text/csv")]]);
  }));
})();
