#!/usr/bin/env node
// Runs a shell command line through errand-boy's text protocol.
//
//     node text.js SOCKET 'COMMAND LINE' < input
//
// Or, from a program: const { stdout, stderr, code } = await run(path, line, input)

"use strict";

const net = require("node:net");

const END = "\r\n\r\n";

// Resolves to the output and the errors, both Buffers, and the return code, negative for a signal.
function run(path, line, input = Buffer.alloc(0)) {
  return new Promise((resolve, reject) => {
    const head = Buffer.from(line + END);
    const body = Buffer.concat([Buffer.from(input), Buffer.from(END)]);
    // What ends in CR LF would end two bytes too early: the daemon takes the first end that comes.
    if (head.indexOf(END) !== head.length - 4 || body.indexOf(END) !== body.length - 4) {
      reject(new Error("the text protocol carries nothing that holds CR LF CR LF or ends in CR LF"));
      return;
    }
    const chunks = [];
    const socket = net.connect({ path });
    socket.on("error", reject);
    socket.on("data", (chunk) => chunks.push(chunk));
    socket.on("close", () => {
      const answer = split(Buffer.concat(chunks));
      if (answer === null) reject(new Error("the daemon has closed the connection early"));
      else resolve(answer);
    });
    socket.write(Buffer.concat([head, body]));
  });
}

function split(answer) {
  const last = answer.length - END.length;
  const end = answer.lastIndexOf(END, last - 1);
  const errors = answer.lastIndexOf("\r\n1:", end);
  if (!answer.subarray(0, 4).equals(Buffer.from("\r\n0:")) || errors < 0 || end < errors) return null;
  return {
    stdout: answer.subarray(4, errors),
    stderr: answer.subarray(errors + 4, end),
    code: Number(answer.subarray(end + END.length, last)),
  };
}

async function main(path, line) {
  const chunks = [];
  if (!process.stdin.isTTY) for await (const chunk of process.stdin) chunks.push(chunk);
  const { stdout, stderr, code } = await run(path, line, Buffer.concat(chunks));
  process.exitCode = code < 0 ? 128 - code : code;
  process.stdout.write(stdout);
  process.stderr.write(stderr);
}

module.exports = { run };

if (require.main === module) {
  if (process.argv.length !== 4) {
    console.error("usage: node text.js SOCKET 'COMMAND LINE'");
    process.exit(2);
  }
  main(...process.argv.slice(2)).catch((error) => {
    console.error(`text.js: ${error.message}`);
    process.exitCode = 125;
  });
}
