// Scrolling, clicking and propagating in the three planes of a volume.
import { drive } from "./page.mjs";

await drive(async (notebook, { at, slice }) => {
  const { page } = notebook;
  await notebook.open();
  await notebook.run(0);
  await notebook.until(() => document.querySelectorAll("canvas.mmadapt-canvas[data-drawn]").length === 3);
  const axial = page.locator("canvas.mmadapt-canvas").nth(0);
  await axial.scrollIntoViewIfNeeded();
  const titles = () => page.locator(".mmadapt-title").allInnerTexts();

  const seen = { titles: await titles() };
  await axial.hover();
  for (let step = 0; step < 3; step++) await page.mouse.wheel(0, 100);
  await notebook.says(".mmadapt-title", `z = ${slice}`);
  const { width, height } = await axial.boundingBox();
  await axial.click({ position: { x: ((at[0] + 0.5) / 64) * width, y: ((at[1] + 0.5) / 64) * height } });
  await notebook.says(".widget-html-content", "1 click,");
  seen.pixel = await axial.evaluate((own, [x, y]) => {
    const [px, py] = [((x + 4.5) / 64) * own.width, ((y + 4.5) / 64) * own.height];
    return Array.from(own.getContext("2d").getImageData(px, py, 1, 1).data);
  }, at);
  seen.clicked = await notebook.run(1);
  await page.getByRole("button", { name: "propagate" }).click();
  await notebook.until(
    (before) => {
      const text = [...document.querySelectorAll(".widget-html-content")].map((own) => own.innerText).join();
      return Number(/([\d,]+) voxels/.exec(text)?.[1].replace(",", "")) > before;
    },
    Number(seen.clicked),
  );
  await page.locator('input[type="range"]').nth(1).fill("20");
  await notebook.says(".mmadapt-title", "y = 20");
  await notebook.shot("volume", page.locator(".mmadapt-live"));
  seen.propagated = await notebook.run(1);
  seen.state = await notebook.run(2);
  return seen;
});
