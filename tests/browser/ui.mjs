// Checks the pages in a real browser: `node tests/browser/ui.mjs SETTINGS`. tests/api/ui.rs starts it on a
// server with the recorded invoices. The first part runs without JavaScript. The second part needs it to
// measure the pages, on a phone and on a desktop, in the light and the dark scheme.

import assert from "node:assert/strict";
import { SIZES, launch, signIn } from "./browser.mjs";

const { base, operatorKey, tenantKey, uid, stripeId, event } = JSON.parse(process.argv[2]);
const invoicePage = `/ui/invoice?tenant=acme&uid=${uid}`;
const browser = await launch();

// The steps of a person in finance, with a tenant's key.
async function finance(javaScriptEnabled) {
  const { context, page } = await open({ viewport: SIZES.desk, javaScriptEnabled });
  await page.goto(base + invoicePage);
  await page.getByLabel("API key").fill("srk_wrong");
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("alert").getByText("not valid").waitFor();
  await page.getByLabel("API key").fill(tenantKey);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.waitForURL(base + invoicePage);
  await page.goto(`${base}/ui`);
  await search(page, stripeId);
  await page.waitForURL(base + invoicePage);
  await page.getByRole("heading", { level: 1, name: uid }).waitFor();
  await page.getByText(/^Paid on \d{4}-\d\d-\d\d/).waitFor();
  assert.ok(await page.locator("ol.line article").count() >= 3, "the history has its entries");
  await page.locator("ol.line article").last().getByText(event).waitFor();
  assert.equal(await page.getByRole("link", { name: event }).count(), 0, "an event's page is for operators");
  await page.getByLabel("Date and time, UTC").fill("2026-01-01T12:00:00");
  await page.getByRole("button", { name: "Show" }).click();
  await page.getByText("Nothing was known about its payment at that time").waitFor();
  await page.getByRole("link", { name: "Show the current history" }).click();
  await page.getByText(/^Paid on/).waitFor();

  await page.goto(`${base}/ui`);
  assert.equal(await page.getByText("inv-other").count(), 0, "another tenant's invoice is not listed");
  await search(page, "inv-other");
  await page.getByText("No invoice has").waitFor();
  assert.equal((await page.goto(`${base}/ui/invoice?tenant=other&uid=inv-other`)).status(), 404);
  assert.equal((await page.goto(`${base}/ui/events`)).status(), 403);
  await page.goto(`${base}/ui`);
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByLabel("API key").waitFor();
  assert.equal((await context.cookies()).length, 0, "the browser has forgotten the session");
  await page.goto(base + invoicePage);
  await page.getByLabel("API key").waitFor();
  await context.close();
}

// The pages that the person on call reads, with the operator's key, measured in one size and scheme.
async function operator(size, colorScheme) {
  const { context, page } = await open({ viewport: SIZES[size], colorScheme });
  await page.goto(`${base}/ui/sign-in`);
  await measure(page, `sign-in ${size} ${colorScheme}`);
  await signIn(page, base, operatorKey);
  await measure(page, `invoices ${size} ${colorScheme}`);
  await page.goto(base + invoicePage);
  await page.getByRole("link", { name: event }).first().waitFor();
  await measure(page, `invoice ${size} ${colorScheme}`);
  await page.emulateMedia({ media: "print", colorScheme });
  await measure(page, `invoice printed ${size} ${colorScheme}`);
  await page.emulateMedia({ media: "screen", colorScheme });
  await page.getByRole("link", { name: event }).first().click();
  await page.getByText("bytes, as received").waitFor();
  await measure(page, `event ${size} ${colorScheme}`);
  await page.goto(`${base}/ui/unreadable`);
  await page.getByRole("link", { name: "Unreadable" }).last().click();
  await page.getByText("no event").first().waitFor();
  await measure(page, `unreadable event ${size} ${colorScheme}`);
  for (const name of ["Unmatched", "Unreadable", "Events", "Reconciliation", "Alarms"]) {
    await page.getByRole("navigation", { name: "Pages" }).getByRole("link", { name, exact: true }).click();
    await page.locator(`nav [aria-current=page]`).getByText(name).waitFor();
    await measure(page, `${name} ${size} ${colorScheme}`);
    if (name === "Events" && size === "telephone") {
      const label = await page.locator("td.when").first().evaluate((cell) => getComputedStyle(cell, "::before").content);
      assert.match(label, /Happened|data-label/, "times are labelled where the column heads are hidden");
    }
  }
  await context.close();
}

// Opens a page whose console must stay silent, except for the error statuses that the test provokes.
async function open(options) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.on("console", (message) => {
    const asked = /status of (401|403|404)/.test(message.text());
    if (["error", "warning"].includes(message.type()) && !asked) problems.push(message.text());
  });
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("requestfailed", (request) => problems.push(`${request.url()}: ${request.failure()?.errorText}`));
  return { context, page };
}

async function search(page, text) {
  await page.getByRole("searchbox").fill(text);
  await page.getByRole("button", { name: "Find" }).click();
}

// Asserts that nothing is wider than the window, every text contrasts with its background (4.5 : 1), every
// field has a label, and the focused element has an outline.
async function measure(page, what) {
  const found = await page.evaluate(() => {
    const wide = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("pre, thead"));
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    const rgb = (color) => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = color;
      canvas.fillRect(0, 0, 1, 1);
      return canvas.getImageData(0, 0, 1, 1).data;
    };
    const light = (color) => {
      const part = (n) => (n / 255 <= 0.04045 ? n / 255 / 12.92 : ((n / 255 + 0.055) / 1.055) ** 2.4);
      return 0.2126 * part(color[0]) + 0.7152 * part(color[1]) + 0.0722 * part(color[2]);
    };
    const ground = (e) => {
      for (; e; e = e.parentElement) {
        const color = rgb(getComputedStyle(e).backgroundColor);
        if (color[3] > 0) return color;
      }
      return [255, 255, 255, 255];
    };
    const dim = [];
    for (const e of document.querySelectorAll("body *")) {
      const says = [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
      if (!says) continue;
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (contrast < 4.5) dim.push(`${e.className || e.tagName} "${e.textContent.trim().slice(0, 30)}" ${contrast.toFixed(2)}`);
    }
    const nameless = [...document.querySelectorAll("input:not([type=hidden])")].filter((e) => !e.labels.length).length;
    return {
      overflow: document.documentElement.scrollWidth - innerWidth, wide: wide.map((e) => e.outerHTML.slice(0, 120)).slice(0, 5), dim, nameless,
      headings: document.querySelectorAll("h1").length, language: document.documentElement.lang, styled: document.styleSheets.length,
    };
  });
  assert.ok(found.overflow <= 0 && found.wide.length === 0, `${what} is wider than its window: ${JSON.stringify(found)}`);
  assert.deepEqual(found.dim, [], `${what} has text that is hard to read`);
  assert.deepEqual([found.nameless, found.headings, found.language, found.styled], [0, 1, "en", 1], what);
  await page.keyboard.press("Tab");
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.notEqual(outline, "none", `${what} outlines the focused element`);
}

const problems = [];
try {
  await finance(false);
  for (const size of Object.keys(SIZES)) for (const scheme of ["light", "dark"]) await operator(size, scheme);
  assert.deepEqual(problems, [], "the console is silent");
} finally {
  await browser.close();
}
