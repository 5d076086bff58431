// A saved notebook, opened where its kernel is gone: the pictures it shows.
import { drive } from "./page.mjs";

await drive(async (notebook, { kernel }) => {
  const { page } = notebook;
  await notebook.open(kernel);
  await notebook.until(() => document.querySelector(".jp-OutputArea img")?.naturalWidth);
  // with a kernel the place of the widget says that its model is not there
  if (kernel) await notebook.says(".jp-OutputArea", "model not found");
  await notebook.shot(kernel ? "reopened" : "reopened-without-kernel");
  const widths = await page.locator(".jp-OutputArea img").evaluateAll((all) => all.map((own) => own.offsetWidth));
  return { widths, canvases: await page.locator("canvas").count() };
});
