// Administration client of the official Node SDK: a project, its keys and its end.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import OpenAI, { AuthenticationError, PermissionDeniedError, toFile } from "openai";
import { program, serve } from "./server.mjs";

const folder = mkdtempSync(join(tmpdir(), "batchwright-"));
let server, admin;

before(async () => {
  const data = join(folder, "data");
  const create = ["admin", "key", "create", "--data", data, "--name", "ops"];
  const stdio = ["ignore", "pipe", "ignore"];
  const adminAPIKey = execFileSync(program, create, { stdio }).toString().trim();
  server = await serve(data);
  const options = { baseURL: server.baseURL, apiKey: "none", adminAPIKey, maxRetries: 0 };
  admin = new OpenAI(options).admin.organization;
});

after(() => {
  server.kill();
  rmSync(folder, { recursive: true });
});

const withKey = (apiKey) => new OpenAI({ baseURL: server.baseURL, apiKey, maxRetries: 0 });

test("project, service account and key are created, used, revoked and archived", async () => {
  const project = await admin.projects.create({ name: "Acme" });
  assert.equal(project.status, "active");
  const account = await admin.projects.serviceAccounts.create(project.id, { name: "nightly" });
  const client = withKey(account.api_key.value);
  const limits = { project_id: project.id, max_requests_per_1_minute: 600 };
  const limit = await admin.projects.rateLimits.updateRateLimit("rl-echo", limits);
  assert.equal(limit.max_requests_per_1_minute, 600);
  const budget = { currency: "USD", interval: "month", threshold_amount: 100 };
  const spend = await admin.projects.spendLimit.update(project.id, budget);
  assert.equal(spend.enforcement.status, "inactive");

  const body = { model: "echo", messages: [{ role: "user", content: "hi" }] };
  const request = { custom_id: "1", method: "POST", url: "/v1/chat/completions", body };
  const file = await client.files.create({
    file: await toFile(Buffer.from(JSON.stringify(request)), "in.jsonl"),
    purpose: "batch",
  });
  let batch = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
  });
  for (let look = 0; look < 1500 && batch.status !== "completed"; look++) {
    await pause(20);
    batch = await client.batches.retrieve(batch.id);
  }
  assert.equal(batch.status, "completed");

  const since = { start_time: Math.floor(Date.now() / 1000) - 86400, project_ids: [project.id] };
  const usage = await admin.usage.completions({ ...since, group_by: ["api_key_id", "model"] });
  const used = usage.data.flatMap((bucket) => bucket.results);
  assert.equal(used.length, 1);
  assert.equal(used[0].num_model_requests, 1);
  assert.equal(used[0].api_key_id, account.api_key.id);
  assert.equal(used[0].model, "echo");
  const costs = await admin.usage.costs(since);
  const spent = costs.data.flatMap((bucket) => bucket.results);
  assert.equal(spent[0].amount.currency, "usd");
  assert.equal(spent[0].unpriced_requests, 1);

  const keys = [];
  for await (const key of admin.projects.apiKeys.list(project.id)) keys.push(key);
  assert.equal(keys.length, 1);
  assert.equal(keys[0].owner.service_account.name, "nightly");
  const rule = { mode: "deny_list", model_ids: ["echo"] };
  await admin.projects.modelPermissions.update(project.id, rule);
  assert.deepEqual((await client.models.list()).data, []);

  await admin.projects.apiKeys.delete(keys[0].id, { project_id: project.id });
  await assert.rejects(client.batches.list(), AuthenticationError);
  assert.equal((await admin.projects.archive(project.id)).status, "archived");
  const events = [];
  for await (const entry of admin.auditLogs.list({ limit: 3 })) events.push(entry.type);
  assert.equal(events[0], "project.archived");
  assert.ok(events.includes("api_key.created"));
});

test("key of a project administers nothing", async () => {
  const project = await admin.projects.create({ name: "Globex" });
  const account = await admin.projects.serviceAccounts.create(project.id, { name: "x" });
  const options = { baseURL: server.baseURL, apiKey: "none", maxRetries: 0 };
  const intruder = new OpenAI({ ...options, adminAPIKey: account.api_key.value });
  await assert.rejects(intruder.admin.organization.projects.list(), PermissionDeniedError);
});
