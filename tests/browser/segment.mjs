// Clicks, drags and buttons on the widget of `mm.ui.segment`, on an image that the test made.
import { drive } from "./page.mjs";

await drive(async (notebook, { at, beside, box }) => {
  const { page } = notebook;
  await notebook.open();
  await notebook.run(0);
  const canvas = page.locator("canvas.mmadapt-canvas");
  await notebook.until(() => document.querySelector("canvas.mmadapt-canvas")?.dataset.drawn);
  await canvas.scrollIntoViewIfNeeded();

  /** Where a pixel of the image lies on the canvas, in CSS pixels. */
  const place = async ([x, y]) => {
    const { width, height } = await canvas.boundingBox();
    return { x: ((x + 0.5) / 64) * width, y: ((y + 0.5) / 64) * height };
  };
  const pixel = (where) =>
    canvas.evaluate((own, [x, y]) => {
      const [px, py] = [((x + 0.5) / 64) * own.width, ((y + 0.5) / 64) * own.height];
      return Array.from(own.getContext("2d").getImageData(px, py, 1, 1).data);
    }, where);
  const corner = [at[0] + 3, at[1] + 3]; // beside the plus that is drawn at the click

  const seen = { before: await pixel(corner) };
  await canvas.click({ position: await place(at) });
  await notebook.says(".widget-html-content", "1 click,");
  seen.clicked = await pixel(corner);
  await notebook.shot("clicked");

  await canvas.click({ position: await place(beside), modifiers: ["Shift"] });
  await notebook.says(".widget-html-content", "2 clicks,");
  await canvas.click({ position: await place(beside), button: "right" });
  await notebook.says(".widget-html-content", "3 clicks,");
  seen.menu = await page.locator(".lm-Menu").count();
  await canvas.focus();
  await page.keyboard.press("Backspace");
  await notebook.says(".widget-html-content", "2 clicks,");

  const { x, y } = await canvas.boundingBox();
  const [from, to] = [await place(box.slice(0, 2)), await place(box.slice(2))];
  await page.mouse.move(x + from.x, y + from.y);
  await page.mouse.down();
  await page.mouse.move(x + to.x, y + to.y, { steps: 5 });
  await notebook.shot("dragging");
  await page.mouse.up();
  await notebook.says(".widget-html-content", "1 box,");
  await notebook.shot("boxed");
  seen.state = await notebook.run(1);

  await page.getByRole("button", { name: "clear" }).click();
  await notebook.says(".widget-html-content", "0 clicks,");
  await page.getByRole("button", { name: "undo" }).click();
  await notebook.says(".widget-html-content", "2 clicks,");

  seen.assigned = await notebook.run(2);
  await notebook.says(".widget-html-content", "1 click,");
  await page.waitForTimeout(2000);
  await notebook.save();
  await notebook.shot('saved')
  return seen;
});
