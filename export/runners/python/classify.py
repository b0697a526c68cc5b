"""Runs an exported artifact on a device with Python, such as a Raspberry Pi; needs numpy and the runtime, no edgekit.

    python classify.py ARTIFACT photo.jpg …          classes with their probabilities (needs pillow)
    python classify.py ARTIFACT --serve PORT         a judge: edgekit verify … --judge tcp://127.0.0.1:PORT
    python classify.py ARTIFACT                      a judge on stdin and stdout: --judge "python classify.py ARTIFACT"

ARTIFACT is the folder with the model file and its artifact.json. `--serve HOST:PORT` listens on another interface than
loopback: whoever reaches it may ask, and nothing is encrypted. A fault is one line on stderr; exit status 2 where it
lies in the input, 4 in the machine.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import socketserver
import struct
import sys
import threading
from pathlib import Path

import numpy

ANNOUNCED = 2**30  # bytes that one request may announce


class Fault(Exception):
    """One sentence for the user, and the exit status that goes with it."""

    def __init__(self, what, status=2):
        super().__init__(what)
        self.status = status


# Openers: (path, threads) -> what takes float32 images as the file wants them and gives scores (N, K), and how many
# images the file takes at once, 0 for any number. The settings are those that edgekit opens the file with.


def onnx(path, threads):
    runtime = package("onnxruntime")
    settings = runtime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    return lambda pixels: session.run(None, {first.name: pixels})[0], fixed(first.shape[0])


def openvino(path, threads):
    runtime = package("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = runtime.Core().compile_model(str(path), "CPU", options)
    size = compiled.input(0).get_partial_shape()[0]
    request = compiled.create_infer_request()
    # A copy: the next inference overwrites the runtime's own memory.
    return lambda pixels: request.infer([pixels])[0].copy(), 0 if size.is_dynamic else size.get_length()


def litert(path, threads):
    runtime = package("ai_edge_litert.interpreter", "ai-edge-litert")
    interpreter = runtime.Interpreter(model_path=str(path), num_threads=threads or None)
    interpreter.allocate_tensors()
    first, last = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    held = [int(first["shape"][0])]

    def run(pixels):
        if len(pixels) != held[0]:
            interpreter.resize_tensor_input(first["index"], list(pixels.shape))
            interpreter.allocate_tensors()
            held[0] = len(pixels)
        interpreter.set_tensor(first["index"], pixels)
        interpreter.invoke()
        return interpreter.get_tensor(last["index"])

    return run, fixed(int(first["shape_signature"][0]))


def ncnn(path, threads):
    runtime = package("ncnn")
    net = runtime.Net()
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage", "vulkan_compute"):
        setattr(net.opt, f"use_{name}", False)
    if threads:
        net.opt.num_threads = threads
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise Fault(f"{path}: ncnn does not take it")

    def run(pixels):
        extractor = net.create_extractor()
        # A copy: ncnn lets each channel begin at a multiple of 16 bytes.
        extractor.input(net.input_names()[0], runtime.Mat(pixels[0]).clone())
        failed, answer = extractor.extract(net.output_names()[0])
        if failed:
            raise Fault("ncnn does not get to the end of the file")
        return numpy.array(answer).reshape(1, -1)

    return run, 1


# Each with the files that it reads, the first of which is opened; whatever else lies in the folder need not be here.
FORMATS = {
    "onnx": (onnx, ("model.onnx",)),
    "openvino": (openvino, ("model.xml", "model.bin")),
    "litert": (litert, ("model.tflite",)),
    "ncnn": (ncnn, ("model.param", "model.bin")),
}


def package(name, distribution=None):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:  # installed but broken: the real fault must show
            raise
        raise Fault(f"{name} is not installed. Run: pip install {distribution or name}", 4) from None


def fixed(size):
    return size if isinstance(size, int) and size > 0 else 0


class Model:
    """The artifact of a folder, opened.

    Attributes:
        classes: their names.    shape: (C, H, W) of the images that it takes.
        logits: its scores are no probabilities.
    """

    def __init__(self, folder, threads=0):
        try:
            record = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
            kind, said = record["format"], record["input"]
            digests = {one["path"]: one["sha256"] for one in record["files"]}
            self.classes, self.logits = record["classes"], record["outputs"] == "logits"
            shape, self.nhwc = said["shape"][1:], said["layout"] == "NHWC"
            self.shape = (shape[2], *shape[:2]) if self.nhwc else tuple(shape)
            (self.low, self.high), norm = said["range"], said["normalization"]
            crop = said["crop"]
        except OSError as error:
            raise Fault(f"{folder / 'artifact.json'}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(f"{folder / 'artifact.json'} is no description of an artifact ({error!r})") from None
        if kind not in FORMATS:
            raise Fault(f"{folder} is made for {kind}; this runner opens {', '.join(FORMATS)}")
        if crop is not None:
            raise Fault(f"{folder / 'artifact.json'} asks for a crop that this runner does not know: {crop!r}")
        inside = norm == "inside"
        self.mean, self.std = (None, None) if inside else (channels(norm["mean"]), channels(norm["std"]))
        opener, files = FORMATS[kind]
        for path in (folder / name for name in files):
            if not path.is_file():
                raise Fault(f"{path}: the file is missing")
            if hashlib.sha256(path.read_bytes()).hexdigest() != digests.get(path.name):
                raise Fault(f"{path} is not the file that was exported: artifact.json has another sha256")
        try:
            self.run, self.batch = opener(folder / files[0], threads)
        except Fault:
            raise
        except Exception as error:  # whatever a runtime raises: its classes have no common base but this
            raise Fault(f"{folder / files[0]}: its runtime does not take it ({line(error)})") from None
        self.turn = threading.Lock()

    def __call__(self, images):
        """(N, C, H, W) float32 in [0, 1] -> (N, K) float32 scores."""
        if images.shape[1:] != self.shape:
            raise Fault(f"it takes images of {self.shape}, not {images.shape[1:]} (channels, height, width)")
        pixels = images if (self.low, self.high) == (0, 1) else images * (self.high - self.low) + self.low
        if self.mean is not None:
            pixels = (pixels - self.mean) / self.std
        if self.nhwc:
            pixels = pixels.transpose(0, 2, 3, 1)
        pixels = numpy.ascontiguousarray(pixels, "<f4")
        step = self.batch or len(pixels)
        parts = []
        with self.turn:
            for start in range(0, len(pixels), max(step, 1)):
                part = pixels[start : start + step]
                # A file that takes one number of images gets its last batch filled up.
                full = part if len(part) == step else numpy.concatenate([part, part[-1:].repeat(step - len(part), 0)])
                parts.append(numpy.asarray(self.run(full), numpy.float32).reshape(step, -1)[: len(part)])
        return numpy.concatenate(parts) if parts else numpy.empty((0, len(self.classes)), numpy.float32)


def channels(values):
    return numpy.asarray(values, numpy.float32).reshape(-1, 1, 1)


def line(error):
    return next((one.strip() for one in str(error).splitlines()[::-1] if one.strip()), type(error).__name__)[:200]


def read(path, shape):
    """A picture as (1, C, H, W) float32 in [0, 1]: upright, its middle, resized as edgekit does it."""
    package("PIL", "pillow")
    from PIL import Image, ImageOps

    count, height, width = shape
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode == "F" or picture.mode.startswith("I"):  # pillow would cut off what is above 255
                raise Fault(f"{path}: only pictures with 8 bits a channel are read")
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Fault(f"{path} cannot be read ({line(error)})") from None
    picture = ImageOps.fit(picture if count == 3 else picture.convert("L"), (width, height), Image.Resampling.BICUBIC)
    pixels = numpy.asarray(picture, numpy.float32).reshape(height, width, count) / 255
    return pixels.transpose(2, 0, 1)[None]


def classify(model, path, most=5):
    """The most probable classes: [(name, probability)]."""
    scores = model(read(path, model.shape))[0].astype(numpy.float64)
    if model.logits:
        scores = numpy.exp(scores - scores.max())
        scores /= scores.sum()
    return [(model.classes[place], float(scores[place])) for place in numpy.argsort(-scores, kind="stable")[:most]]


# The judge's protocol, all little-endian: N, C, H, W as uint32 and the images as float32 in [0, 1], row by row; the
# answer is N, K as uint32 and the scores as float32.


def converse(model, reader, writer):
    """Answer requests until the other side closes."""
    while header := reader.read(16):  # buffered: it returns less at the end only
        shape = struct.unpack("<4I", whole(header, 16))
        size = 4 * math.prod(shape)
        if size > ANNOUNCED:
            raise Fault(f"a request announces {size:,} bytes of images; at most {ANNOUNCED:,} are taken")
        if size:
            scores = model(numpy.frombuffer(whole(reader.read(size), size), "<f4").reshape(shape))
        else:
            scores = numpy.empty((shape[0], len(model.classes)), numpy.float32)
        writer.write(struct.pack("<2I", *scores.shape) + numpy.ascontiguousarray(scores, "<f4").tobytes())
        writer.flush()


def whole(data, count):
    if len(data) < count:
        raise Fault(f"a request is cut short ({len(data):,} of {count:,} bytes)")
    return data


def serve(model, address):
    """Answer on a TCP port, loopback's where no host is named; each connection in a thread, one batch at a time."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535:
        raise Fault(f"--serve {address}: write PORT or HOST:PORT")

    class Conversation(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self):
            try:
                converse(model, self.rfile, self.connection.makefile("wb"))
            except ConnectionError:
                pass
            except Exception as error:  # a runtime's error ends this conversation, not the server
                print(f"{self.client_address[0]}: {line(error)}", file=sys.stderr, flush=True)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        address_family = socketserver.socket.AF_INET6 if ":" in host else socketserver.socket.AF_INET

    try:
        server = Server((host, int(port)), Conversation)
    except OSError as error:
        raise Fault(f"--serve {address}: cannot listen there ({error.strerror})", 4) from None
    with server:
        print(f"tcp://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}", flush=True)
        server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="the folder with artifact.json")
    parser.add_argument("images", nargs="*", type=Path, help="to classify; with none it is a judge")
    parser.add_argument("--serve", metavar="[HOST:]PORT", help="0 takes a free port; the address is printed")
    parser.add_argument("--threads", type=int, default=0, help="of one inference; by default the runtime's own choice")
    arguments = parser.parse_args()
    if arguments.images and arguments.serve:
        parser.error("images, or --serve: one of them")
    # What a runtime prints must not get among the scores.
    answers = os.fdopen(os.dup(1), "wb")
    if not arguments.images and not arguments.serve:
        if sys.stdin.isatty():
            parser.error("name an image, or --serve PORT; without both it is a judge on stdin and stdout")
        os.dup2(2, 1)
    try:
        model = Model(arguments.artifact, arguments.threads)
        for path in arguments.images:
            for name, probability in classify(model, path):
                # A class may be called anything: what would move the terminal's cursor is shown as its number.
                print(f"{path}\t{probability:.6f}\t{''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)}")
        if arguments.serve:
            serve(model, arguments.serve)
        elif not arguments.images:
            converse(model, sys.stdin.buffer, answers)
    except Fault as fault:
        print(fault, file=sys.stderr)
        sys.exit(fault.status)
    except BrokenPipeError:
        os._exit(0)  # the other side went away
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
