// Server process of the tests.

import { spawn } from "node:child_process";
import { join, resolve } from "node:path";

const dist = resolve(import.meta.dirname, "../../dist");

/** Path of the program under test. */
export const program = join(dist, "batchwright");

/** Starts a server on a data folder; returns its base URL and a function that kills it. */
export async function serve(data) {
  const arguments_ = ["serve", "--listen", "127.0.0.1:0"];
  arguments_.push("--data", data, "--plugins", join(dist, "plugins"));
  const server = spawn(program, arguments_, { stdio: ["ignore", "pipe", "ignore"] });
  const [line] = await Promise.race([
    new Promise((listening) => {
      server.stdout.once("data", (data) => listening(String(data).split("\n")));
    }),
    new Promise((_, failed) => {
      server.once("exit", (code) => failed(new Error(`the server exited with code ${code}`)));
    }),
  ]);
  const baseURL = `${line.replace("listening on ", "")}/v1`;
  return { baseURL, kill: () => server.kill("SIGKILL") };
}
