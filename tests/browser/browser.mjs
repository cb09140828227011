// Starts Debian's Chromium without the features that use the network by themselves, and holds the steps
// that tests and pictures share.

import { chromium } from "playwright-core";

export const SIZES = { telephone: { width: 375, height: 812 }, desk: { width: 1440, height: 900 } };

export async function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync",
    ],
  });
}

export async function signIn(page, base, key) {
  await page.goto(`${base}/ui`);
  await page.getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("heading", { name: "Invoices", level: 1 }).waitFor();
}
