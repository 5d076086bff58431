// Flat pictures with a mask: tells Python of clicks, boxes and scrolled slices, and draws what it sends.
// Python keeps all state; a view that is drawn anew asks for everything ("ready").

const MASK = 0xff009fe6; // #E69F00 as alpha, blue, green, red: the first colour of the figures
const DRAG = 4; // CSS pixels; what moves less is a click

function element(kind, name, parent) {
  const made = document.createElement(kind);
  made.className = `mmadapt-${name}`;
  parent.append(made);
  return made;
}

/** A drawing of its own. */
function sheet(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
}

/** A canvas whose pixels, alpha blue green red, a function fills from bytes. */
function painted(view, { width, height }, fill) {
  const [context, image] = [sheet(width, height), new ImageData(width, height)];
  fill(new Uint8Array(view.buffer, view.byteOffset, view.byteLength), new Uint32Array(image.data.buffer));
  context.putImageData(image, 0, 0);
  return context.canvas;
}

/** Pixels of one or three channels. */
function pictured(view, info) {
  const [step, green, blue] = info.channels === 1 ? [1, 0, 0] : [3, 1, 2];
  return painted(view, info, (bytes, words) => {
    for (let i = 0, j = 0; i < words.length; i++, j += step)
      words[i] = 0xff000000 | (bytes[j + blue] << 16) | (bytes[j + green] << 8) | bytes[j];
  });
}

/** Packed bits, rows padded to whole bytes. */
function masked(view, info) {
  const stride = (info.width + 7) >> 3;
  return painted(view, info, (bits, words) => {
    for (let y = 0, i = 0; y < info.height; y++)
      for (let x = 0; x < info.width; x++, i++)
        if ((bits[y * stride + (x >> 3)] >> (7 - (x & 7))) & 1) words[i] = MASK;
  });
}

/** A mask as a tint with a rim, as wide on the screen whatever the size of a pixel. */
function tinted(context, mask, w, h, width) {
  const rim = sheet(w, h);
  rim.imageSmoothingEnabled = false;
  for (let i = 0; i < 8; i++) rim.drawImage(mask, width * Math.cos(i * 0.785), width * Math.sin(i * 0.785), w, h);
  rim.globalCompositeOperation = "destination-out";
  rim.drawImage(mask, 0, 0, w, h);
  context.globalAlpha = 0.4;
  context.drawImage(mask, 0, 0, w, h);
  context.globalAlpha = 1;
  context.drawImage(rim.canvas, 0, 0);
}

/** Lines of points, twice, dark below and light above, to be seen on anything. */
function stroked(context, scale, lines, dash = []) {
  const path = new Path2D();
  for (const [start, ...rest] of lines) {
    path.moveTo(...start);
    for (const point of rest) path.lineTo(...point);
  }
  for (const [strokeStyle, width, pattern] of [["#000", 3.5, []], ["#fff", 1.8, dash]]) {
    Object.assign(context, { strokeStyle, lineWidth: width * scale });
    context.setLineDash(pattern.map((n) => n * scale));
    context.stroke(path);
  }
  context.setLineDash([]);
}

function draw({ canvas, info, picture, mask, drag }) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.round(side * scale));
  if (!picture || !w || !h) return;
  Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  const at = (x, y) => [((x + 0.5) * w) / info.width, ((y + 0.5) * h) / info.height];
  context.imageSmoothingEnabled = w < info.width;
  context.drawImage(picture, 0, 0, w, h);
  context.imageSmoothingEnabled = false;
  tinted(context, mask, w, h, 1.5 * scale);
  if (info.cross) {
    const [x, y] = at(...info.cross);
    context.globalAlpha = 0.4;
    stroked(context, scale / 2, [[[0, y], [w, y]], [[x, 0], [x, h]]]);
    context.globalAlpha = 1;
  }
  for (const [x1, y1, x2, y2] of drag?.to ? [[...drag.from, ...drag.to]] : info.boxes) {
    stroked(context, scale, [[at(x1, y1), at(x2, y1), at(x2, y2), at(x1, y2), at(x1, y1)]], [5, 4]);
  }
  for (const [px, py, label] of info.points) {
    const [[x, y], r, s] = [at(px, py), (label ? 8 : 6) * scale, label ? 0 : 6 * scale]; // a plus, or a cross
    stroked(context, scale, [[[x - r, y - s], [x + r, y + s]], [[x + s, y - r], [x - s, y + r]]]);
  }
  Object.assign(context, { font: `bold ${13 * scale}px sans-serif`, textAlign: "center", textBaseline: "middle" });
  Object.assign(context, { fillStyle: "#fff", shadowColor: "#000", shadowBlur: 3 * scale });
  const edges = [[10 * scale, h / 2], [w - 10 * scale, h / 2], [w / 2, 10 * scale], [w / 2, h - 10 * scale]];
  info.letters.forEach((letter, i) => context.fillText(letter, ...edges[i]));
  canvas.dataset.drawn = Number(canvas.dataset.drawn ?? 0) + 1;
}

