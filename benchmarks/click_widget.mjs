// When clicks and scrolled slices are drawn, by the clock that Python reads too.
import { drive } from "../tests/browser/page.mjs";

await drive(async (notebook, { clicks, scrolls, side }) => {
  const { page } = notebook;
  const now = () => page.evaluate(() => performance.timeOrigin + performance.now());
  await notebook.open();

  /** Notes for every drawing of a canvas when it was done, and when the frame with it was. */
  const watch = (canvas) =>
    canvas.evaluate((own) => {
      const clock = () => performance.timeOrigin + performance.now();
      window.seen = { asked: [], drawn: [], framed: [] };
      for (const kind of ["pointerup", "wheel"])
        own.addEventListener(kind, () => window.seen.asked.push(clock()), { capture: true });
      new MutationObserver(() => {
        window.seen.drawn.push(clock());
        requestAnimationFrame(() => setTimeout(() => window.seen.framed.push(clock()), 0));
      }).observe(own, { attributeFilter: ["data-drawn"] });
    });
  const framed = (count) => notebook.until((count) => window.seen.framed.length >= count, count);

  await notebook.run(0);
  let canvas = page.locator("canvas.mmadapt-canvas").first();
  await notebook.until(() => document.querySelector("canvas.mmadapt-canvas")?.dataset.drawn);
  await canvas.scrollIntoViewIfNeeded();
  await watch(canvas);
  for (let count = 1; count <= clicks; count++) {
    await canvas.click({ position: { x: 20 + 10 * count, y: 40 } });
    await framed(count);
  }
  const clicked = await page.evaluate(() => window.seen);
  clicked.answered = JSON.parse(await notebook.run(1));

  await notebook.run(2);
  await notebook.until(() => document.querySelectorAll("canvas.mmadapt-canvas[data-drawn]").length === 4);
  canvas = page.locator("canvas.mmadapt-canvas").nth(1);
  await canvas.scrollIntoViewIfNeeded();
  await watch(canvas);
  await canvas.hover();
  for (let count = 1; count <= scrolls; count++) {
    await page.mouse.wheel(0, 100);
    await framed(count);
  }
  const scrolled = await page.evaluate(() => window.seen);
  // as fast as a hand can: what is passed is not asked for, the last slice is drawn
  const start = await now();
  for (let count = 0; count < 50; count++) await page.mouse.wheel(0, -100);
  const sent = await now();
  await notebook.says(".mmadapt-title", `z = ${side + scrolls - 50} of`);
  return { clicked, scrolled, burst: { sent: sent - start, done: (await now()) - start } };
});
