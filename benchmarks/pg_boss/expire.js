// Does with pg-boss what benchmarks/pg_boss.py asks for: reads a command from each line, and answers each with the
// seconds that pg-boss took. Whatever fails ends this process.

import { createInterface } from "node:readline";
import { setTimeout } from "node:timers/promises";
import { PgBoss } from "pg-boss";

const QUEUE = "benchmark";
const [connectionString, jobs] = process.argv.slice(2);

// Nothing is done by a timer, and each call of supervise() that comes a second after the last one looks for expired jobs.
const boss = new PgBoss({ connectionString, supervise: false, schedule: false, monitorIntervalSeconds: 1 });

const commands = {
  // Leave all jobs active, of a worker that took them and was not heard of again before they expired.
  async stall() {
    await boss.deleteAllJobs();
    await boss.insert(QUEUE, Array.from({ length: Number(jobs) }, (_, number) => ({ data: { number } })));
    await boss.fetch(QUEUE, { batchSize: Number(jobs) });
    await setTimeout(1100);
  },
  // What pg-boss does each minute by itself.
  async supervise() {
    await boss.supervise(QUEUE);
  },
};

await boss.start();
await boss.createQueue(QUEUE, { expireInSeconds: 1 });
for await (const command of createInterface({ input: process.stdin })) {
  const begin = performance.now();
  await commands[command]();
  console.log((performance.now() - begin) / 1000);
}
await boss.stop();
