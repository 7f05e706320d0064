// Server process of the tests.

import { spawn } from "node:child_process";
import { join, resolve } from "node:path";

const dist = resolve(import.meta.dirname, "../../dist");

/** Path of the program under test. */
export const program = join(dist, "batchwright");

/** Creates a project on a server that other tests use at the same time; returns it like `serve`. */
async function share(url) {
  const ask = async (path, body) => {
    const headers = {
      authorization: `Bearer ${process.env.TEST_ADMIN_KEY}`,
      "content-type": "application/json",
    };
    const address = `${url}/v1/organization/projects${path}`;
    const answer = await fetch(address, { method: "POST", headers, body: JSON.stringify(body) });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const project = await ask("", { name: `test ${crypto.randomUUID()}` });
  const account = await ask(`/${project.id}/service_accounts`, { name: "tests" });
  return { baseURL: `${url}/v1`, apiKey: account.api_key.value, kill: () => {} };
}

/** Starts a server on a data folder; returns its base URL, a key and a function that kills it. */
export async function serve(data) {
  const shared = process.env.TEST_SERVER_URL;
  if (shared) return share(shared);
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
  return { baseURL, apiKey: "none", kill: () => server.kill("SIGKILL") };
}
