// The page: opens the artifact in WebAssembly, classifies the picture that is picked, and answers as a judge.
const show = (id, text) => { document.getElementById(id).textContent = text }
const fail = (error) => show('fault', String(error?.message ?? error).split('\n').find((line) => line.trim()) ?? 'It fails.')

async function get(path) {
  const answer = await fetch(path)
  if (!answer.ok) throw new Error(`${path}: ${await answer.text()}`)
  return answer
}

// The artifact ------------------------------------------------------------------------------------------------------

async function open() {
  const ort = await import('/ort/ort.wasm.bundle.min.mjs')
  ort.env.wasm.numThreads = 1                               // more of them need headers that few servers send
  ort.env.wasm.wasmPaths = new URL('/ort/', location).href  // whole: a relative one is taken from the library's place
  const record = await (await get('/artifact.json')).json()
  const bytes = new Uint8Array(await (await get('/model.onnx')).arrayBuffer())
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] })
  const { shape, layout, range, normalization, crop } = record.input
  if (crop !== null) throw new Error('The artifact asks for a crop that this page does not know.')
  const last = layout === 'NHWC'
  const [channels, height, width] = last ? [shape[3], shape[1], shape[2]] : shape.slice(1)
  const { mean, std } = normalization === 'inside' ? {} : normalization
  const [input, output] = [session.inputNames[0], session.outputNames[0]]
  const declared = session.inputMetadata[0].shape[0]
  const fixed = typeof declared === 'number' && declared > 0 ? declared : 0
  const area = height * width
  const each = channels * area

  // (N, C, H, W) float32 in [0, 1] as the file wants them: its range, its normalization, its layout.
  function prepared(pixels) {
    if (!mean && !last && range[0] === 0 && range[1] === 1) return pixels
    const made = new Float32Array(pixels.length)
    pixels.forEach((pixel, place) => {
      const [image, channel, spot] = [Math.floor(place / each), Math.floor(place / area) % channels, place % area]
      const level = pixel * (range[1] - range[0]) + range[0]
      const value = mean ? (level - mean[channel]) / std[channel] : level
      made[last ? image * each + spot * channels + channel : place] = value
    })
    return made
  }

  // -> [K, N * K scores]
  async function scores(count, pixels) {
    const ready = prepared(pixels)
    const step = fixed || count
    let classes = 0
    const parts = []
    for (let first = 0; first < count; first += step) {
      const part = new Float32Array(step * each)             // a last batch that is too small is filled up with zeros
      part.set(ready.subarray(first * each, Math.min(first + step, count) * each))
      const dims = last ? [step, height, width, channels] : [step, channels, height, width]
      const { data } = (await session.run({ [input]: new ort.Tensor('float32', part, dims) }))[output]
      classes = data.length / step
      parts.push(data.slice(0, Math.min(step, count - first) * classes))
    }
    const all = new Float32Array(count * classes)
    parts.forEach((part, place) => all.set(part, place * step * classes))
    return [classes, all]
  }

  return { record, channels, height, width, scores }
}

// A picture ---------------------------------------------------------------------------------------------------------

const LARGEST = 2 ** 24   // pixels: no canvas of a phone is larger

async function pixelsOf(file, { channels, height, width }) {
  // Upright, and with the values that stand in the file.
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' })
  const smaller = Math.min(1, Math.sqrt(LARGEST / (bitmap.width * bitmap.height)))
  const canvas = document.createElement('canvas')
  canvas.width = Math.max(1, Math.floor(bitmap.width * smaller))
  canvas.height = Math.max(1, Math.floor(bitmap.height * smaller))
  const context = canvas.getContext('2d', { willReadFrequently: true })
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height)
  bitmap.close()
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height)
  const planes = []
  for (let channel = 0; channel < channels; channel++) {
    const plane = new Uint8ClampedArray(canvas.width * canvas.height)
    for (let i = 0; i < plane.length; i++) {
      // Grey by the weights of ITU-R 601, as pillow rounds them.
      plane[i] = channels === 1
        ? (data[4 * i] * 19595 + data[4 * i + 1] * 38470 + data[4 * i + 2] * 7471 + 0x8000) >> 16
        : data[4 * i + channel]
    }
    planes.push(fit({ width: canvas.width, height: canvas.height, plane }, height, width))
  }
  const pixels = new Float32Array(channels * height * width)
  planes.forEach((plane, channel) => plane.forEach((value, i) => { pixels[channel * height * width + i] = value / 255 }))
  return pixels
}

// The middle of a plane in the shape wanted, resized as pillow's ImageOps.fit does it with its bicubic filter. Rows come
// first; where pillow begins with columns, as some versions do for tall pictures, a value may differ by 1 of 255.
function fit(picture, height, width) {
  const [live, wanted] = [picture.width / picture.height, width / height]
  const across = live > wanted ? wanted * picture.height : picture.width
  const down = live < wanted ? picture.width / wanted : picture.height
  const [left, top] = [(picture.width - across) * 0.5, (picture.height - down) * 0.5]
  const wide = resizeRows(picture, left, left + across, width)
  return turned(resizeRows(turned(wide), top, top + down, height)).plane
}

