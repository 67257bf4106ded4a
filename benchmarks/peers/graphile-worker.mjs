// graphile-worker: jobs fetched and completed in batches, as its page on performance advises, and added by its SQL
// function, from JSON that was made before.
import { arguments_, enqueueing, load, main, sizes } from './adapter.mjs'

const { Logger, run, runMigrations } = await load('graphile-worker')
const { default: pg } = await load('pg')
const { url: connectionString, payload, at, workers } = arguments_
const logger = new Logger(() => (level, message) => level === 'error' && console.error(message))
const settings = {
  concurrentJobs: 24, maxPoolSize: 26, localQueue: { size: 5000 }, pollInterval: 100,
  completeJobBatchDelay: 0, failJobBatchDelay: 0,
}
const chunk = 5000

await main({
  async install() {
    await runMigrations({ connectionString, logger })
    return {
      done: 'select (select id from graphile_worker._private_jobs order by id desc limit 1) is null',
      wrong: 'select count(*) from graphile_worker._private_jobs',
    }
  },
  async enqueue() {
    const job = { identifier: 'noop', payload, run_at: at ? new Date(at).toISOString() : undefined }
    const texts = Array.from(sizes(chunk), size => JSON.stringify(Array(size).fill(job)))
    const pool = new pg.Pool({ connectionString, max: workers })
    await Promise.all(Array.from({ length: workers }, () => pool.query('select pg_sleep(0.05)')))
    return enqueueing(texts, text => pool.query(
      'select count(*) from graphile_worker.add_jobs(array(' +
      'select json_populate_recordset(null::graphile_worker.job_spec, $1::json)))', [text]))
  },
  async work(started) {
    const runner = await run({
      noHandleSignals: true, logger, preset: { worker: { connectionString, logger, ...settings } },
      taskList: { noop: async (_, { job }) => { started(job.id) } },
    })
    return () => runner.stop()
  },
})
