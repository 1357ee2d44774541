// OpenAI's client for JavaScript, as a program of a user would use it. Run with `node --test`.
"use strict";

const { test } = require("node:test");
const assert = require("node:assert/strict");
const { OpenAI } = require("openai");

const VOICES = ["pirate-lora", "shout-rslora", "poet-dora", "news-vera", "robot-ia3"];
const KEY = "sesame-open";
const ASK = {
  messages: [{ role: "user", content: "Tell me about the baker." }],
  max_completion_tokens: 24,
  temperature: 0,
};
const STORY = { model: "base", prompt: "Once upon a time", max_tokens: 12, temperature: 0 };
const SMALL_URL = process.env.GRAFT_TEST_SMALL_URL;

const options = { apiKey: "none", maxRetries: 0, timeout: 240_000 };
const client = new OpenAI({ ...options, baseURL: `${process.env.GRAFT_TEST_URL}/v1` });
const small = new OpenAI({ ...options, baseURL: `${SMALL_URL}/v1`, apiKey: KEY });

const content = async (fields, on = client) =>
  (await on.chat.completions.create({ ...ASK, ...fields })).choices[0].message.content;

/** The sum of a metric's samples that contain all the words. */
async function metric(name, ...words) {
  const answer = await fetch(`${SMALL_URL}/metrics`, { headers: { authorization: `Bearer ${KEY}` } });
  const lines = (await answer.text()).split("\n");
  const samples = lines.filter((line) => line.startsWith(name) && words.every((word) => line.includes(word)));
  return samples.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

/** Wait for something that the server does. The limit is for a server that hangs, not for one that is slow. */
async function eventually(isTrue) {
  const deadline = Date.now() + 240_000;
  while (!(await isTrue())) {
    assert.ok(Date.now() < deadline, "it did not happen");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

test("models are the base and the adapters", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  for (const name of ["base", ...VOICES]) assert.ok(ids.includes(name), name);
  assert.equal((await client.models.retrieve("poet-dora")).id, "poet-dora");
});

test("an adapter is chosen by model or by a field of its own", async () => {
  const byModel = await Promise.all(VOICES.map((voice) => content({ model: voice })));
  const byField = await Promise.all(VOICES.map((voice) => content({ model: "base", adapter: voice })));
  assert.deepEqual(byField, byModel);
  assert.equal(new Set([await content({ model: "base" }), ...byModel]).size, 1 + VOICES.length);
});

test("a stream says what the whole answer says", async () => {
  const stream = await client.chat.completions.create({
    ...ASK, model: "base", stream: true, stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, await content({ model: "base" }));
  assert.equal(usage.completion_tokens, 24);
});

test("the stream helper puts the answer together", async () => {
  const request = { ...ASK, model: "base", stop: ["."] };
  const deltas = [];
  const runner = client.chat.completions.stream(request).on("content", (delta) => deltas.push(delta));
  const whole = await content({ model: "base", stop: ["."] });
  assert.equal(await runner.finalContent(), whole);
  assert.equal(deltas.join(""), whole);
});

test("log-probabilities of chat", async () => {
  const answer = await client.chat.completions.create({ ...ASK, model: "base", logprobs: true, top_logprobs: 2 });
  const entries = answer.choices[0].logprobs.content;
  assert.equal(entries.length, 24);
  for (const entry of entries) assert.equal(entry.logprob, entry.top_logprobs[0].logprob);
});

test("a completion whole, streamed and scored", async () => {
  const whole = (await client.completions.create(STORY)).choices[0].text;
  let text = "";
  for await (const chunk of await client.completions.create({ ...STORY, stream: true })) text += chunk.choices[0].text;
  assert.equal(text, whole);
  const scored = await client.completions.create({ ...STORY, max_tokens: 0, echo: true, logprobs: 1 });
  assert.equal(scored.choices[0].text, STORY.prompt);
  assert.equal(scored.choices[0].logprobs.token_logprobs.length, scored.usage.prompt_tokens);
});

const VILLAGER = {
  type: "object",
  properties: { name: { enum: ["Mara", "Tobias"] }, is_kind: { type: "boolean" } },
  required: ["name", "is_kind"],
  additionalProperties: false,
};

test("a structured answer follows its schema", async () => {
  const format = { type: "json_schema", json_schema: { name: "villager", schema: VILLAGER, strict: true } };
  const request = { ...ASK, model: "pirate-lora", max_completion_tokens: 120, response_format: format };
  const answer = await client.chat.completions.parse(request);
  assert.deepEqual(Object.keys(answer.choices[0].message.parsed), ["name", "is_kind"]);
});

test("a tool is called, whole and streamed, and its result goes back", async () => {
  const tools = [{ type: "function", function: { name: "find", parameters: VILLAGER, strict: true } }];
  const request = {
    ...ASK, model: "base", max_completion_tokens: 120, tools, tool_choice: "required", parallel_tool_calls: false,
  };
  const { message } = (await client.chat.completions.create(request)).choices[0];
  const [call] = message.tool_calls;
  assert.equal(call.function.name, "find");
  const streamed = await client.chat.completions.stream(request).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  const messages = [...ASK.messages, message, { role: "tool", tool_call_id: call.id, content: "She bakes." }];
  assert.ok(await content({ model: "base", tools, tool_choice: "none", messages }));
});

test("a raw answer has its headers", async () => {
  const request = client.chat.completions.create({ ...ASK, model: "base" }, { headers: { "x-request-id": "the-one" } });
  const { data, response, request_id: id } = await request.withResponse();
  assert.equal(response.headers.get("x-request-id"), "the-one");
  assert.equal(id, "the-one");
  assert.equal(data._request_id, "the-one");
});

test("errors have the client's classes and name the field", async () => {
  await assert.rejects(content({ model: "nobody" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.deepEqual([error.param, error.code], ["model", "model_not_found"]);
    return Boolean(error.requestID);
  });
  await assert.rejects(content({ model: "base", top_p: 7 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    return error.param === "top_p";
  });
  await assert.rejects(content({ model: "base" }, small.withOptions({ apiKey: "wrong" })), OpenAI.AuthenticationError);
});

test("leaving a stream ends it on the server", async () => {
  const stream = await small.completions.create({ ...STORY, max_tokens: 900, ignore_eos: true, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    break; // which aborts the request
  }
  await eventually(async () => (await metric("graft_sequences_running")) === 0);
});

test("a full server's refusal is sent again until there is room", async () => {
  const refused = () => metric("graft_requests_total", "chat/completions", 'status="503"');
  const long = { ...STORY, max_tokens: 900, ignore_eos: true, n: 64, stream: true };
  const crowd = await small.completions.create(long);
  const before = await refused();
  await assert.rejects(content({ model: "base", n: 2 }, small), (error) => {
    assert.ok(error instanceof OpenAI.InternalServerError);
    assert.equal(error.status, 503);
    return Number(error.headers.get("retry-after")) >= 1;
  });
  const asked = content({ model: "base", n: 2 }, small.withOptions({ maxRetries: 100 }));
  await eventually(async () => (await refused()) > before + 1);
  crowd.controller.abort();
  assert.ok(await asked);
});
