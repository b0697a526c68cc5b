"""A judge that misbehaves as its first argument says. It knows the protocol from CLI.md, not from edgekit."""

import os
import signal
import struct
import sys
import time


def read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            sys.exit(0)
        data += more
    return data


def write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def reply(rows: int, classes: int, value: float = 0.5) -> bytes:
    return struct.pack("<2I", rows, classes) + struct.pack("<f", value) * (rows * classes)


def words(text: str) -> None:
    os.write(2, text.encode())


how, turn = sys.argv[1], 0
if how == "closes":
    sys.exit(0)
if how == "deaf":
    time.sleep(60)
if how == "unasked":
    write(b"!")
while True:
    count, channels, height, width = struct.unpack("<4I", read(16))
    if how == "eager":  # a long answer before it reads: two writers that wait for each other would stand still
        write(reply(count, 5000))
        read(4 * count * channels * height * width)
        continue
    read(4 * count * channels * height * width)
    turn += 1
    if how == "honest":
        write(reply(count, 3))
    elif how == "rows":
        write(reply(count + 1, 3))
    elif how == "transposed":
        write(struct.pack("<2I", 3, count) + bytes(12 * count))
    elif how == "changes":
        write(reply(count, 2 + turn))
    elif how == "nothing":
        write(reply(count, 0))
    elif how == "endless":
        write(struct.pack("<2I", count, 2**32 - 1))
    elif how in ("nan", "inf", "-inf"):
        write(reply(count - 1, 3)[8:].join([struct.pack("<2I", count, 3), struct.pack("<3f", 0, float(how), 0)]))
    elif how == "more":
        write(reply(count, 3) + b"?")
    elif how == "later":
        write(reply(count, 3))
        time.sleep(0.05)
        write(b"four")
    elif how == "short":
        write(reply(count, 3)[:20])
        sys.exit(3)
    elif how == "once":
        write(reply(count, 3))
        sys.exit(0)
    elif how == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "hostile":
        words("the first line\n\x1b[2J\x1b]0;title\x07\u202eevil\u2066 100 % robust" + 500 * "!" + "\n \n")
        sys.exit(9)
    elif how == "mute":
        os.close(1)
        time.sleep(60)
    elif how == "slow":
        time.sleep(60)
    elif how == "trickles":
        for byte in reply(count, 3):
            write(bytes([byte]))
            time.sleep(0.04)
    elif how == "noisy":
        while True:
            words("noise " * 1000)
    elif how == "parent":
        if os.fork():
            os.wait()
        time.sleep(60)
