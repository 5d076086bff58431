// A notebook in JupyterLab or Notebook 7, driven as a person would. Every wait fails at once on an error output.
//
//   node scenario.mjs '{"base": …, "front": "lab"|"notebook", "path": …, "token": …, "chromium": …, "shots": …}'
//
// playwright-core is found through NODE_PATH. A scenario prints one line of JSON: what it saw.
import { createRequire } from "node:module";
import path from "node:path";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const WAIT = 60000;

export async function drive(scenario) {
  const given = JSON.parse(process.argv[2]);
  const browser = await chromium.launch({
    executablePath: given.chromium,
    args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
  });
  const page = await browser.newPage({ viewport: { width: 1200, height: 1000 }, ...given.page });
  const beyond = []; // what would leave this machine: nothing may
  await page.route("**/*", (route) => {
    const { hostname, protocol } = new URL(route.request().url());
    if (/^https?:$/.test(protocol) && hostname !== "127.0.0.1") {
      beyond.push(hostname);
      return route.abort();
    }
    return route.continue();
  });
  const notebook = new Notebook(page, given);
  try {
    const seen = await scenario(notebook, given);
    console.log(JSON.stringify({ ...seen, beyond }));
  } catch (error) {
    await notebook.shot("failed");
    console.error(String(error.stack ?? error));
    console.error(await page.locator(".jp-Notebook").innerText({ timeout: 1000 }).catch(() => "no notebook"));
    process.exitCode = 1;
  } finally {
    await browser.close();
  }
}

function timedOut(error) {
  if (error.name !== "TimeoutError") throw error;
  return false;
}

class Notebook {
  constructor(page, given) {
    this.page = page;
    this.given = given;
  }

  async open(kernel = true) {
    const { base, front, token } = this.given;
    const place = front === "lab" ? "lab/tree" : "notebooks";
    await this.page.goto(`${base}/${place}/${this.given.path}?token=${token}&reset`, { waitUntil: "domcontentloaded" });
    await this.page.waitForSelector(".jp-Notebook .jp-CodeCell", { timeout: WAIT });
    if (kernel) await this.idle();
  }

  /** Wait for the kernel: the page says "idle" before it has one, and asks for one if a cell is run by then. */
  async idle() {
    const { base, path, token } = this.given;
    for (const end = Date.now() + WAIT; Date.now() < end; ) {
      const sessions = await (await fetch(`${base}/api/sessions?token=${token}`)).json();
      const own = sessions.find((session) => session.path === path);
      if (own?.kernel.connections && own.kernel.execution_state === "idle") break;
      await this.page.waitForTimeout(100);
    }
    await this.page.waitForSelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', { timeout: WAIT, state: "attached" });
  }

  cell(place) {
    return this.page.locator(".jp-Notebook .jp-CodeCell").nth(place);
  }

  /** Run one cell and wait until it has run; what it printed. */
  async run(place) {
    const cell = this.cell(place);
    const before = await cell.locator(".jp-InputPrompt").innerText();
    const prompt = ([place, before, pattern]) => {
      const cell = document.querySelectorAll(".jp-Notebook .jp-CodeCell")[place];
      const text = cell.querySelector(".jp-InputPrompt").innerText;
      return text !== before && new RegExp(pattern).test(text);
    };
    // a front end that is not connected yet runs nothing and says nothing
    for (let tries = 0; tries < 10; tries++) {
      await cell.locator(".cm-content").click();
      await this.page.keyboard.press("Control+Enter");
      if (await this.until(prompt, [place, before, "\\[(\\*|\\d+)\\]"], 3000).catch(timedOut)) break;
    }
    await this.until(prompt, [place, before, "\\[\\d+\\]"]);
    return (await cell.locator(".jp-OutputArea-output").allInnerTexts()).join("\n");
  }

  /** Wait for what a function of the page says; an error output ends the wait. */
  async until(condition, argument, timeout = WAIT) {
    const handle = await this.page.waitForFunction(
      ([source, argument]) => {
        const failed = document.querySelector('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"], .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]');
        if (failed) return { failed: failed.innerText };
        const found = new Function(`return (${source})`)()(argument);
        return found ? { found } : null;
      },
      [String(condition), argument],
      { timeout, polling: 50 },
    );
    const { found, failed } = await handle.jsonValue();
    if (failed) throw new Error(`the notebook shows an error:\n${failed}`);
    return found;
  }

  /** Wait until an element of the page says this. */
  says(selector, text) {
    return this.until(
      ([selector, text]) => [...document.querySelectorAll(selector)].some((one) => one.innerText.includes(text)),
      [selector, text],
    );
  }

  async save() {
    await this.page.keyboard.press("Escape");
    const saved = this.page.waitForResponse(
      (response) => response.request().method() === "PUT" && response.url().includes("/api/contents/"),
      { timeout: WAIT },
    );
    await this.page.keyboard.press("Control+s");
    await saved;
  }

  async shot(name, locator = this.page) {
    const { shots, front } = this.given;
    if (shots) await locator.screenshot({ path: path.join(shots, `${name}-${front}.png`) });
  }
}
