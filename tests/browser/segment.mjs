// Clicks, drags and buttons on the widget of `mm.ui.segment`, on an image that the test made.
import { drive } from "./page.mjs";

await drive(async (notebook, { at, beside, box, refused }) => {
  const { page } = notebook;
  await notebook.open();
  await notebook.run(0);
  const canvas = page.locator("canvas.mmadapt-canvas");
  await notebook.until(() => document.querySelector("canvas.mmadapt-canvas")?.dataset.drawn);
  await canvas.scrollIntoViewIfNeeded();
  const status = (text) => notebook.says(".widget-html-content", text);

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
  await status("1 click,");
  seen.clicked = await pixel(corner);
  await canvas.click({ position: await place(beside), modifiers: ["Shift"] });
  await status("2 clicks,");
  await canvas.click({ position: await place(beside), button: "right" });
  await status("3 clicks,");
  seen.menus = await page.locator(".lm-Menu").count();
  await canvas.focus();
  await page.keyboard.press("Backspace");
  await status("2 clicks,");

  const { x, y } = await canvas.boundingBox();
  const [from, to] = [await place(box.slice(2)), await place(box.slice(0, 2))]; // upwards to the left
  await page.mouse.move(x + from.x, y + from.y);
  await page.mouse.down();
  await page.mouse.move(x + to.x, y + to.y, { steps: 5 });
  await page.mouse.up();
  await status("1 box,");
  await notebook.shot("segment", page.locator(".mmadapt-live"));
  seen.state = await notebook.run(1);

  await page.getByRole("button", { name: "clear" }).click();
  await status("0 clicks,");
  await page.getByRole("button", { name: "undo" }).click();
  await status("2 clicks,");

  // the predictor raises: the message is shown, nothing is changed, and the next click is answered
  await canvas.click({ position: await place(refused) });
  await notebook.says('[role="alert"]', "ValueError");
  seen.alert = await page.locator('[role="alert"]').innerText();
  await notebook.shot("refused", page.locator(".mmadapt-live"));
  await status("2 clicks,");
  await canvas.click({ position: await place(at) });
  await status("3 clicks,");
  seen.alerts = await page.locator('[role="alert"]').count();

  const slider = page.locator(".noUi-handle-lower");
  const handle = await slider.boundingBox();
  await page.mouse.move(handle.x + 5, handle.y + 5);
  await page.mouse.down();
  await page.mouse.move(handle.x + 60, handle.y + 5, { steps: 8 });
  await page.mouse.up();
  await notebook.until(
    ([x, y, before]) => {
      const own = document.querySelector("canvas.mmadapt-canvas");
      return own.getContext("2d").getImageData((x / 64) * own.width, (y / 64) * own.height, 1, 1).data[0] < before;
    },
    [2, 40, 60],
  );
  seen.window = await notebook.run(2);

  seen.assigned = await notebook.run(3);
  await status("1 click,");
  // the picture that is saved follows, though it is hidden
  const end = (await notebook.run(4)).trim();
  await notebook.until((end) => document.querySelector(".jp-OutputArea img").src.trim().endsWith(end), end);
  seen.pictures = await page.locator(".jp-OutputArea img").evaluateAll((all) => all.map((own) => own.offsetWidth));
  await notebook.save();
  return seen;
});
