// Sliders and switches of the views that are made of ipywidgets, and the stop button of a live run.
import { drive } from "./page.mjs";

await drive(async (notebook) => {
  const { page } = notebook;
  await notebook.open();
  const seen = {};
  const output = (place) => notebook.cell(place).locator(".jp-Cell-outputWrapper");

  /** Drag a slider's handle by so many pixels. */
  const drag = async (place, nth, pixels) => {
    const handle = notebook.cell(place).locator(".noUi-handle").nth(nth);
    await handle.scrollIntoViewIfNeeded();
    const { x, y, width, height } = await handle.boundingBox();
    await page.mouse.move(x + width / 2, y + height / 2);
    await page.mouse.down();
    await page.mouse.move(x + width / 2 + pixels, y + height / 2, { steps: 6 });
    await page.mouse.up();
  };

  await notebook.run(0);
  await notebook.says(".widget-html-content", "points on zero-shot");
  await notebook.shot("few_shot", output(0));
  await drag(0, 1, 120); // residual α
  await page.waitForTimeout(500);
  seen.fewShot = await notebook.run(1);
  seen.shown = await notebook.cell(0).locator(".widget-html-content b").first().innerText();

  await notebook.run(2);
  await notebook.says(".widget-html-content", "weights are 1.00 0.00");
  await drag(2, 1, 300); // the second attachment, to its end
  await notebook.says(".widget-html-content", "weights are 1.00 1.00");
  await notebook.shot("mix", output(2));
  seen.mixed = await notebook.run(3);

  await notebook.run(4);
  const switches = notebook.cell(4).locator('input[type="checkbox"]');
  await switches.nth(0).waitFor();
  await switches.nth(1).click();
  await notebook.cell(4).locator("button.widget-toggle-button").first().click();
  await notebook.says(".widget-html-content", "(resting)");
  await notebook.shot("inspect", output(4));
  seen.resting = await notebook.run(5);

  await notebook.run(6);
  const stop = notebook.cell(6).getByRole("button", { name: "Stop" });
  await stop.waitFor();
  await notebook.until(() => /^.*\b[1-9]\d*\/100000000 steps/m.test(document.querySelector(".jp-Notebook").innerText));
  await notebook.shot("live", output(6));
  await stop.click();
  seen.stopped = await notebook.run(7);
  seen.buttons = await notebook.cell(6).getByRole("button", { name: "Stop" }).count();
  await page.waitForTimeout(2500); // pictures follow a second after the last change
  await notebook.save();
  return seen;
});
