// Flat pictures with a mask: tells Python of clicks, boxes and scrolled slices, and draws what it sends.
// Python keeps all state; a view that is drawn anew asks for everything ("ready").

const MASK = [0, 159, 230]; // #E69F00 as blue, green, red, the first colour of the figures
const DRAG = 4; // CSS pixels; what moves less is a click

function element(kind, name, parent) {
  const made = document.createElement(kind);
  made.className = name;
  parent.appendChild(made);
  return made;
}

function bytes(view) {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** Pixels of one or three channels as a canvas. */
function pictured(view, { width, height, channels }) {
  const values = bytes(view);
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  for (let i = 0, j = 0; i < words.length; i++, j += channels) {
    const [r, g, b] = channels === 1 ? [values[j], values[j], values[j]] : [values[j], values[j + 1], values[j + 2]];
    words[i] = 0xff000000 | (b << 16) | (g << 8) | r;
  }
  return painted(image);
}

/** Packed bits, rows padded to whole bytes, as a tint with an opaque edge. */
function masked(view, { width, height }) {
  const bits = bytes(view);
  const stride = (width + 7) >> 3;
  const on = (x, y) => (bits[y * stride + (x >> 3)] >> (7 - (x & 7))) & 1;
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  const colour = (MASK[0] << 16) | (MASK[1] << 8) | MASK[2];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!(x & 7) && !bits[y * stride + (x >> 3)]) { x += 7; continue; }
      if (!on(x, y)) continue;
      const edge = !x || !y || x === width - 1 || y === height - 1
        || !on(x - 1, y) || !on(x + 1, y) || !on(x, y - 1) || !on(x, y + 1);
      words[y * width + x] = ((edge ? 0xff : 0x66) << 24) | colour;
    }
  }
  return painted(image);
}