export default { render({ model, el }) {
  const root = element("div", "click", el);
  const [panes, queue] = [[], []];
  let asked = null; // the request in flight, by a name no other view gives

  // one request at a time; of slices scrolled past only the last is asked for
  function ask(request) {
    const last = queue.at(-1);
    if (request.kind === "scroll" && last?.kind === "scroll" && last.plane === request.plane) queue.pop();
    queue.push(request);
    next();
  }
  function next() {
    root.classList.toggle("mmadapt-waiting", asked !== null || queue.length > 0);
    if (asked !== null || !queue.length) return;
    asked = `${Date.now()}-${Math.random()}`;
    model.send({ ...queue.shift(), name: asked });
  }

  function pane(plane) {
    const box = element("div", "pane", root);
    const title = element("div", "title", box);
    const canvas = element("canvas", "canvas", box);
    const slider = Object.assign(element("input", "slice", box), { type: "range", min: 0, ariaLabel: "slice" });
    const own = { box, title, canvas, slider, info: null, picture: null, mask: null, drag: null, target: 0 };
    canvas.tabIndex = 0;
    canvas.dataset.lmSuppressShortcuts = "true"; // in JupyterLab single letters cut and delete cells
    const scroll = (place) => {
      own.target = slider.value = Math.min(Math.max(place, 0), own.info.slices - 1);
      ask({ kind: "scroll", plane, slice: own.target });
    };
    slider.oninput = () => scroll(Number(slider.value));
    const tell = (request) => ask({ ...request, plane, slice: own.info.slice }); // on the slice that is seen
    const place = ({ clientX, clientY }) => {
      const { left, top, width, height } = canvas.getBoundingClientRect();
      const within = (share, count) => Math.min(Math.max(share * count - 0.5, 0), count - 1);
      return [within((clientX - left) / width, own.info.width), within((clientY - top) / height, own.info.height)];
    };
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      own.drag = event.button === 1 ? null : { from: place(event), start: [event.clientX, event.clientY], to: null };
    };
    canvas.onpointermove = (event) => {
      const [x, y] = own.drag?.start ?? [event.clientX, event.clientY];
      if (!own.drag?.to && Math.hypot(event.clientX - x, event.clientY - y) < DRAG) return;
      own.drag.to = place(event);
      draw(own);
    };
    canvas.onpointerup = (event) => {
      if (!own.drag) return;
      const { from, to } = own.drag;
      own.drag = null;
      if (to) tell({ kind: "box", corners: [from, to] });
      else tell({ kind: "click", at: from, label: event.shiftKey || event.button === 2 ? 0 : 1 });
    };
    canvas.onpointercancel = () => { own.drag = null; draw(own); };
    canvas.oncontextmenu = (event) => { event.preventDefault(); event.stopPropagation(); };
    const turn = (event, step) => {
      if (!step || own.info.slices < 2) return;
      event.preventDefault();
      scroll(own.target + step);
    };
    canvas.onwheel = (event) => turn(event, Math.sign(event.deltaY));
    canvas.onkeydown = (event) => {
      if (event.key === "Backspace") ask({ kind: "undo" });
      else turn(event, { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key]);
    };
    resized.observe(canvas);
    return own;
  }

  function received({ planes, answers }, buffers) {
    if (answers === asked) asked = null;
    for (const info of planes) {
      const own = Object.assign((panes[info.plane] ??= pane(info.plane)), { info });
      if (info.picture !== null) own.picture = pictured(buffers[info.picture], info);
      own.mask = masked(buffers[info.mask], info);
      const [wide, high] = [info.width * info.spacing[0], info.height * info.spacing[1]];
      own.canvas.style.aspectRatio = `${wide} / ${high}`;
      own.box.style.flex = planes.length > 1 ? `${wide} 1 0` : `0 1 ${(512 * Math.min(1, wide / high)).toFixed()}px`;
      own.canvas.ariaLabel = `${info.title} ${info.points.length} clicks`;
      own.title.textContent = info.title;
      Object.assign(own.slider, { hidden: info.slices < 2, max: info.slices - 1 });
      if (!queue.some(({ plane }) => plane === info.plane)) own.target = own.slider.value = info.slice;
      draw(own);
    }
    if (!planes.length) panes.forEach(draw); // refused: a box that was dragged goes
    next();
  }

  const resized = new ResizeObserver(() => panes.forEach(draw));
  model.on("msg:custom", received);
  ask({ kind: "ready" });
  return () => { model.off("msg:custom", received); resized.disconnect(); };
} };
