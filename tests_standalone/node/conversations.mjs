// Chats as the users of the official Node SDK write them. `node conversations.mjs MODEL` prints one line of JSON: of each
// step the chats (conversation and history as the client has it), and of every call what it was told. The steps are those
// of system/test_conversations_sdk.py. BASE_URL and API_KEY say where to. No call is repeated: a 409 would be an error.

import OpenAI from "openai";

const [model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 });
const system = { role: "system", content: "Be brief" };
const calls = [];
const steps = {};

const user = (content) => ({ role: "user", content });

// The chat that an answer makes of these messages. Every other call is streamed.
async function ask(messages, more = {}) {
  const stream = calls.push(null) % 2 === 0;
  const place = calls.length - 1;
  const answer = await client.chat.completions.create({ model, messages, max_tokens: 12, stream, ...more });
  const { id, content, usage } = stream ? await heard(answer) : told(answer);
  const { prompt_tokens: input, completion_tokens: output, cost } = usage;
  calls[place] = { id, input, output, cost };
  return { id, messages: [...messages, { role: "assistant", content }] };
}

function told(answer) {
  return { id: answer.conversation_id, content: answer.choices[0].message.content, usage: answer.usage };
}

async function heard(stream) {
  let content = "";
  let last;
  for await (const chunk of stream) {
    content += chunk.choices[0]?.delta.content ?? "";
    last = chunk;
  }
  return { id: last.conversation_id, content, usage: last.usage };
}

const next = (chat, content) => ask([...chat.messages, user(content)]);
const atOnce = (count, work) => Promise.all(Array.from({ length: count }, (_, index) => work(index)));

steps.loop = [await ask([system, user("first of all")])];
for (const more of ["and then", "and in the end"]) steps.loop.push(await next(steps.loop.at(-1), more));

steps.openings = [await ask([system, user("one chat")]), await ask([system, user("one chat")])];

steps.eight = await atOnce(8, () => ask([system, user("all the same")]));
const once = await ask([system, user("only once")]);
steps.eight_more = await atOnce(8, () => next(once, "still the same"));

const opening = await ask([user("two ways from here")]);
steps.ways = await atOnce(2, (index) => next(opening, `way ${index}`));
steps.ways = await atOnce(2, (index) => next(steps.ways[index], `on way ${index}`));

steps.edited = [await ask([...steps.loop[0].messages, user("or rather")])];
steps.edited.push(await next(steps.edited[0], "and on"));

const continued = await ask([user("by its id")], { conversation_id: steps.loop.at(-1).id });
steps.continued = [{ id: continued.id, messages: [...steps.loop.at(-1).messages, ...continued.messages] }];

steps.before = [opening, once];
console.log(JSON.stringify({ steps, calls }));
