// node page.mjs plan.json: opens index.html of an exported model in headless Chromium, and does what a visitor would.
//
// plan.json: {folder, modules, chromium, query, screenshot, strokes: [[[x, y], …], …], label, numbers}; x and y are in [0, 1] of
// the pad. Prints {answers, shares, learned, output, requests, complaints}.
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import {createRequire} from 'node:module';

const plan = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const {chromium} = createRequire(path.join(plan.modules, 'here.js'))('playwright-core');
const TYPES = {'.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.json': 'application/json'};

const server = http.createServer((request, response) => {
  const file = path.join(plan.folder, decodeURIComponent(new URL(request.url, 'http://localhost').pathname));
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
const found = {requests: [], complaints: []};
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(60000);
  page.on('request', (request) => found.requests.push(request.url()));
  page.on('pageerror', (error) => found.complaints.push(error.message));
  page.on('console', (message) => message.type() === 'error' && found.complaints.push(message.text()));
  await page.goto(`http://127.0.0.1:${server.address().port}/index.html${plan.query ?? ''}`);
  await page.waitForSelector('main:not([hidden]), #status.wrong');
  found.status = await page.textContent('#status');
  await (plan.strokes ? draw(page) : fill(page));
  if (plan.label !== undefined) await teach(page);
  if (plan.screenshot) await page.screenshot({path: plan.screenshot});
} finally {
  await browser.close();
  server.close();
  fs.rmSync(profile, {recursive: true, force: true});
}
fs.writeFileSync(1, JSON.stringify(found));

async function draw(page) {
  const box = await page.locator('#pad').boundingBox();
  for (const [first, ...rest] of plan.strokes) {
    const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
    await page.mouse.move(...at(first));
    await page.mouse.down();
    for (const point of rest) await page.mouse.move(...at(point), {steps: 4});
    await page.mouse.up();
  }
  await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
  (found.answers ??= []).push(await page.textContent('#answer'));
  found.shares = (await page.locator('#bars .share').allTextContents()).map(parseFloat);
}

async function teach(page) {
  await page.click(`#labels button:nth-child(${plan.label + 1})`);
  await page.click('#train');
  await page.waitForFunction(() => document.getElementById('learned').textContent);
  found.learned = await page.textContent('#learned');
  await draw(page);
}

async function fill(page) {
  const inputs = page.locator('#inputs input');
  for (const [i, value] of plan.numbers.entries()) await inputs.nth(i).fill(`${value}`);
  await page.click('#predict');
  found.output = (await page.locator('#outputs .share').allTextContents()).map(Number);
}
