// What the adapters share. Called as: node ADAPTER PACKAGES ROLE ARGUMENTS, where ARGUMENTS is one JSON object and
// PACKAGES the folder that npm installed the queues into. A role prints lines of JSON: `install` and `enqueue` their
// answer. `work` prints {} when it could start, starts when it reads a line, and once its input ends prints
// [[id, Unix ms of its start], …] of all its jobs.
import { once } from 'node:events'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const [packages, role, text] = process.argv.slice(2)
const resolver = createRequire(`${packages}/`)
const say = value => new Promise(said => process.stdout.write(JSON.stringify(value) + '\n', said))

export const arguments_ = JSON.parse(text)
export const load = name => import(pathToFileURL(resolver.resolve(name)))

/** Calls `send` for each chunk, from as many connections as there are workers; returns the seconds that it took. */
export async function enqueueing(chunks, send) {
  const waiting = [...chunks]
  const began = performance.now()
  await Promise.all(Array.from({ length: arguments_.workers }, async () => {
    for (let chunk; (chunk = waiting.pop()) !== undefined;) await send(chunk)
  }))
  return (performance.now() - began) / 1000
}

/** The numbers of jobs that make up all events, `size` at most in each. */
export function* sizes(size) {
  for (let left = arguments_.events; left > 0; left -= size) yield Math.min(size, left)
}

/** Runs the role of this process; `work` gets the function that each job calls with its id, and returns how to stop. */
export async function main({ install, enqueue, work }) {
  if (role === 'install') await say(await install())
  if (role === 'enqueue') await say({ seconds: await enqueue() })
  if (role === 'work') {
    const starts = []
    const ended = once(process.stdin, 'end')  // which may come before `work` returns
    await say({})
    await once(process.stdin, 'data')
    const stop = await work(id => starts.push([id, performance.timeOrigin + performance.now()]))
    await ended
    await stop()
    await say(starts)
  }
  process.exit(0)
}