function resizeRows({ width, height, plane }, from, to, out) {
  const [low, high, bits] = [Math.fround(from), Math.fround(to), 32 - 8 - 2]   // 32 bits, and fixed point, as there
  const scale = Math.fround(high - low) / out
  const spread = Math.max(scale, 1)
  const bicubic = (at) => {
    const x = Math.abs(at)
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0
  }
  const made = new Uint8ClampedArray(out * height)
  for (let column = 0; column < out; column++) {
    const center = low + (column + 0.5) * scale
    const first = Math.max(0, Math.trunc(center - 2 * spread + 0.5))
    const last = Math.min(width, Math.trunc(center + 2 * spread + 0.5))
    const weights = []
    for (let x = first; x < last; x++) weights.push(bicubic((x - center + 0.5) / spread))
    const sum = weights.reduce((a, b) => a + b, 0)
    const fixed = weights.map((weight) => {
      const value = weight / sum * 2 ** bits
      return Math.trunc(value < 0 ? value - 0.5 : value + 0.5)
    })
    for (let row = 0; row < height; row++) {
      let total = 2 ** (bits - 1)
      for (let x = first; x < last; x++) total += plane[row * width + x] * fixed[x - first]
      made[row * out + column] = Math.floor(total / 2 ** bits)
    }
  }
  return { width: out, height, plane: made }
}

function turned({ width, height, plane }) {
  const made = new Uint8ClampedArray(plane.length)
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++) made[column * height + row] = plane[row * width + column]
  return { width: height, height: width, plane: made }
}

async function classify(model, file) {
  const picture = document.getElementById('picture')
  URL.revokeObjectURL(picture.src)
  picture.src = URL.createObjectURL(file)
  picture.hidden = false
  const [, scores] = await model.scores(1, await pixelsOf(file, model))
  let shares = Array.from(scores)
  if (model.record.outputs === 'logits') {
    const highest = Math.max(...shares)
    const powers = shares.map((score) => Math.exp(score - highest))
    const sum = powers.reduce((a, b) => a + b, 0)
    shares = powers.map((power) => power / sum)
  }
  const order = shares.map((share, place) => [share, place]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 5)
  document.getElementById('classes').replaceChildren(...order.map(([share, place]) => {
    const [line, name, percent, bar] = ['li', 'span', 'span', 'meter'].map((tag) => document.createElement(tag))
    name.textContent = model.record.classes[place]
    percent.textContent = `${(100 * share).toFixed(1)} %`
    bar.value = share
    bar.setAttribute('aria-hidden', 'true')
    line.dataset.share = share.toFixed(6)
    line.append(name, percent, bar)
    return line
  }))
}

// The judge ---------------------------------------------------------------------------------------------------------
// A message is a request of the protocol: N, C, H, W as little-endian uint32 and the images as float32; the answer is
// N, K and the scores. What goes wrong is answered as text.

function judge(model) {
  const socket = new WebSocket(new URL('/judge', location.href.replace(/^http/, 'ws')))
  socket.binaryType = 'arraybuffer'
  let answered = 0
  socket.onopen = () => show('judge', 'Connected. Keep this page open and the screen on.')
  socket.onclose = () => show('judge', `Not connected any more; ${answered.toLocaleString('en')} images were answered.`)
  socket.onmessage = async ({ data }) => {
    try {
      const view = new DataView(data)
      const [count, ...shape] = [0, 4, 8, 12].map((place) => view.getUint32(place, true))
      if (shape.join('x') !== [model.channels, model.height, model.width].join('x'))
        throw new Error(`it takes images of ${model.channels}x${model.height}x${model.width}, not ${shape.join('x')}`)
      const pixels = new Float32Array(count * shape[0] * shape[1] * shape[2])
      for (let i = 0; i < pixels.length; i++) pixels[i] = view.getFloat32(16 + 4 * i, true)
      const [classes, scores] = await model.scores(count, pixels)
      const answer = new DataView(new ArrayBuffer(8 + 4 * scores.length))
      answer.setUint32(0, count, true)
      answer.setUint32(4, classes, true)
      scores.forEach((score, i) => answer.setFloat32(8 + 4 * i, score, true))
      socket.send(answer.buffer)
      answered += count
      show('judge', `Connected; ${answered.toLocaleString('en')} images answered.`)
    } catch (error) {
      socket.send(String(error?.message ?? error))
      fail(error)
    }
  }
}

try {
  const model = await open()
  const { record } = model
  show('name', `${record.format}-${record.precision}`)
  show('about', `${record.classes.length} classes; images of ${model.channels} × ${model.height} × ${model.width}; runs in this browser, and no picture leaves it`)
  const file = document.getElementById('file')
  file.addEventListener('change', () => {
    show('fault', '')
    if (file.files.length) classify(model, file.files[0]).catch(fail)
  })
  file.disabled = false
  judge(model)
} catch (error) {
  show('name', 'This artifact does not open here')
  fail(error)
}
