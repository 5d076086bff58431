// A saved notebook, opened where its kernel is gone: which pictures it shows, and what else stands there.
import { drive } from "./page.mjs";

await drive(async (notebook, { kernel, shot }) => {
  const { page } = notebook;
  await notebook.open(kernel);
  await notebook.until(() => document.querySelector(".jp-OutputArea-output"));
  await page.waitForTimeout(2500);
  await notebook.shot(shot);
  const images = await page.locator(".jp-OutputArea img").evaluateAll((all) => all.map((own) => own.naturalWidth));
  return { images, text: await page.locator(".jp-OutputArea").first().innerText() };
});
