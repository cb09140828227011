// Takes the pictures in the README from the demo's data. With `stripe-reconciler demo --keep` running,
//
//     node tests/browser/pictures.mjs http://127.0.0.1:PORT OPERATOR_KEY
//
// writes docs/ui-desk.png (1440 pixels wide, light) and docs/ui-telephone.png (375 pixels wide, dark).

import { fileURLToPath } from "node:url";
import { SIZES, launch, signIn } from "./browser.mjs";

const [base, key] = process.argv.slice(2);
const docs = fileURLToPath(new URL("../../docs/", import.meta.url));
const browser = await launch();

async function picture(name, size, colorScheme, height) {
  const context = await browser.newContext({ viewport: { ...SIZES[size], height }, colorScheme });
  const page = await context.newPage();
  await signIn(page, base, key);
  await page.goto(`${base}/ui/invoice?tenant=acme&uid=inv-2026-01-018`);
  await page.screenshot({ path: `${docs}${name}.png` });
  await context.close();
}

await picture("ui-desk", "desk", "light", 900);
await picture("ui-telephone", "telephone", "dark", 900);
await browser.close();
