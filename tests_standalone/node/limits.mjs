// The official Node SDK with its own two retries against a gateway that limits: `node limits.mjs MODEL` prints one line
// of JSON, what two calls in a row came to. BASE_URL and API_KEY say where to.

import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 2 });
const seen = [];
for (let count = 0; count < 2; count += 1) {
  try {
    const messages = [{ role: "user", content: "hello" }];
    const call = client.chat.completions.create({ model: process.argv[2], messages, max_tokens: 100 });
    seen.push({ status: (await call.withResponse()).response.status });
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    seen.push({ class: error.constructor.name, status: error.status, code: error.code, type: error.type });
  }
}
console.log(JSON.stringify(seen));
