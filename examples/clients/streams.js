#!/usr/bin/env node
// Runs a command through errand-boy's framed protocol, its standard streams as frames.
//
//     node streams.js SOCKET COMMAND [ARGUMENT ...]
//
// It has this process's input and output, environment, working directory and umask; Ctrl-C and SIGTERM
// reach it. From a program: const connection = await Connection.open(path), then, as often as wanted but
// one after the other, await connection.run(["sort"], { input, stdout, stderr }).

"use strict";

const net = require("node:net");
const os = require("node:os");
const { once } = require("node:events");
const { getSystemErrorName } = require("node:util");

const VERSION = 1;
const WINDOW = 64 << 10; // bytes of input before the first CREDIT

const HELLO = 1, SPAWN = 3, SIGNAL = 4, STDIN = 10;
const SPAWNED = 16, FAILED = 17, EXITED = 18, REFUSED = 19, STDOUT = 20, STDERR = 21, CREDIT = 22;

const EXECUTABLES = 1, ARGV = 2, ENV = 3, CWD = 6, UMASK = 7, PGROUP = 11, STREAMS = 18;

function u32(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function i32(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeInt32LE(value);
  return bytes;
}

function frame(kind, payload = Buffer.alloc(0)) {
  return Buffer.concat([u32(payload.length), Buffer.from([kind]), payload]);
}

function option(tag, value) {
  return Buffer.concat([Buffer.from([tag]), u32(value.length), value]);
}

function strings(tag, list) {
  for (const string of list) if (string.includes("\0")) throw new TypeError("a string holds a NUL");
  return option(tag, Buffer.concat([u32(list.length), ...list.map((s) => Buffer.from(s + "\0"))]));
}

// Where a command may be, as execvp(3) looks for it.
function candidates(command, path) {
  if (command.includes("/")) return [command];
  return path.split(":").map((directory) => (directory || ".") + "/" + command);
}

async function* readFrames(socket) {
  let buffer = Buffer.alloc(0);
  for await (const chunk of socket) {
    buffer = Buffer.concat([buffer, chunk]);
    while (buffer.length >= 5 && buffer.length >= 5 + buffer.readUInt32LE()) {
      const end = 5 + buffer.readUInt32LE();
      yield { kind: buffer[4], payload: buffer.subarray(5, end) };
      buffer = buffer.subarray(end);
    }
  }
}

class Connection {
  static async open(path) {
    const connection = new Connection();
    connection.socket = net.connect({ path });
    await once(connection.socket, "connect");
    // Nobody may be listening for it when it comes; whoever reads next is told all the same.
    connection.socket.on("error", () => {});
    connection.frames = readFrames(connection.socket);
    connection.socket.write(Buffer.concat([Buffer.from([0]), frame(HELLO, u32(VERSION))]));
    const { kind, payload } = await connection.next();
    if (kind !== HELLO || payload.readUInt32LE() !== VERSION)
      throw new Error(`this client speaks version ${VERSION} of the protocol, the helper does not`);
    return connection;
  }

  close() {
    this.socket.destroy();
  }

  async next() {
    const { value, done } = await this.frames.next();
    if (done) throw new Error("the helper has gone; the command may have been run");
    if (value.kind === REFUSED) throw new Error(`refused: ${value.payload}`);
    return value;
  }

  signal(number) {
    // The process group of the live command, if there is one.
    if (this.pid) this.socket.write(frame(SIGNAL, Buffer.concat([i32(-this.pid), i32(number)])));
  }

  // `input` is a Readable or an iterable of Buffers; `stdout` and `stderr` are Writables. Resolves to
  // the return code, negative for a signal, when the command has ended and all its output has come.
  async run(argv, { input = [], stdout, stderr, env = process.env, cwd = process.cwd() }) {
    const executables = candidates(argv[0], env.PATH ?? "/bin:/usr/bin");
    const options = [
      strings(EXECUTABLES, executables),
      strings(ARGV, argv),
      strings(ENV, Object.entries(env).map(([name, value]) => `${name}=${value}`)),
      option(CWD, Buffer.from(cwd + "\0")),
      option(UMASK, u32(process.umask())),
      option(PGROUP, i32(0)),
      option(STREAMS, Buffer.from([7])),
    ];
    this.socket.write(frame(SPAWN, Buffer.concat(options)));
    const outcome = await this.next();
    if (outcome.kind === FAILED) {
      const name = getSystemErrorName(-outcome.payload.readInt32LE(4));
      const error = new Error(`cannot start ${argv[0]}: ${name}`);
      throw Object.assign(error, { code: name, stage: outcome.payload[8] });
    }
    if (outcome.kind !== SPAWNED) throw new Error(`frame ${outcome.kind} in answer to SPAWN`);
    this.pid = outcome.payload.readInt32LE(0);

    const feeder = new Feeder(this.socket, input);
    const awaited = new Set([STDOUT, STDERR, EXITED]);
    let code = null;
    feeder.feed().catch(() => this.close());
    while (awaited.size > 0) {
      const { kind, payload } = await this.next();
      if (kind === CREDIT) {
        feeder.addCredit(payload.readUInt32LE());
      } else if (kind === EXITED) {
        const status = payload.readInt32LE(0);
        code = status & 0x7f ? -(status & 0x7f) : (status >> 8) & 0xff;
        this.pid = null;
        feeder.stop();
        awaited.delete(kind);
      } else if (payload.length === 0) {
        awaited.delete(kind);
      } else {
        const sink = kind === STDOUT ? stdout : stderr;
        // Not read on meanwhile: that is what holds up the command, and only it.
        if (!sink.write(payload)) await once(sink, "drain");
      }
    }
    return code;
  }
}

// Sends the input, as much as the helper has given credit for.
class Feeder {
  constructor(socket, input) {
    this.socket = socket;
    this.input = input;
    this.credit = WINDOW;
    this.stopped = false;
    this.wake = () => {};
  }

  addCredit(size) {
    this.credit += size;
    this.wake();
  }

  stop() {
    this.stopped = true;
    this.wake();
  }

  async feed() {
    for await (let chunk of this.input) {
      while (chunk.length > 0 && !this.stopped) {
        if (this.credit === 0) {
          await new Promise((resolve) => (this.wake = resolve));
          continue;
        }
        const size = Math.min(this.credit, chunk.length, WINDOW);
        this.credit -= size;
        this.socket.write(frame(STDIN, chunk.subarray(0, size)));
        chunk = chunk.subarray(size);
      }
      if (this.stopped) return;
    }
    if (!this.stopped) this.socket.write(frame(STDIN));
  }
}

async function main(path, argv) {
  const connection = await Connection.open(path);
  for (const name of ["SIGINT", "SIGTERM"])
    process.on(name, () => connection.signal(os.constants.signals[name]));
  const { stdin, stdout, stderr } = process;
  const code = await connection.run(argv, { input: stdin, stdout, stderr });
  connection.close();
  process.exitCode = code < 0 ? 128 - code : code;
  stdin.destroy(); // it may still be open, and would keep us
}

module.exports = { Connection };

if (require.main === module) {
  const [path, ...argv] = process.argv.slice(2);
  if (argv.length === 0) {
    console.error("usage: node streams.js SOCKET COMMAND [ARGUMENT ...]");
    process.exit(2);
  }
  main(path, argv).catch((error) => {
    console.error(`streams.js: ${error.message}`);
    process.exit(error.stage ? 127 : 125);
  });
}
