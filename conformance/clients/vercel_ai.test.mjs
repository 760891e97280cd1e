// Vercel's AI SDK with its provider for everything that speaks OpenAI.

import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany, generateText, isStepCount, Output, streamText, tool } from "ai";
import { z } from "zod";

const gateway = createOpenAICompatible({
  name: "gateway",
  baseURL: process.env.GATEWAY_BASE_URL,
  apiKey: process.env.GATEWAY_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const prompt = "hello there";
const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});

test("generates text", async () => {
  const { text, usage, finishReason } = await generateText({ model: gateway("answer"), prompt });
  assert.equal(text, "You said: hello there");
  assert.equal(finishReason, "stop");
  assert.deepEqual([usage.inputTokens, usage.outputTokens], [2, 4]);
});

test("streams text with usage", async () => {
  const result = streamText({ model: gateway("answer"), prompt });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  assert.equal(pieces.join(""), "You said: hello there");
  assert.ok(pieces.length > 1);
  const usage = await result.usage;
  assert.deepEqual([usage.inputTokens, usage.outputTokens], [2, 4]);
  assert.equal(await result.finishReason, "stop");
});

test("streams reasoning", async () => {
  const result = streamText({ model: gateway("reasoning"), prompt });
  assert.equal(await result.text, "You said: hello there");
  assert.equal(await result.reasoningText, "First I think, then I answer.");
});

test("streams from the built-in model", async () => {
  assert.equal(await streamText({ model: gateway("echo"), prompt }).text, prompt);
});

for (const [way, call] of [["whole", generateText], ["streamed", streamText]]) {
  test(`calls tools, ${way}`, async () => {
    const result = await call({ model: gateway("tools"), prompt, tools: { weather }, stopWhen: isStepCount(3) });
    const steps = await result.steps;
    assert.deepEqual(steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
    assert.deepEqual(steps[0].toolCalls[0].input, { city: "city" });
    assert.equal(await result.text, "The tool said: sunny in city");
  });
}

test("generates an object", async () => {
  const output = Output.object({ schema: z.object({ name: z.string(), age: z.number().int() }) });
  const result = await generateText({ model: gateway("answer"), prompt: "a person", output });
  assert.deepEqual(result.output, { name: "name", age: 1 });
});

test("streams a completion", async () => {
  const result = streamText({ model: gateway.completionModel("gpt-3.5-turbo-instruct"), prompt });
  assert.equal(await result.text, "Hello");
  const usage = await result.usage;
  assert.deepEqual([usage.inputTokens, usage.outputTokens], [3, 2]);
});

test("embeds a text", async () => {
  const { embedding } = await embed({ model: gateway.embeddingModel("text-embedding-3-small"), value: prompt });
  assert.ok(embedding.length > 0 && embedding.every(Number.isFinite));
});

test("embeds texts", async () => {
  const model = gateway.embeddingModel("text-embedding-3-small");
  const { embeddings } = await embedMany({ model, values: [prompt] });
  assert.equal(embeddings.length, 1);
});

test("tells an error", async () => {
  const model = gateway("error-context");
  await assert.rejects(generateText({ model, prompt, maxRetries: 0 }), (error) => {
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /maximum context length/);
    return true;
  });
});
