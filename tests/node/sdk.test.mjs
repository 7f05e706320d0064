// Official Node SDK against a real server: batches, lists, errors, idempotency, cancellation.

import assert from "node:assert/strict";
import { createReadStream, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import OpenAI, { BadRequestError, ConflictError, NotFoundError, toFile } from "openai";
import { serve } from "./server.mjs";

const folder = mkdtempSync(join(tmpdir(), "batchwright-"));
let server, client;

before(async () => {
  server = await serve(join(folder, "data"));
  client = new OpenAI({ baseURL: server.baseURL, apiKey: server.apiKey, maxRetries: 0 });
});

after(() => {
  server.kill();
  rmSync(folder, { recursive: true });
});

const line = (customId, content, more = {}) =>
  JSON.stringify({
    custom_id: customId,
    method: "POST",
    url: "/v1/chat/completions",
    body: { model: "echo", messages: [{ role: "user", content }], ...more },
  });

async function ended(id) {
  for (let look = 0; look < 1500; look++) {
    const batch = await client.batches.retrieve(id);
    if (["completed", "failed", "cancelled", "expired"].includes(batch.status)) return batch;
    await pause(20);
  }
  throw new Error(`timed out waiting for the end of ${id}`);
}

async function upload(content) {
  const file = await toFile(Buffer.from(content), "in.jsonl");
  return client.files.create({ file, purpose: "batch" });
}

async function run(lines) {
  const file = await upload(lines.join("\n"));
  const batch = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
  });
  return ended(batch.id);
}

test("batch runs from a file on the disk to its results", async () => {
  const path = join(folder, "prompts.jsonl");
  const lines = [line("a", "eins"), line("b", "zwölf"), line("c", "x", { n: 99 })];
  writeFileSync(path, lines.join("\r\n"));
  const file = await client.files.create({ file: createReadStream(path), purpose: "batch" });
  assert.equal(file.filename, "prompts.jsonl");
  const created = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
    metadata: { team: "research" },
  });
  const batch = await ended(created.id);
  assert.equal(batch.status, "completed");
  assert.deepEqual(batch.request_counts, { total: 3, completed: 2, failed: 1 });
  assert.deepEqual(batch.metadata, { team: "research" });
  const content = await (await client.files.content(batch.output_file_id)).text();
  assert.ok(content.endsWith("\n"));
  const answers = content
    .trimEnd()
    .split("\n")
    .map((text) => JSON.parse(text));
  assert.deepEqual(answers.map((answer) => answer.custom_id), ["a", "b"]);
  assert.equal(answers[1].response.body.choices[0].message.content, "zwölf");
  const errorContent = await (await client.files.content(batch.error_file_id)).text();
  const errors = errorContent.trimEnd().split("\n");
  assert.equal(JSON.parse(errors[0]).response.status_code, 400);
});

test("rejected file lists its errors, and calls raise the SDK error classes", async () => {
  const batch = await run(["nonsense", line("a", "x", { model: "nobody" })]);
  assert.equal(batch.status, "failed");
  assert.deepEqual(
    batch.errors.data.map((error) => [error.line, error.code]),
    [[1, "invalid_json_line"], [2, "model_not_found"]],
  );
  await assert.rejects(client.batches.retrieve("batch_x"), NotFoundError);
  await assert.rejects(client.batches.cancel(batch.id), ConflictError);
  await assert.rejects(
    client.batches.create({
      input_file_id: "file-x",
      endpoint: "/v1/nothing",
      completion_window: "24h",
    }),
    (error) =>
      error instanceof BadRequestError &&
      error.param === "endpoint" &&
      error.code === "invalid_value",
  );
});

test("lists are paged automatically", async () => {
  const made = [];
  for (let number = 0; number < 5; number++) {
    made.unshift((await run([line(String(number), "x")])).id);
  }
  const listed = [];
  for await (const batch of client.batches.list({ limit: 2 })) listed.push(batch.id);
  assert.deepEqual(listed.slice(0, 5), made);
  const purposes = new Set();
  for await (const file of client.files.list({ limit: 2 })) purposes.add(file.purpose);
  assert.deepEqual([...purposes].sort(), ["batch", "batch_output"]);
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  assert.ok(models.includes("echo"));
});

test("idempotency key creates one batch", async () => {
  const file = await upload(line("a", "x"));
  const create = (metadata) =>
    client.batches.create(
      {
        input_file_id: file.id,
        endpoint: "/v1/chat/completions",
        completion_window: "24h",
        metadata,
      },
      { headers: { "Idempotency-Key": "nightly-2026-11-22" } },
    );
  const made = await Promise.all(Array.from({ length: 20 }, () => create({ run: "1" })));
  assert.equal(new Set(made.map((batch) => batch.id)).size, 1);
  await assert.rejects(
    create({ run: "2" }),
    (error) => error instanceof ConflictError && /conflict/i.test(error.message),
  );
});

test("cancelled batch lists every request in one of its files", async () => {
  const ids = Array.from({ length: 20_000 }, (_, number) => String(number));
  const file = await upload(ids.map((id) => line(id, "x")).join("\n"));
  const created = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
  });
  for (let status = created.status; status === "validating"; ) {
    status = (await client.batches.retrieve(created.id)).status;
  }
  assert.ok(["cancelling", "cancelled"].includes((await client.batches.cancel(created.id)).status));
  assert.ok(["cancelling", "cancelled"].includes((await client.batches.cancel(created.id)).status));
  const batch = await ended(created.id);
  assert.equal(batch.status, "cancelled");
  const found = [];
  for (const id of [batch.output_file_id, batch.error_file_id].filter(Boolean)) {
    const text = await (await client.files.content(id)).text();
    found.push(...text.trimEnd().split("\n").map((answer) => JSON.parse(answer).custom_id));
  }
  assert.deepEqual(found.sort(), ids.sort());
});

test("refusals raise the SDK error classes and are not retried", async () => {
  let requests = 0;
  const counting = (...request) => {
    requests += 1;
    return fetch(...request);
  };
  const retrying = client.withOptions({ maxRetries: 3, fetch: counting });
  const batch = await run([line("a", "x")]);
  await assert.rejects(retrying.batches.cancel(batch.id), ConflictError);
  assert.equal(requests, 1);
  await assert.rejects(retrying.files.retrieve("file-x"), NotFoundError);
  await assert.rejects(
    retrying.files.del?.("file-x") ?? retrying.files.delete("file-x"),
    NotFoundError,
  );
  await assert.rejects(
    retrying.models.retrieve("some/body"),
    (error) => error.code === "model_not_found",
  );
  await assert.rejects(retrying.batches.list({ after: "batch_x" }), BadRequestError);
  const empty = await toFile(Buffer.alloc(0), "in.jsonl");
  await assert.rejects(
    retrying.files.create({ file: empty, purpose: "batch" }),
    (error) => error instanceof BadRequestError && error.code === "empty_file",
  );
  await assert.rejects(
    retrying.get("/nothing"),
    (error) => error instanceof NotFoundError && error.type === "invalid_request_error",
  );
});
