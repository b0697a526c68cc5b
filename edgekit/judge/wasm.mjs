// A judge in WebAssembly: `node wasm.mjs ORT FILE [THREADS]` answers the protocol of CLI.md on stdin and stdout.
// ORT is onnxruntime-web's ort.wasm.bundle.min.mjs. What goes wrong is one line on stderr and exit status 2.
import { readFileSync, writeSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import { dirname } from 'node:path'

const [library, file] = process.argv.slice(2)
console.log = console.warn = console.info = () => {}   // stdout is for scores

function leave(error) {
  const said = String(error?.message ?? error).split('\n').find((line) => line.trim()) ?? 'it fails'
  writeSync(2, `\nonnxruntime-web does not take the file (${said.slice(0, 200)})\n`)
  process.exit(2)
}

function write(bytes) {
  for (let done = 0; done < bytes.length;) {
    try {
      done += writeSync(1, bytes, done)
    } catch (error) {
      if (error.code !== 'EAGAIN') process.exit(0)      // nobody reads any more
    }
  }
}

// Bytes of stdin, so many at once; null where it has ended.
const incoming = process.stdin[Symbol.asyncIterator]()
let held = Buffer.alloc(0)
async function take(count) {
  const parts = [held]
  let have = held.length
  while (have < count) {
    const { value, done } = await incoming.next()
    if (done) return null
    parts.push(value)
    have += value.length
  }
  const all = Buffer.concat(parts)
  held = all.subarray(count)
  return all.subarray(0, count)
}

try {
  const ort = await import(pathToFileURL(library).href)
  ort.env.wasm.numThreads = 1
  ort.env.wasm.wasmPaths = pathToFileURL(dirname(library)).href + '/'
  if (file === '--version') {
    writeSync(1, `wasm ${ort.env.versions.web ?? ort.env.versions.common}\n`)
    process.exit(0)
  }
  const session = await ort.InferenceSession.create(readFileSync(file), { executionProviders: ['wasm'] })
  const wanted = process.argv[4]
  const output = wanted === undefined ? session.outputNames[0] : wanted
  const { type, shape: takes } = session.inputMetadata[0]
  if (type !== 'float32' && type !== 'uint8') throw new Error(`its input takes ${type}; float32 or uint8 is needed`)
  const fixed = typeof takes[0] === 'number' && takes[0] > 0 ? takes[0] : 0
  for (;;) {
    const header = await take(16)
    if (header === null) break
    const shape = [0, 4, 8, 12].map((place) => header.readUInt32LE(place))
    const each = shape[1] * shape[2] * shape[3]
    const body = await take(4 * shape[0] * each)
    if (body === null) throw new Error('a request ends too early')
    const pixels = new Float32Array(shape[0] * each)
    for (let i = 0; i < pixels.length; i++) pixels[i] = body.readFloatLE(4 * i)
    const rows = []
    const step = fixed || shape[0]
    for (let first = 0; first < shape[0]; first += step) {
      const part = new Float32Array(step * each)           // a last batch that is too small is filled up with zeros
      part.set(pixels.subarray(first * each, Math.min(first + step, shape[0]) * each))
      const data = type === 'uint8' ? Uint8Array.from(part, Math.round) : part
      const given = { [session.inputNames[0]]: new ort.Tensor(type, data, [step, ...shape.slice(1)]) }
      const scores = (await session.run(given, [output]))[output]
      const classes = scores.data.length / step
      for (let row = 0; row < Math.min(step, shape[0] - first); row++) {
        rows.push(scores.data.slice(row * classes, (row + 1) * classes))
      }
    }
    const classes = rows.length ? rows[0].length : 0
    const answer = Buffer.alloc(8 + 4 * rows.length * classes)
    answer.writeUInt32LE(shape[0], 0)
    answer.writeUInt32LE(classes, 4)
    rows.forEach((row, n) => row.forEach((score, k) => answer.writeFloatLE(score, 8 + 4 * (n * classes + k))))
    write(answer)
  }
} catch (error) {
  leave(error)
}
process.exit(0)
