// node page.mjs plan.json: opens index.html of exported models in headless Chromium, and does what a visitor would.
//
// plan.json: {modules, chromium, visits: [{folder, screenshot, strokes: [[[x, y], …], …], label, numbers}, …]}; x and y are
// in [0, 1] of the pad. Prints a list of {answers, shares, learned, output, requests, complaints}.
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import {createRequire} from 'node:module';

const plan = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const {chromium} = createRequire(path.join(plan.modules, 'here.js'))('playwright-core');
const TYPES = {'.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.json': 'application/json'};

const server = http.createServer((request, response) => {
  const [, visit, ...rest] = decodeURIComponent(new URL(request.url, 'http://localhost').pathname).split('/');
  const file = path.join(plan.visits[visit]?.folder ?? '/nowhere', ...rest);
  fs.readFile(file, (error, data) => {
    response.writeHead(error ? 404 : 200, {'Content-Type': TYPES[path.extname(file)] ?? 'application/octet-stream'});
    response.end(error ? '' : data);
  });
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));

const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'page-'));
const args = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const browser = await chromium.launchPersistentContext(profile, {executablePath: plan.chromium, args, viewport: {width: 820, height: 860}});
const found = [];
try {
  for (const i of plan.visits.keys()) found.push(await visit(i));
} finally {
  await browser.close();
  server.close();
  fs.rmSync(profile, {recursive: true, force: true});
}
fs.writeFileSync(1, JSON.stringify(found));

async function visit(i) {
  const wanted = plan.visits[i], seen = {requests: [], complaints: []};
  const page = await browser.newPage();
  page.setDefaultTimeout(180000);  // of a machine that is busy
  page.on('request', (request) => seen.requests.push(request.url()));
  page.on('pageerror', (error) => seen.complaints.push(error.message));
  page.on('console', (message) => message.type() === 'error' && seen.complaints.push(message.text()));
  await page.goto(`http://127.0.0.1:${server.address().port}/${i}/index.html?backend=cpu`);
  await page.waitForSelector('main:not([hidden]), #status.wrong');
  const wrong = await page.locator('#status.wrong').allTextContents();
  if (wrong.length) throw new Error(wrong[0]);
  await (wanted.strokes ? draw : fill)(page, wanted, seen);
  if (wanted.label !== undefined) await teach(page, wanted, seen);
  if (wanted.screenshot) await page.screenshot({path: wanted.screenshot});
  await page.close();
  return seen;
}

async function draw(page, {strokes}, seen) {
  const box = await page.locator('#pad').boundingBox();
  for (const [first, ...rest] of strokes) {
    const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
    await page.mouse.move(...at(first));
    await page.mouse.down();
    for (const point of rest) await page.mouse.move(...at(point), {steps: 4});
    await page.mouse.up();
  }
  await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
  (seen.answers ??= []).push(await page.textContent('#answer'));
  seen.shares = (await page.locator('#bars .share').allTextContents()).map(parseFloat);
}

async function teach(page, wanted, seen) {
  await page.click(`#labels button:nth-child(${wanted.label + 1})`);
  await page.click('#train');
  await page.waitForFunction(() => document.getElementById('learned').textContent);
  seen.learned = await page.textContent('#learned');
  await draw(page, wanted, seen);
}

async function fill(page, {numbers}, seen) {
  const inputs = page.locator('#inputs input');
  for (const [i, value] of numbers.entries()) await inputs.nth(i).fill(`${value}`);
  await page.click('#predict');
  seen.output = (await page.locator('#outputs .share').allTextContents()).map(Number);
}