function painted(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Twice, dark below and light above, to be seen on anything. */
function stroked(context, scale, path, dash = []) {
  for (const [colour, width, pattern] of [["#000", 3.5, []], ["#fff", 1.8, dash]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * scale;
    context.setLineDash(pattern.map((n) => n * scale));
    context.beginPath();
    path(context);
    context.stroke();
  }
  context.setLineDash([]);
}

function render({ model, el }) {
  const root = element("div", "mmadapt-click", el);
  const panes = [];
  const queue = [];
  let asked = null; // the request in flight, by a name no other view gives
  let drawn = 0;

  // one request at a time; of slices scrolled past only the last is asked for
  function ask(request) {
    const later = request.kind === "scroll"
      && queue.findIndex((other) => other.kind === "scroll" && other.plane === request.plane);
    if (later !== false && later >= 0) queue.splice(later, 1);
    queue.push(request);
    next();
  }
  function next() {
    if (asked || !queue.length) return;
    asked = `${Date.now()}-${Math.random()}`;
    root.classList.add("mmadapt-waiting");
    model.send({ ...queue.shift(), name: asked });
  }

  function pane(plane) {
    const own = { plane, info: null, picture: null, mask: null, drag: null, target: 0 };
    const box = element("div", "mmadapt-pane", root);
    own.box = box;
    own.title = element("div", "mmadapt-title", box);
    own.canvas = element("canvas", "mmadapt-canvas", box);
    own.canvas.tabIndex = 0;
    own.canvas.dataset.lmSuppressShortcuts = "true";
    own.canvas.setAttribute("role", "img");
    own.slider = element("input", "mmadapt-slice", box);
    own.slider.type = "range";
    own.slider.min = 0;
    own.slider.setAttribute("aria-label", "slice");
    own.slider.oninput = () => scroll(own, Number(own.slider.value));
    listen(own);
    resized.observe(own.canvas);
    return own;
  }

  function scroll(own, place) {
    own.target = Math.min(Math.max(place, 0), own.info.slices - 1);
    own.slider.value = own.target;
    ask({ kind: "scroll", plane: own.plane, slice: own.target });
  }

  function listen(own) {
    const { canvas } = own;
    const place = (event) => {
      const { left, top, width, height } = canvas.getBoundingClientRect();
      const at = (value, start, size, count) =>
        Math.min(Math.max(((value - start) / size) * count - 0.5, 0), count - 1);
      return [at(event.clientX, left, width, own.info.width), at(event.clientY, top, height, own.info.height)];
    };
    canvas.onpointerdown = (event) => {
      if (!own.info || event.button === 1) return;
      canvas.setPointerCapture(event.pointerId);
      own.drag = { from: place(event), at: [event.clientX, event.clientY], to: null };
    };
    canvas.onpointermove = (event) => {
      if (!own.drag) return;
      const [x, y] = own.drag.at;
      if (own.drag.to || Math.hypot(event.clientX - x, event.clientY - y) > DRAG) {
        own.drag.to = place(event);
        draw(own);
      }
    };
    canvas.onpointerup = (event) => {
      if (!own.drag) return;
      const { from, to } = own.drag;
      own.drag = null;
      if (to) {
        const [x, y] = [0, 1].map((i) => [from[i], to[i]].sort((a, b) => a - b));
        ask({ kind: "box", plane: own.plane, box: [x[0], y[0], x[1], y[1]] });
      } else {
        const label = event.shiftKey || event.button === 2 ? 0 : 1;
        ask({ kind: "click", plane: own.plane, at: from, label });
      }
      draw(own);
    };
    canvas.onpointercancel = () => { own.drag = null; draw(own); };
    canvas.oncontextmenu = (event) => { event.preventDefault(); event.stopPropagation(); };
    canvas.addEventListener("wheel", (event) => {
      if (!own.info || own.info.slices < 2 || !event.deltaY) return;
      event.preventDefault();
      scroll(own, own.target + Math.sign(event.deltaY));
    }, { passive: false });
    canvas.onkeydown = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
      if (event.key === "Backspace" || (event.key === "z" && (event.ctrlKey || event.metaKey))) ask({ kind: "undo" });
      else if (step && own.info?.slices > 1) scroll(own, own.target + step);
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
  }

  function draw(own) {
    const { canvas, info, picture, mask } = own;
    const scale = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = canvas;
    if (!picture || !clientWidth) return;
    [canvas.width, canvas.height] = [Math.round(clientWidth * scale), Math.round(clientHeight * scale)];
    const context = canvas.getContext("2d");
    const [sx, sy] = [canvas.width / info.width, canvas.height / info.height];
    const at = ([x, y]) => [(x + 0.5) * sx, (y + 0.5) * sy];
    context.imageSmoothingEnabled = sx < 1;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    if (mask) context.drawImage(mask, 0, 0, canvas.width, canvas.height);
    if (info.cross) {
      const [x, y] = at(info.cross);
      const gap = 12 * scale;
      context.strokeStyle = "rgba(255,255,255,.55)";
      context.lineWidth = scale;
      context.beginPath();
      for (const [a, b, c, d] of [[0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap], [x, y + gap, x, canvas.height]]) {
        context.moveTo(a, b);
        context.lineTo(c, d);
      }
      context.stroke();
    }
    const boxes = own.drag?.to ? [[...own.drag.from, ...own.drag.to]] : info.boxes;
    for (const box of boxes) {
      const [[a, b], [c, d]] = [at(box.slice(0, 2)), at(box.slice(2))];
      stroked(context, scale, (path) => path.rect(a, b, c - a, d - b), [5, 4]);
    }
    for (const [px, py, label] of info.points) {
      const [x, y] = at([px, py]);
      const r = (label ? 7 : 5) * scale;
      stroked(context, scale, (path) => {
        const ends = label ? [[-r, 0, r, 0], [0, -r, 0, r]] : [[-r, -r, r, r], [-r, r, r, -r]];
        for (const [a, b, c, d] of ends) { path.moveTo(x + a, y + b); path.lineTo(x + c, y + d); }
      });
    }
    context.font = `${13 * scale}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const [w, h, m] = [canvas.width, canvas.height, 10 * scale];
    const edges = [[m, h / 2], [w - m, h / 2], [w / 2, m], [w / 2, h - m]];
    info.letters.forEach((letter, i) => {
      context.strokeStyle = "#000";
      context.lineWidth = 3 * scale;
      context.strokeText(letter, ...edges[i]);
      context.fillStyle = "#fff";
      context.fillText(letter, ...edges[i]);
    });
    canvas.dataset.drawn = ++drawn;
  }

  function received(content, buffers) {
    for (const info of content.planes) {
      const own = (panes[info.plane] ??= pane(info.plane));
      own.info = info;
      if (info.picture !== null) own.picture = pictured(buffers[info.picture], info);
      if (info.mask !== null) own.mask = masked(buffers[info.mask], info);
      const [wide, high] = [info.width * info.spacing[0], info.height * info.spacing[1]];
      own.canvas.style.aspectRatio = `${wide} / ${high}`;
      own.box.style.flex = content.planes.length > 1 ? `${wide} 1 0` : `0 1 ${Math.max(320, Math.min(640, (640 * wide) / high))}px`;
      own.canvas.setAttribute("aria-label", `${info.title}, ${info.points.length} clicks`);
      own.title.textContent = info.title;
      own.slider.style.display = info.slices > 1 ? "" : "none";
      own.slider.max = info.slices - 1;
      if (!queue.some((request) => request.kind === "scroll" && request.plane === own.plane)) {
        own.target = info.slice;
        own.slider.value = info.slice;
      }
      draw(own);
    }
    if (content.answers === asked) {
      asked = null;
      root.classList.remove("mmadapt-waiting");
      next();
    }
  }

  const resized = new ResizeObserver(() => panes.forEach(draw));
  model.on("msg:custom", received);
  ask({ kind: "ready" });
  return () => { model.off("msg:custom", received); resized.disconnect(); };
}

export default { render };
