// pg-boss: a queue with a table of its own, jobs inserted, fetched and completed in batches; a worker polls at the
// shortest interval that is allowed, and at once after a full batch.
import { arguments_, enqueueing, load, main, sizes } from './adapter.mjs'

const { PgBoss } = await load('pg-boss')
const { url: connectionString, payload, at, workers } = arguments_
const settings = { batchSize: 2000, localConcurrency: 2, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 }
const chunk = 5000

async function opened() {
  const boss = new PgBoss({ connectionString, max: Math.max(workers, 10), schedule: false, supervise: false })
  boss.on('error', console.error)
  return boss.start()
}

await main({
  async install() {
    await (await opened()).createQueue('noop', { partition: true })
    const jobs = "from pgboss.job where name = 'noop'"
    return {
      done: `select not exists (select ${jobs} and state in ('created', 'retry', 'active'))`,
      wrong: `select ${arguments_.events} - count(*) ${jobs} and state = 'completed' and retry_count = 0`,
    }
  },
  async enqueue() {
    const boss = await opened()
    const job = { data: payload, startAfter: at ? new Date(at) : undefined }
    const chunks = Array.from(sizes(chunk), size => Array(size).fill(job))
    return enqueueing(chunks, jobs => boss.insert('noop', jobs))
  },
  async work(started) {
    const boss = await opened()
    await boss.work('noop', settings, async jobs => { for (const job of jobs) started(job.id) })
    return () => boss.stop({ graceful: true, timeout: 5000 })
  },
})
