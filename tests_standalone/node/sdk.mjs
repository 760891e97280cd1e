// The official Node SDK, as its users write it. `node sdk.mjs COMMAND [MODEL...]` prints one line of JSON: what the SDK
// handed out. BASE_URL and API_KEY say where to. The models are the names of scripts in support/upstream_scripts.py.

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: process.env.PROMPT ?? "Say hello to Ann" }];
const PIXEL =
  "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather somewhere.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const commands = {
  async models() {
    const listed = [];
    for await (const model of client.models.list()) listed.push(model);
    const first = await client.models.retrieve(listed[0].id);
    return { ids: listed.map((model) => model.id), first };
  },

  async chat(model = "answer") {
    const { data, response, request_id } = await client.chat.completions.create({ model, messages }).withResponse();
    return { completion: data, request_id, status: response.status };
  },

  stream: (model = "answer") => streamed({ model, messages }),

  "stream-usage": (model = "answer") => streamed({ model, messages, stream_options: { include_usage: true } }),

  async tools(model = "tools") {
    const completion = await client.chat.completions.create({ model, messages, tools: [weather] });
    const calls = completion.choices[0].message.tool_calls;
    const results = calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "sunny" }));
    const turns = [...messages, completion.choices[0].message, ...results];
    const second = await client.chat.completions.create({ model, messages: turns, tools: [weather] });
    return { calls, finish_reason: completion.choices[0].finish_reason, answer: second.choices[0].message.content };
  },

  async "tools-stream"(model = "tools") {
    const events = [];
    const stream = client.chat.completions.stream({ model, messages, tools: [weather] });
    stream.on("tool_calls.function.arguments.done", ({ name, arguments: text }) => events.push({ name, text }));
    const completion = await stream.finalChatCompletion();
    const { message, finish_reason } = completion.choices[0];
    return { calls: message.tool_calls, finish_reason, events };
  },

  async image(model = "answer") {
    const content = [
      { type: "text", text: "What is this?" },
      { type: "image_url", image_url: { url: PIXEL, detail: "low" } },
    ];
    const completion = await client.chat.completions.create({ model, messages: [{ role: "user", content }] });
    return { content: completion.choices[0].message.content };
  },

  async choices(model = "answer") {
    const { choices } = await client.chat.completions.create({ model, messages, n: 2 });
    const streamed = await client.chat.completions.stream({ model, messages, n: 2 }).finalChatCompletion();
    return { whole: choices.map(contentOf), streamed: streamed.choices.map(contentOf) };
  },

  async logprobs(model = "answer") {
    const { choices } = await client.chat.completions.create({ model, messages, logprobs: true, top_logprobs: 2 });
    return { content: choices[0].logprobs.content };
  },

  async parse(model = "answer") {
    const Person = z.object({ name: z.string(), age: z.number(), tags: z.array(z.string()) });
    const response_format = zodResponseFormat(Person, "person");
    const completion = await client.chat.completions.parse({ model, messages, response_format });
    return { parsed: completion.choices[0].message.parsed };
  },

  async errors(...models) {
    const seen = {};
    for (const model of models) seen[model] = await errorOf(client.chat.completions.create({ model, messages }));
    return seen;
  },

  // An error after the first chunk.
  async "stream-error"(model = "error-mid-stream") {
    const contents = [];
    const reading = (async () => {
      const stream = await client.chat.completions.create({ model, messages, stream: true });
      for await (const chunk of stream) contents.push(chunk.choices[0]?.delta.content ?? "");
    })();
    return { error: await errorOf(reading), content: contents.join("") };
  },

  // The SDK's own two retries.
  async retries(model = "fail-once") {
    const patient = client.withOptions({ maxRetries: 2 });
    const { data, response } = await patient.chat.completions.create({ model, messages }).withResponse();
    return { content: contentOf(data.choices[0]), status: response.status };
  },

  async abort(model = "hang-mid-stream") {
    const controller = new AbortController();
    const stream = await client.chat.completions.create({ model, messages, stream: true }, { signal: controller.signal });
    const contents = [];
    for await (const chunk of stream) {
      contents.push(chunk.choices[0]?.delta.content ?? "");
      if (contents.length === 2) controller.abort();
    }
    return { chunks: contents.length, aborted: controller.signal.aborted };
  },
};

async function streamed(body) {
  const stream = await client.chat.completions.create({ ...body, stream: true });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const content = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  return { content, chunks };
}

function contentOf(choice) {
  return choice.message.content;
}

async function errorOf(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) return { class: error.constructor.name, message: error.message };
    const { status = null, code = null, type = null, param = null, message, requestID = null } = error;
    return { class: error.constructor.name, status, code, type, param, message, requestID };
  }
}

const [command, ...models] = process.argv.slice(2);
if (!Object.hasOwn(commands, command)) {
  console.error(`commands: ${Object.keys(commands).join(", ")}`);
  process.exit(2);
}
console.log(JSON.stringify(await commands[command](...models)));
